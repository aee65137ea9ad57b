"""Creates namespaces as an administrator does, each with a user who may submit there."""

import base64
import contextlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from kubernetes.client.exceptions import ApiException

from tests import CHECKOUT
from tests.kubernetes.cluster import PROBE, Access, Document, KubeCluster, Team

SUBMITTER, STRANGER = "submitter", "stranger"
ROLE: Document = yaml.safe_load((CHECKOUT / "k8s" / "rbac" / "role.yaml").read_text())
HASH_KEY = "only-for-tests"


def make_team(
    kube: KubeCluster,
    rendered: Sequence[Document],
    folder: Path,
    *,
    bucket: str,
    environ: Mapping[str, str],
) -> Team:
    """A new namespace, Pod Security `restricted` enforced, with what the overlay `rendered` needs.

    The user's kubeconfig goes into `folder`; `environ` has what the bucket needs.
    """
    name = f"pneumo-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kube.create(make_object("v1", "Namespace", name, metadata={"labels": labels}))
    for document in rendered:
        if document["kind"] != "RayJob":
            kube.create(document, name)
    grant(kube, name, ROLE)
    _create_secrets(kube, name, environ)
    probe = {"probe.py": PROBE.read_text()}
    kube.create(make_object("v1", "ConfigMap", "probe", data=probe), name)
    token = make_token(kube, name, SUBMITTER)
    user = Access(kube.write_kubeconfig(folder / f"{name}.yaml", token, name))
    url = f"{bucket}/{name}" if bucket else ""
    return Team(kube, name, user, folder, url, {**environ, "WANDB_MODE": "disabled"})


def forbid_pods(kube: KubeCluster, namespace: str) -> None:
    """A quota that admits no further pod."""
    none: Document = {"hard": {"pods": "0"}}
    kube.create(make_object("v1", "ResourceQuota", "no-pods", spec=none), namespace)


def make_token(kube: KubeCluster, namespace: str, account: str) -> str:
    """A token of a new service account, which represents a user."""
    kube.create(make_object("v1", "ServiceAccount", account), namespace)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(kube.ask("POST", path, asked)["status"]["token"])


def grant(kube: KubeCluster, namespace: str, role: Document) -> None:
    """Bind the submitter to a Role."""
    kube.create(role, namespace)
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": SUBMITTER, "namespace": namespace}
    reference = {"apiGroup": group, "kind": "Role", "name": role["metadata"]["name"]}
    binding = make_object(f"{group}/v1", "RoleBinding", role["metadata"]["name"])
    kube.create({**binding, "roleRef": reference, "subjects": [subject]}, namespace)


def _create_secrets(kube: KubeCluster, namespace: str, s3_environ: Mapping[str, str]) -> None:
    hidden = {k: v for k, v in s3_environ.items() if k.endswith(("_ID", "_KEY"))}
    for name, values in (
        ("pneumo-ray-auth", {"auth_token": secrets.token_hex(16)}),
        ("pneumo-secrets", hidden),
        ("pneumo-hash-key", {"PNEUMO_HASH_KEY": HASH_KEY}),
    ):
        data = {k: base64.b64encode(v.encode()).decode() for k, v in values.items()}
        kube.create(make_object("v1", "Secret", name, data=data), namespace)


def make_object(version: str, kind: str, name: str, **more: Document) -> Document:
    metadata = {"name": name, **more.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def remove(team: Team) -> None:
    """Delete a namespace, without waiting until its pods have ended."""
    namespace = team.namespace
    for path in (
        f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
        f"/api/v1/namespaces/{namespace}/pods?gracePeriodSeconds=1",
        f"/api/v1/namespaces/{namespace}",
    ):
        with contextlib.suppress(ApiException):
            team.cluster.ask("DELETE", path)
