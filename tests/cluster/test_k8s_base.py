"""k8s/base renders, and KubeRay would take it: schema, the operator's own rules, hardening."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pneumo.config import parse_command_line

CHECKOUT = Path(__file__).resolve().parents[2]
RAY_VERSION = "2.60.0"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return _render(CHECKOUT / "k8s" / "base")


@pytest.fixture(scope="module")
def ray_job(documents: dict[str, Document]) -> Document:
    return documents["RayJob"]


@pytest.fixture(scope="module")
def ray_job_schema() -> Document:
    folder = Path(os.environ.get("KUBERAY_CRDS", CHECKOUT.parent / "shared" / "crds"))
    file = folder / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay CRDs: {file} is absent; set KUBERAY_CRDS to their folder")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), loader)["spec"]["versions"]
    served = next(version for version in versions if version["name"] == "v1")
    return _strict(served["schema"]["openAPIV3Schema"])


def test_it_has_what_a_run_needs_and_no_namespace(documents: dict[str, Document]) -> None:
    assert set(documents) == {"RayJob", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"}
    assert not [kind for kind, doc in documents.items() if "namespace" in doc["metadata"]]


def test_the_schema_of_kuberay_accepts_it(ray_job: Document, ray_job_schema: Document) -> None:
    assert _schema_errors(ray_job, ray_job_schema) == []


BREAKS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "misspelt field": (
        lambda job: job["spec"].update(shutdownAfterJobFinish=True),
        "spec: Additional properties are not allowed ('shutdownAfterJobFinish' was unexpected)",
    ),
    "misspelt field in a pod": (
        lambda job: _pod_specs(job)["head"]["containers"][0].update(imagePullPolciy="Always"),
        "'imagePullPolciy' was unexpected",
    ),
    "number for a string": (
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(
            {"num-cpus": 0}
        ),
        "0 is not of type 'string'",
    ),
    "value outside the enum": (
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        "'tokens' is not one of",
    ),
    "missing required field": (
        lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        "'headGroupSpec' is a required property",
    ),
    "misspelt field at the root": (
        lambda job: job.update(sepc={}),
        "'sepc' was unexpected",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), BREAKS.values(), ids=BREAKS)
def test_the_schema_check_can_fail(
    ray_job: Document,
    ray_job_schema: Document,
    break_it: Callable[[Document], Any],
    message: str,
) -> None:
    broken = copy.deepcopy(ray_job)
    break_it(broken)
    assert any(message in error for error in _schema_errors(broken, ray_job_schema))


def test_the_operators_own_rules_hold(ray_job: Document) -> None:
    assert list(_rule_errors(ray_job)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metadata.name", "x" * 48, "name"),
        ("metadata.name", "1-train", "name"),
        ("spec.suspend", True, "suspend"),
        ("spec.shutdownAfterJobFinishes", False, "ttl"),
        ("spec.submissionMode", "SidecarMode", "SidecarMode"),
        ("spec.rayClusterSpec.rayVersion", "2.51.0", "token"),
        ("spec.entrypoint", "python -m jobs.train; curl evil", "entrypoint"),
    ],
)
def test_the_rules_can_fail(ray_job: Document, path: str, value: object, message: str) -> None:
    broken = copy.deepcopy(ray_job)
    branch = broken
    *parents, leaf = path.split(".")
    for parent in parents:
        branch = branch[parent]
    branch[leaf] = value
    if path == "spec.suspend":
        branch["shutdownAfterJobFinishes"] = False
    assert any(message in error for error in _rule_errors(broken))


def test_ray_is_the_version_that_is_locked(ray_job: Document) -> None:
    lock = (CHECKOUT / "requirements.lock").read_text()
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION
    assert re.search(rf"^ray(\[[a-z,]+\])?=={re.escape(RAY_VERSION)}\b", lock, re.MULTILINE)


def test_the_entrypoint_is_one_job_with_valid_settings(ray_job: Document) -> None:
    python, dash_m, module, *flags = shlex.split(ray_job["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python", "-m", "jobs.train")
    invocation = parse_command_line("train", flags, {})
    [group] = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert invocation.config.cluster.num_workers == group["replicas"]
    assert invocation.config.cluster.cpus_per_worker == cpus


@pytest.mark.parametrize("role", ["head", "workers", "submitter"])
def test_every_pod_is_hardened(ray_job: Document, role: str) -> None:
    spec = _pod_specs(ray_job)[role]
    assert spec["automountServiceAccountToken"] is False
    assert (
        spec["securityContext"].items()
        >= {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 100,
            "seccompProfile": {"type": "RuntimeDefault"},
        }.items()
    )
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(item["secretRef"]["optional"] for item in container.get("envFrom", []))
        assert "env" not in container  # no secret by value


def test_policy_and_budget_select_the_pods(documents: dict[str, Document]) -> None:
    labels = {role: meta["labels"] for role, meta in _pod_metadata(documents["RayJob"]).items()}
    policy = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    budget = documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert all(policy.items() <= own.items() for own in labels.values())
    assert [role for role, own in labels.items() if budget.items() <= own.items()] == ["head"]


def test_the_head_takes_no_work(ray_job: Document) -> None:
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("ServiceAccount", "V1ServiceAccount"),
        ("NetworkPolicy", "V1NetworkPolicy"),
        ("PodDisruptionBudget", "V1PodDisruptionBudget"),
    ],
)
def test_core_kinds_have_no_unknown_field(
    documents: dict[str, Document], kind: str, model: str
) -> None:
    assert list(_unknown_fields(documents[kind], model)) == []
    misspelt = copy.deepcopy(documents[kind])
    misspelt["metadata"]["lables"] = misspelt["sepc"] = {}
    assert list(_unknown_fields(misspelt, model)) == ["metadata.lables", "sepc"]


def test_an_overlay_sets_the_image_of_every_container(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "k8s" / "base", tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    digest = "sha256:" + "0" * 64
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": ["../base"],
                "images": [
                    {"name": "ghcr.io/your-org/pneumo", "newName": "r.io/x", "digest": digest}
                ],
            }
        )
    )
    specs = _pod_specs(_render(overlay)["RayJob"])
    images = {container["image"] for spec in specs.values() for container in spec["containers"]}
    assert {image.removeprefix("r.io/x") for image in images} <= {f"@{digest}", f":0.1.0@{digest}"}


def _render(folder: Path) -> dict[str, Document]:
    """The documents of a kustomization by kind."""
    tools = (("kubectl", ["kubectl", "kustomize"]), ("kustomize", ["kustomize", "build"]))
    command = next((command for tool, command in tools if shutil.which(tool)), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def _pod_templates(job: Document) -> dict[str, Document]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = job["spec"].get("submitterPodTemplate", {})
    return {"head": cluster["headGroupSpec"]["template"], **groups, "submitter": submitter}


def _pod_specs(job: Document) -> dict[str, Document]:
    return {role: template["spec"] for role, template in _pod_templates(job).items()}


def _pod_metadata(job: Document) -> dict[str, Document]:
    return {role: template["metadata"] for role, template in _pod_templates(job).items()}


def _strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema in which a field that it does not name is an error."""
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


