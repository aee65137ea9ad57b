"""A W&B run that keeps its word: nothing hangs, nothing raises, nothing is lost.

An online run of W&B's waits for some answers for ever, and forgets tables, pictures and artifacts
that it could not hand over: not even `wandb sync` finds them again. So each step online has a time
limit, the service's log is asked whether an upload failed, and whatever was logged is remembered
until it has arrived. The first thing that does not makes an offline run that holds all of it from
the start; one `wandb sync` sends that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pneumo.config import TrackingConfig
from pneumo.reporting.tracking.media import Artifact, Media, Scalar
from pneumo.reporting.tracking.mode import Mode, choose_mode
from pneumo.reporting.tracking.service_log import check_uploads
from pneumo.reporting.tracking.tracker import NullTracker, Role, Tracker, TrackingOutcome, present
from pneumo.reporting.tracking.wandb_media import convert, pack

_SERVICE_LOG = Path("logs") / "debug-internal.log"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """Something to log: prepared from our nouns, which is our part, then sent, which is W&B's."""

    what: str
    prepare: Callable[[], Any]
    send: Callable[[Any], object]


class WandbTracker:
    """A W&B run, online or offline, whose files all lie in `run_dir`/wandb.

    Built by `open_tracker`. Raises wandb's errors when the run can't be started; afterwards nothing
    raises: what fails is remembered, and told by `finish`.
    """

    def __init__(
        self,
        config: TrackingConfig,
        mode: Mode,
        *,
        run_dir: Path,
        name: str,
        job_type: str,
        group: str | None,
        settings: Mapping[str, Any],
        start_timeout_s: float,
        finish_timeout_s: float,
        request_timeout_s: float,
        step_timeout_s: float,
        failures: list[str],
    ) -> None:
        import wandb

        self._wandb = wandb
        self.mode = mode
        self.failures = failures
        # The folder of staged artifacts is known to wandb by an environment variable only. Left to
        # its default it lies in the home folder, and a later `wandb sync` loses the artifacts.
        self._root = run_dir.resolve() / "wandb"
        self._environment = {
            "WANDB_DATA_DIR": str(self._root / "data"),
            "WANDB_CACHE_DIR": str(self._root / "cache"),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",  # the setting comes too late for what login prints
        }
        for folder in ("data", "cache"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
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
                # Left to its defaults W&B tries an upload for hours.
                x_graphql_retry_max=2,
                x_graphql_timeout_seconds=request_timeout_s,
                x_file_transfer_retry_max=2,
                x_file_transfer_timeout_seconds=request_timeout_s,
                x_file_stream_retry_max=3,
                x_file_stream_timeout_seconds=request_timeout_s,
                x_transaction_log_flush_interval=1.0,  # all that a killed job may lose
                console="off",
                silent=True,
                disable_git=True,  # describe_code() is in the settings
                # Host, user, command line and the URLs in it are nobody's business.
                x_disable_meta=True,
                host="not told",
                program="not told",
                save_code=False,
                x_save_requirements=False,
                reinit="create_new",
            ),
        )
        self._step_timeout_s = step_timeout_s
        self._steps: list[_Step] = []
        """All that was logged online; empty offline, where W&B itself keeps it."""
        self._lost: Any = None
        """The online run whose server went away."""
        self._open(mode)

    def _open(self, mode: Mode) -> None:
        with _environment(self._environment):
            self._run = self._start(mode=mode)
        self._inputs: list[dict[str, Any]] = []
        for prefix in ("train", "val", "perf"):
            self._run.define_metric(f"{prefix}/*", step_metric="epoch")

    def log(self, metrics: Mapping[str, float | None], *, epoch: int) -> None:
        row = {"epoch": epoch, **present(metrics)}
        self._record(_Step("log metrics", lambda: row, lambda row: self._run.log(row)))

    def log_media(self, key: str, media: Media) -> None:
        prepare = partial(convert, media)
        self._record(_Step(f"log {key}", prepare, lambda shown: self._run.log({key: shown})))

    def log_artifact(self, artifact: Artifact, *, role: Role = "output") -> None:
        send = partial(self._use if role == "input" else self._give, artifact)
        self._record(_Step(f"log artifact {artifact.name}", partial(pack, artifact), send))

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        kept = present(values)
        self._record(_Step("summarise", lambda: kept, lambda kept: self._run.summary.update(kept)))

    def _give(self, artifact: Artifact, packed: Any) -> None:
        logged = self._run.log_artifact(packed, aliases=list(artifact.aliases))
        if self.mode == "online":
            logged.wait()  # or nobody hears that an upload failed

    def _use(self, artifact: Artifact, packed: Any) -> None:
        run = self._run
        if self.mode == "online":
            run.use_artifact(packed)
            if run is not self._run or self.mode != "online":
                return  # given up meanwhile, and done again offline
        # Offline W&B knows no inputs: the config names what a later reader needs, in any mode.
        self._inputs.append({"name": artifact.name, "type": artifact.type, **artifact.metadata})
        config: Any = self._run.config  # half of it has no types
        config.update({"inputs": list(self._inputs)}, allow_val_change=True)

    def finish(self) -> TrackingOutcome:
        online = self._run if self.mode == "online" else self._lost
        if self.mode == "online":
            try:
                with _environment(self._environment):
                    self._run.finish()
                    check_uploads(Path(self._run.dir).parent / _SERVICE_LOG)
            except Exception as error:  # whatever a sink throws, the job is worth more
                self._go_offline("send everything", error)
        if self.mode == "offline":
            self._attempt("close the offline run", self._run.finish)
        if self._lost is not None:
            # Only to leave nothing behind: it holds nothing that the offline run does not.
            with contextlib.suppress(Exception), _environment(self._environment):
                self._lost.finish()
        # Only now has the service written its last byte.
        self._attempt("stop the service", self._wandb.teardown)
        return TrackingOutcome(
            self.mode,
            Path(self._run.dir).parent,
            None if online is None else online.url,
            tuple(self.failures),
            self._root,
        )

    def _record(self, step: _Step) -> None:
        """Do it; where the server does not take it, go on in an offline run."""
        if self.mode == "disabled":
            return
        with _environment(self._environment):
            try:
                prepared = step.prepare()
            except Exception as error:
                self._tell(step.what, error)
                return
            if self.mode == "offline":
                self._attempt(step.what, partial(step.send, prepared))
                return
            self._steps.append(step)
            try:
                _within(self._step_timeout_s, partial(step.send, prepared))
            except Exception as error:
                self._go_offline(step.what, error)

    def _go_offline(self, what: str, error: Exception) -> None:
        """Start an offline run that holds all that was logged from the start."""
        self._tell(f"{what} online; going on offline", error)
        lost, steps = self._run, self._steps
        self._lost, self._steps, self.mode = lost, [], "offline"
        self._attempt("go on offline", lambda: self._open("offline"))
        if self._run is lost:
            self.mode = "disabled"
        for step in steps:
            self._record(step)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do it, or say in one line that it could not be done."""
        try:
            with _environment(self._environment):
                action()
        except Exception as error:
            self._tell(what, error)

    def _tell(self, what: str, error: Exception) -> None:
        self.failures.append(_describe(what, error))
        log.warning("%s", self.failures[-1])


def open_tracker(
    config: TrackingConfig,
    *,
    run_dir: Path | None,
    name: str,
    job_type: str,
    group: str | None,
    settings: Mapping[str, Any],
    start_timeout_s: float = 30.0,
    finish_timeout_s: float = 120.0,
    request_timeout_s: float = 10.0,
    step_timeout_s: float = 60.0,
) -> Tracker:
    """The tracker that `config.mode` asks for, or what is left of it: online, offline, none.

    W&B's files go to `run_dir`; without one to a temporary folder, the parent of the outcome's
    `root`, which is then the caller's to delete. `settings` becomes the run's config. Never raises,
    and never waits much longer than `start_timeout_s` for the server. A request that gets no answer
    within `request_timeout_s` is tried twice more; after `step_timeout_s` nothing is waited for.
    """
    mode = choose_mode(config, os.environ)
    failures: list[str] = []
    attempts: list[Mode] = ["online", "offline"] if mode == "online" else ["offline"]
    if mode == "disabled":
        return NullTracker()
    folder = run_dir or Path(tempfile.mkdtemp(prefix="pneumo-tracking-"))
    for attempt in attempts:
        try:
            return WandbTracker(
                config,
                attempt,
                run_dir=folder,
                name=name,
                job_type=job_type,
                group=group,
                settings=settings,
                start_timeout_s=start_timeout_s,
                finish_timeout_s=finish_timeout_s,
                request_timeout_s=request_timeout_s,
                step_timeout_s=step_timeout_s,
                failures=failures,
            )
        except Exception as error:  # no fault of the sink's is worth a training
            rest = "going on offline" if attempt == "online" else "going on without"
            failures.append(_describe(f"start {attempt}; {rest}", error))
            log.warning("%s", failures[-1])
    if run_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    return NullTracker()


def _within(timeout_s: float, action: Callable[[], object]) -> None:
    """Do it in a thread, and raise TimeoutError where it takes longer; it is then left alone."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # handed to whoever asks the future
            done.set_exception(error)

    threading.Thread(target=run, name="wandb-step", daemon=True).start()
    try:
        done.result(timeout_s)
    except TimeoutError as error:
        if done.done():
            raise
        raise TimeoutError(f"no answer for {timeout_s:g} s") from error


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
