"""Tracker: what a run logs. Weights & Biases behind it, a memory one for tests, none at all.

W&B is a sink, never the truth: that is metrics.json, predictions.parquet and report.html. So no
fault of W&B's (no key, a wrong one, no network, a server that hangs) fails or hangs a job: it
falls back to an offline run, says so in one line, and `finish` tells how to send the run later.
Everything that W&B writes stays inside the run's folder. Nothing that names a patient is logged;
keeping it so is the caller's part.
"""

from __future__ import annotations

import io
import logging
import netrc
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from pneumo.config import TrackingConfig

T = TypeVar("T")
Mode = Literal["online", "offline", "disabled"]
Role = Literal["input", "output"]
Scalar = float | int | str | bool | None

_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
"""From the least private to the most."""
CLOUD_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Whose login in the netrc file counts when WANDB_BASE_URL names no other server."""
MAX_IMAGES = 108
"""W&B shows no more pictures under one key."""
MAX_ROWS = 10_000
"""W&B draws no more rows."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Overlay:
    """Classes of pixels, which W&B can lay over a picture and take off again."""

    classes: npt.NDArray[np.uint8]
    """(H, W) of the picture; 0 is nothing."""
    labels: Mapping[int, str]
    name: str


@dataclass(frozen=True)
class Picture:
    """An encoded image (PNG, WebP), its caption, and boxes to draw over it."""

    data: bytes
    caption: str
    boxes: Sequence[tuple[float, float, float, float]] = ()
    """(x, y, width, height) in pixels of the picture."""
    box_label: str = "radiologist"
    mask: Overlay | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side; the first MAX_IMAGES are shown."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class LineChart:
    """An interactive chart."""

    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """(x, y) of equal length, by the line's name; MAX_ROWS points altogether."""
    title: str
    x_label: str
    y_label: str

    def rows(self) -> list[tuple[str, float, float]]:
        """(line, x, y) of every point."""
        return [
            (name, float(x), float(y))
            for name, (xs, ys) in self.series.items()
            for x, y in zip(xs, ys, strict=True)
        ]


@dataclass(frozen=True)
class ConfusionChart:
    """A confusion matrix from the counts tp, fp, fn, tn."""

    counts: Mapping[str, int]
    title: str

    def rows(self) -> list[tuple[str, str, int]]:
        """(actual, predicted, count) of each cell."""
        cells = (("0", "0", "tn"), ("0", "1", "fp"), ("1", "0", "fn"), ("1", "1", "tp"))
        return [(actual, predicted, self.counts[name]) for actual, predicted, name in cells]


@dataclass(frozen=True)
class Table:
    """Rows of scalars; W&B shows MAX_ROWS."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Scalar]]


@dataclass(frozen=True)
class PictureTable:
    """Rows of scalars and pictures; W&B shows MAX_ROWS."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Picture | Scalar]]


@dataclass(frozen=True)
class Page:
    """A self-contained HTML page."""

    html: str


Media = Gallery | LineChart | ConfusionChart | Table | PictureTable | Page


@dataclass(frozen=True)
class Artifact:
    """Files under a versioned name; W&B takes equal content for one version."""

    name: str
    type: str
    """'dataset', 'model' or 'evaluation'."""
    files: Mapping[str, Path | bytes]
    """Name inside the artifact -> local file, which is copied, or content."""
    aliases: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackingOutcome:
    """Where what was logged has gone."""

    mode: Mode
    """What was used in the end, not what was asked for."""
    folder: Path | None = None
    """W&B's local files of the run."""
    url: str | None = None
    """The run's page, where there is one."""
    failures: tuple[str, ...] = ()
    """What was not logged or not sent, a line each."""
    rest: Path | None = None
    """W&B's local files of what was logged after the server had gone away."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """All of W&B's local files."""
        return tuple(folder for folder in (self.folder, self.rest) if folder is not None)

    @property
    def sync_command(self) -> str | None:
        """The command that sends what lies in `folder`; None where nothing is left to send."""
        if self.folder is None or (self.mode == "online" and not self.failures):
            return None
        return " ".join(["wandb sync", *(shlex.quote(str(folder)) for folder in self.folders)])

    def lines(self) -> list[str]:
        """What a job prints of it."""
        if self.sync_command is None:
            return [] if self.url is None else [f"W&B: {self.url}"]
        state = "offline, nothing sent" if self.mode == "offline" else "not all was sent"
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
        self.history.append({"epoch": epoch, **_present(metrics)})

    def log_media(self, key: str, media: Media) -> None:
        self.media[key] = media

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        self.artifacts.append((role, artifact))

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        self.summary.update(_present(values))

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


