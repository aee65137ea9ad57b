"""KubeRay: a run as a RayJob in a namespace; submit, follow, list, cancel.

The driver's log is that of the submitter's pod. Nothing is kept on the laptop: whoever has the
rights of k8s/rbac may look again, from anywhere.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cluster import kept_logs, overlays, rayjob, troubles
from cluster.kubernetes_api import (
    AlreadyThereError,
    Api,
    ExpiredError,
    MissingError,
    OutOfReachError,
    lacking,
)
from cluster.kubernetes_api import connect as connect_api
from cluster.overlays import Document
from cluster.states import JobState, Phase, Started, Write
from cluster.submission import Submission
from cluster.troubles import SUBMITTER, Trouble
from pneumo.errors import AccessError, ClusterError, ConfigError, PneumoError

ROUND_S = 5.0
"""A log is left this often to look whether the pods are well."""
PATIENCE_S = 600.0
"""How long an API server that was there may be out of reach while a job is followed."""
CANCEL_TIMEOUT_S = 120.0
_WHOLE_LOG_S = 60.0
_TRIES = 10

_ENDED: dict[str, Phase] = {
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}


@dataclass(frozen=True)
class KubernetesTarget:
    """A namespace with KubeRay, as a `Target`."""

    api: Api
    overlay: Path | None = None
    image: str | None = None
    workers: int | None = None
    patience_s: float = PATIENCE_S

    @property
    def flags(self) -> str:
        context = f"--context {self.api.context} " if self.api.context else ""
        return f"--target k8s {context}--namespace {self.api.namespace}"

    def submit(self, submission: Submission, note: Write) -> Started:
        folder = self.overlay or overlays.find_overlay(None)
        documents = overlays.render(folder)
        # Built before the cluster is asked: what does not fit needs none to be seen.
        job = self._build(documents, submission, submission.id)
        missing = self.api.missing_rights()
        if missing:
            raise AccessError(
                f"kubernetes: {self.api.place}: {lacking(missing, self.api.namespace)}"
            )
        attempts, running, leaving = self._attempts(submission.id)
        if running is not None:
            started = _join(running, submission)
            for difference in rayjob.differences(job, running):
                note(f"it goes on as it was started: {difference}")
            return started
        self._wait_until_gone(submission.id, leaving, note)
        if attempts:
            job = self._build(documents, submission, f"{submission.id}-{attempts + 1}")
        try:
            self.api.create_rayjob(job)
        except AlreadyThereError:  # an answer that got lost, or someone else, just now
            name = job["metadata"]["name"]
            return replace(_join(self.api.get_rayjob(name), submission), already_running=False)
        _describe(job, submission, folder.name, note)
        return Started(job["metadata"]["name"], already_running=False)

    def follow(self, job_id: str, write: Write, note: Write) -> JobState:
        return _Following(self, job_id, write, note).follow()

    def list(self) -> list[JobState]:
        jobs = self.api.list_rayjobs(rayjob.SELECTOR)
        jobs.sort(key=lambda job: job["metadata"]["creationTimestamp"])
        return [to_state(job, ()) for job in jobs]

    def state(self, job_id: str) -> JobState:
        job, _, found = self.look(job_id)
        return to_state(job, found)

    def logs(self, job_id: str) -> str:
        """The log so far, after those of earlier attempts, whose pods are gone."""
        job, pods, _ = self.look(job_id)
        lines: list[str] = []
        there = submitters(pods)[-1:]
        for pod in there:
            cursor = LogCursor(lines.append)
            cursor.read_all(self.api, pod["metadata"]["name"])
        return "".join([*_earlier_logs(job, is_there=bool(there)), *lines])

    def cancel(self, job_id: str) -> JobState:
        """Delete the RayJob: the operator stops the job and takes the cluster down."""
        try:
            job = self.api.get_rayjob(job_id)
            self.api.delete_rayjob(job_id)
            deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
            while time.monotonic() < deadline_s:
                time.sleep(0.5)
                job = self.api.get_rayjob(job_id)
        except MissingError:
            return JobState(job_id, "cancelled")
        return replace(to_state(job, ()), phase="running", why="being deleted")

    def look(self, job_id: str) -> tuple[Document, Sequence[Document], Sequence[Trouble]]:
        """The RayJob, its pods, and what is wrong with them. ConfigError for an unknown job."""
        try:
            job = self.api.get_rayjob(job_id)
        except MissingError as error:
            raise ConfigError(
                f"kubernetes: no RayJob '{job_id}' in namespace {self.api.namespace} of "
                f"{self.api.place}; python -m cluster list --target k8s shows those there are"
            ) from error
        pods = self.api.list_pods(f"{rayjob.RUN_LABEL}={job_id}")
        return job, pods, troubles.find(job, pods, self.api.list_warnings())

    def _build(self, documents: Sequence[Document], submission: Submission, name: str) -> Document:
        return rayjob.build(
            documents, submission, name=name, image=self.image, workers=self.workers
        )

    def _attempts(self, submission_id: str) -> tuple[int, Document | None, Sequence[str]]:
        """The highest attempt at the run that there is, the one that has not ended, and the names
        of those that are being deleted."""
        used, running = 0, None
        leaving = []
        for job in self.api.list_rayjobs(f"{rayjob.SUBMISSION_LABEL}={submission_id}"):
            name = job["metadata"]["name"]
            number = name.removeprefix(submission_id).lstrip("-")
            used = max(used, int(number) if number.isdigit() else 1)
            if is_leaving(job):
                leaving.append(name)
            elif not to_state(job, ()).has_ended:
                running = job
        return used, running, leaving

    def _wait_until_gone(self, submission_id: str, leaving: Sequence[str], note: Write) -> None:
        """Return once nothing of the run that is being deleted can write where the next will.

        Pods outlive their RayJob, for a checkpoint; one on a node that is lost is not waited for
        longer than the others.
        """
        deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
        said = False
        while True:
            pods = self.api.list_pods(f"{rayjob.SUBMISSION_LABEL}={submission_id}")
            jobs = [name for name in leaving if self._is_there(name)]
            names = jobs or [pod["metadata"]["name"] for pod in pods if is_leaving(pod)]
            if not names:
                return
            if not said:
                note(f"waiting: for {names[0]} to be gone, which is being deleted")
            said = True
            if time.monotonic() > deadline_s:
                break
            time.sleep(1.0)
        if jobs:
            raise ClusterError(
                f"kubernetes: {jobs[0]} writes the same place and is still being deleted after "
                f"{CANCEL_TIMEOUT_S:g} s; submit again when list shows it no more"
            )

    def _is_there(self, name: str) -> bool:
        try:
            self.api.get_rayjob(name)
        except MissingError:
            return False
        return True


def connect(
    *,
    context: str | None,
    namespace: str | None,
    overlay: Path | None,
    image: str | None,
    workers: int | None,
) -> KubernetesTarget:
    """The target that a kubeconfig names."""
    if workers is not None and workers < 1:
        raise ConfigError(f"cluster: --workers {workers}: at least 1")
    return KubernetesTarget(connect_api(context, namespace), overlay, image, workers)


def to_state(job: Document, found: Sequence[Trouble]) -> JobState:
    """What a RayJob's status and its troubles come to."""
    status, metadata = job.get("status") or {}, job["metadata"]
    deployment = status.get("jobDeploymentStatus") or "New"
    phase: Phase = _ENDED.get(deployment, "running" if deployment == "Running" else "waiting")
    if status.get("jobStatus") == "STOPPED" and deployment in _ENDED:
        phase = "cancelled"
    why = _why(deployment, phase, status, found)
    if is_leaving(job) and deployment not in _ENDED:
        phase, why = "cancelled", "being deleted"
    annotations = metadata.get("annotations") or {}
    return JobState(
        id=metadata["name"],
        phase=phase,
        target=annotations.get(rayjob.TARGET, ""),
        entrypoint=annotations.get(rayjob.ENTRYPOINT) or job["spec"].get("entrypoint", ""),
        why=why,
        driver_exit_code=driver_exit_code(status),
        started_s=_seconds(status.get("startTime")),
        ended_s=_seconds(status.get("endTime")),
        is_ours=rayjob.SETTINGS in annotations,
    )


