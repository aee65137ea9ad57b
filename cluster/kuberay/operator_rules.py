"""KubeRay's own rules for a RayJob, which no schema says and its controller applies too late: when
the RayJob is there and waits for it already.

Pure; those of KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go) that an overlay breaks
easily. Of the others the operator tells by an event, and a follower calls the run off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.kuberay.overlays import Document

MAX_NAME = 47
"""KubeRay appends to the name of a RayJob, and Kubernetes' names end at 63 characters."""

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SHELL_ACTIVE = re.compile(r"[;&|`$<>\n\\\"'(){}*?!#~]")


def problems(job: Document) -> Iterator[str]:
    """What no schema says, and the operator only once the job waits for it."""
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
    yield from _ending_problems(spec)
    version = re.findall(r"\d+", spec["rayClusterSpec"].get("rayVersion", ""))[:2]
    auth = spec["rayClusterSpec"].get("authOptions") or {}
    if auth.get("mode") == "token" and tuple(map(int, version)) < (2, 52):
        yield f"token authentication needs rayVersion 2.52 or later, got {'.'.join(version)}"


def _ending_problems(spec: Document) -> Iterator[str]:
    """When a run is given up, tried again and cleared away."""
    ends = spec.get("shutdownAfterJobFinishes", False)
    deletes = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if deletes and (ends or spec.get("suspend")):
        yield "shutdownAfterJobFinishes and suspend (Kueue) exclude deletionStrategy.deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for field, least in (
        ("ttlSecondsAfterFinished", 0),
        ("backoffLimit", 0),
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
    ):
        if spec.get(field, least) < least:
            yield f"{field} {spec[field]}: at least {least}"
