"""A job's run in W&B: where its files lie while it is open, and what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from jobs.command import say
from pneumo import storage
from pneumo.tracking import Tracker
from pneumo.tracking.backlog import keep_backlog


def tracking_folder(run_url: str) -> Path | None:
    """Where W&B's files go: into the run's own folder where it is local; None lets `open_tracker`
    take a temporary one, which `close_tracker` deletes."""
    return storage.local_path(run_url) if storage.is_local(run_url) else None


def close_tracker(tracker: Tracker, run_url: str) -> None:
    """Finish tracking; what W&B could not send ends in the run's own folder, and it is said."""
    outcome = tracker.finish()
    if storage.is_local(run_url) or outcome.root is None:
        for line in outcome.lines():
            say(line)
        return
    if outcome.sync_command is None:
        say(f"W&B: {outcome.url}")
    else:
        keep_backlog(outcome, run_url)
        say(f"W&B: not (all) sent; to send it: python -m pneumo.tracking sync {run_url}")
    shutil.rmtree(outcome.root.parent, ignore_errors=True)
