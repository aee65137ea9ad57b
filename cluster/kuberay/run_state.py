"""The state of a run on KubeRay as a `JobState`; pure."""

import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.kuberay import progress, rayjob
from cluster.kuberay.kept_logs import find_exit_code
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import NO_CAPACITY, Problem
from cluster.targets import JobState, Phase

OPERATOR_TIMEOUT_S = 60.0
"""A running operator begins to process a RayJob within a second or two."""

QUOTA_TAKEN_BACK = (
    "Kueue has taken its quota back: its pods are being deleted; it resumes from its last "
    "checkpoint when it is admitted again"
)
_QUEUED = "in the queue: Kueue has not admitted it yet"
_ENDED: dict[str, Phase] = {
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


def to_state(job: Document, found: Sequence[Problem]) -> JobState:
    """The state of a run, from its RayJob and its problems."""
    status, metadata = job.get("status") or {}, job["metadata"]
    deployment = status.get("jobDeploymentStatus") or "New"
    phase: Phase = _ENDED.get(deployment, "running" if deployment == "Running" else "waiting")
    if status.get("jobStatus") == "STOPPED" and deployment in _ENDED:
        phase = "cancelled"
    if status.get("jobStatus") == "SUCCEEDED" and deployment in _ENDED:
        phase = "succeeded"  # even if the submitter failed, or the operator was down
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
        driver_exit_code=find_exit_code(status.get("message")),
        asked_s=progress.to_seconds(metadata["creationTimestamp"]),
        started_s=_seconds(status.get("startTime")),
        ended_s=_seconds(status.get("endTime")),
        is_ours=rayjob.SETTINGS in annotations,
        owner=annotations.get(rayjob.OWNER, ""),
        log_folder=rayjob.log_folder(job),
    )


def is_being_deleted(resource: Document) -> bool:
    """Whether a RayJob or a pod is being deleted; its processes may still run for a while."""
    return bool(resource["metadata"].get("deletionTimestamp"))


def submitters(pods: Sequence[Document]) -> list[Document]:
    """The submitter pods that have started, oldest first; their log is the driver's."""
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
    """The final state of a job that runs or waits, and that neither waiting nor another attempt can
    help; else None. `logged_exit_code` is that in the driver's log, as the RayJob has it for some
    seconds only."""
    if state.has_ended:
        return None
    problem = next((problem for problem in found if problem.exit_code is not None), None)
    status, annotations = job.get("status") or {}, job["metadata"].get("annotations") or {}
    is_retrying = status.get("jobDeploymentStatus") == "Retrying"
    if problem is not None:
        code, why = problem.exit_code, problem.line
    elif (is_retrying and state.driver_exit_code == 2) or (
        logged_exit_code == 2 and status.get("failed")
    ):
        code, why = 2, "exit code 2: your mistake, which another attempt would repeat"
    elif (
        is_retrying
        and status.get("reason") == NO_CAPACITY
        and annotations.get(rayjob.WAIT_AGAIN) != "true"
    ):
        code, why = 1, "its nodes were not ready within preRunningDeadlineSeconds"
    else:
        return None
    return replace(state, phase="failed", why=f"{why}; the run was stopped", driver_exit_code=code)


def _why(job: Document, deployment: str, phase: Phase, found: Sequence[Problem]) -> str:
    status = job.get("status") or {}
    code = find_exit_code(status.get("message"))
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
            f"no KubeRay operator has processed it within {OPERATOR_TIMEOUT_S:g} s; have the "
            "cluster's administrator look whether one runs and watches this namespace"
        )
    head = (status.get("rayClusterStatus") or {}).get("head") or {}
    return {
        "New": "for the KubeRay operator to process it",
        "Initializing": "for its pods to start",
        "Suspended": _QUEUED,
        # A run that was never admitted has this status too, for a moment.
        "Suspending": QUOTA_TAKEN_BACK if head.get("podIP") else _QUEUED,
        "Retrying": "an attempt failed, another cluster is being started",
    }.get(deployment, deployment)


def _seconds(text: str | None) -> float | None:
    return progress.to_seconds(text) if text else None
