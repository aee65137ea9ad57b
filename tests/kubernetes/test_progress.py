"""What a user sees between the submission of a run and its end, on a real cluster."""

import re

import pytest

from tests.kubernetes.cluster import Team
from tests.kubernetes.probes import make_probe
from tests.kubernetes.watching import begin

pytestmark = [pytest.mark.kubernetes, pytest.mark.usefixtures("needs_bucket")]

STEPS = (
    "head has a node",
    "head ready",
    "workers 1 of 1 ready",
    "submitter up",
    "driver started",
)


@pytest.mark.timeout(900)
def test_the_steps_before_the_driver_are_shown_and_only_its_own_log(team: Team) -> None:
    run = begin(team, make_probe(team, "steps", 5, 0.1, 3))
    state = run.end()
    assert (state.exit_code, state.driver_exit_code, state.why) == (1, 3, "exit code 3")
    seconds = []
    for step in STEPS:
        [found] = [re.fullmatch(rf"{step} \((\d+) s\)", note) for note in run.notes if step in note]
        assert found, run.notes
        seconds.append(int(found[1]))
    assert seconds[0] <= seconds[1] <= seconds[3] <= seconds[4] + 1
    log = "".join(run.text).splitlines()
    assert [line for line in log if line.startswith("line ")] == [f"line {k}" for k in range(5)]
    of_the_submitter = [
        line for line in log if " cli.py:" in line or " sdk.py:" in line or "\x1b" in line
    ]
    assert of_the_submitter == []
    assert team.command("logs", run.job_id).stdout.splitlines() == log
