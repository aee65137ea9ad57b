"""Which setting a search takes, and why; what it leaves behind."""

import io
import json
import tomllib
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w

from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.search_space import Scalar
from pneumo.tuning.choice import (
    Confirmation,
    SettingChoice,
    SimplicityKey,
    choose_confirmed,
    choose_setting,
    measure_simplicity,
    settings_to_confirm,
    summarise_seeds,
)
from pneumo.tuning.objective import ObjectiveEstimate
from pneumo.tuning.optuna_study import measure_importance
from pneumo.tuning.search import Search, make_recipe, to_parquet
from pneumo.tuning.trials import Trial, sort_trials
from tests.conftest import StoreMaker
from tests.searches import make_search, trial

TUNE = override(Config(), {"tune.epochs": 3}).tune


def estimate(error: float, studies: int = 400, seed: int = 0) -> ObjectiveEstimate:
    """With this standard error, and none in common with an estimate of another seed."""
    influence = np.random.default_rng(seed).normal(size=studies)
    influence -= influence.mean()
    patient = np.arange(studies).astype(str)
    raw = ObjectiveEstimate(0.0, influence, patient)
    return ObjectiveEstimate(0.0, influence * error / raw.standard_error, patient)


def order_by_name(order: str) -> object:
    return lambda one: SimplicityKey(order.index(one.name), 0, 0.0)


