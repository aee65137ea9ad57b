"""Which setting a search takes, and why.

The best of many trials on one val split is partly luck. So only trials that had all their epochs
can win, and one that is not significantly behind the best counts as equal: of equals the simplest
is taken. With confirmation the best settings are trained again with seeds that had no part in
choosing them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pneumo.config import Config, TuneConfig, override
from pneumo.dataset.shards import Manifest
from pneumo.network.backbones import count_multiply_adds
from pneumo.training.fit import resolve_pos_weight
from pneumo.tuning.objective import Judgement
from pneumo.tuning.trials import Trial, rank


@dataclass(frozen=True, order=True)
class SimplicityKey:
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
class SettingChoice:
    """Which trial's setting is taken."""

    trial: Trial
    best: Trial
    """The one of the highest objective."""
    ties: tuple[str, ...]
    """Trials that are not significantly behind it, itself included."""
    reason: str
    """One sentence."""
    confirmations: tuple[Confirmation, ...] = ()


def measure_simplicity(config: Config, trial: Trial, manifest: Manifest) -> SimplicityKey:
    """How much work a trial's network is, and how plain its setting."""
    chosen = override(config, trial.settings)
    size = chosen.data.image_size or manifest.image_size
    base = config.model_dump()
    changed = sum(_look_up(base, key) != value for key, value in trial.settings.items())
    return SimplicityKey(
        count_multiply_adds(chosen.model.backbone, size),
        changed,
        abs(math.log(resolve_pos_weight(chosen.train, manifest))),
    )


def choose_setting(
    trials: Sequence[Trial],
    judgements: Mapping[str, Judgement],
    config: TuneConfig,
    plainness: Callable[[Trial], SimplicityKey],
) -> SettingChoice | None:
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
    return SettingChoice(taken, best, tuple(trial.name for trial in ties), reason)


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
    choice: SettingChoice,
    trials: Sequence[Trial],
    confirmations: Sequence[Confirmation],
    plainness: Callable[[Trial], SimplicityKey],
) -> SettingChoice:
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
    return SettingChoice(
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


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
