"""The Ray Jobs API of a running cluster: preflight, submit, follow, list, cancel.

Every call has a time limit, and every failure is an error of `pneumo.errors`: exit code 1 for a
cluster that does not answer, 2 (the user's mistake) for a wrong address, token or id.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from cluster.ray.client import Client, RefusedError
from cluster.ray.following import TRIES, follow
from cluster.ray.sent_code import Package, collect, stage
from cluster.targets import JobState, OutOfReachError, Phase, Started, Write, is_remote
from pneumo.errors import INTERRUPTED, ClusterError, ConfigError, PneumoError
from pneumo.version import REVISION, find_revision

if TYPE_CHECKING:
    from cluster.submission import Submission

STOP_WITH_SIGINT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""Makes Ray's job supervisor cancel a job by SIGINT, with time to write a checkpoint; Ray's default
is SIGTERM, which ends a driver abnormally, and SIGKILL after 3 s."""

PYTHONS = ("3.11", "3.12")
"""The versions that pyproject.toml's requires-python allows; a test compares the two."""

_PREFLIGHT = "preflight"

PREFLIGHT_TIMEOUT_S = 90.0
"""Time limit of the preflight job; most of it is Ray starting a job."""

_PHASES: Mapping[JobStatus, Phase] = {
    JobStatus.PENDING: "waiting",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.STOPPED: "cancelled",
}


@dataclass(frozen=True)
class RayTarget:
    """A running Ray cluster, as a `Target`."""

    address: str
    client: Client

    @property
    def flags(self) -> str:
        return f"--address {self.address}"

    @property
    def is_here(self) -> bool:
        return self.client.is_here

    def submit(self, submission: Submission, tell: Write) -> Started:
        code = collect()
        if submission.secrets and self.address.startswith("http://") and is_remote(self.address):
            tell(
                f"warning: {', '.join(submission.secrets)} will go to {self.address} unencrypted; "
                "forward the port (ssh -L, make forward), or give an https:// address"
            )
        check_versions(self.client)
        _, running = _attempts(self.client, submission.id)
        # A place that is reachable from here may be out of reach for the cluster.
        has_urls = any("://" in url for url in submission.places)
        if running is None and (has_urls or not self.client.is_here):
            tell(preflight(self.client, submission, code))
        started = submit(self.client, submission, code)
        if not started.already_running:
            tell(f"sent {code}; environment: {', '.join(submission.environment) or 'none'}")
        return started

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        return self._ended(follow(self.client, job_id, write, tell))

    def list(self) -> list[JobState]:
        return [state(info) for info in list_jobs(self.client)]

    def state(self, job_id: str) -> JobState:
        info = self.client.details(job_id)
        return replace(self._ended(info), gpu_hours=gpu_hours(self.client, info))

    def logs(self, job_id: str) -> str:
        return self.client.log_text(job_id)

    def cancel(self, job_id: str) -> JobState:
        return self._ended(cancel(self.client, job_id))

    def _ended(self, info: JobDetails) -> JobState:
        """The job's state; for a cancelled job also whether it had to be killed. Ray does not tell
        that, but a job of this project that is interrupted ends its log with a line."""
        found = state(info)
        if found.phase != "cancelled" or not found.is_ours:
            return found
        log = self.client.log_text(found.id)
        if not log or INTERRUPTED in log or "KeyboardInterrupt" in log:
            return found
        why = "it did not stop by itself and was killed; its last checkpoint is kept"
        return replace(found, why=why)


