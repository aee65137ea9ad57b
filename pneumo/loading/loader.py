"""Store + partition -> batches: read by one of two ways, augmented and normalised on the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumo.config import AugmentConfig, DataConfig
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.shards import read_shard
from pneumo.errors import ConfigError, DataError
from pneumo.loading import augmentation, free_memory, sample_order
from pneumo.loading.block_cache import BlockCache
from pneumo.loading.feeds import Blocks, Feed, Held, Memory, Samples, Stream
from pneumo.loading.prefetch import run_ahead, send
from pneumo.loading.sample_order import Rows, World

_HOST_SHARE = 0.5
"""Splits may take this share of the free memory; the rest is for the model and for batches."""
_DEVICE_SHARE = 0.25
"""And this one of the device's: activations need far more there than the weights."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank feeds the network in one step."""

    images: Tensor
    """(B, 1, S, S) float32, normalised."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the images' device."""
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """How a split is fed, and why."""

    way: Literal["memory", "stream"]
    on_device: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Loader:
    """Feeds one rank from one split; `open_loader` makes it.

    An iterator that is closed or dropped before its end stops its threads.
    """

    feed: Feed
    block_sizes: tuple[int, ...]
    world: World
    device: torch.device
    mean: float
    std: float
    compiled: bool = False
    """Whether a GPU's augmentation goes through torch.compile."""

    def __len__(self) -> int:
        """Samples of the split, on all ranks together."""
        return sum(self.block_sizes)

    def epoch(
        self,
        epoch: int,
        *,
        seed: int,
        batch_size: int,
        augment: AugmentConfig,
        start_step: int = 0,
        micro_batch_size: int = 1,
    ) -> Iterator[Batch]:
        """This rank's whole micro-batches of each step from `start_step` on, augmented.

        Blocks that only earlier steps need are not read. Each is made while the one before is in
        use. Raises ConfigError when there is not one full batch; DataError and StorageError while
        it goes on.
        """
        steps = sample_order.steps_per_epoch(len(self), batch_size)
        order = sample_order.epoch_order(
            self.block_sizes, batch_size=batch_size, seed=seed, epoch=epoch
        )
        plan = [
            sample_order.train_rows(
                order,
                step,
                batch_size=batch_size,
                world=self.world,
                micro_batch_size=micro_batch_size,
            )
            for step in range(start_step, steps)
        ]

        def change(images: Tensor, keys: tuple[str, ...]) -> Tensor:
            moments = (self.mean, self.std)
            return augmentation.augment(
                images,
                keys,
                augment,
                seed=seed,
                epoch=epoch,
                moments=moments,
                compiled=self.compiled,
            )

        yield from self._run_ahead(self.feed.feed(plan), change)

    def evaluation(self, *, batch_size: int) -> Iterator[Batch]:
        """This rank's share of the split in the store's order, each sample on exactly one rank.

        `batch_size` is this rank's own. Raises DataError and StorageError.
        """

        def normalise(images: Tensor, keys: tuple[str, ...]) -> Tensor:
            return augmentation.normalise(images, self.mean, self.std)

        yield from self._run_ahead(self.share(batch_size=batch_size), normalise)

    def share(self, *, batch_size: int) -> Iterator[Samples]:
        """What `evaluation` gives, as it is stored: gray levels, on the CPU when streamed."""
        rows = sample_order.evaluation_rows(self.block_sizes, self.world)
        plan: list[Rows] = [
            rows[start : start + batch_size] for start in range(0, len(rows), batch_size)
        ]
        yield from self.feed.feed(plan)

    def _run_ahead(
        self, stored: Iterable[Samples], change: Callable[[Tensor, tuple[str, ...]], Tensor]
    ) -> Iterator[Batch]:
        """Batches of what is stored, changed on the device."""

        def make() -> Generator[Batch, None, None]:
            for samples in stored:
                images = change(send(samples.images, self.device), samples.keys)
                yield Batch(images, send(samples.targets, self.device), samples.keys)

        yield from run_ahead(make(), self.device, lambda batch: (batch.images, batch.targets))


def open_loader(
    store_url: str,
    manifest: Manifest,
    split: str,
    config: DataConfig,
    *,
    image_size: int,
    mean: float,
    std: float,
    world: World,
    device: torch.device | str,
    tell: Callable[[str], None] = lambda line: None,
) -> Loader:
    """A loader of one split: see `open_loaders`."""
    [opened] = open_loaders(
        store_url,
        manifest,
        (split,),
        config,
        image_size=image_size,
        mean=mean,
        std=std,
        world=world,
        device=device,
        tell=tell,
    )
    return opened


