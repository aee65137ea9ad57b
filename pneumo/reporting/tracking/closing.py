"""A job's run in W&B: where its files lie while it is open, and what becomes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pneumo import storage
from pneumo.errors import PneumoError
from pneumo.reporting.tracking import Tracker, TrackingOutcome
from pneumo.reporting.tracking.backlog import keep_backlog


def tracking_folder(run_url: str) -> Path | None:
    """Where W&B's files go: into the run's own folder where it is local; None lets `open_tracker`
    take a temporary one, which `close_tracker` deletes."""
    return storage.local_path(run_url) if storage.is_local(run_url) else None


def close_tracker(tracker: Tracker, run_url: str, tell: Callable[[str], None]) -> None:
    """Finish tracking. What W&B could not send ends in the run's own folder, and `tell` gets a line
    about it."""
    outcome = finish_quietly(tracker, run_url, tell)
    if outcome.sync_command is not None and not storage.is_local(run_url):
        tell(f"W&B: not (all) sent; to send it: python -m pneumo.tracking sync {run_url}")
        return
    for line in outcome.lines():
        tell(line)


def finish_quietly(tracker: Tracker, run_url: str, tell: Callable[[str], None]) -> TrackingOutcome:
    """The same, and only what was lost is told."""
    outcome = tracker.finish()
    if outcome.root is not None and not storage.is_local(run_url):
        try:
            if outcome.sync_command is not None:
                keep_backlog(outcome, run_url)
        except PneumoError as error:  # the job has ended as it has, and its only copy lies there
            tell(f"W&B: not all was sent, nor could it be kept in the run: {error}")
            tell(f"W&B: to send it from here: {outcome.sync_command}")
            return replace(outcome, folder=None)
        shutil.rmtree(outcome.root.parent, ignore_errors=True)
    return outcome
