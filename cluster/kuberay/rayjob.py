"""A run as a RayJob: what an overlay renders to, and on top of it only what differs per run.

Pure. What does not fit, or what the operator (see `rules`) or a shell on the way would refuse or
mangle, is refused here, before anything is sent.
"""

import copy
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from cluster.kuberay import operator_rules
from cluster.kuberay.overlays import Document
from cluster.submission import Submission
from pneumo.errors import ConfigError
from pneumo.version import REVISION

RUN_LABEL = "pneumo/run"
"""On a RayJob and all its pods: the RayJob's name."""
SUBMISSION_LABEL = "pneumo/submission"
"""On a RayJob and all its pods: the submission's id, the same for every attempt at the same run."""
TARGET, SETTINGS, ENTRYPOINT = "pneumo/target", "pneumo/settings", "pneumo/entrypoint"
OVERLAY, OWNER = "pneumo/overlay", "pneumo/owner"
"""Annotations of a RayJob: what it writes, the digest of its settings, its command, its overlay,
whose it is."""
WAIT_AGAIN = "pneumo/wait-again"
"""An overlay's annotation, "true": a run whose nodes did not come in time is tried again."""
SELECTOR = "app.kubernetes.io/part-of=pneumo"

SECRETS = "pneumo-secrets"
"""The Kubernetes secret from which the pods take credentials."""
HASH_KEY_SECRET = "pneumo-hash-key"
"""The one with PNEUMO_HASH_KEY, for the jobs that derive keys alone."""

_SHELL_SAFE = re.compile(r"[A-Za-z0-9_.,:/=@%+-]+")
_GPU = "nvidia.com/gpu"
_UNITS = {"m": Fraction(1, 1000), "": Fraction(1), "k": Fraction(1000)}


def build(
    documents: Sequence[Document],
    submission: Submission,
    *,
    name: str,
    overlay: str = "",
    image: str | None = None,
    workers: int | None = None,
) -> Document:
    """The RayJob that runs `submission`. Raises ConfigError where overlay and job do not fit."""
    submission = _without_secrets(submission)
    job = copy.deepcopy(_only_rayjob(documents))
    _check_form(job)
    _check_shell(submission.entrypoint)
    _set_name(job, name, submission.id)
    job["metadata"]["annotations"] = {
        **job["metadata"].get("annotations", {}),
        TARGET: submission.target,
        SETTINGS: submission.settings,
        ENTRYPOINT: submission.entrypoint,
        OVERLAY: overlay,
        OWNER: submission.owner,
    }
    # Inside the command that keeps its log, for the pods of a failed attempt are deleted.
    keeper = f"python -m jobs.terminal.log_keeper {shlex.quote(log_folder(job))}"
    job["spec"]["entrypoint"] = f"{keeper} {submission.entrypoint}"
    group, container = _workers(job)
    per_pod = _workers_per_pod(container, submission)
    count = _replicas(group, submission, per_pod, workers)
    group.update(replicas=count, minReplicas=count, maxReplicas=count)
    _set_preflight(job, submission)
    secrets = [HASH_KEY_SECRET] if submission.derives_keys else []
    _set_environment(job, _environment(container, submission), secrets)
    if image is not None:
        for template in _templates(job):
            for each in _containers_of(template):
                each["image"] = image
    for violation in operator_rules.violations(job):
        raise ConfigError(f"cluster: the RayJob: {violation}")
    return job


def command(job: Document) -> str:
    """What a person types to submit the run of a RayJob again."""
    annotations = job["metadata"].get("annotations") or {}
    submit = f"python -m cluster submit --target k8s --overlay {annotations.get(OVERLAY) or 'NAME'}"
    return str(annotations.get(ENTRYPOINT, "")).replace("python -m jobs.", f"{submit} ", 1)


