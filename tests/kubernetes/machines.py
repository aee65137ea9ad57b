"""Faults of the machines of a cluster that `kube` of the tools started: programs of its control
plane are killed and started again, nodes lose power."""

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
    """Kill a program of the control plane; start it again after the block."""
    folder = cluster.folder
    assert folder is not None, "only kube's control plane can be stopped"
    pid = _pids(folder)[name]
    process = Path("/proc") / str(pid)
    words = [word for word in (process / "cmdline").read_bytes().decode().split("\0") if word]
    environ = dict(
        entry.split("=", 1)
        for entry in (process / "environ").read_bytes().decode().split("\0")
        if entry
    )
    os.kill(pid, signal.SIGKILL)
    while process.exists():
        time.sleep(0.1)
    try:
        yield
    finally:
        _start(folder, name, words, environ)


def _start(folder: Path, name: str, words: list[str], environ: dict[str, str]) -> None:
    if name == "operator":  # it resolves names at the cluster's DNS server
        names = f"mount --bind {folder}/resolv.conf /etc/resolv.conf"
        words = ["unshare", "--mount", "sh", "-c", f"{names} && exec {shlex.join(words)}"]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # it ends with the cluster, not here: no ResourceWarning
    pids = {**_pids(folder), name: process.pid}
    (folder / "pids").write_text("".join(f"{pid} {each}\n" for each, pid in pids.items()))


def _pids(folder: Path) -> dict[str, int]:
    lines = (folder / "pids").read_text().splitlines()
    return {line.split()[1]: int(line.split()[0]) for line in lines}


@contextmanager
def powerless(cluster: KubeCluster, node: str) -> Iterator[None]:
    """Switch a node off during the block; afterwards it starts again, empty."""
    number = int(node.rpartition("-")[2])
    cluster.set_power(number, on=False)
    try:
        yield
    finally:
        cluster.kubectl("delete", "node", node, "--ignore-not-found")
        cluster.set_power(number, on=True)
        cluster.kubectl("wait", "--for=create", f"node/{node}", "--timeout=60s")
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=90s")
