"""The blocks of a split: each is read by one request, checked against its digest and decoded."""

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
from pneumo.dataset.manifest import BlockEntry, Manifest, ShardEntry, as_data_error
from pneumo.dataset.shards import decode_block, read_block
from pneumo.errors import ConfigError, DataError
from pneumo.loading.sample_order import Rows, World

READERS = 4
"""Threads of a worker that read and decode."""
READER_THREAD = "pneumo-reader"
"""Prefix of their names."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Decoded samples of a split."""

    keys: tuple[str, ...]
    images: Tensor
    """(B, 1, S, S) uint8, 0 = black."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the CPU."""


@dataclass(frozen=True)
class PreparedStore:
    """A prepared store, and the settings for reading it."""

    url: str
    manifest: Manifest
    config: DataConfig

    @property
    def image_size(self) -> int:
        """Side of the training images, in pixels. Raises ConfigError: see `input_size`."""
        return input_size(self.manifest, self.config.image_size)

    def decoded_bytes(self, split: str) -> int:
        """Bytes of the split's images in memory."""
        return self.manifest.splits[split].samples * self.image_size**2


def input_size(manifest: Manifest, image_size: int | None) -> int:
    """`image_size`, or the store's for None, in pixels. Raises ConfigError when it is larger than
    the store's: images are never enlarged."""
    if image_size is not None and image_size > manifest.image_size:
        raise ConfigError(
            f"data.image_size: {image_size} is above the store's {manifest.image_size}; lower it, "
            f"or prepare a store with --prepare.image-size {image_size}"
        )
    return image_size or manifest.image_size


class Feed(Protocol):
    """Source of samples: `InMemoryFeed` or `StreamingFeed`, which give the same bytes."""

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        """The samples of each step of `plan`, in its order.

        Errors of reader threads are raised in the step that needs the data: DataError, which names
        the shard, and StorageError.
        """
        ...


class Blocks:
    """A split's blocks, in the store's order."""

    def __init__(self, store: PreparedStore, split: str) -> None:
        """Raises DataError when the manifest's counts are inconsistent."""
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
            raise DataError(f"split {split}: a block is listed twice in the manifest")
        self._block_of: dict[str, int] = {}
        """Block of each key that has been read."""

    def containing(self, rows: Rows) -> Rows:
        """Index of the block of each row, same shape."""
        return np.searchsorted(self.ends, rows, side="right")

    def load(self, number: int, out: Tensor | None = None) -> Samples:
        """Read block `number` and decode it at the training size, into `out` where given:
        (B, 1, S, S) uint8 on the CPU. Raises DataError, also for a duplicate key, and StorageError.
        """
        shard, block = self.entries[number]
        data = read_block(self.store_url, shard, block)
        samples = list(decode_block(data, shard, block, self.stored_size))
        keys = tuple(sample.key for sample in samples)
        if len({*keys}) < len(keys) or any(
            self._block_of.setdefault(key, number) != number for key in keys
        ):
            raise DataError(
                f"split {self.split}: a study is in it more than once; delete the store and "
                "prepare it again"
            )
        return Samples(
            keys,
            to_input([sample.pixels for sample in samples], self.image_size, out),
            torch.tensor([sample.target for sample in samples], dtype=torch.float32),
        )

    def check_shards(self, world: World) -> None:
        """Read the last byte of every shard, each rank a part of the shards, to find missing and
        truncated ones before the first step. Raises DataError."""

        def check(shard: ShardEntry) -> None:
            with as_data_error(f"shard {shard.name}", self.store_url):
                storage.read_range(storage.join(self.store_url, shard.name), shard.bytes - 1, 1)

        with ThreadPoolExecutor(READERS, thread_name_prefix=READER_THREAD) as pool:
            list(pool.map(check, self.shards[world.rank :: world.size]))


def to_input(
    pixels: Sequence[npt.NDArray[np.uint8]], image_size: int, out: Tensor | None = None
) -> Tensor:
    """Stored images (S, S) uint8 -> (B, 1, H, H) uint8 at `image_size`, resampled by area; into
    `out` where given."""
    if out is None:
        out = torch.empty((len(pixels), 1, image_size, image_size), dtype=torch.uint8)
    # numpy copies an image at once, torch a pixel at a time.
    for image, resized in zip(pixels, out.numpy()[:, 0], strict=True):
        if image.shape == resized.shape:
            resized[:] = image
        else:
            resized[:] = cv2.resize(image, resized.shape[::-1], interpolation=cv2.INTER_AREA)
    return out
