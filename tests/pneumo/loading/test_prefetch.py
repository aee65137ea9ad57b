"""One step ahead, in order, and gone with its consumer."""

import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import eq

import pytest
import torch
from torch import Tensor

from pneumo.loading.prefetch import prefetch, to_device
from tests.waiting import wait_until

CPU = torch.device("cpu")


class Source:
    """Numbers, and what has become of them."""

    def __init__(self, count: int, failing_at: int | None = None) -> None:
        self.count, self.failing_at = count, failing_at
        self.made: list[int] = []
        self.is_closed = False

    def generate(self) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                if number == self.failing_at:
                    raise ValueError(f"number {number}")
                self.made.append(number)
                yield number
        finally:
            self.is_closed = True


def no_tensors(batch: int) -> list[Tensor]:
    return []


def threads() -> int:
    return sum(thread.name.startswith("pneumo-ahead") for thread in threading.enumerate())


def test_all_come_in_their_order_and_the_thread_ends() -> None:
    source = Source(20)
    assert list(prefetch(source.generate(), CPU, no_tensors)) == list(range(20))
    wait_until(lambda: source.is_closed and threads() == 0, "the thread to end")


def test_the_next_is_made_while_one_is_in_use_and_no_more() -> None:
    source = Source(9)
    batches = prefetch(source.generate(), CPU, no_tensors)
    for number in (0, 1, 2):
        assert next(batches) == number
        wait_until(
            partial(eq, source.made, list(range(number + 2))),
            f"batch {number + 1} to be made while {number} is in use",
        )
    time.sleep(0.1)
    assert source.made == [0, 1, 2, 3]
    del batches


@pytest.mark.parametrize("failing_at", [0, 1, 3])
def test_what_fails_is_raised_in_its_place(failing_at: int) -> None:
    batches = prefetch(Source(9, failing_at).generate(), CPU, no_tensors)
    for number in range(failing_at):
        assert next(batches) == number
    with pytest.raises(ValueError, match=f"number {failing_at}"):
        next(batches)
    wait_until(lambda: threads() == 0, "the thread to end")


@pytest.mark.parametrize("dropped", [False, True])
def test_a_consumer_that_leaves_ends_it(dropped: bool) -> None:
    source = Source(9)
    batches = prefetch(source.generate(), CPU, no_tensors)
    assert next(batches) == 0
    if not dropped:
        batches.close()  # type: ignore[attr-defined]
    del batches
    wait_until(lambda: source.is_closed and threads() == 0, "the thread to end")
    assert len(source.made) <= 2


def test_one_that_is_collected_while_a_pool_takes_work_does_not_block_the_pool() -> None:
    """As the garbage collector may drop it at any moment, under a lock that all pools share."""
    held = [prefetch(Source(9).generate(), CPU, no_tensors)]
    next(held[0])

    class Dropping(str):
        def __str__(self) -> str:  # asked for by the pool, when it starts a thread
            held.clear()
            return "reader"

    def use() -> None:
        with ThreadPoolExecutor(1, thread_name_prefix=Dropping("reader")) as pool:
            pool.submit(int).result()

    using = threading.Thread(target=use, daemon=True)
    using.start()
    using.join(20)
    assert not held
    assert not using.is_alive()


def test_on_a_cpu_what_is_sent_is_the_same() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor
