"""A node that will be taken away says so, and gives the work on it time to end.

    python -m jobs.ray_cluster.node_drain --grace-s 50

On the node itself, before its Ray is ended: Kubernetes runs it so (the preStop hook of the worker
pods). The driver sees within seconds that the node drains, has a checkpoint written and goes on
elsewhere; this ends when tasks and actors have, or when the time is over. Needs
what every Ray client of the cluster needs: RAY_AUTH_MODE and RAY_AUTH_TOKEN where it has a token.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from jobs.terminal.entry_point import tell

_WORK = re.compile(r"ray::(?!IDLE)(?!\w*(Agent|Autoscaling))\w")
"""How Ray titles processes that run tasks and actors, and neither wait nor are Ray's own."""


@dataclass(frozen=True)
class Raylet:
    """Ray's process on this machine."""

    node_id: str
    gcs_address: str


def list_raylets() -> list[Raylet]:
    """Those of this machine: in a pod or a container one."""
    raylets = []
    for line in _command_lines():
        node_id = re.search(r"--node_id=(\w+)", line)
        address = re.search(r"--gcs-address=([\w.:\[\]-]+)", line)
        if "raylet/raylet " in line and node_id and address:
            raylets.append(Raylet(node_id[1], address[1]))
    return raylets


def drain_node(raylet: Raylet, grace_s: float) -> None:
    """Tell the cluster that the node will be gone in so many seconds. Raises ray's RpcError."""
    # Private; the command `ray drain-node` is hidden too, and promises no more.
    client = ray._raylet.GcsClient(address=raylet.gcs_address)
    deadline_ms = int((time.time() + grace_s) * 1000)
    accepted, refusal = client.drain_node(
        raylet.node_id, DRAIN_NODE_REASON_PREEMPTION, "the node will be taken away", deadline_ms
    )
    if not accepted:
        tell(f"drain: the cluster does not let the node go: {refusal}")


def wait_for_work(grace_s: float) -> bool:
    """Whether the tasks and actors of this machine have ended within so many seconds."""
    deadline_s = time.monotonic() + grace_s
    while _has_work():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def is_work(command_line: str) -> bool:
    """Whether a process runs a task or an actor, by its title."""
    return _WORK.match(command_line) is not None


def _has_work() -> bool:
    return any(map(is_work, _command_lines()))


def _command_lines() -> Iterator[str]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield " ".join(process.cmdline())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; always 0: nothing that fails here may keep the node from going."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.ray_cluster.node_drain", description=__doc__
    )
    parser.add_argument("--grace-s", type=float, required=True, help="until the node is gone")
    grace_s = parser.parse_args(argv).grace_s
    started_s = time.monotonic()
    if not _has_work():
        return 0  # nothing to save; a run that has ended, and its head, may be gone already
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
        tell(f"drain: work goes on after {grace_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
