"""The job's side of W&B: starts the process that sends, and waits for it for a bounded time.
Nothing that W&B does delays a job for longer, or changes its result.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.tracking.sender import Kind
from pneumo.config import TrackingConfig
from pneumo.reporting.tracking import choose_mode

INTERVAL_S = 10.0
"""How often the folder of a running job is looked at."""
IDLE_TIMEOUT_S = 60.0
"""A sender that has reported nothing for so long is given up."""
LIMIT_S = 300.0
"""The most that the end of a job waits."""
INTERRUPTED_LIMIT_S = 4.0
"""The same at the end of a job that was interrupted: Kubernetes kills 30 s after its SIGTERM, and a
checkpoint may take 25 of them."""


@dataclass(frozen=True)
class Outcome:
    """What a sender has reported."""

    urls: Mapping[str, str]
    """The page of the last run that has arrived, by its job type."""
    failure: str | None
    """Why not all has arrived."""


class SenderProcess:
    """The process that sends a run's folder, in a session of its own: Ctrl-C is not for it."""

    def __init__(
        self,
        run_url: str,
        kinds: Sequence[Kind],
        tracking: Mapping[str, Any] | None = None,
        *,
        interval_s: float | None = None,
    ) -> None:
        """Begin it. `tracking` replaces settings of the folder's own; with `interval_s` it looks so
        often at what comes into the folder until it is closed."""
        self._folder = Path(tempfile.mkdtemp(prefix="pneumo-tracking-"))
        self._told = (self._folder / "told").open("w+b")
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.tracking.sender"],
                cwd=self._folder,
                env=_environment(self._folder),
                stdin=subprocess.PIPE,
                stdout=self._told,
                stderr=log,
                start_new_session=True,
            )
        order = {"run": run_url, "kinds": list(kinds), "tracking": dict(tracking or {})}
        self._write(json.dumps({**order, "interval_s": interval_s}).encode())

    def close(
        self, idle_timeout_s: float = IDLE_TIMEOUT_S, limit_s: float = float("inf")
    ) -> Outcome:
        """Wait for what is still to be sent, but not when nothing is told for `idle_timeout_s`, and
        never longer than `limit_s`; then end the process."""
        self._write(None)
        begun = heard = time.monotonic()
        size, late = 0, False
        try:
            while self._process.poll() is None and not late:
                time.sleep(0.05)
                now, told = time.monotonic(), os.fstat(self._told.fileno()).st_size
                heard, size = (now, told) if told != size else (heard, size)
                late = now - heard > idle_timeout_s or now - begun > limit_s
            self._kill()
            return self._read(late)
        finally:  # also where somebody does not want to wait
            self._kill()
            self._told.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, data: bytes | None) -> None:
        """Into the sender's stdin, whose end None is."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a sender that is gone is known by its exit code
            if data is None:
                self._process.stdin.close()
            else:
                self._process.stdin.write(data)
                self._process.stdin.flush()

    def _kill(self) -> None:
        """wandb's own service ends with the process that started it."""
        self._process.kill()
        self._process.wait()

    def _read(self, is_late: bool) -> Outcome:
        self._told.seek(0)
        told = [json.loads(line) for line in self._told.read().splitlines()]
        urls = {one["job_type"]: one["url"] for one in told if "url" in one}
        if self._process.returncode == 0:
            return Outcome(urls, None)
        if is_late:
            return Outcome(urls, "W&B did not answer in time")
        last = told[-1].get("failed") if told else None
        log = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return Outcome(urls, last or (log or ["the sender ended"])[-1])


@contextmanager
def sending_to_wandb(
    run_url: str,
    config: TrackingConfig,
    kind: Kind,
    tell: Callable[[str], None],
    *,
    interval_s: float = INTERVAL_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> Iterator[None]:
    """Send the run while the block writes it, and what is left when it ends; `tell` gets a line
    about it. Never raises for W&B, and delays an interrupted job by INTERRUPTED_LIMIT_S at most."""
    mode, sending, why = choose_mode(config, os.environ), None, " (offline, or without a key)"
    if mode == "online":
        try:
            sending = SenderProcess(run_url, [kind], interval_s=interval_s)
        except OSError as error:  # no room for its files, or for a process
            why = f" ({error})"
    limit_s = LIMIT_S
    try:
        yield
    except KeyboardInterrupt:
        limit_s = INTERRUPTED_LIMIT_S
        raise
    finally:
        if sending is not None:
            report(sending.close(idle_timeout_s, limit_s), run_url, kind, tell)
        elif mode != "disabled":
            tell(f"W&B: nothing sent{why}; to send it: {command(run_url)}")


def send_now(run_url: str, config: TrackingConfig, kind: Kind, tell: Callable[[str], None]) -> None:
    """Send what the folder holds of this kind; as `sending_to_wandb`."""
    with sending_to_wandb(run_url, config, kind, tell):
        pass


def report(outcome: Outcome, run_url: str, kind: Kind, tell: Callable[[str], None]) -> None:
    """One line: where the run is, or how to send the rest."""
    if outcome.failure is not None:
        tell(f"W&B: not all sent ({outcome.failure}); to send it: {command(run_url)}")
    elif kind in outcome.urls:
        tell(f"W&B: {outcome.urls[kind]}")


def command(run_url: str) -> str:
    """What a person types to send a run."""
    return f"python -m jobs.track --run {shlex.quote(run_url)}"


def _environment(folder: Path) -> dict[str, str]:
    """The sender's: our modules are found from its folder, and wandb writes into that alone."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TMPDIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