def test_the_best_is_taken_where_nobody_comes_near() -> None:
    trials = [trial("a", 0.90), trial("b", 0.80)]
    estimates = {"a": estimate(0.01), "b": estimate(0.01, seed=1)}
    choice = choose_setting(trials, estimates, TUNE, order_by_name("ba"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.trial.name == "a"
    assert choice.ties == ("a",)


def test_of_equals_the_simplest_is_taken() -> None:
    trials = [
        trial(name, value, settings={"train.lr": value})
        for name, value in (("a", 0.90), ("b", 0.895), ("c", 0.80))
    ]
    estimates = {name: estimate(0.01, seed=i) for i, name in enumerate("abc")}
    choice = choose_setting(trials, estimates, TUNE, order_by_name("cba"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.trial.name == "b"
    assert choice.best.name == "a"
    assert choice.ties == ("a", "b")
    assert "trial a" in choice.reason


def test_trials_that_err_on_the_same_studies_are_told_apart() -> None:
    """In pairs: the errors are equal, so a difference below either of them is certain."""
    trials = [trial("a", 0.900), trial("b", 0.895)]
    same = estimate(0.01)
    choice = choose_setting(trials, {"a": same, "b": same}, TUNE, order_by_name("ba"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.trial.name == "a"


def test_a_trial_that_was_stopped_cannot_win() -> None:
    trials = [trial("a", 0.95, state="stopped"), trial("b", 0.80)]
    choice = choose_setting(trials, {}, TUNE, order_by_name("ab"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.trial.name == "b"
    assert choose_setting(trials[:1], {}, TUNE, order_by_name("ab")) is None  # type: ignore[arg-type]


def test_the_luckiest_epoch_is_not_what_counts() -> None:
    lucky, steady = trial("lucky", 0.80, 0.95, 0.80), trial("steady", 0.85, 0.86, 0.87)
    smoothed = Config().tune
    assert sort_trials([lucky, steady], TUNE)[0] is steady
    assert lucky.objective(smoothed) == pytest.approx(0.875)
    assert lucky.objective(smoothed, epochs=1) == 0.80


@pytest.mark.parametrize("value", [0.004, 0.5, 0.9, 0.98, 0.9999])
def test_an_interval_stays_where_the_objective_can_be(value: float) -> None:
    interval = trial("a", value).interval(TUNE)
    assert interval is not None
    assert 0 <= interval[0] < value < interval[1] <= 1
    if value == 0.5:
        assert interval == pytest.approx((0.5 - 0.0392, 0.5 + 0.0392), abs=1e-4)
    log_loss = override(Config(), {"tune.epochs": 3, "tune.objective": "log_loss"}).tune
    assert trial("a", -0.5).interval(log_loss) == pytest.approx((-0.5392, -0.4608), abs=1e-4)
    assert trial("a", 1.0).interval(TUNE) is None


def test_ranking_puts_the_finished_first_and_failures_last() -> None:
    trials = [
        trial("failed", state="failed"),
        trial("early", 0.99, state="stopped"),
        trial("diverged", state="diverged"),
        trial("late", 0.5, 0.6, state="stopped"),
        trial("done", 0.4),
    ]
    assert [one.name for one in sort_trials(trials, TUNE)] == [
        "done",
        "late",
        "early",
        "diverged",
        "failed",
    ]


def confirmed(*found: Confirmation, order: str = "abc") -> SettingChoice:
    trials = [trial("a", 0.95), trial("b", 0.94), trial("c", 0.93)]
    before = SettingChoice(trials[0], trials[0], ("a",), "the best")
    return choose_confirmed(before, trials, found, order_by_name(order))  # type: ignore[arg-type]


def test_new_seeds_overrule_the_search() -> None:
    choice = confirmed(Confirmation("a", (0.80, 0.81, 0.80)), Confirmation("b", (0.90, 0.91, 0.92)))
    assert choice.trial.name == "b"
    assert choice.best.name == "a"
    assert "3 new seeds" in choice.reason


def test_means_that_seeds_do_not_tell_apart_are_equal() -> None:
    near = (Confirmation("a", (0.90, 0.80, 0.95)), Confirmation("b", (0.89, 0.79, 0.94)))
    assert confirmed(*near, order="bac").trial.name == "b"
    one_seed = (Confirmation("a", (0.90,)), Confirmation("b", (0.89,)))
    assert confirmed(*one_seed, order="bac").trial.name == "a"  # no spread to say they are equal


def test_an_unstable_setting_does_not_win_by_its_best_seed() -> None:
    settings = [trial("a", 0.95), trial("b", 0.94)]
    steady = [trial(f"b-seed{seed}", 0.83 + seed / 100) for seed in (1, 2, 3)]
    lucky = trial("a-seed1", 0.86)
    for state in ("diverged", "failed"):
        lost = [trial(f"a-seed{seed}", state=state) for seed in (2, 3)]
        found = summarise_seeds(settings, [lucky, *lost, *steady], TUNE, worst=0.5)
        assert found[0].objectives == ((0.86, 0.5, 0.5) if state == "diverged" else (0.86,))
        choice = confirmed(*found)
        assert choice.trial.name == "b"
        assert choice.ties == ("b",)
        assert choice.confirmations == tuple(found)


def test_a_confirmation_tells_mean_and_spread() -> None:
    one = Confirmation("a", (0.8, 0.9))
    assert one.mean == pytest.approx(0.85)
    assert one.spread == pytest.approx(0.0707, abs=1e-4)
    assert Confirmation("a", (0.8,)).spread is None


def test_what_is_confirmed_had_all_its_epochs() -> None:
    trials = [
        trial("a", 0.9, state="stopped"),
        *(trial(n, 0.5 + i / 9, settings={"train.lr": i + 1.0}) for i, n in enumerate("bcde")),
    ]
    assert [one.name for one in settings_to_confirm(trials, TUNE)] == ["e", "d", "c"]


def test_a_setting_that_was_drawn_twice_counts_once() -> None:
    """Its trials have one seed, so that they are one training."""
    rates = [1e-3, 1e-3, 1e-3, 2e-3, 3e-3, 4e-3]
    trials = [
        trial(name, 0.9 - i / 1000, settings={"train.lr": lr})
        for i, (name, lr) in enumerate(zip("abcdef", rates, strict=True))
    ]
    assert [one.name for one in settings_to_confirm(trials, TUNE)] == ["a", "d", "e"]
    estimates = {one.name: estimate(0.01, seed=i) for i, one in enumerate(trials)}
    choice = choose_setting(trials, estimates, TUNE, order_by_name("fedcba"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.reason.startswith("the simplest of the 4 that")
    alike = [trial(name, 0.9) for name in "ab"]
    choice = choose_setting(alike, {n: estimate(0.01) for n in "ab"}, TUNE, order_by_name("ab"))  # type: ignore[arg-type]
    assert choice is not None
    assert choice.reason.startswith("the best, and no other")


def test_fewer_parameters_are_simpler_then_fewer_changes_then_less_distortion(
    tiny_store: StoreMaker,
) -> None:
    manifest = read_manifest(tiny_store(image_size=64))

    def measure(**settings: Scalar) -> SimplicityKey:
        drawn = {name.replace("__", "."): value for name, value in settings.items()}
        return measure_simplicity(Config(), manifest, trial("a", 0.5, settings=drawn))

    small, large = measure(model__backbone="resnet18"), measure(model__backbone="resnet50")
    assert small < large
    assert 11_100_000 < small.parameters < 11_200_000
    assert measure(train__ema_decay="none") == measure(train__ema_decay=None)
    assert measure(train__ema_decay=None) < measure(train__ema_decay=0.99)
    assert measure(train__pos_weight=1.5) < measure(train__pos_weight=0.2)


def test_a_recipe_holds_the_differences_from_the_defaults_only() -> None:
    base = override(Config(), {"train.epochs": 3, "data.image_size": 96})
    recipe = make_recipe(base, {"train.lr": 0.01, "train.pos_weight": 2.0})
    assert recipe == {
        "data": {"image_size": 96},
        "train": {"epochs": 3, "lr": 0.01, "pos_weight": 2.0},
    }
    assert tomllib.loads(tomli_w.dumps(recipe)) == recipe


def test_importance_names_what_matters() -> None:
    search = make_search()
    assert list(search.importance) == ["train.lr", "train.pos_weight"]
    assert search.importance["train.lr"] > 0.8
    assert sum(search.importance.values()) == pytest.approx(1)
    few = measure_importance(search.trials[:5], search.config.tune, 0)
    assert few == {}


def test_the_table_of_trials_can_be_read_back() -> None:
    search = make_search()
    table = pq.read_table(io.BytesIO(to_parquet(search)))
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == [one.name for one in search.trials]
    assert [row["name"] for row in rows if row["chosen"]] == [search.choice.trial.name]
    assert rows[0]["low"] < rows[0]["objective"] < rows[0]["high"]
    assert rows[-1]["state"] == "diverged"
    assert rows[-1]["error"] == "the loss is nan"
    assert rows[-1]["objective"] is None
    assert {"train.lr", "train.pos_weight"} <= set(rows[0])
    choice = json.loads(table.schema.metadata[b"pneumo.choice"])
    assert choice["trial"] == search.choice.trial.name


def test_a_column_of_numbers_and_words_becomes_text() -> None:
    search = make_search(8)
    mixed = [
        Trial(t.name, {"train.pos_weight": w}, 0, t.state, t.history)
        for t, w in zip(search.trials, ["balanced", 1, 2.5, None, 1, 1, 1, 1], strict=True)
    ]
    changed = Search("a", search.config, "0", tuple(mixed), search.choice)
    column = pq.read_table(io.BytesIO(to_parquet(changed)))["train.pos_weight"].to_pylist()
    assert set(column) == {"balanced", "1", "2.5", None}


def test_the_table_has_files_by_their_names_alone() -> None:
    search = make_search(8)
    mine = replace(search.trials[0], settings={"model.weights": "/home/anna/a.pt"})
    table = pq.read_table(io.BytesIO(to_parquet(replace(search, trials=(mine,)))))
    assert table["model.weights"].to_pylist() == ["a.pt"]
