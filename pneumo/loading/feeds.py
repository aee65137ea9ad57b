"""Two ways from a store to a step's samples: held in memory, or streamed. Same samples, same bytes.

Both take a plan, the rows of each step to come, and give the steps' samples in its order. Both read
by blocks, checked against their digests and decoded to the training size by a few threads. What
breaks in a thread is raised in the step that needed it, so an epoch has all its samples or ends
with an error that names the shard.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumo import storage
from pneumo.dataset.manifest import BlockEntry, Manifest, ShardEntry
from pneumo.dataset.shards import decode_block, read_block
from pneumo.errors import ContentError, DataError
from pneumo.loading.block_cache import BlockCache
from pneumo.loading.prefetch import send
from pneumo.loading.sample_order import Rows

_READER = "pneumo-reader"
_HELD_STEPS = 32
"""A block that is needed again within so many steps is held; twice what it lasts in a lane."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a split, decoded."""

    keys: tuple[str, ...]
    images: Tensor
    """(B, 1, S, S) uint8, 0 = black."""
    targets: Tensor
    """(B,) float32, 0 or 1, on the CPU."""


@dataclass(frozen=True, eq=False)
class Held:
    """A whole split, decoded: several trainings on one machine can share its memory."""

    keys: tuple[str, ...]
    """(N,) in the store's order."""
    images: npt.NDArray[np.uint8]
    """(N, 1, S, S), 0 = black; may be read-only."""
    targets: npt.NDArray[np.float32]
    """(N,) of 0 and 1."""


class Feed(Protocol):
    """A way to get samples."""

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        """The samples of each step of `plan`. Raises DataError and StorageError."""
        ...


class Blocks:
    """A split's blocks, in the store's order, and how one is had."""

    def __init__(
        self,
        store_url: str,
        manifest: Manifest,
        split: str,
        *,
        image_size: int,
        cache: BlockCache | None = None,
    ) -> None:
        """Raises DataError when the manifest's numbers do not add up."""
        entry = manifest.splits[split]
        self.store_url, self.split, self.shards = store_url, split, entry.shards
        self.stored_size, self.image_size, self.cache = manifest.image_size, image_size, cache
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

    def containing(self, rows: Rows) -> Rows:
        """The block of each row, same shape."""
        return np.searchsorted(self.ends, rows, side="right")

    def load(self, number: int, out: Tensor | None = None) -> Samples:
        """Read block `number` and decode it to the training size, into `out` where that is given:
        (B, 1, S, S) uint8 on the CPU. Raises DataError."""
        shard, block = self.entries[number]
        data = self.cache.find(block.blake3) if self.cache else None
        if data is None:
            data = read_block(self.store_url, shard, block)
            if self.cache:
                self.cache.keep(block.blake3, data)
        samples = list(decode_block(data, shard, block, self.stored_size))
        return Samples(
            tuple(sample.key for sample in samples),
            to_input([sample.pixels for sample in samples], self.image_size, out),
            torch.tensor([sample.target for sample in samples], dtype=torch.float32),
        )

    def check_shards(self, readers: int) -> None:
        """Read the last byte of every shard: one that is missing or cut is known before the first
        step. Raises DataError."""

        def check(shard: ShardEntry) -> None:
            url = storage.join(self.store_url, shard.name)
            try:
                storage.read_range(url, shard.bytes - 1, 1)
            except FileNotFoundError as error:
                raise DataError(f"shard {shard.name}: missing from {self.store_url}") from error
            except ContentError as error:
                raise DataError(
                    f"shard {shard.name}: cut: {error}; delete the store and prepare it again"
                ) from error

        with ThreadPoolExecutor(readers, thread_name_prefix=_READER) as pool:
            list(pool.map(check, self.shards))


