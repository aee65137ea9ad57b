"""The Ray Jobs API of a running cluster: submit, follow, list, cancel.

Every call has a time limit, and every failure is an error of `pneumo.errors`: a cluster that does
not answer is exit code 1, a wrong address, token or id is the user's 2. The token comes from the
environment as Ray reads it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.package import Package, stage
from cluster.submission import Submission
from pneumo.errors import AccessError, ConfigError, PneumoError

CONNECT_TIMEOUT_S = 5.0
FIRST_ANSWER_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0
SILENCE_S = 60.0
"""A log that says nothing for this long is asked for again: its connection may be dead."""
PATIENCE_S = 600.0
"""How long a cluster that was there may be out of reach while its log is followed."""

STOP_GENTLY = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""For the job's supervisor: a cancelled job gets Ctrl-C and time to finish a checkpoint; Ray's
default is SIGTERM, which ends a driver abnormally, and SIGKILL after 3 s."""

Write = Callable[[str], object]


class OutOfReachError(PneumoError):
    """The cluster's dashboard did not answer in time, or not at all."""


class _RefusedError(PneumoError):
    """The cluster answered that it will not; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class Client(JobSubmissionClient):  # type: ignore[misc]  # ray is untyped
    """Ray's client with time limits and with this project's errors.

    Ray's own sets no time limit on a request, and raises bare RuntimeErrors. The two methods below
    are private to Ray, which is why its version is pinned to one minor release.
    """

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer_s = FIRST_ANSWER_TIMEOUT_S if endpoint == "/api/version" else ANSWER_TIMEOUT_S
        options.setdefault("timeout", (CONNECT_TIMEOUT_S, answer_s))
        try:
            response: requests.Response = super()._do_request(method, endpoint, **options)
        except AuthenticationError as error:
            raise AccessError(
                f"cluster: {self._address} refuses the token; set RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the one that the cluster was started with"
            ) from error
        except requests.RequestException as error:
            raise OutOfReachError(
                f"cluster: no answer from {self._address} ({_cause(error)}); is the address that "
                "of a running Ray dashboard, and is the port forwarded?"
            ) from error
        if endpoint == "/api/version" and not _is_dashboard(response):
            raise ConfigError(
                f"cluster: {self._address} answers, but is no Ray dashboard (HTTP "
                f"{response.status_code}); give its address, usually http://HEAD:8265"
            )
        return response

    def _raise_error(self, r: requests.Response) -> NoReturn:
        lines = r.text.strip().splitlines() or ["no reason given"]
        raise _RefusedError(
            f"cluster: {self._address} refused (HTTP {r.status_code}): {lines[-1]}", r.status_code
        )


@dataclass(frozen=True)
class Started:
    """A job on the cluster; `already_running`: it was there before it was asked for."""

    id: str
    already_running: bool


def connect(address: str, environ: Mapping[str, str]) -> Client:
    """A client of the dashboard at `http://host:port`.

    Raises ConfigError for an address of another form, AccessError for a wrong token,
    OutOfReachError when nothing answers within seconds.
    """
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"cluster: got address '{address}', expected that of the dashboard: http://HEAD:8265"
        )
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    token = _token(environ)
    with _hidden("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)


def submit(client: Client, submission: Submission, package: Package) -> Started:
    """Send the code and start the job, unless it is running already.

    A job that has ended may be submitted again, as `<id>-2`, `<id>-3`…: Ray takes an id once.
    Raises ConfigError when the same place is being written with other settings.
    """
    attempts, running = _attempts(client, submission.id)
    if running is not None:
        return _join(running, submission)
    new_id = submission.id if attempts == 0 else f"{submission.id}-{attempts + 1}"
    with tempfile.TemporaryDirectory(prefix="pneumo-") as folder:
        stage(package, Path(folder), submission.recipe)
        try:
            client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=new_id,
                metadata={
                    "job": submission.job,
                    "target": submission.target,
                    "settings": submission.settings,
                },
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {**submission.environment, **STOP_GENTLY},
                },
            )
        except _RefusedError:
            # Someone may have submitted the same between our look and our request.
            _, running = _attempts(client, submission.id)
            if running is None:
                raise
            return _join(running, submission)
    return Started(new_id, already_running=False)


def follow(
    client: Client,
    job_id: str,
    write: Write,
    note: Write = lambda _: None,
    *,
    silence_s: float = SILENCE_S,
    patience_s: float = PATIENCE_S,
) -> JobDetails:
    """Pass the job's log to `write` until the job has ended; what it ended as.

    The stream may drop: it is taken up again where it stopped, without a gap and without a line
    twice. `note` gets what there is to say besides. Raises OutOfReachError after `patience_s`
    without an answer; the job goes on.
    """
    cursor = _Cursor(write)
    notes: set[str] = set()
    lost_at_s: float | None = None
    while True:
        asyncio.run(_stream(client, job_id, cursor, silence_s))
        try:
            info = details(client, job_id)
            if info.status.is_terminal():
                cursor.show_from_start(logs(client, job_id))
                return info
        except OutOfReachError as error:
            lost_at_s = lost_at_s or time.monotonic()
            if time.monotonic() - lost_at_s > patience_s:
                raise
            text = f"{str(error).split(';')[0]}; the job goes on, trying again"
        else:
            lost_at_s = None
            text = f"waiting: {info.message}" if info.status == JobStatus.PENDING else ""
        if text and text not in notes:
            notes.add(text)
            note(text)
        time.sleep(1.0)


def details(client: Client, job_id: str) -> JobDetails:
    """What the cluster knows of a job. Raises ConfigError when it knows no such job."""
    with _unknown_job(client, job_id):
        return client.get_job_info(job_id)


def list_jobs(client: Client) -> list[JobDetails]:
    """The submitted jobs that the cluster remembers, oldest first."""
    jobs = [info for info in client.list_jobs() if info.submission_id is not None]
    return sorted(jobs, key=lambda info: info.start_time or 0)


def logs(client: Client, job_id: str) -> str:
    """The job's log so far; empty when its node is gone. Raises ConfigError for an unknown job."""
    try:
        with _unknown_job(client, job_id):
            return str(client.get_job_logs(job_id))
    except _RefusedError:
        return ""


