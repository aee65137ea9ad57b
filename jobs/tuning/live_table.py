"""How a search goes, for the person who started it: a live table in a terminal, plain lines
elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ray.tune
from ray import cloudpickle
from ray.exceptions import RayActorError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.terminal.entry_point import find_cause, say
from jobs.tuning.trial_judge import METRIC, WARNING
from pneumo.config import TuneConfig, without_folders

_ROWS = 16
_PLAIN_INTERVAL_S = 20.0
_REDRAW_INTERVAL_S = 0.25


def describe_settings(settings: Mapping[str, Any]) -> str:
    """`lr 0.00031  pos_weight 2.4`."""
    return "  ".join(f"{key.split('.')[-1]} {show_value(v)}" for key, v in settings.items())


def show_value(value: Any) -> str:
    """A number in three digits, a file without its folders, all else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(without_folders(value))


def read_error(trial: Any) -> str:
    """Why a trial of Tune's failed the last time, in a line.

    From the driver's own folder: `trial.get_error` looks in the run, where it comes later.
    """
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return "for a reason that Ray does not tell"
    cause: BaseException = cloudpickle.loads(Path(path).read_bytes())
    if isinstance(cause, RayActorError):
        return "its process was lost"
    return (str(find_cause(cause) or cause).strip().splitlines() or [type(cause).__name__])[-1]


class LiveTable(ray.tune.Callback):  # type: ignore[misc]
    """Tune's events as a table or as lines; a context manager."""

    def __init__(self, label: str, config: TuneConfig, left: int, ended: int) -> None:
        """`left` trials are to come after the `ended` ones."""
        self.label, self.config, self.left, self.ended = label, config, left, ended
        self.on_end: Callable[[Any], None] = lambda trial: None
        """Hears of each trial of Tune's that ends."""
        self.trials: Sequence[Any] = ()
        """Tune's own, as they are now."""
        self.started_s = self.spoken_s = time.monotonic()
        self.known_epochs: int | None = None
        """Epochs that were there before this process began."""
        self.live: Live | None = None
        self.told: set[str] = set()
        """Trials of Tune's whose end is known."""
        self.warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a way of going on that is not ours."""
        return {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        if self.known_epochs is None:
            self.known_epochs = self._done()
        now_s = time.monotonic()
        if self.live is not None and now_s - self.spoken_s > _REDRAW_INTERVAL_S:
            self.spoken_s = now_s
            self.live.update(self._draw(), refresh=True)
        elif self.live is None and now_s - self.spoken_s > _PLAIN_INTERVAL_S:
            self.spoken_s = now_s
            say(f"{self.label}: {self._describe_progress()}")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        warning = result.get(WARNING)
        if warning is not None and warning not in self.warned:
            self.warned.add(warning)
            self._say(f"warning: trial {trial.config['name']}: model: {warning}")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        epochs = result.get("epoch", 0)
        if "error" in result:
            outcome = f"failed: {result['error']}"
        elif epochs < self.config.epochs:
            outcome = f"{result[METRIC]:.4f}, stopped after {_count(epochs)}"
        else:
            outcome = f"{result[METRIC]:.4f} after {_count(epochs)}"
        self._end(trial, outcome)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, f"failed: {read_error(trial)}; the search goes on")

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        why = read_error(trial)
        self._say(f"trial {trial.config['name']}  {why}; goes on from its checkpoint")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        for trial in trials:  # that Tune has given up without a word
            if trial.status == "ERROR" and trial.trial_id not in self.told:
                self.on_trial_error(0, trials, trial)

    def _end(self, trial: Any, outcome: str) -> None:
        self.told.add(trial.trial_id)
        self.on_end(trial)
        drawn = trial.config
        shown = describe_settings(drawn["settings"])
        self._say(f"trial {drawn['name']}  {shown}  {outcome}")

    def _say(self, line: str) -> None:
        if self.live is not None:
            self.live.console.print(line, highlight=False)
        else:
            say(line)

    def _done(self) -> int:
        """Epochs trained, those included that a trial will not need any more."""
        ended = {"TERMINATED", "ERROR"}
        return sum(
            self.config.epochs if trial.status in ended else _epoch(trial) for trial in self.trials
        )

    def _describe_progress(self) -> str:
        done, total = self._done(), self.left * self.config.epochs
        ended = sum(trial.status in {"TERMINATED", "ERROR"} for trial in self.trials)
        text = (
            f"{self.ended + ended} of {self.ended + self.left} trials, {done} of {total} epochs "
            "done or spared"
        )
        fresh = done - (self.known_epochs or 0)
        if fresh:
            left_s = (time.monotonic() - self.started_s) / fresh * (total - done)
            text += f", about {_describe_seconds(left_s)} left"
        best = self._best()
        return text if best is None else f"{text}; best {best.last_result[METRIC]:.4f}"

    def _best(self) -> Any:
        judged = [trial for trial in self.trials if METRIC in trial.last_result]
        return max(judged, key=lambda trial: trial.last_result[METRIC], default=None)

    def _draw(self) -> Table:
        keys = list(self.trials[0].config["settings"]) if self.trials else []
        table = Table(title=f"{self.label}: {self._describe_progress()}", title_justify="left")
        table.add_column("trial")
        for key in keys:
            table.add_column(key.split(".")[-1], justify="right")
        table.add_column("epoch", justify="right")
        table.add_column(self.config.objective, justify="right")
        table.add_column("")
        best = self._best()
        for trial in _most_interesting(self.trials)[:_ROWS]:
            value = trial.last_result.get(METRIC)
            table.add_row(
                trial.config["name"],
                *(show_value(trial.config["settings"][key]) for key in keys),
                f"{_epoch(trial)}/{self.config.epochs}",
                "" if value is None else f"{value:.4f}",
                _describe_state(trial, self.config),
                style="bold" if trial is best else "",
            )
        if len(self.trials) > _ROWS:
            table.caption = f"and {len(self.trials) - _ROWS} more"
        return table


def _most_interesting(trials: Sequence[Any]) -> list[Any]:
    """Those that run, then the best."""
    return sorted(
        trials,
        key=lambda trial: (trial.status != "RUNNING", -trial.last_result.get(METRIC, -1e9)),
    )


def _describe_state(trial: Any, config: TuneConfig) -> str:
    if trial.status == "ERROR" or "error" in trial.last_result:
        return "failed"
    if trial.status != "TERMINATED":
        return {"RUNNING": "trains", "PENDING": "waits"}.get(
            trial.status, str(trial.status).lower()
        )
    return "stopped" if _epoch(trial) < config.epochs else "done"


def _epoch(trial: Any) -> int:
    return int(trial.last_result.get("epoch", 0))


def _count(epochs: int) -> str:
    return f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"


def _describe_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
