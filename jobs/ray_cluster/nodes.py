"""Which of the cluster's nodes can take workers now, and what runs on the driver's."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

# Private, for nothing public tells it: `ray.available_resources()` adds the nodes up; the state API
# (`ray.util.state`) needs a dashboard, and knows neither what is free on a node, nor which nodes
# drain, nor whether the creator of a placement group is alive.
from ray._private.state import available_resources_per_node
from ray._private.state import state as _cluster_state
from ray.autoscaler.sdk import request_resources
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Node:
    """One that Ray counts as alive."""

    id: str
    address: str
    port: int
    """Where its raylet listens."""
    total: Mapping[str, float]
    """Resources that it has."""
    free: Mapping[str, float]
    """Resources that nobody has reserved."""
    draining: bool
    """Whether it has been announced that it will be taken away."""

    def fits(self, wanted: Mapping[str, float]) -> int:
        """How many workers of these resources could start on it."""
        return min(int(self.free.get(name, 0.0) // each) for name, each in wanted.items() if each)


def start_local_actor(kind: type) -> Any:
    """An actor of this class on this process's node, whose loss ends the job anyway. It reserves
    nothing."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(kind).options(scheduling_strategy=here).remote()


def list_nodes() -> list[Node]:
    """The nodes of the cluster that the process is connected to."""
    free = available_resources_per_node()
    draining: Mapping[str, int] = _cluster_state.get_draining_nodes()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def usable_nodes(wanted: Mapping[str, float]) -> list[Node]:
    """Nodes that have room for a worker, will stay, and answer."""
    candidates = [node for node in list_nodes() if not node.draining and node.fits(wanted)]
    silent = unreachable_addresses(candidates)
    return [node for node in candidates if node.address not in silent]


def request_workers(wanted: Mapping[str, float], num_workers: int) -> None:
    """Ask an autoscaler, if the cluster has one, for room for so many workers in all; 0 takes the
    request back. A training that starts replaces it by its own."""
    request_resources(bundles=[dict(wanted)] * num_workers)


def release_placement_groups() -> None:
    """Give back what attempts of this job that have ended still reserve.

    Ray Train gives the resources of its workers back when it shuts them down. Of ranks that did not
    find each other it only ends the processes, and no later attempt would have room.
    """
    job_id = ray.get_runtime_context().get_job_id()
    for record in _cluster_state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        is_removed = group.state == gcs_pb2.PlacementGroupTableData.REMOVED
        if group.creator_job_id.hex() == job_id and group.creator_actor_dead and not is_removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def unreachable_addresses(nodes: Sequence[Node]) -> set[str]:
    """Addresses of the nodes that take no connection.

    Ray learns that a node is gone from its health checks, 15 to 60 s later; its port tells at once.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(_answers, nodes)
        return {node.address for node, answer in zip(nodes, answers, strict=True) if not answer}


def _answers(node: Node) -> bool:
    try:
        socket.create_connection((node.address, node.port), timeout=_ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True
