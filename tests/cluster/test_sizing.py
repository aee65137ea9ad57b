"""docs/cluster.md, "Bigger clusters, on paper": each number of its table follows from constants,
and those that can be counted are counted."""

import math
from pathlib import Path

import numpy as np
import pytest

from pneumo.dataset.shards import BLOCK_SAMPLES, SHARD_SAMPLES, Sample, write_shard
from pneumo.network.backbones import build_model
from tests import CHECKOUT

TRAIN_SAMPLES, EPOCHS, BATCH_PER_GPU, IMAGES_PER_S = 21_347, 10, 128, 12_000
SAMPLE_BYTES = 51_712
GRADIENT_BYTES = 4 * 11_170_000
CHECKPOINT_BYTES = 134_000_000
"""The weights, and Adam's two moments."""


def test_the_constants_are_those_of_the_code(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"{i:020x}", rng.integers(0, 255, (224, 224), dtype=np.uint8), i % 2)
        for i in range(128)
    ]
    entry = write_shard(str(tmp_path), "train/000000.tar", samples)
    assert entry.bytes / 128 == pytest.approx(SAMPLE_BYTES, rel=0.02)
    parameters = sum(parameter.numel() for parameter in build_model("resnet18").parameters())
    assert 4 * parameters == pytest.approx(GRADIENT_BYTES, rel=0.01)
    assert 3 * 4 * parameters == pytest.approx(CHECKPOINT_BYTES, rel=0.01)


def test_the_table_follows_from_them() -> None:
    columns = [_column(gpus) for gpus in (8, 64, 512)]
    text = (CHECKOUT / "docs" / "cluster.md").read_text()
    for name in columns[0]:
        row = f"| {name} | {' | '.join(column[name] for column in columns)} |"
        assert row in text


def _column(gpus: int) -> dict[str, str]:
    """What a run of so many workers needs; rates are those of streaming, without `data.cache`."""
    batch = gpus * BATCH_PER_GPU
    steps = TRAIN_SAMPLES // batch
    images_per_s = gpus * IMAGES_PER_S
    steps_per_s = images_per_s / batch
    wanted = TRAIN_SAMPLES // (4 * gpus) // BLOCK_SAMPLES * BLOCK_SAMPLES
    per_shard = max(BLOCK_SAMPLES, min(SHARD_SAMPLES, wanted))
    ring = 2 * (gpus - 1) / gpus * GRADIENT_BYTES * steps_per_s
    of_steps = {
        "steps an epoch": f"{steps}",
        "seconds an epoch": f"{steps * batch / images_per_s:.2g}",
        "GET/s while streaming": f"{images_per_s / BLOCK_SAMPLES:,.0f}",
        "GB/s while streaming": f"{images_per_s * SAMPLE_BYTES / 1e9:.1f}",
        "checkpoints, GB/min": (
            f"{60 * CHECKPOINT_BYTES / 1e9 * images_per_s / max(1, steps * batch):,.1f}"
        ),
        "all-reduce, Gbit/s a GPU": f"{8 * ring / 1e9:.0f}",
    }
    trials = round(EPOCHS * TRAIN_SAMPLES / IMAGES_PER_S)
    return {
        "global batch": f"{batch:,}",
        **(of_steps if steps else dict.fromkeys(of_steps, "–")),
        "samples a shard, shards": f"{per_shard}, {math.ceil(TRAIN_SAMPLES / per_shard):,}",
        "head: CPUs, GB": f"{max(2, math.ceil(gpus / 64) + 1)}, {4 + 0.012 * gpus:.0f}",
        "trials of one GPU at once": f"{min(gpus, trials)}",
    }
