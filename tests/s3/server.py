"""A real S3 server for the tests, on loopback: Ceph's radosgw, as Debian packages it.

    python -m tests.s3.server [--if-possible] -- COMMAND …

starts it in a temporary folder, runs the command with the environment that reaches it, and ends
and removes all of it, however the command ends. An endpoint named in TEST_S3_ENDPOINT, with its
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, is taken instead. With `--if-possible`
the command runs without one where none can be had. Its objects are in the memory of the
storage daemon, so they outlive the gateway, which a test may kill.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common")
_BALLAST_BYTES = 2**26
ENDPOINT, FOLDER = "TEST_S3_ENDPOINT", "TEST_S3_FOLDER"
ACCESS_KEY, SECRET_KEY = "pneumo-tests", "only-on-loopback"
STRANGER_KEY, STRANGER_SECRET = "pneumo-stranger", "no-right-to-anything"

_DAEMONS = ("gateway", "osd", "mon")
_START_TIMEOUT_S = 120.0
_STARTS = 3
_MEMORY = Path("/dev/shm")
_MEMORY_NEEDED_BYTES = 1 << 30
# Ceph's command line is a script for Debian's python3, not for the one of a virtual environment.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.$pid.asok
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
pid file =
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/gateway
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
# Objects in memory, one copy of each.
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
# A gateway that was killed is forgotten soon: changes to buckets wait for it.
osd client watch timeout = 3
# One host needs few placement groups; each costs time at the start.
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon max pg per osd = 2000
# A single monitor waits for no other.
paxos propose interval = 0.05
paxos min wait = 0.01
# What was deleted is freed within seconds, not after two hours: checkpoints would fill the memory.
rgw gc obj min wait = 20
rgw gc processor period = 10
rgw gc processor max time = 10
# No warnings of a full disk.
mon data avail crit = 0
mon data avail warn = 0

[client.gateway]
# Without tcp_nodelay every small answer waits 40 ms for an acknowledgement.
rgw frontends = beast endpoint={address}:{port} tcp_nodelay=1
rgw run sync thread = false
rgw enable usage log = false
rgw enable ops log = false
"""


