"""The GPU overlays on a real scheduler: a node has the labels, taints and GPUs of a cloud's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import s3fs

from cluster.kuberay.jobs import KubernetesTarget
from cluster.kuberay.overlays import OVERLAYS
from cluster.submission import plan
from tests.kubernetes.cluster import SMALL, Document, KubeCluster, Team
from tests.kubernetes.probes import follow, make_probe, write_overlay

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(600)]

GPU = "nvidia.com/gpu"
_DEVICE_PLUGIN = {"key": GPU, "value": "present", "effect": "NoSchedule"}
_CLOUDS: dict[str, tuple[dict[str, str], list[Document]]] = {
    "Karpenter": ({"karpenter.sh/capacity-type": "spot"}, []),
    "EKS": ({"eks.amazonaws.com/capacityType": "SPOT"}, []),
    "GKE": (
        {"cloud.google.com/gke-spot": "true"},
        [{"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"}],
    ),
    "AKS": (
        {"kubernetes.azure.com/scalesetpriority": "spot"},
        [{"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"}],
    ),
}
"""Labels of each cloud's spot nodes, and taints besides the device plugin's."""


@contextmanager
def gpu_node(kube: KubeCluster, labels: dict[str, str], taints: list[Document]) -> Iterator[str]:
    """Make the last node look like a cloud's GPU node during the block; its name."""
    names = sorted(node["metadata"]["name"] for node in kube.ask("GET", "/api/v1/nodes")["items"])
    if len(names) < 2:
        pytest.skip("one node only: the head would find no other")
    path = f"/api/v1/nodes/{names[-1]}"
    gpus = {"status": {"capacity": {GPU: "1"}, "allocatable": {GPU: "1"}}}
    none = {"status": {"capacity": {GPU: None}, "allocatable": {GPU: None}}}
    kube.ask("PATCH", f"{path}/status", gpus)
    node = {"metadata": {"labels": labels}, "spec": {"taints": [_DEVICE_PLUGIN, *taints]}}
    kube.ask("PATCH", path, node)
    try:
        yield names[-1]
    finally:
        off: Document = {"metadata": {"labels": dict.fromkeys(labels)}, "spec": {"taints": None}}
        kube.ask("PATCH", path, off)
        kube.ask("PATCH", f"{path}/status", none)


def _target(team: Team, folder: Path, name: str) -> KubernetesTarget:
    """A client for an overlay of k8s/overlays, with one small worker."""
    overlay = write_overlay(folder / name, base=OVERLAYS / name, components=[SMALL])
    return replace(team.target(overlay=overlay, image="pneumo:dev"), workers=1)


def test_the_head_avoids_spot_nodes_of_every_cloud_and_workers_use_them(
    kube: KubeCluster, team: Team, tmp_path: Path
) -> None:
    target = _target(team, tmp_path, "gpu-spot")
    for cloud, (labels, taints) in _CLOUDS.items():
        with gpu_node(kube, labels, taints) as node:
            asked = make_probe(team, cloud.lower(), 1, 0, 0)
            started = target.submit(asked, lambda _: None)
            head, *workers = team.wait(
                f"nodes for the pods of {started.id}", partial(_placed, team, started.id)
            )
            target.cancel(started.id)
        assert head != node, cloud
        assert workers == [node], cloud


def _placed(team: Team, job_id: str) -> list[str]:
    """The nodes of head and workers, once all have one."""
    pods = [*team.pods(job_id, component="head"), *team.pods(job_id, component="worker")]
    nodes = [str(pod["spec"].get("nodeName", "")) for pod in pods]
    return nodes if len(nodes) > 1 and all(nodes) else []


def test_spot_workers_do_not_use_other_nodes(kube: KubeCluster, team: Team, tmp_path: Path) -> None:
    """With `gpu-spot` they wait and the reason is shown; with `gpu-ondemand` they run there."""
    with gpu_node(kube, {}, []) as node:
        spot = _target(team, tmp_path, "gpu-spot")
        started = spot.submit(make_probe(team, "spot", 1, 0, 0), lambda _: None)
        notes: list[str] = []

        def note(text: object) -> None:
            notes.append(str(text))
            if "cannot be scheduled" in notes[-1]:
                spot.cancel(started.id)

        assert spot.follow(started.id, lambda _: None, note).exit_code == 130
        [told] = [note for note in notes if "cannot be scheduled" in note]
        assert "the overlay asks for nodes that the cluster does not have (spot, GPU)" in told
        steady = _target(team, tmp_path, "gpu-ondemand")
        other = steady.submit(make_probe(team, "steady", 1, 0, 0), lambda _: None)
        head, *workers = team.wait("nodes for the pods", lambda: _placed(team, other.id))
        steady.cancel(other.id)
    assert workers == [node]
    assert head != node


@pytest.mark.usefixtures("needs_bucket")
def test_a_missing_gpu_is_reported_once(
    kube: KubeCluster,
    team: Team,
    files: s3fs.S3FileSystem,
    tiny_store: Callable[..., str],
    tmp_path: Path,
) -> None:
    files.put(tiny_store(train=64, val=24, test=24), f"{team.bucket}/store", recursive=True)
    words = (
        f"--store {team.bucket}/store --run {team.bucket}/run --recipe fast --data.image-size 32 "
        "--train.epochs 1 --cluster.num-workers 1 --cluster.cpus-per-worker 1"
    )
    asked = plan("train", words.split(), team.environ, remote=True, now=datetime.now())
    labels, taints = _CLOUDS["GKE"]
    target = _target(team, tmp_path, "gpu-spot")
    with gpu_node(kube, labels, taints):
        started = target.submit(asked, lambda _: None)
        seen = follow(target, started.id)
    told = [line for line in (*seen.notes, *seen.lines) if "torch finds none there" in line]
    assert len(told) == 1, (seen.notes, seen.lines)
    assert (seen.state.phase, seen.state.exit_code) == ("failed", 2)
    assert "your mistake, which another attempt would repeat; the run was stopped" in seen.state.why
