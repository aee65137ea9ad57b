"""Fault tolerance and elasticity: a training run continues when workers are lost, leave or join.

Each attempt is a Ray Train run of a fixed number of workers that resumes from the newest
checkpoint. It ends in one of three ways: the training is done; something failed; or the workers
were told to stop and wrote a checkpoint, because a node drains, there is room for more workers, or
the job was interrupted. The next attempt uses the nodes that are reachable then.

Ray Train can do part of this within one attempt (FailureConfig, elastic ScalingConfig), but with a
list of nodes that is up to 80 s old; this module connects to each node, which takes a moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import ray
import ray.exceptions
from ray.train import TrainingFailedError

from jobs.ray_cluster.nodes import (
    Node,
    list_nodes,
    release_placement_groups,
    request_workers,
    unreachable_addresses,
    usable_nodes,
)
from jobs.terminal.entry_point import find_cause, summarise_error
from jobs.training.messages import Worker, WorkerChannel
from pneumo import storage
from pneumo.config import ClusterConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import ClusterError, ContentError, PneumoError, StorageError
from pneumo.training.checkpoints import CheckpointIndex, find_index

STOPPED = "stopped"
"""Returned by an attempt that was told to stop and has written its checkpoint."""

_WATCH_INTERVAL_S = 2.0
_UNREACHABLE_S = 15.0
"""A node that accepts no connection for this long counts as lost; shorter breaks are ignored."""
_EXTRA_WAIT_S = 5.0
"""How long to wait for more workers: after a loss Ray frees their resources one by one."""
_REMIND_INTERVAL_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
"""Between retries while storage is unavailable."""

Attempt = Callable[[int, Sequence[Node]], object]
"""Trains with that many workers on these nodes; returns STOPPED, or anything else when done."""


@dataclass(frozen=True)
class Restart:
    """Why another attempt is needed."""

    reason: str
    """What happened, in a few words."""
    expected_workers: int
    """Workers that should fit once Ray has freed the resources of the last attempt."""


def read_run_index(store_url: str, run_url: str) -> CheckpointIndex | None:
    """The run's checkpoint index, or None where nothing has been trained. Reads the manifest first,
    so that both store and run are known to be available; raises StorageError where one is not."""
    read_manifest(store_url)
    return find_index(run_url)


@dataclass(eq=False)
class Recovery:
    """Starts attempts until the run is done."""

    cluster: ClusterConfig
    wanted: Mapping[str, float]
    """Resources that one worker reserves."""
    store_url: str
    run_url: str
    channel: WorkerChannel
    attempt: Attempt
    tell: Callable[[str], None]
    """Shows one line to the user."""
    read_index: Callable[[str, str], CheckpointIndex | None] = read_run_index
    stopping: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    reminded_s: float = 0.0
    """When the current wait was last shown to the user; 0: never."""

    def run(self, nodes: Sequence[Node]) -> bool:
        """Train, in the first attempt on `nodes`. Returns whether everything that was trained is in
        a checkpoint; an interrupted run may not have had the time to write one.

        Raises the error of the last attempt where another attempt would not help.
        """
        size = self._size(nodes)
        if size < self.cluster.num_workers:
            self.tell(f"starting with {_workers(size)} of {self.cluster.num_workers}")
        while True:
            self.channel.reset()
            if self.stopping.is_set():  # checked after the reset, so that no stop() is lost
                return True
            restart = self._train(size, nodes)
            if restart is None or self.stopping.is_set():
                return restart is None
            index = self._await_storage(restart)
            # A worker may be lost after the last checkpoint was written and before Ray noticed that
            # it had ended; then there is nothing left to train.
            if self.stopping.is_set() or (index is not None and index.finished):
                return True
            nodes = self._wait_for_nodes(restart)
            if self.stopping.is_set():
                return True
            size = self._size(nodes)
            position = describe_position(index)
            self.tell(f"{restart.reason}: resuming with {_workers(size)} {position}")

    def _size(self, nodes: Sequence[Node]) -> int:
        return min(count_fitting(nodes, self.wanted), self.cluster.num_workers)

    def stop(self) -> None:
        """Make the current attempt write a checkpoint and return; no other follows."""
        self.stopping.set()
        self.channel.broadcast("stop")

    def _train(self, size: int, nodes: Sequence[Node]) -> Restart | None:
        """Run one attempt. Returns why another is needed; None when the training is done, or was
        interrupted and has written a checkpoint."""
        with self._monitoring(size) as monitor:
            try:
                outcome = self.attempt(size, nodes)
            # Ray Train's controller uses the run's folder too, and dies without its storage.
            except (TrainingFailedError, ray.exceptions.RayActorError, StorageError) as error:
                if self.stopping.is_set():
                    return Restart("stopped", 0)
                return Restart(self._describe_retryable(error), len(self._surviving_workers()))
        if outcome != STOPPED or self.stopping.is_set():
            return None
        return monitor.restart or Restart("told to stop", size)

    def _describe_retryable(self, error: Exception) -> str:
        """What happened, in a few words; raises `error` where it would only happen again."""
        cause = find_cause(error)
        if cause is not None and not self._is_transient(cause):
            raise error
        self.failures += 1
        if 0 <= self.cluster.max_failures < self.failures:
            raise error
        limit = "" if self.cluster.max_failures < 0 else f" of {self.cluster.max_failures}"
        what = str(cause) if cause else describe_failure(error, self.channel.workers())
        return f"{what}, failure {self.failures}{limit}"

    def _is_transient(self, cause: PneumoError) -> bool:
        """Whether it may pass by itself: an unavailable object store may, but neither a full disk
        nor data that differs from the manifest."""
        is_remote = not all(storage.is_local(url) for url in (self.store_url, self.run_url))
        return is_remote and isinstance(cause, StorageError) and not isinstance(cause, ContentError)

    def _await_storage(self, restart: Restart) -> CheckpointIndex | None:
        """Wait until run and store are available; the run's index, or None when interrupted."""
        pause_s, self.reminded_s = _FIRST_PAUSE_S, 0.0
        while not self.stopping.is_set():
            try:
                return self.read_index(self.store_url, self.run_url)
            except StorageError as error:
                if not self._is_transient(error):
                    raise
                self._remind(f"{restart.reason}: waiting for storage: {error}")
            self.stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return None

    def _remind(self, line: str) -> bool:
        """Tell the user of a wait, at most once a minute; whether the user was told now."""
        is_due = not self.reminded_s or time.monotonic() > self.reminded_s + _REMIND_INTERVAL_S
        if is_due:
            self.reminded_s = time.monotonic()
            self.tell(line)
        return is_due

    def _surviving_workers(self) -> list[Worker]:
        """Workers of the last attempt whose nodes are reachable."""
        workers = self.channel.workers()
        lost = find_lost(workers)
        return [worker for worker in workers if worker not in lost]

    def _wait_for_nodes(self, restart: Restart) -> Sequence[Node]:
        """Nodes for as many workers as possible.

        Waits without limit for the minimum, and a few seconds more for what `restart` expects.
        """
        started_s, self.reminded_s = time.monotonic(), 0.0
        fewest = self.cluster.fewest_workers
        while not self.stopping.is_set():
            release_placement_groups()
            nodes = usable_nodes(self.wanted)
            fits, waited_s = count_fitting(nodes, self.wanted), time.monotonic() - started_s
            if fits >= fewest and (fits >= restart.expected_workers or waited_s > _EXTRA_WAIT_S):
                return nodes
            lack = f"waiting for {_workers(fewest)}, and the nodes have room for {fits}"
            if (
                waited_s > _EXTRA_WAIT_S
                and fits < fewest
                and self._remind(f"{restart.reason}: {lack}")
            ):
                request_workers(self.wanted, self.cluster.num_workers)
            self.stopping.wait(0.3)
        request_workers(self.wanted, 0)
        return ()

    @contextmanager
    def _monitoring(self, size: int) -> Iterator[_NodeMonitor]:
        """Check the nodes every few seconds while an attempt runs."""
        monitor, ended = _NodeMonitor(self, size), threading.Event()

        def watch() -> None:
            while not ended.wait(_WATCH_INTERVAL_S):
                # The next check may succeed.
                with suppress(ray.exceptions.RayError, OSError):
                    monitor.check()

        watcher = threading.Thread(target=watch, name="watch", daemon=True)
        watcher.start()
        try:
            yield monitor
        finally:
            ended.set()
            watcher.join(timeout=10)


