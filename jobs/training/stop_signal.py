"""How the driver tells workers to stop: a notice board on the driver's node that they listen to.

Listening is one pending call a worker; steps cost nothing.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from typing import Literal

import ray
import ray.exceptions

from jobs.ray_cluster.nodes import start_here

Order = Literal["stop", "abandon"]
"""stop: write a checkpoint and return. abandon: end the process, as its peers are out of reach."""
_LISTEN_AGAIN_S = 1.0


@dataclass(frozen=True)
class Worker:
    """A worker that listens."""

    rank: int
    node_id: str
    address: str


class _Board:
    """The actor behind `Board`."""

    def __init__(self) -> None:
        self.members: dict[int, Worker] = {}
        self.order: Order = "stop"
        self.posted = asyncio.Event()

    async def listen(self, member: Worker) -> Order:
        self.members[member.rank] = member
        await self.posted.wait()
        return self.order

    async def post(self, order: Order) -> None:
        self.order = order
        self.posted.set()

    async def clear(self) -> None:
        self.members = {}
        self.posted = asyncio.Event()  # who waits for the old one is of a group that has ended

    async def list_members(self) -> list[Worker]:
        return list(self.members.values())


class Board:
    """A handle that can be sent to workers."""

    def __init__(self) -> None:
        self.actor = start_here(_Board)

    def post(self, order: Order) -> None:
        """Every worker that listens hears it; so does one that begins to, until `clear`."""
        ray.get(self.actor.post.remote(order))

    def clear(self) -> None:
        """Forget the order and the members, before a new group of workers starts."""
        ray.get(self.actor.clear.remote())

    def members(self) -> list[Worker]:
        """The workers that have begun to listen since `clear`."""
        members: list[Worker] = ray.get(self.actor.list_members.remote())
        return members

    def _await_order(self, member: Worker) -> Order:
        while True:
            try:
                order: Order = ray.get(self.actor.listen.remote(member))
            except ray.exceptions.ActorUnavailableError:  # a short break of the network
                time.sleep(_LISTEN_AGAIN_S)
            # The driver is gone or thinks so of this process: another attempt may have begun.
            except ray.exceptions.RayError:
                return "abandon"
            else:
                return order

    def listen(self, rank: int) -> threading.Event:
        """In a worker: an event that is set when it should stop. The process ends when it should
        not go on, or when the board is lost: nobody could tell it any more."""
        member = Worker(
            rank, ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        )
        heard = threading.Event()

        def wait() -> None:
            if self._await_order(member) == "abandon":
                os._exit(1)
            heard.set()

        threading.Thread(target=wait, name="notice-board", daemon=True).start()
        return heard
