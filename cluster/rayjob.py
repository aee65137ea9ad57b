"""A run as a RayJob: what an overlay renders to, and on top of it only what differs per run.

Pure. What the operator or a shell on the way would refuse or mangle is refused here, before
anything is sent.
"""

from __future__ import annotations

import copy
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from cluster.overlays import Document
from cluster.submission import Submission
from pneumo.errors import ConfigError
from pneumo.revision import REVISION

RUN_LABEL = "pneumo/run"
"""On a RayJob and all its pods: the RayJob's name."""
SUBMISSION_LABEL = "pneumo/submission"
"""On a RayJob: the submission's id, the same for every attempt at the same run."""
TARGET, SETTINGS, ENTRYPOINT = "pneumo/target", "pneumo/settings", "pneumo/entrypoint"
"""Annotations of a RayJob: what it writes, the digest of its settings, its command."""
SELECTOR = "app.kubernetes.io/part-of=pneumo"

SECRETS = "pneumo-secrets"
"""The Kubernetes secret from which the pods take credentials."""

MAX_NAME = 47
"""KubeRay appends to the name of a RayJob, and Kubernetes' names end at 63 characters."""

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SECRET_LIKE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")
_SHELL_SAFE = re.compile(r"[A-Za-z0-9_.,:/=@%+-]+")
_SHELL_ACTIVE = re.compile(r"[;&|`$<>\n\\\"'(){}*?!#~]")
_GPU = "nvidia.com/gpu"
_UNITS = {"m": Fraction(1, 1000), "": Fraction(1), "k": Fraction(1000)}


def build(
    documents: Sequence[Document],
    submission: Submission,
    *,
    name: str,
    image: str | None = None,
    workers: int | None = None,
) -> Document:
    """The RayJob that runs `submission`. Raises ConfigError where overlay and job do not fit."""
    submission = _without_secrets(submission)
    job = copy.deepcopy(_only_rayjob(documents))
    _check_shell(submission.entrypoint)
    _name(job, submission, name)
    spec = job["spec"]
    spec["entrypoint"] = submission.entrypoint
    groups = spec["rayClusterSpec"].get("workerGroupSpecs", [])
    if len(groups) != 1:
        raise ConfigError(f"cluster: the overlay has {len(groups)} workerGroupSpecs, expected 1")
    container = groups[0]["template"]["spec"]["containers"][0]
    per_pod = _workers_per_pod(container, submission)
    count = _replicas(groups[0], submission, per_pod, workers)
    groups[0].update(replicas=count, minReplicas=count, maxReplicas=count)
    _set_preflight(job, submission)
    _set_environment(job, _environment(container, submission))
    if image is not None:
        for each in _containers(job):
            each["image"] = image
    check(job)
    return job


def check(job: Document) -> None:
    """Raise ConfigError for the first thing that KubeRay 1.7 or a shell would not take."""
    for problem in problems(job):
        raise ConfigError(f"cluster: the RayJob: {problem}")


def problems(job: Document) -> Iterator[str]:
    """What no schema says, and only the operator would, when the job waits for it already."""
    name, spec = job["metadata"]["name"], job["spec"]
    ends = spec.get("shutdownAfterJobFinishes", False)
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        yield (
            f"name '{name}' ({len(name)} characters): at most {MAX_NAME} of a-z, 0-9 and '-', "
            "beginning with a letter"
        )
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and (spec.get("deletionStrategy") or {}).get("deletionRules"):
        yield "suspend (Kueue) excludes deletionStrategy.deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for field, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0)):
        if spec.get(field, 0) < least:
            yield f"{field} {spec[field]}: at least {least}"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} {spec[field]}: above 0"
    if _SHELL_ACTIVE.search(spec["entrypoint"]):
        yield f"entrypoint '{spec['entrypoint']}': a shell reads it; one command, plain words"
    yield from _mode_problems(spec)
    yield from _cluster_problems(spec["rayClusterSpec"])


def _mode_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode forbids backoffLimit"
    if mode != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield f"SidecarMode forbids {field}"
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    if head.get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs the head's restartPolicy Never"


def _cluster_problems(cluster: Mapping[str, Any]) -> Iterator[str]:
    version_text = cluster.get("rayVersion", "")
    version = tuple(int(part) for part in re.findall(r"\d+", version_text)[:2])
    if (cluster.get("authOptions") or {}).get("mode") == "token" and version < (2, 52):
        yield f"token authentication needs rayVersion 2.52 or later, got '{version_text}'"
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    scaler = cluster.get("autoscalerOptions") or {}
    if cluster.get("enableInTreeAutoscaling") and scaler.get("version") == "v2":
        for group in groups:
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "autoscaler v2 needs every pod's restartPolicy Never or unset"
    for group in groups:
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group.get("rayStartParams", {})
        ):
            yield "a group sets resources both in rayStartParams and in resources; use one"
        if "labels" in group.get("rayStartParams", {}):
            yield "rayStartParams.labels is not taken; use the group's labels"


def secret_names(submission: Submission) -> tuple[str, ...]:
    """Variables of this environment that are never written into an object of the cluster."""
    return tuple(name for name in submission.environment if _SECRET_LIKE.search(name))


