"""What a search refuses before its first trial, and the settings of a trial."""

from pathlib import Path

import pytest
import torch

from jobs.tuning.job import check_search
from jobs.tuning.trial_records import (
    trial_config,
)
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import ConfigError
from pneumo.network.backbones import build_model
from pneumo.training.checkpoints import find_weights
from tests.jobs.conftest import Prepared


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
    assert find_weights(relative).model.weights == str(tmp_path / "mine.pt")
    check_search(find_weights(relative), manifest)


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
