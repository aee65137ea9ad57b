"""A store becomes batches: the same held or streamed, on any ranks; checked and resumable."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import fsspec
import numpy as np
import pytest
import torch
from blake3 import blake3

from pneumo import storage
from pneumo.config import AugmentConfig, Config, DataConfig
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.shards import Sample, read_shard, write_shard
from pneumo.errors import ConfigError, DataError
from pneumo.loading import augmentation, loader, sample_order
from pneumo.loading.blocks import Blocks, PreparedStore, input_size, to_input
from pneumo.loading.in_memory import InMemoryFeed
from pneumo.loading.loader import Batch, Loader, choose_feeds
from pneumo.loading.sample_order import World
from pneumo.loading.streaming import StreamingFeed
from tests.waiting import wait_until

StoreMaker = Callable[..., str]

BATCH = 30  # divides into 1, 2, 3 and 5 ranks
WAYS = ("memory", "stream")
AUGMENT = AugmentConfig()
CPU = torch.device("cpu")


class CountedFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Local files as an object store whose reads are counted and fail on demand."""

    protocol = "counted"
    reads: ClassVar[list[tuple[str, int, int]]] = []
    """Path, first byte and end of each read that was answered."""
    failures: ClassVar[dict[str, int]] = {}
    """How often reads of paths that end so still fail."""

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        for name, times in self.failures.items():
            if path.endswith(name) and times:
                self.failures[name] -= 1
                raise ConnectionResetError("the network broke")
        data = Path(path).read_bytes()[start:end]
        if end is not None and end - (start or 0) > 1:  # not the check for the last byte
            self.reads.append((path, start or 0, end))
        return data


fsspec.register_implementation("counted", CountedFiles)


@pytest.fixture
def counted() -> Iterator[type[CountedFiles]]:
    CountedFiles.reads.clear()
    CountedFiles.failures.clear()
    yield CountedFiles
    CountedFiles.failures.clear()


@pytest.fixture(scope="module")
def store(tiny_store: StoreMaker) -> tuple[str, Manifest]:
    """19 training blocks, of which some are short: shards of 80 samples in blocks of 64 and 16."""
    store_url = tiny_store(train=751, val=203, test=9, image_size=32, samples_per_shard=80)
    manifest = read_manifest(store_url)
    return store_url, manifest.model_copy(update={"mean": 0.4, "std": 0.2})


def open_split(
    store: tuple[str, Manifest],
    way: str,
    *,
    split: str = "train",
    rank: int = 0,
    size: int = 1,
    image_size: int = 32,
) -> Loader:
    config = DataConfig.model_validate({"cache": way, "image_size": image_size})
    return loader.open_loader(
        PreparedStore(*store, config), split, world=World(rank, size), device=CPU
    )


def train_batches(data: Loader, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
    return data.epoch(epoch, seed=5, batch_size=BATCH, augment=AUGMENT, start_step=start_step)


def stored(store: tuple[str, Manifest], split: str) -> list[Sample]:
    store_url, manifest = store
    entries = manifest.splits[split].shards
    return [s for entry in entries for s in read_shard(store_url, entry, manifest.image_size)]


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert [b.keys for b in one] == [b.keys for b in two]
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


def join(parts: tuple[Batch, ...]) -> Batch:
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.targets for part in parts]),
        tuple(key for part in parts for key in part.keys),
    )


def blocks_of(data: Loader, steps: range, rank: int = 0, size: int = 1) -> set[int]:
    """The blocks in which the samples of some steps of epoch 0 lie."""
    order = sample_order.epoch_order(data.block_sizes, batch_size=BATCH, seed=5, epoch=0)
    rows = [
        sample_order.train_rows(order, step, batch_size=BATCH, world=World(rank, size))
        for step in steps
    ]
    ends = np.cumsum(data.block_sizes)
    return set(np.searchsorted(ends, np.concatenate(rows), side="right").tolist())


