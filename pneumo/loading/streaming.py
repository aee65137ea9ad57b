"""Streaming a split: blocks are read shortly before they are needed, and dropped afterwards."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pneumo.loading.blocks import READER_THREAD, READERS, Blocks, Samples
from pneumo.loading.sample_order import Rows

PREFETCH_BLOCKS = 16
"""Blocks, of 64 samples or 4 MB, to read ahead of the step that needs them."""
_KEPT_STEPS = 32
"""A block that is needed again within this many steps is kept; a lane uses a block for 16."""


class StreamingFeed:
    """Reads at most `prefetch_blocks` blocks ahead of the step that needs them."""

    def __init__(
        self, blocks: Blocks, *, readers: int = READERS, prefetch_blocks: int = PREFETCH_BLOCKS
    ) -> None:
        self.blocks, self.readers, self.prefetch_blocks = blocks, readers, prefetch_blocks

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        """See `Feed.feed`."""
        uses = _list_uses([self.blocks.containing(rows) for rows in plan])
        num_submitted = 0
        reads: list[tuple[_BlockUse, Future[Samples]]] = []
        pool = ThreadPoolExecutor(self.readers, thread_name_prefix=READER_THREAD)
        try:
            for step, rows in enumerate(plan):
                num_started = bisect_right(uses, step, key=lambda use: use.first)
                upcoming = uses[num_submitted : num_started + self.prefetch_blocks]
                reads += [(use, pool.submit(self.blocks.load, use.block)) for use in upcoming]
                num_submitted += len(upcoming)
                due = {use.block: read for use, read in reads if use.first <= step}
                reads = [(use, read) for use, read in reads if use.last > step]
                yield self._gather(rows, due)
        finally:
            # Also when the consumer stops early. No waiting: a read may be in its retries.
            pool.shutdown(wait=False, cancel_futures=True)

    def _gather(self, rows: Rows, blocks: Mapping[int, Future[Samples]]) -> Samples:
        size = self.blocks.image_size
        # numpy copies a row at once, torch a pixel at a time: 10 instead of 100 us a sample.
        images = np.empty((len(rows), 1, size, size), dtype=np.uint8)
        targets = np.empty(len(rows), dtype=np.float32)
        keys = []
        numbers = self.blocks.containing(rows)
        inside = rows - self.blocks.starts[numbers]
        for row, (number, i) in enumerate(zip(numbers.tolist(), inside.tolist(), strict=True)):
            block = blocks[number].result()
            images[row] = block.images[i].numpy()
            targets[row] = block.targets[i]
            keys.append(block.keys[i])
        return Samples(tuple(keys), torch.from_numpy(images), torch.from_numpy(targets))


@dataclass
class _BlockUse:
    """A range of steps, `first` to `last`, that need a block."""

    block: int
    first: int
    last: int


def _list_uses(blocks_of_steps: Sequence[Rows]) -> list[_BlockUse]:
    """The uses of blocks, sorted by their first step.

    A block that spans two lanes is needed at the start of an epoch and again at its end: it is
    dropped in between, and read twice.
    """
    uses: list[_BlockUse] = []
    latest: dict[int, _BlockUse] = {}
    for step, numbers in enumerate(blocks_of_steps):
        for number in dict.fromkeys(numbers.tolist()):
            use = latest.get(number)
            if use is None or step - use.last > _KEPT_STEPS:
                use = latest[number] = _BlockUse(number, step, step)
                uses.append(use)
            use.last = step
    return uses
