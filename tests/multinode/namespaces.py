"""Machines simulated by Linux namespaces: each has its own network, processes, host name and
/dev/shm, and a cable to one switch, which is connected to nothing else.

    with Network() as network:
        head = network.add_machine("head")
        process = head.start("ray", "start", "--head", "--block", …)
        head.disconnect()

Needs root and the right to make namespaces; `why_not` says what is missing. All processes of a
machine end with it: they share a PID namespace, whose first process is the machine.
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
_STARTED = "machine started"
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")  # ends however the tests end
# The first process of a machine: sets up loopback and folders, then sleeps until it is killed.
_BOOT = """
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o size=160m tmpfs /dev/shm
mount --bind {folder}/disks/{name} {folder}/disk
ip link set lo up
echo {started}
exec sleep infinity
"""


def why_not() -> str | None:
    """Why no machines can be made here; None if they can."""
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
    _unshare: subprocess.Popen[str]
    _nsenters: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether it has not been killed."""
        return self._unshare.poll() is None

    def start(
        self,
        *command: str,
        environ: Mapping[str, str],
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a command on it. To end it use `end_process`: the Popen is `nsenter`, its parent."""
        nsenter = subprocess.Popen(
            [*self._enter(), *([f"--wdns={cwd}"] if cwd else []), *command],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        self._nsenters.append(nsenter)
        return nsenter

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes whose command line contains `title`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if title in " ".join(process.cmdline()) and self._holds(process.pid):
                    found.append(process)
        return found

    def disconnect(self) -> None:
        """Disconnect the network cable: packets are lost without an error."""
        self._set_link("down")

    def connect(self) -> None:
        """Connect the cable again."""
        self._set_link("up")

    def kill(self) -> None:
        """Kill every process at once; the kernel closes their connections."""
        if self.runs:
            os.kill(self._init_pid, signal.SIGKILL)
        processes: list[subprocess.Popen[str] | subprocess.Popen[bytes]] = [self._unshare]
        for process in processes + self._nsenters:
            process.wait(timeout=20)
            if process.stdout is not None:
                process.stdout.close()

    @property
    def _init_pid(self) -> int:
        return _only_child(self._unshare.pid)

    def _enter(self) -> Sequence[str]:
        target = f"--target={self._init_pid}"
        return ("nsenter", target, "--net", "--mount", "--pid", "--uts", "--ipc")

    def _holds(self, pid: int) -> bool:
        mine = Path(f"/proc/{self._init_pid}/ns/pid").readlink()
        return mine == Path(f"/proc/{pid}/ns/pid").readlink()

    def _set_link(self, state: str) -> None:
        _run("nsenter", f"--target={self._init_pid}", "--net", "ip", "link", "set", "eth0", state)


class Network:
    """A switch and the machines connected to it; leaving the context ends and removes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._next_address = 1

    def __enter__(self) -> Self:
        (self.folder / "disks").mkdir(parents=True)
        (self.folder / "disk").mkdir()
        self._switch = subprocess.Popen(
            [*_DIES_WITH_PARENT, "unshare", "--net", "sleep", "infinity"]
        )
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
        """Start one, with the next free address."""
        address = f"{_NET}.{self._next_address}"
        port = f"port{self._next_address}"
        self._next_address += 1
        (self.folder / "disks" / name).mkdir(exist_ok=True)
        boot = _BOOT.format(name=name, folder=self.folder, started=_STARTED)
        own = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
        unshare = subprocess.Popen(
            [*_DIES_WITH_PARENT, "unshare", *own, "--mount-proc", "sh", "-ec", boot],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the tests only; they end the machines
        )
        machine = Machine(name, address, self.folder / "disk", unshare)
        self.machines.append(machine)
        assert unshare.stdout is not None
        if unshare.stdout.readline().strip() != _STARTED:
            raise RuntimeError(f"{name}: the machine did not start, exit {unshare.wait()}")
        init = str(machine._init_pid)
        self._on_switch(
            *("ip", "link", "add", port, "type", "veth"),
            *("peer", "name", "eth0", "netns", init),
        )
        self._on_switch("ip", "link", "set", port, "master", "switch", "up")
        inside = ("nsenter", f"--target={init}", "--net")
        _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        machine.connect()
        return machine

    def _on_switch(self, *command: str) -> None:
        assert self._switch is not None
        _run("nsenter", f"--target={self._switch.pid}", "--net", *command)


def end_process(nsenter: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the command that `Machine.start` runs; its parent `nsenter` ends with it."""
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(_only_child(nsenter.pid), number)


def _await_network(pid: int) -> None:
    """Return once the process has a network namespace of its own."""
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
