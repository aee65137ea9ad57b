"""What W&B is told of a search: a run a trial, once, and one of the whole."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from jobs.tuning.search_results import BEST, REPORT, TRIALS, log_search
from jobs.tuning.trial_records import write_begun, write_ended, write_history
from jobs.tuning.trial_wandb import TrialTracking, log_trial
from pneumo import storage
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import StorageError
from pneumo.reporting.tracking import MemoryTracker, Page, Table
from pneumo.reporting.tracking.dashboards import build_views, describe_view
from pneumo.tuning.trials import Trial
from tests.jobs.conftest import Prepared
from tests.searches import make_search

FILES = {TRIALS: b"table", REPORT: b"<p>page</p>", BEST: b"recipe"}


def test_a_trial_is_its_epochs_and_its_end() -> None:
    search = make_search()
    tracker, trial = MemoryTracker(), search.trials[0]
    log_trial(tracker, trial, search.config.tune)
    assert [record["epoch"] for record in tracker.history] == list(range(1, 9))
    assert tracker.summary["tune/objective"] == trial.objective(search.config.tune)
    assert tracker.summary["tune/state"] == "finished"


def test_a_search_is_its_table_its_page_and_its_setting() -> None:
    search = make_search()
    tracker = MemoryTracker()
    log_search(tracker, search, FILES)
    table, page = tracker.media["tune/trials"], tracker.media["tune/report"]
    assert isinstance(table, Table)
    assert isinstance(page, Page)
    assert len(table.rows) == len(search.trials)
    assert all(len(row) == len(table.columns) for row in table.rows)
    ((role, artifact),) = tracker.artifacts
    assert (role, artifact.name, set(artifact.files)) == ("output", "search-made-up", set(FILES))
    assert tracker.summary["tune/train.lr"] == search.choice.trial.settings["train.lr"]


def test_the_tune_view_shows_what_is_logged() -> None:
    search, tracker = make_search(), MemoryTracker()
    log_trial(tracker, search.trials[0], search.config.tune)
    log_search(tracker, search, FILES)
    logged = {*tracker.history[0], *tracker.summary, *tracker.media}
    view = json.dumps(describe_view(build_views("pneumo", "team")["Tune"]))
    assert {"tune/objective", "tune/trials", "val/objective"} <= logged
    for key in ("tune/objective", "tune/trials", "val/objective", "train.lr", "train.pos_weight"):
        assert key in view


def test_each_trial_is_sent_once(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "search"
    search = make_search(8)
    config = override(search.config, {"tracking.mode": "offline"})
    for trial in search.trials[:2]:
        write_begun(str(run), trial.name, trial.settings, trial.seed)
        write_history(str(run / "trials" / trial.name), trial.history)
        write_ended(str(run), trial.name, trial.state, trial.error)
    manifest = read_manifest(str(prepared.store))
    for _ in range(2):  # the second time as a search that goes on
        with TrialTracking(config, manifest, str(run)) as tracking:
            for trial in search.trials[:2]:
                tracking.put(trial)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "2 of 2 trials not (all) sent" in said[0]
    assert f"python -m pneumo.tracking sync {run}" in said[0]


def test_a_search_that_is_not_tracked_leaves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    config = override(Config(), {"tracking.mode": "disabled"})
    manifest = read_manifest(str(prepared.store))
    with TrialTracking(config, manifest, str(tmp_path / "run")) as tracking:
        tracking.put(make_search(8).trials[0])
    assert not list(tmp_path.rglob("*"))


def _begin(run: Path, number: int) -> tuple[Config, list[Trial]]:
    search = make_search(8)
    trials = list(search.trials[:number])
    for trial in trials:
        write_begun(str(run), trial.name, trial.settings, trial.seed)
    return override(search.config, {"tracking.mode": "offline"}), trials


@pytest.mark.parametrize(("faults", "told"), [(1, 3), (2, 2)])
def test_a_fault_of_the_storage_puts_a_trial_off_and_ends_nothing(
    prepared: Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    faults: int,
    told: int,
) -> None:
    config, trials = _begin(tmp_path, 3)
    manifest = read_manifest(str(prepared.store))
    exists, left = storage.exists, [faults]

    def fail(url: str) -> bool:
        if trials[0].name in url and left[0]:
            left[0] -= 1
            raise StorageError("the bucket is away")
        return exists(url)

    monkeypatch.setattr(storage, "exists", fail)
    for attempt, found in enumerate((told, 3)):  # then as a search that goes on
        with TrialTracking(config, manifest, str(tmp_path)) as tracking:
            for trial in trials:
                tracking.put(trial)
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == found
        said = capsys.readouterr().err
        if not attempt:
            assert f"trial {trials[0].name} is put off: the bucket is away" in said
            assert (f"{trials[0].name} is not told: the bucket is away" in said) == (told == 2)


def test_a_search_that_is_interrupted_does_not_wait_for_wandb(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trials = _begin(tmp_path, 3)
    sent: list[str] = []
    begun = threading.Event()

    def send(self: TrialTracking, trial: Trial) -> None:
        begun.set()
        time.sleep(1.0)
        sent.append(trial.name)

    monkeypatch.setattr(TrialTracking, "_send", send)
    tracking = TrialTracking(config, read_manifest(str(prepared.store)), str(tmp_path))
    with pytest.raises(KeyboardInterrupt), tracking:  # noqa: PT012  it is raised within
        for trial in trials:
            tracking.put(trial)
        assert begun.wait(120), "the first trial was not sent"
        raise KeyboardInterrupt
    assert sent == [trials[0].name]


def test_a_trial_is_not_called_sent_where_wandb_is_off(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, trials = _begin(tmp_path, 1)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with TrialTracking(config, read_manifest(str(prepared.store)), str(tmp_path)) as tracking:
        tracking.put(trials[0])
    assert not list(tmp_path.rglob("tracked"))
