"""A split held in memory."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pneumo.errors import DataError
from pneumo.loading.blocks import Blocks, Samples
from pneumo.loading.prefetch import send
from pneumo.loading.sample_order import Rows

_READER = "pneumo-reader"


@dataclass(frozen=True, eq=False)
class InMemorySplit:
    """A whole split, decoded: several trainings on one machine can share its memory."""

    keys: tuple[str, ...]
    """(N,) in the store's order."""
    images: npt.NDArray[np.uint8]
    """(N, 1, S, S), 0 = black; may be read-only."""
    targets: npt.NDArray[np.float32]
    """(N,) of 0 and 1."""


class InMemoryFeed:
    """A split as one uint8 tensor, filled with what is asked for when it first is."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        readers: int,
        device: torch.device,
        held: InMemorySplit | None = None,
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

    def hold(self) -> InMemorySplit:
        """All of the split, read if need be; it shares this object's memory."""
        self._fill([np.arange(len(self.keys), dtype=np.int64)])
        return InMemorySplit(tuple(self.keys), self.images.numpy(), self.targets.numpy())

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
