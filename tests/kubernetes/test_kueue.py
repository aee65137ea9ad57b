"""A run in Kueue's queue: it waits for quota, is admitted, is preempted by another, and goes on."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import s3fs
from kubernetes.client.exceptions import ApiException

from cluster.kuberay.overlays import OVERLAYS
from cluster.submission import Submission, plan
from tests.kubernetes.cluster import SMALL, Document, KubeCluster, Team
from tests.kubernetes.namespaces import make_object
from tests.kubernetes.probes import write_overlay
from tests.kubernetes.watching import begin

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.usefixtures("needs_bucket"),
    pytest.mark.timeout(1500),
]

KUEUE = "kueue.x-k8s.io/v1beta2"
EPOCHS = 12
"""A minute together, for the pods of a run that is preempted have 40 s to end; each leaves a
checkpoint of 134 MB, and the S3 server of the tests has 4 GB."""
QUEUES = f"/apis/{KUEUE}/clusterqueues"
WORKLOAD_CPU = "700m"
"""What admits the run, and leaves no room for another: its pods ask for 200m and 200m, the head's
init container for less, and the submitter for 100m."""


@pytest.fixture
def queue(kube: KubeCluster, team: Team) -> Iterator[str]:
    """A ClusterQueue with next to no quota, to which the namespace's queue `pneumo` leads."""
    name = f"pneumo-{secrets.token_hex(3)}"
    try:
        kube.create(make_object(KUEUE, "ResourceFlavor", name, spec={}))
    except ApiException as error:
        if error.status == 404:
            pytest.skip("no Kueue on this cluster")
        raise
    kube.create(make_object(KUEUE, "ClusterQueue", name, spec=_quota(name, "10m")))
    kube.create(
        make_object(KUEUE, "LocalQueue", "pneumo", spec={"clusterQueue": name}), team.namespace
    )
    kube.create({**make_object(KUEUE, "WorkloadPriorityClass", name), "value": 1000})
    yield name
    for plural in ("workloadpriorityclasses", "clusterqueues", "resourceflavors"):
        kube.ask("DELETE", f"/apis/{KUEUE}/{plural}/{name}")


def _quota(name: str, cpu: str) -> Document:
    resources = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "99Gi"}]
    group = {
        "coveredResources": ["cpu", "memory"],
        "flavors": [{"name": name, "resources": resources}],
    }
    return {
        "namespaceSelector": {},
        "resourceGroups": [group],
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }


def test_a_run_waits_for_quota_gives_it_back_and_goes_on(
    kube: KubeCluster,
    team: Team,
    queue: str,
    files: s3fs.S3FileSystem,
    tiny_store: Callable[..., str],
    tmp_path: Path,
) -> None:
    files.put(tiny_store(train=256, val=24, test=24), f"{team.bucket}/store", recursive=True)
    overlay = write_overlay(
        tmp_path / "queued",
        base=OVERLAYS / "kind-cpu",
        components=(OVERLAYS.parent / "components" / "kueue", SMALL),
    )
    run = begin(team, _training(team), overlay)
    told = run.wait_for_note("Kueue has no quota for it yet")
    assert "insufficient quota for cpu" in told
    assert team.pods() == []

    kube.ask("PATCH", f"{QUEUES}/{queue}", {"spec": _quota(queue, WORKLOAD_CPU)})
    run.wait_for_text("epoch   1/")
    assert not [note for note in run.notes if "taken its quota" in note]

    kube.create(_urgent_job(queue), team.namespace)
    run.wait_for_note("Kueue has taken its quota back: ")
    state = run.end(900)
    assert (state.phase, state.exit_code) == ("succeeded", 0)
    epochs = re.findall(rf"^epoch +(\d+)/{EPOCHS} ", "".join(run.text), re.MULTILINE)
    # None is said twice; the last words of a pod that is being deleted may be lost.
    assert [int(number) for number in epochs] == sorted({int(number) for number in epochs})
    assert epochs[-1] == str(EPOCHS)
    kept = files.cat_file(f"{team.bucket}/run/metrics.jsonl").splitlines()
    assert [json.loads(line)["epoch"] for line in kept] == list(range(1, EPOCHS + 1))
    assert re.search("resuming from epoch [1-9]", "".join(run.text))
    urgent = kube.ask("GET", f"{team.path('batch/v1', 'jobs')}/urgent")
    assert urgent["status"].get("succeeded") == 1


def _training(team: Team) -> Submission:
    words = (
        f"--store {team.bucket}/store --run {team.bucket}/run --recipe fast --data.image-size 32 "
        f"--train.epochs {EPOCHS} --train.batch-size 16 --cluster.num-workers 1 "
        "--cluster.cpus-per-worker 1"
    )
    return plan("train", words.split(), team.environ, remote=True, now=datetime.now())


def _urgent_job(priority: str) -> Document:
    """What needs the run's quota for some seconds, and comes first."""
    labels = {
        "kueue.x-k8s.io/queue-name": "pneumo",
        "kueue.x-k8s.io/priority-class": priority,
    }
    secure = {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container = {
        "name": "urgent", "image": "pneumo:dev", "command": ["sleep", "15"],
        "resources": {"requests": {"cpu": "500m", "memory": "100Mi"}}, "securityContext": secure,
    }  # fmt: skip
    pod = {"restartPolicy": "Never", "containers": [container]}
    spec: Document = {"suspend": True, "template": {"spec": pod}}
    return make_object("batch/v1", "Job", "urgent", metadata={"labels": labels}, spec=spec)
