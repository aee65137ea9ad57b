"""Every overlay renders, and a cluster would take it: schemas, the operator's rules, hardening."""

import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.kuberay import operator_rules, overlays, rayjob
from cluster.ray import jobs
from cluster.submission import Submission
from pneumo.command_line import parse_command_line
from pneumo.errors import ConfigError
from tests import CHECKOUT
from tests.cluster.broken_manifests import (
    BROKEN,
    Break,
    as_pod,
    head_of,
    job_of,
    of_kind,
    templates,
)
from tests.cluster.renderer import NO_RENDERER, SHARED

pytestmark = pytest.mark.skipif(bool(NO_RENDERER), reason=NO_RENDERER)

Document = dict[str, Any]
CRDS = Path(os.environ.get("KUBERAY_CRDS", SHARED / "crds"))
OVERLAYS = ("gpu-ondemand", "gpu-spot", "gpu-spot-kueue", "cpu", "kind-cpu")
ON_GPU = OVERLAYS[:3]
KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest that core kinds are checked for."""
NO_SCHEMA = {
    "RayJob",
    "LocalQueue",
    "ClusterQueue",
    "ResourceFlavor",
    "PodMonitor",
    "PrometheusRule",
}
"""Not Kubernetes' own; of these the tests have KubeRay's schema only."""


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    return {name: overlays.render(overlays.find_overlay(name)) for name in OVERLAYS}


def compose(folder: Path, *components: str, base: str = "base") -> list[Document]:
    """What a kustomization of one's own renders to: `base` of k8s/ with `components`."""
    k8s = os.path.relpath(CHECKOUT / "k8s", folder)
    kustomization = {
        "resources": [f"{k8s}/{base}"],
        "components": [f"{k8s}/components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return overlays.render(folder)


@pytest.fixture(scope="module")
def schema() -> Document:
    """KubeRay's schema of a RayJob, in which a field that it does not name is an error."""
    file = CRDS / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay CRDs: {file} is absent; set KUBERAY_CRDS to their folder")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), loader)["spec"]["versions"]
    served = next(version for version in versions if version["name"] == "v1")
    strict: Document = _strict(served["schema"]["openAPIV3Schema"])
    return strict


# --- schemas --------------------------------------------------------------------------------------


def test_these_are_all_overlays() -> None:
    assert {path.name for path in overlays.OVERLAYS.iterdir()} == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberays_schema_accepts_it(
    rendered: dict[str, list[Document]], schema: Document, overlay: str
) -> None:
    assert _schema_errors(job_of(rendered[overlay]), schema) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operators_own_rules_hold(rendered: dict[str, list[Document]], overlay: str) -> None:
    assert list(operator_rules.violations(job_of(rendered[overlay]))) == []


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
    for role, template in templates(job_of(rendered[overlay])).items():
        assert _core_errors(as_pod(role, template), version) == []


# --- what is caught -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "break_it", "by"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_caught_without_a_cluster_by(
    rendered: dict[str, list[Document]],
    schema: Document,
    kind: str,
    break_it: Break,
    by: str,
) -> None:
    document = of_kind(rendered["kind-cpu"], kind)
    break_it(document)
    errors = (
        _schema_errors(document, schema)
        if kind == "RayJob"
        else _core_errors(document, KUBERNETES[-1])
    )
    assert bool(errors) is ("schema" in by), errors
    if kind == "RayJob" and not errors:
        problems = list(operator_rules.violations(document))
        assert bool(problems) is ("rules" in by), problems


def test_the_documentation_has_the_rights() -> None:
    text = (CHECKOUT / "docs" / "cluster.md").read_text()
    [table] = re.findall(r"\| a person who submits may .*\n\|---\|---\|\n((?:\|.*\n)+)", text)
    told = set()
    for verbs, resources in re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE):
        for resource in resources.split(", "):
            name, _, group = resource.partition(".")
            told |= {(group, name, verb) for verb in verbs.split(", ")}
    role = yaml.safe_load((CHECKOUT / "k8s" / "rbac" / "role.yaml").read_text())
    granted = [
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]
    assert told == set(granted)
    assert len(granted) == len(told)


