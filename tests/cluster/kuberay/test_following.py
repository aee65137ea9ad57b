"""What is said of a run whose RayJob is gone: the operator removes a finished one after half a
minute, which a laptop without network does not see."""

from pathlib import Path
from typing import Any, cast

import pytest

from cluster.kuberay.api import PodList, UnknownRunError
from cluster.kuberay.following import RunFollower
from cluster.kuberay.namespace_runs import Inspection, NamespaceRuns
from cluster.targets import JobState, OutOfReachError
from tests.cluster.kuberay.resources import make_job


class Namespace:
    """Shows one run, which writes to `folder`; then asking for it raises each of `errors`."""

    def __init__(self, folder: Path, *errors: Exception) -> None:
        job = make_job(jobDeploymentStatus="Running")
        job["metadata"]["resourceVersion"] = "1"
        job["metadata"]["annotations"]["pneumo/target"] = str(folder)
        self.run, self.errors = Inspection(job, PodList([], "1"), []), list(errors)

    def inspect(self, job_id: str, before: Inspection | None = None) -> Inspection:
        if before is None:
            return self.run
        raise self.errors.pop(0)

    @property
    def api(self) -> "Namespace":
        return self

    def wait_for_change(self, *_: Any) -> None:
        """Nothing changes."""


def follow(*asked: Any) -> tuple[JobState, list[object]]:
    told: list[object] = []
    runs = cast("NamespaceRuns", Namespace(*asked))
    job_id = make_job()["metadata"]["name"]
    return RunFollower(runs, job_id, print, told.append, retry_timeout_s=60).follow(), told


GONE = UnknownRunError("no RayJob")


@pytest.mark.parametrize(
    ("left", "outage", "exit_code", "why"),
    [
        ("0", True, 0, ""),
        ("0", False, 0, ""),
        ("2", True, 2, "exit code 2"),
        ("130", True, 130, "exit code 130"),
        (None, True, 1, "whether it finished is not known"),
        (None, False, 130, "someone deleted it"),
        ("130", False, 130, "someone deleted it"),
    ],
)
def test_a_run_that_is_gone_is_judged_by_what_its_driver_left(
    left: str | None, outage: bool, exit_code: int, why: str, tmp_path: Path
) -> None:
    logs = tmp_path / "logs" / make_job()["metadata"]["name"]
    logs.mkdir(parents=True)
    (logs / "20260102-030405.log").write_text("epoch 1")
    if left is not None:
        (logs / "20260102-030405.exit").write_text(left)
    errors = [OutOfReachError("no answer"), GONE] if outage else [GONE]
    state, _ = follow(tmp_path, *errors)
    assert state.exit_code == exit_code
    assert why in state.why
