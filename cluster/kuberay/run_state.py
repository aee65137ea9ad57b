"""How a run on KubeRay is doing, in the words that all clusters share; pure."""

import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.kuberay import progress, rayjob
from cluster.kuberay.kept_logs import find_exit_code
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import NO_CAPACITY, Problem
from cluster.targets import JobState, Phase

OPERATOR_TIMEOUT_S = 60.0
"""An operator that runs takes a RayJob up within a second or two."""

QUOTA_TAKEN_BACK = (
    "Kueue has taken its quota back: its pods are being deleted, it goes on from its last "
    "checkpoint when it is admitted again"
)
_QUEUED = "in the queue: Kueue has not admitted it yet"
_ENDED: dict[str, Phase] = {
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


def to_state(job: Document, found: Sequence[Problem]) -> JobState:
    """What a RayJob's status and its problems come to."""
    status, metadata = job.get("status") or {}, job["metadata"]
    deployment = status.get("jobDeploymentStatus") or "New"
    phase: Phase = _ENDED.get(deployment, "running" if deployment == "Running" else "waiting")
    if status.get("jobStatus") == "STOPPED" and deployment in _ENDED:
        phase = "cancelled"
    if status.get("jobStatus") == "SUCCEEDED" and deployment in _ENDED:
        phase = "succeeded"  # whatever became of the submitter, or of an operator that was away
    why = _why(job, deployment, phase, found)
    if is_being_deleted(job) and deployment not in _ENDED:
        phase, why = "cancelled", "being deleted"
    annotations = metadata.get("annotations") or {}
    return JobState(
        id=metadata["name"],
        phase=phase,
        target=annotations.get(rayjob.TARGET, ""),
        entrypoint=annotations.get(rayjob.ENTRYPOINT) or job["spec"].get("entrypoint", ""),
        why=why,
        driver_exit_code=driver_exit_code(status),
        asked_s=_seconds(metadata["creationTimestamp"]),
        started_s=_seconds(status.get("startTime")),
        ended_s=_seconds(status.get("endTime")),
        is_ours=rayjob.SETTINGS in annotations,
        owner=annotations.get(rayjob.OWNER, ""),
    )


def is_being_deleted(thing: Document) -> bool:
    """Whether a RayJob or a pod is being deleted; what it runs may run on for a while."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def driver_exit_code(status: Document) -> int | None:
    """A RayJob has no field for it; Ray's message about a driver that failed says it."""
    return find_exit_code(status.get("message") or "")


def submitters(pods: Sequence[Document]) -> list[Document]:
    """The pods whose log is the driver's, oldest first, as far as they have begun."""
    begun = [
        pod
        for pod in pods
        if progress.is_submitter(pod)
        and (pod.get("status") or {}).get("phase") in {"Running", "Succeeded", "Failed"}
    ]
    return sorted(begun, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def find_permanent_failure(
    job: Document, state: JobState, found: Sequence[Problem], logged_exit_code: int | None = None
) -> JobState | None:
    """What a job that has not ended comes to, if waiting or another attempt cannot help it. The
    exit code in the driver's log is given too: the RayJob tells it for some seconds only."""
    problem = next((problem for problem in found if problem.exit_code is not None), None)
    status, annotations = job.get("status") or {}, job["metadata"].get("annotations") or {}
    retries = status.get("jobDeploymentStatus") == "Retrying"
    if problem is not None:
        code, why = problem.exit_code, problem.line
    elif (retries and state.driver_exit_code == 2) or (
        logged_exit_code == 2 and status.get("failed")
    ):
        code, why = 2, "exit code 2: your mistake, which another attempt would repeat"
    elif (
        retries
        and status.get("reason") == NO_CAPACITY
        and annotations.get(rayjob.WAIT_AGAIN) != "true"
    ):
        code, why = 1, "its nodes did not come within preRunningDeadlineSeconds"
    else:
        return None
    return replace(state, phase="failed", why=f"{why}; called off", driver_exit_code=code)


def _why(job: Document, deployment: str, phase: Phase, found: Sequence[Problem]) -> str:
    status = job.get("status") or {}
    code = driver_exit_code(status)
    if phase == "succeeded":
        return ""
    if phase == "failed" and code is not None:
        return f"exit code {code}"
    if found:
        return found[0].line
    if phase == "failed":
        return (str(status.get("message") or status.get("reason") or "").splitlines() or [""])[0]
    if phase != "waiting":
        return ""
    waited_s = time.time() - progress.to_seconds(job["metadata"]["creationTimestamp"])
    if deployment == "New" and not status.get("failed") and waited_s > OPERATOR_TIMEOUT_S:
        return (
            f"no KubeRay operator has taken it up within {OPERATOR_TIMEOUT_S:g} s; have the "
            "cluster's administrator look whether one runs and watches this namespace"
        )
    return {
        "New": "for the KubeRay operator to take it up",
        "Initializing": "for its pods to start",
        "Suspended": _QUEUED,
        # One that was never admitted is for a moment called so too.
        "Suspending": QUOTA_TAKEN_BACK if _has_had_head(status) else _QUEUED,
        "Retrying": "an attempt failed, another cluster is being started",
    }.get(deployment, deployment)


def _has_had_head(status: Document) -> bool:
    return bool(((status.get("rayClusterStatus") or {}).get("head") or {}).get("podIP"))


def _seconds(text: str | None) -> float | None:
    return progress.to_seconds(text) if text else None
