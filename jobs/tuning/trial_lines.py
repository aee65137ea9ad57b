"""Tells the user how each trial ends, a line each, and has it recorded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.tune
from ray import cloudpickle
from ray.exceptions import RayActorError

from jobs.terminal.entry_point import find_cause, summarise_error, tell
from jobs.tuning.trial_judge import METRIC, WARNING
from pneumo.config import TuneConfig
from pneumo.tuning.trials import State, describe_settings


class TrialLines(ray.tune.Callback):  # type: ignore[misc]
    """Tells how each of Tune's trials ends; `on_end` gets its name, state and error."""

    def __init__(
        self, config: TuneConfig, on_end: Callable[[str, State, str | None], None]
    ) -> None:
        self.config, self.on_end = config, on_end
        self.told: set[str] = set()
        """Ids of trials, and warnings, that were shown to the user."""

    def __getstate__(self) -> dict[str, Any]:
        """No state: Tune pickles its callbacks to resume, but a search resumes from its records."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        warning = result.get(WARNING)
        if warning is not None and warning not in self.told:
            self.told.add(warning)
            tell(f"warning: trial {trial.config['name']}: model: {warning}")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        tell(f"trial {trial.config['name']}  {read_error(trial)}; resumes from its checkpoint")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for trial in trials:  # Tune may have dropped a trial without calling back
            if trial.status == "ERROR" and trial.trial_id not in self.told:
                self._end(trial)

    def _end(self, trial: Any) -> None:
        name, result = trial.config["name"], trial.last_result
        epochs = int(result.get("epoch", 0))
        state: State = "finished" if epochs >= self.config.epochs else "stopped"
        error: str | None = result.get("error")
        if error is not None:
            state, outcome = "diverged", f"failed: {error}"
        elif trial.status == "ERROR":
            state, error = "failed", read_error(trial)
            outcome = f"failed: {error}; the search goes on"
        else:
            stopped, plural = ", stopped" * (state == "stopped"), "s" * (epochs != 1)
            outcome = f"{result[METRIC]:.4f}{stopped} after {epochs} epoch{plural}"
        self.told.add(trial.trial_id)
        self.on_end(name, state, error)
        tell(f"trial {name}  {describe_settings(trial.config['settings'])}  {outcome}")


def read_error(trial: Any) -> str:
    """Why a trial of Tune failed the last time, in one line.

    Reads the driver's own folder: `trial.get_error` reads the run's folder, which gets it later.
    """
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return "for a reason that Ray does not give"
    cause: BaseException = cloudpickle.loads(Path(path).read_bytes())
    if isinstance(cause, RayActorError):
        return "its process was lost"
    return summarise_error(find_cause(cause) or cause) or type(cause).__name__
