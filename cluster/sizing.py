"""What changes with the number of GPUs, on paper: a small model out of constants, of which some
were measured and some are estimates.

    python -m cluster.sizing --gpus 8 64 512

Where the constants come from stands beside each; docs/cluster.md has the results and what they
leave out. The model is arithmetic to size a cluster by, no promise: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLE_BYTES = 51_712
"""Of a shard for one 224 px study: 50,176 of pixels, the .npy and tar headers, the label. Measured;
a test does it again."""
BLOCK_SAMPLES = 64
"""What one range request reads; pneumo.dataset.shards."""
SHARD_SAMPLES = 512
"""A full shard's; pneumo.dataset.shards."""
CHECKPOINT_BYTES = 134_000_000
"""ResNet-18's 11.17 M float32 parameters, and twice as much of Adam's: counted, by a test too."""
IMAGES_PER_S_PER_GPU = 12_000.0
"""ResNet-18 in bfloat16 at 224 px: the low end of what an H200 is expected to do eagerly (12 to
18 k/s, from its memory bandwidth; not measured). A slower GPU asks for less of all that follows."""
GRADIENT_BYTES = 4 * 11_170_000
"""What an optimiser step all-reduces: counted."""
SMALL_BATCH = 128
"""Fewest images a step for each GPU at which it is still well used; an estimate."""
S3_GETS_PER_S = 5_500
"""Of one prefix, as Amazon documents; more prefixes, or time to split, raise it."""
HEAD_MB_PER_WORKER = 12.0
"""What Ray's head holds of a worker process: GCS tables, task events, metrics. An estimate."""
HEAD_BASE_GB = 4.0
"""The head without workers, with the driver: 2.5 to 3.0 GiB were measured, and room."""
WORKERS_PER_HEAD_CPU = 64
"""Heartbeats, metrics and logs of so many workers keep one CPU of the head busy; an estimate."""
DRIVER_TRIALS_PER_S = 1.0
"""Starts of trials that one driver manages. An estimate, on the safe side of a measurement: 9.8 s
for a search of 4 with reused actors on two cores, most of it Ray's start."""


@dataclass(frozen=True)
class Workload:
    """A training run: `train_samples` in each of `epochs`."""

    train_samples: int = 21_347
    epochs: int = 10
    batch_size_per_gpu: int = SMALL_BATCH
    images_per_s_per_gpu: float = IMAGES_PER_S_PER_GPU


@dataclass(frozen=True)
class Sizing:
    """What a run of `gpus` workers needs; rates are averages over an epoch that streams.

    `steps_per_epoch` is 0 where the batch is larger than the data: training refuses that, and what
    follows from a step is 0 too.
    """

    gpus: int
    batch_size: int
    steps_per_epoch: int
    epoch_s: float
    samples_per_shard: int
    shards: int
    gets_per_s: float
    read_gb_per_s: float
    checkpoint_gb_per_min: float
    all_reduce_gb_per_s_per_gpu: float
    head_cpus: int
    head_memory_gb: float
    trials_at_once: int


def size(gpus: int, workload: Workload | None = None) -> Sizing:
    """The sizing of a cluster of `gpus`. Raises ValueError below 1."""
    if gpus < 1:
        raise ValueError(f"gpus {gpus}: at least 1")
    workload = workload or Workload()
    batch = gpus * workload.batch_size_per_gpu
    steps = workload.train_samples // batch
    rate = gpus * workload.images_per_s_per_gpu
    epoch_s = steps * batch / rate
    steps_per_s = rate / batch if steps else 0.0
    per_shard = samples_per_shard(workload.train_samples, gpus)
    return Sizing(
        gpus=gpus,
        batch_size=batch,
        steps_per_epoch=steps,
        epoch_s=epoch_s,
        samples_per_shard=per_shard,
        shards=math.ceil(workload.train_samples / per_shard),
        gets_per_s=steps_per_s * batch / BLOCK_SAMPLES,
        read_gb_per_s=steps_per_s * batch * SAMPLE_BYTES / 1e9,
        checkpoint_gb_per_min=CHECKPOINT_BYTES / 1e9 / epoch_s * 60 if steps else 0.0,
        all_reduce_gb_per_s_per_gpu=_all_reduce(gpus) * steps_per_s / 1e9,
        head_cpus=max(2, math.ceil(gpus / WORKERS_PER_HEAD_CPU) + 1),
        head_memory_gb=HEAD_BASE_GB + gpus * HEAD_MB_PER_WORKER / 1000,
        trials_at_once=min(gpus, round(DRIVER_TRIALS_PER_S * _trial_s(workload))),
    )