class _NodeMonitor:
    """Notices that nodes become unreachable, drain or join, and tells the workers to stop."""

    def __init__(self, recovery: Recovery, size: int) -> None:
        self.recovery, self.size = recovery, size
        self.unreachable_since_s: dict[str, float] = {}
        self.had_room = False
        self.restart: Restart | None = None
        """Why the workers are to stop."""

    def check(self) -> None:
        """Check once, and tell the workers to stop where that is needed."""
        node_ids = {worker.node_id for worker in self.recovery.channel.workers()}
        if not node_ids:
            return
        nodes = [node for node in list_nodes() if node.id in node_ids]
        if self._has_unreachable_node(nodes):
            self.recovery.channel.broadcast("abandon")
            return
        if self.restart is None:
            self.restart = self._find_draining(nodes) or self._find_capacity()
        if self.restart is not None:  # repeated at each check: a broadcast may fail half-way
            self.recovery.channel.broadcast("stop")

    def _has_unreachable_node(self, nodes: Sequence[Node]) -> bool:
        now_s, before = time.monotonic(), self.unreachable_since_s
        self.unreachable_since_s = {a: before.get(a, now_s) for a in unreachable_addresses(nodes)}
        return any(
            now_s - since_s >= _UNREACHABLE_S for since_s in self.unreachable_since_s.values()
        )

    def _find_draining(self, nodes: Sequence[Node]) -> Restart | None:
        draining = {node.id: node.address for node in nodes if node.draining}
        if not draining:
            return None
        remaining = [w for w in self.recovery.channel.workers() if w.node_id not in draining]
        return Restart(f"node {', '.join(draining.values())} is draining", len(remaining))

    def _find_capacity(self) -> Restart | None:
        """A restart with more workers, if this check and the last one found room for more."""
        most = self.recovery.cluster.num_workers
        if self.size >= most:
            return None
        wanted = self.recovery.wanted
        room = count_fitting(usable_nodes(wanted), wanted)
        had_room, self.had_room = self.had_room, room > 0
        if not (room and had_room):
            return None
        size = min(self.size + room, most)
        return Restart(f"there is room for {_workers(size)}", size)


