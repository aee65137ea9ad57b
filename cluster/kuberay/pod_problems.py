"""Problems of a RayJob's pods, one line each: what is wrong, and what to do.

Pure: takes objects as the API server returns them. A RayJob's status stays "Initializing" while an
image cannot be pulled, so problems are found in the pods, their conditions and warning events.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.kuberay import rayjob
from cluster.kuberay.overlays import Document
from cluster.kuberay.progress import SUBMITTER, node_type, since

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_LOST_EVENTS = {"NodeNotReady", "TaintManagerEviction"}
_PREEMPTED = {"Preempting", "Preempted", "PreemptionByScheduler"}
_EVICTED = {"Evicted", "EvictionByEvictionAPI", "TerminationByKubelet"}
"""Reasons of pods and of their condition DisruptionTarget; others mean that the node is lost."""
_SHOWN_BY_STATUS = {
    "BackOff", "ErrImageNeverPull", "Failed", "FailedScheduling", "InspectFailed", "NodeNotReady",
    "Evicted", "Preempted", "Preempting", "TaintManagerEviction",
}  # fmt: skip
"""Reasons of events that the pod's own status shows in more detail."""
_MANY_FAILED_PROBES = 10
"""Fewer are normal while Ray starts."""
_POD_ADVICE = {
    "FailedMount": "a volume, secret or config map that the overlay names may not be there",
    "FailedAttachVolume": "its volume may still be attached to another node",
    "FailedCreatePodSandBox": "the node's network or runtime; if it stays, tell the cluster's "
    "administrator",
    "Unhealthy": "Ray does not answer there; kubectl logs of the pod tells more",
}
NO_CAPACITY = "PreRunningDeadlineExceeded"
STATUS_CHECK_TIMEOUT = "JobStatusCheckTimeoutExceeded"
"""Reason of a run that operator 1.7 ended without a retry: its head did not answer for 300 s."""
PREFLIGHT = "preflight"
OLDEST_OPERATOR = (1, 7)
_HARMLESS = re.compile(r"already exists|not found")
"""Messages of the operator about something that it created or deleted twice."""
_MAX_PREFLIGHT_RESTARTS = 2
"""Restarts of a preflight that timed out: the pod's network may still be starting."""


@dataclass(frozen=True)
class Problem:
    """A problem of a run.

    `key` identifies it for as long as it lasts. `exit_code` is set where waiting cannot help.
    """

    key: tuple[str, str]
    line: str
    exit_code: int | None = None

    def __str__(self) -> str:
        return self.line


def find(
    job: Document,
    pods: Sequence[Document],
    warnings: Sequence[Document],
    deleted: Sequence[Document] = (),
) -> list[Problem]:
    """The problems of a run; causes come before their effects.

    `deleted`: the last state of pods that are gone since the run was last looked at.
    """
    pods = sorted(pods, key=lambda pod: not is_head(pod))
    found = [
        *(problem for pod in deleted for problem in _of_loss(pod)),
        *_of_job(job, pods),
        *(problem for pod in pods for problem in _of_pod(pod, job)),
        *_of_operator(pods),
        *_of_warnings(job, pods, warnings),
    ]
    return list({problem.key: problem for problem in reversed(found)}.values())[::-1]


