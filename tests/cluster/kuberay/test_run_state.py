"""Which runs are stopped, because waiting or another attempt cannot help them."""

from typing import Any

import pytest

from cluster.kuberay.kept_logs import DriverLog
from cluster.kuberay.run_state import find_permanent_failure, to_state


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
