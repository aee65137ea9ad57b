"""Prefetching one batch ahead: in a thread, and on a GPU in a separate CUDA stream.

While step k computes, batch k + 1 is read, copied and augmented. The batches are the same as
without prefetching.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Made = tuple[T, torch.cuda.Event | None]
"""A batch, and the event that the device records when it is complete."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` copied from the host to the device; to a GPU asynchronously in the current stream,
    through pinned memory."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def prefetch(
    batches: Generator[T, None, None],
    device: torch.device,
    tensors_of: Callable[[T], Iterable[Tensor]],
) -> Iterator[T]:
    """The same batches in the same order; the next one is made while one is in use.

    An error while making a batch is raised in that batch's place. When this iterator is closed or
    dropped, `batches` is closed and the thread ends, after the batch that it is making.
    `tensors_of` returns the tensors of a batch on the device.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def make() -> Made[T] | None:
        if stream is None:
            batch = next(batches, None)
            return None if batch is None else (batch, None)
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    pool = ThreadPoolExecutor(1, thread_name_prefix="pneumo-ahead")
    upcoming: Future[Made[T] | None] = pool.submit(make)
    try:
        while (made := upcoming.result()) is not None:
            upcoming = pool.submit(make)
            batch, is_made = made
            if is_made is not None:
                here = torch.cuda.current_stream(device)
                here.wait_event(is_made)
                for tensor in tensors_of(batch):  # else the allocator reuses its memory too early
                    tensor.record_stream(here)
            yield batch
    finally:
        # No `submit` here: the garbage collector may drop this generator while another pool's
        # `submit` holds the lock of all pools.
        upcoming.cancel()
        upcoming.add_done_callback(lambda _: batches.close())
        pool.shutdown(wait=False)
