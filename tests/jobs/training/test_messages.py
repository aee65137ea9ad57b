"""The channel on one local Ray: nothing is lost, and all is in order."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import ray

from jobs.training.messages import WorkerChannel
from pneumo.network.backbones import Initialisation
from pneumo.training.callbacks import Start
from tests.processes import find_users
from tests.waiting import wait_until


class _Writer:
    """A process that writes."""

    def write(self, channel: WorkerChannel, name: str, count: int) -> None:
        for number in range(count):
            channel.put((name, number))


@pytest.fixture
def channel(ray_here: None) -> Iterator[WorkerChannel]:
    channel = WorkerChannel()
    yield channel
    channel.close()


def test_all_messages_of_several_workers_arrive_each_in_order(channel: WorkerChannel) -> None:
    names, count = ("a", "b"), 60
    writers = [ray.remote(num_cpus=0)(_Writer).remote() for _ in names]
    writing = [w.write.remote(channel, n, count) for w, n in zip(writers, names, strict=True)]
    received: list[tuple[str, int]] = []

    def take_all() -> bool:
        received.extend(channel.take(0.01))  # ends again and again just as something comes
        return len(received) >= count * len(names)

    wait_until(take_all, lambda: f"all messages, of which {len(received)} came", pause_s=0)
    ray.get(writing)
    for name in names:
        assert [number for of, number in received if of == name] == list(range(count))
    assert channel.take(0.0) == []


def test_a_message_is_there_once_put_has_returned(channel: WorkerChannel) -> None:
    for message in ("one", ("two", 2), {"three": 3}):
        channel.put(message)
    assert channel.take(0.0) == ["one", ("two", 2), {"three": 3}]


def test_the_process_between_does_not_import_what_messages_are_of(channel: WorkerChannel) -> None:
    before, start = find_users("torch"), Start(Initialisation("random", "seed 0"), (), 0, 8)
    channel.put(start)
    assert channel.take(0.0) == [start]
    assert find_users("torch") <= before


def test_who_takes_is_woken_at_once_and_otherwise_after_the_timeout(channel: WorkerChannel) -> None:
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(channel.take, 3600.0)
        channel.put("now")
        assert waiting.result(timeout=120) == ["now"]
    begun_s = time.monotonic()
    assert channel.take(0.4) == []
    assert time.monotonic() - begun_s > 0.35


def test_a_short_break_of_the_network_costs_no_message(
    channel: WorkerChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, breaks = ray.get, [True]

    def get_after_a_break(reference: Any) -> Any:
        if breaks:
            breaks.clear()
            raise ray.exceptions.ActorUnavailableError("connection reset", None)
        return get(reference)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", get_after_a_break)
        channel.put("one")
    assert set(channel.take(60.0)) == {"one"}


def test_a_lost_channel_is_an_error_of_ray(ray_here: None) -> None:
    channel = WorkerChannel()
    channel.put("before")
    channel.close()

    def is_lost(call: Callable[[], Any]) -> bool:
        try:
            call()
        except ray.exceptions.RayError:
            return True
        return False

    for call in (lambda: channel.put("after"), lambda: channel.take(0.1)):
        wait_until(partial(is_lost, call), "the loss to be known")
