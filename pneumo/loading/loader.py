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
"""The largest fraction of the free host memory for splits; the rest is for model and batches."""
_DEVICE_FRACTION = 0.25
"""The same of the device's free memory, where activations need much more than the weights."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a batch."""

    images: Tensor
    """(B, 1, S, S) float32, normalised."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the images' device."""
    keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Loader:
    """Loads one split for one rank; `open_loader` creates it.

    Closing or dropping one of its iterators early stops its threads.
    """

    feed: Feed
    block_sizes: tuple[int, ...]
    world: World
    device: torch.device
    moments: tuple[float, float]
    """Mean and standard deviation of the training split's gray levels, in [0, 1]."""
    compiled: bool = False
    """Whether augmentation on a GPU uses torch.compile."""

    def __len__(self) -> int:
        """Number of samples in the split, over all ranks."""
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
        """This rank's micro-batches of each step from `start_step` on, augmented.

        Blocks that only earlier steps need are not read. Each batch is prefetched while the one
        before is in use. Raises ConfigError when the split has not one full batch; DataError and
        StorageError while iterating.
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
        transform = partial(
            augmentation.augment,
            config=augment,
            seed=seed,
            epoch=epoch,
            moments=self.moments,
            compiled=self.compiled,
        )
        yield from self._prefetch(self.feed.feed(plan), transform)

    def evaluation(self, *, batch_size: int) -> Iterator[Batch]:
        """This rank's slice of the split in the store's order, each sample on exactly one rank.

        `batch_size` is per rank. Raises DataError and StorageError.
        """
        yield from self._prefetch(
            self.rank_slice(batch_size=batch_size),
            lambda images, _: augmentation.normalise(images, *self.moments),
        )

    def rank_slice(self, *, batch_size: int) -> Iterator[Samples]:
        """The batches of `evaluation` before normalisation: uint8, on the CPU when streamed."""
        rows = sample_order.evaluation_rows(self.block_sizes, self.world)
        yield from self.feed.feed(
            [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        )

    def _prefetch(
        self, stored: Iterable[Samples], transform: Callable[[Tensor, tuple[str, ...]], Tensor]
    ) -> Iterator[Batch]:
        """Batches of the stored samples, transformed on the device."""
        batches = (
            Batch(
                transform(to_device(samples.images, self.device), samples.keys),
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
    """A loader of one split; see `open_loaders`."""
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
    trainings_here: int = 1,
    compiled: bool = False,
) -> tuple[Loader, ...]:
    """Loaders of `splits`, in memory or streamed as `data.cache` says or as memory allows; those
    in `shared_splits` are not read again. `trainings_here` share this machine's memory. `tell` gets
    a line per split: how it is loaded, and why.

    Raises DataError when the manifest's counts are inconsistent or a shard is missing or truncated,
    ConfigError when a split does not fit in memory as `data.cache` demands.
    """
    device = torch.device(device)
    blocks = {split: Blocks(store, split) for split in splits}
    unread = [split for split in splits if split not in shared_splits]
    for split in unread:
        blocks[split].check_shards(world)
    device_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    choices = choose_feeds(
        store.config.cache,
        {split: store.decoded_bytes(split) for split in unread},
        host_bytes=free_memory.free_bytes() // (world.local_size * trainings_here),
        device_bytes=device_bytes,
    )
    shared = {split: store.decoded_bytes(split) for split in splits if split in shared_splits}
    choices |= choose_feeds(  # they are in the host's memory already
        "memory", shared, host_bytes=sum(shared.values()), device_bytes=device_bytes
    )

    moments = (store.manifest.mean, store.manifest.std)
    loaders = []
    for split in splits:
        if split in shared_splits:
            tell(f"data: {split}: shared with the other trainings on this machine")
        else:
            tell(f"data: {split}: {choices[split].reason}")
        feed = _build_feed(blocks[split], choices[split], device, shared_splits.get(split))
        sizes = tuple(blocks[split].sizes.tolist())
        loaders.append(Loader(feed, sizes, world, device, moments, compiled))
    return tuple(loaders)


def read_in_memory(store: PreparedStore, split: str) -> InMemorySplit | None:
    """The whole split, to be shared by several training processes; None where it is streamed.

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
    """How a split is loaded, and why."""

    place: Literal["device", "memory", "stream"]
    reason: str


def _build_feed(
    blocks: Blocks, choice: FeedChoice, device: torch.device, loaded: InMemorySplit | None
) -> Feed:
    if choice.place == "stream":
        return StreamingFeed(blocks)
    place = device if choice.place == "device" else torch.device("cpu")
    return InMemoryFeed(blocks, device=place, loaded=loaded)


def choose_feeds(
    cache: Literal["auto", "memory", "stream"],
    decoded_bytes: Mapping[str, int],
    *,
    host_bytes: int,
    device_bytes: int | None,
) -> dict[str, FeedChoice]:
    """How to load splits of `decoded_bytes` under the setting `data.cache`. `host_bytes` and
    `device_bytes` (None without a GPU) are free for all of them; earlier splits get memory first.

    Raises ConfigError when `cache` is "memory" and a split does not fit.
    """
    choices: dict[str, FeedChoice] = {}
    host_used = device_used = 0
    host_limit = host_bytes * (_HOST_FRACTION if cache == "auto" else 1)
    device_limit = 0 if device_bytes is None else device_bytes * _DEVICE_FRACTION
    for split, num_bytes in decoded_bytes.items():
        size = f"{num_bytes / 1e9:.3g} GB decoded"
        free = f"{(host_bytes - host_used) / 1e9:.2f} GB free for this worker"
        if host_used:
            free += " beside the others"
        if cache == "stream":
            choice = FeedChoice("stream", f"streamed, as data.cache says ({size})")
        elif device_bytes is not None and device_used + num_bytes <= device_limit:
            on_device = f"{(device_bytes - device_used) / 1e9:.2f} GB free there"
            choice = FeedChoice("device", f"kept on the device ({size}, {on_device})")
            device_used += num_bytes
        elif host_used + num_bytes <= host_limit:
            choice = FeedChoice("memory", f"kept in memory ({size}, {free})")
            host_used += num_bytes
        elif cache == "memory":
            raise ConfigError(
                f"data.cache: memory: {size}, {free}; use stream or auto, or fewer workers per "
                "machine"
            )
        else:
            choice = FeedChoice("stream", f"streamed ({size}, {free})")
        choices[split] = choice
    return choices


def read_images(
    store_url: str, manifest: Manifest, split: str, keys: Iterable[str]
) -> dict[str, npt.NDArray[np.uint8]]:
    """The stored images of `keys` in a split by key, (S, S) uint8 each. Raises DataError for a key
    that is not in the split."""
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
