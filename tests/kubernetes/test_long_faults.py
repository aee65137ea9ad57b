"""Faults of a real cluster that take minutes: nodes without power, a control plane that is killed
and restarted, a full cluster. `docs/faults.md` has the transcripts.

They run one after the other, as each disturbs everything on the cluster.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kubernetes.cluster import Document, KubeCluster, Team
from tests.kubernetes.machines import powerless, stopped
from tests.kubernetes.probes import make_probe, put, write_overlay
from tests.kubernetes.trainings import LONG_S, epochs_of, make_training, wait_for_epoch
from tests.kubernetes.watching import begin, name_of

pytestmark = [
    pytest.mark.kubernetes_faults,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("needs_bucket"),
]

PLACE = "pneumo.test/place"
SUBMITTER = "/spec/submitterPodTemplate/spec"
HEAD_POD = "/spec/rayClusterSpec/headGroupSpec/template/spec"
HEAD = {"matchLabels": {"app.kubernetes.io/component": "head"}}
TERM = {"labelSelector": HEAD, "topologyKey": "kubernetes.io/hostname"}
NOT_BESIDE_THE_HEAD = {
    "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [TERM]}
}


def list_expendable_nodes(cluster: KubeCluster) -> set[str]:
    """The nodes without a pod of Kueue, whose webhooks every pod of the cluster needs."""
    needed = cluster.ask("GET", "/api/v1/namespaces/kueue-system/pods")["items"]
    nodes = cluster.ask("GET", "/api/v1/nodes")["items"]
    return {name_of(node) for node in nodes} - {node_of(pod) for pod in needed}


def prefer_node(node: str) -> Document:
    """An affinity that prefers a node while it exists."""
    host = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    preferred = [{"weight": 100, "preference": {"matchExpressions": [host]}}]
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def node_of(pod: Document) -> str:
    return str(pod["spec"].get("nodeName", ""))


def test_a_workers_node_without_power(team: Team, store: str) -> None:
    """Elastic training continues with one worker, and with two when there is room again."""
    asked = make_training(team, store, "power", 60, "--cluster.min-workers", "1")
    run = begin(team, asked)
    wait_for_epoch(run, 1)
    head = node_of(team.pods(run.job_id, component="head")[0])
    workers = team.pods(run.job_id, component="worker")
    spare = list_expendable_nodes(team.cluster) - {head}
    lost = next(pod for pod in workers if node_of(pod) in spare)
    with powerless(team.cluster, node_of(lost)):
        team.wait(
            "training with one worker",
            lambda: "resuming with 1 worker after epoch" in "".join(run.text),
            LONG_S,
        )
        note = run.wait_for_note(f"pod {name_of(lost)} is being deleted", LONG_S)
        assert f"an administrator runs: kubectl delete node {node_of(lost)}" in note
        wait_for_epoch(run, max(epochs_of(run)))
        team.cluster.kubectl("delete", "node", node_of(lost))
        team.wait(
            "training with two workers",
            lambda: "resuming with 2 workers after epoch" in "".join(run.text),
            LONG_S,
        )
    assert run.end(LONG_S).exit_code == 0
    assert epochs_of(run) == sorted(set(epochs_of(run)))


def test_the_heads_node_without_power(team: Team, tmp_path: Path) -> None:
    """The submitter is on another node, so its connection gets no error: the operator makes no
    other head while the lost one exists, or, before version 1.7, at all."""
    node = sorted(list_expendable_nodes(team.cluster))[0]
    overlay = write_overlay(
        tmp_path / "apart",
        put(f"{SUBMITTER}/affinity", NOT_BESIDE_THE_HEAD),
        put(f"{HEAD_POD}/affinity", prefer_node(node)),
    )
    run = begin(team, make_probe(team, "head", 200, 0.5, 0), overlay)
    run.wait_for_line(5)
    head = team.pods(run.job_id, component="head")[0]
    before = len(run.numbers)
    with powerless(team.cluster, node_of(head)):
        run.wait_for_note(f"pod {name_of(head)} is being deleted", LONG_S)
        run.wait_for_note(
            f"{run.job_id} is gone, and the operator starts no other; submitted", LONG_S
        )
        team.wait("the driver to begin again", lambda: 0 in run.numbers[before:], LONG_S)
    state = run.end(LONG_S)
    assert (state.id, state.exit_code) == (f"{run.job_id}-2", 0)
    assert run.numbers[-200:] == list(range(200))


def test_the_control_plane_is_killed_and_restarted(team: Team) -> None:
    """The operator is down for two minutes, API server and etcd are restarted; no line of the log
    is lost and the driver is not disturbed."""
    if team.cluster.folder is None:
        pytest.skip("only the control plane that `kube` started can be stopped")
    run = begin(team, make_probe(team, "control", 700, 0.5, 0))
    run.wait_for_line(5)
    with stopped(team.cluster, "operator"):
        time.sleep(120)
    time.sleep(15)  # it needs an API server to start, and nothing here restarts it
    with stopped(team.cluster, "apiserver"):
        run.wait_for_note("the job goes on, trying again")
    said = len(run.numbers)
    run.wait_for_line(said)
    with stopped(team.cluster, "etcd"):
        time.sleep(5)
    assert run.end(LONG_S).exit_code == 0
    assert run.numbers == list(range(700))


def test_a_worker_that_is_killed_for_memory_is_replaced(team: Team) -> None:
    run = begin(team, make_probe(team, "memory", 240, 0.5, 0))
    run.wait_for_line(2)
    pod = name_of(team.wait_for_pod(run.job_id, component="worker"))
    fill = "import time; hold = [bytearray(1 << 30) for _ in range(8)]; time.sleep(60)"
    with pytest.raises(AssertionError, match=r"137|command terminated"):
        team.cluster.kubectl(
            *("-n", team.namespace, "exec", pod, "-c", "ray-worker"), "--", "python", "-c", fill
        )
    assert run.end(LONG_S).exit_code == 0
    assert run.numbers == list(range(240))


@contextmanager
def one_place(cluster: KubeCluster) -> Iterator[Document]:
    """Give a node one unit of a made-up resource; the patch step by which a head requests it."""
    node = sorted(list_expendable_nodes(cluster))[0]
    path = f"/api/v1/nodes/{node}/status"
    cluster.ask("PATCH", path, {"status": {"capacity": {PLACE: "1"}, "allocatable": {PLACE: "1"}}})
    needs = {"limits": {PLACE: 1, "memory": "1Gi"}, "requests": {PLACE: 1, "memory": "1Gi"}}
    try:
        yield put(f"{HEAD_POD}/containers/0/resources", needs)
    finally:
        none = {"status": {"capacity": {PLACE: None}, "allocatable": {PLACE: None}}}
        cluster.ask("PATCH", path, none)


def test_on_a_full_cluster_the_next_run_waits_only_for_the_ttl(team: Team, tmp_path: Path) -> None:
    with one_place(team.cluster) as step:
        overlay = write_overlay(tmp_path / "full", step)
        first = begin(team, make_probe(team, "first", 20, 0.5, 0), overlay)
        first.wait_for_line(1)
        second = begin(team, make_probe(team, "second", 2, 0.5, 0), overlay)
        second.wait_for_note(f"cannot be scheduled: not enough {PLACE}")
        assert first.end().exit_code == 0
        ended_s = time.monotonic()
        second.wait_for_note("head has a node (")
        print(f"the second's head had a node {time.monotonic() - ended_s:.0f} s after the end")
        assert second.end(LONG_S).exit_code == 0
