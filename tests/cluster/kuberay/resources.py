"""RayJobs, pods and events as the API server returns them; cut from real ones."""

from typing import Any

Document = dict[str, Any]


HEAD = "train-1-0a1b2c3d-x7k2p-head-9fzqm"


WORKER = "train-1-0a1b2c3d-x7k2p-workers-worker-l2x8d"


def make_job(**status: Any) -> Document:
    return {
        "metadata": {
            "name": "train-1-0a1b2c3d",
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "annotations": {
                "pneumo/target": "s3://b/r",
                "pneumo/overlay": "gpu-spot",
                "pneumo/entrypoint": "python -m jobs.train --store s3://b/s",
            },
        },
        "spec": {"entrypoint": "python -m jobs.train", "suspend": "suspend" in status},
        "status": {"rayClusterName": "train-1-0a1b2c3d-x7k2p", **status},
    }


def make_pod(name: str = WORKER, **status: Any) -> Document:
    container = {
        "name": "ray-worker",
        "image": "r.io/pneumo@sha256:0",
        "resources": {"limits": {"memory": "16Gi"}},
    }
    preflight = {"name": "preflight", "image": "r.io/pneumo@sha256:0"}
    return {
        "metadata": {"name": name, "labels": {"ray.io/node-type": "worker"}},
        "spec": {"nodeName": "n1", "containers": [container], "initContainers": [preflight]},
        "status": status,
    }


def make_waiting(reason: str, message: str = "") -> Document:
    waiting = {"reason": reason, "message": message}
    return make_pod(containerStatuses=[{"name": "ray-worker", "state": {"waiting": waiting}}])


def make_ended(exit_code: int, reason: str, message: str = "", *, again: bool = False) -> Document:
    terminated = {"exitCode": exit_code, "reason": reason, "message": message}
    status = {"name": "ray-worker", "state": {"terminated": terminated}}
    if again:
        waiting = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting"}
        status = {
            "name": "ray-worker",
            "state": {"waiting": waiting},
            "lastState": {"terminated": terminated},
        }
    return make_pod(containerStatuses=[status])


def make_preflight(exit_code: int, said: str, restarts: int = 0) -> Document:
    terminated = {"exitCode": exit_code, "reason": "Error", "message": said}
    status = {
        "name": "preflight",
        "restartCount": restarts,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": terminated},
    }
    return make_pod(HEAD, initContainerStatuses=[status])


def make_unschedulable(message: str) -> Document:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    return make_pod(phase="Pending", conditions=[condition])


def make_event(kind: str, name: str, reason: str, message: str) -> Document:
    return {
        "involvedObject": {"kind": kind, "name": name},
        "reason": reason,
        "message": message,
        "type": "Warning",
        "lastTimestamp": "2026-01-02T03:04:05Z",
    }


def make_disrupted(reason: str, message: str) -> Document:
    condition = {"type": "DisruptionTarget", "status": "True"}
    return make_pod(conditions=[{**condition, "reason": reason, "message": message}])


def make_submitter(exit_code: int, said: str) -> Document:
    terminated = {"exitCode": exit_code, "reason": "Error", "message": said}
    status = {"name": "ray-job-submitter", "state": {"terminated": terminated}}
    return {
        "metadata": {"name": "train-1-0a1b2c3d-p8x2m"},
        "spec": {"containers": [{"name": "ray-job-submitter"}]},
        "status": {"containerStatuses": [status]},
    }


DISRUPTED = make_disrupted(
    "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"
)


HEADS = {"ray.io/node-type": "head"}
