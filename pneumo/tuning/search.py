"""What a search found: its trials, which setting to take and why, and the recipe of it.

The best of many trials on one val split is partly luck. So a trial is judged after its last epochs
(`objective.smooth`), only trials that had all their epochs can win, and one that is not
significantly behind the best counts as equal: of equals the cheapest and plainest is taken. With
confirmation the best settings are trained again with seeds that had no part in choosing them.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import optuna
import pyarrow as pa
import pyarrow.parquet as pq

from pneumo.config import Config, TuneConfig, override
from pneumo.dataset.manifest import Manifest
from pneumo.evaluation.metrics import Z_95
from pneumo.network.backbones import count_multiply_adds
from pneumo.search_space import Domain, Scalar
from pneumo.training.fit import resolve_pos_weight
from pneumo.tuning.objective import Judgement, smooth

State = Literal["finished", "stopped", "diverged", "failed", "unfinished"]
"""finished: had all its epochs; stopped: fell behind at a rung; diverged: the setting cannot be
trained; failed: something else broke, so that another try makes sense."""
OBJECTIVE = "val/objective"
"""Name of one epoch's objective among its metrics, beside `ERROR`, its standard error."""
ERROR = "val/objective_error"
MIN_TRIALS_FOR_IMPORTANCE = 8

History = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Trial:
    """One setting, trained."""

    name: str
    settings: Mapping[str, Scalar]
    """What was drawn, by dotted key."""
    seed: int
    state: State
    history: History = ()
    """Metrics of its epochs, each once, in order."""
    error: str | None = None
    """Why it failed."""
    fell_back: bool = False
    """Whether it started from random weights where others were asked for."""

    @property
    def epochs(self) -> int:
        """How many it had."""
        return len(self.history)

    @property
    def is_open(self) -> bool:
        """Whether a search that goes on trains it."""
        return self.state in ("unfinished", "failed")

    @property
    def seconds(self) -> float:
        """That its epochs took."""
        return sum(epoch["epoch_s"] or 0.0 for epoch in self.history)

    def objective(self, config: TuneConfig, epochs: int | None = None) -> float | None:
        """After its last epoch, or after `epochs` of them; None without any."""
        values = [epoch[OBJECTIVE] for epoch in self.history[:epochs]]
        known = [value for value in values if value is not None]
        return smooth(known, config.smoothing_epochs) if known else None

    def interval(self, config: TuneConfig) -> tuple[float, float] | None:
        """95 %, by the standard error of its last epoch."""
        value = self.objective(config)
        error = self.history[-1][ERROR] if self.history else None
        if value is None or error is None:
            return None
        return value - Z_95 * error, value + Z_95 * error


@dataclass(frozen=True, order=True)
class Plainness:
    """What is preferred among equals: less work, then plainer; less is better."""

    multiply_adds: int
    """Of one image, forward."""
    changed: int
    """Searched settings other than the configuration's own."""
    weight_distortion: float
    """|log pos_weight|: how far the probabilities are shifted."""


@dataclass(frozen=True)
class Confirmation:
    """One setting, trained again with new seeds."""

    name: str
    """Of the trial."""
    objectives: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.objectives)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of one."""
        return statistics.stdev(self.objectives) if len(self.objectives) > 1 else None


@dataclass(frozen=True)
class Choice:
    """Which trial's setting is taken."""

    trial: Trial
    best: Trial
    """The one of the highest objective."""
    ties: tuple[str, ...]
    """Trials that are not significantly behind it, itself included."""
    reason: str
    """One sentence."""
    confirmations: tuple[Confirmation, ...] = ()


@dataclass(frozen=True)
class Search:
    """All of a search."""

    name: str
    config: Config
    manifest_digest: str
    trials: tuple[Trial, ...]
    """In the order of `rank`."""
    choice: Choice
    confirmed: tuple[Trial, ...] = ()
    """What confirmation trained; each is named after its setting's trial."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Share of the objective's variation that each key accounts for; empty where unknown."""

    @property
    def warning(self) -> str | None:
        """What makes its result doubtful; None: nothing."""
        begun = [trial for trial in (*self.trials, *self.confirmed) if trial.epochs]
        random = sum(trial.fell_back for trial in begun)
        if not random:
            return None
        weights = self.config.model.weights
        if random == len(begun):
            return (
                f"model.weights {weights} could not be had: all trials started from random "
                "weights, and what was found holds for those"
            )
        return (
            f"model.weights could not be had everywhere: {random} of {len(begun)} trials started "
            "from random weights, and cannot be compared with the others"
        )

    @property
    def epochs(self) -> int:
        """That all trials had, confirmation left out."""
        return sum(trial.epochs for trial in self.trials)


