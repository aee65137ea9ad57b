"""The seam: what a job says to its tracker, and what it is told in the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pneumo.reporting.tracking.media import Artifact, Media, Scalar
from pneumo.reporting.tracking.mode import Mode

T = TypeVar("T")
Role = Literal["input", "output"]


@dataclass(frozen=True)
class TrackingOutcome:
    """Where what was logged has gone."""

    mode: Mode
    """What was used in the end, not what was asked for; offline where a server went away."""
    folder: Path | None = None
    """W&B's local files of the run: of an offline one all that was logged, from the start."""
    url: str | None = None
    """The run's page, where there is one; in part where `mode` is offline."""
    failures: tuple[str, ...] = ()
    """What was not logged or not sent, a line each."""
    root: Path | None = None
    """The folder that holds whatever W&B wrote, staged artifacts too."""

    @property
    def sync_command(self) -> str | None:
        """The command that sends what lies in `folder`; None where nothing is left to send."""
        if self.folder is None or self.mode != "offline":
            return None
        return f"wandb sync {shlex.quote(str(self.folder))}"

    def lines(self) -> list[str]:
        """What a job prints of it."""
        if self.sync_command is None:
            return [] if self.url is None else [f"W&B: {self.url}"]
        state = "offline, nothing sent" if self.url is None else "not all was sent"
        return [f"W&B: {state}; to send it: {self.sync_command}"]


class Tracker(Protocol):
    """Where a run's results go; no method raises for a fault of the service behind it.

    Keys start with data/, train/, val/, eval/ or perf/. One tracker is open at a time in a process.
    """

    def log(self, metrics: Mapping[str, float | None], *, epoch: int) -> None:
        """Scalars of an epoch; a None is left out."""

    def log_media(self, key: str, media: Media) -> None:
        """A gallery, a chart, a table or a page."""

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        """Files that the run used (input) or made (output): the edges of the lineage."""

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        """The run's headline values; a None is left out."""

    def finish(self) -> TrackingOutcome:
        """Close the run; waits a bounded time for what is still to be sent."""


@dataclass
class MemoryTracker:
    """Keeps what it is given; for tests and notebooks."""

    history: list[dict[str, float]] = field(default_factory=list)
    media: dict[str, Media] = field(default_factory=dict)
    artifacts: list[tuple[Role, Artifact]] = field(default_factory=list)
    summary: dict[str, Scalar] = field(default_factory=dict)
    is_finished: bool = False

    def log(self, metrics: Mapping[str, float | None], *, epoch: int) -> None:
        self.history.append({"epoch": epoch, **present(metrics)})

    def log_media(self, key: str, media: Media) -> None:
        self.media[key] = media

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        self.artifacts.append((role, artifact))

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        self.summary.update(present(values))

    def finish(self) -> TrackingOutcome:
        self.is_finished = True
        return TrackingOutcome("disabled")


class NullTracker:
    """Keeps nothing: tracking.mode=disabled, or wandb is not installed."""

    def log(self, metrics: Mapping[str, float | None], *, epoch: int) -> None:
        pass

    def log_media(self, key: str, media: Media) -> None:
        pass

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        pass

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        pass

    def finish(self) -> TrackingOutcome:
        return TrackingOutcome("disabled")


def present(values: Mapping[str, T | None]) -> dict[str, T]:
    """`values` without those that are None."""
    return {name: value for name, value in values.items() if value is not None}
