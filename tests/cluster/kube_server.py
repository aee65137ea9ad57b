"""A real kube-apiserver and etcd on loopback for the tests, RBAC on, KubeRay's RayJob known.

The binaries are found by envtest's convention, in the folder KUBEBUILDER_ASSETS, else on PATH, else
beside the checkout. There is no kubelet, no controller and no operator: objects are stored,
validated, watched and guarded; `kube_operator` plays the others. Users are static tokens; the audit
log says who asked for what.
"""

from __future__ import annotations

import json
import lzma
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = CHECKOUT.parent / "shared"
CRDS = Path(os.environ.get("KUBERAY_CRDS", SHARED / "crds"))
ADMIN = "admin"

Document = dict[str, Any]


@dataclass
class KubeServer:
    """Where it is, and how each user gets in."""

    url: str
    folder: Path
    tokens: Mapping[str, str]
    _trust: ssl.SSLContext = field(default_factory=ssl._create_unverified_context)

    def ask(
        self, method: str, path: str, body: Any = None, *, user: str = ADMIN, patch: bool = False
    ) -> Document:
        """One request; HTTPError for a refusal."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self.tokens[user]}",
                "Content-Type": "application/merge-patch+json" if patch else "application/json",
            },
        )
        with urllib.request.urlopen(request, context=self._trust, timeout=30) as response:
            answer: Document = json.loads(response.read())
        return answer

    def apply(self, document: Document, namespace: str = "default") -> None:
        """Create an object of one of the kinds that the tests use."""
        group = document["apiVersion"]
        root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
        kind = document["kind"].lower()
        plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
        if kind in {"customresourcedefinition", "node", "namespace"}:
            self.ask("POST", f"{root}/{plural}", document)
        else:
            self.ask("POST", f"{root}/namespaces/{namespace}/{plural}", document)

    def kubeconfig(self, user: str, *, namespace: str = "default", url: str | None = None) -> Path:
        """A kubeconfig file of `user`; `url` is another way there, a proxy's."""
        path = self.folder / f"kubeconfig-{user}-{namespace}-{secrets.token_hex(2)}"
        tls = {} if url else {"certificate-authority": str(self.folder / "pki" / "apiserver.crt")}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "tests",
                    "clusters": [{"name": "c", "cluster": {"server": url or self.url, **tls}}],
                    "users": [{"name": "u", "user": {"token": self.tokens[user]}}],
                    "contexts": [
                        {
                            "name": "tests",
                            "context": {"cluster": "c", "user": "u", "namespace": namespace},
                        }
                    ],
                }
            )
        )
        return path

    def asked(self, user: str) -> set[tuple[str, str, str]]:
        """(API group, resource, verb) of every request that `user` was allowed."""
        asked = set()
        for line in (self.folder / "audit.log").read_text().splitlines():
            event = json.loads(line)
            what = event.get("objectRef")
            if event["user"].get("username") != user or what is None:
                continue
            if event.get("responseStatus", {}).get("code", 0) == 403:
                continue
            resource = what["resource"]
            if what.get("subresource"):
                resource = f"{resource}/{what['subresource']}"
            asked.add((what.get("apiGroup", ""), resource, event["verb"]))
        return asked


@contextmanager
def running_server(folder: Path, users: Sequence[str]) -> Iterator[KubeServer]:
    """The server while the block runs; skips the test where its parts cannot be had."""
    apiserver, etcd, crd = _parts(folder)
    tokens = {user: secrets.token_hex(16) for user in (ADMIN, *users)}
    etcd_port, peer_port, port = _free_ports(3)
    _write_files(folder, tokens)
    etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    commands = {
        "etcd": [
            etcd, "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync",
            "--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", f"default={peer_url}",
        ],
        "apiserver": [
            str(apiserver), f"--etcd-servers={etcd_url}", "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1", f"--secure-port={port}", f"--cert-dir={folder}/pki",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder}/sa.key",
            f"--service-account-signing-key-file={folder}/sa.key",
            f"--token-auth-file={folder}/tokens.csv", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
            f"--audit-policy-file={folder}/audit.yaml", f"--audit-log-path={folder}/audit.log",
        ],
    }  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
                )
        server = KubeServer(f"https://127.0.0.1:{port}", folder, tokens)
        _wait_until_ready(server, running[-1])
        server.apply(yaml.load(crd.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        _wait_for_rayjobs(server)
        yield server
    finally:
        for process in reversed(running):  # nothing of theirs is kept
            process.kill()
            process.wait()


def _parts(folder: Path) -> tuple[Path, str, Path]:
    """kube-apiserver, etcd and the RayJob CRD, or a skip that says what is missing."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    path = f"{assets}{os.pathsep}{os.environ['PATH']}" if assets else None
    found, etcd = shutil.which("kube-apiserver", path=path), shutil.which("etcd", path=path)
    packed = SHARED / "bin" / "kube-apiserver.xz"
    if found is None and packed.is_file():
        apiserver = folder / "kube-apiserver"
        with lzma.open(packed) as source, apiserver.open("wb") as target:
            shutil.copyfileobj(source, target)
        apiserver.chmod(0o755)
        found = str(apiserver)
    crd = CRDS / "ray.io_rayjobs.yaml"
    for what, there in (
        ("no kube-apiserver: set KUBEBUILDER_ASSETS to envtest's binaries", found),
        ("no etcd: install Debian's etcd-server, or set KUBEBUILDER_ASSETS", etcd),
        ("no openssl on PATH", shutil.which("openssl")),
        (f"no KubeRay CRD at {crd}: set KUBERAY_CRDS to the folder of CRDs", crd.is_file()),
    ):
        if not there:
            pytest.skip(what)
    assert found is not None
    assert etcd is not None
    return Path(found), etcd, crd


def _write_files(folder: Path, tokens: Mapping[str, str]) -> None:
    groups = {ADMIN: "system:masters"}
    lines = [f"{token},{user},{user},{groups.get(user, user)}" for user, token in tokens.items()]
    (folder / "tokens.csv").write_text("\n".join(lines) + "\n")
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}
    (folder / "audit.yaml").write_text(yaml.safe_dump(policy))
    subprocess.run(
        ["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"],
        capture_output=True,
        check=True,
    )


def _wait_until_ready(server: KubeServer, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(
                f"{server.url}/readyz", context=server._trust, timeout=5
            ) as response:
                response.read()
        except (urllib.error.URLError, OSError) as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                log = (server.folder / "apiserver.log").read_text()[-2000:]
                raise RuntimeError(f"kube-apiserver did not come up: {error}\n{log}") from error
            time.sleep(0.2)
        else:
            return


def _wait_for_rayjobs(server: KubeServer) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            server.ask("GET", "/apis/ray.io/v1/namespaces/default/rayjobs")
        except urllib.error.HTTPError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)
        else:
            return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
