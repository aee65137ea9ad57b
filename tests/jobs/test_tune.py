"""Searches on a real Ray cluster: what they leave, what they refuse, how they resume."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from jobs import tune
from jobs.tuning.trial_records import (
    read_history,
    trial_url,
    write_ended,
)
from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.dataset.manifest import read_manifest
from tests.jobs.conftest import SMALL, Prepared
from tests.once import make_once

QUICK = [
    *(*SMALL, "--data.image-size", "32"),
    *("--tune.epochs", "1", "--tune.early-stopping", "none"),
]


ONE_PROCESS = ["--cluster.cpus-per-worker", "2"]
"""One trial at a time on two CPUs: all in one process, which has to start and to import once."""


WIDE = json.dumps(
    {"train.lr": ["log_uniform", 1e-5, 3e-3], "train.pos_weight": [*("choice", 1, 3)]}
)


def places(prepared: Prepared, run: Path) -> list[str]:
    return ["--store", str(prepared.store), "--run", str(run)]


def read_table(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run / "trials.parquet").to_pylist()
    return rows


@dataclass(frozen=True)
class Searched:
    """A search of three trials that has ended, and what it said; tests must not write into it."""

    run: Path
    flags: tuple[str, ...]
    """Of its command, but for its folder."""
    out: str
    err: str

    def copy(self, folder: Path) -> Path:
        """Its folder as it was just before the end."""
        run = Path(shutil.copytree(self.run, folder / "search"))
        (run / "best.toml").unlink()
        return run


@pytest.fixture(scope="session")
def searched(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    flags = ("--store", str(prepared.store), *QUICK, "--tune.num-trials", "3")

    def make(folder: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            assert tune.main([*flags, "--run", str(folder / "run")]) == 0, err.getvalue()
        (folder / "out").write_text(out.getvalue())
        (folder / "err").write_text(err.getvalue())

    folder = make_once(tmp_path_factory, "searched", make)
    said = ((folder / name).read_text() for name in ("out", "err"))
    return Searched(folder / "run", flags, *said)


def test_a_search_ends_with_a_table_a_page_and_a_recipe_that_train_takes(
    prepared: Prepared, searched: Searched, capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched.run
    table = read_table(run)
    assert [row["state"] for row in table] == ["finished"] * 3
    scores = [row["objective"] for row in table]
    assert scores == sorted(scores, reverse=True)
    assert all(row["low"] < row["objective"] < row["high"] for row in table)
    assert all(1e-5 <= row["train.lr"] <= 3e-3 for row in table)
    (chosen,) = (row for row in table if row["chosen"])
    invocation = parse_command_line(
        "train", ["--store", "x", "--recipe", str(run / "best.toml")], {}
    )
    assert invocation.config.train.lr == chosen["train.lr"]
    assert invocation.config.train.pos_weight == chosen["train.pos_weight"]
    assert invocation.config.train.epochs == Config().train.epochs  # a trial's are fewer
    provenance = (run / "best.toml").read_text()
    manifest = read_manifest(str(prepared.store))
    assert f"trial {chosen['name']} of 3" in provenance
    assert manifest.digest[:12] in provenance
    assert f"Trial {chosen['name']} is chosen" in (run / "report.html").read_text()
    assert f"chosen {chosen['name']}" in searched.out
    at_once = min(3, int(ray.cluster_resources()["CPU"]))
    assert f"3 trials of 1 epochs, {at_once} at a time" in searched.err
    assert not list(run.rglob("*.pt"))
    assert not (run / "ray").exists()
    assert tune.main([*searched.flags, "--run", str(run)]) == 2
    assert "holds a finished search" in capsys.readouterr().err


def test_the_objective_is_val_alone(prepared: Prepared, searched: Searched) -> None:
    """What a trial keeps of its last epoch are val's studies, each once."""
    rows = pq.read_table(prepared.store / "studies.parquet").to_pylist()
    of_val = sorted(row["key"] for row in rows if row["split"] == "val")
    for name in ("t001", "t002", "t003"):
        kept = pq.read_table(searched.run / "trials" / name / "val.parquet")
        assert sorted(kept["key"].to_pylist()) == of_val


