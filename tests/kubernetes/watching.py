"""A run whose log is followed in a thread while a test disturbs its cluster."""

import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.submission import Submission
from cluster.targets import RETRY_TIMEOUT_S, JobState
from tests.kubernetes.cluster import Document, Team
from tests.kubernetes.probes import find_numbers


@dataclass
class Watched:
    """A run that is followed in a thread of its own."""

    team: Team
    job_id: str
    text: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ended: list[JobState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start_s = time.monotonic()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        target = replace(self.team.target(), retry_timeout_s=RETRY_TIMEOUT_S)
        self.ended.append(target.follow(self.job_id, self._write, self._note))

    def _write(self, text: str) -> None:
        self.text.append(text)
        print(f"{time.monotonic() - self._start_s:6.1f} | {text}", end="", flush=True)

    def _note(self, note: object) -> None:
        self.notes.append(str(note))
        print(f"{time.monotonic() - self._start_s:6.1f} {note}", flush=True)

    @property
    def numbers(self) -> list[int]:
        """Of the probe's numbered lines so far."""
        return find_numbers("".join(self.text).splitlines())

    def wait_for_note(self, part: str, within_s: float = 480) -> str:
        """The first note that has `part`."""
        return self.team.wait(
            f"a note with {part!r}; there are {self.notes}",
            lambda: next((note for note in self.notes if part in note), None),
            within_s,
        )

    def wait_for_text(self, part: str, within_s: float = 480) -> None:
        """Return once the driver's log has `part`."""
        what = f"a line with {part!r}, after {self.notes}"
        self.team.wait(what, lambda: part in "".join(self.text), within_s)

    def wait_for_line(self, more_than: int, within_s: float = 480) -> None:
        """Return once the probe has printed more than so many lines."""
        what = f"more than {more_than} lines, after {self.notes}"
        self.team.wait(what, lambda: len(self.numbers) > more_than, within_s)

    def end(self, within_s: float = 480) -> JobState:
        """Wait for the end of the run; its state then."""
        self._thread.join(within_s)
        assert self.ended, (self.notes, self.text[-5:])
        return self.ended[0]


def begin(team: Team, asked: Submission, overlay: Path | None = None) -> Watched:
    """Submit, and follow."""
    target = team.target(overlay=overlay)
    return Watched(team, target.submit(asked, print).id)


def name_of(pod: Document) -> str:
    return str(pod["metadata"]["name"])


def evict(team: Team, pod: str, grace_s: int | None = None) -> None:
    """What draining its node does to a pod; `grace_s` instead of the pod's own grace period."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    if grace_s is not None:
        eviction["deleteOptions"] = {"gracePeriodSeconds": grace_s}
    team.cluster.ask("POST", f"{team.path('v1', 'pods')}/{pod}/eviction", eviction)
