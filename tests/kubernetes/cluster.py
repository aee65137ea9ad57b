"""Access of the tests to a Kubernetes cluster with KubeRay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config
from kubernetes.client.exceptions import ApiException

from cluster.kuberay import api as kubernetes_api
from cluster.kuberay.jobs import KubernetesTarget
from tests import CHECKOUT

TOOLS = CHECKOUT.parent / "shared" / "tools"
OVERLAY, SMALL = (Path(__file__).with_name(name) for name in ("overlay", "small"))
"""What the tests submit with, and its component that makes the pods of any overlay small."""
PROBE = CHECKOUT / "tests" / "cluster" / "probe.py"
KUBECONFIG, HOST, REASON = "PNEUMO_TEST_KUBECONFIG", "PNEUMO_TEST_HOST", "PNEUMO_TEST_NO_CLUSTER"
WAIT_TIMEOUT_S = 180.0
"""The default limit of a wait: two CPUs start everything."""

Document = dict[str, Any]
T = TypeVar("T")

_CLUSTER_WIDE = {
    "namespaces", "nodes", "clusterqueues", "resourceflavors", "workloadpriorityclasses",
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """An API server, with the rights of a kubeconfig."""

    kubeconfig: Path

    def ask(self, method: str, path: str, body: object = None, *, patch: str = "merge") -> Document:
        """One request; ApiException for a refusal. `patch` is `merge`, `json` or `strategic`."""
        kind = {
            "merge": "merge-patch+",
            "json": "json-patch+",
            "strategic": "strategic-merge-patch+",
        }
        response = self._client().call_api(
            path,
            method,
            body=body,
            header_params={
                "Accept": "application/json",
                "Content-Type": f"application/{kind[patch] if method == 'PATCH' else ''}json",
            },
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=30,
        )
        answer: Document = json.loads(response.data)
        return answer

    def create(self, document: Document, namespace: str = "default", query: str = "") -> Document:
        """Create an object; `query` as `dryRun=All`."""
        return self.ask("POST", f"{collection(document, namespace)}?{query}", document)

    def kubectl(self, *words: str, given: str = "") -> str:
        """What `kubectl words` prints; `given` is its standard input."""
        done = subprocess.run(
            ["kubectl", "--kubeconfig", str(self.kubeconfig), *words],
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def _client(self) -> Any:
        settings = kubernetes_client.Configuration()
        settings.retries = 3
        kubernetes_config.load_kube_config(
            config_file=str(self.kubeconfig), client_configuration=settings, persist_config=False
        )
        return kubernetes_client.ApiClient(settings)


@dataclass(frozen=True)
class KubeCluster(Access):
    """The cluster, with the rights of its administrator."""

    host: str = ""
    """The address at which pods reach this machine; "" where they cannot."""

    @property
    def folder(self) -> Path | None:
        """Where its logs and process ids are, if `kube` of the tools started it."""
        folder = self.kubeconfig.parent
        return folder if (folder / "pids").is_file() and (TOOLS / "kube").is_file() else None

    @property
    def server(self) -> Document:
        """The kubeconfig's entry of the API server."""
        config = yaml.safe_load(self.kubeconfig.read_text())
        chosen = config["current-context"]
        context = next(c["context"] for c in config["contexts"] if c["name"] == chosen)
        found = next(c["cluster"] for c in config["clusters"] if c["name"] == context["cluster"])
        return dict(found)

    def set_power(self, node: int, *, on: bool) -> None:
        """Switch a machine off at once, or on again; it starts empty."""
        assert self.folder is not None, "only kube's nodes have a switch"
        word = "power-on" if on else "power-off"
        subprocess.run([TOOLS / "kube", word, self.folder, str(node)], check=True, timeout=120)

    def write_kubeconfig(
        self, path: Path, token: str, namespace: str, url: str | None = None
    ) -> Path:
        """The kubeconfig for a token; `url` replaces the server's, for a proxy."""
        server = {"server": url} if url else self.server
        context = {"cluster": "c", "user": "u", "namespace": namespace}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{"name": "c", "cluster": server}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": context}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path


