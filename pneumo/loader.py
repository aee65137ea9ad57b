"""Manifest + partition -> batches. A split is read and decoded once, and kept as uint8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumo import partition, transforms
from pneumo.config import AugmentConfig
from pneumo.errors import ConfigError, DataError
from pneumo.partition import World
from pneumo.shards import Manifest, Sample, ShardEntry, read_shard

_SHARDS_IN_FLIGHT = 4


@dataclass(frozen=True, eq=False)
class SplitData:
    """A split in memory, in the store's order."""

    keys: tuple[str, ...]
    images: Tensor
    """(N, 1, S, S) uint8, 0 = black, on the device that trains."""
    targets: Tensor
    """(N,) float32, 0 or 1, on the CPU."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank feeds the network in one step."""

    images: Tensor
    """(B, 1, S, S) float32, normalised."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the images' device."""
    keys: tuple[str, ...]


def input_size(manifest: Manifest, wanted: int | None) -> int:
    """The size to train at. Raises ConfigError when it is above the store's: pixels are not
    invented."""
    if wanted is not None and wanted > manifest.image_size:
        raise ConfigError(
            f"data.image_size: {wanted} is above the store's {manifest.image_size}; lower it, or "
            f"prepare a store with --prepare.image-size {wanted}"
        )
    return wanted or manifest.image_size


def load_split(
    store_url: str,
    manifest: Manifest,
    split: str,
    *,
    image_size: int,
    device: torch.device | str = "cpu",
) -> SplitData:
    """Read and decode all shards of a split, several at a time, resampled by area to `image_size`.

    Raises DataError when a shard is missing, changed or short, or a key stands twice.
    """
    entry = manifest.splits[split]

    def read(shard: ShardEntry) -> tuple[list[str], npt.NDArray[np.uint8], list[int]]:
        samples = list(read_shard(store_url, shard, manifest.image_size))
        return (
            [sample.key for sample in samples],
            np.stack([_resample(sample, image_size) for sample in samples]),
            [sample.target for sample in samples],
        )

    with ThreadPoolExecutor(_SHARDS_IN_FLIGHT) as pool:
        parts = list(pool.map(read, entry.shards))
    keys = tuple(key for part in parts for key in part[0])
    if len(keys) != entry.samples or len(set(keys)) != len(keys):
        raise DataError(
            f"split {split}: {len(set(keys))} different samples, the manifest says {entry.samples}"
        )
    images = torch.from_numpy(np.concatenate([part[1] for part in parts])).unsqueeze(1)
    targets = torch.tensor([target for part in parts for target in part[2]], dtype=torch.float32)
    return SplitData(keys, images.to(device), targets)


def read_images(
    store_url: str, manifest: Manifest, split: str, keys: Iterable[str]
) -> dict[str, npt.NDArray[np.uint8]]:
    """The stored pictures of `keys` in a split, (S, S) uint8 each."""
    wanted = set(keys)
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for shard in manifest.splits[split].shards:
        if len(found) == len(wanted):
            break
        for sample in read_shard(store_url, shard, manifest.image_size):
            if sample.key in wanted:
                found[sample.key] = sample.pixels
    if missing := wanted - found.keys():
        raise DataError(
            f"split {split}: {len(missing)} of {len(wanted)} studies are not in the store"
        )
    return found


def train_batches(
    data: SplitData,
    augment: AugmentConfig,
    *,
    mean: float,
    std: float,
    seed: int,
    epoch: int,
    batch_size: int,
    world: World,
    first_step: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of an epoch from `first_step` on, augmented and normalised."""
    order = partition.epoch_order(len(data), seed=seed, epoch=epoch)
    for step in range(first_step, partition.steps_per_epoch(len(data), batch_size)):
        rows = partition.train_rows(order, step, batch_size=batch_size, world=world)
        keys = tuple(data.keys[row] for row in rows)
        index = torch.from_numpy(rows)
        images = data.images[index.to(data.images.device)]
        images = transforms.augment(images, keys, augment, seed=seed, epoch=epoch)
        yield Batch(
            transforms.normalise(images, mean, std),
            data.targets[index].to(data.images.device, non_blocking=True),
            keys,
        )


def evaluation_batches(
    data: SplitData, *, mean: float, std: float, batch_size: int, world: World
) -> Iterator[Batch]:
    """This rank's share of a split in order, each sample on exactly one rank."""
    rows = partition.evaluation_rows(len(data), world)
    for start in range(0, len(rows), batch_size):
        index = torch.from_numpy(rows[start : start + batch_size])
        yield Batch(
            transforms.normalise(data.images[index.to(data.images.device)], mean, std),
            data.targets[index].to(data.images.device),
            tuple(data.keys[row] for row in index.tolist()),
        )


def as_input(pixels: Sequence[npt.NDArray[np.uint8]], image_size: int) -> Tensor:
    """Stored pictures -> (B, 1, S, S) uint8 at the network's size, as `load_split` makes them."""
    resampled = [_resample(Sample("", image, 0), image_size) for image in pixels]
    return torch.from_numpy(np.stack(resampled)).unsqueeze(1)


def _resample(sample: Sample, image_size: int) -> npt.NDArray[np.uint8]:
    if sample.pixels.shape[0] == image_size:
        return sample.pixels
    size = (image_size, image_size)
    return np.asarray(cv2.resize(sample.pixels, size, interpolation=cv2.INTER_AREA))