class CephServer:
    """One monitor, one storage daemon and one gateway in `folder`; equal folders name the same
    server, from any process. The gateway listens on `address` of this machine, and
    `choose_ports` says on which port it and the monitor do."""

    def __init__(
        self,
        folder: Path,
        address: str = "127.0.0.1",
        choose_ports: Callable[[int], list[int]] | None = None,
    ) -> None:
        self.folder, self.address = folder, address
        self.choose_ports = choose_ports or free_ports

    @property
    def endpoint(self) -> str:
        """Where the gateway listens."""
        return (self.folder / "endpoint").read_text()

    def start(self) -> None:
        """Set up in the empty folder, and return once S3 requests are answered.

        When a daemon fails, for instance because another process took its port, all daemons are
        started again. RuntimeError, with the ends of the daemons' logs, after the third time.
        """
        for start in range(1, _STARTS + 1):
            try:
                self._start()
            except RuntimeError as error:
                self.stop()
                failed = f"start {start} of {_STARTS} of the S3 server: {error}{self._read_logs()}"
                if start == _STARTS:
                    raise RuntimeError(failed) from error
                print(failed, file=sys.stderr, flush=True)
                self._clear()
            else:
                return

    def _start(self) -> None:
        port, mon_port = self.choose_ports(2)
        fsid = str(uuid.uuid4())
        (self.folder / "endpoint").write_text(f"http://{self.address}:{port}")
        (self.folder / "ceph.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder, fsid=fsid, address=self.address, port=port, mon_port=mon_port
            )
        )
        for name in ("mon", "osd", "gateway"):
            (self.folder / name).mkdir()
        self._make_keys()
        self._start_monitor(fsid, mon_port)
        self._start_storage()
        self.start_gateway()
        self._fill_a_little()
        self._add_user("tests", ACCESS_KEY, SECRET_KEY)
        self._add_user("stranger", STRANGER_KEY, STRANGER_SECRET)

    def start_gateway(self) -> None:
        """Start radosgw, also again after `kill_gateway`; return once it answers."""
        pid = self.spawn("gateway", "radosgw", "-f", "-n", "client.gateway")
        self._wait(self.answers, "gateway", pid)

    def kill_gateway(self) -> None:
        """End radosgw with SIGKILL; what it stored stays."""
        self._end("gateway", signal.SIGKILL)

    def stop(self) -> None:
        """End the daemons by their pids."""
        for name in _DAEMONS:
            self._end(name, signal.SIGTERM)

    def _make_keys(self) -> None:
        rights = {
            "mon.": {"mon": "allow *"},
            "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
            "client.gateway": {"mon": "allow rw", "osd": "allow rwx"},
            "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
        }
        keyring = str(self.folder / "keyring")
        self._run("ceph-authtool", "--create-keyring", keyring)
        for name, caps in rights.items():
            granted = [word for cap in caps.items() for word in ("--cap", *cap)]
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *granted)

    def _start_monitor(self, fsid: str, port: int) -> None:
        map_path = str(self.folder / "monmap")
        self._run(
            *("monmaptool", "--create", "--fsid", fsid),
            *("--addv", "a", f"[v2:127.0.0.1:{port}]", map_path),
        )
        keyring = str(self.folder / "keyring")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_path, "--keyring", keyring)
        pid = self.spawn("mon", "ceph-mon", "-f", "-i", "a")

        def answers() -> bool:
            command = ("ceph", "--connect-timeout", "2", "mon", "stat")
            return self._call(*command).returncode == 0

        self._wait(answers, "mon", pid)

    def _start_storage(self) -> None:
        osd_id = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd_id)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        pid = self.spawn("osd", "ceph-osd", "-f", "-i", "0")

        def is_up() -> bool:
            state = json.loads(self._run("ceph", "osd", "stat", "-f", "json"))
            return bool(state["num_up_osds"] == 1)

        self._wait(is_up, "osd", pid)

    def _fill_a_little(self) -> None:
        """Keep the storage's count of used bytes above 0: it is wrong by some megabytes where much
        is deleted, and a storage that uses less than nothing takes itself for full."""
        ballast = self.folder / "ballast"
        ballast.write_bytes(bytes(_BALLAST_BYTES))
        self._run("rados", "-p", ".rgw.root", "put", "ballast", str(ballast))
        ballast.unlink()

    def _add_user(self, name: str, access_key: str, secret_key: str) -> None:
        self._run(
            *("radosgw-admin", "-n", "client.gateway", "user", "create", f"--uid={name}"),
            *(f"--display-name={name}", f"--access-key={access_key}"),
            f"--secret-key={secret_key}",
        )

    def _environment(self) -> dict[str, str]:
        return {**_ENVIRONMENT, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _run(self, *command: str) -> str:
        done = self._call(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
        return done.stdout

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                env=self._environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=_START_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(str(error)) from error

    def spawn(self, name: str, *command: str) -> int:
        """Start a daemon; its pid."""
        with (self.folder / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the tests; the server is ended after them
            )
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        # From here on only the pid file has it: another process may end the daemon.
        process.returncode = 0
        return process.pid

    def _end(self, name: str, signal_number: signal.Signals) -> None:
        path = self.folder / f"{name}.pid"
        if not path.exists():
            return
        pid = int(path.read_text())
        if _is_alive(pid):
            os.kill(pid, signal_number)
        deadline_s = time.monotonic() + 20
        while _is_alive(pid):
            if time.monotonic() > deadline_s:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        path.unlink()

    def answers(self) -> bool:
        """Whether the gateway answers requests."""
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _wait(self, ready: Callable[[], bool], name: str, pid: int) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not ready():
            if time.monotonic() > deadline_s or not _is_alive(pid):
                raise RuntimeError(f"{name} did not start")
            time.sleep(0.05)

    def _read_logs(self) -> str:
        """The end of each daemon's output and log."""
        paths = sorted(path for path in self.folder.iterdir() if path.suffix in (".out", ".log"))
        return "".join(f"\n{path.name}: {path.read_text()[-2000:]}" for path in paths)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_alive(pid: int) -> bool:
    """Whether the process is alive; a zombie is not."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] not in {"Z", "X"}


def free_ports(number: int) -> list[int]:
    """Free ports of the loopback interface."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def choose_parent_folder() -> Path | None:
    """A folder in memory if there is enough: on a disk that tests keep busy the monitor waits."""
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _MEMORY_NEEDED_BYTES:
        return _MEMORY
    return None


def install() -> None:
    """Install the packages if they are absent; SystemExit with what to do if that fails."""
    if all(shutil.which(name, path=_ENVIRONMENT["PATH"]) for name in ("radosgw", *PACKAGES[:2])):
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(
            f"error: no S3 server here: {command} (as root), or name one: {ENDPOINT}=http://… "
            "AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…"
        )
    print("installing Ceph's radosgw from Debian's packages", file=sys.stderr, flush=True)
    for words in (["apt-get", "update"], command.split()):
        done = subprocess.run(
            words,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(words)} failed:\n{done.stderr}")


def _run(command: list[str], environment: dict[str, str]) -> int:
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command got it too, and says so itself
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()


def main(arguments: list[str]) -> int:
    """Run a command beside a server; its exit code."""
    if_possible = arguments[:1] == ["--if-possible"]
    separator, *command = arguments[if_possible:] or [""]
    if separator != "--" or not command:
        raise SystemExit("usage: python -m tests.s3.server [--if-possible] -- COMMAND …")
    if os.environ.get(ENDPOINT):
        return _run(command, {})
    try:
        install()
    except SystemExit as error:
        if not if_possible:
            raise
        print(f"{error}\nwithout a server: {' '.join(command)}", file=sys.stderr, flush=True)
        return _run(command, {})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pneumo-s3-", dir=choose_parent_folder()) as folder:
        server = CephServer(Path(folder))
        try:
            server.start()
            return _run(
                command,
                {
                    ENDPOINT: server.endpoint,
                    FOLDER: folder,
                    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                },
            )
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