@dataclass(frozen=True)
class Team:
    """A namespace that its administrator has set up, and a user with the rights of k8s/rbac."""

    cluster: KubeCluster
    namespace: str
    user: Access
    folder: Path
    """For kubeconfigs and logs of this machine."""
    bucket: str = ""
    """An s3:// URL that this machine and pods reach; "" where there is none."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the user's shell, for the bucket."""
    overlay: Path = OVERLAY

    def command(
        self, *arguments: str, timeout_s: float = 400, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m cluster arguments --target k8s` as the user."""
        return subprocess.run(
            self._words(arguments),
            env=self.shell(**environ),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def begin(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """The same, while it runs: with pipes for both outputs."""
        return subprocess.Popen(
            self._words(arguments),
            env=self.shell(**environ),
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def target(
        self,
        *,
        overlay: Path | None = None,
        image: str | None = None,
        url: str | None = None,
        retry_timeout_s: float = 5.0,
    ) -> KubernetesTarget:
        """The product's client; `url` replaces the server's, for a proxy."""
        path = self.user.kubeconfig
        if url:
            token = yaml.safe_load(path.read_text())["users"][0]["user"]["token"]
            path = self.folder / f"kubeconfig-{abs(hash(url))}"
            self.cluster.write_kubeconfig(path, token, self.namespace, url)
        settings = kubernetes_client.Configuration()
        settings.retries = False
        kubernetes_config.load_kube_config(
            config_file=str(path), client_configuration=settings, persist_config=False
        )
        client = kubernetes_client.ApiClient(settings)
        api = kubernetes_api.Api(client, self.namespace, "tests", retry_timeout_s=retry_timeout_s)
        return KubernetesTarget(api, overlay or self.overlay, image, retry_timeout_s=60.0)

    def rayjob(self, name: str) -> Document:
        """A RayJob; ApiException where there is none."""
        return self.cluster.ask("GET", f"{self.path('ray.io/v1', 'rayjobs')}/{name}")

    def pods(self, job_id: str = "", **labels: str) -> list[Document]:
        """The pods of a RayJob, or all; `labels` as `component="head"`."""
        wanted = [f"pneumo/run={job_id}"] if job_id else []
        wanted += [f"app.kubernetes.io/{name}={value}" for name, value in labels.items()]
        path = f"{self.path('v1', 'pods')}?labelSelector={','.join(wanted).replace('=', '%3D')}"
        found: list[Document] = self.cluster.ask("GET", path)["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def delete_pod(self, name: str, grace_s: int | None = None) -> None:
        query = "" if grace_s is None else f"?gracePeriodSeconds={grace_s}"
        self.cluster.ask("DELETE", f"{self.path('v1', 'pods')}/{name}{query}")

    def path(self, version: str, plural: str) -> str:
        """The URL path of the namespace's objects of a kind."""
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        return f"{root}/namespaces/{self.namespace}/{plural}"

    def wait(self, what: str, look: Callable[[], T | None], within_s: float = WAIT_TIMEOUT_S) -> T:
        """The first true value of `look`; AssertionError with `what` and the state if too late."""
        deadline_s = time.monotonic() + within_s
        while not (found := look()):
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {within_s:g} s: {what}\n{self.describe()}")
            time.sleep(0.5)
        return found

    def wait_for_pod(
        self, job_id: str, *, without: Collection[str] = (), **labels: str
    ) -> Document:
        """A pod of the RayJob that is Ready and none of `without`."""

        def look() -> Document | None:
            pods = self.pods(job_id, **labels)
            return next(
                (pod for pod in pods if is_ready(pod) and pod["metadata"]["name"] not in without),
                None,
            )

        return self.wait(f"a Ready pod of {job_id}, {labels}", look)

    def describe(self) -> str:
        """RayJobs, pods and the last events, for the message of a wait that failed."""
        parts = [
            self.cluster.kubectl("-n", self.namespace, "get", "rayjobs,pods", "-o", "wide"),
            self.cluster.kubectl("-n", self.namespace, "get", "events", "--sort-by=.lastTimestamp"),
        ]
        return "\n".join("\n".join(part.splitlines()[-25:]) for part in parts)

    def with_environ(self, **environ: str) -> Team:
        return replace(self, environ={**self.environ, **environ})

    def _words(self, arguments: tuple[str, ...]) -> list[str]:
        where = ["--target", "k8s"]
        command, *rest = arguments
        image = os.environ.get("PNEUMO_TEST_IMAGE")
        if command == "submit" and "--overlay" not in arguments:
            where += ["--overlay", str(self.overlay)]
        if command == "submit" and image and "--image" not in arguments:
            where += ["--image", image]
        return [sys.executable, "-m", "cluster", command, *where, *rest]

    def shell(self, **more: str) -> dict[str, str]:
        """The environment of the user's commands."""
        of_this_machine = ("RAY_", "PNEUMO_", "AWS_", "WANDB_", "KUBERNETES_")
        own = {k: v for k, v in os.environ.items() if not k.startswith(of_this_machine)}
        return {**own, "KUBECONFIG": str(self.user.kubeconfig), **self.environ, **more}


def collection(document: Document, namespace: str) -> str:
    """The URL path under which an object is created."""
    version, kind = document["apiVersion"], document["kind"].lower()
    plural = (
        f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}{'es' * kind.endswith('s') or 's'}"
    )
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return (
        f"{root}/{plural}" if plural in _CLUSTER_WIDE else f"{root}/namespaces/{namespace}/{plural}"
    )


def is_ready(pod: Document) -> bool:
    conditions = (pod.get("status") or {}).get("conditions", [])
    leaving = pod["metadata"].get("deletionTimestamp")
    return not leaving and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def is_gone(access: Access, path: str) -> bool:
    """Whether the object at a URL path no longer exists."""
    try:
        access.ask("GET", path)
    except ApiException as error:
        if error.status == 404:
            return True
        raise
    return False
