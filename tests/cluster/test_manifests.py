"""Every overlay renders, and a cluster would take it: schemas, the operator's rules, hardening."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import overlays, rayjob
from pneumo.config import parse_command_line
from pneumo.errors import ConfigError
from tests.cluster.kube_server import CHECKOUT, CRDS, KubeServer

pytestmark = pytest.mark.skipif(
    not (shutil.which("kubectl") or shutil.which("kustomize")),
    reason="neither kubectl nor kustomize is on PATH",
)

Document = dict[str, Any]
OVERLAYS = ("gpu-ondemand", "gpu-spot", "gpu-spot-kueue", "kind-cpu")
ON_GPU = OVERLAYS[:3]
KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest that core kinds are checked for."""
NO_SCHEMA = {"RayJob", "LocalQueue", "ClusterQueue", "ResourceFlavor", "PodMonitor"}
"""Not Kubernetes' own; of these the tests have KubeRay's schema only."""


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    return {name: overlays.render(overlays.find_overlay(name)) for name in OVERLAYS}


@pytest.fixture(scope="module")
def schema() -> Document:
    """KubeRay's schema of a RayJob, in which a field that it does not name is an error."""
    return _strict(_rayjob_schema())


def _rayjob_schema() -> Any:
    file = CRDS / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay CRDs: {file} is absent; set KUBERAY_CRDS to their folder")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), loader)["spec"]["versions"]
    served = next(version for version in versions if version["name"] == "v1")
    return served["schema"]["openAPIV3Schema"]


def _job(documents: list[Document]) -> Document:
    [job] = [document for document in documents if document["kind"] == "RayJob"]
    return copy.deepcopy(job)


def _of_kind(documents: list[Document], kind: str) -> Document:
    [found] = [document for document in documents if document["kind"] == kind]
    return copy.deepcopy(found)


# --- schemas --------------------------------------------------------------------------------------


def test_these_are_all_overlays() -> None:
    assert {path.name for path in overlays.OVERLAYS.iterdir()} == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberays_schema_accepts_it(
    rendered: dict[str, list[Document]], schema: Document, overlay: str
) -> None:
    assert _schema_errors(_job(rendered[overlay]), schema) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operators_own_rules_hold(rendered: dict[str, list[Document]], overlay: str) -> None:
    assert list(rayjob.problems(_job(rendered[overlay]))) == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "rbac"])
def test_kubernetes_schemas_accept_the_core_kinds(folder: str, version: str) -> None:
    documents = overlays.render(CHECKOUT / "k8s" / folder)
    checked = [document for document in documents if document["kind"] not in NO_SCHEMA]
    assert checked
    for document in checked:
        assert _core_errors(document, version) == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_of_a_run_are_valid_pods(
    rendered: dict[str, list[Document]], overlay: str, version: str
) -> None:
    for role, template in _templates(_job(rendered[overlay])).items():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": role},
            "spec": template["spec"],
        }
        assert _core_errors(pod, version) == []


