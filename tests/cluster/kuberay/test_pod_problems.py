"""Every problem a person meets, as the API server tells it; the objects are cut from real ones."""

import re
from typing import Any

import pytest

from cluster.kuberay.kept_logs import find_exit_code
from cluster.kuberay.pod_problems import find
from cluster.kuberay.run_state import to_state

Document = dict[str, Any]
HEAD = "train-1-0a1b2c3d-x7k2p-head-9fzqm"
WORKER = "train-1-0a1b2c3d-x7k2p-workers-worker-l2x8d"


def _job(**status: Any) -> Document:
    return {
        "metadata": {
            "name": "train-1-0a1b2c3d",
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "annotations": {
                "pneumo/target": "s3://b/r",
                "pneumo/overlay": "gpu-spot",
                "pneumo/entrypoint": "python -m jobs.train --store s3://b/s",
            },
        },
        "spec": {"entrypoint": "python -m jobs.train", "suspend": "suspend" in status},
        "status": {"rayClusterName": "train-1-0a1b2c3d-x7k2p", **status},
    }


def _pod(name: str = WORKER, **status: Any) -> Document:
    container = {
        "name": "ray-worker",
        "image": "r.io/pneumo@sha256:0",
        "resources": {"limits": {"memory": "16Gi"}},
    }
    preflight = {"name": "preflight", "image": "r.io/pneumo@sha256:0"}
    return {
        "metadata": {"name": name, "labels": {"ray.io/node-type": "worker"}},
        "spec": {"nodeName": "n1", "containers": [container], "initContainers": [preflight]},
        "status": status,
    }


def _waiting(reason: str, message: str = "") -> Document:
    waiting = {"reason": reason, "message": message}
    return _pod(containerStatuses=[{"name": "ray-worker", "state": {"waiting": waiting}}])


def _ended(exit_code: int, reason: str, message: str = "", *, again: bool = False) -> Document:
    terminated = {"exitCode": exit_code, "reason": reason, "message": message}
    status = {"name": "ray-worker", "state": {"terminated": terminated}}
    if again:
        waiting = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting"}
        status = {
            "name": "ray-worker",
            "state": {"waiting": waiting},
            "lastState": {"terminated": terminated},
        }
    return _pod(containerStatuses=[status])


def _preflight(exit_code: int, said: str, restarts: int = 0) -> Document:
    terminated = {"exitCode": exit_code, "reason": "Error", "message": said}
    status = {
        "name": "preflight",
        "restartCount": restarts,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": terminated},
    }
    return _pod(HEAD, initContainerStatuses=[status])


def _unschedulable(message: str) -> Document:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    return _pod(phase="Pending", conditions=[condition])


def _event(kind: str, name: str, reason: str, message: str) -> Document:
    return {
        "involvedObject": {"kind": kind, "name": name},
        "reason": reason,
        "message": message,
        "type": "Warning",
        "lastTimestamp": "2026-01-02T03:04:05Z",
    }


def _disrupted(reason: str, message: str) -> Document:
    condition = {"type": "DisruptionTarget", "status": "True"}
    return _pod(conditions=[{**condition, "reason": reason, "message": message}])


def _submitter(exit_code: int, said: str) -> Document:
    terminated = {"exitCode": exit_code, "reason": "Error", "message": said}
    status = {"name": "ray-job-submitter", "state": {"terminated": terminated}}
    return {
        "metadata": {"name": "train-1-0a1b2c3d-p8x2m"},
        "spec": {"containers": [{"name": "ray-job-submitter"}]},
        "status": {"containerStatuses": [status]},
    }


