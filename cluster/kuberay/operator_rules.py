"""KubeRay's own rules for a RayJob, which no schema says and its controller applies too late: when
the RayJob is there and waits for it already.

Pure; of KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go), as far as a manifest like
ours can meet them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.kuberay.overlays import Document

MAX_NAME = 47
"""KubeRay appends to the name of a RayJob, and Kubernetes' names end at 63 characters."""

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SHELL_ACTIVE = re.compile(r"[;&|`$<>\n\\\"'(){}*?!#~]")
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def violations(job: Document) -> Iterator[str]:
    """What no schema says, and only the operator would, when the job waits for it already."""
    name, spec = job["metadata"]["name"], job["spec"]
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        yield (
            f"name '{name}' ({len(name)} characters): at most {MAX_NAME} of a-z, 0-9 and '-', "
            "beginning with a letter"
        )
    entrypoint = spec.get("entrypoint", "")
    if not entrypoint:
        yield "entrypoint is empty: there would be nothing to run"
    if _SHELL_ACTIVE.search(entrypoint):
        yield f"entrypoint '{entrypoint}': a shell reads it; one command, plain words"
    if not _is_mapping(spec.get("runtimeEnvYAML", "")):
        yield "runtimeEnvYAML is no YAML mapping"
    yield from _ending_violations(spec)
    yield from _mode_violations(spec)
    if spec.get("rayClusterSpec"):
        yield from _cluster_violations(spec["rayClusterSpec"])
    elif not spec.get("clusterSelector"):
        yield "neither rayClusterSpec nor clusterSelector says where to run"


def _ending_violations(spec: Mapping[str, Any]) -> Iterator[str]:
    """When a run is given up, tried again and cleared away."""
    ends = spec.get("shutdownAfterJobFinishes", False)
    deletes = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and deletes:
        yield "suspend (Kueue) excludes deletionStrategy.deletionRules"
    if ends and deletes:
        yield "shutdownAfterJobFinishes excludes deletionStrategy.deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for field, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0)):
        if spec.get(field, 0) < least:
            yield f"{field} {spec[field]}: at least {least}"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} {spec[field]}: above 0"


def _mode_violations(spec: Mapping[str, Any]) -> Iterator[str]:
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    if mode not in _MODES:
        yield f"submissionMode '{mode}': one of {', '.join(_MODES)}"
    if mode == "InteractiveMode" and retries > 0:
        yield "InteractiveMode forbids backoffLimit"
    if spec.get("clusterSelector"):
        yield from _selector_violations(spec)
    if mode != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield f"SidecarMode forbids {field}"
    head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec")
    if head and head["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs the head's restartPolicy Never"


def _selector_violations(spec: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together with a cluster that is there already."""
    if not spec["clusterSelector"].get("ray.io/cluster"):
        yield "clusterSelector names no ray.io/cluster"
    if spec.get("suspend"):
        yield "clusterSelector forbids suspend"
    if spec.get("backoffLimit", 0) > 0:
        yield "clusterSelector forbids backoffLimit"
    if spec.get("submissionMode") == "SidecarMode":
        yield "clusterSelector forbids SidecarMode"


def _cluster_violations(cluster: Mapping[str, Any]) -> Iterator[str]:
    yield from _auth_violations(cluster)
    workers = cluster.get("workerGroupSpecs", [])
    scales = cluster.get("enableInTreeAutoscaling", False)
    scaler = cluster.get("autoscalerOptions") or {}
    for group in [cluster["headGroupSpec"], *workers]:
        spec = group["template"]["spec"]
        if not spec.get("containers"):
            yield "a group's pods have no container"
        if (
            scales
            and scaler.get("version") == "v2"
            and spec.get("restartPolicy", "Never") != "Never"
        ):
            yield "autoscaler v2 needs every pod's restartPolicy Never or unset"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group.get("rayStartParams", {})
        ):
            yield "a group sets resources both in rayStartParams and in resources; use one"
        if "labels" in group.get("rayStartParams", {}):
            yield "rayStartParams.labels is not taken; use the group's labels"
    for group in workers:
        yield from _replica_violations(group, scales=scales)


def _auth_violations(cluster: Mapping[str, Any]) -> Iterator[str]:
    auth, version_text = cluster.get("authOptions") or {}, cluster.get("rayVersion", "")
    version = tuple(int(part) for part in re.findall(r"\d+", version_text)[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"token authentication needs rayVersion 2.52 or later, got '{version_text}'"
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not for a RayJob"


def _replica_violations(group: Mapping[str, Any], *, scales: bool) -> Iterator[str]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not scales and (least is None or most is None):
        yield "a worker group without autoscaling needs minReplicas and maxReplicas"
    if min(least or 0, most or 0) < 0:
        yield f"minReplicas {least}, maxReplicas {most}: at least 0"
    elif least is not None and most is not None and least > most:
        yield f"minReplicas {least} is above maxReplicas {most}"


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text) or {}, dict)
    except yaml.YAMLError:
        return False
