"""Searches on a real Ray cluster: what they leave, what they refuse, what they outlast."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

from jobs import tune
from jobs.tuning.job import check_search
from jobs.tuning.trial_judge import SharedTrialData, TrialJudge
from jobs.tuning.trial_records import (
    read_history,
    read_trials,
    trial_config,
    trial_url,
    write_begun,
    write_ended,
)
from jobs.tuning.trial_runs import load_shared_data, max_concurrent_trials
from pneumo.command_line import parse_command_line
from pneumo.config import Config, DataConfig
from pneumo.config_layers import override, with_absolute_weights
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import ClusterError, ConfigError
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import open_loaders
from pneumo.loading.sample_order import World
from pneumo.network.backbones import Initialisation, build_model
from pneumo.training.callbacks import Callbacks, Start
from pneumo.tuning.trials import ERROR, OBJECTIVE
from tests.jobs.conftest import SMALL, Prepared
from tests.jobs.test_prepare import kill
from tests.once import make_once
from tests.waiting import wait_until

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
    assert tune.main([*command, "--train.batch-size", "32"]) == 2
    assert "with another train.batch_size" in capsys.readouterr().err


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


def test_trials_read_one_copy_and_train_as_if_they_had_read_the_store(
    prepared: Prepared, ray_here: None
) -> None:
    config = Config.model_validate({"tune": {"space": {"data.image_size": ["choice", 64, 48]}}})
    manifest = read_manifest(str(prepared.store))
    shared = load_shared_data(config, manifest, str(prepared.store))
    assert set(shared.splits) == {64, 48}
    for size in (64, 48):
        splits = shared.fetch_splits(size)
        assert set(splits) == {"train", "val"}
        assert not splits["train"].images.flags.writeable  # the node's shared memory itself
        own, common = (
            open_loaders(
                PreparedStore(str(prepared.store), manifest, DataConfig(image_size=size)),
                ("train",),
                world=World(),
                device="cpu",
                shared_splits=given,
            )[0]
            for given in ({}, splits)
        )
        arguments = {"seed": 0, "batch_size": 16, "augment": config.augment}
        for one, other in zip(own.epoch(1, **arguments), common.epoch(1, **arguments), strict=True):  # type: ignore[arg-type]
            assert one.keys == other.keys
            assert one.images.equal(other.images)
            assert one.targets.equal(other.targets)


def test_splits_that_are_streamed_are_not_shared(prepared: Prepared, ray_here: None) -> None:
    config = override(Config(), {"data.cache": "stream"})
    shared = load_shared_data(config, read_manifest(str(prepared.store)), str(prepared.store))
    assert shared.fetch_splits(None) == {}


def test_a_copy_that_is_lost_is_read_again_by_who_needs_it(ray_here: None) -> None:
    class Owner:
        def put(self) -> list[ray.ObjectRef]:
            return [ray.put(np.zeros(1_000_000))]

    owner = ray.remote(num_cpus=0)(Owner).remote()
    (reference,) = ray.get(owner.put.remote())
    shared = SharedTrialData(Config().tune, 0.5, 64, None, {64: {"train": reference}})
    assert len(shared.fetch_splits(64)["train"]) == 1_000_000  # type: ignore[arg-type]
    ray.kill(owner)
    wait_until(lambda: shared.fetch_splits(64) == {}, "the lost split to be given back")


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
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    few = ("--tune.num-trials", "5", "--tune.epochs", "2")
    command = [sys.executable, "-m", "jobs.tune", *places(prepared, run), *SMALL, *few]
    done = subprocess.run(
        [*command, "--tune.algorithm", "random"],
        capture_output=True,
        text=True,
        env={**environ, "PYTHONPATH": str(tmp_path)},
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
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    trials: dict[str, dict[str, object]] = {}
    for name, strikes in (("whole", 0), ("cut", 2)):
        run = tmp_path / name
        command = [sys.executable, "-m", "jobs.tune", *places(prepared, run), *LONG]
        for strike in range(strikes):
            with (tmp_path / f"{name}-{strike}.log").open("wb") as log:
                job = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
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
        done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
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


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "trials"),
    [(2, 0, 1, 2), (2, 0, 2, 1), (16, 0, 2, 8), (64, 16, 2, 8), (64, 16, 1, 16), (7, 0, 3, 2)],
)
def test_as_many_trials_at_once_as_have_all_their_workers(
    cpus: int, gpus: int, workers: int, trials: int
) -> None:
    config = override(Config(), {"tune.workers_per_trial": workers, "tune.num_trials": 100})
    assert max_concurrent_trials(config, {"CPU": cpus, "GPU": gpus}) == trials


def test_a_cluster_too_small_for_one_trial_says_what_is_missing(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(Config(), {"tune.workers_per_trial": 4})
    with pytest.raises(ClusterError, match="needs 4 CPU, the cluster has 2 CPU"):
        max_concurrent_trials(config, {"CPU": 2})
    many = ["--tune.workers-per-trial", "16", "--train.batch-size", "64"]
    smallest = ["--train.micro-batch-size", "2"]
    run = tmp_path / "search"
    assert tune.main([*places(prepared, run), *QUICK, *many, *smallest]) == 1
    said = capsys.readouterr().err
    assert "16 workers need 16 CPU (it has 2)" in said
    assert not (run / "trials").exists()


def test_sizes_that_a_trial_could_not_train_at_are_refused_before(prepared: Prepared) -> None:
    manifest = read_manifest(str(prepared.store))
    space = {"data.image_size": ["choice", 64, 128]}
    config = Config.model_validate({"tune": {"space": space}, "train": {"batch_size": 16}})
    with pytest.raises(ConfigError, match=r"tune.space may draw .*128.*above the store's 64"):
        check_search(config, manifest)
    space = {"train.batch_size": ["integer", 16, 32]}
    config = Config.model_validate({"tune": {"space": space}})
    with pytest.raises(ConfigError, match=r"may draw .*17.*no multiple of train.micro_batch_size"):
        check_search(config, manifest)


def test_weights_that_a_trial_could_not_load_are_refused_before(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(str(prepared.store))
    nowhere = Config.model_validate({"model": {"weights": str(tmp_path / "nowhere.pt")}})
    with pytest.raises(ConfigError, match=r"model.weights: .*nowhere.pt' is no file"):
        check_search(nowhere, manifest)
    space = {"model.weights": ["choice", "random", str(tmp_path / "none.pt")]}
    with pytest.raises(ConfigError, match=r"may draw .*none.pt.*is no file"):
        check_search(Config.model_validate({"tune": {"space": space}}), manifest)

    monkeypatch.chdir(tmp_path)
    torch.save(build_model("resnet18").state_dict(), "mine.pt")
    relative = Config.model_validate({"model": {"weights": "mine.pt"}})
    assert with_absolute_weights(relative).model.weights == str(tmp_path / "mine.pt")
    check_search(with_absolute_weights(relative), manifest)


def test_a_trial_of_other_weights_than_asked_for_is_known(ray_here: None, tmp_path: Path) -> None:
    shared = SharedTrialData(Config().tune, 0.5, 64, ray.put({}))
    record: dict[str, float | None] = {OBJECTIVE: 0.6, ERROR: 0.1}

    def train(name: str, initialisation: Initialisation, history: int = 0) -> Any:
        url, told = trial_url(str(tmp_path), name), list[Any]()
        callbacks = TrialJudge(shared, url, World()).callbacks(Callbacks(), told.append)
        callbacks.on_start(Start(initialisation, (record,) * history, 0, 8))
        callbacks.on_epoch(SimpleNamespace(metrics=record))  # type: ignore[arg-type]
        if not history:
            write_begun(str(tmp_path), name, {}, 0)
        return told[-1].get("warning")

    fell_back = Initialisation("random", "no ImageNet here", fell_back=True)
    assert train("t001", fell_back) == "no ImageNet here"
    assert train("t001", Initialisation("random", "resuming"), history=1) is None
    assert train("t002", Initialisation("imagenet", "ImageNet")) is None
    found = read_trials(str(tmp_path))
    assert {name: trial.fell_back for name, trial in found.items()} == {"t001": True, "t002": False}


def test_an_objective_that_val_does_not_define_is_refused(prepared: Prepared) -> None:
    manifest = read_manifest(str(prepared.store))
    val = manifest.splits["val"].model_copy(update={"positives": 0})
    without = manifest.model_copy(update={"splits": {**manifest.splits, "val": val}})
    with pytest.raises(ConfigError, match="auroc is not defined on val, where 0 of"):
        check_search(Config(), without)


def test_a_trial_is_the_configuration_but_shorter() -> None:
    base = override(Config(), {"train.epochs": 35, "tune.epochs": 5, "tune.workers_per_trial": 2})
    config = trial_config(base, {"train.lr": 0.01}, seed=7)
    assert (config.train.epochs, config.train.lr, config.seed) == (5, 0.01, 7)
    assert config.cluster.num_workers == 2
    assert trial_config(override(base, {"train.patience": 2}), {}).train.patience is None
