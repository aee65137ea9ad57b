"""The RayJob of a run: the overlay's, with only the fields set that differ per run.

Pure. Raises here, before anything is sent, where job and overlay do not fit, or where the operator
(see `operator_rules`) or a shell on the way would refuse or change something.
"""

import copy
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from kubernetes.utils.quantity import parse_quantity

from cluster.kuberay import operator_rules
from cluster.kuberay.overlays import Document
from cluster.submission import Submission
from pneumo.errors import ConfigError
from pneumo.version import REVISION

RUN_LABEL = "pneumo/run"
"""Label of a RayJob and all its pods: the RayJob's name."""
SUBMISSION_LABEL = "pneumo/submission"
"""Label of a RayJob and all its pods: the submission's id, the same for all attempts at a run."""
TARGET, SETTINGS, ENTRYPOINT = "pneumo/target", "pneumo/settings", "pneumo/entrypoint"
OVERLAY, OWNER, SUBMITTED = "pneumo/overlay", "pneumo/owner", "pneumo/submitted"
"""Annotations of a RayJob: the URL that it writes to, the digest of its settings, its command with
the variables of its settings, its overlay, its user, the time of its submission."""
WAIT_AGAIN = "pneumo/wait-again"
"""An overlay's annotation; "true": a run whose nodes did not come in time is retried. Also that of
a run submitted without a follower, whose attempts share the wait."""
SELECTOR = "app.kubernetes.io/part-of=pneumo"

SECRETS = "pneumo-secrets"
"""The Kubernetes secret from which the pods take credentials."""
HASH_KEY_SECRET = "pneumo-hash-key"
"""The Kubernetes secret with PNEUMO_HASH_KEY, only for jobs that derive keys."""

_SHELL_SAFE = re.compile(r"[A-Za-z0-9_.,:/=@%+-]+")
_GPU = "nvidia.com/gpu"


def build(
    documents: Sequence[Document],
    submission: Submission,
    *,
    name: str,
    overlay: str = "",
    image: str | None = None,
    workers: int | None = None,
    is_followed: bool = True,
) -> Document:
    """The RayJob that runs `submission`. Raises ConfigError where overlay and job do not fit."""
    job = copy.deepcopy(_only_rayjob(documents))
    _check_form(job)
    _check_shell(submission.entrypoint)
    _set_name(job, name, submission.id)
    job["metadata"]["annotations"] = {
        **job["metadata"].get("annotations", {}),
        TARGET: submission.target,
        SETTINGS: submission.settings,
        ENTRYPOINT: submission.command,
        OVERLAY: overlay,
        OWNER: submission.owner,
        SUBMITTED: submission.submitted,
    }
    # The log keeper runs the command and stores its log, as pods of a failed attempt are deleted.
    keeper = f"python -m jobs.terminal.log_keeper {shlex.quote(log_folder(job))}"
    job["spec"]["entrypoint"] = f"{keeper} {submission.entrypoint}"
    group, container = _workers(job)
    per_pod = _workers_per_pod(container, submission)
    count = _replicas(group, submission, per_pod, workers)
    group.update(replicas=count, minReplicas=count, maxReplicas=count)
    _set_preflight(job, submission)
    if not is_followed:
        _divide_wait(job)
    secrets = [HASH_KEY_SECRET] if submission.job == "prepare" else []
    _set_environment(job, _environment(container, submission), secrets)
    if image is not None:
        for template in _templates(job):
            for each in _containers_of(template):
                each["image"] = image
    for violation in operator_rules.violations(job):
        raise ConfigError(f"cluster: the RayJob: {violation}")
    return job


def command(job: Document) -> str:
    """The command that submits the run of a RayJob again."""
    annotations = job["metadata"].get("annotations") or {}
    submit = f"python -m cluster submit --target k8s --overlay {annotations.get(OVERLAY) or 'NAME'}"
    return str(annotations.get(ENTRYPOINT, "")).replace("python -m jobs.", f"{submit} ", 1)


def next_name(submission_id: str, names: Sequence[str]) -> str:
    """The name of the next attempt after those of `names`."""
    numbers = [name.removeprefix(submission_id).lstrip("-") for name in names]
    highest = max((int(each) if each.isdigit() else 1 for each in numbers), default=0)
    return f"{submission_id}-{highest + 1}" if highest else submission_id