class Memory:
    """A split as one uint8 tensor, filled with what is asked for when it first is."""

    def __init__(
        self, blocks: Blocks, *, readers: int, device: torch.device, held: Held | None = None
    ) -> None:
        """`held`: the split as somebody else has read it; nothing is read then."""
        count = int(blocks.sizes.sum())
        shape = (count, 1, blocks.image_size, blocks.image_size)
        self.blocks, self.readers = blocks, readers
        self.keys = [""] * count
        self.loaded: set[int] = set()
        if held is None:
            # On a CPU pages that are never written take no memory: a rank that evaluates a share
            # of the split holds its share.
            self.images = torch.empty(shape, dtype=torch.uint8, device=device)
            self.targets = torch.empty(count, dtype=torch.float32)
            return
        if held.images.shape != shape:
            raise DataError(
                f"split {blocks.split}: pictures {held.images.shape} are held, expected {shape}"
            )
        with warnings.catch_warnings():  # shared memory cannot be written to, and is not
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.from_numpy(held.images).to(device)
            self.targets = torch.from_numpy(held.targets)
        self.keys = list(held.keys)
        self.loaded = set(range(len(blocks.sizes)))

    def hold(self) -> Held:
        """All of the split, read if need be; it shares this object's memory."""
        self._fill([np.arange(len(self.keys), dtype=np.int64)])
        return Held(tuple(self.keys), self.images.numpy(), self.targets.numpy())

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        self._fill(plan)
        for rows in plan:
            index = torch.from_numpy(rows)
            yield Samples(
                tuple(self.keys[row] for row in rows.tolist()),
                # Copies rows: 4 us each on a CPU, where `self.images[index]` takes 30.
                self.images.index_select(0, send(index, self.images.device)),
                self.targets[index],
            )

    def _fill(self, plan: Sequence[Rows]) -> None:
        """Load the blocks of `plan` that are not yet here. Raises DataError for a key that stands
        twice."""
        if not plan:
            return
        needed = set(self.blocks.containing(np.concatenate(plan)).tolist())
        missing = sorted(needed - self.loaded)
        for number, samples in zip(missing, self._load(missing), strict=True):
            place = self._place(number)
            if samples.images.device != self.images.device:
                self.images[place].copy_(samples.images)
            self.targets[place] = samples.targets
            self.keys[place] = samples.keys
            self.loaded.add(number)
        if missing:
            if self.images.device.type == "cuda":  # whichever stream reads them next
                torch.cuda.current_stream(self.images.device).synchronize()
            present = [key for key in self.keys if key]
            if twice := len(present) - len(set(present)):
                raise DataError(
                    f"split {self.blocks.split}: {twice} of {len(present)} studies stand in it "
                    "more than once; delete the store and prepare it again"
                )

    def _place(self, number: int) -> slice:
        return slice(self.blocks.starts[number], self.blocks.ends[number])

    def _load(self, numbers: Sequence[int]) -> Iterator[Samples]:
        """The blocks `numbers` in their order, loaded several at a time and not far ahead.

        On a CPU each is decoded to where it stays.
        """

        def load(number: int) -> Samples:
            on_cpu = self.images.device.type == "cpu"
            return self.blocks.load(number, self.images[self._place(number)] if on_cpu else None)

        pool = ThreadPoolExecutor(self.readers, thread_name_prefix=_READER)
        pending: deque[Future[Samples]] = deque()
        try:
            for number in numbers:
                pending.append(pool.submit(load, number))
                if len(pending) > 2 * self.readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Stream:
    """Blocks read shortly before they are needed, and dropped afterwards."""

    def __init__(self, blocks: Blocks, *, readers: int, prefetch_blocks: int) -> None:
        self.blocks, self.readers, self.prefetch_blocks = blocks, readers, prefetch_blocks

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        visits = _list_visits([self.blocks.containing(rows) for rows in plan])
        asked = 0
        ahead: deque[tuple[_Visit, Future[Samples]]] = deque()
        here: dict[int, tuple[_Visit, Future[Samples]]] = {}
        row_of: dict[str, int] = {}
        pool = ThreadPoolExecutor(self.readers, thread_name_prefix=_READER)
        try:
            for step, rows in enumerate(plan):
                begun = bisect_right(visits, step, key=lambda visit: visit.first)
                for visit in visits[asked : begun + self.prefetch_blocks]:
                    ahead.append((visit, pool.submit(self.blocks.load, visit.block)))
                    asked += 1
                while ahead and ahead[0][0].first <= step:
                    due = ahead.popleft()
                    here[due[0].block] = due
                samples = self._gather(rows, {number: here[number][1] for number in here})
                here = {number: held for number, held in here.items() if held[0].last > step}
                self._check_keys(samples.keys, rows, row_of)
                yield samples
        finally:
            # Also when the consumer goes away. Not waited for: a read may be trying again.
            pool.shutdown(wait=False, cancel_futures=True)

    def _check_keys(self, keys: Sequence[str], rows: Rows, row_of: dict[str, int]) -> None:
        """Raise DataError for a key that stood in another row before; `row_of` remembers them."""
        if any(
            row_of.setdefault(key, row) != row for key, row in zip(keys, rows.tolist(), strict=True)
        ):
            raise DataError(
                f"split {self.blocks.split}: a study stands in it more than once; prepare the "
                "store again"
            )

    def _gather(self, rows: Rows, held: Mapping[int, Future[Samples]]) -> Samples:
        size = self.blocks.image_size
        # numpy copies a row at once, torch a pixel at a time: 10 against 100 us a sample.
        images = np.empty((len(rows), 1, size, size), dtype=np.uint8)
        targets = np.empty(len(rows), dtype=np.float32)
        keys = []
        numbers = self.blocks.containing(rows)
        inside = rows - self.blocks.starts[numbers]
        for place, (number, i) in enumerate(zip(numbers.tolist(), inside.tolist(), strict=True)):
            block = held[number].result()
            images[place] = block.images[i].numpy()
            targets[place] = block.targets[i]
            keys.append(block.keys[i])
        return Samples(tuple(keys), torch.from_numpy(images), torch.from_numpy(targets))


@dataclass
class _Visit:
    """A stretch of steps that need a block."""

    block: int
    first: int
    last: int


def _list_visits(blocks_of_steps: Sequence[Rows]) -> list[_Visit]:
    """The visits to blocks, by their first step.

    A block that two lanes share is needed at the epoch's begin and again at its end: it is dropped
    in between, and read twice.
    """
    visits: list[_Visit] = []
    latest: dict[int, _Visit] = {}
    for step, numbers in enumerate(blocks_of_steps):
        for number in dict.fromkeys(numbers.tolist()):
            visit = latest.get(number)
            if visit is None or step - visit.last > _HELD_STEPS:
                visit = latest[number] = _Visit(number, step, step)
                visits.append(visit)
            visit.last = step
    return visits


def to_input(
    pixels: Sequence[npt.NDArray[np.uint8]], image_size: int, out: Tensor | None = None
) -> Tensor:
    """Stored pictures -> (B, 1, S, S) uint8 at the training size, resampled by area.

    Into `out` where that is given, which must have this shape.
    """
    if out is None:
        out = torch.empty((len(pixels), 1, image_size, image_size), dtype=torch.uint8)
    # numpy copies a picture at once, torch a pixel at a time.
    for image, place in zip(pixels, out.numpy()[:, 0], strict=True):
        if image.shape == place.shape:
            place[:] = image
        else:
            place[:] = cv2.resize(image, place.shape[::-1], interpolation=cv2.INTER_AREA)
    return out
