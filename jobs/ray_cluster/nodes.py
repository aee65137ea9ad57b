"""The nodes of the Ray cluster: their resources, and which are reachable."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray

# Private APIs, as no public one gives this: `ray.available_resources()` sums over the nodes; the
# state API (`ray.util.state`) needs a dashboard, and knows neither a node's free resources, nor
# which nodes drain, nor whether the creator of a placement group is alive.
from ray._private.state import available_resources_per_node
from ray._private.state import state as _cluster_state
from ray.autoscaler.sdk import request_resources
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

_ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Node:
    """A node that Ray counts as alive."""

    id: str
    address: str
    port: int
    """Port of its raylet."""
    total: Mapping[str, float]
    """All its resources."""
    free: Mapping[str, float]
    """Its resources that are not reserved."""
    draining: bool
    """Whether it drains: its removal has been announced."""

    def fits(self, wanted: Mapping[str, float]) -> int:
        """How many workers that need `wanted` each could start on it."""
        return min(int(self.free.get(name, 0.0) // each) for name, each in wanted.items() if each)


def count_workers(wanted: Mapping[str, float]) -> int:
    """How many workers that need `wanted` each the living nodes have room for once all their
    resources are free. A worker runs on one node: parts of several are no room for it."""
    return sum(workers_by_node(wanted))


def workers_by_node(wanted: Mapping[str, float]) -> list[int]:
    """For each living node the part of `count_workers`."""
    return [
        min(int(node["Resources"].get(name, 0.0) // each) for name, each in wanted.items())
        for node in ray.nodes()
        if node["Alive"]
    ]


def list_nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
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
    """Nodes that have room for a worker, do not drain, and are reachable."""
    candidates = [node for node in list_nodes() if not node.draining and node.fits(wanted)]
    unreachable = unreachable_addresses(candidates)
    return [node for node in candidates if node.address not in unreachable]


def request_workers(wanted: Mapping[str, float], num_workers: int) -> None:
    """Ask the autoscaler, if the cluster has one, for room for `num_workers` in all; 0 withdraws
    the request. Ray Train replaces it by its own when it starts."""
    request_resources(bundles=[dict(wanted)] * num_workers)


def release_placement_groups() -> None:
    """Remove the placement groups that ended attempts of this job have left.

    Ray Train removes a placement group when it shuts its workers down. But where the ranks did not
    find each other it only ends the processes, and no later attempt would have room.
    """
    job_id = ray.get_runtime_context().get_job_id()
    for record in _cluster_state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        is_removed = group.state == gcs_pb2.PlacementGroupTableData.REMOVED
        if group.creator_job_id.hex() == job_id and group.creator_actor_dead and not is_removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def unreachable_addresses(nodes: Sequence[Node]) -> set[str]:
    """Addresses of the nodes that accept no connection.

    Ray's health checks notice a lost node after 15 to 60 s; connecting to its port tells at once.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        reachable = pool.map(_is_reachable, nodes)
        return {node.address for node, answers in zip(nodes, reachable, strict=True) if not answers}


def _is_reachable(node: Node) -> bool:
    try:
        socket.create_connection((node.address, node.port), timeout=_ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True