def check_versions(client: Client) -> None:
    """Raise ConfigError when this checkout does not support the cluster's Ray or Python."""
    response = client._do_request("GET", "/api/v0/cluster_metadata")
    try:
        metadata = response.json()["data"]
        ray_version, python_version = str(metadata["rayVersion"]), str(metadata["pythonVersion"])
    except (requests.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cluster: {client.get_address()} did not report its versions (HTTP "
            f"{response.status_code}); expected Ray {version('ray')}"
        ) from error
    remedy = "start it from this checkout's image (make image) or requirements.lock"
    if _minor(ray_version) != _minor(version("ray")):
        raise ConfigError(
            f"cluster: {client.get_address()} runs Ray {ray_version}, this checkout is for "
            f"{version('ray')}; {remedy}"
        )
    if _minor(python_version) not in PYTHONS:
        raise ConfigError(
            f"cluster: {client.get_address()} runs Python {python_version}, this checkout is for "
            f"{' and '.join(PYTHONS)}; {remedy}"
        )


def preflight(client: Client, submission: Submission, package: Package) -> str:
    """Check on the cluster that it reaches the job's places; returns the check's line.

    Raises ConfigError or ClusterError with the line that says what is out of reach.
    """
    job_id = f"{submission.id}-preflight-{secrets.token_hex(4)}"
    request = {"entrypoint": submission.preflight, "metadata": {"job": _PREFLIGHT}}
    _send(client, package, submission.environment, submission_id=job_id, **request)
    try:
        info = _wait(client, job_id, PREFLIGHT_TIMEOUT_S)
        text = client.log_text(job_id)
    finally:  # not deleted: Ray may write its status later, and so recreate it without metadata
        with suppress(PneumoError):
            client.stop_job(job_id)
    answer = ([line for line in text.splitlines() if "preflight: " in line] or [""])[-1]
    if info.status == JobStatus.SUCCEEDED:
        return answer
    if not info.status.is_terminal():
        raise ClusterError(
            f"cluster: the preflight job did not end within {PREFLIGHT_TIMEOUT_S:g} s: "
            f"{_first_line(info.message) or info.status.value}"
        )
    error = ConfigError if info.driver_exit_code == 2 else ClusterError
    answer = answer.removeprefix("error: ")
    raise error(answer or f"cluster: the preflight job failed: {failure(info)}")


def state(info: JobDetails) -> JobState:
    """A job's state, from Ray's details."""
    metadata, start_s = info.metadata or {}, info.start_time / 1000 if info.start_time else None
    why = _first_line(info.message) if info.status == JobStatus.PENDING else ""
    return JobState(
        id=str(info.submission_id),
        phase=_PHASES[info.status],
        target=metadata.get("target", ""),
        entrypoint=info.entrypoint,
        why=failure(info) if info.status == JobStatus.FAILED else why,
        driver_exit_code=info.driver_exit_code,
        asked_s=start_s,
        started_s=start_s,
        ended_s=info.end_time / 1000 if info.end_time else None,
        is_ours="settings" in metadata,
        owner=metadata.get("owner", ""),
    )


def submit(client: Client, submission: Submission, package: Package) -> Started:
    """Send the code and start the job, unless it is running already.

    A job that has ended may be submitted again, as `<id>-2`, `<id>-3`…: Ray accepts an id once.
    Raises ConfigError when a job with other settings is writing to the same URL.
    """
    attempts, running = _attempts(client, submission.id)
    if running is not None:
        return _join(running, submission)
    new_id = submission.id if attempts == 0 else f"{submission.id}-{attempts + 1}"
    metadata = {
        "job": submission.job,
        "target": submission.target,
        "settings": submission.settings,
        "owner": submission.owner,
        "workers": _gpu_workers(submission),
    }
    revision = find_revision(package.root)  # on the cluster, the sent code cannot find its own
    environment = {
        **submission.environment,
        **STOP_WITH_SIGINT,
        **({REVISION: revision} if revision else {}),
    }
    request = {"entrypoint": submission.entrypoint, "metadata": metadata}
    try:
        _send(client, package, environment, submission_id=new_id, **request)
    except RefusedError:
        # Someone may have submitted the same job between our check and our request.
        _, running = _attempts(client, submission.id)
        if running is None:
            raise
        return _join(running, submission)
    except OutOfReachError:
        # The answer may be lost although the job was submitted.
        if not _has_begun(client, new_id, submission):
            raise
    return Started(new_id, already_running=False)


def _send(client: Client, package: Package, environment: Mapping[str, str], **request: Any) -> None:
    """Upload the code and start a job in it; `request`: arguments of Ray's `submit_job`."""
    with tempfile.TemporaryDirectory(prefix="pneumo-") as folder:
        stage(package, Path(folder))
        runtime_env = {"working_dir": folder, "env_vars": dict(environment)}
        client.submit_job(runtime_env=runtime_env, **request)


def _gpu_workers(submission: Submission) -> str:
    """How many workers may hold a GPU each; "": as many as the cluster has GPUs."""
    resources = submission.resources
    if resources is None or submission.job == "tune":
        return ""
    return "0" if resources.use_gpu is False else str(resources.num_workers)


def gpu_hours(client: Client, info: JobDetails) -> float | None:
    """GPU hours that a job has held so far: a GPU for each worker, but at most those the cluster
    has now. None where the cluster does not say."""
    if not info.start_time:
        return 0.0
    end_s = info.end_time / 1000 if info.end_time else time.time()
    with suppress(PneumoError, requests.JSONDecodeError, KeyError, TypeError):
        answer = client._do_request("GET", "/api/v0/nodes?detail=1&limit=10000").json()
        nodes = answer["data"]["result"]["result"]
        alive = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
        gpus = float(sum(resources.get("GPU", 0) for resources in alive))
        workers = (info.metadata or {}).get("workers") or gpus
        taken_s = float(end_s - info.start_time / 1000)
        return min(float(workers), gpus) * taken_s / 3600
    return None


def _has_begun(client: Client, job_id: str, submission: Submission) -> bool:
    """Whether a request without an answer has started the job nevertheless."""
    for _ in range(TRIES):
        time.sleep(1.0)
        with suppress(OutOfReachError, ConfigError):
            info = client.details(job_id)
            return (info.metadata or {}).get("settings") == submission.settings
    return False


def list_jobs(client: Client) -> list[JobDetails]:
    """The submitted jobs that the cluster knows, oldest first."""
    jobs = [
        info
        for info in client.list_jobs()
        if info.submission_id is not None and (info.metadata or {}).get("job") != _PREFLIGHT
    ]
    return sorted(jobs, key=lambda info: info.start_time or 0)


def cancel(client: Client, job_id: str, *, timeout_s: float = 45.0) -> JobDetails:
    """Ask the job to stop and wait until it has ended, maybe by itself; returns its details."""
    with client.unknown_job(job_id):
        client.stop_job(job_id)
    return _wait(client, job_id, timeout_s)


def failure(info: JobDetails) -> str:
    """Why a job failed, in one line."""
    if info.driver_exit_code is None:
        return _first_line(info.message) or "it never started"
    if info.driver_exit_code == 127:
        return (
            "exit code 127: the cluster has no command 'python'; start Ray with the environment "
            "that holds this project's dependencies first on PATH"
        )
    return f"exit code {info.driver_exit_code}"


def _wait(client: Client, job_id: str, timeout_s: float) -> JobDetails:
    """The job's details once it has ended, or after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        info = client.details(job_id)
        if info.status.is_terminal() or time.monotonic() > deadline_s:
            return info
        time.sleep(0.5)


def _minor(version_text: str) -> str:
    return ".".join(version_text.split(".")[:2])


def _attempts(client: Client, base: str) -> tuple[int, JobDetails | None]:
    """The highest number used in the ids `base`, `base-2`, …, and the job that has not ended."""
    highest, running = 0, None
    for info in list_jobs(client):
        name, _, number = str(info.submission_id).removeprefix(base).partition("-")
        if not str(info.submission_id).startswith(base) or name or not (number or "1").isdigit():
            continue
        highest = max(highest, int(number or "1"))
        running = running if info.status.is_terminal() else info
    return highest, running


def _join(running: JobDetails, submission: Submission) -> Started:
    if (running.metadata or {}).get("settings") != submission.settings:
        raise ConfigError(
            f"{submission.job}: {submission.target} is being written by {running.submission_id} "
            "with other settings; follow it, cancel it, or write to another URL"
        )
    return Started(str(running.submission_id), already_running=True)


def _first_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[0]