def readers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pneumo-reader")]


def wait_for_readers_to_end() -> None:
    wait_until(lambda: not readers_alive(), lambda: f"the threads {readers_alive()} to end")


# --- sizes ----------------------------------------------------------------------------------------


def test_the_input_size_is_the_stores_unless_smaller_is_wanted(
    store: tuple[str, Manifest],
) -> None:
    assert input_size(store[1], None) == 32
    assert input_size(store[1], 32) == 32


def test_an_input_size_above_the_stores_is_refused(store: tuple[str, Manifest]) -> None:
    message = r"data\.image_size: 33 is above the store's 32; .*--prepare\.image-size 33"
    with pytest.raises(ConfigError, match=message):
        input_size(store[1], 33)


@pytest.mark.parametrize("image_size", [64, 48, 32])
def test_images_are_resampled_by_area(tiny_store: StoreMaker, image_size: int) -> None:
    store_url = tiny_store(train=9, test=9, image_size=64)
    store = (store_url, read_manifest(store_url))
    samples = stored(store, "test")
    images = to_input([sample.pixels for sample in samples], image_size)
    assert images.shape == (9, 1, image_size, image_size)
    assert images.dtype == torch.uint8
    for image, sample in zip(images[:, 0].numpy(), samples, strict=True):
        expected = cv2.resize(sample.pixels, (image_size,) * 2, interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(image, expected)
    expected_batch = augmentation.normalise(images, store[1].mean, store[1].std)
    for way in WAYS:
        data = open_split(store, way, split="test", image_size=image_size)
        [batch] = data.evaluation(batch_size=9)
        assert torch.equal(batch.images, expected_batch)


def test_half_size_is_the_mean_of_four(store: tuple[str, Manifest]) -> None:
    pixels = [sample.pixels for sample in stored(store, "test")]
    means = np.stack(pixels).reshape(9, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.abs(to_input(pixels, 16)[:, 0].numpy() - means).max() <= 0.5


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cache", "disk", "expected 'auto', 'memory' or 'stream'"),
        ("image_size", 0, "expected greater than or equal to"),
    ],
)
def test_settings_of_a_loader_that_make_no_sense_are_refused(
    key: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Config(), {f"data.{key}": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gray_fraction", 1.0),
        ("gray_fraction", -0.1),
        ("scale_fraction", "sometimes"),
    ],
)
def test_amounts_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.{key}: got"):
        override(Config(), {f"augment.{key}": value})


# --- held or streamed -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_the_planned_rows_augmented_and_normalised(
    store: tuple[str, Manifest], way: str
) -> None:
    samples = stored(store, "train")
    data = open_split(store, way)
    assert len(data) == 751
    order = sample_order.epoch_order(data.block_sizes, batch_size=BATCH, seed=5, epoch=3)
    batches = list(train_batches(data, epoch=3))
    assert len(batches) == 25
    for step, batch in enumerate(batches):
        rows = sample_order.train_rows(order, step, batch_size=BATCH, world=World())
        assert batch.keys == tuple(samples[row].key for row in rows)
        assert batch.targets.tolist() == [samples[row].target for row in rows]
        assert batch.targets.dtype == torch.float32
        pixels = to_input([samples[row].pixels for row in rows], 32)
        moved = augmentation.augment(
            pixels, batch.keys, AUGMENT, seed=5, epoch=3, moments=(0.4, 0.2)
        )
        assert torch.equal(batch.images, moved)


