"""KubeRay's validation rules for a RayJob that its CRD's schema lacks. The operator checks them too
late: when the RayJob has been created.

Pure. From KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go): the rules that the RayJob
of an overlay can still break after the checks of `rayjob`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.kuberay.overlays import Document

_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def violations(job: Document) -> Iterator[str]:
    """The rules that the RayJob breaks, a message each."""
    spec = job["spec"]
    if not _is_mapping(spec.get("runtimeEnvYAML", "")):
        yield "runtimeEnvYAML is no YAML mapping"
    yield from _ending_violations(spec)
    yield from _mode_violations(spec)
    yield from _cluster_violations(spec["rayClusterSpec"])


def _ending_violations(spec: Mapping[str, Any]) -> Iterator[str]:
    """Deadlines, retries and deletion of a run."""
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    deletion_rules = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and deletion_rules:
        yield "suspend (Kueue) excludes deletionStrategy.deletionRules"
    if shuts_down and deletion_rules:
        yield "shutdownAfterJobFinishes excludes deletionStrategy.deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for field in ("ttlSecondsAfterFinished", "backoffLimit"):
        if spec.get(field, 0) < 0:
            yield f"{field} {spec[field]}: at least 0"
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
    autoscaler = cluster.get("autoscalerOptions") or {}
    is_v2 = cluster.get("enableInTreeAutoscaling", False) and autoscaler.get("version") == "v2"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        if is_v2 and spec.get("restartPolicy", "Never") != "Never":
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
