"""What a person sees of a search."""

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.tune import TuneError
from rich.console import Console

from jobs.tuning.live_table import LiveTable
from jobs.tuning.trial_lines import TrialLines
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.errors import DataError
from pneumo.search_space import Scalar
from pneumo.tuning.trials import describe_settings

TUNE = override(Config(), {"tune.num_trials": 20, "tune.epochs": 8}).tune


def tune_trial(number: int, status: str, epoch: int = 0, objective: float = 0.0) -> Any:
    result = {"epoch": epoch, "objective": objective} if epoch else {}
    settings = {"train.lr": 10.0**-number, "train.optimizer": "adam"}
    config = {"name": f"t{number:03}", "settings": settings, "seed": 0}
    return SimpleNamespace(trial_id=str(number), config=config, status=status, last_result=result)


def caused_by(cause: Exception) -> Exception:
    """As Ray wraps it."""
    error = TuneError("a worker failed")
    error.cause = cause
    assert isinstance(error, Exception)
    return error


def draw(table: LiveTable) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table.draw())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_table_shows_who_trains_then_the_best() -> None:
    table = LiveTable("search", TUNE, 20, 0)
    trials = [
        tune_trial(1, "TERMINATED", 8, 0.91),
        tune_trial(2, "TERMINATED", 2, 0.61),
        tune_trial(3, "RUNNING", 3, 0.75),
        tune_trial(4, "ERROR", 1, 0.5),
        tune_trial(5, "PENDING"),
    ]
    table.on_step_end(1, trials)
    lines = [line for line in draw(table).splitlines() if " t00" in line]
    assert [line.split("│")[1].strip() for line in lines] == [
        "t003",
        "t001",
        "t002",
        "t004",
        "t005",
    ]
    assert "trains" in lines[0]
    assert " 3 " in lines[0]
    assert "done" in lines[1]
    assert "0.9100" in lines[1]
    assert "stopped" in lines[2]
    assert "failed" in lines[3]
    assert "waits" in lines[4]
    assert "3 of 20 trials" in draw(table)


def test_a_trial_that_tune_gives_up_without_a_word_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended: list[Any] = []
    lines = TrialLines(TUNE, lambda *end: ended.append(end))
    done, failed, lost = (
        tune_trial(1, "TERMINATED", 8, 0.9),
        tune_trial(2, "ERROR"),
        tune_trial(3, "ERROR"),
    )
    for trial in (failed, lost):
        trial.pickled_error_file = None
    trials = [done, failed, lost]
    lines.on_trial_complete(1, trials, done)
    lines.on_trial_error(2, trials, failed)
    lines.on_experiment_end(trials)
    unknown = "for a reason that Ray does not give"
    assert ended == [
        ("t001", "finished", None),
        ("t002", "failed", unknown),
        ("t003", "failed", unknown),
    ]
    assert capsys.readouterr().err.count("the search goes on") == 2


def test_lines_tell_of_each_end(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[Any] = []
    lines = TrialLines(TUNE, lambda *end: ended.append(end))
    stopped, done = tune_trial(1, "TERMINATED", 2, 0.6), tune_trial(2, "TERMINATED", 8, 0.9)
    diverged = tune_trial(3, "TERMINATED", 1, 0.5)
    diverged.last_result["error"] = "the loss is nan"
    for one in (stopped, done, diverged):
        lines.on_trial_complete(1, [], one)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "trial t001  lr 0.1  optimizer adam  0.6000, stopped after 2 epochs"
    assert said[1].endswith("0.9000 after 8 epochs")
    assert said[2].endswith("failed: the loss is nan")
    assert ended == [
        ("t001", "stopped", None),
        ("t002", "finished", None),
        ("t003", "diverged", "the loss is nan"),
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorDiedError(), "its process was lost"),
        (ActorUnavailableError("no answer", None), "its process was lost"),
        (TuneError("first line\n\nlast line\n"), "last line"),
        (caused_by(DataError("shard 3: gone")), "shard 3: gone"),
        (MemoryError(), "MemoryError"),
        (None, "for a reason that Ray does not give"),
    ],
)
def test_lines_tell_why_a_trial_failed(
    error: Exception | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial, file = tune_trial(1, "ERROR", 2, 0.6), tmp_path / "error.pkl"
    if error is not None:
        file.write_bytes(cloudpickle.dumps(error))
    trial.pickled_error_file = str(file)
    lines = TrialLines(TUNE, lambda *end: None)
    lines.on_trial_recover(1, [], trial)
    lines.on_trial_error(1, [], trial)
    recovered, failed = capsys.readouterr().err.splitlines()
    assert recovered == f"trial t001  {told}; resumes from its checkpoint"
    assert failed.endswith(f"  failed: {told}; the search goes on")


def test_time_left_counts_what_this_process_did() -> None:
    table = LiveTable("search", TUNE, 10, 10)
    table.on_step_end(1, [tune_trial(1, "RUNNING", 4, 0.5)])  # there before
    assert "left" not in table.describe_progress()
    table.trials = [tune_trial(1, "TERMINATED", 8, 0.9)]
    text = table.describe_progress()
    assert "11 of 20 trials, 8 of 80 epochs" in text
    assert "left" in text
    assert "best 0.9000" in text


def test_tune_can_pickle_them() -> None:
    table = LiveTable("search", TUNE, 1, 0)
    for callback in (table, TrialLines(TUNE, lambda *end: print(table))):
        pickle.loads(pickle.dumps(callback))


def test_settings_in_a_line() -> None:
    drawn: dict[str, Scalar] = {
        "train.lr": 0.000312345,
        "model.backbone": "resnet18",
        "train.patience": None,
    }
    assert describe_settings(drawn) == "lr 0.000312  backbone resnet18  patience None"


def test_a_start_that_was_not_asked_for_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = TrialLines(TUNE, lambda *end: None)
    result = {"epoch": 1, "objective": 0.5, "warning": "random weights: ImageNet out of reach"}
    for number in (1, 2):
        lines.on_trial_result(1, [], tune_trial(number, "RUNNING", 1, 0.5), result)
        lines.on_trial_result(1, [], tune_trial(number, "RUNNING", 1, 0.5), {"epoch": 1})
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning: trial t001: model: random weights: ImageNet out of reach"]
