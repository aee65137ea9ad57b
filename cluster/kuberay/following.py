"""Follow a run on KubeRay from its submission to its end."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from cluster.kuberay import progress, rayjob
from cluster.kuberay.api import MissingError, UnknownRunError
from cluster.kuberay.kept_logs import DriverLog, LogCursor, ReadResult
from cluster.kuberay.namespace_runs import Inspection, NamespaceRuns
from cluster.kuberay.overlays import Document
from cluster.kuberay.pod_problems import STATUS_CHECK_TIMEOUT, Problem, is_headless
from cluster.kuberay.run_state import (
    QUOTA_TAKEN_BACK,
    find_permanent_failure,
    is_being_deleted,
    submitters,
    to_state,
)
from cluster.run_folder import judge_deleted
from cluster.targets import JobState, OutOfReachError, Write
from pneumo.errors import AccessError, ConfigError, PneumoError

POLL_INTERVAL_S = 5.0
"""How often reading the log is interrupted to check the pods."""
LOG_END_TIMEOUT_S = 40.0
"""How long the driver of a deleted run may take to end, by its pod's preStop hook."""
HEADLESS_S = 120.0
"""A run without a head for this long is lost; an operator that replaces the head acts sooner."""
API_START_TIMEOUT_S = 60.0
"""How long a restarted API server may answer without knowing rights or RayJobs."""
MAX_RESUBMISSIONS = 2
"""How often a lost run is submitted again: as often as the operator retries a failed run."""


class RunFollower:
    """Passes the driver's log to `write` and other messages to `tell`."""

    def __init__(
        self, runs: NamespaceRuns, job_id: str, write: Write, tell: Write, retry_timeout_s: float
    ) -> None:
        self.runs, self.job_id, self.tell = runs, job_id, tell
        self.retry_timeout_s = retry_timeout_s
        self.told: set[object] = set()
        self.pod = ""
        self.log = DriverLog(write, tell)
        self.cursor = LogCursor(self.log)
        self.was_active = False
        self.has_run = False
        self.resubmissions = 0
        self.lost_at_s: float | None = None
        self.seen = False
        self.before: Inspection | None = None
        self.headless_since_s: float | None = None

    def follow(self) -> JobState:
        """Follow the run; returns its final state. Raises UnknownRunError; OutOfReachError when the
        API server stays unreachable, AccessError when it no longer accepts the credentials."""
        while True:
            try:
                state = self._poll()
            except OutOfReachError as error:
                self._wait_out(error, self.retry_timeout_s)
                continue
            except (AccessError, ConfigError) as error:
                if not self.seen:
                    raise
                self._wait_out(error, min(API_START_TIMEOUT_S, self.retry_timeout_s))
                continue
            if state is not None:
                return state

    def _poll(self) -> JobState | None:
        """Check the run once, then read its log or wait for a change; its final state, or None."""
        try:
            run = self.runs.inspect(self.job_id, self.before)
        except UnknownRunError:
            if self.before is None or not self.seen:
                raise
            self._read_log_end()
            folder, was_away = rayjob.log_folder(self.before.job), self.lost_at_s is not None
            return judge_deleted(self.job_id, folder, was_away=was_away)
        job, pods, found = run.job, run.pods.items, run.problems
        self.before, self.seen, self.lost_at_s = run, True, None
        state = to_state(job, found)
        if is_being_deleted(job):  # its log has not ended yet
            state = replace(state, phase="running")
        pod = self._submitter(pods)
        permanent = find_permanent_failure(job, state, found, self.log.exit_code)
        if permanent is None and self._resubmit_if_lost(job, pods):
            return None
        if permanent is None and not state.has_ended:
            self.was_active = True
            self._tell_state(job, pods, state, found)
            self._wait_for_change(job, pod)
            return None
        if pod:
            self.cursor.read_all(self.runs.api, pod)
        if permanent is not None:
            self.runs.cancel(self.job_id)
        return permanent or state

    def _read_log_end(self) -> None:
        """Read the rest of a deleted run's log: its driver may still write a checkpoint."""
        deadline_s = time.monotonic() + LOG_END_TIMEOUT_S
        left: ReadResult = "going on" if self.pod else "ended"
        while left != "ended" and time.monotonic() < deadline_s:
            left = self.cursor.read(self.runs.api, self.pod, follow=True, limit_s=POLL_INTERVAL_S)
        self.log.flush()

    def _wait_for_change(self, job: Document, pod: str) -> None:
        """Follow the log, or watch the RayJob, for some seconds."""
        left: ReadResult = "ended"
        if pod:
            left = self.cursor.read(self.runs.api, pod, follow=True, limit_s=POLL_INTERVAL_S)
        if left == "ended":
            version = job["metadata"]["resourceVersion"]
            self.runs.api.wait_for_change(self.job_id, version, int(POLL_INTERVAL_S))
        elif left == "broken":
            time.sleep(1.0)

    def _resubmit_if_lost(self, job: Document, pods: Sequence[Document]) -> bool:
        """Submit the run again if it is lost and the operator does not retry it: the operator ended
        it while we followed, or does not replace its head. Whether it was submitted."""
        why = self._find_loss(job, pods)
        if not why or not self.was_active or self.resubmissions == MAX_RESUBMISSIONS:
            return False
        old_id, self.job_id = self.job_id, self.runs.resubmit(job)
        self.resubmissions += 1
        self.tell(
            f"problem: {why}; submitted again as {self.job_id} ({self.resubmissions} of "
            f"{MAX_RESUBMISSIONS}), it resumes from its last checkpoint"
        )
        if not to_state(job, ()).has_ended:
            with suppress(MissingError):
                self.runs.api.delete_rayjob(old_id)
        self.seen, self.headless_since_s = False, None
        return True

    def _find_loss(self, job: Document, pods: Sequence[Document]) -> str:
        """Why the run is lost and the operator will not recover it; "" where it is not."""
        reason = (job.get("status") or {}).get("reason")
        if reason == STATUS_CHECK_TIMEOUT and to_state(job, ()).has_ended:
            return f"the operator did not reach the head of {self.job_id} for minutes and ended it"
        if not is_headless(job, pods):
            self.headless_since_s = None
            return ""
        self.headless_since_s = self.headless_since_s or time.monotonic()
        if time.monotonic() - self.headless_since_s < HEADLESS_S:
            return ""
        return f"the head of {self.job_id} is gone, and the operator starts no other"

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
            self.told.clear()  # the run will start again, so tell its steps again
            self._tell_once(QUOTA_TAKEN_BACK, f"waiting: {QUOTA_TAKEN_BACK}")
        for key, line in progress.steps(job, pods):
            self._tell_once(key, line)
        for problem in found:
            self._tell_once(problem.key, f"problem: {problem}")
        if state.phase == "waiting" and not found:
            self._tell_once(state.why, f"waiting: {state.why}")

    def _submitter(self, pods: Sequence[Document]) -> str:
        """The name of the newest submitter pod, whose log is the driver's; "" while none runs."""
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