DISRUPTED = _disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
HEADS = {"ray.io/node-type": "head"}
CASES: dict[str, tuple[Document, list[Document], list[Document], str]] = {
    "image pull": (
        _job(),
        [_waiting("ImagePullBackOff", 'Back-off pulling image "r.io/pneumo@sha256:0"')],
        [],
        rf"pod {WORKER} cannot pull r\.io/pneumo@sha256:0 \(ImagePullBackOff: .*check name and dig",
    ),
    "image name": (_job(), [_waiting("InvalidImageName")], [], r"cannot pull .*InvalidImageName"),
    "secret": (
        _job(),
        [_waiting("CreateContainerConfigError", 'secret "pneumo-ray-auth" not found')],
        [],
        r"cannot start .*an administrator creates the secret pneumo-ray-auth",
    ),
    "memory": (
        _job(),
        [_ended(137, "OOMKilled")],
        [],
        r"killed for memory \(OOMKilled, its limit is 16Gi\); raise the overlay's memory",
    ),
    "memory, restarted": (_job(), [_ended(137, "OOMKilled", again=True)], [], "killed for memory"),
    "crash": (
        _job(),
        [_ended(1, "Error", "one\nno module named jobs", again=True)],
        [],
        r"keeps crashing \(exit code 1: no module named jobs\)",
    ),
    "no GPU": (
        _job(),
        [
            _unschedulable(
                "0/5 nodes are available: 2 Insufficient nvidia.com/gpu, 3 Insufficient cpu. "
                "preemption: 0/5 nodes are available: 5 No preemption victims found."
            )
        ],
        [],
        r"cannot be scheduled: not enough cpu, nvidia\.com/gpu \(0/5 nodes .*lower --workers",
    ),
    "no spot node": (
        _job(),
        [_unschedulable("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity")],
        [],
        r"cannot be scheduled: .*the overlay asks for nodes that the cluster does not have",
    ),
    "node lost": (
        _job(),
        [_pod(reason="NodeLost", message="Node i-0abc which was running pod is unresponsive")],
        [],
        r"is lost with its node \(NodeLost: .*resumes from its last checkpoint",
    ),
    "spot node taken": (
        _job(),
        [DISRUPTED],
        [],
        r"is being deleted, as its node n1 does not .*runs: kubectl delete node n1",
    ),
    "head lost, pod gone": (
        _job(),
        [],
        [_event("Pod", HEAD, "NodeNotReady", "Node is not ready")],
        r"-head-9fzqm is lost with its node \(NodeNotReady.*another is started, and the run",
    ),
    "a worker of a run whose name has -head in it": (
        _job(),
        [_pod("two-head-0a1b2c3d-x7k2p-workers-worker-l2x8d", reason="NodeLost")],
        [],
        r"is lost with its node \(NodeLost\); another is started, and the run resumes",
    ),
    "taken by taint, pod gone": (
        _job(),
        [],
        [_event("Pod", WORKER, "TaintManagerEviction", f"Marking for deletion Pod team/{WORKER}")],
        r"is lost with its node \(TaintManagerEviction: Marking for deletion",
    ),
    "preempted": (
        _job(),
        [_disrupted("PreemptionByScheduler", "default-scheduler: preempting to accommodate")],
        [],
        r"was preempted by a pod of higher priority \(PreemptionByScheduler: .*another is started",
    ),
    "drained": (
        _job(),
        [_disrupted("EvictionByEvictionAPI", "Eviction API: evicting")],
        [],
        r"was evicted \(EvictionByEvictionAPI: Eviction API: evicting\); another is",
    ),
    "shut down": (
        _job(),
        [_disrupted("TerminationByKubelet", "The node was shut down")],
        [],
        r"was evicted \(TerminationByKubelet",
    ),
    "a volume that is not there": (
        _job(),
        [_pod(phase="Pending")],
        [_event("Pod", WORKER, "FailedMount", 'MountVolume.SetUp failed: secret "x" not found')],
        r"FailedMount: MountVolume\.SetUp failed: .*; a volume, secret or config map that",
    ),
    "a node without a network": (
        _job(),
        [_pod(phase="Pending")],
        [_event("Pod", WORKER, "FailedCreatePodSandBox", "failed to setup network for sandbox")],
        r"FailedCreatePodSandBox: failed to setup network for sandbox; the node's network",
    ),
    "probes that fail on and on": (
        _job(),
        [{**_pod(HEAD), "metadata": {"name": HEAD, "labels": HEADS}}],
        [{**_event("Pod", HEAD, "Unhealthy", "Readiness probe failed: x"), "count": 40}],
        r"Unhealthy: Readiness probe failed: x; Ray does not answer there",
    ),
    "a submitter that could not": (
        _job(jobStatus="PENDING"),
        [_submitter(1, "noise\nConnectionError: Failed to connect to Ray at address http://x")],
        [],
        r"submitter \S+ ended with exit code 1 \(ConnectionError: .*; another is started",
    ),
    "a head that does not answer": (
        _job(reason="JobStatusCheckTimeoutExceeded", message="Timed out"),
        [],
        [],
        r"JobStatusCheckTimeoutExceeded: Timed out; the operator did not reach the head .*with: "
        r"python -m cluster submit --target k8s --overlay gpu-spot train --store s3://b/s",
    ),
    "a submitter that does not end": (
        _job(reason="JobDeploymentStatusTransitionGracePeriodExceeded"),
        [],
        [],
        r"GracePeriodExceeded; the job ended, its submitter did not",
    ),
    "evicted": (
        _job(),
        [_pod(reason="Evicted", message="The node was low on resource: ephemeral-storage.")],
        [],
        r"was evicted \(The node was low on resource: ephemeral-storage\)",
    ),
    "no quota in Kueue": (
        _job(suspend=True),
        [],
        [
            _event(
                "Workload",
                "rayjob-train-1-0a1b2c3d-5c2f1",
                "Pending",
                "couldn't assign flavors to pod set workers: insufficient unused quota for "
                "nvidia.com/gpu in flavor gpu-spot, 4 more needed",
            )
        ],
        r"Kueue has no quota for it yet: .*nvidia\.com/gpu in flavor gpu-spot, 4 more needed",
    ),
    "no quota in the namespace": (
        _job(),
        [],
        [
            _event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateWorkerPod",
                'pods "x" is forbidden: exceeded quota: team, requested: requests.cpu=4',
            )
        ],
        r"no quota: .*exceeded quota: team.*lower --workers, or ask for more",
    ),
    "no service account": (
        _job(),
        [],
        [
            _event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateHeadPod",
                'error looking up service account team/pneumo: serviceaccount "pneumo" not found',
            )
        ],
        r"an administrator applies the overlay, once",
    ),
    "refused by the operator": (
        _job(),
        [],
        [
            _event(
                "RayJob", "train-1-0a1b2c3d", "InvalidRayJobSpec", "The RayJob spec is invalid: x"
            )
        ],
        r"the operator refuses it: The RayJob spec is invalid",
    ),
    "submitter failed": (
        _job(reason="SubmissionFailed", message="Job submission has failed. Reason: Backoff"),
        [],
        [],
        r"SubmissionFailed: Job submission has failed\. Reason: Backoff; the submitter lost .*: ",
    ),
    "deadline": (
        _job(reason="DeadlineExceeded", message="The RayJob has passed the activeDeadlineSeconds"),
        [],
        [],
        r"DeadlineExceeded: .*raise activeDeadlineSeconds .*resumes from its last checkpoint",
    ),
    "deadline before running": (
        _job(reason="PreRunningDeadlineExceeded"),
        [],
        [],
        "waited longer than preRunningDeadlineSeconds",
    ),
    "another architecture": (
        _job(),
        [_preflight(255, "exec /app/.venv/bin/python: exec format error")],
        [],
        r"the image is of another architecture than its node \(exec /app/\S+: exec format error\)",
    ),
    "a pod that the namespace forbids": (
        _job(),
        [],
        [
            _event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateHeadPod",
                "violates PodSecurity",
            )
        ],
        r"the namespace forbids it: violates PodSecurity; correct the overlay",
    ),
    "bucket out of reach": (
        _job(),
        [_preflight(2, "noise\nerror: preflight: s3://b/r: no such bucket; create it")],
        [],
        r"preflight: s3://b/r: no such bucket; create it",
    ),
}


