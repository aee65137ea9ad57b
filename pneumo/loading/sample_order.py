"""Which rank trains on which samples: pure arithmetic on (seed, epoch, step, world). No torch, no
I/O.

A split is a sequence of blocks; a block is up to 64 neighbouring samples of a shard, read by one
request. An epoch's order shuffles well and still reads and holds few blocks at a time:

    permute the blocks, and the samples within each block: one long sequence;
    cut it into G / 4 lanes of equal length (G: samples of a global batch);
    each step takes the next 4 samples of every lane; the end of the sequence that fills no batch is
    dropped, other samples each epoch.

So a batch comes from G / 4 blocks of the whole split. A rank's slice of it, where a multiple of 4,
is whole lanes: the rank reads one contiguous part of the sequence, of which other ranks read at
most the first and the last block, and holds one block per lane for 64 / 4 steps. Lanes reach their
next block at different steps, so reading is spread evenly over the steps.

The order depends on (seed, epoch, G, the blocks' sizes) alone. Global step k takes positions
[k*G, (k+1)*G) of it, split into micro-batches of fixed size; each rank takes consecutive whole
ones. So what a step trains on does not depend on the number of ranks or of reader threads, and a
run resumes in mid-epoch with the very next sample.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumo.errors import ConfigError

Rows = npt.NDArray[np.int64]

LANE_WIDTH = 4
"""Samples of each lane in a batch."""


@dataclass(frozen=True)
class World:
    """This worker's rank and the number of ranks; by default a single process.

    >>> world = pneumo.World()
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Ranks on this machine, which share its memory."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}")
        if not 1 <= self.local_size <= self.size:
            raise ValueError(f"{self.local_size} of {self.size} ranks on one machine")


def epoch_order(block_sizes: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> Rows:
    """A permutation of the split's rows, shape (N,), the same on every machine and version.

    Row i is the i-th sample of the concatenated blocks; `batch_size` is global.
    """
    sizes = np.asarray(block_sizes, dtype=np.int64)
    num_samples = int(sizes.sum())
    bits = _draw_bits(len(sizes) + num_samples, seed=seed, epoch=epoch)
    position = np.argsort(np.argsort(bits[: len(sizes)], kind="stable"), kind="stable")
    # Sort samples by the position of their block, then by 40 random bits.
    keys = np.repeat(position.astype(np.uint64) << np.uint64(40), sizes)
    sequence = np.argsort(keys | (bits[len(sizes) :] >> np.uint64(24)), kind="stable")

    steps = num_samples // batch_size
    in_lanes = steps * (batch_size // LANE_WIDTH * LANE_WIDTH)
    used = steps * batch_size
    if steps == 0:
        return sequence
    batches = np.concatenate(
        [
            sequence[:in_lanes].reshape(-1, steps, LANE_WIDTH).swapaxes(0, 1).reshape(steps, -1),
            sequence[in_lanes:used].reshape(steps, -1),  # a last lane, of fewer samples a step
        ],
        axis=1,
    )
    return np.concatenate([batches.ravel(), sequence[used:]])


def _draw_bits(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """(count,) uniform 64-bit numbers. The bits of Philox are defined by its paper (Salmon et al.,
    SC11); numpy's own methods on top of them may change between versions."""
    digest = hashlib.blake2b(f"pneumo/{seed}/{epoch}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimiser steps in an epoch. Raises ConfigError when there is not one full batch."""
    if num_samples < batch_size:
        raise ConfigError(
            f"train.batch_size: {batch_size} is more than the {num_samples} samples of the "
            "training split; lower it"
        )
    return num_samples // batch_size


def micro_batches(batch_size: int, micro_batch_size: int, world: World) -> range:
    """Indices of this rank's micro-batches in a step: consecutive, and at most one more than
    another rank has."""
    count = batch_size // micro_batch_size
    return range(world.rank * count // world.size, (world.rank + 1) * count // world.size)


def train_rows(
    order: Rows, step: int, *, batch_size: int, world: World, micro_batch_size: int = 1
) -> Rows:
    """Rows of this rank at `step` of the epoch: those of its micro-batches, in order."""
    mine = micro_batches(batch_size, micro_batch_size, world)
    start = step * batch_size
    return order[start + mine.start * micro_batch_size : start + mine.stop * micro_batch_size]


def evaluation_rows(block_sizes: Sequence[int], world: World) -> Rows:
    """Rows that this rank scores, in order: whole blocks, each sample on exactly one rank.

    Slices differ from equal ones by less than the largest block.
    """
    ends = np.concatenate([[0], np.cumsum(np.asarray(block_sizes, dtype=np.int64))])
    # Each bound of the equal slices is rounded down to the start of a block.
    equal = [int(ends[-1]) * r // world.size for r in (world.rank, world.rank + 1)]
    first, last = ends[np.searchsorted(ends, equal, side="right") - 1]
    return np.arange(first, last, dtype=np.int64)