@pytest.mark.cluster
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_real_api_server_accepts_it(
    rendered: dict[str, list[Document]], kube_server: KubeServer, namespace: str, overlay: str
) -> None:
    """By a dry run; the server at hand may be too old for a kind, which is then named here."""
    tried = set()
    for document in rendered[overlay]:
        if document["kind"] in NO_SCHEMA - {"RayJob"}:
            continue
        group = document["apiVersion"]
        root = f"/apis/{group}" if "/" in group else f"/api/{group}"
        plural = document["kind"].lower().removesuffix("y") + (
            "ies" if document["kind"].endswith("y") else "s"
        )
        try:
            kube_server.ask("POST", f"{root}/namespaces/{namespace}/{plural}?dryRun=All", document)
            tried.add(document["kind"])
        except urllib.error.HTTPError as error:
            if (document["kind"], error.code) != ("PodDisruptionBudget", 404):
                raise
    assert tried >= {"RayJob", "NetworkPolicy", "ServiceAccount"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_field_falls_under_a_rule_in_cel(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    """Those rules are not evaluated here, so no manifest may have a field that one is about."""
    assert list(_under_cel(_job(rendered[overlay]), _rayjob_schema())) == []
    other = _job(rendered[overlay])
    other["spec"]["managedBy"] = "nobody"
    assert list(_under_cel(other, _rayjob_schema())) == ["spec.managedBy"]


# --- what is caught -------------------------------------------------------------------------------

Break = Callable[[Document], object]


def _spec(job: Document) -> Document:
    spec: Document = job["spec"]
    return spec


def _head(job: Document) -> Document:
    head: Document = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    return head


def _container(job: Document) -> Document:
    container: Document = _head(job)["template"]["spec"]["containers"][0]
    return container


BROKEN: dict[str, tuple[str, Break, str]] = {
    "a misspelt field": ("RayJob", lambda job: _spec(job).update(backofLimit=1), "schema"),
    "a misspelt field at the root": ("RayJob", lambda job: job.update(sepc={}), "schema"),
    "a misspelt field of a container": (
        "RayJob",
        lambda job: _container(job).update(imagePullPolciy="Always"),
        "schema",
    ),
    "a number for a string": (
        "RayJob",
        lambda job: _head(job)["rayStartParams"].update({"num-cpus": 0}),
        "schema",
    ),
    "a value outside an enum": (
        "RayJob",
        lambda job: _spec(job)["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        "schema",
    ),
    "a required field missing": (
        "RayJob",
        lambda job: _spec(job)["rayClusterSpec"].pop("headGroupSpec"),
        "schema",
    ),
    "an unknown toleration operator": (
        "RayJob",
        lambda job: _head(job)["template"]["spec"].update(tolerations=[{"operator": 1}]),
        "schema",
    ),
    "a name of 48 characters": (
        "RayJob",
        lambda job: job["metadata"].update(name="x" * 48),
        "rules",
    ),
    "a name that begins with a digit": (
        "RayJob",
        lambda job: job["metadata"].update(name="1-train"),
        "rules",
    ),
    "suspend without shutdown": (
        "RayJob",
        lambda job: _spec(job).update(
            suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0
        ),
        "rules",
    ),
    "suspend with deletion rules": (
        "RayJob",
        lambda job: _spec(job).update(
            suspend=True,
            deletionStrategy={
                "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED"}}]
            },
        ),
        "rules",
    ),
    "a TTL without shutdown": (
        "RayJob",
        lambda job: _spec(job).update(shutdownAfterJobFinishes=False),
        "rules",
    ),
    "SidecarMode with a submitter": (
        "RayJob",
        lambda job: _spec(job).update(submissionMode="SidecarMode"),
        "rules",
    ),
    "InteractiveMode with retries": (
        "RayJob",
        lambda job: _spec(job).update(submissionMode="InteractiveMode", backoffLimit=1),
        "rules",
    ),
    "token authentication on Ray 2.51": (
        "RayJob",
        lambda job: _spec(job)["rayClusterSpec"].update(rayVersion="2.51.0"),
        "rules",
    ),
    "autoscaler v2 with pods that restart": (
        "RayJob",
        lambda job: (
            _spec(job)["rayClusterSpec"].update(
                enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}
            ),
            _head(job)["template"]["spec"].update(restartPolicy="Always"),
        ),
        "rules",
    ),
    "resources said twice": (
        "RayJob",
        lambda job: _head(job).update(resources={"CPU": "1"}),
        "rules",
    ),
    "a negative backoffLimit": ("RayJob", lambda job: _spec(job).update(backoffLimit=-1), "rules"),
    "a deadline of zero": (
        "RayJob",
        lambda job: _spec(job).update(activeDeadlineSeconds=0),
        "rules",
    ),
    "two commands in the entrypoint": (
        "RayJob",
        lambda job: _spec(job).update(entrypoint="python -m jobs.train; curl evil"),
        "rules",
    ),
    "a shell's variable in the entrypoint": (
        "RayJob",
        lambda job: _spec(job).update(entrypoint="python -m jobs.train --run $RUN"),
        "rules",
    ),
    "a misspelt field of a core kind": (
        "NetworkPolicy",
        lambda policy: policy["spec"].update(igress=[]),
        "schema",
    ),
    "a port that is no number": (
        "NetworkPolicy",
        lambda policy: policy["spec"]["ingress"][1]["ports"][0].update(port=[8265]),
        "schema",
    ),
    "a budget without a selector's form": (
        "PodDisruptionBudget",
        lambda budget: budget["spec"].update(selector="head"),
        "schema",
    ),
    # What only a cluster can know: the preflight or the troubles tell it.
    "an image that does not exist": (
        "RayJob",
        lambda job: _container(job).update(image="r.io/nothing@sha256:" + "0" * 64),
        "missed",
    ),
    "a secret that does not exist": (
        "RayJob",
        lambda job: _spec(job)["rayClusterSpec"]["authOptions"].update(secretName="nothing"),
        "missed",
    ),
    "more memory than any node has": (
        "RayJob",
        lambda job: _container(job)["resources"]["limits"].update(memory="9000Gi"),
        "missed",
    ),
    "a selector that selects nobody": (
        "NetworkPolicy",
        lambda policy: policy["spec"]["podSelector"]["matchLabels"].update(app="nobody"),
        "missed",
    ),
}