@pytest.fixture(scope="module")
def confirmed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search of two good settings, which are trained again, and a bad one."""
    run = tmp_path_factory.mktemp("confirmed") / "search"
    space = ("--tune.space", '{"train.lr": ["choice", 1e-3, 2e-3, 1e30]}')
    again = ("--tune.algorithm", "grid", *space, "--tune.confirm", "2")
    flags = ("--store", str(prepared.store), *QUICK, *ONE_PROCESS, *again)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert tune.main([*flags, "--run", str(run)]) == 0, err.getvalue()
    return Searched(run, flags, out.getvalue(), err.getvalue())


def test_one_bad_setting_does_not_end_the_search(confirmed: Searched) -> None:
    *good, bad = (row for row in read_table(confirmed.run) if row["role"] == "search")
    assert {(row["train.lr"], row["state"]) for row in good} == {
        (1e-3, "finished"),
        (2e-3, "finished"),
    }
    assert (bad["train.lr"], bad["state"]) == (1e30, "diverged")
    assert "lower train.lr" in str(bad["error"])
    assert "diverged: epoch 1" in confirmed.out
    assert "Traceback" not in confirmed.err


def test_the_best_are_trained_again_with_new_seeds(confirmed: Searched) -> None:
    table = read_table(confirmed.run)
    search, confirm = ([r for r in table if r["role"] == role] for role in ("search", "confirm"))
    assert sorted(row["seed"] for row in confirm) == [1, 1, 2, 2]
    assert {row["train.lr"] for row in confirm} == {1e-3, 2e-3}
    # Of so few studies two objectives may be equal; losses are not.
    names = [str(r["name"]) for r in confirm if r["train.lr"] == search[0]["train.lr"]]
    losses = [read_history(trial_url(str(confirmed.run), name))[0]["train/loss"] for name in names]
    assert losses[0] != losses[1]
    assert f"confirmed {search[0]['name']}: mean" in confirmed.out
    assert "2 new seeds" in (confirmed.run / "best.toml").read_text()


def test_a_search_of_bad_settings_alone_says_why(
    searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched.copy(tmp_path)
    for name in ("t001", "t002", "t003"):
        write_ended(str(run), name, "diverged", "the loss is no number; lower train.lr")
        for kept in ("metrics.jsonl", "val.parquet"):
            (run / "trials" / name / kept).unlink()
    assert tune.main([*searched.flags, "--run", str(run)]) == 1
    assert "every trial failed, the first with: the loss is no number" in capsys.readouterr().err
    assert not (run / "best.toml").exists()


def test_a_search_of_another_space_is_refused_before_anything_starts(
    searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*searched.flags, "--run", str(searched.copy(tmp_path))]
    assert tune.main([*command, "--tune.space", WIDE]) == 2
    assert "with another tune.space.train.pos_weight" in capsys.readouterr().err
    assert tune.main([*command, "--train.schedule", "cosine"]) == 2
    assert "with another train.schedule" in capsys.readouterr().err


def test_a_search_goes_on_with_what_its_records_say(
    searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a kill: one trial has ended, one has its epochs but no end, one has only begun."""
    run = searched.copy(tmp_path)
    (run / "trials" / "t002" / "end.json").unlink()
    for name in ("end.json", "metrics.jsonl", "val.parquet"):
        (run / "trials" / "t003" / name).unlink()
    kept = {n: (run / "trials" / n / "metrics.jsonl").stat().st_mtime_ns for n in ("t001", "t002")}
    assert tune.main([*searched.flags, "--run", str(run)]) == 0
    assert "resuming: 1 trials have ended, 2 had not" in capsys.readouterr().err
    for name, written_ns in kept.items():
        assert (run / "trials" / name / "metrics.jsonl").stat().st_mtime_ns == written_ns
    before, after = read_table(searched.run), read_table(run)
    volatile = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in volatile} for r in after] == [
        {k: v for k, v in r.items() if k not in volatile} for r in before
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_two_workers_take_turns_on_two_cpus(prepared: Prepared, tmp_path: Path) -> None:
    run = tmp_path / "search"
    more = ["--tune.num-trials", "2", "--tune.workers-per-trial", "2"]
    assert tune.main([*places(prepared, run), *QUICK, *more]) == 0
    table = read_table(run)
    assert [row["state"] for row in table] == ["finished", "finished"]
    # The same settings on one worker give the same objective: a trial's size changes no result.
    alone = tmp_path / "alone"
    assert tune.main([*places(prepared, alone), *QUICK, "--tune.num-trials", "2"]) == 0
    for one, other in zip(table, read_table(alone), strict=True):
        assert one["train.lr"] == other["train.lr"]
        # The result is the same up to the rounding of sums, which turns no more than a few of the
        # pairs of a positive and a negative that the objective counts.
        losses = [
            read_history(trial_url(str(where), str(one["name"])))[0]["train/loss"]
            for where in (run, alone)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        assert one["objective"] == pytest.approx(other["objective"], abs=0.1)


def test_a_search_that_ends_without_a_trial_says_so(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Forgetful:
        """A Tuner that draws a trial, and ends before it runs."""

        def __init__(self, trainable: object, tune_config: Any, run_config: Any) -> None:
            self.searcher, self.callbacks = tune_config.search_alg, run_config.callbacks

        def fit(self) -> None:
            drawn = self.searcher.suggest("1")
            trial = SimpleNamespace(trial_id="1", config=drawn, status="PENDING", last_result={})
            for callback in self.callbacks:
                callback.on_experiment_end([trial])

    run = tmp_path / "search"
    command = [*places(prepared, run), *QUICK, "--tune.num-trials", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(ray.tune, "Tuner", Forgetful)
        assert tune.main(command) == 1
    assert "Ray Tune ended t001 without an error" in capsys.readouterr().err
    assert not (run / "best.toml").exists()