def cancel(client: Client, job_id: str, *, timeout_s: float = 45.0) -> JobDetails:
    """Ask the job to stop and wait until it has; what it ended as, which may be its own doing."""
    with _unknown_job(client, job_id):
        client.stop_job(job_id)
    deadline_s = time.monotonic() + timeout_s
    while True:
        info = details(client, job_id)
        if info.status.is_terminal() or time.monotonic() > deadline_s:
            return info
        time.sleep(0.5)


def exit_code(info: JobDetails) -> int:
    """The exit code of a job that has ended: 0 done, 1 failed, 2 user's mistake, 130 cancelled."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 130
    return info.driver_exit_code if info.driver_exit_code in {2, 130} else 1


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


@dataclass
class _Cursor:
    """How much of a log has been written; each stream of it begins at the start."""

    write: Write
    written: int = 0

    def show_from_start(self, text: str) -> None:
        self.show(text, 0)

    def show(self, text: str, position: int) -> None:
        new = text[max(0, self.written - position) :]
        if new:
            self.write(new)
            self.written += len(new)


async def _stream(client: Client, job_id: str, cursor: _Cursor, silence_s: float) -> None:
    """Show the log as it comes, until its stream ends, breaks or falls silent."""
    stream = client.tail_job_logs(job_id)
    position = 0
    try:
        while True:
            try:
                # Not wait_for: in Python 3.11 it can swallow a Ctrl-C that comes with a chunk.
                async with asyncio.timeout(silence_s):
                    chunk = await anext(stream)
            except Exception:  # whatever it was, the next request tells more about it
                return
            cursor.show(chunk, position)
            position += len(chunk)
    finally:
        await stream.aclose()


def _attempts(client: Client, base: str) -> tuple[int, JobDetails | None]:
    """How many numbers of `base` are used up, and the one of them that has not ended."""
    used, running = 0, None
    for info in list_jobs(client):
        name, _, number = str(info.submission_id).removeprefix(base).partition("-")
        if not str(info.submission_id).startswith(base) or name or not (number or "1").isdigit():
            continue
        used = max(used, int(number or "1"))
        running = running if info.status.is_terminal() else info
    return used, running


def _join(running: JobDetails, submission: Submission) -> Started:
    if (running.metadata or {}).get("settings") != submission.settings:
        raise ConfigError(
            f"{submission.job}: {submission.target} is being written by {running.submission_id} "
            "with other settings; follow it, cancel it, or give another place to write"
        )
    return Started(str(running.submission_id), already_running=True)


@contextmanager
def _unknown_job(client: Client, job_id: str) -> Iterator[None]:
    try:
        yield
    except _RefusedError as error:
        if error.status != 404:
            raise
        raise ConfigError(
            f"cluster: no job '{job_id}' at {client.get_address()}; "
            "python -m cluster list shows those it remembers"
        ) from error


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Ray lets these variables override the address that it is given; the caller has decided."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named is None:
            return None
        raise ConfigError(
            f"cluster: RAY_AUTH_TOKEN_PATH={path}: {error.strerror}; give a readable file"
        ) from error


def _is_dashboard(response: requests.Response) -> bool:
    try:
        return response.ok and "ray_version" in response.json()
    except (requests.JSONDecodeError, TypeError):
        return False


def _cause(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "timed out"
    text = str(error)
    for mark, cause in (("refused", "connection refused"), ("resol", "unknown host")):
        if mark in text.lower():
            return cause
    return type(error).__name__


def _first_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[0]
