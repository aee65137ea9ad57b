"""Messages from workers to the driver, and its commands to them, by an actor on the driver's node.

A worker listens by a pending actor call for each command, which cost training steps nothing.
"""

import asyncio
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Command = Literal["stop", "abandon"]
"""stop: write a checkpoint and return. abandon: exit at once, as other ranks are unreachable."""
_RETRY_INTERVAL_S = 1.0
_MAX_CALLS = 100_000
"""Pending calls of the actor; each worker has two. Ray's 1,000 would block it at 500 workers."""


@dataclass(frozen=True)
class Worker:
    """A worker that listens for commands."""

    rank: int
    node_id: str
    address: str


class _ChannelActor:
    """The actor behind `WorkerChannel`. It keeps messages pickled, so that its process need not
    import their classes, and with them torch."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.arrived = asyncio.Event()
        self.listening: dict[int, Worker] = {}
        self.commanded = _new_events()

    async def put(self, message: bytes) -> None:
        self.messages.append(message)
        self.arrived.set()

    async def take(self, timeout_s: float) -> list[bytes]:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.arrived.wait(), timeout_s)
        self.arrived.clear()
        taken, self.messages = self.messages, []
        return taken

    async def listen(self, worker: Worker, command: Command) -> None:
        self.listening[worker.rank] = worker
        await self.commanded[command].wait()

    async def broadcast(self, command: Command) -> None:
        self.commanded[command].set()

    async def reset(self) -> None:
        for event in self.commanded.values():  # else the calls of workers that ended stay for ever
            event.set()
        self.listening = {}
        self.commanded = _new_events()

    async def list_workers(self) -> list[Worker]:
        return list(self.listening.values())


def _new_events() -> dict[Command, asyncio.Event]:
    return {"stop": asyncio.Event(), "abandon": asyncio.Event()}


class WorkerChannel:
    """A handle that can be sent to workers; its methods raise RayError when the actor is lost.

    Ray's own Queue raises an exception when it is empty, which takes 10 to 50 ms of CPU: polled
    three times a second, it took up to 16 % of a core from the training beside it.
    """

    def __init__(self) -> None:
        # On this node, without which the job ends anyway; it reserves nothing.
        node_id = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_concurrency": _MAX_CALLS, "scheduling_strategy": strategy}
        self.actor = ray.remote(**options)(_ChannelActor).remote()

    def put(self, message: Any) -> None:
        """Send a message to the driver; returns once the actor has it, perhaps twice where the
        network was interrupted."""
        data = pickle.dumps(message)
        _repeat(lambda: self.actor.put.remote(data))

    def take(self, timeout_s: float) -> list[Any]:
        """New messages, oldest first, as soon as there is one; empty after the timeout."""
        return [pickle.loads(message) for message in ray.get(self.actor.take.remote(timeout_s))]

    def broadcast(self, command: Command) -> None:
        """Send a command to every worker that listens now or begins to before `reset`."""
        ray.get(self.actor.broadcast.remote(command))

    def reset(self) -> None:
        """Forget the command and the workers, before a new group of workers starts. A worker of
        the old group that still runs exits."""
        ray.get(self.actor.reset.remote())

    def workers(self) -> list[Worker]:
        """The workers that have begun to listen since `reset`."""
        workers: list[Worker] = ray.get(self.actor.list_workers.remote())
        return workers

    def close(self) -> None:
        """Kill the actor: its messages are lost, and workers that still listen exit."""
        ray.kill(self.actor)

    def listen(self, rank: int) -> threading.Event:
        """In a worker: an event that is set on the command "stop". The process exits on "abandon",
        also after "stop", and when the channel is lost, as no command could reach it any more."""
        context = ray.get_runtime_context()
        worker = Worker(rank, context.get_node_id(), ray.util.get_node_ip_address())
        stopped = threading.Event()

        def wait(command: Command, obey: Callable[[], None]) -> None:
            self._await_command(worker, command)
            obey()

        commands: dict[Command, Callable[[], None]]
        commands = {"stop": stopped.set, "abandon": partial(os._exit, 1)}
        for each in commands.items():
            threading.Thread(target=wait, args=each, name="commands", daemon=True).start()
        return stopped

    def _await_command(self, worker: Worker, command: Command) -> None:
        try:
            _repeat(lambda: self.actor.listen.remote(worker, command))
        # The driver has ended, or counts this process as lost: another attempt may run.
        except ray.exceptions.RayError:
            os._exit(1)


def _repeat(call: Callable[[], Any]) -> None:
    """Wait for a call of the actor, again while the network is interrupted."""
    while True:
        try:
            ray.get(call())
        except ray.exceptions.ActorUnavailableError:
            time.sleep(_RETRY_INTERVAL_S)
        else:
            return
