"""Follow a job's log until the job has ended, over a connection that may drop."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus

from cluster.ray.client import BusyError, Client
from cluster.targets import RETRY_TIMEOUT_S, LostError, OutOfReachError, Write
from pneumo.errors import ConfigError

IDLE_TIMEOUT_S = 60.0
"""A log stream without output for this long is opened again: its connection may be dead."""

TRIES = 5


def follow(
    client: Client,
    job_id: str,
    write: Write,
    tell: Write = lambda _: None,
    *,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    retry_timeout_s: float = RETRY_TIMEOUT_S,
) -> JobDetails:
    """Pass the job's log to `write` until the job has ended; returns its final details.

    A dropped stream is resumed where it stopped, without a gap or a repeated line. `tell` gets
    other messages. Raises OutOfReachError after `retry_timeout_s` without an answer; the job goes
    on.
    """
    cursor = _Cursor(write)
    told: set[str] = set()
    answers = 0
    lost_at_s: float | None = None
    while True:
        try:
            info = client.details(job_id)
            if info.status.is_terminal():
                _show_rest(client, job_id, cursor, tell)
                return info
        except OutOfReachError as error:
            lost_at_s = lost_at_s or time.monotonic()
            if time.monotonic() - lost_at_s > retry_timeout_s:
                raise
            text = f"{str(error).split(';')[0]}; the job goes on, trying again"
        except ConfigError as error:
            if not answers:
                raise
            raise LostError(
                f"cluster: {job_id} was lost with the head of {client.get_address()}, which has "
                "restarted; submit again: a run resumes from its last checkpoint"
            ) from error
        else:
            answers, lost_at_s = answers + 1, None
            # Every job is pending for a moment.
            waits = answers > 1 and info.status == JobStatus.PENDING
            text = f"waiting: {info.message}" if waits else ""
        if text and text not in told:
            told.add(text)
            tell(text)
        pause_s = 1.0
        if not asyncio.run(_stream(client, job_id, cursor, idle_timeout_s)):
            # A proxy may let requests through, but no stream; each answer is the whole log.
            with suppress(OutOfReachError, ConfigError):  # the next request will report it
                text = client.log_text(job_id)
                cursor.show(text)
                pause_s += min(len(text) / 100_000, 30.0)
        time.sleep(pause_s)


def _show_rest(client: Client, job_id: str, cursor: _Cursor, tell: Write) -> None:
    """Show the rest of an ended job's log; Ray answers HTTP 500 when its node is gone."""
    for tries_left in range(TRIES, 0, -1):
        try:
            cursor.show(client.log_text(job_id))
        except BusyError as error:
            if tries_left == 1:
                tell(f"the end of its log cannot be read: {error}")
            time.sleep(1.0)
        else:
            return


@dataclass
class _Cursor:
    """How much of a log has been written; each stream starts from the log's beginning."""

    write: Write
    written: int = 0

    def show(self, text: str, position: int = 0) -> None:
        new = text[max(0, self.written - position) :]
        if new:
            self.write(new)
            self.written += len(new)


async def _stream(client: Client, job_id: str, cursor: _Cursor, idle_timeout_s: float) -> bool:
    """Show the log as it comes, until its stream ends, breaks or is idle for too long; whether
    anything came."""
    stream = client.tail_job_logs(job_id)
    position = 0
    try:
        while True:
            try:
                # Not wait_for: in Python 3.11 it can swallow a Ctrl-C that comes with a chunk.
                async with asyncio.timeout(idle_timeout_s):
                    chunk = await anext(stream)
            except Exception:  # whatever it was, the next request will report it
                return position > 0
            cursor.show(chunk, position)
            position += len(chunk)
    finally:
        await stream.aclose()