def samples_per_shard(train_samples: int, gpus: int) -> int:
    """At least four shards for each GPU, of whole blocks, and none above SHARD_SAMPLES."""
    wanted = train_samples / (4 * gpus)
    return max(BLOCK_SAMPLES, min(SHARD_SAMPLES, int(wanted // BLOCK_SAMPLES) * BLOCK_SAMPLES))


def warnings(sizing: Sizing, workload: Workload | None = None) -> list[str]:
    """What breaks at this size, and what to do about it."""
    workload = workload or Workload()
    found = []
    if not sizing.steps_per_epoch:
        found.append(
            f"not possible: a batch of {sizing.batch_size:,} is more than the "
            f"{workload.train_samples:,} training samples, and training refuses it"
        )
    if sizing.gets_per_s > S3_GETS_PER_S:
        found.append(
            f"{sizing.gets_per_s:,.0f} GET/s is above S3's {S3_GETS_PER_S:,} of a prefix: "
            "--data.cache memory, where a worker reads its split once, or --data.cache-dir"
        )
    if 0 < sizing.steps_per_epoch < 20:
        found.append(
            f"an epoch is {sizing.steps_per_epoch} steps of {sizing.batch_size:,}: too few to "
            "learn from; use the GPUs for more trials or folds at once, not for one run"
        )
    if 0 < sizing.epoch_s < 60:
        found.append(
            f"an epoch takes {sizing.epoch_s:.2g} s, and writes a checkpoint of "
            f"{CHECKPOINT_BYTES / 1e6:.0f} MB: writing it takes longer than computing it"
        )
    if sizing.gpus > sizing.trials_at_once:
        found.append(
            f"one driver keeps about {sizing.trials_at_once} trials of one GPU busy: give trials "
            "more workers, or run several searches"
        )
    return found


def table(sizings: Sequence[Sizing]) -> str:
    """The sizings side by side, as a Markdown table."""
    rows: list[tuple[str, list[str]]] = [
        ("global batch", [f"{s.batch_size:,}" for s in sizings]),
        ("steps an epoch", [_of_steps(s, f"{s.steps_per_epoch:,}") for s in sizings]),
        ("seconds an epoch", [_of_steps(s, f"{s.epoch_s:.2g}") for s in sizings]),
        ("samples a shard, shards", [f"{s.samples_per_shard}, {s.shards:,}" for s in sizings]),
        ("GET/s while streaming", [_of_steps(s, f"{s.gets_per_s:,.0f}") for s in sizings]),
        ("GB/s while streaming", [_of_steps(s, f"{s.read_gb_per_s:.1f}") for s in sizings]),
        ("checkpoints, GB/min", [_of_steps(s, f"{s.checkpoint_gb_per_min:,.1f}") for s in sizings]),
        (
            "all-reduce, GB/s a GPU",
            [_of_steps(s, f"{s.all_reduce_gb_per_s_per_gpu:.1f}") for s in sizings],
        ),
        ("head: CPUs, GB", [f"{s.head_cpus}, {s.head_memory_gb:.0f}" for s in sizings]),
        ("trials of one GPU at once", [str(s.trials_at_once) for s in sizings]),
    ]
    head = f"| GPUs | {' | '.join(str(s.gpus) for s in sizings)} |"
    rule = "|---" * (len(sizings) + 1) + "|"
    return "\n".join([head, rule, *(f"| {name} | {' | '.join(row)} |" for name, row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the warnings."""
    parser = argparse.ArgumentParser(prog="python -m cluster.sizing", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--train-samples", type=int, default=Workload.train_samples)
    parser.add_argument("--images-per-s-per-gpu", type=float, default=IMAGES_PER_S_PER_GPU)
    options = parser.parse_args(argv)
    if min(*options.gpus, options.train_samples, options.images_per_s_per_gpu) < 1:
        parser.error("--gpus, --train-samples and --images-per-s-per-gpu: at least 1")
    workload = Workload(
        train_samples=options.train_samples, images_per_s_per_gpu=options.images_per_s_per_gpu
    )
    sizings = [size(gpus, workload) for gpus in options.gpus]
    print(table(sizings))
    for sizing in sizings:
        for warning in warnings(sizing, workload):
            print(f"{sizing.gpus} GPUs: {warning}")
    return 0


def _of_steps(sizing: Sizing, text: str) -> str:
    return text if sizing.steps_per_epoch else "not possible"


def _all_reduce(gpus: int) -> float:
    """Bytes that each GPU sends in a step by a ring: 2 (n - 1) / n of the gradients."""
    return 2 * (gpus - 1) / gpus * GRADIENT_BYTES


def _trial_s(workload: Workload) -> float:
    return workload.epochs * workload.train_samples / workload.images_per_s_per_gpu


if __name__ == "__main__":
    sys.exit(main())
