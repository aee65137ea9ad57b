"""A real API server with Kueue's webhooks accepts the manifests and rejects broken ones."""

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from kubernetes.client.exceptions import ApiException

from cluster.kuberay import overlays
from tests import CHECKOUT
from tests.cluster.broken_manifests import BROKEN, Break, as_pod, job_of, of_kind, templates
from tests.cluster.kuberay.test_manifests import OVERLAYS, compose
from tests.kubernetes import namespaces
from tests.kubernetes.cluster import Document, KubeCluster, Team, is_gone
from tests.kubernetes.conftest import TeamMaker

pytestmark = pytest.mark.kubernetes

FOLDERS = (*(f"overlays/{name}" for name in OVERLAYS), "rbac", "kueue")
ADDED = (
    *("eks-pod-identity", "gke-workload-identity", "monitoring"),
    *("one-zone", "private-registry", "team-namespace"),
)
_STRICT = "dryRun=All&fieldValidation=Strict"
_KUEUE = ("LocalQueue", "ClusterQueue", "ResourceFlavor")


@pytest.fixture(scope="module")
def every_overlay() -> dict[str, list[Document]]:
    return {name: overlays.render(overlays.find_overlay(name)) for name in OVERLAYS}


@pytest.fixture(scope="module")
def prepared(make_team: TeamMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """One namespace for all tests: requests are dry runs."""
    team = make_team(tmp_path_factory.mktemp("manifests"))
    yield team
    namespaces.remove(team)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_server_accepts_every_object(prepared: Team, folder: str) -> None:
    for document in overlays.render(CHECKOUT / "k8s" / folder):
        document["metadata"]["name"] += "-dry"  # the namespace has what it needs already
        try:
            prepared.cluster.create(document, prepared.namespace, _STRICT)
        except ApiException as error:
            if error.status == 404 and document["kind"] in _KUEUE:
                pytest.skip("no Kueue on this cluster")
            raise AssertionError(f"{document['kind']}: {error.body}") from error


@pytest.mark.parametrize("component", ADDED)
def test_the_server_accepts_what_components_add(
    prepared: Team, tmp_path: Path, component: str
) -> None:
    """Those of the Prometheus operator only where the cluster has it."""
    monitors = prepared.path("monitoring.coreos.com/v1", "podmonitors")
    without_operator = is_gone(prepared.cluster, monitors)
    for document in compose(tmp_path, component, base="overlays/gpu-spot"):
        is_monitoring = document["apiVersion"].startswith("monitoring.coreos.com/")
        if document["kind"] != "Namespace" and not (is_monitoring and without_operator):
            document["metadata"]["name"] += "-dry"
            document["metadata"].pop("namespace", None)  # the team's, in place of the tests'
            prepared.cluster.create(document, prepared.namespace, _STRICT)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_restricted_pod_security_accepts_the_pods(
    prepared: Team, every_overlay: dict[str, list[Document]], overlay: str
) -> None:
    for role, template in templates(job_of(every_overlay[overlay])).items():
        prepared.cluster.create(as_pod(role, template), prepared.namespace, _STRICT)


def test_setup_creates_what_a_run_needs_but_no_run(kube: KubeCluster, team: Team) -> None:
    """`make setup-k8s`, as an administrator types it."""
    made = ("serviceaccounts/pneumo", "networkpolicies/pneumo", "poddisruptionbudgets/pneumo-head")
    versions = ("v1", "networking.k8s.io/v1", "policy/v1")
    paths = [team.path(version, name) for version, name in zip(versions, made, strict=True)]
    paths.append(team.path("rbac.authorization.k8s.io/v1", "roles/pneumo-submitter"))
    for path in paths:
        kube.ask("DELETE", path)
        team.wait(f"{path} to be gone", partial(is_gone, kube, path))
    config = team.folder / "administrator"
    config.write_text(kube.kubeconfig.read_text())
    here = {**os.environ, "KUBECONFIG": str(config), "MAKEFLAGS": ""}
    use = ["kubectl", "config", "set-context", "--current", f"--namespace={team.namespace}"]
    subprocess.run(use, env=here, check=True, capture_output=True)
    done = subprocess.run(
        ["make", "setup-k8s", "OVERLAY=gpu-spot"],
        cwd=CHECKOUT, env=here, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [path for path in paths if is_gone(kube, path)]
    assert kube.ask("GET", team.path("ray.io/v1", "rayjobs"))["items"] == []


@pytest.mark.parametrize(("kind", "break_it", "by"), BROKEN.values(), ids=BROKEN)
def test_the_server_rejects_broken_manifests(
    prepared: Team,
    every_overlay: dict[str, list[Document]],
    kind: str,
    break_it: Break,
    by: str,
) -> None:
    document = of_kind(every_overlay["kind-cpu"], kind)
    document["metadata"]["name"] += "-dry"
    break_it(document)
    assert _is_refused(prepared, document) is ("server" in by)
    if kind == "RayJob" and (document["spec"].get("rayClusterSpec") or {}).get("headGroupSpec"):
        pods = [as_pod(role, each) for role, each in templates(document).items()]
        assert any(_is_refused(prepared, pod) for pod in pods) is ("pods" in by)


def _is_refused(team: Team, document: Document) -> bool:
    try:
        team.cluster.create(document, team.namespace, _STRICT)
    except ApiException as error:
        if error.status not in {400, 422}:
            raise
        return True
    return False
