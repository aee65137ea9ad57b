"""The driver's log, read from the submitter's container, whose own lines are left out."""

import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from cluster.kuberay.api import Api, ExpiredError, MissingError
from cluster.kuberay.progress import SUBMITTER
from cluster.targets import OutOfReachError, Write

_WHOLE_LOG_S = 60.0
_TRIES = 10
_CLIENT = re.compile(r"\S+ \S+\t(?:INFO|SUCC|WARN|ERR) (?:cli|sdk)\.py:\d+ -- (Status message: )?")
"""The beginning of each line of `ray job …`. Its last line repeats the end of the driver's log."""
_WAITS = "Waiting for Ray Dashboard GCS to become healthy"
_TRACEBACK = re.compile(
    r"$|\s|Traceback \(most|During handling of|The above exception|"
    r"[\w.]+(Error|Exception)\b|\w+(\.\w+)+: "
)
"""The beginnings of a traceback's lines, from its second on."""
_OF_CLIENT = re.compile(r'  File ".*/bin/ray", line \d+, in <module>')

ReadResult = Literal["ended", "going on", "broken"]


def find_exit_code(message: str | None) -> int | None:
    """The exit code in Ray's message about a failed driver, as a RayJob has no field for it; None
    in any other message."""
    found = re.search(r"failed with exit code (\d+)", message or "")
    return int(found[1]) if found else None


@dataclass
class DriverLog:
    """Passes each line of the driver to `write` once, and drops the submitters' own lines.

    A submitter runs `ray job submit` and `ray job logs`, waits in a loop while the head does not
    answer, and ends in a traceback when the head is gone. The next submitter repeats the driver's
    log from the beginning.
    """

    write: Write
    tell: Write
    exit_code: int | None = None
    """The driver's exit code, once its submitter has told it."""
    _hashes: list[int] = field(default_factory=list)
    """Hashes of the driver's lines so far."""
    _next: int = 0
    """Number of the submitter's next line among them."""
    _is_over: bool = False
    _waits: bool = False
    _traceback: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Begin the log of another submitter."""
        self.flush()
        self._next, self._is_over, self.exit_code = 0, False, None

    def take(self, line: str) -> None:
        """Process a line of the submitter's log."""
        if self._traceback and _TRACEBACK.match(line):
            self._traceback.append(line)
            return
        self.flush()
        client = _CLIENT.match(line)
        if client and client[1]:
            self._is_over, self.exit_code = True, find_exit_code(line)
        if line.startswith(_WAITS):
            if not self._waits:
                self.tell("waiting: for the head to answer the submitter")
            self._waits = True
        elif line.startswith("Traceback (most recent call last)"):
            self._traceback = [line]
        elif not client and not self._is_over:
            self._waits = False
            self._pass(line)

    def flush(self) -> None:
        """Write a pending traceback, unless it is the submitter's own."""
        if not any(_OF_CLIENT.match(line) for line in self._traceback):
            for line in self._traceback:
                self._pass(line)
        self._traceback = []

    def _pass(self, line: str) -> None:
        number, self._next = self._next, self._next + 1
        if self._hashes[number : number + 1] == [hash(line)]:
            return
        self._hashes[number:] = [hash(line)]
        self.write(f"{line}\n")


@dataclass
class LogCursor:
    """How far a container's log has been read; a stream that is resumed repeats some lines."""

    log: DriverLog
    last: str = ""
    """Time stamp of the last line."""
    at_last: int = 0
    """Number of lines read with that time stamp."""
    untimed: str = ""
    """The last line without a time stamp."""

    def read(self, api: Api, pod: str, *, follow: bool, limit_s: float) -> ReadResult:
        """Read new lines for at most about `limit_s`; returns how that ended."""
        start_s = time.monotonic()
        since = f"{self.last[:19]}Z" if self.last else ""
        repeated = 0
        lines = api.stream_log(pod, SUBMITTER, since=since, follow=follow, idle_timeout_s=limit_s)
        try:
            for line in lines:
                repeated = self._take(line, repeated)
                if time.monotonic() - start_s > limit_s:
                    return "going on"
        except MissingError:
            return "ended"
        except (ExpiredError, OutOfReachError):
            return "going on" if time.monotonic() - start_s >= limit_s else "broken"
        finally:
            lines.close()
        return "ended"

    def read_all(self, api: Api, pod: str) -> None:
        """Read the rest of a log that has ended, with retries."""
        for _ in range(_TRIES):
            if self.read(api, pod, follow=False, limit_s=_WHOLE_LOG_S) == "ended":
                break
            time.sleep(1.0)
        self.log.flush()

    def _take(self, line: str, repeated: int) -> int:
        """Process a line unless it was before; returns the number of lines seen at time `last`."""
        stamp, _, text = line.partition(" ")
        moment = _utc(stamp)
        if moment is None:  # the kubelet's own message about a log that it cannot read
            if line != self.untimed:
                self.log.take(line)
            self.untimed = line
            return repeated
        if moment < self.last:
            return repeated
        if moment > self.last:
            self.last, self.at_last, repeated = moment, 0, 0
        if repeated == self.at_last:
            self.log.take(text)
            self.at_last += 1
        return repeated + 1


def _utc(stamp: str) -> str | None:
    """A line's time stamp in UTC with nine decimals, so that text order is time order (kubelets
    print it in their node's time zone); None for other text."""
    found = re.fullmatch(r"(\S{19})(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", stamp)
    if found is None:
        return None
    second = datetime.fromisoformat(f"{found[1]}{found[3]}").astimezone(UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{found[2] or '':0<9}"
