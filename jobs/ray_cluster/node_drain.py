"""Drain this Ray node before it is removed, and wait until its tasks and actors have ended.

    python -m jobs.ray_cluster.node_drain --grace-s 50

Run it on the node itself, before Ray is stopped there; on Kubernetes the preStop hook of the worker
pods does. The driver notices the drain within seconds, has a checkpoint written and continues on
other nodes. The command returns when tasks and actors have ended, or after the grace period. It
needs what every Ray client needs: RAY_AUTH_MODE and RAY_AUTH_TOKEN where the cluster has a token.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from jobs.terminal.entry_point import tell

_WORK = re.compile(r"ray::(?!IDLE)(?!\w*(Agent|Autoscaling))\w")
"""Process titles of Ray workers that run a task or an actor; not idle ones, nor Ray's own."""


@dataclass(frozen=True)
class Raylet:
    """A raylet: the process of a Ray node."""

    node_id: str
    gcs_address: str


def list_raylets() -> list[Raylet]:
    """The raylets on this machine: one in a pod or a container."""
    raylets = []
    for line in _command_lines(psutil.process_iter()):
        node_id = re.search(r"--node_id=(\w+)", line)
        address = re.search(r"--gcs-address=([\w.:\[\]-]+)", line)
        if "raylet/raylet " in line and node_id and address:
            raylets.append(Raylet(node_id[1], address[1]))
    return raylets


def drain_node(raylet: Raylet, grace_s: float) -> None:
    """Tell the cluster that the node will be gone in `grace_s`. Raises Ray's RpcError."""
    # A private API; the hidden command `ray drain-node` is no more stable.
    client = ray._raylet.GcsClient(address=raylet.gcs_address)
    deadline_ms = int((time.time() + grace_s) * 1000)
    accepted, refusal = client.drain_node(
        raylet.node_id, DRAIN_NODE_REASON_PREEMPTION, "the node will be taken away", deadline_ms
    )
    if not accepted:
        tell(f"drain: the cluster refused to drain the node: {refusal}")


def wait_for_work(
    grace_s: float, list_processes: Callable[[], Iterable[psutil.Process]] = psutil.process_iter
) -> bool:
    """Wait for the tasks and actors on this machine; whether they have ended within `grace_s`."""
    deadline_s = time.monotonic() + grace_s
    while _has_work(list_processes()):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def is_work(command_line: str) -> bool:
    """Whether a process with this title runs a task or an actor."""
    return _WORK.match(command_line) is not None


def _has_work(processes: Iterable[psutil.Process]) -> bool:
    return any(map(is_work, _command_lines(processes)))


def _command_lines(processes: Iterable[psutil.Process]) -> Iterator[str]:
    for process in processes:
        with suppress(psutil.Error):
            yield " ".join(process.cmdline())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 whatever fails, so that the node can always be removed."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ray_cluster.node_drain", description=__doc__
    )
    parser.add_argument("--grace-s", type=float, required=True, help="until the node is gone")
    grace_s = parser.parse_args(argv).grace_s
    started_s = time.monotonic()
    if not _has_work(psutil.process_iter()):
        return 0  # nothing to save; the head may be gone already
    raylets = list_raylets()
    if not raylets:
        tell("drain: no Ray on this machine")
    for raylet in raylets:
        try:
            drain_node(raylet, grace_s)
        except Exception as error:  # the head is gone too, or refuses the token
            tell(f"drain: {raylet.gcs_address}: {type(error).__name__}: {error}")
            return 0
    if not wait_for_work(grace_s - (time.monotonic() - started_s)):
        tell(f"drain: tasks or actors still run after {grace_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
