"""One person's look at a run on KubeRay, from its submission to its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.kuberay import progress
from cluster.kuberay.api import MissingError, UnknownRunError
from cluster.kuberay.kept_logs import DriverLog, LogCursor, ReadResult
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import STATUS_CHECK_TIMEOUT, Problem, is_headless
from cluster.kuberay.run_state import (
    QUOTA_TAKEN_BACK,
    find_permanent_failure,
    is_being_deleted,
    submitters,
    to_state,
)
from cluster.targets import JobState, OutOfReachError, Write
from pneumo.errors import AccessError, ConfigError, PneumoError

if TYPE_CHECKING:
    from cluster.kuberay.jobs import KubernetesTarget

POLL_INTERVAL_S = 5.0
"""A log is left this often to look whether the pods are well."""
LOG_END_TIMEOUT_S = 40.0
"""How long the driver of a run that was deleted may take to end, as `preStop` of its pod says."""
HEADLESS_S = 120.0
"""A run without a head for so long is lost; an operator that mends it acts sooner."""
API_START_TIMEOUT_S = 60.0
"""How long an API server that starts anew may know neither rights nor RayJobs yet."""
MOST_RESUBMISSIONS = 2
"""How often a lost run is submitted again: as often as the operator tries a failed one."""


class RunFollower:
    """Passes the driver's log to `write` and all else to `tell`."""

    def __init__(self, target: KubernetesTarget, job_id: str, write: Write, tell: Write) -> None:
        self.target, self.job_id, self.tell = target, job_id, tell
        self.told: set[object] = set()
        self.pod = ""
        self.log = DriverLog(write, tell)
        self.cursor = LogCursor(self.log)
        self.was_going_on = False
        self.has_run = False
        self.resubmissions = 0
        self.lost_at_s: float | None = None
        self.seen = False
        self.headless_since_s: float | None = None

    def follow(self) -> JobState:
        """How the run ended. Raises UnknownRunError, OutOfReachError when the API server stays
        away, AccessError when the credentials no longer suffice."""
        while True:
            try:
                state = self._poll()
            except OutOfReachError as error:
                self._wait_out(error, self.target.retry_timeout_s)
                continue
            except (AccessError, ConfigError) as error:
                if not self.seen:
                    raise
                self._wait_out(error, min(API_START_TIMEOUT_S, self.target.retry_timeout_s))
                continue
            if state is not None:
                return state

    def _poll(self) -> JobState | None:
        """Look once, and stay with the log or the RayJob for a while; the state if it ended."""
        try:
            job, pods, found = self.target.inspect(self.job_id)
        except UnknownRunError:
            if self.seen:
                self._read_log_end()
                return JobState(self.job_id, "cancelled", why="someone deleted the RayJob")
            raise
        self.seen, self.lost_at_s = True, None
        state = to_state(job, found)
        if is_being_deleted(job):  # the end of its log is still to come
            state = replace(state, phase="running")
        pod = self._submitter(pods)
        logged_exit_code = self.log.exit_code
        permanent = (
            None if state.has_ended else find_permanent_failure(job, state, found, logged_exit_code)
        )
        if permanent is None and self._resubmit_if_lost(job, pods):
            return None
        if permanent is None and not state.has_ended:
            self.was_going_on = True
            self._tell_state(job, pods, state, found)
        if permanent is not None or state.has_ended:
            if pod:
                self.cursor.read_all(self.target.api, pod)
            if permanent is not None:
                self.target.cancel(self.job_id)
            return permanent or state
        self._wait_for_change(job, pod)
        return None

    def _read_log_end(self) -> None:
        """The end of the log of a driver whose RayJob was deleted: it has time for a checkpoint."""
        deadline_s = time.monotonic() + LOG_END_TIMEOUT_S
        left: ReadResult = "going on" if self.pod else "ended"
        while left != "ended" and time.monotonic() < deadline_s:
            left = self.cursor.read(self.target.api, self.pod, follow=True, limit_s=POLL_INTERVAL_S)
        self.log.flush()

    def _wait_for_change(self, job: Document, pod: str) -> None:
        """With the log, or the RayJob, for some seconds."""
        left: ReadResult = "ended"
        if pod:
            left = self.cursor.read(self.target.api, pod, follow=True, limit_s=POLL_INTERVAL_S)
        if left == "ended":
            version = job["metadata"]["resourceVersion"]
            self.target.api.wait_for_change(self.job_id, version, int(POLL_INTERVAL_S))
        elif left == "broken":
            time.sleep(1.0)

    def _resubmit_if_lost(self, job: Document, pods: Sequence[Document]) -> bool:
        """Submit the run again where it is lost and the operator does not try again: it gave the
        run up while we looked, or the head is gone for good. Whether it was submitted."""
        why = self._find_loss(job, pods)
        if not why or not self.was_going_on or self.resubmissions == MOST_RESUBMISSIONS:
            return False
        before, self.job_id = self.job_id, self.target.resubmit(job)
        self.resubmissions += 1
        self.tell(
            f"problem: {why}; submitted again as {self.job_id} ({self.resubmissions} of "
            f"{MOST_RESUBMISSIONS}), it goes on from its last checkpoint"
        )
        if not to_state(job, ()).has_ended:
            with suppress(MissingError):
                self.target.api.delete_rayjob(before)
        self.seen, self.headless_since_s = False, None
        return True

    def _find_loss(self, job: Document, pods: Sequence[Document]) -> str:
        """How the run was lost without the operator mending it; "" where it was not."""
        if (job.get("status") or {}).get("reason") == STATUS_CHECK_TIMEOUT and to_state(
            job, ()
        ).has_ended:
            return (
                f"the operator did not reach the head of {self.job_id} for minutes and gave it up"
            )
        if not is_headless(job, pods):
            self.headless_since_s = None
            return ""
        self.headless_since_s = self.headless_since_s or time.monotonic()
        if time.monotonic() - self.headless_since_s < HEADLESS_S:
            return ""
        return f"the head of {self.job_id} is gone, and the operator makes no other"

    def _tell_state(
        self,
        job: Document,
        pods: Sequence[Document],
        state: JobState,
        found: Sequence[Problem],
    ) -> None:
        if state.phase == "running":
            self.has_run = True
        elif self.has_run and job["spec"].get("suspend"):
            self.has_run = False
            self.told.clear()  # what is said of a start is news again
            self._tell_once(QUOTA_TAKEN_BACK, f"waiting: {QUOTA_TAKEN_BACK}")
        for key, line in progress.steps(job, pods):
            self._tell_once(key, line)
        for problem in found:
            self._tell_once(problem.key, f"problem: {problem}")
        if state.phase == "waiting" and not found:
            self._tell_once(state.why, f"waiting: {state.why}")

    def _submitter(self, pods: Sequence[Document]) -> str:
        """The pod whose log is the driver's now; "" while there is none."""
        begun = submitters(pods)
        name = str(begun[-1]["metadata"]["name"]) if begun else ""
        if name and name != self.pod:
            if self.pod:
                self.tell(f"another submitter took over: {name}")
            self.log.begin()
            self.pod, self.cursor = name, LogCursor(self.log)
        return name

    def _wait_out(self, error: PneumoError, retry_timeout_s: float) -> None:
        now_s = time.monotonic()
        self.lost_at_s = self.lost_at_s or now_s
        if now_s - self.lost_at_s > retry_timeout_s:
            raise error
        self._tell_once("lost", f"{str(error).split(';')[0]}; the job goes on, trying again")
        time.sleep(1.0)

    def _tell_once(self, key: object, text: str) -> None:
        if key not in self.told:
            self.told.add(key)
            self.tell(text)
