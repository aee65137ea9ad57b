"""Orders on one local Ray: who listens hears, and nobody trains on unheard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from jobs.training.messages import Mailbox
from tests.waiting import wait_until


class _Worker:
    """A process that listens."""

    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self.heard = mailbox.listen(rank)

    def has_heard(self) -> bool:
        return self.heard.is_set()

    def pid(self) -> int:
        return os.getpid()


def start_worker(mailbox: Mailbox, rank: int) -> Any:
    worker = ray.remote(num_cpus=0)(_Worker).remote(mailbox, rank)
    ray.get(worker.pid.remote())
    return worker


def ends(worker: Any) -> bool:
    try:
        ray.get(worker.pid.remote())
    except ray.exceptions.RayActorError:
        return True
    return False


@pytest.fixture
def mailbox(ray_here: None) -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    ray.kill(mailbox.actor)


def test_an_order_reaches_who_listens_and_who_comes_later(mailbox: Mailbox) -> None:
    first = start_worker(mailbox, 0)
    wait_until(lambda: len(mailbox.members()) == 1, "the worker to be a member")
    assert not ray.get(first.has_heard.remote())
    mailbox.post("stop")
    second = start_worker(mailbox, 1)
    for worker in (first, second):
        wait_until(lambda worker=worker: ray.get(worker.has_heard.remote()), "the order to arrive")
    assert [member.rank for member in mailbox.members()] == [0, 1]
    assert {m.node_id for m in mailbox.members()} == {ray.get_runtime_context().get_node_id()}
    for worker in (first, second):
        ray.kill(worker)


def test_what_was_posted_before_is_not_for_the_next_group(mailbox: Mailbox) -> None:
    mailbox.post("stop")
    mailbox.clear()
    assert mailbox.members() == []
    worker = start_worker(mailbox, 0)
    wait_until(lambda: len(mailbox.members()) == 1, "the worker to be a member")
    time.sleep(0.3)
    assert not ray.get(worker.has_heard.remote())
    ray.kill(worker)


def test_a_process_that_is_abandoned_ends(mailbox: Mailbox) -> None:
    worker = start_worker(mailbox, 0)
    mailbox.post("abandon")
    wait_until(lambda: ends(worker), "the abandoned process to end")


def test_a_process_whose_mailbox_is_lost_ends(ray_here: None) -> None:
    mailbox = Mailbox()
    worker = start_worker(mailbox, 0)
    wait_until(lambda: len(mailbox.members()) == 1, "the worker to be a member")
    ray.kill(mailbox.actor)
    wait_until(lambda: ends(worker), "the abandoned process to end")
