"""What W&B's service writes of itself: the only place where a failed upload is told."""

from __future__ import annotations

import json
from pathlib import Path

_UPLOAD_FAILED = ("file transfer: upload: failed", "sender: failed to log artifact")


def check_uploads(path: Path) -> None:
    """Raise ConnectionError where the log at `path` says that uploads failed.

    `Run.finish` and `wandb sync` end as if all had arrived, and the service's own counts say so.
    Without a log nothing is known, and nothing raised.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    if failed := sum(_read_message(line).startswith(_UPLOAD_FAILED) for line in lines):
        raise ConnectionError(f"{failed} uploads failed")


def _read_message(line: str) -> str:
    try:
        return str(json.loads(line)["msg"])
    except (ValueError, KeyError, TypeError):
        return ""