def copy_for_retry(job: Document, name: str) -> Document:
    """A RayJob of another name for another attempt at the same run."""
    metadata = job["metadata"]
    ours = {k: v for k, v in metadata["annotations"].items() if k.startswith("pneumo/")}
    retry: Document = {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "metadata": {"labels": metadata["labels"], "annotations": ours},
        "spec": copy.deepcopy(job["spec"]),
    }
    _set_name(retry, name, metadata["labels"][SUBMISSION_LABEL])
    keeper = "jobs.terminal.log_keeper"
    entrypoint = job["spec"]["entrypoint"].replace(log_folder(job), log_folder(retry), 1)
    if f"{keeper} --again" not in entrypoint:  # the lost attempt may have finished: no error
        entrypoint = entrypoint.replace(keeper, f"{keeper} --again", 1)
    retry["spec"]["entrypoint"] = entrypoint
    return retry


def differences(asked: Document, running: Document) -> Iterator[str]:
    """How a running RayJob differs from the one that would be started now."""
    (group, container), (running_group, running_container) = _workers(asked), _workers(running)
    if group["replicas"] != running_group.get("replicas"):
        yield f"{running_group.get('replicas')} worker pods, not {group['replicas']}"
    if container["image"] != running_container["image"]:
        yield f"image {running_container['image']}, not {container['image']}"
    if _limits(container) != _limits(running_container):
        limits = describe_limits(running_container)
        yield f"worker pods of {limits}, not of {describe_limits(container)}"


def log_folder(job: Document) -> str:
    """Where `jobs.terminal.log_keeper` stores logs; "" for a RayJob of another project. A later
    submission, which may have the same name, has another folder: only attempts at the same
    submission may find its work done."""
    annotations = job["metadata"].get("annotations") or {}
    target = annotations.get(TARGET, "")
    folder = f"{target}/logs/{job['metadata']['name']}/{annotations.get(SUBMITTED, '')}"
    return folder.rstrip("/") if target else ""


def count_gpus(job: Document) -> tuple[int, int]:
    """Number of worker pods, and GPUs per pod."""
    group, container = _workers(job)
    return int(group.get("replicas", 1)), int(_quantity(_limits(container).get(_GPU, "0")))


def describe_limits(container: Document) -> str:
    """`4 cpu, 16Gi memory`."""
    return ", ".join(f"{value} {name}" for name, value in _limits(container).items()) or "no limits"


def _only_rayjob(documents: Sequence[Document]) -> Document:
    jobs = [document for document in documents if document.get("kind") == "RayJob"]
    if len(jobs) != 1:
        raise ConfigError(f"cluster: the overlay renders to {len(jobs)} RayJobs, expected 1")
    return jobs[0]


def _check_form(job: Document) -> None:
    """Raise ConfigError where the overlay's RayJob lacks fields that the code below relies on."""
    spec = job.get("spec") or {}
    cluster = spec.get("rayClusterSpec") or {}
    if not cluster or spec.get("clusterSelector"):
        raise ConfigError(
            "cluster: the overlay's RayJob has no rayClusterSpec, or a clusterSelector besides: a "
            "run gets a cluster of its own; for an existing Ray cluster use --address"
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
                f"cluster: {text!r}: the command passes through shells before it runs; use "
                "letters, digits and _.,:/=@%+- only, or set it in a recipe or a PNEUMO_ variable"
            )


def _set_name(job: Document, name: str, submission_id: str) -> None:
    """Set the name and labels of the RayJob, and the labels of its pods."""
    labels = {RUN_LABEL: name, SUBMISSION_LABEL: submission_id}
    templates = _templates(job)
    for metadata in [job["metadata"], *(each.setdefault("metadata", {}) for each in templates)]:
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
    job["metadata"]["name"] = name
    for template in templates:
        for term in _affinity_terms(template):
            term["labelSelector"]["matchLabels"][RUN_LABEL] = name


