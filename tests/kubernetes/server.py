"""Starts what the tests of this folder need, runs a command, and ends all of it.

    python -m tests.kubernetes.server -- COMMAND …

The cluster is the one that PNEUMO_TEST_KUBECONFIG names, else one that `kube` of the tools beside
the checkout starts (as root), else none, and the tests say why they skip. Beside it an S3 server
listens where pods reach this machine, unless TEST_S3_ENDPOINT names one.
"""

import contextlib
import os
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
    with tempfile.TemporaryDirectory(prefix="pneumo-kube-", ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "cluster"
        nodes = ("--nodes", str(NODES), "--kueue", "--checkout", str(CHECKOUT))
        try:
            done = _kube("up", str(place), *nodes)
            if done.returncode:
                raise SystemExit(f"error: no Kubernetes cluster: {done.stderr}")
            _forget_visibility(place)
            path = f"{place / 'bin'}{os.pathsep}{environ.get('PATH', '')}"
            yield {KUBECONFIG: str(place / "kubeconfig"), "PATH": path}
        finally:
            if (place / "pids").exists():
                _kube("down", str(place))


def why_not() -> str:
    """What keeps this machine from having a cluster; "" where nothing is known to."""
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


def _forget_visibility(place: Path) -> None:
    """Kueue serves an API of its own, which kube's API server cannot ask; while it is registered
    and does not answer, no namespace is ever gone."""
    api = KubeCluster(place / "kubeconfig")
    for version in ("v1beta1", "v1beta2"):
        path = f"/apis/apiregistration.k8s.io/v1/apiservices/{version}.visibility.kueue.x-k8s.io"
        if not is_gone(api, path):
            api.ask("DELETE", path)


@contextlib.contextmanager
def running_s3(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment that names an S3 server which pods reach, if there can be one."""
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
    with tempfile.TemporaryDirectory(prefix="pneumo-s3-", dir=s3.place()) as folder:
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
    """Where pods reach this machine: as the environment says, else where the API server listens,
    if that is here and no loopback; else ""."""
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
