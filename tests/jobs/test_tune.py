from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import tune
from jobs.tune import Trial, make_recipe, search_space, trial_config, trials_at_once
from pneumo.config import Config, override, parse_command_line
from pneumo.errors import ClusterError
from tests.jobs.conftest import SMALL, Prepared


def test_a_search_ends_with_a_table_and_a_recipe_that_train_takes(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "search"
    flags = ["--store", str(prepared.store), "--run", str(run), *SMALL]
    assert tune.main([*flags, "--tune.num-trials", "3", "--tune.epochs", "1"]) == 0
    table = pq.read_table(run / "trials.parquet").to_pylist()
    assert len(table) == 3
    scores = [row["val_auroc"] for row in table]
    assert scores == sorted(scores, reverse=True)
    assert all(1e-5 <= row["lr"] <= 3e-3 and 0.5 <= row["pos_weight"] <= 10 for row in table)
    assert len({row["lr"] for row in table}) == 3
    recipe = run / "best.toml"
    invocation = parse_command_line("train", ["--store", "x", "--recipe", str(recipe)], {})
    assert invocation.config.train.lr == table[0]["lr"]
    assert invocation.config.train.pos_weight == table[0]["pos_weight"]
    assert invocation.config.train.epochs == Config().train.epochs  # a trial's are fewer
    assert table[0]["name"] in capsys.readouterr().out
    assert not list(run.rglob("*.pt"))
    assert tune.main(flags) == 2
    assert "holds a finished search" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_of_two_workers_take_turns_on_two_cpus(prepared: Prepared, tmp_path: Path) -> None:
    code = tune.main(
        [
            *("--store", str(prepared.store), "--run", str(tmp_path / "search"), *SMALL),
            *("--tune.num-trials", "2", "--tune.epochs", "1", "--tune.workers-per-trial", "2"),
        ]
    )
    assert code == 0
    table = pq.read_table(tmp_path / "search" / "trials.parquet").to_pylist()
    assert [row["error"] for row in table] == [None, None]


def test_one_bad_setting_does_not_end_the_search(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tune.main(
        [
            *("--store", str(prepared.store), "--run", str(tmp_path / "search"), *SMALL),
            *("--tune.num-trials", "2", "--tune.epochs", "1"),
            *("--tune.lr-low", "1e30", "--tune.lr-high", "1e30"),
        ]
    )
    assert code == 1  # every trial diverged: that is the answer
    assert "lower train.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "trials"),
    [(2, 0, 1, 2), (2, 0, 2, 1), (16, 0, 2, 8), (64, 16, 2, 8), (64, 16, 1, 16), (7, 0, 3, 2)],
)
def test_as_many_trials_at_once_as_have_all_their_workers(
    cpus: int, gpus: int, workers: int, trials: int
) -> None:
    config = override(Config(), {"tune.workers_per_trial": workers, "tune.num_trials": 100})
    assert trials_at_once(config, {"CPU": cpus, "GPU": gpus}) == trials


def test_a_cluster_too_small_for_one_trial_says_what_is_missing() -> None:
    config = override(Config(), {"tune.workers_per_trial": 4})
    with pytest.raises(ClusterError, match="needs 4 CPU, the cluster has 2 CPU"):
        trials_at_once(config, {"CPU": 2})


def test_equal_bounds_fix_a_setting() -> None:
    config = override(Config(), {"tune.lr_low": 1e-3, "tune.lr_high": 1e-3})
    assert search_space(config)["train.lr"] == 1e-3
    assert not isinstance(search_space(config)["train.pos_weight"], float)


def test_a_recipe_holds_the_differences_from_the_defaults_only() -> None:
    base = override(Config(), {"train.epochs": 3, "data.image_size": 96})
    best = Trial("a", lr=0.01, pos_weight=2.0, val_auroc=0.9, epochs=1, seconds=1.0, error=None)
    assert make_recipe(base, best) == {
        "data": {"image_size": 96},
        "train": {"epochs": 3, "lr": 0.01, "pos_weight": 2.0},
    }
    assert trial_config(base, {"train.lr": 0.01}).train.epochs == Config().tune.epochs
