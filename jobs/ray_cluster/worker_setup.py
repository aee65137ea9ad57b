"""The setup hook that Ray calls first in every worker process of a job."""

import os
from typing import Any

import psutil
import ray
import ray.util


def configure_worker() -> None:
    """Tell Ray's State API this worker's cluster, and gloo and NCCL its network interface.

    Otherwise the State API searches the machine for a cluster, and gives up where it finds two. Ray
    Train's cleaner asks it whether a run has ended: without an answer the resources of a stopped
    trial are never released, and the next trial waits for ever.

    Otherwise gloo and NCCL resolve the host's name, which on many machines (Debian, most containers
    without DNS) gives the loopback address: ranks on two nodes then never find each other.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    interface = find_interface(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def find_interface(address: str) -> str | None:
    """The network interface that has the IP address, or None."""
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(each.address.split("%")[0] == address for each in addresses):
            return name
    return None
