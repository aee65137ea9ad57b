"""Run a job and keep its output in the run's folder, as the cluster's logs end with the cluster.

    python -m jobs.terminal.log_keeper [--again] s3://bucket/runs/1/logs/ID/TIME python -m jobs.…

Runs the command, shows its output, and writes it to `<folder>/<start time>.log`: after a second,
every half minute, and at the end, then the exit code to `<start time>.exit`. Returns the command's
exit code; tells the command if this is a later attempt (`--again`, or the folder, which is of one
submission, holds an earlier log). On Kubernetes the pods of a failed attempt are deleted before the
next begins, and all of a finished job soon after; `python -m cluster` then reads these files.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO

from jobs.terminal.entry_point import tell
from pneumo import storage
from pneumo.config_layers import LATER_ATTEMPT
from pneumo.errors import PneumoError

WRITE_INTERVAL_S = 30.0
LAST_WRITE_TIMEOUT_S = 10.0
"""How long the last write of the log may take after the job has ended."""
MAX_BYTES = 16 * 2**20
"""A longer log loses its beginning."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the command's exit code, or 128 + the signal that ended it."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    is_later = arguments[0] == "--again"
    folder_url, *command = arguments[is_later:]
    try:
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}.log"
        folder_url = storage.normalise(folder_url)
        keeper = LogKeeper(storage.join(folder_url, name))
    except PneumoError as error:
        tell(f"error: log: {error}")
        return error.exit_code
    with suppress(PneumoError):  # where storage is unavailable, the job itself will tell
        is_later = is_later or bool(storage.list_names(folder_url))
    # Ray signals the command too, which may need time to end. A handler that does nothing, not
    # SIG_IGN, which the command would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    environ = {**os.environ, **({LATER_ATTEMPT: "1"} if is_later else {})}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    reader = threading.Thread(target=keeper.copy, args=(process.stdout,), daemon=True)
    reader.start()
    keeper.start()
    code = process.wait()
    reader.join(timeout=2.0)  # a grandchild may keep the pipe open
    code = code if code >= 0 else 128 - code
    keeper.close(code)
    return code


class LogKeeper:
    """The log so far, which is written to `url` now and then."""

    def __init__(
        self,
        url: str,
        max_bytes: int = MAX_BYTES,
        write: Callable[[str, bytes], None] = storage.write_bytes,
    ) -> None:
        self.url, self.max_bytes, self.write = url, max_bytes, write
        self._text = bytearray()
        self._read_bytes = 0
        self._written_bytes = -1
        """`_read_bytes` when the log was last written."""
        self._last_error = ""
        self._exit_code: int | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start the thread that writes the log."""
        self._writer.start()

    def copy(self, source: IO[bytes]) -> None:
        """Show and keep the output of `source` until it ends."""
        while chunk := source.read1(2**16):  # type: ignore[attr-defined]
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            with self._lock:
                self._text += chunk
                self._read_bytes += len(chunk)
                del self._text[: -self.max_bytes]

    def _run(self) -> None:
        pause_s = 1.0
        while not self._ended.wait(pause_s):
            self.flush()
            pause_s = WRITE_INTERVAL_S
        self.flush()
        if self._exit_code is not None:
            with suppress(PneumoError):  # `flush` has told it
                self.write(f"{self.url.removesuffix('.log')}.exit", f"{self._exit_code}".encode())

    def flush(self) -> None:
        """Write the log if it has grown since the last write; tells each error once."""
        with self._lock:
            text, read_bytes = bytes(self._text), self._read_bytes
        if read_bytes == self._written_bytes:
            return
        try:
            self.write(self.url, text)
            self._written_bytes = read_bytes
        except PneumoError as error:
            if str(error) != self._last_error:
                tell(f"log: {error}; the job goes on, but its log will be lost with its pod")
            self._last_error = str(error)

    def close(self, exit_code: int) -> None:
        """Write the end of the log and the exit code; waits at most LAST_WRITE_TIMEOUT_S."""
        self._exit_code = exit_code
        self._ended.set()
        self._writer.join(LAST_WRITE_TIMEOUT_S)
        if self._writer.is_alive():
            tell(f"log: {self.url}: not written within {LAST_WRITE_TIMEOUT_S:g} s; its end is lost")


if __name__ == "__main__":
    sys.exit(main())