def rank(trials: Sequence[Trial], config: TuneConfig) -> tuple[Trial, ...]:
    """Best first: those that had all their epochs, then those that were stopped, by how far they
    came; failed ones last."""
    order: Mapping[State, int] = {
        "finished": 0,
        "stopped": 1,
        "unfinished": 2,
        "diverged": 3,
        "failed": 4,
    }

    def place(trial: Trial) -> tuple[int, int, float, str]:
        value = trial.objective(config)
        return (
            order[trial.state],
            -trial.epochs if trial.state != "finished" else 0,
            math.inf if value is None else -value,
            trial.name,
        )

    return tuple(sorted(trials, key=place))


def measure_plainness(config: Config, trial: Trial, manifest: Manifest) -> Plainness:
    """How much work a trial's network is, and how plain its setting."""
    chosen = override(config, trial.settings)
    size = chosen.data.image_size or manifest.image_size
    base = config.model_dump()
    changed = sum(_look_up(base, key) != value for key, value in trial.settings.items())
    return Plainness(
        count_multiply_adds(chosen.model.backbone, size),
        changed,
        abs(math.log(resolve_pos_weight(chosen.train, manifest))),
    )


def choose(
    trials: Sequence[Trial],
    judgements: Mapping[str, Judgement],
    config: TuneConfig,
    plainness: Callable[[Trial], Plainness],
) -> Choice | None:
    """The plainest of the trials that are not significantly behind the best; None where no trial
    had all its epochs.

    Behind by at most one standard error of the difference, on the same studies of val, is not
    significantly (the rule of Breiman et al. 1984, 3.4.3, in pairs).
    """
    finished = [trial for trial in rank(trials, config) if trial.state == "finished"]
    if not finished:
        return None
    best = finished[0]
    ties = [trial for trial in finished if _is_tie(trial, best, judgements, config)]
    taken = min(ties, key=plainness)
    if len(ties) == 1:
        reason = "the best, and no other is within the standard error of its difference to it"
    elif taken is best:
        reason = f"the best, and the plainest of the {len(ties)} within the standard error of it"
    else:
        reason = (
            f"the plainest of the {len(ties)} that are within the standard error of the "
            f"difference to the best, trial {best.name}"
        )
    return Choice(taken, best, tuple(trial.name for trial in ties), reason)


def _is_tie(
    trial: Trial, best: Trial, judgements: Mapping[str, Judgement], config: TuneConfig
) -> bool:
    if trial is best:
        return True
    mine, theirs = trial.objective(config), best.objective(config)
    if (
        trial.name not in judgements
        or best.name not in judgements
        or mine is None
        or theirs is None
    ):
        return False
    return theirs - mine <= judgements[best.name].error_of_difference(judgements[trial.name])


def choose_confirmed(
    choice: Choice,
    trials: Sequence[Trial],
    confirmations: Sequence[Confirmation],
    plainness: Callable[[Trial], Plainness],
) -> Choice:
    """The choice after confirmation: by the mean over new seeds; ties, within the standard error of
    the difference of means, go to the plainest."""
    by_name = {trial.name: trial for trial in trials}
    best = max(confirmations, key=lambda one: one.mean)

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

    ties = [one for one in confirmations if is_tie(one)]
    taken = min(ties, key=lambda one: plainness(by_name[one.name]))
    seeds = len(best.objectives)
    if taken is best:
        reason = f"the highest mean over {seeds} new seeds"
    else:
        reason = (
            f"the plainest of the {len(ties)} settings whose means over {seeds} new seeds are "
            f"within the standard error of the highest, trial {best.name}"
        )
    return Choice(
        by_name[taken.name],
        choice.best,
        tuple(one.name for one in ties),
        reason,
        tuple(confirmations),
    )