@pytest.fixture(scope="module")
def whole(store: tuple[str, Manifest]) -> list[Batch]:
    """Epoch 1 on one rank, held."""
    return list(train_batches(open_split(store, "memory"), epoch=1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("start_step", [0, 12, 25])
def test_both_ways_feed_the_same_bits_on_any_ranks_from_any_step(
    store: tuple[str, Manifest], whole: list[Batch], way: str, size: int, start_step: int
) -> None:
    ranks = [
        train_batches(open_split(store, way, rank=rank, size=size), epoch=1, start_step=start_step)
        for rank in range(size)
    ]
    assert_same([join(step) for step in zip(*ranks, strict=True)], whole[start_step:])


@pytest.mark.parametrize(
    ("readers", "prefetch_blocks"), [(1, 1), (2, 5), (3, 100), (5, 1), (8, 16)]
)
def test_threads_and_read_ahead_change_nothing(
    store: tuple[str, Manifest], whole: list[Batch], readers: int, prefetch_blocks: int
) -> None:
    blocks = Blocks(PreparedStore(*store, DataConfig()), "train")
    streamed = StreamingFeed(blocks, readers=readers, prefetch_blocks=prefetch_blocks)
    held = InMemoryFeed(blocks, device=CPU, readers=readers)
    for feed in (streamed, held):
        data = replace(open_split(store, "stream"), feed=feed)
        assert_same(list(train_batches(data, epoch=1)), whole)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_epoch_and_the_first_again_are_as_in_a_fresh_loader(
    store: tuple[str, Manifest], whole: list[Batch], way: str
) -> None:
    data = open_split(store, way)
    list(train_batches(data, epoch=0, start_step=20))
    assert_same(list(train_batches(data, epoch=1)), whole)
    assert_same(list(train_batches(data, epoch=1)), whole)


def test_an_epoch_has_whole_batches_of_different_studies(whole: list[Batch]) -> None:
    keys = [key for batch in whole for key in batch.keys]
    assert len(keys) == len(set(keys)) == 750


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 60])
def test_evaluation_feeds_every_study_once_on_any_number_of_ranks(
    store: tuple[str, Manifest], way: str, size: int
) -> None:
    fed = [
        batch
        for rank in range(size)
        for batch in open_split(store, way, split="val", rank=rank, size=size).evaluation(
            batch_size=7
        )
    ]
    samples = stored(store, "val")
    assert [key for batch in fed for key in batch.keys] == [sample.key for sample in samples]
    together = join(tuple(fed))
    assert together.targets.tolist() == [sample.target for sample in samples]
    pixels = to_input([sample.pixels for sample in samples], 32)
    assert torch.equal(together.images, augmentation.normalise(pixels, 0.4, 0.2))
    assert max(len(batch.keys) for batch in fed) <= 7


@pytest.mark.parametrize("way", WAYS)
def test_batches_leave_the_split_as_it_is(store: tuple[str, Manifest], way: str) -> None:
    data = open_split(store, way, split="val")
    before = list(data.evaluation(batch_size=50))
    for batch in data.epoch(0, seed=0, batch_size=50, augment=AUGMENT):
        batch.images.zero_()
    for batch in data.evaluation(batch_size=50):
        batch.images.zero_()
        batch.targets.zero_()
    assert_same(list(data.evaluation(batch_size=50)), before)


def test_fewer_samples_than_a_batch_are_refused(store: tuple[str, Manifest]) -> None:
    data = open_split(store, "memory", split="test")
    with pytest.raises(ConfigError, match=r"train\.batch_size: 30 is more than the 9 samples"):
        next(train_batches(data))


# --- what is read ---------------------------------------------------------------------------------


@pytest.fixture
def remote(store: tuple[str, Manifest], counted: type[CountedFiles]) -> tuple[str, Manifest]:
    """The store behind a file system that counts."""
    return f"counted://{store[0]}", store[1]


def test_memory_reads_each_block_once_in_a_run(
    remote: tuple[str, Manifest], counted: type[CountedFiles]
) -> None:
    data = open_split(remote, "memory")
    for epoch in range(4):
        list(train_batches(data, epoch=epoch))
    assert len(counted.reads) == len(set(counted.reads)) == len(data.block_sizes) == 19


