"""Ray on simulated machines, and `python -m jobs.…` as a driver on the head's machine."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests import CHECKOUT
from tests.multinode.namespaces import Machine, Network, end_process

_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_GCS_PORT = 6379
_OBJECT_STORE_BYTES = 80 * 2**20
_START_TIMEOUT_S = 90.0

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""A silent node is declared dead after some 20 s instead of 60. Read by the head when it starts; a
job cannot set them."""


class RayCluster:
    """A head without CPUs and workers of one CPU each, behind token authentication."""

    def __init__(self, network: Network, **environ: str) -> None:
        self.network = network
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "PNEUMO_"))}
        self.environ = {
            **own,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}",
            "HOME": str(network.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            **HEALTH_CHECKS,
            **environ,
        }
        self.head: Machine
        self._start_node("head")

    @property
    def workers(self) -> list[Machine]:
        """The worker machines that have not been killed."""
        return [m for m in self.network.machines if m.name.startswith("worker") and m.runs]

    def add_workers(self, number: int) -> None:
        """Start this many machines of one CPU at once, and return when they have joined."""
        names = [f"worker-{len(self.network.machines) + i}" for i in range(number)]
        machines = [self._start_node(name, wait=False) for name in names]
        for machine in machines:
            self._wait(machine)

    def drain(self, machine: Machine, *, grace_s: int) -> subprocess.Popen[bytes]:
        """Run on the machine the `preStop` command of a spot worker's pod; it ends when the
        machine's training workers have ended."""
        return machine.start(
            *(sys.executable, "-m", "jobs.ray_cluster.node_drain", "--grace-s", str(grace_s)),
            environ=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
        )

    @contextlib.contextmanager
    def driver(self, *arguments: str, at_terminal: bool = False) -> Iterator[Driver]:
        """`python -m arguments` beside the head, with a terminal or not; killed at the end if it
        still runs."""
        reads, writes = pty.openpty() if at_terminal else os.pipe()
        if at_terminal:
            termios.tcsetwinsize(writes, (24, 120))
        nsenter = self.head.start(
            *(sys.executable, "-u", "-m", *arguments),
            environ={**self.environ, "RAY_ADDRESS": self._gcs, "TERM": "xterm"},
            stdout=writes,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
        )
        os.close(writes)
        driver = Driver(nsenter, reads)
        try:
            yield driver
        finally:
            driver.signal(signal.SIGKILL)
            driver.wait(timeout_s=20)

    @property
    def _gcs(self) -> str:
        return f"{self.head.address}:{_GCS_PORT}"

    def _start_node(self, name: str, *, wait: bool = True) -> Machine:
        machine = self.network.add_machine(name)
        if name == "head":
            self.head = machine
        role = (
            ["--head", f"--port={_GCS_PORT}", f"--temp-dir={machine.disk}", "--num-cpus=0"]
            if name == "head"
            else [f"--address={self._gcs}", "--num-cpus=1"]
        )
        with self._log(machine).open("wb") as log:
            machine.start(
                *(*_RAY, "start", "--block", "--disable-usage-stats", "--num-gpus=0", *role),
                f"--node-ip-address={machine.address}",
                f"--object-store-memory={_OBJECT_STORE_BYTES}",
                environ=self.environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
            )
        if wait:
            self._wait(machine)
        return machine

    def _wait(self, machine: Machine) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while "Ray runtime started" not in (output := self._log(machine).read_text()):
            if time.monotonic() > deadline_s or "rror" in output:
                raise RuntimeError(f"Ray did not start on {machine.name}:\n{output}")
            time.sleep(0.1)

    def _log(self, machine: Machine) -> Path:
        return self.network.folder / f"{machine.name}.log"


class Driver:
    """A job that runs. Its output, read from the file descriptor `reads`, is kept with the time of
    each line."""

    def __init__(self, nsenter: subprocess.Popen[bytes], reads: int) -> None:
        self.nsenter, self._reads = nsenter, reads
        self.started_s = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for_line(self, pattern: str, *, timeout_s: float, after: int = 0) -> float:
        """When, by time.monotonic, the first line that holds the pattern came, among those after
        the first `after`. Raises RuntimeError when the job ends or the time passes without one."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended = not self._reader.is_alive()
            for when_s, line in self.lines[after:]:
                if re.search(pattern, line):
                    return when_s
            if ended or time.monotonic() > deadline_s:
                raise RuntimeError(f"no line with {pattern!r} in:\n{self.said}")
            time.sleep(0.02)

    def wait(self, *, timeout_s: float) -> int:
        """Its exit code; of a signal, the negative number."""
        try:
            code = self.nsenter.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"still running after {timeout_s} s:\n{self.said}") from error
        self._reader.join(timeout=10)
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.nsenter.poll() is None:
            end_process(self.nsenter, number)

    @property
    def said(self) -> str:
        """All lines of the output, with the seconds since the start."""
        return "\n".join(f"{when - self.started_s:6.1f} {line}" for when, line in list(self.lines))

    def _read(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):  # raised by a terminal whose programs have all ended
            while chunk := os.read(self._reads, 65536):
                # At a terminal a progress bar is redrawn in the same line.
                *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
                self._keep(whole)
        self._keep([rest])
        os.close(self._reads)

    def _keep(self, lines: list[bytes]) -> None:
        output = (re.sub(rb"\x1b\[[0-9;]*\w", b"", line).decode(errors="replace") for line in lines)
        self.lines += [(time.monotonic(), line.rstrip()) for line in output if line.strip()]
