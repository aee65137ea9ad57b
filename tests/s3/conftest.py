"""A real S3 server, when there is one, and a bucket on it for each test."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from tests.s3 import server
from tests.s3.server import CephServer

Reach = Callable[..., None]


@pytest.fixture(scope="session")
def endpoint() -> str:
    """The server of `make test-s3`, or the one that the environment names."""
    named = os.environ.get(server.ENDPOINT)
    if not named:
        pytest.skip(f"no S3 server: `make test-s3` starts one, or set {server.ENDPOINT}")
    return named


@pytest.fixture(scope="session")
def ceph(endpoint: str) -> CephServer:
    """The server, for tests that kill and restart it; skips with a server that we did not start."""
    folder = os.environ.get(server.FOLDER)
    if not folder:
        pytest.skip(f"the server of {server.ENDPOINT} is not ours to kill or to add users to")
    return CephServer(Path(folder))


@pytest.fixture
def reach(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reach]:
    """Send this test's requests to another endpoint, or sign them with another key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)

    def reach(
        url: str = endpoint, access_key: str | None = None, secret_key: str | None = None
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        if access_key:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
        if secret_key:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        # fsspec keeps a filesystem for the process, with the environment that it met first.
        s3fs.S3FileSystem.clear_instance_cache()

    reach()
    yield reach
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket_url(reach: Reach) -> Iterator[str]:
    """An empty bucket, removed with all that is in it."""
    bucket = f"pneumo-test-{uuid.uuid4().hex[:12]}"
    fs = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        key=os.environ["AWS_ACCESS_KEY_ID"],
        secret=os.environ["AWS_SECRET_ACCESS_KEY"],
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    fs.mkdir(bucket)
    yield f"s3://{bucket}"
    for page in _pages(fs, bucket):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
    with contextlib.suppress(FileNotFoundError):  # an answer that came late: deleted already
        fs.rmdir(bucket)


def _pages(fs: s3fs.S3FileSystem, bucket: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The bucket's listing, from its beginning while something is there."""
    while page := fs.call_s3("list_objects_v2", Bucket=bucket):
        yield page
        if not page.get("Contents"):
            return