def test_memory_holds_a_rank_its_slice_of_an_evaluation(
    remote: tuple[str, Manifest], counted: type[CountedFiles]
) -> None:
    data = open_split(remote, "memory", split="val", rank=1, size=2)
    rows = sample_order.evaluation_rows(data.block_sizes, World(1, 2))
    list(data.evaluation(batch_size=9))
    ends = np.cumsum(data.block_sizes)
    assert len(counted.reads) == len(set(np.searchsorted(ends, rows, side="right").tolist())) < 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 3), (4, 5)])
@pytest.mark.parametrize("start_step", [0, 9, 24])
def test_going_on_reads_no_block_that_only_consumed_steps_needed(
    remote: tuple[str, Manifest],
    counted: type[CountedFiles],
    way: str,
    rank: int,
    size: int,
    start_step: int,
) -> None:
    data = open_split(remote, way, rank=rank, size=size)
    list(train_batches(data, start_step=start_step))
    needed = blocks_of(data, range(start_step, 25), rank, size)
    assert len(counted.reads) == len(needed)
    entries = [(s, b) for s in remote[1].splits["train"].shards for b in s.blocks]
    expected = {
        (f"{remote[0].removeprefix('counted://')}/{s.name}", b.offset, b.offset + b.bytes)
        for s, b in (entries[number] for number in needed)
    }
    assert set(counted.reads) == expected


def test_a_stream_reads_ahead_as_far_as_it_is_told(
    remote: tuple[str, Manifest], counted: type[CountedFiles]
) -> None:
    blocks = Blocks(PreparedStore(*remote, DataConfig()), "train")
    data = replace(
        open_split(remote, "stream"), feed=StreamingFeed(blocks, readers=4, prefetch_blocks=3)
    )
    batches = train_batches(data)
    next(batches)
    first = len(blocks_of(data, range(1)))
    wait_until(
        lambda: len(counted.reads) >= first + 3,
        lambda: f"{first + 3} reads, of which there are {len(counted.reads)}",
    )
    time.sleep(0.05)
    assert len(counted.reads) == first + 3


def test_a_block_needed_again_much_later_is_read_again(
    store: tuple[str, Manifest], counted: type[CountedFiles]
) -> None:
    """So that a long epoch does not hold the blocks that two lanes share."""
    source = Blocks(PreparedStore(f"counted://{store[0]}", store[1], DataConfig()), "train")
    stream = StreamingFeed(source, readers=1, prefetch_blocks=1)
    plan = [np.array([row]) for row in [0, 1, *range(64, 97), 2, 100, 3]]
    fed = list(stream.feed(plan))
    samples = stored(store, "train")
    assert [s.keys[0] for s in fed] == [samples[int(rows[0])].key for rows in plan]
    assert len(counted.reads) == 4  # block 0, then 1 (64 to 79) and 2, then 0 once more
    assert len(set(counted.reads)) == 3


# --- what is wrong with a store -------------------------------------------------------------------


def read_all(store_url: str, manifest: Manifest, way: str) -> None:
    list(open_split((store_url, manifest), way).evaluation(batch_size=8))


@pytest.fixture
def spoilt(tiny_store: StoreMaker) -> tuple[str, Manifest]:
    """A store of three shards of one block, to be damaged."""
    store_url = tiny_store(train=48)
    return store_url, read_manifest(store_url)


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_shard_is_named(spoilt: tuple[str, Manifest], way: str) -> None:
    storage.remove(storage.join(spoilt[0], "train/000001.tar"))
    with pytest.raises(DataError, match=r"shard train/000001\.tar: missing"):
        open_split(spoilt, way)  # before the first step
    assert len(list(open_split(spoilt, way, split="val").evaluation(batch_size=4))) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_shard_is_looked_at_by_one_rank(spoilt: tuple[str, Manifest], size: int) -> None:
    store_url, manifest = spoilt
    blocks = Blocks(PreparedStore(store_url, manifest, DataConfig()), "train")
    for number in range(3):
        url = storage.join(store_url, f"train/00000{number}.tar")
        data = storage.read_bytes(url)
        storage.remove(url)
        told = 0
        for rank in range(size):
            try:
                blocks.check_shards(World(rank, size))
            except DataError as error:
                told += f"00000{number}.tar: missing" in str(error)
        assert told == 1
        storage.write_bytes(url, data)


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_shard_is_named(spoilt: tuple[str, Manifest], way: str) -> None:
    path = Path(spoilt[0]) / "train" / "000002.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=r"shard train/000002\.tar: .* ends at byte"):
        open_split(spoilt, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_changed_since_its_preparation_is_named(
    spoilt: tuple[str, Manifest], way: str
) -> None:
    path = Path(spoilt[0]) / "train" / "000001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard train/000001\.tar: not what the manifest says"):
        read_all(*spoilt, way)
    wait_for_readers_to_end()


