"""Which setting a search takes, and why.

The best of many trials on one val split is partly luck. So only trials that had all their epochs
can win, and one that is not significantly behind the best counts as equal: of equals the simplest
is taken. With confirmation the best settings are trained again with seeds that had no part in
choosing them.
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
from pneumo.tuning.trials import Trial, rank

CONFIRMED_SETTINGS = 3
"""How many settings confirmation trains again."""


@dataclass(frozen=True, order=True)
class SimplicityKey:
    """What is preferred among equals; less is simpler."""

    parameters: int
    """Of the network."""
    changed: int
    """Searched settings other than the configuration's own."""
    weight_distortion: float
    """|log pos_weight|: how far the probabilities are shifted."""


@dataclass(frozen=True)
class Confirmation:
    """One setting, trained again with new seeds."""

    name: str
    """Of the setting's trial."""
    objectives: tuple[float, ...]
    """One for each seed."""

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


def measure_simplicity(config: Config, manifest: Manifest, trial: Trial) -> SimplicityKey:
    """How large a trial's network is, and how far its setting is from the configuration's."""
    chosen = override(config, trial.settings)
    base = flatten(config.model_dump())
    changed = sum(base[key] != value for key, value in trial.settings.items())
    return SimplicityKey(
        count_parameters(chosen.model.backbone),
        changed,
        abs(math.log(resolve_pos_weight(chosen.train, manifest))),
    )


def count_parameters(backbone: str) -> int:
    """How many numbers the network learns; no memory is taken for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(backbone).parameters())


def choose_setting(
    trials: Sequence[Trial],
    estimates: Mapping[str, ObjectiveEstimate],
    config: TuneConfig,
    simplicity: Callable[[Trial], SimplicityKey],
) -> SettingChoice | None:
    """The simplest of the trials that are not significantly behind the best; None where no trial
    had all its epochs.

    Behind by at most one standard error of the difference, on the same studies of val, is not
    significantly (the rule of Breiman et al. 1984, 3.4.3, in pairs).
    """
    finished = [trial for trial in rank(trials, config) if trial.state == "finished"]
    if not finished:
        return None
    best = finished[0]
    ties = [trial for trial in finished if _is_tie(trial, best, estimates, config)]
    taken = min(ties, key=simplicity)
    if len(ties) == 1:
        reason = "the best, and no other is within the standard error of its difference to it"
    elif taken is best:
        reason = f"the best, and the simplest of the {len(ties)} within the standard error of it"
    else:
        reason = (
            f"the simplest of the {len(ties)} that are within the standard error of the "
            f"difference to the best, trial {best.name}"
        )
    return SettingChoice(taken, best, tuple(trial.name for trial in ties), reason)


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


def choose_confirmed(
    choice: SettingChoice,
    trials: Sequence[Trial],
    confirmations: Sequence[Confirmation],
    simplicity: Callable[[Trial], SimplicityKey],
) -> SettingChoice:
    """The choice after confirmation: by the mean over new seeds; ties, within the standard error of
    the difference of means, go to the simplest."""
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
    taken = min(ties, key=lambda one: simplicity(by_name[one.name]))
    seeds = len(best.objectives)
    if taken is best:
        reason = f"the highest mean over {seeds} new seeds"
    else:
        reason = (
            f"the simplest of the {len(ties)} settings whose means over {seeds} new seeds are "
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
    """The best CONFIRMED_SETTINGS."""
    finished = [trial for trial in rank(trials, config) if trial.state == "finished"]
    return tuple(finished[:CONFIRMED_SETTINGS])