def _rule_errors(job: Document) -> Iterator[str]:
    """What no schema says, and the operator refuses or a shell mangles."""
    name, spec = job["metadata"]["name"], job["spec"]
    ends = spec.get("shutdownAfterJobFinishes", False)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield f"name {name}: at most 47 characters, DNS-1035"
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in spec:
        yield "SidecarMode forbids submitterPodTemplate"
    cluster = spec["rayClusterSpec"]
    version = tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication needs Ray 2.52"
    if re.search(r"[;&|`$<>\n]", spec["entrypoint"]):
        yield "entrypoint: a shell reads it"


def _unknown_fields(document: Any, model: str, path: str = "") -> Iterator[str]:
    """Fields of `document` that the Kubernetes client's model (V1…) does not have."""
    from kubernetes.client import models

    inner = re.fullmatch(r"(?:list|dict)[\[(](?:str, ?)?(\w+)[\])]", model)
    if inner:
        items = document.values() if isinstance(document, dict) else document
        for item in items:
            yield from _unknown_fields(item, inner[1], path)
        return
    kind = getattr(models, model, None)
    if kind is None or not isinstance(document, dict):
        return
    types = {kind.attribute_map[name]: type_ for name, type_ in kind.openapi_types.items()}
    for key, value in document.items():
        if key not in types:
            yield f"{path}{key}"
        else:
            yield from _unknown_fields(value, types[key], f"{path}{key}.")
