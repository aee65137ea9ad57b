"""KubeRay's own rules for a RayJob, which no schema says and its controller applies too late: when
the RayJob is there and waits for it already.

Pure; of KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go), as far as the RayJob of an
overlay that has passed the checks of `rayjob` can break them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.kuberay.overlays import Document

_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def violations(job: Document) -> Iterator[str]:
    """What no schema says, and only the operator would, when the job waits for it already."""
    spec = job["spec"]
    if not _is_mapping(spec.get("runtimeEnvYAML", "")):
        yield "runtimeEnvYAML is no YAML mapping"
    yield from _ending_violations(spec)
    yield from _mode_violations(spec)
    yield from _cluster_violations(spec["rayClusterSpec"])


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
    if mode != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield f"SidecarMode forbids {field}"
    head = spec["rayClusterSpec"]["headGroupSpec"]
    if head["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs the head's restartPolicy Never"


def _cluster_violations(cluster: Mapping[str, Any]) -> Iterator[str]:
    yield from _auth_violations(cluster)
    scales = cluster.get("enableInTreeAutoscaling", False)
    scaler = cluster.get("autoscalerOptions") or {}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
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


def _auth_violations(cluster: Mapping[str, Any]) -> Iterator[str]:
    auth, version_text = cluster.get("authOptions") or {}, cluster.get("rayVersion", "")
    version = tuple(int(part) for part in re.findall(r"\d+", version_text)[:2])
    if auth.get("mode") == "token" and version < (2, 52):
        yield f"token authentication needs rayVersion 2.52 or later, got '{version_text}'"
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not for a RayJob"


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text) or {}, dict)
    except yaml.YAMLError:
        return False
