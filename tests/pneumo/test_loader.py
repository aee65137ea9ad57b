"""A store becomes batches: checked on the way in, the same on any number of ranks, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pneumo import loader, partition, shards, storage, transforms
from pneumo.config import AugmentConfig
from pneumo.errors import ConfigError, DataError
from pneumo.loader import Batch, SplitData
from pneumo.partition import World
from pneumo.shards import Manifest, Sample

StoreMaker = Callable[..., str]

BATCH = 12


@pytest.fixture(scope="module")
def store(tiny_store: StoreMaker) -> tuple[str, Manifest]:
    store_url = tiny_store(train=53, val=13, test=9)
    return store_url, shards.read_manifest(store_url)


@pytest.fixture(scope="module")
def train(store: tuple[str, Manifest]) -> SplitData:
    return loader.load_split(*store, "train", image_size=32)


def stored(store: tuple[str, Manifest], split: str) -> list[Sample]:
    store_url, manifest = store
    entries = manifest.splits[split].shards
    return [s for entry in entries for s in shards.read_shard(store_url, entry, 32)]


def batches(
    data: SplitData, *, rank: int = 0, size: int = 1, epoch: int = 0, first_step: int = 0
) -> list[Batch]:
    return list(
        loader.train_batches(
            data,
            AugmentConfig(),
            mean=0.4,
            std=0.2,
            seed=5,
            epoch=epoch,
            batch_size=BATCH,
            world=World(rank, size),
            first_step=first_step,
        )
    )


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert [b.keys for b in one] == [b.keys for b in two]
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


# --- sizes ----------------------------------------------------------------------------------------


def test_the_input_size_is_the_stores_unless_smaller_is_wanted(
    store: tuple[str, Manifest],
) -> None:
    assert loader.input_size(store[1], None) == 32
    assert loader.input_size(store[1], 32) == 32


def test_an_input_size_above_the_stores_is_refused(store: tuple[str, Manifest]) -> None:
    message = r"data\.image_size: 33 is above the store's 32; .*--prepare\.image-size 33"
    with pytest.raises(ConfigError, match=message):
        loader.input_size(store[1], 33)


@pytest.mark.parametrize("image_size", [32, 24, 16])
def test_images_are_resampled_by_area(store: tuple[str, Manifest], image_size: int) -> None:
    data = loader.load_split(*store, "val", image_size=image_size)
    samples = stored(store, "val")
    assert data.images.shape == (13, 1, image_size, image_size)
    assert data.images.dtype == torch.uint8
    for image, sample in zip(data.images[:, 0].numpy(), samples, strict=True):
        expected = cv2.resize(sample.pixels, (image_size,) * 2, interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(image, expected)
    alone = loader.as_input([sample.pixels for sample in samples], image_size)
    assert torch.equal(alone, data.images)


def test_half_size_is_the_mean_of_four(store: tuple[str, Manifest]) -> None:
    data = loader.load_split(*store, "val", image_size=16)
    means = np.stack([s.pixels for s in stored(store, "val")]).reshape(13, 16, 2, 16, 2)
    assert np.abs(data.images[:, 0].numpy() - means.mean(axis=(2, 4))).max() <= 0.5


# --- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_is_loaded_in_the_stores_order(store: tuple[str, Manifest], split: str) -> None:
    data = loader.load_split(*store, split, image_size=32)
    samples = stored(store, split)
    assert len(data) == store[1].splits[split].samples
    assert data.keys == tuple(sample.key for sample in samples)
    assert data.targets.tolist() == [sample.target for sample in samples]
    assert data.targets.dtype == torch.float32
    for image, sample in zip(data.images[:, 0].numpy(), samples, strict=True):
        np.testing.assert_array_equal(image, sample.pixels)


def test_a_missing_shard_is_named(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    manifest = shards.read_manifest(store_url)
    storage.remove(storage.join(store_url, "train/000001.tar"))
    with pytest.raises(DataError, match=r"shard train/000001\.tar: missing"):
        loader.load_split(store_url, manifest, "train", image_size=32)
    assert len(loader.load_split(store_url, manifest, "val", image_size=32)) == 12


def test_a_changed_shard_is_named(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    manifest = shards.read_manifest(store_url)
    path = Path(store_url) / "train" / "000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard train/000002\.tar: "):
        loader.load_split(store_url, manifest, "train", image_size=32)


def test_a_study_that_stands_twice_is_refused(tiny_store: StoreMaker) -> None:
    store_url = tiny_store(train=48)
    manifest = shards.read_manifest(store_url)
    entry = manifest.splits["train"]
    twice = entry.model_copy(update={"shards": (*entry.shards[:-1], entry.shards[0])})
    wrong = manifest.model_copy(update={"splits": {**manifest.splits, "train": twice}})
    with pytest.raises(DataError, match="split train: 32 different samples, the manifest says 48"):
        loader.load_split(store_url, wrong, "train", image_size=32)


def test_a_count_that_differs_from_the_shards_is_refused(store: tuple[str, Manifest]) -> None:
    store_url, manifest = store
    entry = manifest.splits["val"].model_copy(update={"samples": 14})
    wrong = manifest.model_copy(update={"splits": {**manifest.splits, "val": entry}})
    with pytest.raises(DataError, match="split val: 13 different samples, the manifest says 14"):
        loader.load_split(store_url, wrong, "val", image_size=32)


def test_pictures_are_read_by_key(store: tuple[str, Manifest]) -> None:
    samples = {sample.key: sample for sample in stored(store, "train")}
    wanted = [list(samples)[i] for i in (50, 3, 17)]
    found = loader.read_images(*store, "train", wanted)
    assert set(found) == set(wanted)
    for key, pixels in found.items():
        np.testing.assert_array_equal(pixels, samples[key].pixels)
    with pytest.raises(DataError, match="split val: 3 of 3 studies are not in the store"):
        loader.read_images(*store, "val", wanted)


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_is_the_partitions_rows_augmented_and_normalised(train: SplitData) -> None:
    order = partition.epoch_order(len(train), seed=5, epoch=3)
    for step, batch in enumerate(batches(train, epoch=3)):
        rows = partition.train_rows(order, step, batch_size=BATCH, world=World())
        assert batch.keys == tuple(train.keys[row] for row in rows)
        assert torch.equal(batch.targets, train.targets[rows])
        moved = transforms.augment(train.images[rows], batch.keys, AugmentConfig(), seed=5, epoch=3)
        assert torch.equal(batch.images, transforms.normalise(moved, 0.4, 0.2))
        assert batch.images.shape == (BATCH, 1, 32, 32)


def test_an_epoch_has_whole_batches_of_different_studies(train: SplitData) -> None:
    keys = [key for batch in batches(train) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 48
    assert keys != [key for batch in batches(train, epoch=1) for key in batch.keys]


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_going_on_in_mid_epoch_gives_the_very_next_batches(
    train: SplitData, first_step: int
) -> None:
    assert_same(batches(train, first_step=first_step), batches(train)[first_step:])


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_any_number_of_ranks_feeds_the_same_global_batches(train: SplitData, size: int) -> None:
    parts = [batches(train, rank=rank, size=size, first_step=1) for rank in range(size)]
    together = [
        Batch(
            torch.cat([part.images for part in step]),
            torch.cat([part.targets for part in step]),
            tuple(key for part in step for key in part.keys),
        )
        for step in zip(*parts, strict=True)
    ]
    assert_same(together, batches(train)[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 60])
def test_evaluation_feeds_every_study_once_on_any_number_of_ranks(
    train: SplitData, size: int
) -> None:
    fed = [
        batch
        for rank in range(size)
        for batch in loader.evaluation_batches(
            train, mean=0.4, std=0.2, batch_size=7, world=World(rank, size)
        )
    ]
    assert tuple(key for batch in fed for key in batch.keys) == train.keys
    assert torch.equal(torch.cat([batch.targets for batch in fed]), train.targets)
    expected = transforms.normalise(train.images, 0.4, 0.2)
    assert torch.equal(torch.cat([batch.images for batch in fed]), expected)
    assert max(len(batch.keys) for batch in fed) <= 7


def test_batches_leave_the_split_as_it_is(train: SplitData) -> None:
    before = train.images.clone()
    batches(train)
    list(loader.evaluation_batches(train, mean=0.4, std=0.2, batch_size=7, world=World()))
    assert torch.equal(train.images, before)