@pytest.mark.parametrize(("job", "pods", "warnings", "message"), CASES.values(), ids=CASES)
def test_a_problem_is_one_line_with_what_to_do(
    job: Document, pods: list[Document], warnings: list[Document], message: str
) -> None:
    [problem] = find(job, pods, warnings)
    assert re.search(message, str(problem)), str(problem)
    assert "\n" not in str(problem)
    assert problem in find(job, pods * 2, warnings * 2)
    assert len(find(job, pods * 2, warnings * 2)) == 1


def test_a_pod_that_is_gone_already_says_why_only_if_it_was_lost() -> None:
    lost, ended = _disrupted("EvictionByEvictionAPI", "evicting"), _pod(phase="Succeeded")
    [found] = find(_job(), [], [], [lost, ended])
    assert f"pod {WORKER} was evicted (EvictionByEvictionAPI: evicting)" in str(found)
    assert find(_job(), [], [], [ended]) == []


def test_workers_that_wait_for_a_head_are_not_named() -> None:
    head = _unschedulable("0/3 nodes are available: 3 Insufficient cpu")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    failed = {**_event("Pod", WORKER, "Unhealthy", "Readiness probe failed: x"), "count": 40}
    [problem] = find(_job(), [_pod(phase="Running"), head], [failed])
    assert HEAD in str(problem)
    mount = _event("Pod", WORKER, "FailedMount", "no such volume")
    assert len(find(_job(), [_pod(phase="Running"), head], [failed, mount])) == 2