def _of_job(job: Document, pods: Sequence[Document]) -> Iterator[Problem]:
    status = job.get("status") or {}
    reason, message = status.get("reason"), _line(status.get("message"))
    again = f"it resumes from its last checkpoint with: {rayjob.command(job)}"
    if status.get("jobDeploymentStatus") == "Retrying":
        again = "another attempt begins, and resumes from the last checkpoint"
    advice = {
        "SubmissionFailed": f"the submitter lost the head, or never reached it; {again}",
        "DeadlineExceeded": f"raise activeDeadlineSeconds in the overlay; {again}",
        NO_CAPACITY: "it waited longer than preRunningDeadlineSeconds; lower "
        "--workers, or use an overlay whose nodes the cluster has",
        "ValidationFailed": "the operator refuses the RayJob; correct the overlay",
        STATUS_CHECK_TIMEOUT: "the operator did not reach the head for minutes, and does not try "
        f"again by itself; {again}",
        "JobDeploymentStatusTransitionGracePeriodExceeded": "the job ended, its submitter did not; "
        "its log and the run's folder tell how",
    }.get(str(reason))
    if is_headless(job, pods):
        yield Problem(
            ("job", "headless"),
            "its head is gone; if the operator starts no other, `submit` or `logs --follow` "
            f"submits it again after two minutes; without them, cancel it, and {again}",
        )
    if advice:
        yield Problem(
            ("job", str(reason)), f"{reason}{f': {message}' if message else ''}; {advice}"
        )


def _of_pod(pod: Document, job: Document) -> Iterator[Problem]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    specs = {
        each["name"]: each
        for part in ("initContainers", "containers")
        for each in pod["spec"].get(part, [])
    }
    yield from _of_scheduling(name, status)
    yield from _of_loss(pod)
    for container in [
        *status.get("initContainerStatuses", []),
        *status.get("containerStatuses", []),
    ]:
        yield from _of_container(name, container, specs.get(container["name"], {}))
        if container["name"] == SUBMITTER:
            yield from _of_submitter(name, container, job)


def _of_scheduling(name: str, status: Mapping[str, Any]) -> Iterator[Problem]:
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            message = _line(condition.get("message"))
            yield Problem(
                (name, "unschedulable"), f"pod {name} cannot be scheduled: {_scheduling(message)}"
            )


def _scheduling(message: str) -> str:
    """Why the pod cannot be scheduled, and what to do."""
    message = re.split(r"[. ]+(?:no new claims|preemption:)", message)[0]
    lacking = sorted(set(re.findall(r"Insufficient ([\w./-]*\w)", message)))
    if lacking:
        return (
            f"not enough {', '.join(lacking)} ({message}); the autoscaler may add a node, else "
            "lower --workers or the overlay's resources"
        )
    if "affinity" in message or "taint" in message:
        return f"{message}; the overlay asks for nodes that the cluster does not have (spot, GPU)"
    return f"{message}; compare the overlay with the cluster's nodes"


def _of_loss(pod: Document) -> Iterator[Problem]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    reason, message = str(status.get("reason", "")), _line(status.get("message"))
    for condition in status.get("conditions", []):
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            reason = reason or str(condition.get("reason", ""))
            message = message or _line(condition.get("message"))
    why = f"{reason}{f': {message}' if message else ''}"
    then = _STARTED_AGAIN
    if reason in _PREEMPTED:
        what = f"was preempted by a pod of higher priority ({why})"
    elif reason == "Evicted":
        what = f"was evicted ({message}), see the overlay's sizes"
    elif reason in _EVICTED:
        what = f"was evicted ({why})"
    elif reason == "DeletionByTaintManager":
        node = pod["spec"].get("nodeName", "")
        what = f"is being deleted, as its node {node} does not answer or was tainted ({reason})"
        if node_type(pod) == "worker":
            then = (
                "another is started only once it is deleted: when the node answers again, or its "
                "Node object is deleted, which clouds do by themselves; elsewhere, if the machine "
                f"is certainly off, an administrator runs: kubectl delete node {node}"
            )
    else:
        what = f"is lost with its node ({why})"
    if reason:
        yield Problem((name, "lost"), f"pod {name} {what}; {then}")


_STARTED_AGAIN = "another is started, and the run resumes from its last checkpoint"


def _of_operator(pods: Sequence[Document]) -> Iterator[Problem]:
    """An operator older than its CRDs, which silently ignores fields that it does not know."""
    for pod in filter(is_head, pods):
        for variable in pod["spec"]["containers"][0].get("env", []):
            found = re.search(r"kuberay_version=v(\d+)\.(\d+)", variable.get("value") or "")
            if found and tuple(map(int, found.groups())) < OLDEST_OPERATOR:
                yield Problem(
                    ("operator", "version"),
                    f"the KubeRay operator is {found[1]}.{found[2]} and ignores fields that it "
                    "does not know: before 1.6 authOptions, so that Ray runs code of anyone "
                    "who reaches the head, before 1.7 preRunningDeadlineSeconds; have it updated",
                )


