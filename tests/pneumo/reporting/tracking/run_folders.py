"""Folders as a training leaves them, without a training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.reporting.tracking.tracked_run import prepare_tracking
from pneumo.training.checkpoints import CheckpointEntry, CheckpointIndex

AUROCS = (0.6, 0.9, 0.7, 0.8, 0.5)
"""On val, by epoch; the second is the best."""


def write_training(
    run: Path, store_url: str, *, epochs: int = 3, finished: bool = True, **changes: Any
) -> Path:
    """The folder of a training of so many epochs; may be written again with more of them.

    `changes` are settings with `_` for the dot after the section (`tracking__group`).
    """
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(override(Config(), settings).to_json())
    prepare_tracking(str(run), read_manifest(store_url))
    rows = [describe_epoch(number) for number in range(1, epochs + 1)]
    write_lines(run / "metrics.jsonl", rows)
    entries = tuple(
        CheckpointEntry(
            name=f"epoch-{n:04d}.pt", epoch=n, val_auroc=AUROCS[n - 1], sha256=f"{n}" * 64
        )
        for n in range(1, epochs + 1)
    )
    index = CheckpointIndex(attempt="a", finished=finished, entries=entries)
    (run / "checkpoints").mkdir(exist_ok=True)
    write_text(run / "checkpoints" / "index.json", index.model_dump_json())
    return run


def describe_epoch(number: int) -> dict[str, Any]:
    """An epoch's line of metrics.jsonl."""
    return {
        "epoch": number,
        "train/loss": 1 / number,
        "val/auroc": AUROCS[number - 1],
        "val/precision": None,
        "lr": 0.1,
        "images_per_s": 10.0 * number,
        "data/samples": 64.0,
    }


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines, whole at any moment."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """The file, whole at any moment."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