@pytest.mark.parametrize(("version", "is_told"), [("v1.5.0", True), ("v1.7.2", False)])
def test_an_operator_that_drops_fields_is_told_of(version: str, is_told: bool) -> None:
    tags = {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": f"kuberay_version={version};a=b"}
    head = _pod(HEAD, phase="Running")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    head["spec"]["containers"][0]["env"] = [{"name": "X", "valueFrom": {}}, tags]
    assert [str(each) for each in find(_job(), [head], [])] == [
        f"the KubeRay operator is {version[1:4]} and ignores fields that it does not know: "
        "before 1.6 authOptions, so that Ray runs code of anyone who reaches the head, before 1.7 "
        "preRunningDeadlineSeconds; have it updated"
    ] * is_told


def test_a_run_without_a_head_says_what_to_type() -> None:
    head = _pod(HEAD, phase="Running")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    assert find(_job(jobDeploymentStatus="Running"), [head], []) == []
    [problem] = find(_job(jobDeploymentStatus="Running"), [_pod()], [])
    assert "its head is gone; " in str(problem)
    assert "python -m cluster submit --target k8s --overlay gpu-spot train" in str(problem)
    cancelled = _job(jobDeploymentStatus="Running")
    cancelled["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    assert find(cancelled, [], []) == []


def test_the_operators_haste_is_no_problem() -> None:
    name = "train-1-0a1b2c3d"
    events = [
        _event("RayJob", name, "FailedToCreateRayCluster", f'"{name}" already exists'),
        _event("RayJob", name, "FailedToDeleteRayJobSubmitter", f'jobs.batch "{name}" not found'),
    ]
    assert find(_job(), [], events) == []


def test_what_is_well_is_no_problem() -> None:
    running = {"name": "ray-worker", "state": {"running": {"startedAt": "x"}}}
    creating = {"name": "ray-worker", "state": {"waiting": {"reason": "ContainerCreating"}}}
    done = {"name": "preflight", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}
    pods = [
        _pod(phase="Running", containerStatuses=[running], initContainerStatuses=[done]),
        _pod(phase="Pending", containerStatuses=[creating]),
    ]
    when = "2026-01-02T03:04:05Z"
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": when}
    well = _pod("well", phase="Running", conditions=[ready])
    passed = _event("Pod", "well", "FailedMount", "it was late")
    starting = {**_event("Pod", WORKER, "Unhealthy", "Readiness probe failed"), "count": 3}
    stays = _event("Pod", "train-1-0a1b2c3d-x7k2p-workers-y", "TaintManagerEviction", "Cancelling")
    failed = _submitter(1, "error: store: no such bucket")
    assert find(_job(), [well, *pods], [passed, starting, stays]) == []
    assert find(_job(jobStatus="FAILED"), [failed], []) == []
    others = [
        _event("Pod", "train-1-0a1b2c3d-2-x-head-1", "NodeNotReady", "another run's"),
        _event("Workload", "rayjob-train-1-0a1b2c3d-2-5c2f1", "Pending", "another run's"),
        _event("RayJob", "train-2", "InvalidRayJobSpec", "another run's"),
    ]
    assert find(_job(suspend=True), pods, others) == []


@pytest.mark.parametrize(
    ("pod", "exit_code"),
    [
        (_preflight(2, "error: preflight: nothing is there"), 2),
        (_preflight(1, "error: preflight: no answer within 20 s"), None),
        (_preflight(1, "error: preflight: no answer within 20 s", restarts=2), 1),
        (_waiting("InvalidImageName"), 2),
        (_waiting("ImagePullBackOff"), None),
    ],
)
def test_only_what_waiting_cannot_mend_ends_a_job(pod: Document, exit_code: int | None) -> None:
    assert find(_job(), [pod], [])[0].exit_code == exit_code


@pytest.mark.parametrize(
    ("status", "phase", "exit_code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "cancelled", 130),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, "failed", 1),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "SUCCEEDED",
                "reason": "JobDeploymentStatusTransitionGracePeriodExceeded",
            },
            "succeeded",
            0,
        ),
        (
            {
                "jobDeploymentStatus": "Failed",
                "message": "Job entrypoint command failed with exit code 2, last available logs",
            },
            "failed",
            2,
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "x"}, "failed", 1),
        ({"jobDeploymentStatus": "Running"}, "running", None),
        ({"jobDeploymentStatus": "Initializing"}, "waiting", None),
        ({"jobDeploymentStatus": "Suspended"}, "waiting", None),
        ({"jobDeploymentStatus": "Retrying"}, "waiting", None),
        ({"jobDeploymentStatus": "Suspending"}, "waiting", None),
        ({}, "waiting", None),
    ],
)
def test_states_and_exit_codes(status: Document, phase: str, exit_code: int | None) -> None:
    state = to_state(_job(**status), ())
    assert state.phase == phase
    assert state.has_ended is (exit_code is not None)
    assert exit_code is None or state.exit_code == exit_code
    assert state.phase != "waiting" or state.why


def test_a_run_in_the_queue_is_not_one_whose_quota_was_taken() -> None:
    queued = to_state(_job(jobDeploymentStatus="Suspending"), ())
    assert queued.why == "in the queue: Kueue has not admitted it yet"
    taken = to_state(
        _job(jobDeploymentStatus="Suspending", rayClusterStatus={"head": {"podIP": "10.0.0.7"}}), ()
    )
    assert taken.why.startswith("Kueue has taken its quota back: ")


def test_nobody_takes_it_up() -> None:
    """The RayJob of these tests is old."""
    assert to_state(_job(), ()).why.startswith("no KubeRay operator has processed it within 60 s; ")


def test_the_drivers_exit_code_is_in_rays_words() -> None:
    assert find_exit_code("Job entrypoint command failed with exit code 137.") == 137
    assert find_exit_code("Job supervisor actor died") is None
    assert find_exit_code(None) is None
