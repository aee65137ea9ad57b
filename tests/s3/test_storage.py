"""Rights, conditional writes and clocks on a real server; moto accepts every key."""

import functools
import http.server
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import boto3
import pytest

from pneumo import storage
from pneumo.errors import AccessError, ContentError, StorageError
from pneumo.storage.retries import retried
from pneumo.storage.s3 import ResumableRead
from pneumo.storage.urls import Range
from tests.s3.conftest import Reach
from tests.s3.proxy import FaultyProxy, running
from tests.s3.server import STRANGER_KEY, STRANGER_SECRET, CephServer

pytestmark = pytest.mark.s3

BIG_BYTES = 60_000_000


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 70_000, BIG_BYTES])
def test_written_bytes_are_read_back(bucket_url: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    url = f"{bucket_url}/folder/ein Röntgenbild +%.bin"
    storage.write_bytes(url, data)
    assert storage.read_bytes(url, sha256=sha256(data).hexdigest(), size=size) == data
    assert storage.exists(url)
    assert storage.list_urls(bucket_url) == [url]


def test_a_range_is_read_exactly_or_raises(bucket_url: str) -> None:
    data = random.Random(0).randbytes(5_000_000)
    url = f"{bucket_url}/object"
    storage.write_bytes(url, data)
    for start, length in ((0, 1), (4_999_999, 1), (0, 5_000_000), (1_234_567, 3_210_987), (7, 0)):
        assert storage.read_range(url, start, length) == data[start : start + length]
    for start, length in ((4_999_999, 2), (5_000_000, 1), (9_000_000, 5)):
        with pytest.raises(ContentError, match=rf"{url}: ends at byte 5000000; bytes {start} to"):
            storage.read_range(url, start, length)
    with pytest.raises(ContentError, match=rf"{url}, bytes 3 to 6: changed or damaged"):
        storage.read_range(url, 3, 4, blake3="0" * 64)
    with pytest.raises(FileNotFoundError, match=f"{bucket_url}/none"):
        storage.read_range(f"{bucket_url}/none", 0, 1)


def test_a_listing_of_more_than_a_thousand_keys_is_complete(bucket_url: str) -> None:
    urls = [f"{bucket_url}/many/{i:04d}" for i in range(1_003)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda url: storage.write_bytes(url, b"x"), urls))
    # As consoles of S3 show an empty folder.
    bucket = bucket_url.removeprefix("s3://")
    boto3.client("s3", region_name="us-east-1").put_object(Bucket=bucket, Key="many/folder/")
    assert storage.list_urls(bucket_url) == urls
    names = storage.list_names(f"{bucket_url}/many")
    assert names == [*(url.rsplit("/", 1)[1] for url in urls), "folder"]
    assert not storage.exists(f"{bucket_url}/man")
    assert storage.exists(f"{bucket_url}/many")


# --- creating -------------------------------------------------------------------------------------

_CREATE = """
import sys
from pneumo import storage
sys.stdin.readline()
for i in range(20):
    print(storage.create_bytes(f"{sys.argv[1]}/{i}", sys.argv[2].encode()), flush=True)
"""