def next_name(submission_id: str, names: Sequence[str]) -> str:
    """The name of one more attempt, where those of `names` are there."""
    numbers = [name.removeprefix(submission_id).lstrip("-") for name in names]
    used = max((int(each) if each.isdigit() else 1 for each in numbers), default=0)
    return f"{submission_id}-{used + 1}" if used else submission_id


def copy_for_retry(job: Document, name: str) -> Document:
    """The same run once more, as a RayJob of another name."""
    before, metadata = job["metadata"]["name"], job["metadata"]
    ours = {k: v for k, v in metadata["annotations"].items() if k.startswith("pneumo/")}
    again: Document = {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "metadata": {"labels": metadata["labels"], "annotations": ours},
        "spec": copy.deepcopy(job["spec"]),
    }
    _set_name(again, name, metadata["labels"][SUBMISSION_LABEL])
    folder, keeper = log_folder(job), "jobs.terminal.log_keeper"
    entrypoint = job["spec"]["entrypoint"].replace(folder, folder.removesuffix(before) + name, 1)
    if f"{keeper} --again" not in entrypoint:  # what the lost attempt has finished is no mistake
        entrypoint = entrypoint.replace(keeper, f"{keeper} --again", 1)
    again["spec"]["entrypoint"] = entrypoint
    return again


def differences(asked: Document, running: Document) -> Iterator[str]:
    """In what a running RayJob differs from the one that would be started now."""
    (group, container), (there, its) = _workers(asked), _workers(running)
    if group["replicas"] != there.get("replicas"):
        yield f"{there.get('replicas')} worker pods, not {group['replicas']}"
    if container["image"] != its["image"]:
        yield f"image {its['image']}, not {container['image']}"
    wanted, given = (_limits(each) for each in (container, its))
    if wanted != given:
        yield f"worker pods of {describe_limits(its)}, not of {describe_limits(container)}"


def log_folder(job: Document) -> str:
    """Where `jobs.terminal.log_keeper` keeps attempts' logs; "" for a RayJob that is not ours."""
    target = (job["metadata"].get("annotations") or {}).get(TARGET, "")
    return f"{target}/logs/{job['metadata']['name']}" if target else ""


def count_gpus(job: Document) -> tuple[int, int]:
    """Worker pods, and GPUs of each."""
    group, container = _workers(job)
    return int(group.get("replicas", 1)), int(_quantity(_limits(container).get(_GPU, "0")))


def describe_limits(container: Document) -> str:
    """`4 cpu, 16Gi memory`."""
    return ", ".join(f"{value} {name}" for name, value in _limits(container).items()) or "no limits"


def _without_secrets(submission: Submission) -> Submission:
    """Secrets are never written into an object of the cluster: the pods have their own."""
    plain = {k: v for k, v in submission.environment.items() if k not in submission.secrets}
    return replace(submission, environment=plain)


def _only_rayjob(documents: Sequence[Document]) -> Document:
    jobs = [document for document in documents if document.get("kind") == "RayJob"]
    if len(jobs) != 1:
        raise ConfigError(f"cluster: the overlay renders to {len(jobs)} RayJobs, expected 1")
    return jobs[0]


def _check_form(job: Document) -> None:
    """Raise ConfigError where the overlay's RayJob lacks what the rest takes for granted."""
    spec = job.get("spec") or {}
    cluster = spec.get("rayClusterSpec") or {}
    if not cluster or spec.get("clusterSelector"):
        raise ConfigError(
            "cluster: the overlay's RayJob has no rayClusterSpec, or a clusterSelector besides: a "
            "run gets a cluster of its own; one that is there takes jobs by --address"
        )
    groups = cluster.get("workerGroupSpecs") or []
    if len(groups) != 1:
        raise ConfigError(f"cluster: the overlay has {len(groups)} workerGroupSpecs, expected 1")
    for name, group in (("headGroupSpec", cluster.get("headGroupSpec")), ("workers", groups[0])):
        pod = ((group or {}).get("template") or {}).get("spec") or {}
        if not pod.get("containers"):
            raise ConfigError(f"cluster: the overlay's {name}: template.spec has no containers")