def count_fitting(nodes: Sequence[Node], wanted: Mapping[str, float]) -> int:
    """How many workers could start on the nodes."""
    return sum(node.fits(wanted) for node in nodes)


def wait_for_workers(
    cluster: ClusterConfig, wanted: Mapping[str, float], *, timeout_s: float
) -> Sequence[Node]:
    """Nodes with room for `cluster.num_workers` workers; after a few seconds also for fewer, but at
    least `cluster.fewest_workers`.

    Raises ClusterError after `timeout_s`; it gives the resources requested and available.
    """
    started_s = time.monotonic()
    fewest, most = cluster.fewest_workers, cluster.num_workers
    request_workers(wanted, most)
    with ExitStack() as failing:
        failing.callback(request_workers, wanted, 0)
        while True:
            nodes = usable_nodes(wanted)
            fits, waited_s = count_fitting(nodes, wanted), time.monotonic() - started_s
            if fits >= most or (fits >= fewest and waited_s >= min(_EXTRA_WAIT_S, timeout_s)):
                failing.pop_all()  # Ray Train will replace the request by its own
                return nodes
            if waited_s >= timeout_s:
                raise ClusterError(_describe_lack(fewest, wanted, waited_s))
            time.sleep(0.3)


def _describe_lack(num_workers: int, wanted: Mapping[str, float], waited_s: float) -> str:
    nodes = list_nodes()

    def describe(name: str, each: float) -> str:
        total = sum(node.total.get(name, 0.0) for node in nodes)
        free = sum(node.free.get(name, 0.0) for node in nodes)
        return f"{each * num_workers:g} {name} (it has {total:g}, {free:g} free)"

    needs = ", ".join(describe(name, each) for name, each in wanted.items())
    return (
        f"cluster: {_workers(num_workers)} need {needs}; waited {waited_s:.0f} s; lower "
        "--cluster.num-workers, give --cluster.min-workers, or add nodes"
    )


def find_lost(workers: Sequence[Worker]) -> list[Worker]:
    """Workers whose nodes are dead or unreachable."""
    alive = {node.id: node for node in list_nodes()}
    unreachable = unreachable_addresses([alive[w.node_id] for w in workers if w.node_id in alive])
    return [w for w in workers if w.node_id not in alive or w.address in unreachable]


def describe_position(index: CheckpointIndex | None) -> str:
    """Where a run resumes."""
    if index is None:
        return "from the start"
    step = f" step {index.latest.step}" if index.latest.step else ""
    return f"after epoch {index.latest.epoch}{step}"


def describe_failure(error: Exception, workers: Sequence[Worker]) -> str:
    """Why an attempt failed, in a few words."""
    lost = sorted({worker.address for worker in find_lost(workers)})
    if lost:
        return f"worker lost (node {', '.join(lost)} does not answer)"
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    address = {worker.rank: worker.address for worker in workers}
    for rank, failure in failures.items():
        inner = getattr(failure, "health_check_failure", failure)
        if isinstance(inner, ray.exceptions.RayActorError):
            return f"worker lost (its process on node {address.get(rank, '?')} ended)"
    first: BaseException = next(iter(failures.values()), error)
    inner = getattr(first, "controller_failure", getattr(first, "cause", None)) or first
    text = summarise_error(inner)
    if "onnection closed by peer" in text or "onnection reset by peer" in text:
        return "worker lost (it closed its connection to the others)"
    begun = "workers failed" if workers else "workers did not start"
    return f"{begun} ({type(inner).__name__}: {text[:300]})"


def _workers(number: int) -> str:
    return f"{number} worker" if number == 1 else f"{number} workers"
