"""The job's side of W&B: starts the sender process, and waits for it for a limited time. W&B can
neither delay a job for longer nor change its result.
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
from pneumo.reporting.tracking.mode import add_saved_settings, choose_mode

INTERVAL_S = 10.0
"""How often the folder of a running job is sent."""
IDLE_TIMEOUT_S = 60.0
"""A sender that has reported nothing for this long is killed."""
LIMIT_S = 300.0
"""How long the end of a job waits at most."""
INTERRUPTED_LIMIT_S = 4.0
"""The same for an interrupted job: Kubernetes kills it 30 s after SIGTERM, and its checkpoint may
take 25 s."""


@dataclass(frozen=True)
class Outcome:
    """The result of a sender."""

    urls: Mapping[str, str]
    """By job type, the page of the last run that has arrived."""
    failure: str | None
    """Why not everything has arrived; None where it has."""


class SenderProcess:
    """The process that sends a run's folder; in its own session, so that it gets no Ctrl-C."""

    def __init__(
        self,
        run_url: str,
        kinds: Sequence[Kind],
        tracking: Mapping[str, Any] | None = None,
        *,
        interval_s: float | None = None,
    ) -> None:
        """Start it. `tracking` replaces the run's own settings; with `interval_s` it sends the
        folder at this interval until it is closed."""
        self._folder = Path(tempfile.mkdtemp(prefix="pneumo-tracking-"))
        self._output = (self._folder / "output").open("w+b")
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.tracking.sender"],
                cwd=self._folder,
                env=_environment(self._folder),
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=log,
                start_new_session=True,
            )
        request = {"run": run_url, "kinds": list(kinds), "tracking": dict(tracking or {})}
        self._write(json.dumps({**request, "interval_s": interval_s}).encode())

    def close(
        self, idle_timeout_s: float = IDLE_TIMEOUT_S, limit_s: float = float("inf")
    ) -> Outcome:
        """Wait until everything is sent, nothing was reported for `idle_timeout_s`, or `limit_s`
        has passed; then kill the process."""
        self._write(None)
        begun_s = heard_s = time.monotonic()
        size, is_late = 0, False
        try:
            while self._process.poll() is None and not is_late:
                time.sleep(0.05)
                now_s, new_size = time.monotonic(), os.fstat(self._output.fileno()).st_size
                heard_s, size = (now_s, new_size) if new_size != size else (heard_s, size)
                is_late = now_s - heard_s > idle_timeout_s or now_s - begun_s > limit_s
            self._kill()
            return self._read(is_late)
        finally:  # also after Ctrl-C
            self._kill()
            self._output.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, data: bytes | None) -> None:
        """Write to the sender's stdin; None closes it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the exit code tells that a sender has ended
            if data is None:
                self._process.stdin.close()
            else:
                self._process.stdin.write(data)
                self._process.stdin.flush()

    def _kill(self) -> None:
        """Kill the sender; wandb's own service process ends with it."""
        self._process.kill()
        self._process.wait()

    def _read(self, is_late: bool) -> Outcome:
        self._output.seek(0)
        messages = read_messages(self._output.read())
        urls = {
            each["job_type"]: each["url"] for each in messages if {"job_type", "url"} <= {*each}
        }
        if self._process.returncode == 0:
            return Outcome(urls, None)
        if is_late:
            return Outcome(urls, "W&B did not answer in time")
        last = messages[-1].get("failed") if messages else None
        log = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return Outcome(urls, last or (log or ["the sender ended"])[-1])


def read_messages(output: bytes) -> list[dict[str, Any]]:
    """The sender's messages; other lines, such as warnings that wandb prints, are left out."""
    messages = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            messages.append(json.loads(line))
    return [message for message in messages if isinstance(message, dict)]


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
    """Send the run while the block writes it, and the rest when it ends; `tell` gets a line about
    it. Never raises for W&B, and delays an interrupted job by INTERRUPTED_LIMIT_S at most."""
    mode, sender, why = choose_mode(config, os.environ), None, " (offline, or without a key)"
    if mode == "online":
        try:
            sender = SenderProcess(run_url, [kind], interval_s=interval_s)
        except OSError as error:  # a full disk, or too many processes
            why = f" ({error})"
    limit_s = LIMIT_S
    try:
        yield
    except KeyboardInterrupt:
        limit_s = INTERRUPTED_LIMIT_S
        raise
    finally:
        if sender is not None:
            try:
                outcome = sender.close(idle_timeout_s, limit_s)
            except Exception as error:  # such as a full disk
                outcome = Outcome({}, f"{type(error).__name__}: {error}")
            report(outcome, run_url, kind, tell)
        elif mode != "disabled":
            tell(f"W&B: nothing sent{why}; to send it: {command(run_url)}")


def send_now(run_url: str, config: TrackingConfig, kind: Kind, tell: Callable[[str], None]) -> None:
    """Send the folder's run of this kind now; otherwise as `sending_to_wandb`."""
    with sending_to_wandb(run_url, config, kind, tell):
        pass


def report(outcome: Outcome, run_url: str, kind: Kind, tell: Callable[[str], None]) -> None:
    """Tell in one line where the W&B run is, or how to send the rest."""
    if outcome.failure is not None:
        tell(f"W&B: not all sent ({outcome.failure}); to send it: {command(run_url)}")
    elif kind in outcome.urls:
        tell(f"W&B: {outcome.urls[kind]}")


def command(run_url: str) -> str:
    """The command that sends a run."""
    return f"python -m jobs.track --run {shlex.quote(run_url)}"


def _environment(folder: Path) -> dict[str, str]:
    """The sender's environment: it can import our modules, and wandb writes only to `folder`, so
    it does not find its own settings files."""
    return {
        **add_saved_settings(os.environ),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TMPDIR": str(folder),
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