def _of_container(name: str, status: Document, spec: Document) -> Iterator[Problem]:
    state, last = status.get("state") or {}, status.get("lastState") or {}
    waiting = state.get("waiting") or {}
    reason, message = str(waiting.get("reason", "")), _line(waiting.get("message"))
    ended = state.get("terminated") or last.get("terminated") or {}
    if reason in _IMAGE:
        yield Problem(
            (name, "image"),
            f"pod {name} cannot pull {spec.get('image', 'its image')} ({reason}"
            f"{f': {message}' if message else ''}); check name and digest, and that the nodes may "
            "read the registry",
            exit_code=2 if reason in {"InvalidImageName", "ErrImageNeverPull"} else None,
        )
    elif reason in _CONFIG:
        yield Problem((name, "config"), f"pod {name} cannot start ({reason}: {_secret(message)}")
    if not ended.get("exitCode"):
        return
    if status["name"] == PREFLIGHT:
        yield _preflight(name, status, ended)
    elif ended.get("reason") == "OOMKilled":
        limit = spec.get("resources", {}).get("limits", {}).get("memory", "none")
        yield Problem(
            (name, "memory"),
            f"pod {name} was killed for memory (OOMKilled, its limit is {limit}); raise the "
            "overlay's memory, or lower --train.micro-batch-size or set --data.cache stream",
        )
    elif reason == "CrashLoopBackOff":
        yield Problem(
            (name, "crash"),
            f"pod {name} keeps crashing (exit code {ended['exitCode']}: "
            f"{_line(ended.get('message'), last=True) or ended.get('reason')}); see kubectl logs "
            f"{name}",
        )


def _of_submitter(name: str, status: Document, job: Document) -> Iterator[Problem]:
    """A submitter that ended before the job: it could not start the job, or lost the head."""
    ended = (status.get("state") or {}).get("terminated") or {}
    job_status = (job.get("status") or {}).get("jobStatus")
    if ended.get("exitCode") and job_status not in {"SUCCEEDED", "FAILED", "STOPPED"}:
        why = _line(ended.get("message"), last=True) or ended.get("reason", "no reason given")
        if "WebSocket" in why:
            why = "the connection to the head was lost"
        yield Problem(
            (name, "submitter"),
            f"submitter {name} ended with exit code {ended['exitCode']} ({why}); another is "
            "started while attempts are left",
        )


def _preflight(name: str, status: Document, ended: Document) -> Problem:
    message = _line(ended.get("message"), last=True).removeprefix("error: ")
    if "exec format error" in message:
        line = f"pod {name}: the image is of another architecture than its node ({message})"
        return Problem((name, "image"), line, exit_code=2)
    exit_code = 2 if ended["exitCode"] == 2 else None
    if exit_code is None and status.get("restartCount", 0) >= _MAX_PREFLIGHT_RESTARTS:
        exit_code = 1
    line = message or f"pod {name}: preflight ended with exit code {ended['exitCode']}"
    return Problem((name, PREFLIGHT), line, exit_code)


def _secret(message: str) -> str:
    found = re.search(r'secret "?([\w.-]+)"? not found', message)
    if found is None:
        return f"{message}); see the overlay's environment and volumes"
    return f"{message}); an administrator creates the secret {found[1]}, see docs/cluster.md"