@pytest.mark.parametrize(("kind", "break_it", "by"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_caught_by(
    rendered: dict[str, list[Document]],
    schema: Document,
    kind: str,
    break_it: Break,
    by: str,
) -> None:
    document = _of_kind(rendered["kind-cpu"], kind)
    break_it(document)
    errors = (
        _schema_errors(document, schema)
        if kind == "RayJob"
        else _core_errors(document, KUBERNETES[-1])
    )
    problems = [] if errors or kind != "RayJob" else list(rayjob.problems(document))
    caught = "schema" if errors else "rules" if problems else "missed"
    assert caught == by, errors or problems


def test_the_documentation_has_the_table() -> None:
    text = (CHECKOUT / "docs" / "cluster.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (schema|rules|missed) \|$", text, re.MULTILINE))
    assert rows == {name: by for name, (_, _, by) in BROKEN.items()}


# --- what they hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_hardened(rendered: dict[str, list[Document]], overlay: str) -> None:
    for template in _templates(_job(rendered[overlay])).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
        assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 100,
            "fsGroup": 100,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert all(item["secretRef"]["optional"] for item in container.get("envFrom", []))
            assert container["env"] == [{"name": "HOME", "value": "/tmp"}]  # no secret by value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policy_and_budget_select_the_pods(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    documents = rendered[overlay]
    labels = {
        role: template["metadata"]["labels"]
        for role, template in _templates(_job(documents)).items()
    }
    policy = _of_kind(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    budget = _of_kind(documents, "PodDisruptionBudget")["spec"]
    assert all(policy.items() <= own.items() for own in labels.values())
    selected = budget["selector"]["matchLabels"]
    assert [role for role, own in labels.items() if selected.items() <= own.items()] == ["head"]
    assert budget["maxUnavailable"] == 0
    assert not [document for document in documents if "namespace" in document["metadata"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_takes_no_work_and_stays(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    head = _head(_job(rendered[overlay]))
    assert head["rayStartParams"]["num-cpus"] == "0"
    notes = head["template"]["metadata"]["annotations"]
    assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if "spot" in name])
def test_a_spot_worker_says_that_it_goes_while_there_is_time(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    worker = _templates(_job(rendered[overlay]))["workers"]["spec"]
    *command, grace_s = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["python", "-m", "jobs.departure", "--grace-s"]
    assert (CHECKOUT / "jobs" / "departure.py").is_file()
    assert 25 < float(grace_s) < worker["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_spot_and_queue_are_where_they_belong(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    job = _job(rendered[overlay])
    worker = _templates(job)["workers"]["spec"]
    limits = worker["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if overlay in ON_GPU else None)
    tolerated = {item["key"] for item in worker.get("tolerations", [])}
    assert ("nvidia.com/gpu" in tolerated) is (overlay in ON_GPU)
    spot = "spot" in overlay
    assert ("cloud.google.com/gke-spot" in tolerated) is spot
    for role, operator in (("workers", "In"), ("head", "NotIn")):
        affinity = _templates(job)[role]["spec"].get("affinity")
        assert (affinity is not None) is spot
        operators = set(re.findall(r'"operator": "(\w+)"', json.dumps(affinity)))
        assert operators == ({operator} if spot else set())
    assert ("lifecycle" in worker["containers"][0]) is spot
    queued = overlay.endswith("kueue")
    assert job["spec"].get("suspend", False) is queued
    queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    kinds = {document["kind"] for document in rendered[overlay]}
    assert (queue == "pneumo") is queued is ("LocalQueue" in kinds)


@pytest.mark.parametrize("overlay", ON_GPU)
def test_monitoring_finds_the_metrics(rendered: dict[str, list[Document]], overlay: str) -> None:
    documents = rendered[overlay]
    monitor = _of_kind(documents, "PodMonitor")["spec"]
    labels = monitor["selector"]["matchLabels"]
    [endpoint] = monitor["podMetricsEndpoints"]
    for role in ("head", "workers"):
        template = _templates(_job(documents))[role]
        assert labels.items() <= template["metadata"]["labels"].items()
        ports = {
            port["name"]: port["containerPort"]
            for port in template["spec"]["containers"][0]["ports"]
        }
        assert ports[endpoint["port"]] == 8080
    allowed = _of_kind(documents, "NetworkPolicy")["spec"]["ingress"]
    assert any({"protocol": "TCP", "port": 8080} in rule.get("ports", []) for rule in allowed)


def test_the_dashboard_is_the_one_of_the_locked_ray() -> None:
    code = (
        "from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory\n"
        "print(factory.generate_train_grafana_dashboard()[0])\n"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    file = CHECKOUT / "k8s" / "components" / "monitoring" / "ray-train.json"
    assert json.loads(file.read_text()) == json.loads(text)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_entrypoint_is_one_job_with_valid_settings(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    job = _job(rendered[overlay])
    python, dash_m, module, *flags = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "jobs.train")
    invocation = parse_command_line("train", flags, {})
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert invocation.config.cluster.num_workers == group["replicas"] == group["maxReplicas"]
    assert invocation.config.cluster.cpus_per_worker == cpus


def test_an_overlay_sets_the_image_of_every_container(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "k8s" / "base", tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    digest = "sha256:" + "0" * 64
    images = [{"name": "ghcr.io/your-org/pneumo", "newName": "r.io/x", "digest": digest}]
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../base"], "images": images})
    )
    specs = [template["spec"] for template in _templates(_job(overlays.render(overlay))).values()]
    found = {
        each["image"]
        for spec in specs
        for each in [*spec.get("initContainers", []), *spec["containers"]]
    }
    assert {image.removeprefix("r.io/x") for image in found} <= {f"@{digest}", f":0.1.0@{digest}"}


def test_an_overlay_that_does_not_render_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(ConfigError) as raised:
        overlays.render(tmp_path)
    assert "nothing.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_laptop_without_kustomize_hears_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="neither kubectl nor kustomize is on PATH; install"):
        overlays.render(overlays.find_overlay("kind-cpu"))


# --- how it is checked ----------------------------------------------------------------------------


def _templates(job: Document) -> dict[str, Document]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = job["spec"]["submitterPodTemplate"]
    return {"head": cluster["headGroupSpec"]["template"], **groups, "submitter": submitter}


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    closed = "properties" in schema and isinstance(schema.get("type"), str)
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def _schema_errors(document: Document, schema: Document) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'root'}: {error.message}"
        for error in validator.iter_errors(document)
    ]


def _core_errors(document: Document, version: str) -> list[str]:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate here")
    try:
        validate.validate(document, version, strict=True)
    except validate.ValidationError as error:
        return [str(error).splitlines()[0]]
    return []


def _under_cel(value: Any, schema: Any, path: str = "") -> Iterator[str]:
    """The fields of `value` to which a rule in CEL applies."""
    if schema.get("x-kubernetes-validations") and path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key)
            if known is not None:
                yield from _under_cel(inner, known, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _under_cel(inner, schema.get("items", {}), path)