def _without_secrets(submission: Submission) -> Submission:
    secret = secret_names(submission)
    plain = {k: v for k, v in submission.environment.items() if k not in secret}
    return replace(submission, environment=plain)


def _only_rayjob(documents: Sequence[Document]) -> Document:
    jobs = [document for document in documents if document.get("kind") == "RayJob"]
    if len(jobs) != 1:
        raise ConfigError(f"cluster: the overlay renders to {len(jobs)} RayJobs, expected 1")
    return jobs[0]


def _check_shell(entrypoint: str) -> None:
    for text in shlex.split(entrypoint):
        if not _SHELL_SAFE.fullmatch(text):
            raise ConfigError(
                f"cluster: {text!r}: shells read the command on its way into a pod; use letters, "
                "digits and _.,:/=@%+- only, or set it in a recipe or a PNEUMO_ variable"
            )


def _name(job: Document, submission: Submission, name: str) -> None:
    metadata = job["metadata"]
    metadata["name"] = name
    metadata["labels"] = {
        **metadata.get("labels", {}),
        RUN_LABEL: name,
        SUBMISSION_LABEL: submission.id,
    }
    metadata["annotations"] = {
        **metadata.get("annotations", {}),
        TARGET: submission.target,
        SETTINGS: submission.settings,
        ENTRYPOINT: submission.entrypoint,
    }
    for template in _templates(job):
        own = template.setdefault("metadata", {})
        own["labels"] = {**own.get("labels", {}), RUN_LABEL: name}


def _workers_per_pod(container: Document, submission: Submission) -> int:
    """How many of the job's workers fit into a worker pod; ConfigError when not one does."""
    if submission.shape is None:
        return 1
    limits = container.get("resources", {}).get("limits", {})
    cpus, gpus = _quantity(limits.get("cpu", "0")), _quantity(limits.get(_GPU, "0"))
    shape = submission.shape
    if shape.cpus_per_worker > cpus:
        raise ConfigError(
            f"cluster: --cluster.cpus-per-worker {shape.cpus_per_worker}, and a worker pod of the "
            f"overlay has {float(cpus):g}; lower it, or take an overlay with larger pods"
        )
    if shape.use_gpu is True and gpus < 1:
        raise ConfigError("cluster: --cluster.use-gpu, and the overlay's worker pods have no GPU")
    fit = int(cpus // shape.cpus_per_worker)
    return min(fit, int(gpus)) if gpus and shape.use_gpu is not False else fit


def _replicas(group: Document, submission: Submission, per_pod: int, workers: int | None) -> int:
    """How many worker pods; a job that says how many workers it has gets pods for those."""
    needed = 1
    if submission.shape is not None:
        needed = math.ceil(submission.shape.num_workers / per_pod)
    if workers is not None and workers < needed:
        raise ConfigError(
            f"cluster: --workers {workers}: the job's workers need {needed} pods of this overlay"
        )
    if workers is not None:
        return workers
    grows = submission.shape is None or submission.job == "tune"
    return max(needed, int(group.get("replicas", 1))) if grows else needed


def _set_preflight(job: Document, submission: Submission) -> None:
    """The head's init container looks at this run's places."""
    cluster = job["spec"]["rayClusterSpec"]
    checks = shlex.split(submission.preflight)[3:]
    for container in cluster["headGroupSpec"]["template"]["spec"].get("initContainers", []):
        if container["name"] == "preflight":
            container["args"] = ["--ray", cluster["rayVersion"], *checks]


def _environment(container: Document, submission: Submission) -> dict[str, str]:
    """What Ray's driver and workers get; `auto` cannot see GPUs whose nodes are still to come."""
    variables = dict(submission.environment)
    variables.pop(REVISION, None)  # the code is the image's, and so is what it says of itself
    has_gpu = _GPU in container.get("resources", {}).get("limits", {})
    if submission.shape is not None and submission.shape.use_gpu == "auto" and has_gpu:
        variables["PNEUMO_CLUSTER__USE_GPU"] = "true"
    return variables


def _set_environment(job: Document, variables: Mapping[str, str]) -> None:
    *cluster_pods, _ = _templates(job)
    for template in cluster_pods:
        for container in _containers_of(template):
            kept = [item for item in container.get("env", []) if item["name"] not in variables]
            # Kubernetes expands $(NAME) in values; a doubled dollar is one.
            added = [{"name": k, "value": v.replace("$", "$$")} for k, v in variables.items()]
            container["env"] = kept + added


def _templates(job: Document) -> list[Document]:
    """The pod templates: the head's, the workers', the submitter's."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups] + [spec.get("submitterPodTemplate", {})]


def _containers_of(template: Document) -> list[Document]:
    spec = template.get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def _containers(job: Document) -> list[Document]:
    return [each for template in _templates(job) for each in _containers_of(template)]


def _quantity(text: str | float) -> Fraction:
    """A Kubernetes quantity of CPUs or devices: "4", "500m"."""
    found = re.fullmatch(r"([0-9.]+)([mk]?)", str(text))
    if found is None:
        raise ConfigError(f"cluster: the overlay's resources: got '{text}', expected 4 or 500m")
    return Fraction(found[1]) * _UNITS[found[2]]
