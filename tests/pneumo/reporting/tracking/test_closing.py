"""What W&B could not send is kept in the run, and no fault of that decides how a job ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumo.errors import StorageError
from pneumo.reporting.tracking import MemoryTracker, TrackingOutcome, closing


class Unsent(MemoryTracker):
    """One whose run lies in a temporary folder, all of it unsent."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def finish(self) -> TrackingOutcome:
        return TrackingOutcome("offline", folder=self.root / "offline-run-1", root=self.root)


def test_what_cannot_be_kept_stays_where_it_is_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "temporary" / "wandb"
    (root / "offline-run-1").mkdir(parents=True)

    def fail(*_: object) -> None:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(closing, "keep_backlog", fail)
    said: list[str] = []
    closing.close_tracker(Unsent(root), "s3://bucket/runs/1", said.append)
    assert "nor could it be kept in the run: the bucket is away" in " ".join(said)
    assert f"wandb sync {root / 'offline-run-1'}" in " ".join(said)
    assert "pneumo.tracking sync" not in " ".join(said)
    assert (root / "offline-run-1").is_dir()


def test_what_is_kept_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "temporary" / "wandb"
    (root / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(closing, "keep_backlog", lambda *_: None)
    said: list[str] = []
    closing.close_tracker(Unsent(root), "s3://bucket/runs/1", said.append)
    assert said == [
        "W&B: not (all) sent; to send it: python -m pneumo.tracking sync s3://bucket/runs/1"
    ]
    assert not root.exists()