def _check_shell(entrypoint: str) -> None:
    for text in shlex.split(entrypoint):
        if not _SHELL_SAFE.fullmatch(text):
            raise ConfigError(
                f"cluster: {text!r}: shells read the command on its way into a pod; use letters, "
                "digits and _.,:/=@%+- only, or set it in a recipe or a PNEUMO_ variable"
            )


def _set_name(job: Document, name: str, submission_id: str) -> None:
    """In the RayJob and its pods."""
    labels = {RUN_LABEL: name, SUBMISSION_LABEL: submission_id}
    templates = _templates(job)
    for metadata in [job["metadata"], *(each.setdefault("metadata", {}) for each in templates)]:
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
    job["metadata"]["name"] = name
    for template in templates:
        for term in _own_pods(template):
            term["labelSelector"]["matchLabels"][RUN_LABEL] = name


def _own_pods(template: Document) -> list[Document]:
    """The terms that keep a pod beside others of this project: of its own run, with RUN_LABEL."""
    affinity = template.get("spec", {}).get("affinity", {}).get("podAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    part = ("app.kubernetes.io/part-of", "pneumo")
    return [
        term
        for term in terms
        if part in term.get("labelSelector", {}).get("matchLabels", {}).items()
    ]


def _workers_per_pod(container: Document, submission: Submission) -> int:
    """How many of the job's workers fit into a worker pod; ConfigError when not one does."""
    if submission.shape is None:
        return 1
    limits = _limits(container)
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
            version = cluster.get("rayVersion")
            container["args"] = [*(["--ray", version] if version else []), *checks]


def _environment(container: Document, submission: Submission) -> dict[str, str]:
    """What Ray's driver and workers get; `auto` cannot see GPUs whose nodes are still to come."""
    variables = dict(submission.environment)
    variables.pop(REVISION, None)  # the code is the image's, and so is what it says of itself
    has_gpu = _GPU in _limits(container)
    if submission.shape is not None and submission.shape.use_gpu == "auto" and has_gpu:
        variables["PNEUMO_CLUSTER__USE_GPU"] = "true"
    return variables


def _set_environment(job: Document, variables: Mapping[str, str], secrets: Sequence[str]) -> None:
    """Variables of head and workers; those of `secrets` if these are there."""
    sources = [{"secretRef": {"name": name, "optional": True}} for name in secrets]
    *cluster_pods, _ = _templates(job)
    for template in cluster_pods:
        for container in _containers_of(template):
            kept = [item for item in container.get("env", []) if item["name"] not in variables]
            # Kubernetes expands $(NAME) in values; a doubled dollar is one.
            added = [{"name": k, "value": v.replace("$", "$$")} for k, v in variables.items()]
            container["env"] = kept + added
            if sources:
                container["envFrom"] = [*container.get("envFrom", []), *sources]


def _workers(job: Document) -> tuple[Document, Document]:
    """The worker group and its pods' first container."""
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group, group["template"]["spec"]["containers"][0]


def _limits(container: Document) -> Document:
    limits: Document = (container.get("resources") or {}).get("limits") or {}
    return limits


def _templates(job: Document) -> list[Document]:
    """The pod templates: the head's, the workers', the submitter's."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups] + [spec.get("submitterPodTemplate", {})]


def _containers_of(template: Document) -> list[Document]:
    spec = template.get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def _quantity(text: str | float) -> Fraction:
    """A Kubernetes quantity of CPUs or devices: "4", "500m"."""
    found = re.fullmatch(r"([0-9.]+)([mk]?)", str(text))
    if found is None:
        raise ConfigError(f"cluster: the overlay's resources: got '{text}', expected 4 or 500m")
    return Fraction(found[1]) * _UNITS[found[2]]
