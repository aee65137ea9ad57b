"""What a notebook needs besides `fit`: a store and its pictures, a trained network, its scores.

Everything here is importable from `pneumo` itself; docs/python.md shows how it fits together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pneumo import storage
from pneumo.config import Config
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.preparation import (
    check_shards_are_there,
    check_store_folder,
    find_store,
    finish_store,
)
from pneumo.dataset.selection import select_studies
from pneumo.dataset.shard_plans import digest_settings, plan_shards
from pneumo.dataset.shard_tasks import prepare_shard
from pneumo.dataset.shards import shard_samples
from pneumo.dataset.study_table import StudyRow, read_studies
from pneumo.loading.loader import read_images
from pneumo.network.gradcam import Maps, gradcam
from pneumo.network.scoring import Member, prepare_input, score_images
from pneumo.training.checkpoints import load_member, read_index

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Store:
    """A prepared store, opened."""

    url: str
    manifest: Manifest
    studies: tuple[StudyRow, ...]
    """Of all splits: key, patient, split, target, finding, boxes, age, sex, view."""

    def split(self, name: str) -> list[StudyRow]:
        """The studies of 'train', 'val' or 'test'. Raises ValueError for another name."""
        if name not in self.manifest.splits:
            raise ValueError(f"no split {name!r}; give one of {', '.join(self.manifest.splits)}")
        return [study for study in self.studies if study.split == name]

    def pictures(self, studies: Sequence[StudyRow]) -> list[Picture]:
        """The pictures of `studies`, (S, S) uint8 each, in their order; 0 is black."""
        found: dict[str, Picture] = {}
        for split in {study.split for study in studies}:
            keys = [study.key for study in studies if study.split == split]
            found |= read_images(self.url, self.manifest, split, keys)
        return [found[study.key] for study in studies]


def open_store(url: str | Path) -> Store:
    """The store at a path or URL. Raises StoreError where there is none.

    >>> store = pneumo.open_store("s3://bucket/rsna-224")
    >>> pictures = store.pictures(store.split("val")[:4])
    """
    store_url = storage.normalise(str(url))
    manifest = read_manifest(store_url)
    return Store(store_url, manifest, tuple(read_studies(store_url, manifest).values()))


def prepare_store(source: str | Path, url: str | Path, config: Config | None = None) -> Store:
    """Make a store of a small source in this process, or open it where it is there; `jobs.prepare`
    does the same on a cluster. Raises ConfigError, SourceError, StoreError.

    >>> config = pneumo.Config.model_validate({"prepare": {"image_size": 64}})
    >>> store = pneumo.prepare_store("rsna", "store", config)
    """
    store_url, source_url = storage.normalise(str(url)), storage.normalise(str(source))
    check_store_folder(store_url, source_url)
    chosen = select_studies(source_url, config or Config(), print)
    found, config, audit = chosen.source, chosen.config, chosen.split.audit
    existing = find_store(store_url, found, config)
    if existing is not None:
        check_shards_are_there(store_url, existing)
    else:
        if audit.warning:
            print(f"warning: {audit.warning}")
        size, digest = config.prepare.image_size, digest_settings(config)
        plans = plan_shards(
            found.studies,
            chosen.split.by_key,
            seed=config.seed,
            samples_per_shard=shard_samples(size),
        )
        shards = [
            prepare_shard(plan, store_url, size, digest, found.file_key, chosen.known_studies)
            for plan in plans
        ]
        finish_store(store_url, found, shards, audit, config, phantoms=chosen.phantoms)
    return open_store(store_url)


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network."""

    member: Member

    def logits(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float32]:
        """The logit (N,) of each picture (S, S) uint8; above 0 is a probability above 1/2."""
        parts = [score_images([self.member], part) for part in _batch(pictures)]
        return np.concatenate([np.empty(0, dtype=np.float32), *parts])

    def maps(self, pictures: Sequence[Picture]) -> Maps:
        """Grad-CAM (N, H, W) in [0, 1]: where the network saw what raised its logit."""
        network, size = self.member.network, self.member.image_size
        parts = [gradcam(network, prepare_input(part, self.member)) for part in _batch(pictures)]
        return np.concatenate([np.empty((0, size, size), dtype=np.float32), *parts])


def _batch(pictures: Sequence[Picture]) -> list[Sequence[Picture]]:
    """64 at a time, which the memory holds."""
    return [pictures[start : start + 64] for start in range(0, len(pictures), 64)]


def load_model(run_url: str | Path) -> Model:
    """The network of a run's best checkpoint, on the CPU. Raises RunError where there is none.

    >>> model = pneumo.load_model("runs/train-1")
    >>> logits = model.logits(pictures)
    """
    url = storage.normalise(str(run_url))
    return Model(load_member(url, read_index(url).best))