# --- what they hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_hardened(rendered: dict[str, list[Document]], overlay: str) -> None:
    for template in templates(job_of(rendered[overlay])).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
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
            plain = {item["name"]: item["value"] for item in container["env"]}
            stops = jobs.STOP_WITH_SIGINT if container["name"] == "ray-head" else {}
            assert plain == {"HOME": "/tmp", **stops}  # no secret by value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policy_and_budget_select_the_pods(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    documents = rendered[overlay]
    labels = {
        role: template["metadata"]["labels"]
        for role, template in templates(job_of(documents)).items()
    }
    policy = of_kind(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    budget = of_kind(documents, "PodDisruptionBudget")["spec"]
    assert all(policy.items() <= own.items() for own in labels.values())
    selected = budget["selector"]["matchLabels"]
    assert [role for role, own in labels.items() if selected.items() <= own.items()] == ["head"]
    # A percentage or maxUnavailable would ask the pods' owner for its size: a RayCluster has none.
    assert set(budget) == {"minAvailable", "selector", "unhealthyPodEvictionPolicy"}
    assert isinstance(budget["minAvailable"], int)
    assert budget["minAvailable"] >= 1000
    assert not [document for document in documents if "namespace" in document["metadata"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_takes_no_work_and_stays(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    head = head_of(job_of(rendered[overlay]))
    assert head["rayStartParams"]["num-cpus"] == "0"
    notes = head["template"]["metadata"]["annotations"]
    assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def _hook(job: Document, role: str) -> list[str]:
    [container] = templates(job)[role]["spec"]["containers"]
    command: list[str] = container["lifecycle"]["preStop"]["exec"]["command"]
    return command


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_that_are_deleted_have_time_for_a_checkpoint(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    job = job_of(rendered[overlay])
    stop_s = int(jobs.STOP_WITH_SIGINT["RAY_JOB_STOP_WAIT_TIME_S"])
    for role in ("head", "workers"):
        assert templates(job)[role]["spec"]["terminationGracePeriodSeconds"] >= stop_s + 30
    [waits_s] = re.findall(r"seq (\d+)", " ".join(_hook(job, "head")))
    assert stop_s < int(waits_s) < stop_s + 30


@pytest.mark.parametrize(
    ("title", "waits"),
    [
        ("python -m jobs.train --store x", True),
        ("python -m jobs.terminal.log_keeper x python", True),
        ("python dashboard.py --modules-to-load=job", False),
    ],
)
def test_the_heads_hook_waits_for_what_must_end(
    rendered: dict[str, list[Document]], tmp_path: Path, title: str, waits: bool
) -> None:
    """The hook's own command, which is shown these processes in place of a pod's."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes(title.replace(" ", "\0").encode() + b"\0")
    (tmp_path / "8").mkdir()
    *shell, script = _hook(job_of(rendered["cpu"]), "head")
    (tmp_path / "8" / "cmdline").write_bytes("\0".join([*shell, script]).encode())
    script = script.replace("/proc/", f"{tmp_path}/").replace("sleep 1", "echo waits")
    script = script.replace("sleep 3", "true")
    done = subprocess.run([*shell, script], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "waits\n" * (40 if waits else 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_worker_says_that_it_goes_while_there_is_time(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    worker = templates(job_of(rendered[overlay]))["workers"]["spec"]
    *command, grace_s = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["python", "-m", "jobs.ray_cluster.node_drain", "--grace-s"]
    assert (CHECKOUT / "jobs" / "ray_cluster" / "node_drain.py").is_file()
    assert 25 < float(grace_s) < worker["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_spot_and_queue_are_where_they_belong(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    job = job_of(rendered[overlay])
    worker = templates(job)["workers"]["spec"]
    limits = worker["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if overlay in ON_GPU else None)
    tolerated = {item["key"] for item in worker.get("tolerations", [])}
    assert ("nvidia.com/gpu" in tolerated) is (overlay in ON_GPU)
    spot = "spot" in overlay
    assert ("cloud.google.com/gke-spot" in tolerated) is spot
    stays = overlay in {"cpu", "gpu-ondemand"}
    allowed = {"workers": {"In"} if spot else {"NotIn"} if stays else set(), "head": {"NotIn"}}
    for role, expected in allowed.items():
        affinity = templates(job)[role]["spec"].get("affinity")
        assert set(re.findall(r'"operator": "(\w+)"', json.dumps(affinity))) == expected
    annotations = templates(job)["workers"]["metadata"].get("annotations", {})
    assert (annotations.get("karpenter.sh/do-not-disrupt") == "true") is stays
    queued = overlay.endswith("kueue")
    assert job["spec"].get("suspend", False) is queued
    queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    kinds = {document["kind"] for document in rendered[overlay]}
    assert (queue == "pneumo") is queued is ("LocalQueue" in kinds)


# What runs KubeRay's operator, by the pod labels of its Helm chart and of its kustomization.
OPERATORS = (
    {
        "app.kubernetes.io/name": "kuberay-operator",
        "app.kubernetes.io/instance": "kuberay-operator",
        "app.kubernetes.io/component": "kuberay-operator",
    },
    {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/component": "kuberay-operator",
    },
)


@pytest.mark.parametrize("labels", OPERATORS, ids=["helm", "kustomize"])
def test_the_operator_reaches_the_dashboard_however_it_was_installed(
    rendered: dict[str, list[Document]], labels: dict[str, str]
) -> None:
    [rule] = [
        rule
        for rule in of_kind(rendered["cpu"], "NetworkPolicy")["spec"]["ingress"]
        if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])
    ]
    [peer] = rule["from"]
    assert peer["namespaceSelector"] == {}
    assert peer["podSelector"]["matchLabels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def _doors(documents: list[Document], address: str) -> set[int]:
    """The ports at which the pods may reach `address`, by the policy's blocks."""
    ip = ipaddress.ip_address(address)
    open_ports = set()
    for rule in of_kind(documents, "NetworkPolicy")["spec"]["egress"]:
        for block in [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]:
            shut = [ipaddress.ip_network(each) for each in block.get("except", [])]
            if ip in ipaddress.ip_network(block["cidr"]) and not any(ip in net for net in shut):
                open_ports |= {port["port"] for port in rule["ports"]}
    return open_ports


def test_the_nodes_identity_is_out_of_reach_and_a_bucket_is_not(
    rendered: dict[str, list[Document]],
) -> None:
    for documents in rendered.values():
        assert _doors(documents, "169.254.169.254") == set()
        assert _doors(documents, "52.216.0.1") == {443}


@pytest.mark.parametrize(
    ("component", "doors"),
    [
        ("eks-pod-identity", {"169.254.170.23": {80}, "fd00:ec2::23": {80, 443}}),
        ("gke-workload-identity", {"169.254.169.252": {988}, "169.254.169.254": {80}}),
    ],
)
def test_a_clouds_identity_has_its_door_and_no_other(
    tmp_path: Path, component: str, doors: dict[str, set[int]]
) -> None:
    documents = compose(tmp_path, component)
    known = {"169.254.170.23", "169.254.169.252", "169.254.169.254"}
    for address in known | set(doors):
        assert _doors(documents, address) == doors.get(address, set())
    for version in KUBERNETES:
        assert _core_errors(of_kind(documents, "NetworkPolicy"), version) == []


def test_a_team_has_a_namespace_of_its_own(tmp_path: Path) -> None:
    documents = compose(tmp_path, "team-namespace", base="overlays/gpu-spot")
    namespace = of_kind(documents, "Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    homes = {each["metadata"].get("namespace") for each in documents if each["kind"] != "Namespace"}
    assert homes == {namespace["name"]}
    assert {"Role", "ResourceQuota", "RayJob"} <= {each["kind"] for each in documents}
    hard = of_kind(documents, "ResourceQuota")["spec"]["hard"]
    asked = {
        f"requests.{name}"
        for template in templates(job_of(documents)).values()
        for container in template["spec"]["containers"]
        for name in container["resources"]["requests"]
    }
    assert asked <= set(hard)
    assert "count/rayjobs.ray.io" not in hard  # runs that have ended are counted too
    checked = [document for document in documents if document["kind"] not in NO_SCHEMA]
    assert [_core_errors(document, KUBERNETES[-1]) for document in checked] == [[]] * len(checked)


def test_a_zone_is_shared_by_the_workers_of_one_run(tmp_path: Path) -> None:
    documents = compose(tmp_path, "one-zone", base="overlays/gpu-spot")
    asked = Submission("train", "train-1", "python -m jobs.train", "s3://b/run", "a")
    job = rayjob.build(documents, asked, name="train-1")
    again = rayjob.copy_for_retry(job, "train-1-2")
    before = templates(job_of(compose(tmp_path, base="overlays/gpu-spot")))["workers"]
    for each in (job, again):
        template = templates(each)["workers"]
        affinity = template["spec"]["affinity"]
        assert affinity["nodeAffinity"] == before["spec"]["affinity"]["nodeAffinity"]
        [term] = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "topology.kubernetes.io/zone"
        assert (
            term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        )
        assert term["labelSelector"]["matchLabels"]["pneumo/run"] == each["metadata"]["name"]
        assert _core_errors(as_pod("workers", template), KUBERNETES[-1]) == []


def test_a_private_registry_is_reached_by_the_account(tmp_path: Path) -> None:
    documents = compose(tmp_path, "private-registry", base="overlays/cpu")
    account = of_kind(documents, "ServiceAccount")
    assert account["imagePullSecrets"] == [{"name": "pneumo-registry"}]
    assert _core_errors(account, KUBERNETES[-1]) == []


def test_the_queue_of_the_runs_is_the_administrators(
    rendered: dict[str, list[Document]],
) -> None:
    queues = overlays.render(CHECKOUT / "k8s" / "kueue")
    local = of_kind(rendered["gpu-spot-kueue"], "LocalQueue")
    cluster, flavor = of_kind(queues, "ClusterQueue"), of_kind(queues, "ResourceFlavor")
    assert {each["apiVersion"] for each in (local, cluster, flavor)} == {"kueue.x-k8s.io/v1beta2"}
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    [group] = cluster["spec"]["resourceGroups"]
    [quota] = group["flavors"]
    assert quota["name"] == flavor["metadata"]["name"]
    assert [each["name"] for each in quota["resources"]] == group["coveredResources"]
    job = job_of(rendered["gpu-spot-kueue"])
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    asked = {
        name
        for template in templates(job).values()
        for container in template["spec"]["containers"]
        for name in container["resources"]["requests"]
    }
    assert asked <= set(group["coveredResources"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_overlay_needs_the_prometheus_operator(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    kinds = {document["apiVersion"].split("/")[0] for document in rendered[overlay]}
    known = {"ray.io", "v1", "networking.k8s.io", "policy", "kueue.x-k8s.io"}
    assert kinds <= known


def test_monitoring_finds_the_metrics(tmp_path: Path) -> None:
    documents = compose(tmp_path, "monitoring", base="overlays/gpu-spot")
    found = of_kind(documents, "PodMonitor")
    assert found["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    monitor = found["spec"]
    labels = monitor["selector"]["matchLabels"]
    [endpoint] = monitor["podMetricsEndpoints"]
    for role in ("head", "workers"):
        template = templates(job_of(documents))[role]
        assert labels.items() <= template["metadata"]["labels"].items()
        ports = {
            port["name"]: port["containerPort"]
            for port in template["spec"]["containers"][0]["ports"]
        }
        assert ports[endpoint["port"]] == 8080
    allowed = of_kind(documents, "NetworkPolicy")["spec"]["ingress"]
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
    job = job_of(rendered[overlay])
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
    specs = [template["spec"] for template in templates(job_of(overlays.render(overlay))).values()]
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
    old = tmp_path / "kubectl"
    old.write_text('#!/bin/sh\necho \'{"clientVersion": {"major": "1", "minor": "20+"}}\'\n')
    old.chmod(0o755)
    with pytest.raises(ConfigError, match=r"kubectl 1\.20 is too old to render k8s/.*1\.27 or lat"):
        overlays.render(overlays.find_overlay("kind-cpu"))


# --- how it is checked ----------------------------------------------------------------------------


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
