"""A search space: how it is written, what is refused, and what stands for all of it."""

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.config_layers import check_space, override
from pneumo.errors import ConfigError
from pneumo.search_space import Domain, flatten, grid_points, sample


def domain(*written: object) -> Domain:
    return Domain.model_validate(list(written))


def test_toml_tables_and_quoted_keys_are_the_same_space() -> None:
    tables = tomllib.loads('train.lr = ["uniform", 1, 2]\n[model]\nbackbone = "resnet34"\n')
    quoted = tomllib.loads('"train.lr" = ["uniform", 1, 2]\n"model.backbone" = "resnet34"\n')
    assert flatten(tables) == flatten(quoted)
    assert set(flatten(tables)) == {"train.lr", "model.backbone"}


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (["gauss", 0, 1], 'give \\["log_uniform", low, high\\]'),
        ([], "give"),
        ({"low": 1}, "give"),
        (["uniform", 1], 'give \\["uniform", low, high\\]'),
        (["uniform", 3, 1], "the low 3 is above the high 1"),
        (["log_uniform", 0, 1], "needs a low above 0"),
        (["log_uniform", -1, 1], "needs a low above 0"),
        (["uniform", "a", "b"], "between numbers, got 'a'"),
        (["uniform", 0, math.inf], "between numbers, got inf"),
        (["uniform", True, 2], "between numbers, got True"),
        (["integer", 1, 2.5], "between whole numbers, got 2.5"),
        (["choice"], "without a value to choose"),
        (["choice", 1, 2, 1], "given twice"),
        (["fixed", 1, 2], "takes one value"),
        (["uniform", 0, 1, 1], "at least 2 points"),
        (["choice", [1], [2]], "must be plain"),
    ],
)
def test_what_is_no_domain_is_refused(written: object, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Domain.model_validate(written)


@pytest.mark.parametrize(
    "written",
    [
        ["log_uniform", 1e-5, 3e-3],
        ["log_uniform", 1e-5, 3e-3, 5],
        ["uniform", 0, 1.5],
        ["integer", 2, 5],
        ["choice", "adam", "sgd"],
        ["choice", None, 3, True],
        ["fixed", "resnet18"],
    ],
)
def test_a_domain_is_written_as_it_was_read(written: list[object]) -> None:
    dumped: object = Domain.model_validate(written).model_dump(mode="json")
    assert dumped == written


def test_a_value_alone_is_fixed() -> None:
    assert Domain.model_validate("resnet34") == domain("fixed", "resnet34")
    assert not domain("fixed", 1).varies
    assert not domain("uniform", 2, 2).varies
    assert not domain("choice", 2).varies


def test_a_grid_takes_both_ends() -> None:
    assert domain("log_uniform", 1e-4, 1e-2, 3).grid() == pytest.approx((1e-4, 1e-3, 1e-2))
    assert domain("uniform", 0, 1, 5).grid() == (0, 0.25, 0.5, 0.75, 1)
    assert domain("integer", 2, 5).grid() == (2, 3, 4, 5)
    assert domain("integer", 0, 100, 3).grid() == (0, 50, 100)
    assert domain("choice", "a", "b").grid() == ("a", "b")
    with pytest.raises(ValueError, match=r'number of points: \["uniform", 0, 1, 5\]'):
        domain("uniform", 0, 1).grid()
    with pytest.raises(ValueError, match=r"^b: a grid needs"):
        grid_points({"a": domain("choice", 1, 2), "b": domain("uniform", 0, 1)})
    assert grid_points({"a": domain("choice", 1, 2), "b": domain("uniform", 0, 1, 3)}) == 6


@given(
    low=st.floats(1e-6, 1e3),
    factor=st.floats(1.01, 1e3),
    points=st.integers(2, 9),
    kind=st.sampled_from(["uniform", "log_uniform"]),
)
def test_a_grid_is_sorted_and_inside(low: float, factor: float, points: int, kind: str) -> None:
    values: tuple[Any, ...] = domain(kind, low, low * factor, points).grid()
    assert len(values) == points
    assert list(values) == sorted(values)
    assert values[0] == low
    assert values[-1] == low * factor


def test_samples_hold_every_end_and_an_odd_one() -> None:
    space = {"a": domain("uniform", 1, 2), "b": domain("choice", "x", "y"), "c": domain("fixed", 3)}
    settings = sample(space)
    assert {s["a"] for s in settings} >= {1.0, 2.0}
    assert any(s["a"] not in (1.0, 2.0) for s in settings)
    assert {s["b"] for s in settings} == {"x", "y"}
    assert len(settings) == 3 * 2


def test_a_large_space_is_sampled_key_by_key() -> None:
    space = {f"k{i}": domain("uniform", 0, 1) for i in range(12)}
    settings = sample(space, limit=100)
    for key in space:
        assert {0.0, 1.0} <= {setting[key] for setting in settings}


def tune(space: str, *more: str) -> Config:
    flags = ["--store", "x", "--tune.space", space, *more]
    return parse_command_line("tune", flags, {}).config


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        ('{"train.lrr": ["uniform", 1, 2]}', r"unknown setting train.lrr, did you mean train.lr\?"),
        ('{"train.lr": ["uniform", -1, 1]}', "train.lr: got -1.0 from tune.space"),
        ('{"train.optimizer": ["choice", "adam", "lion"]}', "got 'lion' from tune.space"),
        ('{"train.batch_size": ["uniform", 32, 64]}', "train.batch_size: got 54.6.*fractional"),
        ('{"seed": ["integer", 0, 5]}', "the luckiest seed would be chosen"),
        ('{"train.epochs": ["integer", 1, 5]}', "a trial is trained for tune.epochs"),
        (
            '{"train.patience": ["integer", 2, 5]}',
            "trials are stopped early by tune.early_stopping",
        ),
        (
            '{"model.weights": ["choice", "random", "a.pt"]}',
            "'a.pt' must be an absolute path or a URL",
        ),
        ('{"cluster.num_workers": ["integer", 1, 5]}', "no effect on the trained model"),
        ('{"tune.epochs": ["integer", 1, 5]}', "no effect on the trained model"),
        ('{"train.lr": 1e-3}', "nothing that varies"),
        ('{"train.lr": ["uniform", 2, 1]}', "tune.space: train.lr: the low 2 is above the high 1"),
        ('{"train.lr": ["uniform", 1, 2, 3]}', "points 3 have an effect on a grid only"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(space: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        tune(space)
    assert "\n" not in str(caught.value)


def test_any_key_that_makes_a_model_can_be_searched() -> None:
    space = (
        '{"train": {"lr": ["log_uniform", 1e-4, 1e-2], "pos_weight": ["choice", "balanced", 3],'
        ' "clip_norm": ["choice", null, 3]}, "augment.rotation_degrees": ["uniform", 0, 15],'
        ' "model.backbone": "resnet34", "data.image_size": ["choice", 64, 96]}'
    )
    config = tune(space)
    for settings in check_space(config):
        override(config, settings)
    assert config.tune.space["model.backbone"].values == ("resnet34",)
    assert Config.model_validate_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--tune.specificity", "0.8"], "specificity 0.8 has no effect on objective auroc"),
        (["--tune.algorithm", "grid"], "train.lr: a grid needs the number of points"),
    ],
)
def test_settings_of_a_search_without_effect_are_refused(more: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tune('{"train.lr": ["log_uniform", 1e-4, 1e-2]}', *more)


@pytest.mark.parametrize(
    ("epochs", "rungs"),
    [(1, ()), (2, (1,)), (3, (1,)), (4, (1, 3)), (9, (1, 3)), (28, (1, 3, 9, 27))],
)
def test_rungs(epochs: int, rungs: tuple[int, ...]) -> None:
    assert override(Config(), {"tune.epochs": epochs}).tune.rungs == rungs
    changes = {"tune.epochs": epochs, "tune.early_stopping": "none"}
    assert override(Config(), changes).tune.rungs == ()
