"""W&B's runs of a search: one a trial, in the search's group, written as the trials end.

A thread of its own writes them, one after the other: W&B may be slow, and no trial waits for it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Self

from jobs.terminal.entry_point import say
from jobs.training.epoch_log import name_for_tracking
from jobs.tuning.trial_records import trial_url
from jobs.tuning.trial_runs import trial_config
from pneumo import storage
from pneumo.config import Config, TuneConfig
from pneumo.dataset.manifest import Manifest
from pneumo.errors import PneumoError
from pneumo.reporting.tracking import NullTracker, Tracker, TrackingOutcome, open_tracker
from pneumo.reporting.tracking.closing import finish_quietly, tracking_folder
from pneumo.tuning.trials import Trial

_SENT = "tracked"
"""Marks, in a trial's folder, that W&B has its run; a search that goes on sends none twice."""
_LEAVE_TIMEOUT_S = 5.0


def log_trial(tracker: Tracker, trial: Trial, config: TuneConfig) -> None:
    """A trial's epochs, and what became of it."""
    for number, record in enumerate(trial.history, 1):
        tracker.log(name_for_tracking(record), epoch=number)
    tracker.summarise(
        {
            "tune/objective": trial.objective(config),
            "tune/epochs": trial.epochs,
            "tune/state": trial.state,
            "tune/error": trial.error,
        }
    )


class TrialTracking:
    """Sends trials that have ended; a context manager whose end waits for the last."""

    def __init__(self, config: Config, manifest: Manifest, run_url: str) -> None:
        self.config, self.manifest, self.run_url = config, manifest, run_url
        self.folder = tracking_folder(run_url)
        self.group = config.tracking.group or run_url.rsplit("/", 1)[-1]
        self.outcomes: list[TrackingOutcome] = []
        self._leaving = False
        self._ended: queue.Queue[Trial | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="trial-tracking", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # the search is to end now; the same command sends the rest
            self._leaving = True
            with contextlib.suppress(queue.Empty):
                while True:
                    self._ended.get_nowait()
        self._ended.put(None)
        self._thread.join(None if kind is None else _LEAVE_TIMEOUT_S)
        self._say()

    def put(self, trial: Trial) -> None:
        """A trial that has ended."""
        self._ended.put(trial)

    def _send_all(self) -> None:
        put_off = []
        while (trial := self._ended.get()) is not None:
            if not self._try(trial, "is put off"):
                put_off.append(trial)
        for trial in put_off:  # a search that has ended is not gone on with
            if not self._leaving:
                self._try(trial, "is not told")

    def _try(self, trial: Trial, otherwise: str) -> bool:
        """Whether W&B has it; no fault of the run's storage ends the others."""
        try:
            self._send(trial)
        except PneumoError as error:
            say(f"W&B: trial {trial.name} {otherwise}: {error}")
            return False
        return True

    def _send(self, trial: Trial) -> None:
        if self.config.tracking.mode == "disabled":
            return
        sent = storage.join(trial_url(self.run_url, trial.name), _SENT)
        if storage.exists(sent):
            return
        tracker = open_tracker(
            self.config.tracking,
            run_dir=self.folder,
            name=f"{self.group}-{trial.name}",
            job_type="tune-trial",
            group=self.group,
            settings={
                **trial_config(self.config, trial.settings).for_others(),
                "seed": trial.seed,
                "dataset_digest": self.manifest.digest,
            },
        )
        if isinstance(tracker, NullTracker):  # W&B is off, or could not even begin a run here
            return
        log_trial(tracker, trial, self.config.tune)
        outcome = finish_quietly(tracker, self.run_url, say)
        if outcome.mode == "offline" and outcome.folder is None:  # neither sent nor kept
            return
        self.outcomes.append(outcome)
        storage.write_text(sent, "")

    def _say(self) -> None:
        """How to send what was not sent, in one line."""
        kept = [outcome for outcome in self.outcomes if outcome.sync_command is not None]
        if kept:
            say(
                f"W&B: {len(kept)} of {len(self.outcomes)} trials not (all) sent; to send them: "
                f"python -m pneumo.tracking sync {self.run_url}"
            )
