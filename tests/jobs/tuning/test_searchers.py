"""What is trained next and what is stopped, without a cluster: Tune's calls made by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from jobs.tuning.searchers import (
    FixedListSearcher,
    OptunaSearcher,
    PlannedTrial,
    ResumableAsha,
    RoomLimiter,
    list_grid,
)
from jobs.tuning.trial_judge import METRIC
from jobs.tuning.trial_records import read_trials, write_ended
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.tuning.trials import Trial
from tests.searches import trial


def config_of(**changes: object) -> Config:
    small = {"num_trials": 12, "epochs": 9}
    return override(Config(), {f"tune.{name}": v for name, v in {**small, **changes}.items()})


def draw(searcher: FixedListSearcher, number: int) -> list[dict[str, object]]:
    return [searcher.suggest(f"tune-{i}") for i in range(number)]


def finish(searcher: FixedListSearcher, trial_id: str, value: float, epoch: int = 9) -> None:
    searcher.on_trial_complete(trial_id, {METRIC: value, "epoch": epoch})


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_draws_follow_from_the_seed(tmp_path: Path, algorithm: str) -> None:
    runs = []
    for name in ("one", "two"):
        searcher = OptunaSearcher(
            config_of(algorithm=algorithm), {}, str(tmp_path / name), worst=0.5
        )
        runs.append(draw(searcher, 4))
    assert runs[0] == runs[1]
    assert [one["name"] for one in runs[0]] == ["t001", "t002", "t003", "t004"]
    assert len({str(one["settings"]) for one in runs[0]}) == 4
    other = OptunaSearcher(
        override(config_of(), {"seed": 1}), {}, str(tmp_path / "three"), worst=0.5
    )
    assert draw(other, 1)[0]["settings"] != runs[0][0]["settings"]


def test_every_draw_is_written_down_before_it_starts(tmp_path: Path) -> None:
    drawn = draw(OptunaSearcher(config_of(), {}, str(tmp_path), worst=0.5), 3)
    records = read_trials(str(tmp_path))
    assert [records[str(one["name"])].settings for one in drawn] == [d["settings"] for d in drawn]
    assert {record.state for record in records.values()} == {"unfinished"}


def test_a_search_that_goes_on_draws_nothing_twice(tmp_path: Path) -> None:
    config = config_of(algorithm="random")
    whole = draw(OptunaSearcher(config, {}, str(tmp_path / "whole"), worst=0.5), 6)
    first = OptunaSearcher(config, {}, str(tmp_path / "cut"), worst=0.5)
    begun = draw(first, 4)
    write_ended(str(tmp_path / "cut"), "t001", "diverged", "nan")
    write_ended(str(tmp_path / "cut"), "t002", "failed", "the node is gone")
    before = read_trials(str(tmp_path / "cut"))
    again = draw(OptunaSearcher(config, before, str(tmp_path / "cut"), worst=0.5), 5)
    # What was under way or failed comes first, under its name; then new draws, none seen before.
    assert again[:3] == begun[1:]
    assert [one["name"] for one in again[3:]] == ["t005", "t006"]
    settings = [str(one["settings"]) for one in (*begun, *again[3:])]
    assert len(set(settings)) == 6
    assert whole[:4] == begun


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
@pytest.mark.parametrize("concurrent", [1, 4])
def test_a_small_space_is_searched_without_a_repetition_and_ends(
    tmp_path: Path, algorithm: str, concurrent: int
) -> None:
    """Every trial has the same seed, so that a setting trained again would tell nothing."""
    space = {"train.lr": ["choice", 1e-4, 3e-4, 1e-3], "train.pos_weight": ["choice", 1, 2, 4]}
    config = config_of(algorithm=algorithm, num_trials=16, space=space)
    searcher = OptunaSearcher(config, {}, str(tmp_path), worst=0.5)
    seen: list[dict[str, float]] = []
    ended = 0
    while (drawn := searcher.suggest(f"tune-{len(seen)}")) != Searcher.FINISHED:
        seen.append(drawn["settings"])
        if len(seen) - ended == concurrent:  # stopped early, every third
            value = seen[ended]["train.lr"] - seen[ended]["train.pos_weight"]
            finish(searcher, f"tune-{ended}", value, epoch=9 if ended % 3 else 1)
            ended += 1
    assert len(seen) == len({str(one) for one in seen}) == 9
    before = {
        f"t{i:03}": trial(f"t{i:03}", *[0.5] * 9, settings=one) for i, one in enumerate(seen, 1)
    }
    again = OptunaSearcher(config, before, str(tmp_path), worst=0.5)
    assert again.suggest("tune-1") == Searcher.FINISHED


def test_tpe_learns_from_what_an_earlier_try_found(tmp_path: Path) -> None:
    config = config_of(num_trials=40)
    before = {
        f"t{i:03}": trial(
            f"t{i:03}",
            *[0.5] * 8,
            0.9 if lr > 1e-4 else 0.5,
            settings={"train.lr": lr, "train.pos_weight": 1.0 + i / 99},
        )
        for i, lr in enumerate([1e-5, 2e-5, 5e-5, 3e-4, 4e-4, 5e-4, 3e-5, 6e-4, 1.5e-5, 7e-4] * 2)
    }
    drawn = draw(OptunaSearcher(config, before, str(tmp_path), worst=0.5), 12)
    rates = [one["settings"]["train.lr"] for one in drawn]  # type: ignore[index]
    assert sum(rate > 1e-4 for rate in rates) >= 9


def test_as_many_trials_run_as_the_cluster_has_room_for_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = [1]
    planned = [PlannedTrial(name, {}, 0) for name in "abcd"]
    limiter = RoomLimiter(FixedListSearcher(planned, str(tmp_path)), lambda: room[0])
    assert limiter.suggest("a")["name"] == "a"
    assert limiter.suggest("b") is None
    room[0] = 3  # nodes have joined
    assert [limiter.suggest(name)["name"] for name in "bc"] == ["b", "c"]
    assert limiter.suggest("d") is None
    assert capsys.readouterr().err == "tune: there is room for 3 trials at a time\n"
    room[0] = 0  # all nodes are lost, and one trial waits for another
    for name in "abc":
        assert limiter.suggest("d") is None
        limiter.on_trial_complete(name, {METRIC: 0.5, "epoch": 9})
    assert limiter.suggest("d")["name"] == "d"


def test_a_list_ends(tmp_path: Path) -> None:
    searcher = FixedListSearcher([PlannedTrial("a", {"train.lr": 1.0}, 3)], str(tmp_path))
    assert searcher.suggest("1") == {"name": "a", "settings": {"train.lr": 1.0}, "seed": 3}
    assert searcher.suggest("2") == Searcher.FINISHED


def test_a_grid_is_complete_and_mixed() -> None:
    space = {
        "train.lr": ["log_uniform", 1e-4, 1e-2, 3],
        "train.optimizer": ["choice", "adam", "sgd"],
    }
    config = Config.model_validate({"tune": {"algorithm": "grid", "space": space}})
    draws = list_grid(config)
    assert len(draws) == config.tune.trials == 6
    assert len({tuple(one.settings.items()) for one in draws}) == 6
    assert draws == list_grid(config)
    assert [one.settings["train.lr"] for one in draws] != sorted(
        one.settings["train.lr"]
        for one in draws  # type: ignore[type-var]
    )


def result(rungs: ResumableAsha, name: str, epoch: int, value: float) -> str:
    tune_trial = SimpleNamespace(trial_id=f"tune-{name}", config={"name": name})
    if tune_trial.trial_id not in rungs._trial_info:
        rungs.on_trial_add(None, tune_trial)
    decision: str = rungs.on_trial_result(None, tune_trial, {"epoch": epoch, METRIC: value})
    return decision


def test_rungs_stop_whoever_is_behind_those_that_came_before() -> None:
    rungs = ResumableAsha(config_of().tune, {})
    assert result(rungs, "a", 1, 0.8) == TrialScheduler.CONTINUE
    assert result(rungs, "b", 1, 0.9) == TrialScheduler.CONTINUE
    assert result(rungs, "c", 1, 0.7) == TrialScheduler.STOP
    assert result(rungs, "b", 2, 0.1) == TrialScheduler.CONTINUE  # no rung there
    assert result(rungs, "b", 9, 0.9) == TrialScheduler.STOP  # it has all its epochs


def ended(name: str, *values: float) -> Trial:
    return trial(name, *values, state="finished" if len(values) == 9 else "stopped")


def test_rungs_remember_an_earlier_try() -> None:
    before = {
        "a": ended("a", *[0.8] * 9),
        "b": ended("b", 0.9, 0.9),
        "c": trial("c", 0.85, 0.95, state="unfinished"),
    }
    fresh, going_on = ResumableAsha(config_of().tune, {}), ResumableAsha(config_of().tune, before)
    assert result(fresh, "d", 1, 0.5) == TrialScheduler.CONTINUE  # nobody to compare with
    assert result(going_on, "d", 1, 0.5) == TrialScheduler.STOP
    assert result(going_on, "e", 1, 0.95) == TrialScheduler.CONTINUE
    # c passed its first rung before; the next one counts.
    assert result(going_on, "c", 3, 0.1) == TrialScheduler.STOP