def _of_warnings(
    job: Document, pods: Sequence[Document], warnings: Sequence[Document]
) -> Iterator[Problem]:
    name = job["metadata"]["name"]
    cluster = (job.get("status") or {}).get("rayClusterName") or name
    by_name = {pod["metadata"]["name"]: pod for pod in pods}
    head_is_ready = any(is_head(pod) and since(pod, "Ready") for pod in pods)
    # An event outlives its object, and an earlier RayJob may have had the same name.
    created = str(job["metadata"]["creationTimestamp"])[:19]
    recent = [each for each in warnings if not _time(each) or _time(each)[:19] >= created]
    for warning in sorted(recent, key=_time, reverse=True):
        about, reason = warning.get("involvedObject") or {}, str(warning.get("reason", ""))
        kind, who = str(about.get("kind", "")), str(about.get("name", ""))
        # Kubernetes combines repeated events into one with this prefix.
        message = _line(warning.get("message")).removeprefix("(combined from similar events): ")
        if kind == "Workload" and re.fullmatch(rf"rayjob-{re.escape(name)}-[0-9a-z]{{5}}", who):
            if reason == "Pending" and (job.get("spec") or {}).get("suspend"):
                yield Problem(("queue", "quota"), f"Kueue has no quota for it yet: {message}")
        elif kind == "Pod" and who in by_name:
            is_waiting = reason == "Unhealthy" and not head_is_ready and not is_head(by_name[who])
            if not is_waiting:  # for the head
                yield from _of_living_pod(by_name[who], warning)
        elif kind == "Pod" and reason in _LOST_EVENTS and who.startswith(f"{cluster}-"):
            if not message.startswith("Cancelling"):
                what = f"pod {who} is lost with its node ({reason}: {message})"
                yield Problem((who, "lost"), f"{what}; {_STARTED_AGAIN}")
        elif who in {name, cluster} and kind in {"RayJob", "RayCluster", "Job"}:
            yield from _of_controller(reason, message)


def _of_living_pod(pod: Document, warning: Document) -> Iterator[Problem]:
    """A warning event about a pod that is not ready, unless the pod's status shows it too."""
    name, reason = pod["metadata"]["name"], str(warning.get("reason", ""))
    count = warning.get("count") or (warning.get("series") or {}).get("count") or 1
    if since(pod, "Ready") or reason in _SHOWN_BY_STATUS:
        return
    if reason == "Unhealthy" and count < _MANY_FAILED_PROBES:
        return
    advice = _POD_ADVICE.get(reason, "it is tried again")
    yield Problem(
        (name, reason), f"pod {name}: {reason}: {_line(warning.get('message'))}; {advice}"
    )


def _of_controller(reason: str, message: str) -> Iterator[Problem]:
    """A warning of the operator or of Kubernetes' own controllers about the run."""
    if "exceeded quota" in message:
        yield Problem(
            ("namespace", "quota"), f"no quota: {message}; lower --workers, or ask for more"
        )
    elif "serviceaccount" in message and "not found" in message:
        yield Problem(
            ("namespace", "account"), f"{message}; an administrator applies the overlay, once"
        )
    elif "violates PodSecurity" in message:
        yield Problem(
            ("namespace", "security"), f"the namespace forbids it: {message}; correct the overlay"
        )
    elif reason.startswith("InvalidRay"):
        yield Problem(("job", "invalid"), f"the operator refuses it: {message}", exit_code=2)
    elif reason.startswith("Failed") and not _HARMLESS.search(message):
        yield Problem(("job", reason), f"{reason}: {message}; it is tried again")


def is_headless(job: Document, pods: Sequence[Document]) -> bool:
    """Whether a running run has no head, or only one that is being deleted."""
    if job["metadata"].get("deletionTimestamp"):
        return False
    heads = [pod for pod in pods if is_head(pod) and not pod["metadata"].get("deletionTimestamp")]
    return (job.get("status") or {}).get("jobDeploymentStatus") == "Running" and not heads


def is_head(pod: Document) -> bool:
    return node_type(pod) == "head"


def _time(event: Document) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def _line(text: str | None, *, last: bool = False) -> str:
    lines = (text or "").strip().splitlines() or [""]
    return lines[-1 if last else 0].strip().rstrip(".:")
