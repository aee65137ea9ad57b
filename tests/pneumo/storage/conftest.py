"""Places to write for the tests of storage: a disk, memory, and moto as an S3 server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from s3fs.errors import translate_boto_error

from pneumo import storage

BUCKET = "the-bucket"
"""Its name is in the message of every missing key; that must not be read as a missing bucket."""


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No profile, no metadata service, no key; fsspec's instances are of this test alone."""
    for name in (
        *("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ENDPOINT_URL", storage.ANONYMOUS),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket_url(s3_environment: None, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket on the server, and the environment that reaches it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    server = s3fs.S3FileSystem(use_listings_cache=False)
    if server.exists(BUCKET):
        server.rm(BUCKET, recursive=True)
    server.mkdir(BUCKET)
    return f"s3://{BUCKET}"


@pytest.fixture(params=["local", "file", "s3", "memory"])
def root_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Somewhere to write, of each kind."""
    if request.param == "memory":
        return f"memory://{tmp_path}/below"
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket_url')}/below"
    return f"file://{tmp_path}/below" if request.param == "file" else str(tmp_path / "below")


def answer(code: str, status: int, operation: str = "GetObject") -> Exception:
    """What s3fs raises for a server's answer."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(response, operation))
    return error
