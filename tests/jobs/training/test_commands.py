"""Commands on one local Ray: who listens hears, and nobody trains on unheard."""

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray

from jobs.training.messages import Worker, WorkerChannel
from tests.waiting import wait_until


class _Worker:
    """A process that listens."""

    def __init__(self, channel: WorkerChannel, rank: int) -> None:
        self.heard = channel.listen(rank)

    def has_heard(self) -> bool:
        return self.heard.is_set()

    def pid(self) -> int:
        return os.getpid()


def start_worker(channel: WorkerChannel, rank: int) -> Any:
    worker = ray.remote(num_cpus=0)(_Worker).remote(channel, rank)
    ray.get(worker.pid.remote())
    return worker


def has_heard(worker: Any) -> bool:
    return bool(ray.get(worker.has_heard.remote()))


def ends(worker: Any) -> bool:
    try:
        ray.get(worker.pid.remote())
    except ray.exceptions.RayActorError:
        return True
    return False


@pytest.fixture
def channel(ray_here: None) -> Iterator[WorkerChannel]:
    channel = WorkerChannel()
    yield channel
    ray.kill(channel.actor)


def test_a_command_reaches_who_listens_and_who_comes_later(channel: WorkerChannel) -> None:
    first = start_worker(channel, 0)
    wait_until(lambda: len(channel.workers()) == 1, "the worker to listen")
    assert not has_heard(first)
    channel.broadcast("stop")
    second = start_worker(channel, 1)
    for worker in (first, second):
        wait_until(partial(has_heard, worker), "the command to arrive")
    assert [member.rank for member in channel.workers()] == [0, 1]
    assert {m.node_id for m in channel.workers()} == {ray.get_runtime_context().get_node_id()}
    for worker in (first, second):
        ray.kill(worker)


def test_what_was_posted_before_is_not_for_the_next_group(channel: WorkerChannel) -> None:
    channel.broadcast("stop")
    channel.reset()
    assert channel.workers() == []
    worker = start_worker(channel, 0)
    wait_until(lambda: len(channel.workers()) == 1, "the worker to listen")
    time.sleep(0.3)
    assert not ray.get(worker.has_heard.remote())
    ray.kill(worker)


def test_a_process_of_an_ended_group_ends(channel: WorkerChannel) -> None:
    """Its pending calls would stay in the channel for ever."""
    worker = start_worker(channel, 0)
    wait_until(lambda: len(channel.workers()) == 1, "the worker to listen")
    channel.reset()
    wait_until(lambda: ends(worker), "the process of the old group to end")


def test_thousands_of_workers_can_listen(channel: WorkerChannel) -> None:
    for rank in range(2000):
        channel.actor.listen.remote(Worker(rank, "node", "address"), "stop")
    assert ray.get(channel.actor.list_workers.remote(), timeout=60)  # it still answers


def test_a_process_that_is_abandoned_ends(channel: WorkerChannel) -> None:
    worker = start_worker(channel, 0)
    channel.broadcast("abandon")
    wait_until(lambda: ends(worker), "the abandoned process to end")


def test_a_process_that_was_told_to_stop_can_still_be_abandoned(channel: WorkerChannel) -> None:
    """As where a drained node vanishes before the checkpoint is written."""
    worker = start_worker(channel, 0)
    for _ in range(2):  # it is repeated at each check of the nodes
        channel.broadcast("stop")
    wait_until(partial(has_heard, worker), "the command to arrive")
    assert not ends(worker)
    channel.broadcast("abandon")
    wait_until(lambda: ends(worker), "the abandoned process to end")


def test_a_process_whose_channel_is_lost_ends(ray_here: None) -> None:
    channel = WorkerChannel()
    worker = start_worker(channel, 0)
    wait_until(lambda: len(channel.workers()) == 1, "the worker to listen")
    ray.kill(channel.actor)
    wait_until(lambda: ends(worker), "the abandoned process to end")
