"""KubeRay: a run as a RayJob in a namespace; submit, follow, list, cancel.

The driver's log is that of the submitter's pod. Nothing is kept on the laptop: whoever has the
rights of k8s/rbac may look again, from anywhere.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import run_folder
from cluster.kuberay import overlays, pod_problems, progress, rayjob
from cluster.kuberay.api import AlreadyThereError, Api, MissingError, UnknownRunError, lacking
from cluster.kuberay.following import RunFollower
from cluster.kuberay.kept_logs import DriverLog, LogCursor
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import Problem
from cluster.kuberay.run_state import is_being_deleted, submitters, to_state
from cluster.submission import Submission
from cluster.targets import JobState, Started, Write
from pneumo.errors import AccessError, ClusterError, ConfigError, PneumoError

RETRY_TIMEOUT_S = 600.0
"""How long an API server that was there may be out of reach while a job is followed."""
CANCEL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class KubernetesTarget:
    """A namespace with KubeRay, as a `Target`."""

    api: Api
    overlay: Path | None = None
    image: str | None = None
    workers: int | None = None
    run_url: str | None = None
    """Where the run writes whose log is asked for."""
    retry_timeout_s: float = RETRY_TIMEOUT_S

    @property
    def flags(self) -> str:
        context = f"--context {self.api.context} " if self.api.context else ""
        return f"--target k8s {context}--namespace {self.api.namespace}"

    def submit(self, submission: Submission, tell: Write) -> Started:
        folder = self.overlay or overlays.find_overlay(None)
        documents = overlays.render(folder)
        # Built before the cluster is asked: what does not fit needs none to be seen.
        job = self._build(documents, submission, submission.id)
        own = job["metadata"].get("namespace", self.api.namespace)
        if own != self.api.namespace:
            raise ConfigError(
                f"cluster: the overlay is of namespace {own}, not {self.api.namespace}; add "
                f"--namespace {own}"
            )
        missing = self.api.missing_rights()
        if missing:
            raise AccessError(
                f"kubernetes: {self.api.place}: {lacking(missing, self.api.namespace)}"
            )
        names, running = self._attempts(submission.id)
        if running is not None:
            started = _join(running, submission)
            for difference in rayjob.differences(job, running):
                tell(f"it goes on as it was started: {difference}")
            return started
        self._wait_until_gone(submission.id, tell)
        if names:
            job = self._build(documents, submission, rayjob.next_name(submission.id, names))
        try:
            self.api.create_rayjob(job)
        except AlreadyThereError:  # an answer that got lost, or someone else, just now
            name = job["metadata"]["name"]
            return replace(_join(self.api.get_rayjob(name), submission), already_running=False)
        _describe(job, submission, folder.name, tell)
        return Started(job["metadata"]["name"], already_running=False)

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        return RunFollower(self, job_id, write, tell).follow()

    def resubmit(self, job: Document) -> str:
        """Start a run once more, as it was; the new RayJob's name."""
        submission_id = job["metadata"]["labels"][rayjob.SUBMISSION_LABEL]
        names, running = self._attempts(submission_id)
        if running is None or running["metadata"]["name"] == job["metadata"]["name"]:
            running = rayjob.copy_for_retry(job, rayjob.next_name(submission_id, names))
            with suppress(AlreadyThereError):  # another follower was quicker
                self.api.create_rayjob(running)
        return str(running["metadata"]["name"])

    def list(self) -> list[JobState]:
        jobs = self.api.list_rayjobs(rayjob.SELECTOR)
        jobs.sort(key=lambda job: job["metadata"]["creationTimestamp"])
        return [to_state(job, ()) for job in jobs]

    def state(self, job_id: str) -> JobState:
        job, pods, found = self.inspect(job_id)
        return replace(to_state(job, found), gpu_hours=progress.gpu_hours(job, pods, time.time()))

    def logs(self, job_id: str) -> str:
        """The log so far, after those of earlier attempts, whose pods are gone."""
        try:
            job, pods, _ = self.inspect(job_id)
        except ConfigError as error:
            if self.run_url is None:
                raise ConfigError(
                    f"{error}; the log of one that was deleted lies where it wrote: add --run URL"
                ) from error
            folder = f"{self.run_url}/logs/{job_id}"
            kept = run_folder.read_logs(folder)
            if not kept:
                raise ConfigError(
                    f"kubernetes: no log lies in {folder}; is --run where {job_id} wrote?"
                ) from error
            return "".join(_kept(folder, kept))
        lines: list[str] = []
        there = submitters(pods)[-1:]
        for pod in there:
            cursor = LogCursor(DriverLog(lines.append, lambda _: None))
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

    def inspect(self, job_id: str) -> tuple[Document, Sequence[Document], Sequence[Problem]]:
        """The RayJob, its pods, and what is wrong with them. Raises UnknownRunError."""
        try:
            job = self.api.get_rayjob(job_id)
        except MissingError as error:
            raise UnknownRunError(
                f"kubernetes: no RayJob '{job_id}' in namespace {self.api.namespace} of "
                f"{self.api.place}; python -m cluster list --target k8s shows those there are"
            ) from error
        pods = self.api.list_pods(f"{rayjob.RUN_LABEL}={job_id}")
        return job, pods, pod_problems.find(job, pods, self.api.list_warnings())

    def _build(self, documents: Sequence[Document], submission: Submission, name: str) -> Document:
        folder = self.overlay or Path()
        overlay = folder.name if folder.parent == overlays.OVERLAYS else str(folder)
        return rayjob.build(
            documents,
            submission,
            name=name,
            overlay=overlay,
            image=self.image,
            workers=self.workers,
        )

    def _attempts(self, submission_id: str) -> tuple[Sequence[str], Document | None]:
        """The names of the run's attempts, and the one that has not ended."""
        jobs = self.api.list_rayjobs(f"{rayjob.SUBMISSION_LABEL}={submission_id}")
        running = [job for job in jobs if not to_state(job, ()).has_ended]
        return [job["metadata"]["name"] for job in jobs], running[-1] if running else None

    def _wait_until_gone(self, submission_id: str, tell: Write) -> None:
        """Return once nothing of the run that is being deleted can write where the next will.

        Pods outlive their RayJob, for a checkpoint; one on a node that is lost is not waited for
        longer than the others.
        """
        selector = f"{rayjob.SUBMISSION_LABEL}={submission_id}"
        deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
        told = False
        while True:
            jobs = list(filter(is_being_deleted, self.api.list_rayjobs(selector)))
            things = jobs or list(filter(is_being_deleted, self.api.list_pods(selector)))
            if not things:
                return
            name = things[0]["metadata"]["name"]
            if not told:
                tell(f"waiting: for {name} to be gone, which is being deleted")
            told = True
            if time.monotonic() > deadline_s:
                break
            time.sleep(1.0)
        if jobs:
            raise ClusterError(
                f"kubernetes: {name} writes the same place and is still being deleted after "
                f"{CANCEL_TIMEOUT_S:g} s; submit again when list shows it no more"
            )


def _earlier_logs(job: Document, *, is_there: bool) -> Iterator[str]:
    """The logs of attempts whose pods are gone; the last attempt's are not, where `is_there`."""
    folder = rayjob.log_folder(job)
    failed = (job.get("status") or {}).get("failed", 0)
    if not folder or (not failed and (is_there or not to_state(job, ()).has_ended)):
        return
    try:
        kept = run_folder.read_logs(folder)
    except PneumoError as error:
        yield f"--- the logs of other attempts are in {folder}, and cannot be read here: {error}\n"
        return
    yield from _kept(folder, kept[:-1] if is_there else kept)
    if kept[1:] and is_there:
        yield "--- the last attempt\n"


def _kept(folder: str, logs: Sequence[run_folder.KeptLog]) -> Iterator[str]:
    for log in logs:
        yield f"--- the attempt of {log.name} UTC, kept in {folder}\n{log.text}"


def _describe(job: Document, submission: Submission, overlay: str, tell: Write) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    each = rayjob.describe_limits(container)
    tell(f"overlay {overlay}: {group['replicas']} workers of {each}; image {container['image']}")
    if submission.secrets:
        tell(
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
