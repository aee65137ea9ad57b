"""How far a run has come, as its pods and its RayJob tell; the objects are cut from real ones."""

from typing import Any

from cluster.kuberay.progress import gpu_hours, steps, to_seconds

Document = dict[str, Any]


def _pod(
    name: str, kind: str, *, restarts: int = 0, leaves: bool = False, **since: str
) -> Document:
    """A pod whose conditions are true since the given seconds after 03:04."""
    conditions = [
        {"type": each, "status": "True", "lastTransitionTime": f"2026-01-02T03:04:{second}Z"}
        for each, second in since.items()
    ]
    container = "ray-job-submitter" if kind == "submitter" else f"ray-{kind}"
    started = {"startedAt": f"2026-01-02T03:04:{since.get('Ready', '00')}Z"}
    return {
        "metadata": {
            "name": name,
            "labels": {} if kind == "submitter" else {"ray.io/node-type": kind},
            **({"deletionTimestamp": "2026-01-02T03:05:00Z"} if leaves else {}),
        },
        "spec": {"containers": [{"name": container}]},
        "status": {
            "conditions": conditions,
            "containerStatuses": [{"restartCount": restarts, "state": {"running": started}}],
        },
    }


def _job(**status: Any) -> Document:
    return {
        "metadata": {"name": "train-1", "creationTimestamp": "2026-01-02T03:04:00Z"},
        "spec": {"rayClusterSpec": {"workerGroupSpecs": [{"replicas": 2}]}},
        "status": status,
    }


def _lines(job: Document, *pods: Document) -> list[str]:
    return [line for _, line in steps(job, pods)]


def test_each_step_is_a_line_with_its_seconds() -> None:
    head = _pod("h", "head", PodScheduled="03", Ready="18")
    workers = [_pod("w1", "worker", Ready="20"), _pod("w2", "worker", Ready="23")]
    job = _job(rayJobInfo={"startTime": "2026-01-02T03:04:31Z"})
    assert _lines(job, head, *workers, _pod("s", "submitter", Ready="25")) == [
        "head has a node (3 s)",
        "head ready (18 s)",
        "workers 2 of 2 ready (23 s)",
        "submitter up (25 s)",
        "driver started (31 s)",
    ]


def test_nothing_is_said_of_what_is_not_there_yet() -> None:
    assert _lines(_job()) == []
    assert _lines(_job(), _pod("h", "head", PodScheduled="02"), _pod("w1", "worker")) == [
        "head has a node (2 s)"
    ]


def test_a_step_is_said_again_only_when_it_is_made_again() -> None:
    def keys(*pods: Document) -> set[object]:
        return {key for key, _ in steps(_job(), pods)}

    head, worker = _pod("h", "head", Ready="18"), _pod("w1", "worker", Ready="20")
    assert keys(head, worker) == keys(head, worker, _pod("w2", "worker"))
    assert not keys(head) & keys(_pod("h", "head", restarts=1, Ready="40"))
    assert not keys(head) & keys(_pod("h2", "head", Ready="40"))
    gone = _pod("w2", "worker", leaves=True, Ready="23")
    assert keys(head, worker, gone) == keys(head, worker)


def test_gpu_hours_are_those_of_pods_with_a_node_then_those_of_the_driver() -> None:
    job = _job(rayJobInfo={"startTime": "2026-01-02T03:04:00Z"}, endTime="2026-01-02T04:04:00Z")
    container = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    group["template"] = {"spec": {"containers": [container]}}
    pods = [_pod("a", "worker", PodScheduled="00"), _pod("b", "worker"), _pod("c", "head")]
    now_s = to_seconds("2026-01-02T03:34:00Z")
    assert gpu_hours(job, pods, now_s) == 1.0
    assert gpu_hours(job, [], now_s) == 4.0
    assert gpu_hours({**job, "status": {}}, [], now_s) == 0.0
    container["resources"]["limits"] = {"cpu": "4"}
    assert gpu_hours(job, pods, now_s) == 0.0
