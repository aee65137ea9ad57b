"""One cluster for all tests of this folder, and a namespace of it for each test."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
import yaml
from kubernetes.client.exceptions import ApiException

from cluster import overlays
from tests.kubernetes.cluster import (
    CHECKOUT,
    HOST,
    KUBECONFIG,
    OVERLAY,
    PROBE,
    REASON,
    Access,
    Document,
    KubeCluster,
    Team,
)
from tests.kubernetes.server import find_host
from tests.s3.server import ENDPOINT

SUBMITTER, STRANGER = "submitter", "stranger"
ROLE: Document = yaml.safe_load((CHECKOUT / "k8s" / "rbac" / "role.yaml").read_text())

NewTeam = Callable[..., Team]


@pytest.fixture(scope="session")
def kube() -> KubeCluster:
    """The cluster, with its administrator's rights."""
    named = os.environ.get(KUBECONFIG)
    if not named:
        reason = os.environ.get(REASON) or f"`make test-kubernetes` starts one, or set {KUBECONFIG}"
        pytest.skip(f"no Kubernetes cluster: {reason}")
    return KubeCluster(Path(named), os.environ.get(HOST) or find_host(os.environ))


@pytest.fixture(scope="session")
def rendered() -> list[Document]:
    """The tests' overlay."""
    return overlays.render(OVERLAY)


@pytest.fixture(scope="session")
def s3_environ() -> dict[str, str]:
    """What a shell has set that uses the S3 server; {} where there is none."""
    endpoint = os.environ.get(ENDPOINT)
    if not endpoint:
        return {}
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def bucket(s3_environ: dict[str, str]) -> Iterator[str]:
    """An empty bucket of the whole session; "" without an S3 server."""
    if not s3_environ:
        yield ""
        return
    name = f"pneumo-kubernetes-{uuid.uuid4().hex[:8]}"
    files = _files(s3_environ)
    files.mkdir(name)
    yield f"s3://{name}"
    with contextlib.suppress(OSError):
        files.rm(name, recursive=True)


def _files(environ: dict[str, str]) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=environ["AWS_ACCESS_KEY_ID"],
        secret=environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environ["AWS_ENDPOINT_URL"],
    )


@pytest.fixture
def new_team(
    kube: KubeCluster,
    rendered: list[Document],
    bucket: str,
    s3_environ: dict[str, str],
    tmp_path: Path,
) -> Iterator[NewTeam]:
    """Makes namespaces with all that an administrator sets up, and takes them down again.

    `pods=False` makes one whose quota admits no pod: RayJobs are taken up and cost nothing.
    """
    made: list[str] = []

    def make(*, pods: bool = True) -> Team:
        name = f"pneumo-{secrets.token_hex(4)}"
        made.append(name)
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        kube.create(_object("v1", "Namespace", name, metadata={"labels": labels}))
        for document in rendered:
            if document["kind"] != "RayJob":
                kube.create(document, name)
        grant(kube, name, ROLE)
        _create_secrets(kube, name, s3_environ)
        probe = {"probe.py": PROBE.read_text()}
        kube.create(_object("v1", "ConfigMap", "probe", data=probe), name)
        if not pods:
            none = {"hard": {"pods": "0"}}
            kube.create(_object("v1", "ResourceQuota", "no-pods", spec=none), name)
        token = make_token(kube, name, SUBMITTER)
        user = Access(kube.write_kubeconfig(tmp_path / f"{name}.yaml", token, name))
        place = f"{bucket}/{name}" if bucket else ""
        return Team(kube, name, user, tmp_path, place, {**s3_environ, "WANDB_MODE": "disabled"})

    yield make
    for name in made:
        _remove(kube, name)


@pytest.fixture
def team(new_team: NewTeam) -> Team:
    """A namespace in which runs run."""
    return new_team()


@pytest.fixture
def idle_team(new_team: NewTeam) -> Team:
    """A namespace in which no pod may be: for what happens before one is."""
    return new_team(pods=False)


@pytest.fixture
def needs_bucket(bucket: str) -> None:
    """Skips where pods and this machine have no S3 server in common."""
    if not bucket:
        pytest.skip(f"no S3 server that pods reach: name one in {ENDPOINT}, or set {HOST}")


def make_token(kube: KubeCluster, namespace: str, account: str) -> str:
    """A token of a service account, which stands for a person."""
    kube.create(_object("v1", "ServiceAccount", account), namespace)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(kube.ask("POST", path, asked)["status"]["token"])


def grant(kube: KubeCluster, namespace: str, role: Document) -> None:
    """Bind the submitter to a Role."""
    kube.create(role, namespace)
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": SUBMITTER, "namespace": namespace}
    reference = {"apiGroup": group, "kind": "Role", "name": role["metadata"]["name"]}
    binding = _object(f"{group}/v1", "RoleBinding", role["metadata"]["name"])
    kube.create({**binding, "roleRef": reference, "subjects": [subject]}, namespace)


def _create_secrets(kube: KubeCluster, namespace: str, s3_environ: dict[str, str]) -> None:
    hidden = {k: v for k, v in s3_environ.items() if k.endswith(("_ID", "_KEY"))}
    hidden["PNEUMO_HASH_KEY"] = "only-for-tests"
    for name, values in (
        ("pneumo-ray-auth", {"auth_token": secrets.token_hex(16)}),
        ("pneumo-secrets", hidden),
    ):
        data = {k: base64.b64encode(v.encode()).decode() for k, v in values.items()}
        kube.create(_object("v1", "Secret", name, data=data), namespace)


def _object(version: str, kind: str, name: str, **more: Document) -> Document:
    metadata = {"name": name, **more.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def _remove(kube: KubeCluster, namespace: str) -> None:
    """Have a namespace deleted, without waiting for the end of what still runs there."""
    for path in (
        f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
        f"/api/v1/namespaces/{namespace}/pods?gracePeriodSeconds=1",
        f"/api/v1/namespaces/{namespace}",
    ):
        with contextlib.suppress(ApiException):
            kube.ask("DELETE", path)
