"""What an epoch's steps were fed: a count and a digest, the same on any number of ranks.

A micro-batch, which no cluster cuts, has a digest of its place in the epoch and of its keys in
their order; the epoch's is the sum of them. So ranks count for themselves and add up when asked,
and epochs of the same digest were made of the same studies, in the same steps: a study that was
lost, fed twice or moved shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist

from pneumo.loading.sample_order import World

_MODULUS = 2**48
"""What a float holds exactly, as JSON's readers have it, and 32,768 ranks can add up in 64 bits."""


@dataclass(frozen=True)
class Tally:
    """Of an epoch so far."""

    samples: int = 0
    digest: int = 0
    """Below 2^48."""

    def add(
        self,
        keys: Sequence[str],
        *,
        epoch: int,
        step: int,
        micro_batches: Sequence[int],
        micro_batch_size: int,
    ) -> Self:
        """With a rank's part of a step: the keys of its micro-batches, one after the other."""
        digest = self.digest
        for place, number in enumerate(micro_batches):
            mine = keys[place * micro_batch_size : (place + 1) * micro_batch_size]
            name = "\n".join([f"{epoch}/{step}/{number}", *mine])
            short = hashlib.blake2b(name.encode(), digest_size=6).digest()
            digest += int.from_bytes(short, "little")
        return type(self)(self.samples + len(keys), digest % _MODULUS)

    def total(self, world: World, device: torch.device) -> Self:
        """The sum over the ranks, all of which must ask."""
        if world.size == 1:
            return self
        sums = torch.tensor([self.samples, self.digest], dtype=torch.int64, device=device)
        dist.all_reduce(sums)
        samples, digest = sums.tolist()
        return type(self)(samples, digest % _MODULUS)
