"""What trials share, how many run at a time, and what a trial reports."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from jobs import tune
from jobs.tuning.trial_judge import SharedTrialData, TrialJudge
from jobs.tuning.trial_records import (
    read_estimate,
    read_trials,
    trial_url,
    write_begun,
)
from jobs.tuning.trial_runs import choose_shared_sizes, load_shared_data, max_concurrent_trials
from pneumo.config import Config, DataConfig
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import open_loaders
from pneumo.loading.sample_order import World
from pneumo.network.backbones import Initialisation
from pneumo.network.scoring import Scores
from pneumo.training.callbacks import Callbacks, Start
from pneumo.tuning.trials import ERROR, OBJECTIVE
from tests.conftest import StoreMaker
from tests.jobs.conftest import Prepared
from tests.jobs.test_tune import places
from tests.waiting import wait_until


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


def test_the_sizes_of_all_trials_fit_into_the_memory_together(
    tiny_store: StoreMaker,
) -> None:
    manifest = read_manifest(tiny_store(image_size=64))
    samples = sum(manifest.splits[name].samples for name in ("train", "val"))
    largest = manifest.image_size
    sizes = [largest, 32, 48]
    config = Config.model_validate({"tune": {"space": {"data.image_size": ["choice", *sizes]}}})
    bytes_of = {size: samples * size**2 for size in sizes}
    assert choose_shared_sizes(config, manifest, sum(bytes_of.values())) == sorted(sizes)
    assert choose_shared_sizes(config, manifest, bytes_of[32] + bytes_of[48]) == [32, 48]
    assert choose_shared_sizes(Config(), manifest, bytes_of[largest]) == [largest]
    assert choose_shared_sizes(Config(), manifest, bytes_of[largest] - 1) == []
    drawn = Config.model_validate({"tune": {"space": {"data.image_size": ["integer", 32, 48]}}})
    assert choose_shared_sizes(drawn, manifest, 1e12) == []


def test_splits_that_are_streamed_are_not_shared(prepared: Prepared, ray_here: None) -> None:
    config = override(Config(), {"data.cache": "stream"})
    shared = load_shared_data(config, read_manifest(str(prepared.store)), str(prepared.store))
    assert shared.fetch_splits(None) == {}


def test_trials_that_share_no_copy_share_the_memory(
    prepared: Prepared, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"data.image_size": ["integer", 32, 64]}
    config = Config.model_validate({"tune": {"space": space, "num_trials": 2}})
    store = PreparedStore(str(prepared.store), read_manifest(str(prepared.store)), config.data)
    shared = load_shared_data(config, store.manifest, str(prepared.store))
    assert "tune: trials share no copy of the store" in capsys.readouterr().err
    assert (shared.workers_per_node, shared.trainings_beside(1)) == (2, 2)
    assert [replace(shared, workers_per_node=4).trainings_beside(n) for n in (1, 3, 4)] == [4, 2, 1]

    def free_gb(trainings_here: int) -> float:
        told = list[str]()
        options: dict[str, Any] = {"world": World(), "device": "cpu", "tell": told.append}
        open_loaders(store, ("train",), trainings_here=trainings_here, **options)
        return float(re.findall(r"([\d.]+) GB free for this worker", told[0])[0])

    assert free_gb(1) > 3 * free_gb(10)


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


def make_nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    """A cluster of nodes with these resources, as Ray tells of it."""
    total = {name: sum(each.get(name, 0) for each in resources) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": r} for r in resources])
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "trials"),
    [(2, 0, 1, 2), (2, 0, 2, 1), (16, 0, 2, 8), (64, 16, 2, 8), (64, 16, 1, 16), (7, 0, 3, 2)],
)
def test_as_many_trials_at_once_as_have_all_their_workers(
    cpus: int, gpus: int, workers: int, trials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(Config(), {"tune.workers_per_trial": workers, "tune.num_trials": 100})
    make_nodes(monkeypatch, {"CPU": cpus, "GPU": gpus})
    assert max_concurrent_trials(config) == trials
    make_nodes(monkeypatch, {"CPU": cpus, "GPU": gpus}, {"CPU": 0.9}, {"CPU": 0.9})
    assert max_concurrent_trials(config) == trials


def test_a_cluster_too_small_for_one_trial_says_what_is_missing(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--tune.workers-per-trial", "16", "--train.micro-batch-size", "2"]
    large = ["--cluster.cpus-per-worker", "64000"]
    others = ["--model.weights", "random", "--tracking.mode", "disabled"]
    run = tmp_path / "search"
    assert tune.main([*places(prepared, run), *many, *large, *others]) == 1
    has = f"it has {ray.cluster_resources()['CPU']:g}"
    said = capsys.readouterr().err
    assert f"16 workers need 1.024e+06 CPU ({has}), and its nodes have room for 0; lower" in said
    assert not (run / "trials").exists()


def test_the_scores_are_kept_before_the_last_epoch_is_recorded(
    ray_here: None, tmp_path: Path
) -> None:
    """A trial that is killed in between has all its epochs, and is compared by its scores."""
    config = override(Config(), {"tune.epochs": 2}).tune
    keys = np.array([f"key{i}" for i in range(6)])
    logits, targets = np.arange(6, dtype=np.float32), np.array([0, 0, 1, 0, 1, 1], dtype=np.int8)
    patients = ray.put({str(key): str(key) for key in keys})
    url = trial_url(str(tmp_path), "t001")
    judge = TrialJudge(SharedTrialData(config, 0.5, 64, patients), url, World())
    callbacks = judge.callbacks(Callbacks(), lambda result: None)
    callbacks.on_start(Start(Initialisation("random", ""), (), 0, 8))
    first = callbacks.extra_metrics(Scores(keys, logits, targets))
    assert read_estimate(url, config) is None
    callbacks.on_epoch(SimpleNamespace(metrics=dict(first)))  # type: ignore[arg-type]
    last = callbacks.extra_metrics(Scores(keys, logits, targets))
    estimate = read_estimate(url, config)
    assert estimate is not None
    assert estimate.value == last[OBJECTIVE]


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
