"""Which studies go to which shard."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pneumo.config import Config
from pneumo.dataset.shards import sample_bytes
from pneumo.dataset.source import Study
from pneumo.dataset.splits import SPLITS

PARTS = "parts"
_LIBRARIES_BYTES = 384 * 2**20
_FORMAT = 5
"""Raised when the same source and settings would give other bytes than before."""


@dataclass(frozen=True)
class ShardPlan:
    """One task's work."""

    split: str
    name: str
    """`train/000000`, relative to the store; its shard's name has the digest besides."""
    studies: tuple[Study, ...]

    @property
    def record(self) -> str:
        """Where the task's record goes, relative to the store."""
        return f"{PARTS}/{self.name}.json"

    def digest(self, prepare_digest: str) -> str:
        """SHA-256 of all that the shard's bytes follow from, the DICOM files aside."""
        studies = [study.describe() for study in self.studies]
        described = [_FORMAT, prepare_digest, self.split, studies]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def plan_shards(
    studies: Sequence[Study], by_key: Mapping[str, str], *, seed: int, samples_per_shard: int
) -> list[ShardPlan]:
    """Which studies go to which shard: shuffled by the seed, so that no shard is skewed by a
    name. A shard holds `samples_per_shard` at most.

    It does not depend on how many workers there are, or the store would.
    """
    plans = []
    for name in SPLITS:
        members = [study for study in studies if by_key.get(study.key) == name]
        random.Random(f"shards/{seed}/{name}").shuffle(members)
        count = count_shards(len(members), samples_per_shard)
        bounds = [len(members) * i // count for i in range(count + 1)]
        plans += [
            ShardPlan(name, f"{name}/{i:06d}", tuple(members[bounds[i] : bounds[i + 1]]))
            for i in range(count)
        ]
    return plans


def count_shards(samples: int, most: int) -> int:
    """Equal shards of `most` samples, and of a small split enough of them for several tasks."""
    count = max(-(-samples // most), min(8, samples // 16), 1)
    if count <= 8:
        return count
    return min(-(-count // 8) * 8, samples)  # 2, 4 or 8 workers have equally many, end together


def estimate_memory(plans: Sequence[ShardPlan], image_size: int) -> int:
    """Bytes that a task holds at most: its libraries, and the largest shard with a copy."""
    largest = max(len(plan.studies) for plan in plans)
    return _LIBRARIES_BYTES + 2 * largest * sample_bytes(image_size)


def digest_settings(config: Config) -> str:
    """SHA-256 of the settings that decide what a store holds.

    prepare.max_bad_fraction is none of them: a preparation that failed for it can go on.
    """
    tree = config.model_dump(mode="json", include={"seed", "prepare", "split"})
    # `samples_per_shard` was a setting: stores that were prepared with its default are the same.
    tree["prepare"] |= {"max_bad_fraction": 0.0, "samples_per_shard": None}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
