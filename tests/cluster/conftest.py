"""`ray_cluster`: a real `ray start --head` with token authentication, on free ports."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pneumo.errors import PneumoError
from tests import CHECKOUT


@dataclass(frozen=True)
class RayCluster:
    """Where it is, and the environment that a laptop needs to talk to it."""

    address: str
    environ: Mapping[str, str]

    def command(
        self, *arguments: str, timeout_s: float = 90, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """`python -m cluster arguments` against this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            env={**self.environ, **environ},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    with _run_cluster(()) as cluster:
        yield cluster


@pytest.fixture
def scripted_cluster() -> Iterator[RayCluster]:
    """One whose head a script started with `&`: it ignores SIGINT, and so do its children."""
    with _run_cluster(("sh", "-c", '"$@" & wait', "sh")) as cluster:
        yield cluster


@contextmanager
def _run_cluster(before: Sequence[str]) -> Iterator[RayCluster]:
    """A head whose command line begins with `before`."""
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # sockets below it: a short path
    token = secrets.token_hex(16)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "PNEUMO_"))}
    own |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}",
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    deadline_s = time.monotonic() + 240
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for tries_left in (2, 1, 0):  # another process may take a port meanwhile
            ports = _free_ports(5)
            address = f"http://127.0.0.1:{ports[0]}"
            head = _start(before, folder, ports, own)
            stack.callback(_stop, head)
            try:
                _wait_until_ready(address, own, head, folder, deadline_s)
                break
            except RuntimeError:
                if not tries_left or time.monotonic() > deadline_s:
                    raise
        yield RayCluster(address, {**own, "RAY_ADDRESS": address, "WANDB_MODE": "disabled"})


def _start(
    before: Sequence[str], folder: Path, ports: list[int], environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    dashboard, gcs, client, agent, metrics = ports
    with (folder / "ray-start.log").open("wb") as log:
        return subprocess.Popen(
            [
                *before, str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
                f"--port={gcs}", f"--ray-client-server-port={client}",
                "--node-ip-address=127.0.0.1",
                "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
                "--num-cpus=2", "--num-gpus=0", f"--object-store-memory={80 * 2**20}",
                "--disable-usage-stats", "--include-log-monitor=false",
            ],
            env=dict(environ), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _wait_until_ready(
    address: str,
    environ: Mapping[str, str],
    head: subprocess.Popen[bytes],
    folder: Path,
    deadline_s: float,
) -> None:
    from cluster.ray import client, jobs

    while True:
        try:
            jobs.list_jobs(client.connect(address, environ))
        except PneumoError as error:
            log = (folder / "ray-start.log").read_text(errors="replace")
            # Where the dashboard's port is taken the head runs on without one.
            failed = head.poll() is not None or "already occupied" in log
            if failed or time.monotonic() > deadline_s:
                raise RuntimeError(f"ray start --head did not come up: {error}\n{log}") from error
            time.sleep(0.3)
        else:
            return


def _stop(head: subprocess.Popen[bytes]) -> None:
    """End the processes that this head started, by their ids; never `ray stop`, which ends all."""
    import ray  # noqa: F401  # brings its own psutil
    import psutil  # isort: skip

    try:
        mine = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        mine = []
    head.terminate()
    _, left = psutil.wait_procs(mine, timeout=3)
    for process in left:
        process.kill()
    try:
        head.wait(timeout=10)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
