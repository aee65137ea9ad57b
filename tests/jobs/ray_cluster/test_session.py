"""What a job waits for before it begins."""

import os
from pathlib import Path

import pytest
import ray

from jobs.ray_cluster.session import count_cpus, wait_for_resources
from pneumo.config import ClusterConfig
from pneumo.errors import ClusterError


@pytest.mark.parametrize(
    ("allowed", "limit", "count"),
    [(64, "max 100000", 64), (64, "400000 100000", 4), (8, None, 8), (64, "150000 100000", 2)],
)
def test_a_local_cluster_has_the_cpus_that_the_process_may_use(
    allowed: int,
    limit: str | None,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a machine of more: docker --cpus 4, or a part of a node of Slurm."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert count_cpus(tmp_path / "cpu.max") == count


def test_parts_of_several_nodes_are_no_room_for_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of 2 CPUs have 4 together, but a task that needs 4 would wait for ever."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, node, {**node, "Alive": False}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    large = ClusterConfig(cpus_per_worker=4, start_timeout_s=0.1)
    with pytest.raises(ClusterError) as raised:
        wait_for_resources(large, 1)
    assert str(raised.value) == (
        "cluster: 1 worker needs 4 CPU (it has 4), and its nodes have room for 0; lower "
        "--cluster.cpus-per-worker or add nodes"
    )
    with_gpu = ClusterConfig(use_gpu=True, start_timeout_s=0.1)
    with pytest.raises(ClusterError, match=r"1 GPU \(it has 0\).*; set --cluster.use-gpu false or"):
        wait_for_resources(with_gpu, 1)
    small = ClusterConfig(cpus_per_worker=2, start_timeout_s=0.1)
    wait_for_resources(small, 2)
    with pytest.raises(ClusterError, match=r"3 workers need 6 CPU \(it has 4\).* room for 2"):
        wait_for_resources(small, 3)
