"""Progress of a search: a live table in a terminal, else lines."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

import ray.tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.terminal.entry_point import tell
from jobs.tuning.trial_judge import METRIC
from pneumo.config import TuneConfig
from pneumo.tuning.trials import show_setting

_ROWS = 16
_ENDED = ("TERMINATED", "ERROR")
_STATES = {"PENDING": "waits", "RUNNING": "trains", "TERMINATED": "done", "ERROR": "failed"}


class LiveTable(ray.tune.Callback):  # type: ignore[misc]
    """Shows Tune's trials: `left` to come, after `ended` earlier ones; a context manager."""

    def __init__(self, label: str, config: TuneConfig, left: int, ended: int) -> None:
        self.label, self.config, self.left, self.ended = label, config, left, ended
        self.trials: Sequence[Any] = ()  # Tune's own, in their current state
        self.live: Live | None = None
        self.started_s = self.shown_s = time.monotonic()
        self.epochs_before: int | None = None  # trained before this process began

    def __getstate__(self) -> dict[str, Any]:
        """No state: Tune pickles its callbacks to resume, but a search resumes from its records."""
        return {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():  # rich shows lines that are printed meanwhile above the table
            self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.trials = trials
        if self.epochs_before is None:
            self.epochs_before = self._count_epochs()
        if time.monotonic() - self.shown_s < (20 if self.live is None else 0.25):
            return
        self.shown_s = time.monotonic()
        if self.live is None:
            tell(f"{self.label}: {self.describe_progress()}")
        else:
            self.live.update(self.draw(), refresh=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.trials = trials

    def _count_epochs(self) -> int:
        """Epochs trained; an ended trial counts with all its epochs."""
        full = self.config.epochs
        return sum(full if t.status in _ENDED else _epoch(t) for t in self.trials)

    def describe_progress(self) -> str:
        """Trials, epochs, the time left and the best objective, in a line."""
        done, total = self._count_epochs(), self.left * self.config.epochs
        ended = self.ended + sum(trial.status in _ENDED for trial in self.trials)
        text = f"{ended} of {self.ended + self.left} trials, {done} of {total} epochs"
        if new := done - (self.epochs_before or 0):
            left_s = (time.monotonic() - self.started_s) / new * (total - done)
            text += f", about {timedelta(seconds=round(left_s))} left"
        known = [trial.last_result[METRIC] for trial in self.trials if METRIC in trial.last_result]
        return f"{text}; best {max(known):.4f}" if known else text

    def draw(self) -> Table:
        """The running trials, then the best ones."""
        table = Table(title=f"{self.label}: {self.describe_progress()}", title_justify="left")
        keys = list(self.trials[0].config["settings"]) if self.trials else []
        for name in ("trial", *(key.split(".")[-1] for key in keys), "epoch", "objective", ""):
            table.add_column(name)
        shown = sorted(self.trials, key=lambda t: t.last_result.get(METRIC, -1e9), reverse=True)
        for trial in sorted(shown, key=lambda t: t.status != "RUNNING")[:_ROWS]:
            settings = [show_setting(trial.config["settings"][key]) for key in keys]
            epochs, value = _epoch(trial), trial.last_result.get(METRIC)
            state = "failed" if "error" in trial.last_result else _STATES.get(trial.status, "")
            if state == "done" and epochs < self.config.epochs:
                state = "stopped"
            score = f"{value:.4f}" if value is not None else ""
            table.add_row(trial.config["name"], *settings, str(epochs), score, state)
        return table


def _epoch(trial: Any) -> int:
    return int(trial.last_result.get("epoch", 0))
