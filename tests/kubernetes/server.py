"""Starts what the tests of this folder need, runs a command, and stops everything.

    python -m tests.kubernetes.server -- COMMAND …

The cluster is the one that PNEUMO_TEST_KUBECONFIG names, else one that `kube` of the tools beside
the checkout starts (as root), else none, and the tests skip with the reason. An S3 server listens
on an address that pods reach, unless TEST_S3_ENDPOINT names one.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tests import CHECKOUT
from tests.kubernetes.cluster import HOST, KUBECONFIG, REASON, TOOLS, KubeCluster, is_gone
from tests.s3 import server as s3

NODES = 3
_START_TIMEOUT_S = 300
_PREFIX = "pneumo-kube-"
_LOCK = Path(tempfile.gettempdir()) / "pneumo-kube.lock"


def main(arguments: list[str]) -> int:
    """Run a command beside cluster and S3 server; its exit code."""
    separator, *command = arguments or [""]
    if separator != "--" or not command:
        raise SystemExit("usage: python -m tests.kubernetes.server -- COMMAND …")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        environ = stack.enter_context(running_cluster(os.environ))
        environ |= stack.enter_context(running_s3({**os.environ, **environ}))
        return subprocess.call(command, env={**os.environ, **environ})


@contextlib.contextmanager
def running_cluster(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment that names the cluster, or says why there is none."""
    if environ.get(KUBECONFIG):
        yield {}
        return
    reason = why_not()
    if reason:
        print(f"no Kubernetes cluster here: {reason}", file=sys.stderr, flush=True)
        yield {REASON: reason}
        return
    with contextlib.ExitStack() as stack:
        # One cluster a machine at a time. The lock goes with its process, so a cluster of these
        # tests that is there once the lock is held was left by a run that was killed.
        stack.enter_context(locked(_LOCK))
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
        )
        cluster_folder = Path(folder) / "cluster"
        stack.callback(_stop, cluster_folder)
        _start(cluster_folder)
        _remove_visibility_api(cluster_folder)
        path = f"{cluster_folder / 'bin'}{os.pathsep}{environ.get('PATH', '')}"
        yield {KUBECONFIG: str(cluster_folder / "kubeconfig"), "PATH": path}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; wait for it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for the Kubernetes cluster of another run", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_left_cluster(refusal: str) -> Path | None:
    """The folder of a cluster of these tests that `kube up` found running, from its message."""
    named = re.search(r"there is a cluster already.*kube down (\S+)", refusal)
    folder = Path(named[1]) if named else None
    return folder if folder and folder.parent.name.startswith(_PREFIX) else None


def _start(cluster_folder: Path) -> None:
    words = ["up", str(cluster_folder), "--nodes", str(NODES), "--kueue"]
    words += ["--checkout", str(CHECKOUT)]
    done = _kube(*words)
    left = find_left_cluster(done.stderr)
    if left:
        print(f"stopping {left}, left by a run that was killed", file=sys.stderr, flush=True)
        _stop(left)
        shutil.rmtree(left.parent, ignore_errors=True)
        done = _kube(*words)
    if done.returncode:
        raise SystemExit(f"error: no Kubernetes cluster: {done.stderr}")


def _stop(cluster_folder: Path) -> None:
    if (cluster_folder / "pids").exists():
        _kube("down", str(cluster_folder))


def why_not() -> str:
    """Why no cluster can be started on this machine; "" if nothing prevents it."""
    if not (TOOLS / "kube").is_file():
        return f"no {TOOLS / 'kube'}; name a cluster with KubeRay in {KUBECONFIG}"
    if os.geteuid() != 0:
        return "kube needs root"
    cgroups = Path("/sys/fs/cgroup")
    if not os.access(cgroups, os.W_OK) or not any(cgroups.iterdir()):
        return "a sandbox without cgroups"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "true"], capture_output=True, check=False
    )
    return "a sandbox without namespaces" if tried.returncode else ""


def _kube(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOLS / "kube", *words],
        capture_output=True,
        text=True,
        timeout=_START_TIMEOUT_S,
        check=False,
    )


def _remove_visibility_api(cluster_folder: Path) -> None:
    """Kueue registers an API of its own, which kube's API server cannot reach; while it is
    registered, deleting a namespace never ends."""
    api = KubeCluster(cluster_folder / "kubeconfig")
    for version in ("v1beta1", "v1beta2"):
        path = f"/apis/apiregistration.k8s.io/v1/apiservices/{version}.visibility.kueue.x-k8s.io"
        if not is_gone(api, path):
            api.ask("DELETE", path)


@contextlib.contextmanager
def running_s3(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment for an S3 server that pods reach, if one can be started."""
    host = find_host(environ)
    if not host or environ.get(s3.ENDPOINT):
        yield {HOST: host}
        return
    try:
        s3.install()
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        yield {HOST: host}
        return
    with tempfile.TemporaryDirectory(prefix="pneumo-s3-", dir=s3.choose_parent_folder()) as folder:
        ceph = s3.CephServer(Path(folder), host)
        try:
            ceph.start()
            yield {
                HOST: host,
                s3.ENDPOINT: ceph.endpoint,
                s3.FOLDER: folder,
                "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
            }
        finally:
            ceph.stop()


def find_host(environ: Mapping[str, str]) -> str:
    """The address at which pods reach this machine: that of the environment, else the API
    server's, if it is one of this machine and no loopback; else ""."""
    named = environ.get(HOST)
    if named or not environ.get(KUBECONFIG):
        return named or ""
    url = KubeCluster(Path(environ[KUBECONFIG])).server["server"]
    address = urlsplit(url).hostname or ""
    if address.startswith(("127.", "localhost", "::1")):
        return ""
    try:
        with socket.create_server((address, 0)):
            return address
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