def with_block(manifest: Manifest, data: bytes, **changes: Any) -> Manifest:
    """The manifest with another first block of train, whose digest is right."""
    train = manifest.splits["train"]
    block = (
        train.shards[0]
        .blocks[0]
        .model_copy(update={"blake3": blake3(data).hexdigest(), "bytes": len(data), **changes})
    )
    shard = train.shards[0].model_copy(update={"blocks": (block,)})
    train = train.model_copy(update={"shards": (shard, *train.shards[1:])})
    return manifest.model_copy(update={"splits": {**manifest.splits, "train": train}})


def spoil_header(data: bytes) -> bytes:
    return data.replace(b"\x93NUMPY", b"\x93NUMPX", 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_header, "sample 0 does not decode"),
        (lambda data: data[:512] + b"x" + data[513:], "sample 0 does not decode"),
        (lambda data: data.replace(b".npy", b".png", 1), r"sample 0 is not a \.cls and a \.npy"),
        (lambda data: data[: len(data) // 16 * 15], "30 members, the manifest says 16 samples"),
        (lambda data: b"\0" * len(data), "not a readable tar"),
        (lambda data: data[:-512], "not a readable tar"),
        (lambda data: data[:156] + b"5" + data[157:], "not a readable tar"),
    ],
)
def test_a_block_that_was_written_wrong_is_named(
    spoilt: tuple[str, Manifest], way: str, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = Path(spoilt[0]) / "train" / "000000.tar"
    block = spoilt[1].splits["train"].shards[0].blocks[0]
    data = path.read_bytes()
    changed = spoil(data[: block.bytes])
    path.write_bytes(changed + data[len(changed) :])
    manifest = with_block(spoilt[1], changed)
    with pytest.raises(DataError, match=rf"shard train/000000\.tar, block at byte 0: {message}"):
        read_all(spoilt[0], manifest, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_store_of_another_size_than_its_manifest_says_is_refused(
    spoilt: tuple[str, Manifest], way: str
) -> None:
    manifest = spoilt[1].model_copy(update={"image_size": 64})
    message = r"shard train/00000\d\.tar, .*: sample 0 is uint8 \(32, 32\), expected uint8 \(64, 64"
    with pytest.raises(DataError, match=message):
        list(train_batches(open_split((spoilt[0], manifest), way, image_size=64)))


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_stands_twice_is_refused(spoilt: tuple[str, Manifest], way: str) -> None:
    entry = spoilt[1].splits["train"]
    twice = entry.model_copy(update={"shards": (*entry.shards[:-1], entry.shards[0])})
    wrong = spoilt[1].model_copy(update={"splits": {**spoilt[1].splits, "train": twice}})
    with pytest.raises(DataError, match="split train: a block is listed twice"):
        open_split((spoilt[0], wrong), way)


@pytest.mark.parametrize("way", WAYS)
def test_a_study_that_stands_twice_is_refused(spoilt: tuple[str, Manifest], way: str) -> None:
    store_url, manifest = spoilt
    samples = stored(spoilt, "train")
    entries = manifest.splits["train"].shards
    again = write_shard(store_url, "train/000002.tar", [*samples[32:47], samples[3]])
    train = manifest.splits["train"].model_copy(update={"shards": (*entries[:2], again)})
    wrong = manifest.model_copy(update={"splits": {**manifest.splits, "train": train}})
    message = "split train: a study is in it more than once"
    with pytest.raises(DataError, match=message):
        list(open_split((store_url, wrong), way).evaluation(batch_size=8))
    with pytest.raises(DataError, match=message):
        list(open_split((store_url, wrong), way).epoch(0, seed=5, batch_size=48, augment=AUGMENT))


@pytest.mark.parametrize("way", WAYS)
def test_a_count_that_differs_from_the_blocks_is_refused(
    spoilt: tuple[str, Manifest], way: str
) -> None:
    entry = spoilt[1].splits["train"].model_copy(update={"samples": 49})
    wrong = spoilt[1].model_copy(update={"splits": {**spoilt[1].splits, "train": entry}})
    with pytest.raises(DataError, match="48 samples in its blocks, the manifest says 49"):
        open_split((spoilt[0], wrong), way)


# --- what breaks on the way -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_reads_that_break_change_no_batch(
    remote: tuple[str, Manifest], counted: type[CountedFiles], whole: list[Batch], way: str
) -> None:
    data = open_split(remote, way)
    counted.failures.update({"train/000001.tar": 2, "train/000004.tar": 1})
    assert_same(list(train_batches(data, epoch=1)), whole)
    assert sum(counted.failures.values()) == 0


def test_an_epoch_that_cannot_be_read_ends_with_an_error_not_early(
    tiny_store: StoreMaker, counted: type[CountedFiles]
) -> None:
    store_url = tiny_store(train=480, image_size=32)
    manifest = read_manifest(store_url)
    remote = (f"counted://{store_url}", manifest)
    blocks = Blocks(PreparedStore(*remote, DataConfig()), "train")
    data = replace(
        open_split(remote, "stream"), feed=StreamingFeed(blocks, readers=4, prefetch_blocks=1)
    )
    batches = train_batches(data)
    next(batches)
    for shard in manifest.splits["train"].shards:
        storage.remove(storage.join(store_url, shard.name))
    with pytest.raises(DataError, match=r"shard train/\d{6}\.tar: missing from counted://"):
        list(batches)
    wait_for_readers_to_end()


# --- threads --------------------------------------------------------------------------------------


def test_the_threads_of_a_stream_end_with_it(store: tuple[str, Manifest]) -> None:
    data = open_split(store, "stream")
    wait_for_readers_to_end()
    batches = train_batches(data)
    next(batches)
    assert readers_alive()
    batches.close()  # type: ignore[attr-defined]
    wait_for_readers_to_end()

    batches = train_batches(data)
    next(batches)
    del batches
    wait_for_readers_to_end()

    list(train_batches(data))
    wait_for_readers_to_end()


def test_a_consumers_error_ends_the_threads(store: tuple[str, Manifest]) -> None:
    def consume() -> None:
        for _ in train_batches(open_split(store, "stream")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    wait_for_readers_to_end()


# --- which way ------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("wanted", "decoded", "host", "device", "place"),
    [
        ("auto", 1 * GB, 2 * GB, None, "memory"),
        ("auto", 1 * GB + 1, 2 * GB, None, "stream"),
        ("auto", 7 * GB, 2 * GB, 28 * GB, "device"),
        ("auto", 7 * GB, 14 * GB, 24 * GB, "memory"),
        ("auto", 7 * GB, 10 * GB, 24 * GB, "stream"),
        ("memory", 2 * GB, 2 * GB, None, "memory"),
        ("memory", 2 * GB, 1 * GB, 8 * GB, "device"),
        ("stream", 1, 2 * GB, 2 * GB, "stream"),
    ],
)
def test_the_way_follows_size_and_memory(
    wanted: Any, decoded: int, host: int, device: int | None, place: str
) -> None:
    choices = choose_feeds(wanted, {"train": decoded}, host_bytes=host, device_bytes=device)
    choice = choices["train"]
    assert choice.place == place
    assert f"{decoded / 1e9:.3g} GB decoded" in choice.reason


def test_memory_that_does_not_suffice_is_refused() -> None:
    message = r"^data\.cache: memory: 3 GB decoded, 2\.00 GB free for this worker; use stream"
    with pytest.raises(ConfigError, match=message):
        choose_feeds("memory", {"train": 3 * GB}, host_bytes=2 * GB, device_bytes=None)


@pytest.mark.parametrize(
    ("sizes", "host", "device", "places"),
    [
        ((4, 1), 10, None, ("memory", "memory")),
        ((4, 2), 10, None, ("memory", "stream")),  # each alone would fit
        ((6, 2), 10, None, ("stream", "memory")),
        ((5, 2), 10, 24, ("device", "memory")),
        ((5, 1), 10, 24, ("device", "device")),
    ],
)
def test_splits_fit_beside_one_another(
    sizes: tuple[int, int], host: int, device: int | None, places: tuple[str, str]
) -> None:
    choices = choose_feeds(
        "auto",
        {"train": sizes[0] * GB, "val": sizes[1] * GB},
        host_bytes=host * GB,
        device_bytes=None if device is None else device * GB,
    )
    assert tuple(choice.place for choice in choices.values()) == places


def test_a_shared_split_that_does_not_fit_on_the_gpu_stays_in_the_hosts_memory(
    store: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = ("train", "val")
    prepared = PreparedStore(*store, DataConfig())
    shared = {split: loader.read_in_memory(prepared, split) for split in splits}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 10_000))
    opened = loader.open_loaders(
        prepared,
        splits,
        world=World(),
        device="cuda",
        shared_splits={name: split for name, split in shared.items() if split is not None},
    )
    for split in opened:
        first = next(split.rank_slice(batch_size=4))
        assert first.images.device == CPU
        assert len(first.keys) == 4


