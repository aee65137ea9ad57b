"""Which samples go where: pure arithmetic on (seed, epoch, step, world). No torch, no I/O.

An epoch's order is a permutation of blocks of 64 neighbours in the store, shuffled inside too, that
depends on (seed, epoch) alone. Global step k takes positions [k*G, (k+1)*G) of it and rank r its
equal slice; so what a step trains on does not depend on the number of workers, a run goes on in
mid-epoch with the very next sample, and the remainder that fills no batch is another one each
epoch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumo.errors import ConfigError

Rows = npt.NDArray[np.int64]

BLOCK = 64


@dataclass(frozen=True)
class World:
    """Which of how many workers this is."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}")


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Rows:
    """A permutation of `num_samples` rows, shape (N,), the same on every machine and version."""
    # A string seed is hashed by SHA-512, not by Python's randomised hash.
    generator = random.Random(f"pneumo/{seed}/{epoch}")
    blocks = [
        list(range(start, min(start + BLOCK, num_samples)))
        for start in range(0, num_samples, BLOCK)
    ]
    generator.shuffle(blocks)
    # Neighbours of eight blocks are mixed, so that a batch is no run of neighbours of one block.
    rows: list[int] = []
    for start in range(0, len(blocks), 8):
        window = [row for block in blocks[start : start + 8] for row in block]
        generator.shuffle(window)
        rows.extend(window)
    return np.asarray(rows, dtype=np.int64)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimiser steps in an epoch. Raises ConfigError when there is not one full batch."""
    if num_samples < batch_size:
        raise ConfigError(
            f"train.batch_size: {batch_size} is more than the {num_samples} samples of the "
            "training split; lower it"
        )
    return num_samples // batch_size


def check_batch_size(batch_size: int, num_workers: int) -> None:
    """Raises ConfigError unless every worker gets the same share of a batch, of at least 2."""
    if batch_size % num_workers or batch_size // num_workers < 2:
        raise ConfigError(
            f"train.batch_size: {batch_size} does not divide into {num_workers} equal parts of at "
            "least 2 samples; change it or cluster.num_workers"
        )


def train_rows(order: Rows, step: int, *, batch_size: int, world: World) -> Rows:
    """Rows of this rank at `step` of the epoch, shape (batch_size / world.size,)."""
    per_rank = batch_size // world.size
    start = step * batch_size + world.rank * per_rank
    return order[start : start + per_rank]


def evaluation_rows(num_samples: int, world: World) -> Rows:
    """Rows that this rank scores: each sample on exactly one rank, sizes differing by at most 1."""
    bounds = [num_samples * r // world.size for r in (world.rank, world.rank + 1)]
    return np.arange(bounds[0], bounds[1], dtype=np.int64)
