"""A split streamed: blocks are read shortly before they are needed."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pneumo.errors import DataError
from pneumo.loading.blocks import Blocks, Samples
from pneumo.loading.sample_order import Rows

_READER = "pneumo-reader"

_HELD_STEPS = 32
"""A block that is needed again within so many steps is held; twice what it lasts in a lane."""


class StreamingFeed:
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
