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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "temporary" / "wandb"
    (root / "offline-run-1").mkdir(parents=True)

    def fail(*_: object) -> None:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(closing, "keep_backlog", fail)
    closing.close_tracker(Unsent(root), "s3://bucket/runs/1")
    said = capsys.readouterr().err
    assert "nor could it be kept in the run: the bucket is away" in said
    assert f"wandb sync {root / 'offline-run-1'}" in said
    assert "pneumo.reporting.tracking sync" not in said
    assert (root / "offline-run-1").is_dir()


def test_what_is_kept_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "temporary" / "wandb"
    (root / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(closing, "keep_backlog", lambda *_: None)
    closing.close_tracker(Unsent(root), "s3://bucket/runs/1")
    assert "python -m pneumo.reporting.tracking sync s3://bucket/runs/1" in capsys.readouterr().err
    assert not root.exists()
