"""The interface that the two kinds of cluster share, a job's state, and remote addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from pneumo.errors import ClusterError, ConfigError

if TYPE_CHECKING:  # the configuration takes a quarter of a second to import
    from cluster.submission import Submission

Phase = Literal["waiting", "running", "succeeded", "failed", "cancelled"]

Write = Callable[[str], object]

RETRY_TIMEOUT_S = 600.0
"""How long a cluster that has answered before may be unreachable while a job is followed."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_remote(address: str) -> bool:
    """Whether `http://host:port` is reached over a network, for all that is known here: a port of
    this machine may be forwarded.

    Raises ConfigError for a malformed address.
    """
    try:
        host = urlsplit(address).hostname
    except ValueError as error:
        raise ConfigError(f"{address}: is no address: {error}") from error
    return (host or "") not in _LOOPBACK


class OutOfReachError(ClusterError):
    """For too long, the dashboard or API server gave no answer, or only temporary errors."""


class LostError(ClusterError):
    """The cluster has forgotten the job, which it knew before."""


def why_unanswered(error: Exception) -> str:
    """Why a server gave no answer, in a few words."""
    text = str(getattr(error, "reason", None) or error).lower()
    for mark, cause in (
        ("refused", "connection refused"),
        ("timed out", "timed out"),
        ("resol", "unknown host"),
        ("certificate", "its certificate is not trusted"),
        ("aborted", "the connection broke"),
        ("reset", "the connection broke"),
    ):
        if mark in text:
            return cause
    return type(error).__name__


@dataclass(frozen=True)
class JobState:
    """The state of a job.

    `target` is the URL that it writes to, `log_folder` that of its logs, if they are kept; `why`
    says in one line what it waits for or why it failed. Times are seconds since the epoch,
    `asked_s` is when it was submitted. `is_ours`: this project submitted it, for `owner`.
    `gpu_hours`: GPU time that its workers have held, if known.
    """

    id: str
    phase: Phase
    target: str = ""
    entrypoint: str = ""
    why: str = ""
    driver_exit_code: int | None = None
    asked_s: float | None = None
    started_s: float | None = None
    ended_s: float | None = None
    is_ours: bool = True
    owner: str = ""
    log_folder: str = ""
    gpu_hours: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.phase in {"succeeded", "failed", "cancelled"}

    @property
    def exit_code(self) -> int:
        """For a job that has ended: 0 done, 1 failed, 2 the user's mistake, 130 cancelled."""
        if self.phase == "succeeded":
            return 0
        if self.phase == "cancelled":
            return 130
        return self.driver_exit_code if self.driver_exit_code in {2, 130} else 1

    def __str__(self) -> str:
        return f"{self.id} {self.phase}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class Started:
    """A submitted job; `already_running`: it was submitted before."""

    id: str
    already_running: bool


class Target(Protocol):
    """A cluster that runs jobs."""

    @property
    def flags(self) -> str:
        """The flags of `python -m cluster` that select it."""
        ...

    @property
    def is_here(self) -> bool:
        """Whether its jobs run on this machine, with its files."""
        ...

    def submit(self, submission: Submission, tell: Write) -> Started:
        """Start the job unless it is running; `tell` gets what was sent. Raises ConfigError where
        a job with other settings writes to the same URL."""
        ...

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        """Pass the log to `write`, other messages to `tell`; returns the job's final state."""
        ...

    def list(self) -> Sequence[JobState]:
        """The jobs that the cluster knows, oldest first."""
        ...

    def state(self, job_id: str) -> JobState:
        """The state of a job. Raises ConfigError for an unknown job."""
        ...

    def logs(self, job_id: str) -> str:
        """The log so far."""
        ...

    def cancel(self, job_id: str) -> JobState:
        """Ask the job to stop and wait until it has; returns its final state."""
        ...
