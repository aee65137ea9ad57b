"""Machines made of Linux namespaces: each has a network, processes, a name and a /dev/shm of its
own, and a cable to one switch that leads nowhere else.

    with Network() as network:
        head = network.add_machine("head")
        process = head.start("ray", "start", "--head", "--block", …)
        head.cut()

Needs root and the right to make namespaces; `why_not` says what is missing. Whatever runs on a
machine ends with it: its processes share a PID namespace, whose first process is the machine.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

import psutil

_NET = "192.0.2"  # RFC 5737: an address of documentation, in no real network
_POWERED_ON = "powered on"
_MORTAL = ("setpriv", "--pdeathsig", "KILL")  # ends with the tests, however those end
# What a machine does by itself: its loopback and its own folders, then nothing until it is ended.
_BOOT = """
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o size=160m tmpfs /dev/shm
mount --bind {folder}/disks/{name} {folder}/disk
ip link set lo up
echo {powered_on}
exec sleep infinity
"""


def why_not() -> str | None:
    """What keeps this process from making machines, or None."""
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    namespaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork")
    command = ["unshare", *namespaces, "ip", "link", "set", "lo", "up"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces allowed here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(eq=False)
class Machine:
    """One of the network's machines."""

    name: str
    address: str
    disk: Path
    """Its own folder, at the same path on every machine."""
    _power: subprocess.Popen[str]
    _guardians: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether it has not been killed."""
        return self._power.poll() is None

    def start(
        self,
        *command: str,
        environ: Mapping[str, str],
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a command on it. To end the command use `end_process`: this Popen is its guardian."""
        guardian = subprocess.Popen(
            [*self._enter(), *([f"--wdns={cwd}"] if cwd else []), *command],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        self._guardians.append(guardian)
        return guardian

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of its processes whose command line holds `title`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if title in " ".join(process.cmdline()) and self._holds(process.pid):
                    found.append(process)
        return found

    def cut(self) -> None:
        """Pull the network cable: packets vanish, nobody is told."""
        self._set_link("down")

    def mend(self) -> None:
        """Put the cable in again."""
        self._set_link("up")

    def kill(self) -> None:
        """Every process ends at once, without a word of its own; the kernel closes their
        connections."""
        if self.runs:
            os.kill(self._init_pid, signal.SIGKILL)
        for process in (self._power, *self._guardians):
            process.wait(timeout=20)
            if process.stdout is not None:
                process.stdout.close()

    @property
    def _init_pid(self) -> int:
        return _only_child(self._power.pid)

    def _enter(self) -> Sequence[str]:
        target = f"--target={self._init_pid}"
        return ("nsenter", target, "--net", "--mount", "--pid", "--uts", "--ipc")

    def _holds(self, pid: int) -> bool:
        mine = Path(f"/proc/{self._init_pid}/ns/pid").readlink()
        return mine == Path(f"/proc/{pid}/ns/pid").readlink()

    def _set_link(self, state: str) -> None:
        _run("nsenter", f"--target={self._init_pid}", "--net", "ip", "link", "set", "eth0", state)


class Network:
    """A switch, and the machines at it. Leaving the context ends and removes everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._next_address = 1

    def __enter__(self) -> Self:
        (self.folder / "disks").mkdir(parents=True)
        (self.folder / "disk").mkdir()
        self._switch = subprocess.Popen([*_MORTAL, "unshare", "--net", "sleep", "infinity"])
        try:
            _await_network(self._switch.pid)
            self._on_switch("ip", "link", "add", "switch", "type", "bridge")
            self._on_switch("ip", "link", "set", "switch", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for machine in self.machines:
            with contextlib.suppress(psutil.Error, OSError, subprocess.TimeoutExpired):
                machine.kill()
        if self._switch is not None:  # its network goes with its process, and the cables with it
            self._switch.kill()
            self._switch.wait(timeout=20)

    def add_machine(self, name: str) -> Machine:
        """Power one on, and give it the next address."""
        address = f"{_NET}.{self._next_address}"
        port = f"port{self._next_address}"
        self._next_address += 1
        (self.folder / "disks" / name).mkdir(exist_ok=True)
        boot = _BOOT.format(name=name, folder=self.folder, powered_on=_POWERED_ON)
        own = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
        power = subprocess.Popen(
            [*_MORTAL, "unshare", *own, "--mount-proc", "sh", "-ec", boot],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests; machines are ended after them
        )
        machine = Machine(name, address, self.folder / "disk", power)
        self.machines.append(machine)
        assert power.stdout is not None
        if power.stdout.readline().strip() != _POWERED_ON:
            raise RuntimeError(f"{name}: the machine did not start, exit {power.wait()}")
        init = str(machine._init_pid)
        self._on_switch(
            *("ip", "link", "add", port, "type", "veth"),
            *("peer", "name", "eth0", "netns", init),
        )
        self._on_switch("ip", "link", "set", port, "master", "switch", "up")
        inside = ("nsenter", f"--target={init}", "--net")
        _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        machine.mend()
        return machine

    def _on_switch(self, *command: str) -> None:
        assert self._switch is not None
        _run("nsenter", f"--target={self._switch.pid}", "--net", *command)


def end_process(guardian: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the command that `Machine.start` runs; its guardian takes over its end."""
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(_only_child(guardian.pid), number)


def _await_network(pid: int) -> None:
    """Return once the process has left this process's network for its own."""
    ours = Path("/proc/self/ns/net").readlink()
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{pid}/ns/net").readlink() == ours:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"process {pid} has no network of its own")
        time.sleep(0.01)


def _only_child(pid: int) -> int:
    deadline_s = time.monotonic() + 5
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        if time.monotonic() > deadline_s:
            raise ProcessLookupError(f"process {pid} has no child")
        time.sleep(0.01)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
