"""The steps of a starting run, from a node for its head to its driver, a line each; pure.

Times are seconds since the submission, by the cluster's clocks.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from cluster.kuberay import rayjob
from cluster.kuberay.overlays import Document

NODE_TYPE = "ray.io/node-type"
"""KubeRay's label: head or worker."""
SUBMITTER = "ray-job-submitter"

Step = tuple[object, str]
"""A key, the same for the same step of the same pods, and the line to show."""


def steps(job: Document, pods: Sequence[Document]) -> Iterator[Step]:
    """The steps that are done, in order."""
    created_s = to_seconds(job["metadata"]["creationTimestamp"])

    def line(text: str, when: str) -> str:
        return f"{text} ({max(0, round(to_seconds(when) - created_s))} s)"

    pods = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
    head = next((pod for pod in pods if node_type(pod) == "head"), None)
    if head and (when := since(head, "PodScheduled")):
        yield ("node", head["metadata"]["name"]), line("head has a node", when)
    if head and (when := since(head, "Ready")):
        yield ("ready", _identity(head)), line("head ready", when)
    ready = [pod for pod in pods if node_type(pod) == "worker" and since(pod, "Ready")]
    if ready:
        newest = max(ready, key=lambda pod: since(pod, "Ready"))
        wanted = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
        text = f"workers {len(ready)} of {wanted} ready"
        yield ("workers", _identity(newest)), line(text, since(newest, "Ready"))
    for submitter in filter(is_submitter, pods):
        for container in (submitter.get("status") or {}).get("containerStatuses", []):
            running = container["state"].get("running")
            if running:
                yield (
                    ("submitter", _identity(submitter)),
                    line("submitter up", running["startedAt"]),
                )
    status = job.get("status") or {}
    started = (status.get("rayJobInfo") or {}).get("startTime")
    if started:
        yield ("driver", started), line("driver started", started)


def gpu_hours(job: Document, pods: Sequence[Document], now_s: float) -> float:
    """GPU hours held by the worker pods of this attempt: each since it was scheduled; once the pods
    are gone, all of them from the driver's start to its end."""
    num_pods, gpus_per_pod = rayjob.count_gpus(job)
    status = job.get("status") or {}
    scheduled = [since(pod, "PodScheduled") for pod in pods if node_type(pod) == "worker"]
    held_s = sum(now_s - to_seconds(when) for when in scheduled if when)
    started = (status.get("rayJobInfo") or {}).get("startTime")
    if not held_s and started and status.get("endTime"):
        held_s = num_pods * (to_seconds(status["endTime"]) - to_seconds(started))
    return gpus_per_pod * held_s / 3600


def node_type(pod: Document) -> str:
    """`head`, `worker`, or "" for the submitter."""
    return str((pod["metadata"].get("labels") or {}).get(NODE_TYPE, ""))


def is_submitter(pod: Document) -> bool:
    """Whether the pod is a submitter, which submits the job to Ray and shows its log."""
    return any(each["name"] == SUBMITTER for each in pod["spec"]["containers"])


def since(pod: Document, condition: str) -> str:
    """When a condition of a pod became true; "" where it is not."""
    conditions: list[dict[str, Any]] = (pod.get("status") or {}).get("conditions", [])
    for each in conditions:
        if each["type"] == condition and each["status"] == "True":
            return str(each["lastTransitionTime"])
    return ""


def to_seconds(text: str) -> float:
    """A time of the API server, in seconds since the epoch."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _identity(pod: Document) -> tuple[str, int]:
    """The pod's name and its number of restarts, which differ after a restart of its containers."""
    containers = (pod.get("status") or {}).get("containerStatuses", [])
    return str(pod["metadata"]["name"]), sum(each.get("restartCount", 0) for each in containers)