def settings_to_confirm(trials: Sequence[Trial], config: TuneConfig) -> tuple[Trial, ...]:
    """The best settings, as many as `confirm_settings`."""
    finished = [trial for trial in rank(trials, config) if trial.state == "finished"]
    return tuple(finished[: config.confirm_settings])


def make_recipe(config: Config, settings: Mapping[str, Scalar]) -> dict[str, Any]:
    """The search's configuration with `settings`, as differences from the defaults."""
    chosen, defaults = override(config, settings), Config()
    recipe: dict[str, Any] = {} if chosen.seed == defaults.seed else {"seed": chosen.seed}
    for section in ("data", "augment", "model", "train"):
        values, usual = getattr(chosen, section), getattr(defaults, section)
        differences = {
            name: value
            for name, value in values.model_dump(mode="json").items()
            if value != getattr(usual, name)
        }
        if differences:
            recipe[section] = differences
    return recipe


def measure_importance(
    trials: Sequence[Trial], space: Mapping[str, Domain], config: TuneConfig, seed: int
) -> dict[str, float]:
    """Optuna's fANOVA (Hutter et al. 2014) of the objective over the keys that vary, most important
    first; sums to 1. Empty where fewer than MIN_TRIALS_FOR_IMPORTANCE trials or one key tell.

    Trials that were stopped count with the objective they were stopped at.
    """
    varied = {key: to_distribution(domain) for key, domain in space.items() if domain.varies}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        value = trial.objective(config)
        if value is not None and trial.state in ("finished", "stopped"):
            study.add_trial(
                optuna.trial.create_trial(
                    params={key: trial.settings[key] for key in varied},
                    distributions=varied,
                    value=value,
                )
            )
    values = {trial.value for trial in study.trials}
    if len(varied) < 2 or len(study.trials) < MIN_TRIALS_FOR_IMPORTANCE or len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found


def to_distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    """The domain as Optuna knows it."""
    if domain.kind in ("choice", "fixed"):
        return optuna.distributions.CategoricalDistribution(domain.values)
    if domain.kind == "integer":
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high))
    return optuna.distributions.FloatDistribution(
        float(domain.low), float(domain.high), log=domain.kind == "log_uniform"
    )


def to_parquet(search: Search) -> bytes:
    """trials.parquet: a row a trial, best first, then a row a confirming one.

    `name`, `role` (search or confirm), `state`, `seed`, `chosen`, `objective` with `low` and
    `high`, `epochs`, `seconds`, `error`, the last epoch's metrics, and each searched key.
    """
    config = search.config.tune
    rows = [
        *(_row(trial, "search", search) for trial in rank(search.trials, config)),
        *(_row(trial, "confirm", search) for trial in search.confirmed),
    ]
    table = _to_columns(rows).replace_schema_metadata(
        {
            "pneumo.choice": json.dumps(
                {
                    "trial": search.choice.trial.name,
                    "best": search.choice.best.name,
                    "ties": search.choice.ties,
                    "reason": search.choice.reason,
                    "confirmations": [asdict(one) for one in search.choice.confirmations],
                }
            )
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _row(trial: Trial, role: str, search: Search) -> dict[str, Any]:
    config = search.config.tune
    interval = trial.interval(config)
    return {
        "name": trial.name,
        "role": role,
        "state": trial.state,
        "seed": trial.seed,
        "chosen": role == "search" and trial.name == search.choice.trial.name,
        "objective": trial.objective(config),
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "epochs": trial.epochs,
        "seconds": trial.seconds,
        "error": trial.error,
        **{f"last {name}": value for name, value in _last_metrics(trial).items()},
        **trial.settings,
    }


def _last_metrics(trial: Trial) -> Mapping[str, float | None]:
    shown = ("val/auroc", "val/loss", "train/loss")
    return {name: trial.history[-1].get(name) if trial.history else None for name in shown}


def _to_columns(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A key that may be a number or a word is written as text."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, pa.float64() if float in kinds <= {int, float} else None)
    return pa.table(columns)


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