def test_of_several_creators_at_the_same_time_exactly_one_wins(bucket_url: str) -> None:
    names = ("one", "two", "three")
    creators = [
        subprocess.Popen(
            [sys.executable, "-c", _CREATE, bucket_url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda creator: creator.communicate("go\n")[0], creators))
    assert [creator.returncode for creator in creators] == [0, 0, 0]
    results = [output.split() for output in outputs]
    for i in range(20):
        winners = [name for name, result in zip(names, results, strict=True) if result[i] == "True"]
        assert len(winners) == 1
        assert storage.read_text(f"{bucket_url}/{i}") == winners[0]


def test_a_creator_whose_answer_was_lost_recognises_its_own_object(
    bucket_url: str, endpoint: str, reach: Reach
) -> None:
    # The proxy asks the server first, so that the object is there when the answer says otherwise.
    lossy = FaultyProxy(endpoint, "503", rate=0.6, seed=1, methods=frozenset({"PUT"}))
    with running(lossy):
        reach(lossy.endpoint)
        for i in range(8):
            assert storage.create_bytes(f"{bucket_url}/{i}", b"mine")
            assert not storage.create_bytes(f"{bucket_url}/{i}", b"mine")
        reach()
    assert lossy.injected > 3


# --- refusals -------------------------------------------------------------------------------------


def _list_requests(url: str) -> Iterator[Callable[[], object]]:
    """One call of each kind of request."""
    for call in (storage.read_bytes, storage.exists, storage.list_urls, storage.list_names):
        yield functools.partial(call, url)
    for write in (storage.write_bytes, storage.create_bytes):
        yield functools.partial(write, url, b"x")
    yield functools.partial(storage.read_range, url, 0, 1)
    yield functools.partial(storage.remove, url)


def test_a_wrong_secret_is_named(bucket_url: str, reach: Reach) -> None:
    url = f"{bucket_url}/key"
    reach(secret_key="another")
    for call in _list_requests(url):
        with pytest.raises(AccessError, match=f"wrong secret key: {url}; check AWS_SECRET_ACCESS"):
            call()


def test_an_unknown_key_is_named(bucket_url: str, reach: Reach) -> None:
    url = f"{bucket_url}/key"
    reach(access_key="nobody")
    for call in _list_requests(url):
        with pytest.raises(AccessError, match=f"unknown access key: {url}; check AWS_ACCESS_KEY"):
            call()


def test_a_missing_right_is_named(bucket_url: str, reach: Reach, ceph: CephServer) -> None:
    url = f"{bucket_url}/key"
    storage.write_bytes(url, b"x")
    reach(access_key=STRANGER_KEY, secret_key=STRANGER_SECRET)
    for call in _list_requests(url):
        with pytest.raises(AccessError, match=f"no right to do this: {url}; the key needs s3:Get"):
            call()


def test_an_unsigned_request_is_sent_on_request_only(
    bucket_url: str, reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket_url}/key"
    storage.write_bytes(url, b"x")
    monkeypatch.setenv(storage.ANONYMOUS, "1")
    with pytest.raises(AccessError, match="no right to do this"):
        storage.read_bytes(url)
    monkeypatch.setenv(storage.ANONYMOUS, "0")
    assert storage.read_bytes(url) == b"x"


def test_a_missing_bucket_is_named(reach: Reach) -> None:
    url = "s3://pneumo-test-none/key"
    for call in _list_requests(url):
        with pytest.raises(AccessError, match=f"no such bucket: {url}; create it first"):
            call()


_READ_WITH_A_SLOW_CLOCK = """
import datetime, sys
import botocore.auth
from pneumo import storage
from pneumo.errors import AccessError
now = botocore.auth.get_current_datetime
botocore.auth.get_current_datetime = lambda: now() - datetime.timedelta(hours=1)
try:
    storage.read_bytes(sys.argv[1])
except AccessError as error:
    print(error)
"""


def test_a_wrong_clock_is_named(bucket_url: str) -> None:
    url = f"{bucket_url}/key"
    done = subprocess.run(
        [sys.executable, "-c", _READ_WITH_A_SLOW_CLOCK, url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        f"storage: this machine's clock differs too much from the server's: {url}; set it right, "
        "by NTP for instance\n"
    )


def test_a_web_server_that_is_no_s3_server_is_named(
    reach: Reach, tmp_path: os.PathLike[str]
) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the base's name
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.05,))
        thread.start()
        try:
            reach(f"http://127.0.0.1:{web.server_address[1]}")
            for call in _list_requests("s3://bucket/key"):
                with pytest.raises(
                    AccessError, match=r"not as an S3 server does.*AWS_ENDPOINT_URL"
                ):
                    call()
        finally:
            web.shutdown()
            thread.join()


def test_an_endpoint_where_nothing_listens_is_named(reach: Reach) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reach(f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match=rf"s3://b/k: .*127\.0\.0\.1:{port}.*AWS_ENDPOINT_URL\?"):
        retried(ResumableRead(Range("s3://b/k")).resume, "s3://b/k", budget_s=2)
