"""The table of all runs of one person."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cluster import live_view, run_folder
from cluster.targets import JobState, OutOfReachError, Target
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.errors import ConfigError


@dataclass
class Cluster:
    """What a cluster says of its jobs, one answer after the other, the last for ever."""

    answers: list[list[JobState] | Exception]
    asked: int = 0
    flags: str = ""
    known: list[JobState] = field(default_factory=list)

    def list(self) -> Sequence[JobState]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def state(self, job_id: str) -> JobState:
        found = [state for state in self.list() if state.id == job_id]
        if not found:
            raise ConfigError(f"no job {job_id}")
        return found[0]


def _watch(
    *answers: list[JobState] | Exception, ids: Sequence[str] = ()
) -> tuple[int, list[str], list[str]]:
    shown: list[object] = []
    told: list[object] = []
    cluster: Target = Cluster(list(answers))  # type: ignore[assignment]  # it submits nothing
    code = live_view.watch(cluster, ids, "me", shown.append, told.append, interval_s=0.0)
    return code, [str(each) for each in shown], [str(each) for each in told]


def _write_run(folder: Path, *epochs: dict[str, float]) -> str:
    folder.mkdir()
    config = override(Config(), {"train.epochs": 4})
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in epochs))
    return str(folder)


EPOCH = {"val/auroc": 0.8126, "images_per_s": 41.7, "data_wait": 0.25, "epoch_s": 40.0}


def test_the_runs_of_one_person_are_shown_until_they_have_ended(tmp_path: Path) -> None:
    url = _write_run(tmp_path / "run", EPOCH, {**EPOCH, "val/auroc": 0.9, "epoch_s": 79.8})
    mine = JobState(
        "train-1", "running", target=url, owner="me", entrypoint="python -m jobs.train --store s"
    )
    again = replace(mine, id="evaluate-1", entrypoint="python -m jobs.evaluate --run jobs.train/1")
    waits = JobState("train-2", "waiting", why="for its pods to start", owner="me")
    hers = JobState("train-3", "running", owner="she")
    before = JobState("train-0", "failed", owner="me")
    code, shown, _ = _watch(
        [before, mine, waits, hers, again],
        [before, mine, waits, hers, again],
        [
            replace(again, phase="succeeded"),
            replace(mine, phase="succeeded"),
            replace(waits, phase="failed", why="", driver_exit_code=2),
        ],
    )
    assert code == 2
    first, last = (table.splitlines() for table in shown)
    assert [line.split()[0] for line in first[1:]] == ["train-1", "train-2", "evaluate-1"]
    assert first[1].split()[1:] == ["running", "2/4", "0.900", "42", "25%", "2", "min", "00", "s"]
    assert first[3].split() == ["evaluate-1", "running", *"-----"]
    assert "waiting" in first[2]
    assert first[2].endswith("for its pods to start")
    assert last[1].endswith("exit code 0")
    assert last[2].endswith("exit code 2")


def test_one_job_is_shown_to_its_end_and_one_that_was_deleted_was_cancelled() -> None:
    running = JobState("train-1", "running", owner="she")
    code, shown, _ = _watch([running], [running], [], ids=["train-1"])
    assert (code, shown[-1].splitlines()[1].split()[1]) == (130, "cancelled")
    failed = JobState("train-1", "failed", driver_exit_code=2)
    code, shown, told = _watch([failed], ids=["train-1"])
    assert (code, told) == (2, [])
    assert shown[0].splitlines()[1].endswith("exit code 2")
    with pytest.raises(ConfigError, match="no job train-9"):
        _watch([running], ids=["train-9"])


def test_a_cluster_that_is_away_for_a_while_is_asked_again() -> None:
    ended = JobState("train-1", "succeeded", owner="me")
    code, shown, told = _watch(
        [replace(ended, phase="running")], OutOfReachError("no answer; is it up?"), [ended]
    )
    assert (code, told) == (0, ["no answer; trying again"])
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("kept", "code", "phase"),
    [
        ({"20260101-030405.log": "done", "20260101-030405.exit": "0"}, 0, "succeeded"),
        ({"20260101-030405.log": "error", "20260101-030405.exit": "2"}, 2, "failed"),
        ({"20260101-030405.log": "stopped", "20260101-030405.exit": "130"}, 130, "cancelled"),
        ({"20260101-030405.exit": "0", "20260102-030405.log": "epoch 1"}, 1, "failed"),
        ({}, 1, "failed"),
    ],
)
def test_a_job_that_is_gone_after_an_outage_is_judged_by_what_it_left(
    kept: dict[str, str], code: int, phase: str, tmp_path: Path
) -> None:
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    running = JobState("train-1", "running", owner="me", log_folder=str(tmp_path))
    found, shown, _ = _watch([running], OutOfReachError("no answer"), [])
    assert (found, shown[-1].splitlines()[1].split()[1]) == (code, phase)
    if code == 1:
        assert "whether it finished is not known" in shown[-1]


def test_an_earlier_submission_of_the_same_name_says_nothing_of_a_deleted_job(
    tmp_path: Path,
) -> None:
    logs = tmp_path / "logs" / "train-1"
    (logs / "earlier").mkdir(parents=True)
    (logs / "earlier" / "20260101-030405.exit").write_text("0")
    running = JobState("train-1", "running", target=str(tmp_path), owner="me")
    code, shown, _ = _watch([replace(running, log_folder=str(logs / "now"))], [])
    assert (code, shown[-1].splitlines()[1].split()[1]) == (130, "cancelled")


def test_nobody_runs_anything() -> None:
    assert _watch([JobState("train-1", "running", owner="she")]) == (
        0, [], ["no job of me is running"],
    )  # fmt: skip


def test_a_place_out_of_reach_is_said_and_not_asked_again(tmp_path: Path) -> None:
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    target, entrypoint = str(tmp_path / "run"), "python -m jobs.train"
    asked = JobState("train-1", "running", target=target, entrypoint=entrypoint, owner="me")
    _, shown, _ = _watch([asked], [asked], [replace(asked, phase="succeeded")])
    assert "its folder cannot be read from here" in shown[0]
    assert "exit code 0" in shown[-1]


def test_progress_is_read_while_it_is_written(tmp_path: Path) -> None:
    assert run_folder.read_progress(str(tmp_path / "none")) is None
    url = _write_run(tmp_path / "run")
    assert run_folder.read_progress(url) is None
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            (tmp_path / "run" / "metrics.jsonl").write_text(f"{json.dumps(EPOCH)}\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = {run_folder.read_progress(url) for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    found.add(run_folder.read_progress(url))  # a busy machine may have met the empty file alone
    assert found - {None} == {run_folder.Progress(1, 4, 0.8126, 41.7, 0.25, 120.0)}
