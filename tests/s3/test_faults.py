"""Faults between reader and server: the right bytes, or an error that names the URL."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
import s3fs
from blake3 import blake3

from pneumo import storage
from pneumo.errors import ContentError, StorageError
from tests.s3.conftest import Reach
from tests.s3.proxy import Fault, FaultyProxy, running
from tests.s3.server import CephServer

pytestmark = pytest.mark.s3

SIZES = (0, 1, 3_000, 700_000, 4_000_000)


@pytest.fixture
def objects(bucket_url: str) -> dict[str, bytes]:
    """URL -> bytes, of several sizes."""
    made = {f"{bucket_url}/{size}": random.Random(size).randbytes(size) for size in SIZES}
    for url, data in made.items():
        storage.write_bytes(url, data)
    return made


def _read_and_compare(objects: dict[str, bytes], seed: int) -> tuple[int, int]:
    """Read each object whole, and a part of it, with their digests; how often the bytes were wrong,
    and how often an error was raised."""
    rng = random.Random(seed)
    wrong, errors = 0, []
    for url, data in objects.items():
        start = rng.randint(0, len(data))
        length = rng.randint(0, len(data) - start)
        part = data[start : start + length]
        try:
            wrong += storage.read_bytes(url, sha256=sha256(data).hexdigest()) != data
            got = storage.read_range(url, start, length, blake3=blake3(part).hexdigest())
            wrong += got != part
        except StorageError as error:
            errors.append((url, str(error)))
    assert all(url in message for url, message in errors)
    return wrong, len(errors)


def _read_without_digest(objects: dict[str, bytes]) -> int:
    return sum(storage.read_bytes(url) != data for url, data in objects.items())


@pytest.mark.parametrize(
    ("fault", "rate"),
    [
        ("cut", 0.4),
        ("end early", 0.4),
        ("wrong length", 0.4),
        ("delay", 0.8),
        ("500", 0.4),
        ("503", 0.4),
        ("bad gateway", 0.4),
        ("flip", 0.3),
    ],
)
def test_a_faulty_network_changes_no_byte(
    fault: Fault, rate: float, objects: dict[str, bytes], endpoint: str, reach: Reach
) -> None:
    started_s = time.monotonic()
    with running(FaultyProxy(endpoint, fault, rate)) as proxy:
        reach(proxy.endpoint)
        wrong, errors = 0, 0
        for seed in range(2):
            more_wrong, more_errors = _read_and_compare(objects, seed)
            # A flipped byte is seen by its digest only.
            more_wrong += 0 if fault == "flip" else _read_without_digest(objects)
            wrong, errors = wrong + more_wrong, errors + more_errors
        reach()
    print(
        f"| {fault} | {proxy.injected} | {wrong} | {errors} | {time.monotonic() - started_s:.1f} |"
    )
    assert proxy.injected >= 5
    assert wrong == 0
    assert errors == 0


def test_a_read_that_stalls_is_tried_again(
    objects: dict[str, bytes], endpoint: str, reach: Reach
) -> None:
    url, data = max(objects.items(), key=lambda item: len(item[1]))
    started_s = time.monotonic()
    with running(FaultyProxy(endpoint, "silence", rate=0.5, seed=1)) as proxy:
        reach(proxy.endpoint)
        while not proxy.injected:
            assert storage.read_bytes(url) == data
        reach()
    seconds = time.monotonic() - started_s
    print(f"| silence | {proxy.injected} | 0 | 0 | {seconds:.1f} |")
    assert seconds > storage.READ_TIMEOUT_S


def test_bytes_that_are_always_damaged_are_refused(
    objects: dict[str, bytes], endpoint: str, reach: Reach
) -> None:
    with running(FaultyProxy(endpoint, "flip", rate=1.0)) as proxy:
        reach(proxy.endpoint)
        for url, data in objects.items():
            if data:
                with pytest.raises(ContentError, match=f"{url}: changed or damaged"):
                    storage.read_bytes(url, sha256=sha256(data).hexdigest())
        reach()
    assert proxy.injected >= 2 * (len(objects) - 1)


def test_an_object_replaced_during_a_read_is_read_whole_in_one_version(
    bucket_url: str, endpoint: str, reach: Reach
) -> None:
    url = f"{bucket_url}/object"
    versions = [bytes([i]) * 3_000_000 for i in range(1, 9)]
    following = iter(versions[1:])

    def replace_it(sent: int) -> None:
        version = next(following, None)
        if version is not None and sent > 1_000:
            other_writer.write(version)

    storage.write_bytes(url, versions[0])
    other_writer = _OtherWriter(endpoint, url)
    proxy = FaultyProxy(endpoint, "cut", rate=0.7, seed=2, in_body=replace_it)
    with running(proxy):
        reach(proxy.endpoint)
        read = [storage.read_bytes(url) for _ in range(6)]
        reach()
    assert proxy.injected >= 3
    assert other_writer.written >= 3
    assert all(data in versions for data in read)


class _OtherWriter:
    """A writer that does not go through the proxy."""

    def __init__(self, endpoint: str, url: str) -> None:
        self._path, self.written = url.removeprefix("s3://"), 0
        self._fs = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)

    def write(self, data: bytes) -> None:
        self._fs.pipe_file(self._path, data)
        self.written += 1


def test_a_read_waits_for_a_server_that_was_killed(bucket_url: str, ceph: CephServer) -> None:
    data = random.Random(1).randbytes(60_000_000)
    url, digest = f"{bucket_url}/big", sha256(data).hexdigest()
    storage.write_bytes(url, data)
    started_s, ended = time.monotonic(), threading.Event()

    def read_on() -> int:
        reads = 0
        while not ended.is_set():
            assert storage.read_bytes(url, sha256=digest) == data
            assert storage.read_range(url, 1_000, 50_000_000) == data[1_000:50_001_000]
            reads += 2
        return reads

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_on) for _ in range(4)]
        try:
            for outage_s in (0.0, 2.0, 5.0):
                time.sleep(1.0)
                ceph.kill_gateway()
                time.sleep(outage_s)
                ceph.start_gateway()
        finally:
            ended.set()
        reads = sum(reader.result() for reader in readers)
    print(f"| server killed | 3 | 0 of {reads} | 0 | {time.monotonic() - started_s:.1f} |")
    assert reads >= 8
