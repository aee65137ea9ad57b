"""A split in memory, on the CPU or on the GPU: each block is read once per run."""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pneumo.errors import DataError
from pneumo.loading.blocks import READER_THREAD, READERS, Blocks, Samples
from pneumo.loading.prefetch import to_device
from pneumo.loading.sample_order import Rows


@dataclass(frozen=True, eq=False)
class InMemorySplit:
    """A whole decoded split; several training processes on one machine can share its memory."""

    keys: tuple[str, ...]
    """(N,) in the store's order."""
    images: npt.NDArray[np.uint8]
    """(N, 1, S, S), 0 = black; may be read-only."""
    targets: npt.NDArray[np.float32]
    """(N,) of 0 and 1."""


class InMemoryFeed:
    """A split as one uint8 tensor; a block is read when it is first needed."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        device: torch.device,
        loaded: InMemorySplit | None = None,
        readers: int = READERS,
    ) -> None:
        """`loaded`: the split as another process has read it; then nothing is read."""
        count = int(blocks.sizes.sum())
        shape = (count, 1, blocks.image_size, blocks.image_size)
        self.blocks, self.readers = blocks, readers
        self.keys = [""] * count
        self.loaded: set[int] = set()
        """Indices of the blocks in memory."""
        if loaded is None:
            # On a CPU pages that are never written take no memory: a rank that evaluates only its
            # slice of the split holds only that.
            self.images = torch.empty(shape, dtype=torch.uint8, device=device)
            self.targets = torch.empty(count, dtype=torch.float32)
            return
        if loaded.images.shape != shape:
            raise DataError(
                f"split {blocks.split}: images {loaded.images.shape} are in memory, expected "
                f"{shape}"
            )
        with warnings.catch_warnings():  # shared memory is read-only, and never written
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.from_numpy(loaded.images).to(device)
            self.targets = torch.from_numpy(loaded.targets)
        self.keys = list(loaded.keys)
        self.loaded = set(range(len(blocks.sizes)))

    def read_all(self) -> InMemorySplit:
        """The whole split; it shares this object's memory, which must be on the CPU."""
        self._read_missing([np.arange(len(self.keys), dtype=np.int64)])
        return InMemorySplit(tuple(self.keys), self.images.numpy(), self.targets.numpy())

    def feed(self, plan: Sequence[Rows]) -> Iterator[Samples]:
        """See `Feed.feed`."""
        self._read_missing(plan)
        for rows in plan:
            index = torch.from_numpy(rows)
            yield Samples(
                tuple(self.keys[row] for row in rows.tolist()),
                # 4 us a row on a CPU, where `self.images[index]` takes 30.
                self.images.index_select(0, to_device(index, self.images.device)),
                self.targets[index],
            )

    def _read_missing(self, plan: Sequence[Rows]) -> None:
        """Read the blocks of `plan` that are not in memory."""
        needed = self.blocks.containing(np.concatenate(plan)).tolist() if plan else []
        missing = sorted(set(needed) - self.loaded)
        if not missing:
            return
        pool = ThreadPoolExecutor(self.readers, thread_name_prefix=READER_THREAD)
        try:
            list(pool.map(self._load, missing))
        finally:  # no waiting after an error: another read may be in its retries
            pool.shutdown(wait=False, cancel_futures=True)
        if self.images.device.type == "cuda":  # any stream may read them next
            torch.cuda.synchronize(self.images.device)

    def _load(self, number: int) -> None:
        """Read a block into the tensors; on a CPU it is decoded in place."""
        rows = slice(self.blocks.starts[number], self.blocks.ends[number])
        on_cpu = self.images.device.type == "cpu"
        samples = self.blocks.load(number, self.images[rows] if on_cpu else None)
        if not on_cpu:
            self.images[rows].copy_(samples.images)
        self.targets[rows] = samples.targets
        self.keys[rows] = samples.keys
        self.loaded.add(number)
