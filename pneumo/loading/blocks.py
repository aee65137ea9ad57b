"""A split's blocks: each is read by one request, checked against its digest and decoded."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumo import storage
from pneumo.config import DataConfig
from pneumo.dataset.manifest import BlockEntry, Manifest, ShardEntry, naming_file
from pneumo.dataset.shards import decode_block, read_block
from pneumo.errors import ConfigError, DataError
from pneumo.loading.sample_order import Rows, World

READERS = 4
"""Threads of a worker that read and decode."""
READER_THREAD = "pneumo-reader"
"""How their names begin."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a split, decoded."""

    keys: tuple[str, ...]
    images: Tensor
    """(B, 1, S, S) uint8, 0 = black."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the CPU."""


@dataclass(frozen=True)
class PreparedStore:
    """A prepared store, and the settings by which it is read."""

    url: str
    manifest: Manifest
    config: DataConfig

    @property
    def image_size(self) -> int:
        """The size to train at. Raises ConfigError: see `input_size`."""
        return input_size(self.manifest, self.config.image_size)

    def decoded_bytes(self, split: str) -> int:
        """What the split takes in memory."""
        return self.manifest.splits[split].samples * self.image_size**2


def input_size(manifest: Manifest, wanted: int | None) -> int:
    """The size to train at; None: the store's. Raises ConfigError when it is above the store's:
    pixels are not invented."""
    if wanted is not None and wanted > manifest.image_size:
        raise ConfigError(
            f"data.image_size: {wanted} is above the store's {manifest.image_size}; lower it, or "
            f"prepare a store with --prepare.image-size {wanted}"
        )
    return wanted or manifest.image_size


class Feed(Protocol):
    """A way to get samples: `InMemoryFeed` or `StreamingFeed`, which give the same bytes."""

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        """The samples of each step of `plan`, in its order.

        What breaks in a reader thread is raised in the step that needs it: DataError, which names
        the shard, and StorageError.
        """
        ...


class Blocks:
    """A split's blocks, in the store's order."""

    def __init__(self, store: PreparedStore, split: str) -> None:
        """Raises DataError when the manifest's numbers do not add up."""
        entry = store.manifest.splits[split]
        self.store_url, self.split, self.shards = store.url, split, entry.shards
        self.stored_size, self.image_size = store.manifest.image_size, store.image_size
        self.entries: list[tuple[ShardEntry, BlockEntry]] = [
            (shard, block) for shard in entry.shards for block in shard.blocks
        ]
        self.sizes: Rows = np.array([block.samples for _, block in self.entries], dtype=np.int64)
        self.ends: Rows = np.cumsum(self.sizes)
        self.starts: Rows = self.ends - self.sizes
        if (total := int(self.sizes.sum())) != entry.samples:
            raise DataError(
                f"split {split}: {total} samples in its blocks, the manifest says {entry.samples}"
            )
        if len({block.blake3 for _, block in self.entries}) != len(self.entries):
            raise DataError(f"split {split}: a block stands twice in the manifest")
        self._block_of: dict[str, int] = {}
        """By key, of the samples that have been read."""

    def containing(self, rows: Rows) -> Rows:
        """The block of each row, same shape."""
        return np.searchsorted(self.ends, rows, side="right")

    def load(self, number: int, out: Tensor | None = None) -> Samples:
        """Read block `number` and decode it to the training size, into `out` where that is given:
        (B, 1, S, S) uint8 on the CPU. Raises DataError, also for a key that another sample has, and
        StorageError."""
        shard, block = self.entries[number]
        data = read_block(self.store_url, shard, block)
        samples = list(decode_block(data, shard, block, self.stored_size))
        keys = tuple(sample.key for sample in samples)
        if len({*keys}) < len(keys) or any(
            self._block_of.setdefault(key, number) != number for key in keys
        ):
            raise DataError(
                f"split {self.split}: a study stands in it more than once; delete the store and "
                "prepare it again"
            )
        return Samples(
            keys,
            to_input([sample.pixels for sample in samples], self.image_size, out),
            torch.tensor([sample.target for sample in samples], dtype=torch.float32),
        )

    def check_shards(self, world: World) -> None:
        """Read the last byte of every shard, each rank its part of them: one that is missing or cut
        is known before the first step. Raises DataError."""

        def check(shard: ShardEntry) -> None:
            with naming_file(f"shard {shard.name}", self.store_url):
                storage.read_range(storage.join(self.store_url, shard.name), shard.bytes - 1, 1)

        with ThreadPoolExecutor(READERS, thread_name_prefix=READER_THREAD) as pool:
            list(pool.map(check, self.shards[world.rank :: world.size]))


def to_input(
    pixels: Sequence[npt.NDArray[np.uint8]], image_size: int, out: Tensor | None = None
) -> Tensor:
    """Stored images (S, S) uint8 -> (B, 1, H, H) uint8 at `image_size`, resampled by area; into
    `out` where that is given."""
    if out is None:
        out = torch.empty((len(pixels), 1, image_size, image_size), dtype=torch.uint8)
    # numpy copies an image at once, torch a pixel at a time.
    for image, place in zip(pixels, out.numpy()[:, 0], strict=True):
        if image.shape == place.shape:
            place[:] = image
        else:
            place[:] = cv2.resize(image, place.shape[::-1], interpolation=cv2.INTER_AREA)
    return out