def _affinity_terms(template: Document) -> list[Document]:
    """The pod affinity terms that select pods of this project."""
    affinity = template.get("spec", {}).get("affinity", {}).get("podAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    part = ("app.kubernetes.io/part-of", "pneumo")
    return [
        term
        for term in terms
        if part in term.get("labelSelector", {}).get("matchLabels", {}).items()
    ]


def _workers_per_pod(container: Document, submission: Submission) -> int:
    """How many of the job's workers fit into a worker pod. Raises ConfigError where none does."""
    resources, limits = submission.resources, _limits(container)
    if resources is None:
        return 1
    cpus, gpus = _quantity(limits.get("cpu", "0")), _quantity(limits.get(_GPU, "0"))
    if resources.cpus_per_worker > cpus:
        raise ConfigError(
            f"cluster: --cluster.cpus-per-worker {resources.cpus_per_worker}, and a worker pod of "
            f"the overlay has {float(cpus):g}; lower it, or take an overlay with larger pods"
        )
    if resources.use_gpu is True and gpus < 1:
        raise ConfigError("cluster: --cluster.use-gpu, and the overlay's worker pods have no GPU")
    fit = int(cpus // resources.cpus_per_worker)
    return min(fit, int(gpus)) if gpus and resources.use_gpu is not False else fit


def _replicas(group: Document, submission: Submission, per_pod: int, workers: int | None) -> int:
    """Number of worker pods for the job's workers; more where it uses whatever there is."""
    needed = 1
    if submission.resources is not None:
        needed = math.ceil(submission.resources.num_workers / per_pod)
    if workers is not None and workers < needed:
        raise ConfigError(
            f"cluster: --workers {workers}: the job's workers need {needed} pods of this overlay"
        )
    if workers is not None:
        return workers
    uses_all = submission.resources is None or submission.job == "tune"
    return max(needed, int(group.get("replicas", 1))) if uses_all else needed


def _set_preflight(job: Document, submission: Submission) -> None:
    """Make the head's init container check this run's places."""
    cluster = job["spec"]["rayClusterSpec"]
    checks = shlex.split(submission.preflight)[3:]
    for container in cluster["headGroupSpec"]["template"]["spec"].get("initContainers", []):
        if container["name"] == "preflight":
            version = cluster.get("rayVersion")
            container["args"] = [*(["--ray", version] if version else []), *checks]


def _divide_wait(job: Document) -> None:
    """Let all attempts together wait as long for nodes as one may. A follower stops a run after its
    first wait; the operator alone retries it, and would hold the pods that did start as often.
    Whoever follows it later lets it wait for its other attempts too."""
    spec, annotations = job["spec"], job["metadata"]["annotations"]
    wait_s = spec.get("preRunningDeadlineSeconds")
    if wait_s and annotations.get(WAIT_AGAIN) != "true":
        spec["preRunningDeadlineSeconds"] = math.ceil(wait_s / (1 + spec.get("backoffLimit", 0)))
        annotations[WAIT_AGAIN] = "true"


def _environment(container: Document, submission: Submission) -> dict[str, str]:
    """Variables of driver and workers; use_gpu "auto" would miss GPUs of nodes still to come.

    Without secrets, which the pods get as Kubernetes secrets, and without the revision of the code,
    which is the image's.
    """
    dropped = {REVISION, *submission.secrets}
    variables = {k: v for k, v in submission.environment.items() if k not in dropped}
    has_gpu = _GPU in _limits(container)
    if submission.resources is not None and submission.resources.use_gpu == "auto" and has_gpu:
        variables["PNEUMO_CLUSTER__USE_GPU"] = "true"
    return variables


def _set_environment(job: Document, variables: Mapping[str, str], secrets: Sequence[str]) -> None:
    """Set the variables of head and workers; also those of `secrets`, where they exist."""
    sources = [{"secretRef": {"name": name, "optional": True}} for name in secrets]
    *cluster_pods, _ = _templates(job)
    for template in cluster_pods:
        for container in _containers_of(template):
            kept = [item for item in container.get("env", []) if item["name"] not in variables]
            # Kubernetes expands $(NAME) in values; $$ stands for one dollar.
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


def _quantity(text: str | float) -> Decimal:
    """A Kubernetes quantity: "4", "500m"."""
    try:
        quantity: Decimal = parse_quantity(text)
    except ValueError as error:
        raise ConfigError(
            f"cluster: the overlay's resources: got '{text}', expected 4 or 500m"
        ) from error
    return quantity
