"""What W&B is told of a search: a run a trial, and one of the whole."""

import json
import time
from pathlib import Path

import pytest

from jobs import track
from jobs.tracking.sending import SenderProcess
from jobs.tuning.search_results import write_results
from jobs.tuning.search_wandb import BEST, REPORT, TRIALS, read_search
from jobs.tuning.trial_records import write_begun, write_ended
from pneumo.dataset.manifest import read_manifest
from pneumo.reporting.tracking.dashboards import build_views, describe_view
from pneumo.reporting.tracking.media import Page, Table
from pneumo.reporting.tracking.tracked_run import make_run_id, prepare_tracking
from pneumo.training.checkpoint_writer import write_history
from pneumo.tuning.search import Search
from tests.conftest import StoreMaker
from tests.pneumo.reporting.tracking.wandb_server import Backend
from tests.searches import make_search

NUM_TRIALS = 8


@pytest.fixture
def search() -> Search:
    return make_search(NUM_TRIALS)


@pytest.fixture
def run(search: Search, tiny_store: StoreMaker, tmp_path: Path) -> Path:
    """The folder of a search that has ended, and of whose trials one was never trained to its
    end."""
    run, manifest = tmp_path / "search", read_manifest(tiny_store())
    run.mkdir()
    (run / "config.json").write_text(search.config.to_json())
    prepare_tracking(str(run), manifest)
    for trial in search.trials:
        write_begun(str(run), trial.name, trial.settings, trial.seed)
        write_history(str(run / "trials" / trial.name), trial.history)
        write_ended(str(run), trial.name, trial.state, trial.error)
    write_begun(str(run), "t999", search.trials[0].settings, 0)
    write_results(search, manifest, str(run))
    return run


def test_each_trial_that_has_ended_and_the_search_are_runs_of_a_group(
    run: Path, search: Search
) -> None:
    found = list(read_search(str(run)))
    name = make_run_id(str(run))
    assert [one.job_type for one in found] == ["tune-trial"] * NUM_TRIALS + ["tune"]
    assert {one.id for one in found} == {name, *(f"{name}-{t.name}" for t in search.trials)}
    assert {one.group for one in found} == {name}
    known = [one.id for one in found[:3]]
    assert [one.id for one in read_search(str(run), known)] == [one.id for one in found[3:]]
    (run / BEST).unlink()
    assert len(list(read_search(str(run)))) == NUM_TRIALS


def test_a_trial_is_its_epochs_and_its_end(run: Path, search: Search) -> None:
    told = {one.name.rsplit("-", 1)[-1]: one for one in read_search(str(run))}
    best = search.trials[0]
    found = told[best.name]
    assert [row["epoch"] for row in found.history] == list(range(1, 9))
    assert found.summary["tune/objective"] == pytest.approx(best.objective(search.config.tune))
    assert found.summary["tune/state"] == "finished"
    assert found.config["train"]["lr"] == best.settings["train.lr"]
    assert told["t005"].summary["tune/error"] == "the loss is nan"


def test_a_trial_that_failed_is_not_finished(run: Path, search: Search) -> None:
    name = search.trials[0].name
    write_ended(str(run), name, "failed", "the node is gone")
    ends = {one.id.rsplit("-", 1)[-1]: one.is_finished for one in read_search(str(run))}
    assert [trial for trial, end in ends.items() if not end] == [name]


def test_a_search_is_its_table_its_page_and_its_setting(run: Path, search: Search) -> None:
    *_, found = read_search(str(run))
    table, page = found.media["tune/trials"], found.media["tune/report"]
    assert isinstance(table, Table)
    assert isinstance(page, Page)
    assert [row[0] for row in table.rows] == [trial.name for trial in search.trials]
    assert all(len(row) == len(table.columns) for row in table.rows)
    (artifact,) = found.outputs
    assert (artifact.name, set(artifact.files)) == (
        f"search-{make_run_id(str(run))}",
        {TRIALS, REPORT, BEST},
    )
    chosen = search.choice.trial
    assert found.summary["tune/train.lr"] == chosen.settings["train.lr"]
    # Not `tune/objective`, which the workspace plots over the settings of each run's config.
    assert "tune/objective" not in found.summary
    told = found.summary["tune/chosen_objective"]
    assert told == pytest.approx(chosen.objective(search.config.tune))
    assert found.summary["tune/epochs"] == search.epochs


def test_the_tune_view_shows_what_is_told(run: Path) -> None:
    told = {
        key
        for one in read_search(str(run))
        for part in (one.summary, one.media, *one.history)
        for key in part
    }
    view = json.dumps(describe_view(build_views("pneumo", "team")["Tune"]))
    assert {"tune/objective", "tune/trials", "val/objective"} <= told
    for key in ("tune/objective", "tune/trials", "val/objective", "train.lr", "train.pos_weight"):
        assert key in view


def test_the_command_sends_each_of_them_once(run: Path, search: Search, backend: Backend) -> None:
    for trial in search.trials[2:]:  # each is a run to open and to close
        (run / "trials" / trial.name / "end.json").unlink()
    name = make_run_id(str(run))
    for _ in range(2):
        assert track.main(["--run", str(run)]) == 0
        assert backend.exit_codes == dict.fromkeys(
            [name, *(f"{name}-{trial.name}" for trial in search.trials[:2])], 0
        )
        assert backend.epochs(f"{name}-{search.trials[0].name}") == list(range(1, 9))
    assert backend.summary(name)["tune/trial"] == search.choice.trial.name
    assert {a["state"] for a in backend.artifacts.values()} == {"COMMITTED"}
    assert backend.unknown == []


def test_a_failed_trial_is_a_run_of_its_own_while_the_search_goes_on(
    run: Path, search: Search, backend: Backend
) -> None:
    for trial in search.trials[2:]:
        (run / "trials" / trial.name / "end.json").unlink()
    failed, finished = (f"{make_run_id(str(run))}-{trial.name}" for trial in search.trials[:2])
    (run / BEST).unlink()
    write_ended(str(run), search.trials[0].name, "failed", "the node is gone")
    write_history(str(run / "trials" / search.trials[0].name), search.trials[0].history[:2])
    sender = SenderProcess(str(run), ["tune"], interval_s=0.2)
    end = time.monotonic() + 240.0
    while set(backend.exit_codes) != {failed, finished}:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert sender.close().failure is None
    assert backend.exit_codes == {failed: 1, finished: 0}
    assert backend.epochs(failed) == [1, 2]
    assert backend.epochs(finished) == list(range(1, 9))
