"""What goes wrong with the pods of a RayJob, one line each: what is seen, and what to do.

Pure: takes the objects as the API server gives them. A RayJob says "Initializing" while an image
cannot be pulled, so the pods, their conditions and the warnings about them are what tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.overlays import Document

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_LOST = {"NodeLost", "NodeShutdown", "Shutdown", "Terminated"}
_LOST_EVENTS = {"NodeNotReady", "TaintManagerEviction"}
_EVICTED = {"Evicted", "Preempting", "Preempted"}
PREFLIGHT = "preflight"
_PATIENT_RESTARTS = 2
"""A preflight that fails of time, not of a mistake, may be the pod's network coming up."""


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong.

    `key` is the same while it is the same thing. `exit_code` is set where waiting cannot help.
    """

    key: tuple[str, str]
    line: str
    exit_code: int | None = None

    def __str__(self) -> str:
        return self.line


def find(job: Document, pods: Sequence[Document], warnings: Sequence[Document]) -> list[Trouble]:
    """The troubles of a run, those that explain others first."""
    found = [
        *_of_job(job),
        *(trouble for pod in pods for trouble in _of_pod(pod)),
        *_of_warnings(job, pods, warnings),
    ]
    return list({trouble.key: trouble for trouble in reversed(found)}.values())[::-1]


def _of_job(job: Document) -> Iterator[Trouble]:
    status = job.get("status") or {}
    reason, message = status.get("reason"), _line(status.get("message"))
    advice = {
        "SubmissionFailed": "the submitter could not reach the head; its pod's log and the "
        "NetworkPolicy tell more",
        "DeadlineExceeded": "raise activeDeadlineSeconds in the overlay, and submit again: the run "
        "goes on from its last checkpoint",
        "PreRunningDeadlineExceeded": "it waited longer than preRunningDeadlineSeconds; lower "
        "--workers, or take an overlay whose nodes there are",
        "ValidationFailed": "the operator refuses the RayJob; correct the overlay",
    }.get(str(reason))
    if advice:
        yield Trouble(
            ("job", str(reason)), f"{reason}{f': {message}' if message else ''}; {advice}"
        )


def _of_pod(pod: Document) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    specs = {
        each["name"]: each
        for part in ("initContainers", "containers")
        for each in pod["spec"].get(part, [])
    }
    yield from _of_scheduling(name, status)
    yield from _of_loss(name, status)
    for container in [
        *status.get("initContainerStatuses", []),
        *status.get("containerStatuses", []),
    ]:
        yield from _of_container(name, container, specs.get(container["name"], {}))


def _of_scheduling(name: str, status: Mapping[str, Any]) -> Iterator[Trouble]:
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            message = _line(condition.get("message"))
            yield Trouble(
                (name, "unschedulable"), f"pod {name} has no node: {_scheduling(message)}"
            )


def _scheduling(message: str) -> str:
    """Which resource or rule keeps a pod off the nodes, and what to do."""
    lacking = sorted(set(re.findall(r"Insufficient ([\w./-]*\w)", message)))
    if lacking:
        return (
            f"not enough {', '.join(lacking)} ({message}); a node may be on its way, else lower "
            "--workers or the overlay's resources"
        )
    if "affinity" in message or "taint" in message:
        return f"{message}; the overlay asks for nodes that the cluster does not have (spot, GPU)"
    return f"{message}; compare the overlay with the cluster's nodes"


def _of_loss(name: str, status: Mapping[str, Any]) -> Iterator[Trouble]:
    reason, message = str(status.get("reason", "")), _line(status.get("message"))
    for condition in status.get("conditions", []):
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            reason = reason or str(condition.get("reason", ""))
            message = message or _line(condition.get("message"))
    if reason in _EVICTED:
        yield Trouble(
            (name, "lost"), f"pod {name} was evicted ({message}); see the overlay's sizes"
        )
    elif reason:
        yield Trouble((name, "lost"), _lost(name, f"{reason}{f': {message}' if message else ''}"))


def _lost(name: str, why: str) -> str:
    after = (
        "the job is lost with it; another cluster is started, and goes on from the last checkpoint"
        if "-head" in name
        else "another is started, and the run goes on from the last checkpoint"
    )
    return f"pod {name} lost its node ({why}); {after}"


def _of_container(name: str, status: Document, spec: Document) -> Iterator[Trouble]:
    state, last = status.get("state") or {}, status.get("lastState") or {}
    waiting = state.get("waiting") or {}
    reason, message = str(waiting.get("reason", "")), _line(waiting.get("message"))
    ended = state.get("terminated") or last.get("terminated") or {}
    if reason in _IMAGE:
        yield Trouble(
            (name, "image"),
            f"pod {name} cannot pull {spec.get('image', 'its image')} ({reason}"
            f"{f': {message}' if message else ''}); check name and digest, and that the nodes may "
            "read the registry",
            exit_code=2 if reason in {"InvalidImageName", "ErrImageNeverPull"} else None,
        )
    elif reason in _CONFIG:
        yield Trouble((name, "config"), f"pod {name} cannot start ({reason}: {_secret(message)}")
    if not ended.get("exitCode"):
        return
    if status["name"] == PREFLIGHT:
        yield _preflight(name, status, ended)
    elif ended.get("reason") == "OOMKilled":
        limit = spec.get("resources", {}).get("limits", {}).get("memory", "none")
        yield Trouble(
            (name, "memory"),
            f"pod {name} was killed for memory (OOMKilled, its limit is {limit}); raise the "
            "overlay's memory, or lower --train.batch-size or set --data.cache stream",
        )
    elif reason == "CrashLoopBackOff":
        yield Trouble(
            (name, "crash"),
            f"pod {name} ends again and again (exit code {ended['exitCode']}: "
            f"{_line(ended.get('message'), last=True) or ended.get('reason')}); see kubectl logs "
            f"{name}",
        )


def _preflight(name: str, status: Document, ended: Document) -> Trouble:
    said = _line(ended.get("message"), last=True).removeprefix("error: ")
    lasting = ended["exitCode"] == 2 or status.get("restartCount", 0) >= _PATIENT_RESTARTS
    return Trouble(
        (name, PREFLIGHT),
        said or f"pod {name}: preflight ended with exit code {ended['exitCode']}",
        exit_code=(2 if ended["exitCode"] == 2 else 1) if lasting else None,
    )


def _secret(message: str) -> str:
    found = re.search(r'secret "?([\w.-]+)"? not found', message)
    if found is None:
        return f"{message}); see the overlay's environment and volumes"
    return f"{message}); an administrator creates the secret {found[1]}, see docs/cluster.md"


def _of_warnings(
    job: Document, pods: Sequence[Document], warnings: Sequence[Document]
) -> Iterator[Trouble]:
    name = job["metadata"]["name"]
    cluster = (job.get("status") or {}).get("rayClusterName") or name
    there = {pod["metadata"]["name"] for pod in pods}
    for warning in sorted(warnings, key=_time, reverse=True):
        about, reason = warning.get("involvedObject") or {}, str(warning.get("reason", ""))
        kind, who = str(about.get("kind", "")), str(about.get("name", ""))
        message = _line(warning.get("message"))
        if kind == "Workload" and re.fullmatch(rf"rayjob-{re.escape(name)}-[0-9a-z]{{5}}", who):
            if reason == "Pending" and (job.get("spec") or {}).get("suspend"):
                yield Trouble(("queue", "quota"), f"Kueue has no quota for it yet: {message}")
        elif kind == "Pod" and reason in _LOST_EVENTS and who.startswith(f"{cluster}-"):
            if who not in there:
                yield Trouble((who, "lost"), _lost(who, f"{reason}: {message}"))
        elif who in {name, cluster} and kind in {"RayJob", "RayCluster", "Job"}:
            yield from _of_controller(reason, message)


def _of_controller(reason: str, message: str) -> Iterator[Trouble]:
    """A warning of the operator or of Kubernetes' own controllers about the run."""
    if "exceeded quota" in message:
        yield Trouble(
            ("namespace", "quota"), f"no quota: {message}; lower --workers, or ask for more"
        )
    elif "serviceaccount" in message and "not found" in message:
        yield Trouble(
            ("namespace", "account"), f"{message}; an administrator applies the overlay, once"
        )
    elif reason.startswith("InvalidRay"):
        yield Trouble(("job", "invalid"), f"the operator refuses it: {message}", exit_code=2)
    elif reason.startswith("Failed"):
        yield Trouble(("job", reason), f"{reason}: {message}")


def _time(event: Document) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def _line(text: str | None, *, last: bool = False) -> str:
    lines = (text or "").strip().splitlines() or [""]
    return lines[-1 if last else 0].strip().rstrip(".")
