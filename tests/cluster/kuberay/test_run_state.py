"""Which runs are stopped, because waiting or another attempt cannot help them."""

from typing import Any

import pytest

from cluster.kuberay.kept_logs import DriverLog, find_exit_code
from cluster.kuberay.run_state import find_permanent_failure, to_state
from tests.cluster.kuberay.resources import Document, make_job


def _job(deployment: str, annotations: dict[str, str] | None = None, **status: str) -> Any:
    return {
        "metadata": {
            "name": "train-1-0a1b2c3d",
            "creationTimestamp": "2026-11-28T10:00:00Z",
            "annotations": annotations or {},
        },
        "spec": {},
        "status": {"jobDeploymentStatus": deployment, **status},
    }


@pytest.mark.parametrize(
    ("job", "exit_code"),
    [
        (_job("Retrying", reason="PreRunningDeadlineExceeded"), 1),
        (
            _job("Retrying", {"pneumo/wait-again": "true"}, reason="PreRunningDeadlineExceeded"),
            None,
        ),
        (_job("Initializing", reason="PreRunningDeadlineExceeded"), None),
        (_job("Retrying", reason="AppFailed", message="failed with exit code 2"), 2),
        (_job("Retrying", reason="AppFailed", message="failed with exit code 1"), None),
    ],
)
def test_what_another_attempt_would_repeat_is_called_off(job: Any, exit_code: int | None) -> None:
    judged = find_permanent_failure(job, to_state(job, ()), ())
    assert (judged and judged.exit_code) == exit_code
    assert judged is None or judged.why.endswith("; the run was stopped")


@pytest.mark.parametrize(
    ("said", "failed", "exit_code"), [(2, 1, 2), (2, 0, None), (1, 1, None), (None, 1, None)]
)
def test_a_mistake_in_the_log_is_called_off_when_the_next_attempt_has_begun_already(
    said: int | None, failed: int, exit_code: int | None
) -> None:
    job = _job("Initializing")
    job["status"]["failed"] = failed
    judged = find_permanent_failure(job, to_state(job, ()), (), said)
    assert (judged and judged.exit_code) == exit_code


def test_the_drivers_exit_code_is_read_from_its_submitters_log() -> None:
    log = DriverLog(lambda _: None, lambda _: None)
    log.take("line 0")
    assert log.exit_code is None
    log.take(
        "2026-11-28 10:00:00,000\tINFO cli.py:70 -- Status message: Job entrypoint command failed "
        "with exit code 2, last available logs (truncated to 20,000 chars):"
    )
    assert log.exit_code == 2
    log.begin()
    assert log.exit_code is None


@pytest.mark.parametrize(
    ("status", "phase", "exit_code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "cancelled", 130),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, "failed", 1),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "SUCCEEDED",
                "reason": "JobDeploymentStatusTransitionGracePeriodExceeded",
            },
            "succeeded",
            0,
        ),
        (
            {
                "jobDeploymentStatus": "Failed",
                "message": "Job entrypoint command failed with exit code 2, last available logs",
            },
            "failed",
            2,
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "x"}, "failed", 1),
        ({"jobDeploymentStatus": "Running"}, "running", None),
        ({"jobDeploymentStatus": "Initializing"}, "waiting", None),
        ({"jobDeploymentStatus": "Suspended"}, "waiting", None),
        ({"jobDeploymentStatus": "Retrying"}, "waiting", None),
        ({"jobDeploymentStatus": "Suspending"}, "waiting", None),
        ({}, "waiting", None),
    ],
)
def test_states_and_exit_codes(status: Document, phase: str, exit_code: int | None) -> None:
    state = to_state(make_job(**status), ())
    assert state.phase == phase
    assert state.has_ended is (exit_code is not None)
    assert exit_code is None or state.exit_code == exit_code
    assert state.phase != "waiting" or state.why


def test_a_state_has_the_log_folder_of_its_submission() -> None:
    job = make_job()
    job["metadata"]["annotations"]["pneumo/submitted"] = "20260102-030405"
    state = to_state(job, ())
    assert state.log_folder == f"s3://b/r/logs/{state.id}/20260102-030405"


def test_a_run_in_the_queue_is_not_one_whose_quota_was_taken() -> None:
    queued = to_state(make_job(jobDeploymentStatus="Suspending"), ())
    assert queued.why == "in the queue: Kueue has not admitted it yet"
    taken = to_state(
        make_job(
            jobDeploymentStatus="Suspending", rayClusterStatus={"head": {"podIP": "10.0.0.7"}}
        ),
        (),
    )
    assert taken.why.startswith("Kueue has taken its quota back: ")


def test_nobody_takes_it_up() -> None:
    """The RayJob of these tests is old."""
    assert to_state(make_job(), ()).why.startswith(
        "no KubeRay operator has processed it within 60 s; "
    )


def test_the_drivers_exit_code_is_in_rays_words() -> None:
    assert find_exit_code("Job entrypoint command failed with exit code 137.") == 137
    assert find_exit_code("Job supervisor actor died") is None
    assert find_exit_code(None) is None
