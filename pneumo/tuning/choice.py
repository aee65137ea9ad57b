"""Which setting a search chooses, and why.

The best of many trials on one val split is partly luck. So only trials with all their epochs can be
chosen; those not significantly worse than the best count as ties, and the simplest of the ties is
chosen. With confirmation the best settings are trained again with seeds that the search did not
use.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pneumo.config import Config, TuneConfig
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest
from pneumo.network.backbones import build_model
from pneumo.search_space import flatten
from pneumo.training.preconditions import resolve_pos_weight
from pneumo.tuning.objective import ObjectiveEstimate
from pneumo.tuning.trials import Trial, sort_trials

CONFIRMED_SETTINGS = 3
"""How many settings confirmation trains again."""


@dataclass(frozen=True, order=True)
class SimplicityKey:
    """Sort key of ties; a smaller one is simpler."""

    parameters: int
    """Of the network."""
    changed: int
    """Searched settings whose value differs from the configuration's."""
    weight_distortion: float
    """|log pos_weight|: how far it shifts the logits."""


@dataclass(frozen=True)
class Confirmation:
    """A setting trained again with new seeds."""

    name: str
    """Of the setting's trial."""
    objectives: tuple[float, ...]
    """One per seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.objectives)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.objectives) if len(self.objectives) > 1 else None


@dataclass(frozen=True)
class SettingChoice:
    """The trial whose setting is chosen."""

    trial: Trial
    best: Trial
    """The trial with the highest objective."""
    ties: tuple[str, ...]
    """Names of the trials not significantly worse than the best, itself included."""
    reason: str
    """One sentence."""
    confirmations: tuple[Confirmation, ...] = ()


def measure_simplicity(config: Config, manifest: Manifest, trial: Trial) -> SimplicityKey:
    """The simplicity of a trial's setting."""
    trial_config = override(config, trial.settings)
    base = flatten(config.model_dump())
    drawn = flatten(trial_config.model_dump())  # "none" of a search space is None here
    changed = sum(base[key] != drawn[key] for key in trial.settings)
    return SimplicityKey(
        count_parameters(trial_config.model.backbone),
        changed,
        abs(math.log(resolve_pos_weight(trial_config.train, manifest))),
    )


def count_parameters(backbone: str) -> int:
    """Number of the network's parameters; allocates no memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(backbone).parameters())


def choose_setting(
    trials: Sequence[Trial],
    estimates: Mapping[str, ObjectiveEstimate],
    config: TuneConfig,
    simplicity: Callable[[Trial], SimplicityKey],
) -> SettingChoice | None:
    """The simplest of the trials that are not significantly worse than the best; None where no
    trial has all its epochs.

    Not significantly worse: by at most one standard error of the difference, paired on the studies
    of val (the one-standard-error rule of Breiman et al. 1984, 3.4.3).
    """
    finished = [trial for trial in sort_trials(trials, config) if trial.state == "finished"]
    if not finished:
        return None
    best = finished[0]
    ties = [trial for trial in finished if _is_tie(trial, best, estimates, config)]
    chosen = min(ties, key=simplicity)
    num_equal = len(_keep_first_of_each(ties))
    if num_equal == 1:
        reason = "the best, and no other is within the standard error of its difference to it"
    elif chosen is best:
        reason = f"the best, and the simplest of the {num_equal} within the standard error of it"
    else:
        reason = (
            f"the simplest of the {num_equal} that are within the standard error of the "
            f"difference to the best, trial {best.name}"
        )
    return SettingChoice(chosen, best, tuple(trial.name for trial in ties), reason)


def _is_tie(
    trial: Trial, best: Trial, estimates: Mapping[str, ObjectiveEstimate], config: TuneConfig
) -> bool:
    if trial is best:
        return True
    own, other = estimates.get(trial.name), estimates.get(best.name)
    mine, theirs = trial.objective(config), best.objective(config)
    if own is None or other is None or mine is None or theirs is None:
        return False
    return theirs - mine <= other.error_of_difference(own)


def summarise_seeds(
    settings: Sequence[Trial], trained: Sequence[Trial], config: TuneConfig, *, worst: float
) -> list[Confirmation]:
    """The objectives of each of the `settings` with new seeds. One that diverged counts with
    `worst`; of one that failed nothing is known."""
    found: dict[str, list[float]] = {trial.name: [] for trial in settings}
    for trial in trained:
        value = worst if trial.state == "diverged" else trial.objective(config)
        if trial.state in ("finished", "diverged") and value is not None:
            found[trial.name.split("-")[0]].append(value)
    return [Confirmation(name, tuple(values)) for name, values in found.items() if values]


def choose_confirmed(
    choice: SettingChoice,
    trials: Sequence[Trial],
    confirmations: Sequence[Confirmation],
    simplicity: Callable[[Trial], SimplicityKey],
) -> SettingChoice:
    """The choice after confirmation: the highest mean over new seeds; of ties, within the standard
    error of the difference of means, the simplest. Only settings with the most seeds can win."""
    by_name = {trial.name: trial for trial in trials}
    most = max(len(one.objectives) for one in confirmations)
    complete = [one for one in confirmations if len(one.objectives) == most]
    best = max(complete, key=lambda one: one.mean)

    def is_tie(other: Confirmation) -> bool:
        if other is best:
            return True
        if best.spread is None or other.spread is None:
            return False
        error = math.hypot(
            best.spread / math.sqrt(len(best.objectives)),
            other.spread / math.sqrt(len(other.objectives)),
        )
        return best.mean - other.mean <= error

    ties = [one for one in complete if is_tie(one)]
    chosen = min(ties, key=lambda one: simplicity(by_name[one.name]))
    seeds = len(best.objectives)
    if chosen is best:
        reason = f"the highest mean over {seeds} new seeds"
    else:
        reason = (
            f"the simplest of the {len(ties)} settings whose means over {seeds} new seeds are "
            f"within the standard error of the highest, trial {best.name}"
        )
    return SettingChoice(
        by_name[chosen.name],
        choice.best,
        tuple(one.name for one in ties),
        reason,
        tuple(confirmations),
    )


def settings_to_confirm(trials: Sequence[Trial], config: TuneConfig) -> tuple[Trial, ...]:
    """The best trials with all their epochs, of CONFIRMED_SETTINGS different settings."""
    finished = [trial for trial in sort_trials(trials, config) if trial.state == "finished"]
    return tuple(_keep_first_of_each(finished)[:CONFIRMED_SETTINGS])


def _keep_first_of_each(trials: Sequence[Trial]) -> list[Trial]:
    """Of trials with the same setting the first: all have one seed, so they are one training."""
    first: dict[object, Trial] = {}
    for trial in trials:
        first.setdefault(tuple(sorted(trial.settings.items())), trial)
    return list(first.values())
