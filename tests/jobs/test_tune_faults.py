"""Searches that outlast killed processes and slow disks."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from jobs import tune
from jobs.tuning.trial_records import (
    read_history,
    read_trials,
    trial_url,
)
from tests.jobs.conftest import SMALL, Prepared
from tests.jobs.test_prepare import kill
from tests.jobs.test_tune import places, read_table
from tests.waiting import wait_until

SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    if os.fstat(descriptor).st_size > 2**20:  # a checkpoint
        time.sleep(4)
    fsync(descriptor)
os.fsync = slow
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_trial_that_still_writes_costs_the_next_one_nothing(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Of two trials in a process, the first is stopped at a rung while its checkpoint is under
    way."""
    run = tmp_path / "search"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    few = ("--tune.num-trials", "5", "--tune.epochs", "2")
    command = [sys.executable, "-m", "jobs.tune", *places(prepared, run), *SMALL, *few]
    done = subprocess.run(
        [*command, "--tune.algorithm", "random"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    states = [row["state"] for row in read_table(run)]
    assert len(states) == 5
    assert set(states) == {"finished", "stopped"}, done.stderr


LONG = [
    *SMALL,
    *("--tune.num-trials", "4", "--tune.epochs", "4", "--tune.early-stopping", "none"),
    *("--tune.algorithm", "random"),
]


def has_epochs(run: Path, name: str, number: int) -> bool:
    return len(read_history(trial_url(str(run), name))) >= number


def strike_later(run: Path, epochs: int) -> list[int]:
    """Kill the process of some trial once the first has so many epochs; whom, when it is done."""
    killed: list[int] = []

    def strike() -> None:
        wait_until(
            lambda: has_epochs(run, "t001", epochs), f"epoch {epochs} of t001", timeout_s=240
        )
        victims = [
            process
            for process in psutil.Process().children(recursive=True)
            if "ray::ImplicitFunc" in " ".join(process.cmdline())
        ]
        killed.append(victims[0].pid)
        victims[0].kill()

    threading.Thread(target=strike, daemon=True).start()
    return killed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_that_fails_for_good_is_told_and_the_search_goes_on(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "search"
    killed = strike_later(run, 1)
    assert tune.main([*places(prepared, run), *LONG, "--cluster.max-failures", "0"]) == 0
    assert killed
    table = {str(row["name"]): row for row in read_table(run)}
    failed = [name for name, row in table.items() if row["state"] == "failed"]
    assert len(failed) == 1
    assert [row["state"] for name, row in table.items() if name not in failed] == ["finished"] * 3
    assert table[failed[0]]["error"] == "its process was lost"
    assert "failed: its process was lost; the search goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "search"
    killed = strike_later(run, 2)
    assert tune.main([*places(prepared, run), *LONG]) == 0
    assert killed
    table = read_table(run)
    assert [row["state"] for row in table] == ["finished"] * 4
    assert [row["epochs"] for row in table] == [4] * 4
    assert "its process was lost; resumes from its checkpoint" in capsys.readouterr().err
    for name in ("t001", "t002", "t003", "t004"):
        numbers = [record["epoch"] for record in read_history(trial_url(str(run), name))]
        assert numbers == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_that_is_killed_goes_on_where_it_was(prepared: Prepared, tmp_path: Path) -> None:
    trials: dict[str, dict[str, object]] = {}
    for name, strikes in (("whole", 0), ("cut", 2)):
        run = tmp_path / name
        command = [sys.executable, "-m", "jobs.tune", *places(prepared, run), *LONG]
        for strike in range(strikes):
            with (tmp_path / f"{name}-{strike}.log").open("wb") as log:
                job = subprocess.Popen(command, stdout=log, stderr=log)
            target = f"t{1 + 2 * strike:03}"
            wait_until(
                partial(has_epochs, run, target, 2),
                f"epoch 2 of {target}",
                timeout_s=240,
            )
            kill(job, whole=bool(strike))
        begun = {
            trial.name: trial.epochs for trial in read_trials(str(run)).values() if trial.is_open
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [row["state"] for row in read_table(run)] == ["finished"] * 4, done.stderr
        if strikes:
            assert any(epochs >= 2 for epochs in begun.values())
            assert "tune: resuming:" in done.stderr
            resumed = re.findall(r"trial (t\d+)", done.stderr)
            assert set(begun) <= set(resumed)
        trials[name] = {str(row["name"]): row["objective"] for row in read_table(run)}
    # Drawn at random, a trial depends on the seed and its number alone: nothing was lost, nothing
    # was trained otherwise.
    assert trials["cut"] == trials["whole"]
