"""What W&B has not got of a run: kept beside its results, and sent when the server is there.

    <run>/wandb/offline-run-…/         what was logged, with its pictures
    <run>/wandb/data/artifacts/staging the files of artifacts and tables

The same in a local folder and in a bucket.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pneumo import storage
from pneumo.errors import TrackingError
from pneumo.reporting.tracking.service_log import check_uploads
from pneumo.reporting.tracking.tracker import TrackingOutcome
from pneumo.reporting.tracking.transaction_log import relocate

ROOT = "wandb"
STAGING = "data/artifacts/staging"
_SYNCED = ".synced"
"""Ends the name of the file that W&B leaves beside a log that it has sent."""


def keep_backlog(outcome: TrackingOutcome, run_url: str) -> None:
    """Copy what is still to be sent from W&B's temporary folder to the run's own."""
    if outcome.folder is None or outcome.root is None:
        return
    url = storage.join(run_url, ROOT)
    storage.upload_folder(outcome.root / STAGING, storage.join(url, STAGING))
    storage.upload_folder(outcome.folder, storage.join(url, outcome.folder.name))


def send_backlog(run_url: str, folder: Path, *, timeout_s: float = 600.0) -> int:
    """Send every offline run of a run that is not sent yet; returns how many there were.

    Works on a copy in `folder`, which is empty, because logs name their files by absolute paths.
    Raises TrackingError where one could not be sent whole: it is then sent again the next time.
    """
    url = storage.join(run_url, ROOT)
    logs = find_unsent(run_url)
    if not logs:
        return 0
    root = folder / ROOT
    for name in {STAGING, *(log.rsplit("/", 1)[0] for log in logs)}:
        _fetch(storage.join(url, name), root / name)
    for log in logs:
        (root / log).write_bytes(relocate((root / log).read_bytes(), root))
        _sync(root / log, folder, timeout_s)
        storage.write_bytes(storage.join(url, log + _SYNCED), b"")
    return len(logs)


def find_unsent(run_url: str) -> list[str]:
    """The logs of a run's offline runs that were not sent yet, below its folder `wandb`."""
    names = list(_list_below(storage.join(run_url, ROOT)))
    logs = [name for name in names if name.startswith("offline-run-") and name.endswith(".wandb")]
    return [log for log in logs if log + _SYNCED not in names]


def _list_below(url: str) -> dict[str, str]:
    """The URL of each object below `url`, by its name there."""
    # A file system may spell the root of what it lists in its own way.
    prefix = url.split("://")[-1].strip("/") + "/"
    return {found.split(prefix, 1)[1]: found for found in storage.list_urls(url)}


def _fetch(url: str, folder: Path) -> None:
    for name, found in _list_below(url).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read_bytes(found))


def _sync(log: Path, folder: Path, timeout_s: float) -> None:
    """`wandb sync`, which says of nothing that it failed, and whether it did."""
    command = [sys.executable, "-m", "wandb", "sync", str(log.parent)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise TrackingError(f"{log.parent.name}: W&B did not take it in {timeout_s:g} s") from error
    if not log.with_name(log.name + _SYNCED).exists():
        said = (done.stderr.strip().splitlines() or ["wandb sync said nothing"])[-1]
        raise TrackingError(f"{log.parent.name}: not sent: {said}")
    for path in sorted((folder / ROOT / "logs").glob("debug-sync.*.log")):
        try:
            check_uploads(path)
        except ConnectionError as error:
            raise TrackingError(f"{log.parent.name}: not sent whole: {error}; try again") from error
