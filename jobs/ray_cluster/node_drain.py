"""A node that will be taken away says so, and gives its training workers time to leave.

    python -m jobs.ray_cluster.node_drain --grace-s 50

On the node itself, before its Ray is ended: Kubernetes runs it so (the preStop hook of
`k8s/components/spot`). The driver sees within seconds that the node drains, has a checkpoint
written and goes on elsewhere; this ends when the workers have, or when the time is over. Needs
what every Ray client of the cluster needs: RAY_AUTH_MODE and RAY_AUTH_TOKEN where it has a token.
"""

from __future__ import annotations

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

from jobs.terminal.entry_point import say

_WORKER = "ray::RayTrainWorker"
"""How Ray titles the processes that train."""


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


def announce(raylet: Raylet, grace_s: float) -> None:
    """Tell the cluster that the node will be gone in so many seconds. Raises ray's RpcError."""
    # Private; the command `ray drain-node` is hidden too, and promises no more.
    client = ray._raylet.GcsClient(address=raylet.gcs_address)
    deadline_ms = int((time.time() + grace_s) * 1000)
    accepted, refusal = client.drain_node(
        raylet.node_id, DRAIN_NODE_REASON_PREEMPTION, "the node will be taken away", deadline_ms
    )
    if not accepted:
        say(f"departure: the cluster does not let the node go: {refusal}")


def wait_for_workers(grace_s: float) -> bool:
    """Whether the training workers of this machine have ended within so many seconds."""
    deadline_s = time.monotonic() + grace_s
    while any(line.startswith(_WORKER) for line in _command_lines()):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


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
    raylets = list_raylets()
    if not raylets:
        say("departure: no Ray on this machine")
    for raylet in raylets:
        try:
            announce(raylet, grace_s)
        except Exception as error:  # the head is gone too, or refuses the token
            say(f"departure: {raylet.gcs_address}: {type(error).__name__}: {error}")
            return 0
    if not wait_for_workers(grace_s - (time.monotonic() - started_s)):
        say(f"departure: workers still train after {grace_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
