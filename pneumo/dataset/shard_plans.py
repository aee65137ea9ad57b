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
"""Incremented when the same source and settings give other bytes than before."""


@dataclass(frozen=True)
class ShardPlan:
    """The studies of one shard, which one task writes."""

    split: str
    name: str
    """`train/000000`, relative to the store; the shard's name has its digest appended."""
    studies: tuple[Study, ...]

    @property
    def record(self) -> str:
        """Path of the task's record, relative to the store."""
        return f"{PARTS}/{self.name}.json"

    def digest(self, prepare_digest: str) -> str:
        """SHA-256 of all that the shard's bytes depend on, except the DICOM files."""
        studies = [study.describe() for study in self.studies]
        inputs = [_FORMAT, prepare_digest, self.split, studies]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def plan_shards(
    studies: Sequence[Study], by_key: Mapping[str, str], *, seed: int, samples_per_shard: int
) -> list[ShardPlan]:
    """Assign studies to shards of at most `samples_per_shard`, in a random order of `seed`.

    Does not depend on the number of workers, so the store does not either.
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


def count_shards(samples: int, max_samples: int) -> int:
    """Number of equal shards of at most `max_samples`; for a small split up to 8, to use several
    workers."""
    count = max(-(-samples // max_samples), min(8, samples // 16), 1)
    if count <= 8:
        return count
    return min(-(-count // 8) * 8, samples)  # a multiple of 8: 2, 4 or 8 workers end together


def estimate_memory(plans: Sequence[ShardPlan], image_size: int) -> int:
    """Peak memory of a task, in bytes: its libraries and two copies of the largest shard."""
    largest = max(len(plan.studies) for plan in plans)
    return _LIBRARIES_BYTES + 2 * largest * sample_bytes(image_size)


def digest_settings(config: Config) -> str:
    """SHA-256 of the settings that the content of a store depends on.

    Without prepare.max_bad_fraction, so that a preparation that failed for it can be resumed.
    """
    tree = config.model_dump(mode="json", include={"seed", "prepare", "split"})
    # `samples_per_shard` was a setting: with its default older stores have the same digest.
    tree["prepare"] |= {"max_bad_fraction": 0.0, "samples_per_shard": None}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
