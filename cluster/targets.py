"""What the two kinds of cluster have in common: a job's state, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from pneumo.errors import ClusterError, ConfigError

if TYPE_CHECKING:  # what reads the configuration takes a quarter of a second to import
    from cluster.submission import Submission

Phase = Literal["waiting", "running", "succeeded", "failed", "cancelled"]

Write = Callable[[str], object]


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_remote(address: str) -> bool:
    """Whether `http://host:port` is another machine. A forwarded port looks like this one.

    Raises ConfigError for what is no address.
    """
    try:
        host = urlsplit(address).hostname
    except ValueError as error:
        raise ConfigError(f"{address}: is no address: {error}") from error
    return (host or "") not in _LOOPBACK


class OutOfReachError(ClusterError):
    """The dashboard or the API server did not answer, or only with errors that may pass, for too
    long."""


@dataclass(frozen=True)
class JobState:
    """How a job is doing.

    `target` is the URL that it writes, `why` is what it waits for or failed of, in one line; times
    are seconds since the epoch, `asked_s` that of its submission; `is_ours`: this project submitted
    it, for `owner`. `gpu_hours` is what its workers have held so far, where that is known.
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
    gpu_hours: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.phase in {"succeeded", "failed", "cancelled"}

    @property
    def exit_code(self) -> int:
        """Of a job that has ended: 0 done, 1 failed, 2 the user's mistake, 130 cancelled."""
        if self.phase == "succeeded":
            return 0
        if self.phase == "cancelled":
            return 130
        return self.driver_exit_code if self.driver_exit_code in {2, 130} else 1

    def __str__(self) -> str:
        return f"{self.id} {self.phase}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class Started:
    """A job on the cluster; `already_running`: it was there before it was asked for."""

    id: str
    already_running: bool


class Target(Protocol):
    """A place that runs jobs."""

    @property
    def flags(self) -> str:
        """What names it on the command line of `python -m cluster`."""
        ...

    def submit(self, submission: Submission, tell: Write) -> Started:
        """Start the job unless it is running; `tell` gets what was sent. ConfigError: see below."""
        ...

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        """Pass the log to `write` and all else to `tell` until the job has ended."""
        ...

    def list(self) -> Sequence[JobState]:
        """The jobs that it remembers, oldest first."""
        ...

    def state(self, job_id: str) -> JobState:
        """How a job is doing. Raises ConfigError for one it does not know."""
        ...

    def logs(self, job_id: str) -> str:
        """The log so far."""
        ...

    def cancel(self, job_id: str) -> JobState:
        """Ask the job to stop and wait until it has; what it ended as."""
        ...
