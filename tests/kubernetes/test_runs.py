"""Runs of the real operator, scheduler and kubelets, with a probe in place of the job."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster import Team

pytestmark = [pytest.mark.kubernetes, pytest.mark.usefixtures("needs_bucket")]


def test_smoke(team: Team) -> None:
    import shlex

    from cluster.submission import Submission

    target = team.target()
    submission = Submission(
        job="prepare",
        id="probe-smoke",
        entrypoint=shlex.join(["python", "/probe/probe.py", "5", "0.1", "3"]),
        target=f"{team.bucket}/probe",
        settings="a",
        preflight=f"python -m jobs.preflight --writes {team.bucket}/probe",
        environment={k: v for k, v in team.environ.items()},
    )
    started = target.submit(submission, print)
    state = target.follow(
        started.id, lambda text: print("LOG", text, end=""), lambda note: print("NOTE", note)
    )
    print(state)
    assert state.driver_exit_code == 3
