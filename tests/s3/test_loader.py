"""The loader with a real S3 server: the same batches as from disk, or an error that names the
shard; never fewer samples."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from pneumo import storage
from pneumo.config import AugmentConfig, DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import DataError
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import Batch, Loader, open_loader
from pneumo.loading.sample_order import World
from tests.conftest import StoreMaker
from tests.s3.conftest import Reach
from tests.s3.proxy import Fault, FaultyProxy, running
from tests.s3.server import CephServer

pytestmark = pytest.mark.s3

Cache = Literal["memory", "stream"]
BATCH = 32
SAMPLES = 1_000
EPOCHS = 2
USED = SAMPLES // BATCH * BATCH


@pytest.fixture(scope="module")
def local_store(tiny_store: StoreMaker) -> str:
    """Shards of 200 pictures of 4 kB, in blocks of 64."""
    return tiny_store(train=SAMPLES, image_size=64, samples_per_shard=200)


@pytest.fixture(scope="module")
def expected(local_store: str) -> list[Batch]:
    """The batches from disk."""
    return list(read_epochs(open_train(local_store, "memory")))


@pytest.fixture
def store_url(local_store: str, bucket_url: str) -> str:
    """The same store on the server."""
    url = f"{bucket_url}/store"
    storage.upload_folder(Path(local_store), url)
    return url


def open_train(store_url: str, cache: Cache) -> Loader:
    config = DataConfig(cache=cache, image_size=64)
    store = PreparedStore(store_url, read_manifest(store_url), config)
    return open_loader(store, "train", world=World(), device="cpu")


def read_epochs(data: Loader) -> Iterator[Batch]:
    for epoch in range(EPOCHS):
        yield from data.epoch(epoch, seed=3, batch_size=BATCH, augment=AugmentConfig())


def count_lost(batches: list[Batch], expected: list[Batch]) -> int:
    """How many samples are not at their place; asserts that images and targets are equal."""
    assert len(batches) == len(expected)
    lost = 0
    for batch, other in zip(batches, expected, strict=True):
        lost += sum(a != b for a, b in zip(batch.keys, other.keys, strict=True))
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.targets, other.targets)
    return lost


def print_row(fault: str, cache: Cache, injected: int, lost: int, seconds: float) -> None:
    print(f"| {fault} | {cache} | {injected} | {lost} of {EPOCHS * USED} | {seconds:.1f} |")


@pytest.mark.parametrize("cache", ["memory", "stream"])
@pytest.mark.parametrize(
    "fault", ["cut", "end early", "wrong length", "delay", "500", "503", "bad gateway", "flip"]
)
def test_a_faulty_network_loses_no_sample(
    fault: Fault, cache: Cache, store_url: str, expected: list[Batch], endpoint: str, reach: Reach
) -> None:
    started_s = time.monotonic()
    with running(FaultyProxy(endpoint, fault, rate=0.3)) as proxy:
        reach(proxy.endpoint)
        batches = list(read_epochs(open_train(store_url, cache)))
        reach()
    lost = count_lost(batches, expected)
    print_row(fault, cache, proxy.injected, lost, time.monotonic() - started_s)
    assert proxy.injected >= 3
    assert lost == 0


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_a_server_killed_during_an_epoch_loses_no_sample(
    cache: Cache, store_url: str, expected: list[Batch], ceph: CephServer
) -> None:
    """With the cache `memory` all is read at once, so the server is killed once."""
    started_s, steps = time.monotonic(), len(expected)
    outages_s = {0: 2.0} if cache == "memory" else {0: 2.0, steps // 4: 0.0, steps // 2: 1.0}
    batches, epoch_batches = [], read_epochs(open_train(store_url, cache))
    restarts = []
    for step in range(steps):
        if step in outages_s:
            ceph.kill_gateway()
            restarts.append(_restart_after(ceph, outages_s[step]))
        batches.append(next(epoch_batches))
        if step in outages_s:
            restarts[-1].join()
    lost = count_lost(batches, expected)
    print_row("server killed", cache, len(restarts), lost, time.monotonic() - started_s)
    assert lost == 0


def _restart_after(ceph: CephServer, outage_s: float) -> threading.Thread:
    def start() -> None:
        time.sleep(outage_s)
        ceph.start_gateway()

    thread = threading.Thread(target=start)
    thread.start()
    return thread


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_bytes_that_are_always_damaged_end_the_epoch_with_the_name_of_the_shard(
    cache: Cache, store_url: str, endpoint: str, reach: Reach
) -> None:
    data = open_train(store_url, cache)
    with running(FaultyProxy(endpoint, "flip", rate=1.0)) as proxy:
        reach(proxy.endpoint)
        with pytest.raises(DataError, match=r"shard train/\d{6}\.tar: .*changed or damaged"):
            list(read_epochs(data))
        reach()
    assert proxy.injected >= 2


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_a_shard_removed_during_an_epoch_ends_it_with_the_name_of_the_shard(
    cache: Cache, store_url: str, expected: list[Batch]
) -> None:
    data = open_train(store_url, cache)
    batches = read_epochs(data)
    if cache == "stream":
        next(batches)
    storage.remove(f"{store_url}/train/000003.tar")
    with pytest.raises(DataError, match=r"shard train/000003\.tar: missing"):
        list(batches)
