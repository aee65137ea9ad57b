"""What befalls the machines of a cluster that `kube` of the tools started: its control plane ends
and comes back, its nodes get and lose what the administrator gives."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kubernetes.cluster import KubeCluster


@contextmanager
def stopped(cluster: KubeCluster, name: str) -> Iterator[None]:
    """A program of the control plane is killed, and started again after the block."""
    folder = cluster.folder
    assert folder is not None, "only kube's control plane can be stopped"
    pid = _pids(folder)[name]
    place = Path("/proc") / str(pid)
    words = [word for word in (place / "cmdline").read_bytes().decode().split("\0") if word]
    environ = dict(
        entry.split("=", 1)
        for entry in (place / "environ").read_bytes().decode().split("\0")
        if entry
    )
    os.kill(pid, signal.SIGKILL)
    while place.exists():
        time.sleep(0.1)
    try:
        yield
    finally:
        _start(folder, name, words, environ)


def _start(folder: Path, name: str, words: list[str], environ: dict[str, str]) -> None:
    if name == "operator":  # it looks names up at the cluster's server, which this machine does not
        names = f"mount --bind {folder}/resolv.conf /etc/resolv.conf"
        words = ["unshare", "--mount", "sh", "-c", f"{names} && exec {shlex.join(words)}"]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # it is the cluster's from here on, and ends with it: no ResourceWarning
    pids = {**_pids(folder), name: process.pid}
    (folder / "pids").write_text("".join(f"{pid} {each}\n" for each, pid in pids.items()))


def _pids(folder: Path) -> dict[str, int]:
    lines = (folder / "pids").read_text().splitlines()
    return {line.split()[1]: int(line.split()[0]) for line in lines}


@contextmanager
def powerless(cluster: KubeCluster, node: str) -> Iterator[None]:
    """A node without power during the block; afterwards it has some, and comes back empty."""
    number = int(node.rpartition("-")[2])
    cluster.set_power(number, on=False)
    try:
        yield
    finally:
        cluster.kubectl("delete", "node", node, "--ignore-not-found")
        cluster.set_power(number, on=True)
        cluster.kubectl("wait", "--for=create", f"node/{node}", "--timeout=60s")
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=90s")