def test_memory_that_suffices_for_one_split_only_is_refused() -> None:
    message = r"^data\.cache: memory: 2 GB decoded, 1\.00 GB free for this worker beside the oth"
    with pytest.raises(ConfigError, match=message):
        choose_feeds("memory", {"a": 2 * GB, "b": 2 * GB}, host_bytes=3 * GB, device_bytes=None)


@pytest.mark.parametrize(
    ("way", "line"),
    [
        (
            "auto",
            r"data: train: kept in memory \(0\.000\d+ GB decoded, \d+\.\d\d GB free for this wo",
        ),
        ("stream", r"data: train: streamed, as data\.cache says \(0\.000\d+ GB decoded\)"),
    ],
)
def test_the_way_and_its_reason_are_told_in_a_line(
    store: tuple[str, Manifest], way: Any, line: str
) -> None:
    lines: list[str] = []
    opened = loader.open_loader(
        PreparedStore(*store, DataConfig(cache=way)),
        "train",
        world=World(),
        device="cpu",
        tell=lines.append,
    )
    assert isinstance(opened.feed, StreamingFeed if way == "stream" else InMemoryFeed)
    [told] = lines
    assert re.match(line, told)


# --- pictures by key ------------------------------------------------------------------------------


def test_pictures_are_read_by_key(store: tuple[str, Manifest]) -> None:
    samples: Mapping[str, Sample] = {sample.key: sample for sample in stored(store, "train")}
    wanted = [list(samples)[i] for i in (50, 3, 17)]
    found = loader.read_images(*store, "train", wanted)
    assert set(found) == set(wanted)
    for key, pixels in found.items():
        np.testing.assert_array_equal(pixels, samples[key].pixels)
    with pytest.raises(DataError, match="split val: 3 of 3 studies are not in the store"):
        loader.read_images(*store, "val", wanted)
