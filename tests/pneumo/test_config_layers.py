"""A mistake is named with its key, its layer and what is allowed."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pneumo.config import Config
from pneumo.config_layers import (
    drop_removed,
    list_settings,
    override,
    read_recipe,
)
from pneumo.errors import ConfigError
from pneumo.training.checkpoints import find_weights

RECIPES = sorted(
    entry.name.removesuffix(".toml")
    for entry in (resources.files("jobs") / "recipes").iterdir()
    if entry.name.endswith(".toml")
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**31),
        ("prepare.image_size", 31),
        ("prepare.max_bad_fraction", 1.0),
        ("prepare.limit", 0),
        ("split.unit", "study"),
        ("split.val_fraction", 0.0),
        ("split.salt", -1),
        ("split.salt", 64),
        ("data.image_size", 1025),
        ("augment.rotation_degrees", float("nan")),
        ("augment.translation_fraction", 0.51),
        ("augment.scale_fraction", 0.9),
        ("model.backbone", "vgg16"),
        ("train.epochs", 0),
        ("train.batch_size", 1),
        ("train.lr", float("inf")),
        ("train.weight_decay", -1e-9),
        ("train.weight_decay", float("inf")),
        ("train.pos_weight", 0.0),
        ("train.pos_weight", "auto"),
        ("train.schedule", "linear"),
        ("train.precision", "float16"),
        ("evaluate.operating_point", "f1"),
        ("evaluate.sensitivity", 1.1),
        ("evaluate.bootstrap_resamples", 99),
        ("cluster.num_workers", 0),
        ("cluster.min_workers", 0),
        ("cluster.use_gpu", "maybe"),
        ("cluster.max_failures", -2),
        ("cluster.start_timeout_s", float("inf")),
        ("tracking.mode", "on"),
        ("tracking.project", "a/b"),
    ],
)
def test_a_bad_value_is_named_with_its_key_its_layer_and_what_is_allowed(
    key: str, value: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), {key: value}, layer="the test")
    pattern = rf"{re.escape(key)}: got {re.escape(repr(value))} from the test, expected \S+"
    assert re.match(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"split.val_fraction": 0.5, "split.test_fraction": 0.5},
            r"^split: val_fraction \+ test_fraction must be below 1$",
        ),
        (
            {"tune.space": {"train.lr": ["log_uniform", 1.0, 0.003]}},
            r"^tune\.space: train\.lr: the low 1 is above the high 0\.003",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Config(), values)


def test_a_literal_lists_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'resnet18', 'resnet34', .* or 'efficientnet_v2_s'"):
        override(Config(), {"model.backbone": "resnet"})


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: .*; unknown setting train\.epoch "):
        override(Config(), {"train.lr": 0, "train.epoch": 3})


def test_override_changes_what_is_named_and_nothing_else() -> None:
    config = Config(seed=4)
    changed = override(config, {"train.lr": 0.5, "train.pos_weight": 2})
    assert (changed.train.lr, changed.train.pos_weight) == (0.5, 2.0)
    rest = {"train": changed.train.model_copy(update={"lr": 1e-4, "pos_weight": "balanced"})}
    assert changed.model_copy(update=rest) == config
    assert config.train.lr == 1e-4


@pytest.mark.parametrize("key", ["train.lrr", "trian.lr", "nope", "train.lr.low"])
def test_override_refuses_an_unknown_key(key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(".".join(key.split(".")[:2])[:5])):
        override(Config(), {key: 1e-3})


@pytest.mark.parametrize("name", ["fats", "../__init__", "/absent/mine.toml"])
def test_an_absent_recipe_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe {name}: not found; .*{', '.join(RECIPES)}"):
        read_recipe(name)


OF_BEFORE: dict[str, Any] = {
    "data": {"image_size": 96, "readers": 2, "cache_dir": None, "cache_gb": 20.0},
    "train": {"lr": 1e-3, "momentum": 0.9, "precision": "native", "compile": "max-autotune"},
    "evaluate": {"gallery_images": 6, "grid_images": 16, "tta": 2},
    "seed": 3,
}
"""A part of the configuration that an earlier version saved."""


def test_a_saved_configuration_is_read_without_what_was_removed() -> None:
    config = Config.model_validate(drop_removed(OF_BEFORE))
    expected = {"data.image_size": 96, "train.lr": 1e-3, "train.compile": True, "evaluate.tta": 2}
    assert config == override(Config(seed=3), expected)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("data.readers", "which was removed: 4 threads of a worker read and decode"),
        ("evaluate.gallery_images", "which was removed: use evaluate.pictures"),
    ],
)
def test_a_removed_setting_is_refused_with_what_holds_now(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown setting {key} in the test, {hint}$"):
        override(Config(), {key: 8}, "the test")
    assert key not in list_settings(Config)


def test_weights_beside_the_driver_are_found_by_workers_in_other_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = override(Config(), {"model.weights": "weights.pt"})
    assert find_weights(beside).model.weights == str(tmp_path / "weights.pt")
    assert find_weights(Config()) == Config()
