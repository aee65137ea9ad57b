"""Every problem a person meets, as the API server tells it; the objects are cut from real ones."""

import re

import pytest

from cluster.kuberay.pod_problems import find
from tests.cluster.kuberay.resources import (
    DISRUPTED,
    HEAD,
    HEADS,
    WORKER,
    Document,
    make_disrupted,
    make_ended,
    make_event,
    make_job,
    make_pod,
    make_preflight,
    make_submitter,
    make_unschedulable,
    make_waiting,
)

CASES: dict[str, tuple[Document, list[Document], list[Document], str]] = {
    "image pull": (
        make_job(),
        [make_waiting("ImagePullBackOff", 'Back-off pulling image "r.io/pneumo@sha256:0"')],
        [],
        rf"pod {WORKER} cannot pull r\.io/pneumo@sha256:0 \(ImagePullBackOff: .*check name and dig",
    ),
    "image name": (
        make_job(),
        [make_waiting("InvalidImageName")],
        [],
        r"cannot pull .*InvalidImageName",
    ),
    "secret": (
        make_job(),
        [make_waiting("CreateContainerConfigError", 'secret "pneumo-ray-auth" not found')],
        [],
        r"cannot start .*an administrator creates the secret pneumo-ray-auth",
    ),
    "memory": (
        make_job(),
        [make_ended(137, "OOMKilled")],
        [],
        r"killed for memory \(OOMKilled, its limit is 16Gi\); raise the overlay's memory",
    ),
    "memory, restarted": (
        make_job(),
        [make_ended(137, "OOMKilled", again=True)],
        [],
        "killed for memory",
    ),
    "crash": (
        make_job(),
        [make_ended(1, "Error", "one\nno module named jobs", again=True)],
        [],
        r"keeps crashing \(exit code 1: no module named jobs\)",
    ),
    "no GPU": (
        make_job(),
        [
            make_unschedulable(
                "0/5 nodes are available: 2 Insufficient nvidia.com/gpu, 3 Insufficient cpu. "
                "preemption: 0/5 nodes are available: 5 No preemption victims found."
            )
        ],
        [],
        r"cannot be scheduled: not enough cpu, nvidia\.com/gpu \(0/5 nodes .*lower --workers",
    ),
    "no spot node": (
        make_job(),
        [make_unschedulable("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity")],
        [],
        r"cannot be scheduled: .*the overlay asks for nodes that the cluster does not have",
    ),
    "node lost": (
        make_job(),
        [make_pod(reason="NodeLost", message="Node i-0abc which was running pod is unresponsive")],
        [],
        r"is lost with its node \(NodeLost: .*resumes from its last checkpoint",
    ),
    "spot node taken": (
        make_job(),
        [DISRUPTED],
        [],
        r"is being deleted, as its node n1 does not .*runs: kubectl delete node n1",
    ),
    "head lost, pod gone": (
        make_job(),
        [],
        [make_event("Pod", HEAD, "NodeNotReady", "Node is not ready")],
        r"-head-9fzqm is lost with its node \(NodeNotReady.*another is started, and the run",
    ),
    "a worker of a run whose name has -head in it": (
        make_job(),
        [make_pod("two-head-0a1b2c3d-x7k2p-workers-worker-l2x8d", reason="NodeLost")],
        [],
        r"is lost with its node \(NodeLost\); another is started, and the run resumes",
    ),
    "taken by taint, pod gone": (
        make_job(),
        [],
        [
            make_event(
                "Pod", WORKER, "TaintManagerEviction", f"Marking for deletion Pod team/{WORKER}"
            )
        ],
        r"is lost with its node \(TaintManagerEviction: Marking for deletion",
    ),
    "preempted": (
        make_job(),
        [make_disrupted("PreemptionByScheduler", "default-scheduler: preempting to accommodate")],
        [],
        r"was preempted by a pod of higher priority \(PreemptionByScheduler: .*another is started",
    ),
    "drained": (
        make_job(),
        [make_disrupted("EvictionByEvictionAPI", "Eviction API: evicting")],
        [],
        r"was evicted \(EvictionByEvictionAPI: Eviction API: evicting\); another is",
    ),
    "shut down": (
        make_job(),
        [make_disrupted("TerminationByKubelet", "The node was shut down")],
        [],
        r"was evicted \(TerminationByKubelet",
    ),
    "a volume that is not there": (
        make_job(),
        [make_pod(phase="Pending")],
        [
            make_event(
                "Pod", WORKER, "FailedMount", 'MountVolume.SetUp failed: secret "x" not found'
            )
        ],
        r"FailedMount: MountVolume\.SetUp failed: .*; a volume, secret or config map that",
    ),
    "a node without a network": (
        make_job(),
        [make_pod(phase="Pending")],
        [
            make_event(
                "Pod", WORKER, "FailedCreatePodSandBox", "failed to setup network for sandbox"
            )
        ],
        r"FailedCreatePodSandBox: failed to setup network for sandbox; the node's network",
    ),
    "probes that fail on and on": (
        make_job(),
        [{**make_pod(HEAD), "metadata": {"name": HEAD, "labels": HEADS}}],
        [{**make_event("Pod", HEAD, "Unhealthy", "Readiness probe failed: x"), "count": 40}],
        r"Unhealthy: Readiness probe failed: x; Ray does not answer there",
    ),
    "a submitter that could not": (
        make_job(jobStatus="PENDING"),
        [make_submitter(1, "noise\nConnectionError: Failed to connect to Ray at address http://x")],
        [],
        r"submitter \S+ ended with exit code 1 \(ConnectionError: .*; another is started",
    ),
    "a head that does not answer": (
        make_job(reason="JobStatusCheckTimeoutExceeded", message="Timed out"),
        [],
        [],
        r"JobStatusCheckTimeoutExceeded: Timed out; the operator did not reach the head .*with: "
        r"python -m cluster submit --target k8s --overlay gpu-spot train --store s3://b/s",
    ),
    "a submitter that does not end": (
        make_job(reason="JobDeploymentStatusTransitionGracePeriodExceeded"),
        [],
        [],
        r"GracePeriodExceeded; the job ended, its submitter did not",
    ),
    "evicted": (
        make_job(),
        [make_pod(reason="Evicted", message="The node was low on resource: ephemeral-storage.")],
        [],
        r"was evicted \(The node was low on resource: ephemeral-storage\)",
    ),
    "no quota in Kueue": (
        make_job(suspend=True),
        [],
        [
            make_event(
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
        make_job(),
        [],
        [
            make_event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateWorkerPod",
                'pods "x" is forbidden: exceeded quota: team, requested: requests.cpu=4',
            )
        ],
        r"no quota: .*exceeded quota: team.*lower --workers, or ask for more",
    ),
    "no service account": (
        make_job(),
        [],
        [
            make_event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateHeadPod",
                'error looking up service account team/pneumo: serviceaccount "pneumo" not found',
            )
        ],
        r"an administrator applies the overlay, once",
    ),
    "refused by the operator": (
        make_job(),
        [],
        [
            make_event(
                "RayJob", "train-1-0a1b2c3d", "InvalidRayJobSpec", "The RayJob spec is invalid: x"
            )
        ],
        r"the operator refuses it: The RayJob spec is invalid",
    ),
    "submitter failed": (
        make_job(reason="SubmissionFailed", message="Job submission has failed. Reason: Backoff"),
        [],
        [],
        r"SubmissionFailed: Job submission has failed\. Reason: Backoff; the submitter lost .*: ",
    ),
    "deadline": (
        make_job(
            reason="DeadlineExceeded", message="The RayJob has passed the activeDeadlineSeconds"
        ),
        [],
        [],
        r"DeadlineExceeded: .*raise activeDeadlineSeconds .*resumes from its last checkpoint",
    ),
    "deadline before running": (
        make_job(reason="PreRunningDeadlineExceeded"),
        [],
        [],
        "waited longer than preRunningDeadlineSeconds",
    ),
    "another architecture": (
        make_job(),
        [make_preflight(255, "exec /app/.venv/bin/python: exec format error")],
        [],
        r"the image is of another architecture than its node \(exec /app/\S+: exec format error\)",
    ),
    "a pod that the namespace forbids": (
        make_job(),
        [],
        [
            make_event(
                "RayCluster",
                "train-1-0a1b2c3d-x7k2p",
                "FailedToCreateHeadPod",
                "violates PodSecurity",
            )
        ],
        r"the namespace forbids it: violates PodSecurity; correct the overlay",
    ),
    "bucket out of reach": (
        make_job(),
        [make_preflight(2, "noise\nerror: preflight: s3://b/r: no such bucket; create it")],
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
    lost, ended = make_disrupted("EvictionByEvictionAPI", "evicting"), make_pod(phase="Succeeded")
    [found] = find(make_job(), [], [], [lost, ended])
    assert f"pod {WORKER} was evicted (EvictionByEvictionAPI: evicting)" in str(found)
    assert find(make_job(), [], [], [ended]) == []


def test_workers_that_wait_for_a_head_are_not_named() -> None:
    head = make_unschedulable("0/3 nodes are available: 3 Insufficient cpu")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    failed = {**make_event("Pod", WORKER, "Unhealthy", "Readiness probe failed: x"), "count": 40}
    [problem] = find(make_job(), [make_pod(phase="Running"), head], [failed])
    assert HEAD in str(problem)
    mount = make_event("Pod", WORKER, "FailedMount", "no such volume")
    assert len(find(make_job(), [make_pod(phase="Running"), head], [failed, mount])) == 2


@pytest.mark.parametrize(("version", "is_told"), [("v1.5.0", True), ("v1.7.2", False)])
def test_an_operator_that_drops_fields_is_told_of(version: str, is_told: bool) -> None:
    tags = {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": f"kuberay_version={version};a=b"}
    head = make_pod(HEAD, phase="Running")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    head["spec"]["containers"][0]["env"] = [{"name": "X", "valueFrom": {}}, tags]
    assert [str(each) for each in find(make_job(), [head], [])] == [
        f"the KubeRay operator is {version[1:4]} and ignores fields that it does not know: "
        "before 1.6 authOptions, so that Ray runs code of anyone who reaches the head, before 1.7 "
        "preRunningDeadlineSeconds; have it updated"
    ] * is_told


def test_a_run_without_a_head_says_what_to_type() -> None:
    head = make_pod(HEAD, phase="Running")
    head["metadata"] = {"name": HEAD, "labels": HEADS}
    assert find(make_job(jobDeploymentStatus="Running"), [head], []) == []
    [problem] = find(make_job(jobDeploymentStatus="Running"), [make_pod()], [])
    assert "its head is gone; " in str(problem)
    assert "python -m cluster submit --target k8s --overlay gpu-spot train" in str(problem)
    cancelled = make_job(jobDeploymentStatus="Running")
    cancelled["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    assert find(cancelled, [], []) == []


def test_the_operators_haste_is_no_problem() -> None:
    name = "train-1-0a1b2c3d"
    events = [
        make_event("RayJob", name, "FailedToCreateRayCluster", f'"{name}" already exists'),
        make_event(
            "RayJob", name, "FailedToDeleteRayJobSubmitter", f'jobs.batch "{name}" not found'
        ),
    ]
    assert find(make_job(), [], events) == []


def test_what_is_well_is_no_problem() -> None:
    running = {"name": "ray-worker", "state": {"running": {"startedAt": "x"}}}
    creating = {"name": "ray-worker", "state": {"waiting": {"reason": "ContainerCreating"}}}
    done = {"name": "preflight", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}
    pods = [
        make_pod(phase="Running", containerStatuses=[running], initContainerStatuses=[done]),
        make_pod(phase="Pending", containerStatuses=[creating]),
    ]
    when = "2026-01-02T03:04:05Z"
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": when}
    well = make_pod("well", phase="Running", conditions=[ready])
    passed = make_event("Pod", "well", "FailedMount", "it was late")
    starting = {**make_event("Pod", WORKER, "Unhealthy", "Readiness probe failed"), "count": 3}
    stays = make_event(
        "Pod", "train-1-0a1b2c3d-x7k2p-workers-y", "TaintManagerEviction", "Cancelling"
    )
    failed = make_submitter(1, "error: store: no such bucket")
    assert find(make_job(), [well, *pods], [passed, starting, stays]) == []
    assert find(make_job(jobStatus="FAILED"), [failed], []) == []
    others = [
        make_event("Pod", "train-1-0a1b2c3d-2-x-head-1", "NodeNotReady", "another run's"),
        make_event("Workload", "rayjob-train-1-0a1b2c3d-2-5c2f1", "Pending", "another run's"),
        make_event("RayJob", "train-2", "InvalidRayJobSpec", "another run's"),
    ]
    assert find(make_job(suspend=True), pods, others) == []


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ({"lastTimestamp": "2026-01-02T03:04:04Z"}, 0),  # a second before the RayJob
        ({"eventTime": "2026-01-02T02:30:00.123456Z"}, 0),
        ({"lastTimestamp": "2026-01-02T03:04:05Z"}, 1),
        ({"eventTime": "2026-01-02T03:04:05.123456Z"}, 1),
    ],
)
def test_events_of_an_earlier_run_of_the_same_name_are_not_this_runs(
    seen: dict[str, str], found: int
) -> None:
    refused = make_event(
        "RayJob", "train-1-0a1b2c3d", "InvalidRayJobSpec", "a mistake since mended"
    )
    refused.pop("lastTimestamp", None)
    assert len(find(make_job(), [], [{**refused, **seen}])) == found


@pytest.mark.parametrize(
    ("pod", "exit_code"),
    [
        (make_preflight(2, "error: preflight: nothing is there"), 2),
        (make_preflight(1, "error: preflight: no answer within 20 s"), None),
        (make_preflight(1, "error: preflight: no answer within 20 s", restarts=2), 1),
        (make_waiting("InvalidImageName"), 2),
        (make_waiting("ImagePullBackOff"), None),
    ],
)
def test_only_what_waiting_cannot_mend_ends_a_job(pod: Document, exit_code: int | None) -> None:
    assert find(make_job(), [pod], [])[0].exit_code == exit_code
