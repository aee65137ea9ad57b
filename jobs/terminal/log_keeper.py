"""What a job says, kept where it writes: for a cluster that goes, with its logs, when the job ends.

    python -m jobs.terminal.log_keeper s3://bucket/runs/1/logs/ID python -m jobs.train …

Runs the command, shows what it says, and keeps that as `<folder>/<when it began>.log`: soon, every
half minute, and at the end. The exit code is the command's. On Kubernetes a failed attempt's pods
are deleted before the next begins; `python -m cluster logs` reads here why it failed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import IO

from jobs.terminal.entry_point import say
from pneumo import storage
from pneumo.errors import PneumoError

KEEP_EVERY_S = 30.0
LAST_WRITE_S = 10.0
"""How long the end of a job waits for its log to be written."""
MOST_BYTES = 16 * 2**20
"""Of a longer log, the end is kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the command's exit code, 128 more than the signal that ended it."""
    folder_url, *command = sys.argv[1:] if argv is None else argv
    try:
        book = Logbook(
            storage.join(storage.normalise(folder_url), f"{datetime.now(UTC):%Y%m%d-%H%M%S}.log")
        )
    except PneumoError as error:
        say(f"error: logbook: {error}")
        return error.exit_code
    # Ray signals the command as well, which then ends in its own time. Handlers, for what is
    # ignored here would be ignored by the command too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    reader = threading.Thread(target=book.copy, args=(process.stdout,), daemon=True)
    reader.start()
    threading.Thread(target=book.keep_up, daemon=True).start()
    code = process.wait()
    reader.join(timeout=2.0)  # a grandchild may hold the pipe
    book.close()
    return code if code >= 0 else 128 - code


class Logbook:
    """The log so far, and as much of it as lies at `url`."""

    def __init__(self, url: str, most_bytes: int = MOST_BYTES) -> None:
        self.url, self.most_bytes = url, most_bytes
        self._text = bytearray()
        self._kept = -1
        self._trouble = ""
        self._said = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._closed = threading.Event()

    def copy(self, source: IO[bytes]) -> None:
        """Show and remember what comes, until it ends."""
        while chunk := source.read1(2**16):  # type: ignore[attr-defined]
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            with self._lock:
                self._text += chunk
                self._said += len(chunk)
                del self._text[: -self.most_bytes]

    def keep_up(self) -> None:
        """Write what is new now and then, and once more at the end."""
        pause_s = 1.0
        while not self._ended.wait(pause_s):
            self._keep()
            pause_s = KEEP_EVERY_S
        self._keep()
        self._closed.set()

    def close(self) -> None:
        """Have the end written, but not at the price of the job's."""
        self._ended.set()
        if not self._closed.wait(LAST_WRITE_S):
            say(f"logbook: {self.url}: not written within {LAST_WRITE_S:g} s; its end is lost")

    def _keep(self) -> None:
        with self._lock:
            text, said = bytes(self._text), self._said
        if said == self._kept:
            return
        try:
            storage.write_bytes(self.url, text)
            self._kept = said
        except PneumoError as error:
            if str(error) != self._trouble:
                say(f"logbook: {error}; the job goes on, and its log goes with its pod")
            self._trouble = str(error)


if __name__ == "__main__":
    sys.exit(main())