def _earlier_logs(job: Document, *, is_there: bool) -> Iterator[str]:
    """What the attempts said whose pods are gone; the last attempt's are not, where `is_there`."""
    folder = rayjob.log_folder(job)
    failed = (job.get("status") or {}).get("failed", 0)
    if not folder or (not failed and (is_there or not to_state(job, ()).has_ended)):
        return
    try:
        kept = kept_logs.read(folder)
    except PneumoError as error:
        yield f"--- the logs of other attempts are in {folder}, and cannot be read here: {error}\n"
        return
    for log in kept[:-1] if is_there else kept:
        yield f"--- the attempt of {log.name} UTC, kept in {folder}\n{log.text}"
    if kept[1:] and is_there:
        yield "--- the last attempt\n"


def is_leaving(thing: Document) -> bool:
    """Whether a RayJob or a pod is being deleted; what it runs may run on for a while."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def driver_exit_code(status: Document) -> int | None:
    """A RayJob has no field for it; Ray's message about a driver that failed says it."""
    found = re.search(r"failed with exit code (\d+)", status.get("message") or "")
    return int(found[1]) if found else None


def submitters(pods: Sequence[Document]) -> list[Document]:
    """The pods whose log is the driver's, oldest first, as far as they have begun."""
    begun = [
        pod
        for pod in pods
        if any(each["name"] == SUBMITTER for each in pod["spec"]["containers"])
        and (pod.get("status") or {}).get("phase") in {"Running", "Succeeded", "Failed"}
    ]
    return sorted(begun, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


Left = Literal["ended", "going on", "broken"]


@dataclass
class LogCursor:
    """How far a container's log has been written; a stream that is taken up again repeats some."""

    write: Write
    last: str = ""
    at_last: int = 0
    """Lines written of the time `last`."""
    aside: str = ""
    """The last line without a time."""

    def read(self, api: Api, pod: str, *, follow: bool, limit_s: float) -> Left:
        """Write what is new, for at most about `limit_s`; how that ended."""
        start_s = time.monotonic()
        since = f"{self.last[:19]}Z" if self.last else ""
        repeated = 0
        lines = api.stream_log(pod, SUBMITTER, since=since, follow=follow, silence_s=limit_s)
        try:
            for line in lines:
                repeated = self._take(line, repeated)
                if time.monotonic() - start_s > limit_s:
                    return "going on"
        except MissingError:
            return "ended"
        except (ExpiredError, OutOfReachError):
            return "going on" if time.monotonic() - start_s >= limit_s else "broken"
        finally:
            lines.close()
        return "ended"

    def read_all(self, api: Api, pod: str) -> None:
        """Write what is new of a log that has ended, if need be in several pieces."""
        for _ in range(_TRIES):
            if self.read(api, pod, follow=False, limit_s=_WHOLE_LOG_S) == "ended":
                return
            time.sleep(1.0)

    def _take(self, line: str, repeated: int) -> int:
        """Write a line unless it was written; how many lines of the time `last` there were."""
        stamp, _, text = line.partition(" ")
        moment = _utc(stamp)
        if moment is None:  # the kubelet's own words, about a log that it cannot read
            if line != self.aside:
                self.write(f"{line}\n")
            self.aside = line
            return repeated
        if moment < self.last:
            return repeated
        if moment > self.last:
            self.last, self.at_last, repeated = moment, 0, 0
        if repeated == self.at_last:
            self.write(f"{text}\n")
            self.at_last += 1
        return repeated + 1


class _Following:
    """One person's look at a job until it ends."""

    def __init__(self, target: KubernetesTarget, job_id: str, write: Write, note: Write) -> None:
        self.target, self.job_id, self.write, self.note = target, job_id, write, note
        self.said: set[object] = set()
        self.seen = False
        self.pod = ""
        self.cursor = LogCursor(write)
        self.lost_at_s: float | None = None

    def follow(self) -> JobState:
        while True:
            try:
                state = self._round()
            except OutOfReachError as error:
                self._wait_out(error)
                continue
            if state is not None:
                return state

    def _round(self) -> JobState | None:
        """Look once, and stay with the log or the RayJob for a while; the state if it ended."""
        try:
            job, pods, found = self.target.look(self.job_id)
        except ConfigError:
            if self.seen:
                return JobState(self.job_id, "cancelled", why="someone deleted the RayJob")
            raise
        self.seen, self.lost_at_s = True, None
        state = to_state(job, found)
        if is_leaving(job):  # its last words are still to come
            state = replace(state, phase="running")
        pod = self._submitter(pods)
        hopeless = None if state.has_ended else _hopeless(job, state, found)
        if hopeless is None:
            self._tell(state, found)
        if hopeless is not None or state.has_ended:
            if pod:
                self.cursor.read_all(self.target.api, pod)
            if hopeless is not None:
                self.target.cancel(self.job_id)
            return hopeless or state
        left: Left = "ended"
        if pod:
            left = self.cursor.read(self.target.api, pod, follow=True, limit_s=ROUND_S)
        if left == "ended":
            version = job["metadata"]["resourceVersion"]
            self.target.api.wait_for_change(self.job_id, version, int(ROUND_S))
        elif left == "broken":
            time.sleep(1.0)
        return None

    def _tell(self, state: JobState, found: Sequence[Trouble]) -> None:
        for trouble in found:
            self._say_once(trouble.key, f"trouble: {trouble}")
        if state.phase == "waiting" and not found:
            self._say_once(state.why, f"waiting: {state.why}")

    def _submitter(self, pods: Sequence[Document]) -> str:
        """The pod whose log is the driver's now; "" while there is none."""
        begun = submitters(pods)
        name = str(begun[-1]["metadata"]["name"]) if begun else ""
        if name and name != self.pod:
            if self.pod:
                self.note(f"another submitter took over: {name}; its log begins again")
            self.pod, self.cursor = name, LogCursor(self.write)
        return name

    def _wait_out(self, error: OutOfReachError) -> None:
        now_s = time.monotonic()
        self.lost_at_s = self.lost_at_s or now_s
        if now_s - self.lost_at_s > self.target.patience_s:
            raise error
        self._say_once("lost", f"{str(error).split(';')[0]}; the job goes on, trying again")
        time.sleep(1.0)

    def _say_once(self, key: object, text: str) -> None:
        if key not in self.said:
            self.said.add(key)
            self.note(text)


def _hopeless(job: Document, state: JobState, found: Sequence[Trouble]) -> JobState | None:
    """What a job that has not ended comes to, if waiting or another attempt cannot help it."""
    trouble = next((trouble for trouble in found if trouble.exit_code is not None), None)
    if trouble is not None:
        code, why = trouble.exit_code, trouble.line
    elif (job.get("status") or {}).get("jobDeploymentStatus") == "Retrying" and (
        state.driver_exit_code == 2
    ):
        code, why = 2, "exit code 2: your mistake, which another attempt would repeat"
    else:
        return None
    return replace(state, phase="failed", why=f"{why}; called off", driver_exit_code=code)


def _describe(job: Document, submission: Submission, overlay: str, note: Write) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    each = rayjob.describe_limits(container)
    note(f"overlay {overlay}: {group['replicas']} workers of {each}; image {container['image']}")
    if submission.secrets:
        note(
            f"not sent, for they are secrets: {', '.join(submission.secrets)}; the pods take "
            f"theirs from the Kubernetes secret {rayjob.SECRETS}"
        )


def _join(running: Document, submission: Submission) -> Started:
    metadata = running["metadata"]
    if (metadata.get("annotations") or {}).get(rayjob.SETTINGS) != submission.settings:
        raise ConfigError(
            f"{submission.job}: {submission.target} is being written by {metadata['name']} with "
            "other settings; follow it, cancel it, or give another place to write"
        )
    return Started(metadata["name"], already_running=True)


def _why(deployment: str, phase: Phase, status: Document, found: Sequence[Trouble]) -> str:
    code = driver_exit_code(status)
    if phase == "failed" and code is not None:
        return f"exit code {code}"
    if found:
        return found[0].line
    if phase == "failed":
        return (str(status.get("message") or status.get("reason") or "").splitlines() or [""])[0]
    if phase != "waiting":
        return ""
    return {
        "New": "for the KubeRay operator to take it up",
        "Initializing": "for its pods to start",
        "Suspended": "in the queue: Kueue has not admitted it yet",
        "Suspending": "its cluster is being taken down",
        "Retrying": "an attempt failed, another cluster is being started",
    }.get(deployment, deployment)


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None


def _utc(stamp: str) -> str | None:
    """The time of a line, which kubelets print in the zone of their node, in UTC and with nine
    decimals, so that text order is time order; None for what is no time."""
    found = re.fullmatch(r"(\S{19})(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", stamp)
    if found is None:
        return None
    second = datetime.fromisoformat(f"{found[1]}{found[3]}").astimezone(UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{found[2] or '':0<9}"
