"""From a store to batches: read from memory or streamed, augmented and normalised on the device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumo.config import AugmentConfig
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.shards import read_shard
from pneumo.errors import ConfigError, DataError
from pneumo.loading import augmentation, free_memory, sample_order
from pneumo.loading.blocks import Blocks, Feed, PreparedStore, Samples
from pneumo.loading.in_memory import InMemoryFeed, InMemorySplit
from pneumo.loading.prefetch import prefetch, to_device
from pneumo.loading.sample_order import World
from pneumo.loading.streaming import StreamingFeed

_HOST_FRACTION = 0.5
"""Splits may take this fraction of the free memory; the rest is for the model and for batches."""
_DEVICE_FRACTION = 0.25
"""And this one of the device's: activations need far more there than the weights."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank feeds the network in one step."""

    images: Tensor
    """(B, 1, S, S) float32, normalised."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the images' device."""
    keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Loader:
    """Feeds one rank from one split; `open_loader` makes it.

    An iterator that is closed or dropped before its end stops its threads.
    """

    feed: Feed
    block_sizes: tuple[int, ...]
    world: World
    device: torch.device
    moments: tuple[float, float]
    """Mean and standard deviation of the training split's gray levels, in [0, 1]."""
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

        Blocks that only earlier steps need are not read. Each batch is made while the one before is
        in use. Raises ConfigError when there is not one full batch; DataError and StorageError
        while it goes on.
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
        change = partial(
            augmentation.augment,
            config=augment,
            seed=seed,
            epoch=epoch,
            moments=self.moments,
            compiled=self.compiled,
        )
        yield from self._prefetch(self.feed.feed(plan), change)

    def evaluation(self, *, batch_size: int) -> Iterator[Batch]:
        """This rank's slice of the split in the store's order, each sample on exactly one rank.

        `batch_size` is this rank's own. Raises DataError and StorageError.
        """
        yield from self._prefetch(
            self.rank_slice(batch_size=batch_size),
            lambda images, _: augmentation.normalise(images, *self.moments),
        )

    def rank_slice(self, *, batch_size: int) -> Iterator[Samples]:
        """What `evaluation` gives, as it is stored: gray levels, on the CPU when streamed."""
        rows = sample_order.evaluation_rows(self.block_sizes, self.world)
        yield from self.feed.feed(
            [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        )

    def _prefetch(
        self, stored: Iterable[Samples], change: Callable[[Tensor, tuple[str, ...]], Tensor]
    ) -> Iterator[Batch]:
        """Batches of what is stored, changed on the device."""
        batches = (
            Batch(
                change(to_device(samples.images, self.device), samples.keys),
                to_device(samples.targets, self.device),
                samples.keys,
            )
            for samples in stored
        )
        yield from prefetch(batches, self.device, lambda batch: (batch.images, batch.targets))


def open_loader(
    store: PreparedStore,
    split: str,
    *,
    world: World,
    device: torch.device | str,
    tell: Callable[[str], None] = lambda line: None,
) -> Loader:
    """A loader of one split: see `open_loaders`."""
    [opened] = open_loaders(store, (split,), world=world, device=device, tell=tell)
    return opened


def open_loaders(
    store: PreparedStore,
    splits: Sequence[str],
    *,
    world: World,
    device: torch.device | str,
    tell: Callable[[str], None] = lambda line: None,
    shared_splits: Mapping[str, InMemorySplit] = MappingProxyType({}),
    compiled: bool = False,
) -> tuple[Loader, ...]:
    """Loaders of `splits`, in memory or streamed as `data.cache` says or as memory allows; those
    in `shared_splits` are not read again. `tell` gets a line a split: how it is fed, and why.

    Raises DataError when the manifest does not add up or a shard is missing or cut, and ConfigError
    for settings that cannot be met.
    """
    device = torch.device(device)
    blocks = {split: Blocks(store, split) for split in splits}
    unread = [split for split in splits if split not in shared_splits]
    for split in unread:
        blocks[split].check_shards(world)
    choices = choose_feeds(
        store.config.cache,
        {split: store.decoded_bytes(split) for split in unread},
        host_bytes=free_memory.free_bytes() // world.local_size,
        device_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )

    moments = (store.manifest.mean, store.manifest.std)
    loaders = []
    for split in splits:
        if split in shared_splits:
            tell(f"data: {split}: shared with the other trainings on this machine")
            feed: Feed = InMemoryFeed(blocks[split], device=device, loaded=shared_splits[split])
        else:
            tell(f"data: {split}: {choices[split].reason}")
            feed = _build_feed(blocks[split], choices[split], device)
        sizes = tuple(blocks[split].sizes.tolist())
        loaders.append(Loader(feed, sizes, world, device, moments, compiled))
    return tuple(loaders)


def read_in_memory(store: PreparedStore, split: str) -> InMemorySplit | None:
    """The whole split, for several trainings to share; None where it would be streamed.

    Raises DataError, StorageError and ConfigError.
    """
    choices = choose_feeds(
        store.config.cache,
        {split: store.decoded_bytes(split)},
        host_bytes=free_memory.free_bytes(),
        device_bytes=None,
    )
    if choices[split].place == "stream":
        return None
    blocks = Blocks(store, split)
    blocks.check_shards(World())
    return InMemoryFeed(blocks, device=torch.device("cpu")).read_all()


@dataclass(frozen=True)
class FeedChoice:
    """How a split is fed, and why."""

    place: Literal["device", "memory", "stream"]
    reason: str


def _build_feed(blocks: Blocks, choice: FeedChoice, device: torch.device) -> Feed:
    if choice.place == "stream":
        return StreamingFeed(blocks)
    return InMemoryFeed(blocks, device=device if choice.place == "device" else torch.device("cpu"))


def choose_feeds(
    wanted: Literal["auto", "memory", "stream"],
    decoded_bytes: Mapping[str, int],
    *,
    host_bytes: int,
    device_bytes: int | None,
) -> dict[str, FeedChoice]:
    """How to feed splits of so many bytes with so much free memory for all of them; the first split
    has the first choice, and `device_bytes` is None without a GPU.

    Raises ConfigError when memory is demanded and does not suffice.
    """
    choices: dict[str, FeedChoice] = {}
    host_taken = device_taken = 0
    host_room = host_bytes * (_HOST_FRACTION if wanted == "auto" else 1)
    device_room = 0 if device_bytes is None else device_bytes * _DEVICE_FRACTION
    for split, number in decoded_bytes.items():
        size = f"{number / 1e9:.2f} GB decoded"
        free = f"{(host_bytes - host_taken) / 1e9:.2f} GB free for this worker"
        if host_taken:
            free += " beside the others"
        if wanted == "stream":
            choice = FeedChoice("stream", f"streamed, as data.cache says ({size})")
        elif device_bytes is not None and device_taken + number <= device_room:
            on_device = f"{(device_bytes - device_taken) / 1e9:.2f} GB free there"
            choice = FeedChoice("device", f"kept on the device ({size}, {on_device})")
            device_taken += number
        elif host_taken + number <= host_room:
            choice = FeedChoice("memory", f"kept in memory ({size}, {free})")
            host_taken += number
        elif wanted == "memory":
            raise ConfigError(
                f"data.cache: memory: {size}, {free}; use stream or auto, or fewer workers a "
                "machine"
            )
        else:
            choice = FeedChoice("stream", f"streamed ({size}, {free})")
        choices[split] = choice
    return choices


def read_images(
    store_url: str, manifest: Manifest, split: str, keys: Iterable[str]
) -> dict[str, npt.NDArray[np.uint8]]:
    """The stored images of `keys` in a split, (S, S) uint8 each. Raises DataError for a key that is
    not in it."""
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
