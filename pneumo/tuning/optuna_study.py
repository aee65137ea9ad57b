"""A search as an Optuna study: for its plots, samplers and parameter importance."""

from collections.abc import Sequence

import optuna

from pneumo.config import TuneConfig
from pneumo.search_space import Domain
from pneumo.tuning.trials import Trial

MIN_TRIALS_FOR_IMPORTANCE = 8


def to_optuna_study(trials: Sequence[Trial], config: TuneConfig) -> optuna.Study:
    """The comparable trials in order, with the keys that vary and the smoothed objective of each
    epoch. The value of a stopped trial is its objective when it was stopped."""
    varied = {key: to_distribution(domain) for key, domain in config.space.items() if domain.varies}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        value = trial.objective(config)
        if value is None or not trial.is_comparable:
            continue
        by_epoch = {n: trial.objective(config, n) for n in range(1, trial.epochs + 1)}
        study.add_trial(
            optuna.trial.create_trial(
                params={key: trial.settings[key] for key in varied},
                distributions=varied,
                value=value,
                intermediate_values={n: one for n, one in by_epoch.items() if one is not None},
            )
        )
    return study


def measure_importance(trials: Sequence[Trial], config: TuneConfig, seed: int) -> dict[str, float]:
    """Optuna's fANOVA (Hutter et al. 2014) of the objective over the keys that vary, most important
    first; sums to 1. Empty for fewer than MIN_TRIALS_FOR_IMPORTANCE trials, for a single key, and
    where all objectives are equal."""
    study = to_optuna_study(trials, config)
    num_varied = sum(domain.varies for domain in config.space.values())
    num_values = len({trial.value for trial in study.trials})
    if num_varied < 2 or len(study.trials) < MIN_TRIALS_FOR_IMPORTANCE or num_values < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def to_distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """The domain as an Optuna distribution."""
    if domain.kind in ("choice", "fixed"):
        return optuna.distributions.CategoricalDistribution(domain.values)
    if domain.kind == "integer":
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high))
    return optuna.distributions.FloatDistribution(
        float(domain.low), float(domain.high), log=domain.kind == "log_uniform"
    )
