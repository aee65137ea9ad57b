"""The runs of a namespace: RayJobs and their pods. Each attempt at a run is a RayJob of its own."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from cluster.kuberay import pod_problems, rayjob
from cluster.kuberay.api import AlreadyThereError, Api, MissingError, PodList, UnknownRunError
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import Problem
from cluster.kuberay.run_state import is_being_deleted, to_state
from cluster.targets import JobState, Write
from pneumo.errors import ClusterError

CANCEL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Inspection:
    """A RayJob, its pods, and their problems."""

    job: Document
    pods: PodList
    problems: Sequence[Problem]


@dataclass(frozen=True)
class NamespaceRuns:
    """Inspects, resubmits and cancels the runs of one namespace."""

    api: Api

    def inspect(self, job_id: str, before: Inspection | None = None) -> Inspection:
        """The run as it is, and the problems of pods that were deleted since `before`.

        Raises UnknownRunError.
        """
        try:
            job = self.api.get_rayjob(job_id)
        except MissingError as error:
            raise UnknownRunError(
                f"kubernetes: no RayJob '{job_id}' in namespace {self.api.namespace} of "
                f"{self.api.place}; python -m cluster list --target k8s shows those it knows"
            ) from error
        selector = f"{rayjob.RUN_LABEL}={job_id}"
        pods = self.api.list_pods(selector)
        deleted: list[Document] = []
        if before is not None and before.job["metadata"]["name"] == job_id:
            gone = _names(before.pods) - _names(pods)
            deleted = self.api.find_deleted(selector, before.pods, gone) if gone else []
        problems = pod_problems.find(job, pods.items, self.api.list_warnings(), deleted)
        return Inspection(job, pods, problems)

    def resubmit(self, job: Document) -> str:
        """Start a copy of the run, unless an attempt is running; returns that RayJob's name."""
        submission_id = job["metadata"]["labels"][rayjob.SUBMISSION_LABEL]
        names, running = self.attempts(submission_id)
        if running is None or running["metadata"]["name"] == job["metadata"]["name"]:
            running = rayjob.copy_for_retry(job, rayjob.next_name(submission_id, names))
            with suppress(AlreadyThereError):  # another follower was faster
                self.api.create_rayjob(running)
        return str(running["metadata"]["name"])

    def cancel(self, job_id: str) -> JobState:
        """Delete the RayJob: the operator stops the job and deletes its Ray cluster."""
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

    def attempts(self, submission_id: str) -> tuple[Sequence[str], Document | None]:
        """The names of the run's RayJobs, and the one that has not ended."""
        jobs = self.api.list_rayjobs(f"{rayjob.SUBMISSION_LABEL}={submission_id}")
        running = [job for job in jobs if not to_state(job, ()).has_ended]
        return [job["metadata"]["name"] for job in jobs], running[-1] if running else None

    def wait_until_gone(self, submission_id: str, tell: Write) -> None:
        """Wait until no RayJob or pod of a run that is being deleted can write to the run's folder.

        Pods outlive their RayJob to write a checkpoint. Raises ClusterError where a RayJob is still
        there after CANCEL_TIMEOUT_S; pods, as on a lost node, are not waited for longer.
        """
        selector = f"{rayjob.SUBMISSION_LABEL}={submission_id}"
        deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
        told = False
        while True:
            jobs = list(filter(is_being_deleted, self.api.list_rayjobs(selector)))
            left = jobs or list(filter(is_being_deleted, self.api.list_pods(selector).items))
            if not left:
                return
            name = left[0]["metadata"]["name"]
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


def _names(pods: PodList) -> set[str]:
    return {str(pod["metadata"]["name"]) for pod in pods.items}