class WandbTracker:
    """A W&B run, online or offline, whose files all lie in `run_dir`/wandb.

    Built by `open_tracker`. Raises wandb's errors when the run can't be started; afterwards nothing
    raises: what fails is remembered, and told by `finish`.
    """

    def __init__(
        self,
        config: TrackingConfig,
        mode: Literal["online", "offline"],
        *,
        run_dir: Path,
        name: str,
        job_type: str,
        group: str | None,
        settings: Mapping[str, Any],
        start_timeout_s: float,
        finish_timeout_s: float,
        failures: Sequence[str] = (),
    ) -> None:
        import wandb

        self._wandb = wandb
        self.mode: Literal["online", "offline"] = mode
        self.failures = list(failures)
        # The folder of staged artifacts is known to wandb by an environment variable only. Left to
        # its default it lies in the home folder, and a later `wandb sync` loses the artifacts.
        home = run_dir.resolve() / "wandb"
        self._environment = {
            "WANDB_DATA_DIR": str(home / "data"),
            "WANDB_CACHE_DIR": str(home / "cache"),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",  # the setting comes too late for what login prints
        }
        for folder in ("data", "cache"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        self._start = partial(
            wandb.init,
            project=config.project,
            entity=config.entity,
            group=group,
            name=name,
            job_type=job_type,
            config=dict(settings),
            settings=wandb.Settings(
                root_dir=str(run_dir.resolve()),
                init_timeout=start_timeout_s,
                finish_timeout=finish_timeout_s,
                finish_timeout_raises=True,
                x_graphql_retry_max=3,
                x_transaction_log_flush_interval=1.0,  # all that a killed job may lose
                console="off",
                silent=True,
                disable_git=True,  # describe_code() is in the settings
                save_code=False,
                x_save_requirements=False,
                reinit="create_new",
            ),
        )
        self._lost: Any = None
        """The online run whose server went away."""
        self._open(mode)

    def _open(self, mode: Literal["online", "offline"]) -> None:
        with _environment(self._environment):
            self._run = self._start(mode=mode)
        for prefix in ("train", "val", "perf"):
            self._run.define_metric(f"{prefix}/*", step_metric="epoch")

    def log(self, metrics: Mapping[str, float | None], *, epoch: int) -> None:
        self._record("log metrics", lambda: self._run.log({"epoch": epoch, **_present(metrics)}))

    def log_media(self, key: str, media: Media) -> None:
        self._record(f"log {key}", lambda: self._run.log({key: self._convert(media)}))

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        self._record(f"log artifact {artifact.name}", lambda: self._log_files(artifact, role))

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        self._record("summarise", lambda: self._run.summary.update(_present(values)))

    def finish(self) -> TrackingOutcome:
        first = self._run if self._lost is None else self._lost
        url = first.url if self.mode == "online" else None
        rest = None
        if self._lost is not None:
            rest = Path(self._run.dir).parent
            self._attempt("close the offline run", self._run.finish)
        self._attempt("send everything", first.finish)
        # Only now has the service written its last byte.
        self._attempt("stop the service", self._wandb.teardown)
        folder = Path(first.dir).parent
        return TrackingOutcome(self.mode, folder, url, tuple(self.failures), rest)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do it, or say in one line that it could not be done."""
        try:
            with _environment(self._environment):
                action()
        # Whatever a sink throws, the training that it watches is worth more.
        except Exception as error:
            self.failures.append(_describe(what, error))
            log.warning("%s", self.failures[-1])

    def _record(self, what: str, action: Callable[[], object]) -> None:
        """Do it; where the server has gone away, go on in an offline run, from this on.

        An online run needs the server for each table and artifact, waits for it a while each time,
        and forgets what it could not hand over. An offline run keeps all.
        """
        if self.mode == "offline" or self._lost is not None:
            self._attempt(what, action)
            return
        try:
            with _environment(self._environment):
                action()
        except (self._wandb.errors.Error, TimeoutError, ConnectionError) as error:
            self.failures.append(_describe(f"{what} online; going on offline", error))
            log.warning("%s", self.failures[-1])
            lost = self._run
            self._attempt("go on offline", lambda: self._open("offline"))
            if self._run is not lost:
                self._lost = lost
                self._attempt(what, action)
        except Exception as error:
            self.failures.append(_describe(what, error))
            log.warning("%s", self.failures[-1])

    def _convert(self, media: Media) -> Any:
        wandb = self._wandb
        match media:
            case Gallery(pictures):
                return [self._image(picture) for picture in pictures[:MAX_IMAGES]]
            case Page(html):
                return wandb.Html(html)
            case Table(columns, rows):
                return wandb.Table(
                    columns=list(columns), data=[list(row) for row in rows[:MAX_ROWS]]
                )
            case PictureTable(columns, rows):
                cells = [
                    [self._image(cell) if isinstance(cell, Picture) else cell for cell in row]
                    for row in rows[:MAX_ROWS]
                ]
                return wandb.Table(columns=list(columns), data=cells)
            case LineChart(title=title, x_label=x_label, y_label=y_label):
                return wandb.plot_table(
                    "wandb/area-under-curve/v0",
                    wandb.Table(columns=["series", "x", "y"], data=media.rows()[:MAX_ROWS]),
                    {"x": "x", "y": "y", "class": "series"},
                    {"title": title, "x-axis-title": x_label, "y-axis-title": y_label},
                )
            case ConfusionChart(title=title):
                columns = ["Actual", "Predicted", "nPredictions"]
                return wandb.plot_table(
                    "wandb/confusion_matrix/v1",
                    wandb.Table(columns=columns, data=media.rows()),
                    {column: column for column in columns},
                    {"title": title},
                )

    def _image(self, picture: Picture) -> Any:
        boxes = [
            {
                "position": {"minX": x, "minY": y, "maxX": x + width, "maxY": y + height},
                "domain": "pixel",
                "class_id": 1,
            }
            for x, y, width, height in picture.boxes
        ]
        masks = None
        if picture.mask is not None:
            named = {0: "none", **picture.mask.labels}
            layer = {"mask_data": picture.mask.classes, "class_labels": named}
            masks = {picture.mask.name: layer}
        overlay = {"boxes": {"box_data": boxes, "class_labels": {1: picture.box_label}}}
        return self._wandb.Image(
            Image.open(io.BytesIO(picture.data)),
            caption=picture.caption,
            boxes=overlay if boxes else None,
            masks=masks,
        )

    def _log_files(self, artifact: Artifact, role: Role) -> None:
        packed = self._wandb.Artifact(
            artifact.name, type=artifact.type, metadata=dict(artifact.metadata)
        )
        for name, content in artifact.files.items():
            if isinstance(content, bytes):
                with packed.new_file(name, mode="wb") as file:
                    file.write(content)
            else:
                packed.add_file(str(content), name=name)
        if role == "output":
            self._run.log_artifact(packed, aliases=list(artifact.aliases))
        elif self.mode == "online" and self._lost is None:
            self._run.use_artifact(packed, aliases=list(artifact.aliases))
        else:
            # Offline W&B knows no inputs: the config names what a later reader needs.
            key = f"input/{artifact.type}"
            self._run.config[key] = {"name": artifact.name, **artifact.metadata}


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path,
    name: str,
    job_type: str,
    group: str | None,
    settings: Mapping[str, Any],
    start_timeout_s: float = 30.0,
    finish_timeout_s: float = 120.0,
) -> Tracker:
    """The tracker that `config.mode` asks for, or what is left of it: online, offline, none.

    `settings` becomes the run's config. Never raises, and never waits much longer than
    `start_timeout_s` for the server.
    """
    mode = choose_mode(config, os.environ)
    failures: list[str] = []
    attempts: list[Literal["online", "offline"]] = []
    if mode != "disabled":
        attempts = ["online", "offline"] if mode == "online" else ["offline"]
    for attempt in attempts:
        try:
            return WandbTracker(
                config,
                attempt,
                run_dir=run_dir,
                name=name,
                job_type=job_type,
                group=group,
                settings=settings,
                start_timeout_s=start_timeout_s,
                finish_timeout_s=finish_timeout_s,
                failures=failures,
            )
        except Exception as error:  # no fault of the sink's is worth a training
            rest = "going on offline" if attempt == "online" else "going on without"
            failures.append(_describe(f"start {attempt}; {rest}", error))
            log.warning("%s", failures[-1])
    return NullTracker()


def choose_mode(config: TrackingConfig, environ: Mapping[str, str]) -> Mode:
    """What `config.mode` means here.

    auto is online with a key (WANDB_API_KEY or a login in the netrc file) and offline without.
    WANDB_MODE replaces auto; where both are explicit, the more private of the two holds.
    """
    mode: Mode = _default_mode(environ) if config.mode == "auto" else config.mode
    wanted = {"dryrun": "offline", "run": "online"}.get(
        environ.get("WANDB_MODE", ""), environ.get("WANDB_MODE")
    )
    for candidate in _MODES:
        if candidate == wanted and (config.mode == "auto" or _is_more_private(candidate, mode)):
            return candidate
    return mode


def _is_more_private(one: Mode, other: Mode) -> bool:
    return _MODES.index(one) > _MODES.index(other)


def _default_mode(environ: Mapping[str, str]) -> Mode:
    if environ.get("WANDB_API_KEY"):
        return "online"
    base_url = environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(base_url).netloc] if base_url else CLOUD_HOSTS
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        logins = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any(logins.authenticators(host) for host in hosts) else "offline"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `values`, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _describe(what: str, error: Exception) -> str:
    message = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"W&B: could not {what} ({type(error).__name__}: {message[:200]})"


def _present(values: Mapping[str, T | None]) -> dict[str, T]:
    return {name: value for name, value in values.items() if value is not None}
