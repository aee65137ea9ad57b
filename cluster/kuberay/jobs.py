"""KubeRay: a run as a RayJob in a namespace; submit, follow, list, cancel.

The driver's log is that of the submitter's pod. Nothing is kept on the laptop: anyone with the
rights of k8s/rbac can follow or cancel a run, from any machine.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import run_folder
from cluster.kuberay import overlays, progress, rayjob
from cluster.kuberay.api import AlreadyThereError, Api, lacking
from cluster.kuberay.following import RunFollower
from cluster.kuberay.kept_logs import DriverLog, LogCursor
from cluster.kuberay.namespace_runs import NamespaceRuns
from cluster.kuberay.overlays import Document
from cluster.kuberay.run_state import submitters, to_state
from cluster.submission import Submission
from cluster.targets import RETRY_TIMEOUT_S, JobState, Started, Write
from pneumo import storage
from pneumo.errors import AccessError, ConfigError, PneumoError


@dataclass(frozen=True)
class KubernetesTarget:
    """A namespace with KubeRay, as a `Target`."""

    api: Api
    overlay: Path | None = None
    image: str | None = None
    workers: int | None = None
    run_url: str | None = None
    """The folder of the run, for the log of a deleted RayJob."""
    retry_timeout_s: float = RETRY_TIMEOUT_S
    is_followed: bool = True
    """Whether the user follows what is submitted; False with --detach."""

    @property
    def _runs(self) -> NamespaceRuns:
        return NamespaceRuns(self.api)

    @property
    def flags(self) -> str:
        context = f"--context {self.api.context} " if self.api.context else ""
        return f"--target k8s {context}--namespace {self.api.namespace}"

    @property
    def is_here(self) -> bool:
        return False

    def submit(self, submission: Submission, tell: Write) -> Started:
        folder = self.overlay or overlays.find_overlay(None)
        documents = overlays.render(folder)
        # Built before the first request: a mistake in it can be reported without a cluster.
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
        names, running = self._runs.attempts(submission.id)
        if running is not None:
            started = _join(running, submission)
            for difference in rayjob.differences(job, running):
                tell(f"it keeps running with {difference}")
            return started
        self._runs.wait_until_gone(submission.id, tell)
        if names:
            job = self._build(documents, submission, rayjob.next_name(submission.id, names))
        try:
            self.api.create_rayjob(job)
        except AlreadyThereError:  # an answer was lost, or someone else has just submitted it
            name = job["metadata"]["name"]
            return replace(_join(self.api.get_rayjob(name), submission), already_running=False)
        _describe(job, submission, folder.name, tell)
        if not self.is_followed:
            _describe_wait(job, tell)
        return Started(job["metadata"]["name"], already_running=False)

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        return RunFollower(self._runs, job_id, write, tell, self.retry_timeout_s).follow()

    def cancel(self, job_id: str) -> JobState:
        return self._runs.cancel(job_id)

    def list(self) -> list[JobState]:
        jobs = self.api.list_rayjobs(rayjob.SELECTOR)
        jobs.sort(key=lambda job: job["metadata"]["creationTimestamp"])
        return [to_state(job, ()) for job in jobs]

    def state(self, job_id: str) -> JobState:
        run = self._runs.inspect(job_id)
        gpu_hours = progress.gpu_hours(run.job, run.pods.items, time.time())
        return replace(to_state(run.job, run.problems), gpu_hours=gpu_hours)

    def logs(self, job_id: str) -> str:
        """The log so far, after those of earlier attempts, whose pods are gone."""
        try:
            run = self._runs.inspect(job_id)
        except ConfigError as error:
            if self.run_url is None:
                raise ConfigError(
                    f"{error}; the log of a deleted run is in its folder: add --run URL"
                ) from error
            folder = storage.join(storage.normalise(self.run_url), "logs", job_id)
            kept = run_folder.read_logs(folder)
            if not kept:
                raise ConfigError(
                    f"kubernetes: no log in {folder}; is --run the URL that {job_id} wrote to?"
                ) from error
            return "".join(_format_logs(folder, kept))
        lines: list[str] = []
        last = submitters(run.pods.items)[-1:]
        for pod in last:
            cursor = LogCursor(DriverLog(lines.append, lambda _: None))
            cursor.read_all(self.api, pod["metadata"]["name"])
        return "".join([*_earlier_logs(run.job, has_pod=bool(last)), *lines])

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
            is_followed=self.is_followed,
        )


def _earlier_logs(job: Document, *, has_pod: bool) -> Iterator[str]:
    """The kept logs of attempts whose pods are gone; `has_pod`: the last attempt's is not."""
    folder = rayjob.log_folder(job)
    failed = (job.get("status") or {}).get("failed", 0)
    if not folder or (not failed and (has_pod or not to_state(job, ()).has_ended)):
        return
    try:
        kept = run_folder.read_logs(folder)
    except PneumoError as error:
        yield f"--- the logs of other attempts are in {folder}, and cannot be read here: {error}\n"
        return
    yield from _format_logs(folder, kept[:-1] if has_pod else kept)
    if kept[1:] and has_pod:
        yield "--- the last attempt\n"


def _format_logs(folder: str, logs: Sequence[run_folder.KeptLog]) -> Iterator[str]:
    for log in logs:
        yield f"--- the attempt of {log.name} UTC, kept in {folder}\n{log.text}"


def _describe(job: Document, submission: Submission, overlay: str, tell: Write) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    limits = rayjob.describe_limits(container)
    tell(f"overlay {overlay}: {group['replicas']} workers of {limits}; image {container['image']}")
    if submission.secrets:
        tell(
            f"not sent, as they are secrets: {', '.join(submission.secrets)}; the pods get "
            f"theirs from the Kubernetes secret {rayjob.SECRETS}"
        )


def _describe_wait(job: Document, tell: Write) -> None:
    spec = job["spec"]
    attempts, wait_s = 1 + spec.get("backoffLimit", 0), spec.get("preRunningDeadlineSeconds")
    if wait_s:
        tell(f"it waits {wait_s} s for its nodes, in each of at most {attempts} attempts")


def _join(running: Document, submission: Submission) -> Started:
    metadata = running["metadata"]
    if (metadata.get("annotations") or {}).get(rayjob.SETTINGS) != submission.settings:
        raise ConfigError(
            f"{submission.job}: {submission.target} is being written by {metadata['name']} with "
            "other settings; follow it, cancel it, or write to another URL"
        )
    return Started(metadata["name"], already_running=True)
