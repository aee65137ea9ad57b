"""The small model of big clusters: its constants are those of the code, its arithmetic holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import sizing
from cluster.sizing import Workload, size
from pneumo.dataset.shards import BLOCK_SAMPLES, SHARD_SAMPLES, Sample, write_shard
from pneumo.network.backbones import build_model

CHECKOUT = Path(__file__).resolve().parents[2]


def test_a_sample_has_the_size_of_a_stored_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"{i:020x}", rng.integers(0, 255, (224, 224), dtype=np.uint8), i % 2)
        for i in range(128)
    ]
    entry = write_shard(str(tmp_path), "train/000000.tar", samples)
    assert entry.bytes / 128 == pytest.approx(sizing.SAMPLE_BYTES, rel=0.02)
    assert BLOCK_SAMPLES == sizing.BLOCK_SAMPLES
    assert SHARD_SAMPLES == sizing.SHARD_SAMPLES


def test_a_checkpoint_is_weights_and_adams_two_moments() -> None:
    model = build_model("resnet18")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert pytest.approx(3 * 4 * numbers, rel=0.01) == sizing.CHECKPOINT_BYTES
    assert pytest.approx(4 * numbers, rel=0.01) == sizing.GRADIENT_BYTES


@given(
    gpus=st.integers(1, 4096),
    samples=st.integers(64, 10_000_000),
    rate=st.floats(10, 50_000),
)
def test_the_arithmetic_holds_everywhere(gpus: int, samples: int, rate: float) -> None:
    workload = Workload(train_samples=samples, images_per_s_per_gpu=rate)
    found = size(gpus, workload)
    assert found.samples_per_shard % sizing.BLOCK_SAMPLES == 0
    assert found.shards * found.samples_per_shard >= samples
    assert (found.shards - 1) * found.samples_per_shard < samples
    images = found.steps_per_epoch * found.batch_size
    assert (images == 0) is (samples < found.batch_size)
    assert (found.gets_per_s > 0) is (images > 0)
    assert found.read_gb_per_s * found.epoch_s * 1e9 == pytest.approx(images * sizing.SAMPLE_BYTES)
    assert found.gets_per_s * found.epoch_s == pytest.approx(images / sizing.BLOCK_SAMPLES)
    twice = size(2 * gpus, workload)
    if twice.steps_per_epoch:
        assert twice.gets_per_s == pytest.approx(2 * found.gets_per_s)
    assert twice.head_memory_gb >= found.head_memory_gb
    assert 1 <= found.trials_at_once <= gpus or found.trials_at_once == 0


def test_one_gpu_reduces_nothing_and_many_send_twice_the_gradients() -> None:
    assert size(1).all_reduce_gb_per_s_per_gpu == 0
    big = Workload(train_samples=100_000_000)
    a_step_s = 128 / sizing.IMAGES_PER_S_PER_GPU
    sent = size(512, big).all_reduce_gb_per_s_per_gpu * 1e9 * a_step_s
    assert sent == pytest.approx(2 * sizing.GRADIENT_BYTES, rel=0.01)


def test_what_breaks_is_said() -> None:
    assert [w for w in sizing.warnings(size(64)) if "above S3's 5,500" in w]
    assert [w for w in sizing.warnings(size(64)) if "too few to learn from" in w]
    calm = Workload(train_samples=50_000_000, images_per_s_per_gpu=500)
    assert sizing.warnings(size(8, calm), calm) == []


def test_a_batch_of_more_than_there_is_is_not_possible() -> None:
    """As training itself refuses it."""
    found = size(512)
    assert found.steps_per_epoch == 0
    assert sizing.table([found]).count("not possible") == 6
    assert [w for w in sizing.warnings(found) if w.startswith("not possible: a batch of 65,536")]


def test_the_documentation_has_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizing.main([]) == 0
    text = (CHECKOUT / "docs" / "cluster.md").read_text()
    printed = capsys.readouterr().out
    assert re.findall(r"^\|.*\|$", printed, re.MULTILINE)
    for line in printed.splitlines():
        if line.startswith("|"):
            assert line in text


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="gpus 0: at least 1"):
        size(0)
    with pytest.raises(SystemExit):
        sizing.main(["--gpus", "0"])
