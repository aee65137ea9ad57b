"""A trial of a search: its setting, its epochs, and how trials are ranked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import expit, logit

from pneumo.config import TuneConfig, without_folders
from pneumo.evaluation.estimates import Z_95
from pneumo.search_space import Scalar
from pneumo.tuning.objective import smooth

State = Literal["finished", "stopped", "diverged", "failed", "unfinished"]
"""finished: has all its epochs; stopped: by ASHA at a rung; diverged: the setting cannot be
trained; failed: another error, so that another try makes sense."""
OBJECTIVE = "val/objective"
"""The objective among an epoch's metrics, beside `ERROR`, its standard error."""
ERROR = "val/objective_error"

History = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Trial:
    """One setting, trained."""

    name: str
    settings: Mapping[str, Scalar]
    """The sampled values, by dotted key."""
    seed: int
    state: State
    history: History = ()
    """Metrics of each epoch, in order."""
    error: str | None = None
    """Why it failed."""
    fell_back: bool = False
    """See `Initialisation.fell_back`."""

    @property
    def epochs(self) -> int:
        """Number of trained epochs."""
        return len(self.history)

    @property
    def is_open(self) -> bool:
        """Whether a resumed search trains it."""
        return self.state in ("unfinished", "failed")

    @property
    def is_comparable(self) -> bool:
        """Whether its objective, if it has one, tells how good its setting is."""
        return self.state in ("finished", "stopped")

    @property
    def seconds(self) -> float:
        """Duration of its epochs."""
        return sum(epoch["epoch_s"] or 0.0 for epoch in self.history)

    def objective(self, config: TuneConfig, epochs: int | None = None) -> float | None:
        """The smoothed objective after its last epoch, or after `epochs` of them; None without
        any."""
        values = [epoch[OBJECTIVE] for epoch in self.history[:epochs]]
        known = [value for value in values if value is not None]
        return smooth(known, config.smoothing_epochs) if known else None

    def interval(self, config: TuneConfig) -> tuple[float, float] | None:
        """95 % interval of the objective, from the standard error of the last epoch; on the logit's
        scale where the objective is between 0 and 1, and none at either."""
        value = self.objective(config)
        error = self.history[-1][ERROR] if self.history else None
        if value is None or error is None:
            return None
        reach = Z_95 * error
        if config.objective == "log_loss":
            return value - reach, value + reach
        if not 0 < value < 1:
            return None
        centre, reach = float(logit(value)), reach / (value * (1 - value))
        return float(expit(centre - reach)), float(expit(centre + reach))


def sort_trials(trials: Sequence[Trial], config: TuneConfig) -> tuple[Trial, ...]:
    """Best first: finished trials by objective, then stopped ones by number of epochs, then the
    others; failed ones last."""
    order: tuple[State, ...] = ("finished", "stopped", "unfinished", "diverged", "failed")

    def key(trial: Trial) -> tuple[int, int, float, str]:
        value = trial.objective(config)
        return (
            order.index(trial.state),
            -trial.epochs if trial.state != "finished" else 0,
            math.inf if value is None else -value,
            trial.name,
        )

    return tuple(sorted(trials, key=key))


def describe_settings(settings: Mapping[str, Scalar]) -> str:
    """`lr 0.00031  pos_weight 2.4`."""
    return "  ".join(f"{key.split('.')[-1]} {show_setting(v)}" for key, v in settings.items())


def show_setting(value: Any) -> str:
    """A number in three digits, a file without its folders, anything else unchanged."""
    return f"{value:.3g}" if isinstance(value, float) else str(without_folders(value))