def open_loaders(
    store_url: str,
    manifest: Manifest,
    splits: Sequence[str],
    config: DataConfig,
    *,
    image_size: int,
    mean: float,
    std: float,
    world: World,
    device: torch.device | str,
    tell: Callable[[str], None] = lambda line: None,
    held: Mapping[str, Held] = MappingProxyType({}),
    compiled: bool = False,
) -> tuple[Loader, ...]:
    """Loaders of splits at `image_size`, in the way that `config.cache` says or that fits beside
    one another; of `held` pictures where a split has been read already, and `compiled` or not.

    `tell` hears in one line each which way it is and why. Raises DataError when the manifest does
    not add up or a shard is missing or cut, and ConfigError for settings that cannot be met.
    """
    device = torch.device(device)
    cache = None
    if config.cache_dir is not None:
        cache = BlockCache(config.cache_dir, int(config.cache_gb * 1e9))
    blocks = {
        split: Blocks(store_url, manifest, split, image_size=image_size, cache=cache)
        for split in splits
    }
    unread = [split for split in splits if split not in held]
    for split in unread:
        blocks[split].check_shards(config.readers)
    choices = choose_ways(
        config.cache,
        {split: manifest.splits[split].samples * image_size**2 for split in unread},
        host_bytes=free_memory.free_bytes() // world.local_size,
        device_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )

    def choose_feed(split: str) -> Feed:
        choice, readers = choices.get(split), config.readers
        if choice is None:
            tell(f"data: {split}: shared with the others on this machine")
            return Memory(blocks[split], readers=readers, device=device, held=held[split])
        tell(f"data: {split}: {choice.reason}")
        if choice.way == "stream":
            return Stream(blocks[split], readers=readers, prefetch_blocks=config.prefetch_blocks)
        keeper = device if choice.on_device else torch.device("cpu")
        return Memory(blocks[split], readers=readers, device=keeper)

    return tuple(
        Loader(
            choose_feed(split),
            tuple(blocks[split].sizes.tolist()),
            world,
            device,
            mean,
            std,
            compiled,
        )
        for split in splits
    )


def hold_split(
    store_url: str, manifest: Manifest, split: str, config: DataConfig, *, image_size: int
) -> Held | None:
    """The whole split in memory, for several trainings to share; None where it would be streamed.

    Raises DataError, StorageError and ConfigError as `open_loader` and what it gives.
    """
    decoded_bytes = {split: manifest.splits[split].samples * image_size**2}
    choices = choose_ways(
        config.cache, decoded_bytes, host_bytes=free_memory.free_bytes(), device_bytes=None
    )
    if choices[split].way == "stream":
        return None
    blocks = Blocks(store_url, manifest, split, image_size=image_size)
    blocks.check_shards(config.readers)
    return Memory(blocks, readers=config.readers, device=torch.device("cpu")).hold()


def choose_ways(
    wanted: Literal["auto", "memory", "stream"],
    decoded_bytes: Mapping[str, int],
    *,
    host_bytes: int,
    device_bytes: int | None,
) -> dict[str, Choice]:
    """How to feed splits of so many bytes of images with so much memory free for all of them; no
    device, no bytes there. The first split has the first choice.

    Raises ConfigError when memory is demanded and does not suffice.
    """
    choices: dict[str, Choice] = {}
    host_taken = device_taken = 0
    host_room = host_bytes * (_HOST_SHARE if wanted == "auto" else 1)
    device_room = 0 if device_bytes is None else device_bytes * _DEVICE_SHARE
    for split, number in decoded_bytes.items():
        size = f"{number / 1e9:.2f} GB decoded"
        free = f"{(host_bytes - host_taken) / 1e9:.2f} GB free for this worker"
        if host_taken:
            free += " beside the others"
        if wanted == "stream":
            choice = Choice("stream", False, f"streamed, as data.cache says ({size})")
        elif device_bytes is not None and device_taken + number <= device_room:
            on_device = f"{(device_bytes - device_taken) / 1e9:.2f} GB free there"
            choice = Choice("memory", True, f"kept on the device ({size}, {on_device})")
            device_taken += number
        elif host_taken + number <= host_room:
            choice = Choice("memory", False, f"kept in memory ({size}, {free})")
            host_taken += number
        elif wanted == "memory":
            raise ConfigError(
                f"data.cache: memory: {size}, {free}; use stream or auto, or fewer workers a "
                "machine"
            )
        else:
            choice = Choice("stream", False, f"streamed ({size}, {free})")
        choices[split] = choice
    return choices


def input_size(manifest: Manifest, wanted: int | None) -> int:
    """The size to train at. Raises ConfigError when it is above the store's: pixels are not
    invented."""
    if wanted is not None and wanted > manifest.image_size:
        raise ConfigError(
            f"data.image_size: {wanted} is above the store's {manifest.image_size}; lower it, or "
            f"prepare a store with --prepare.image-size {wanted}"
        )
    return wanted or manifest.image_size


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
