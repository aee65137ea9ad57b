"""What is tried again, for how long, and what is told meanwhile."""

import socket
import time
import traceback
import uuid

import pytest
import s3fs
from botocore.exceptions import NoCredentialsError

from pneumo import storage
from pneumo.errors import AccessError, ContentError, StorageError, UserError
from pneumo.storage.retries import retried
from tests.pneumo.storage.conftest import BUCKET


def test_a_dead_endpoint_is_an_error_once_the_budget_is_spent(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    tried = []

    def read(fs: s3fs.S3FileSystem, path: str) -> bytes:
        tried.append(path)
        data: bytes = fs.cat_file(path)
        return data

    with pytest.raises(StorageError, match=rf"s3://b/k: .*connect.*127\.0\.0\.1:{port}"):
        retried(read, "s3://b/k", budget_s=2)
    assert len(tried) > 1


SECRET = "5e1f5e1f-0000-4000-8000-000000000000"


def test_a_label_stands_for_a_url_that_names_a_patient(
    s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://b/{SECRET}.dcm"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(AccessError, match="no credentials for study 17; set AWS") as refused:
        storage.read_bytes(url, label="study 17")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    s3fs.S3FileSystem.clear_instance_cache()
    # botocore's own words quote the whole URL of the request.
    with pytest.raises(StorageError, match=f"{SECRET}"):
        retried(lambda fs, path: fs.cat_file(path), url, budget_s=0.1)
    with pytest.raises(StorageError, match=r"study 17: EndpointConnectionError; tried") as failed:
        retried(lambda fs, path: fs.cat_file(path), url, budget_s=0.1, label="study 17")
    for caught in (refused, failed):
        # As --debug and Ray would print it.
        assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.slow
def test_what_is_said_while_trying_again_tells_the_label(caplog: pytest.LogCaptureFixture) -> None:
    started_s = time.monotonic()

    def read(fs: object, path: str) -> bytes:
        if not caplog.records:
            assert time.monotonic() - started_s < 100, "in 100 s nothing is said"
            raise ConnectionError(f"cannot connect to https://host/b/{SECRET}")
        return b"data"

    assert retried(read, f"memory://{SECRET}", label="study 17") == b"data"
    assert "storage: study 17: ConnectionError; trying again for" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("url", [f"s3://{BUCKET}/{SECRET}", f"memory://{SECRET}", f"/{SECRET}"])
def test_no_refusal_of_a_labelled_read_tells_the_url(bucket_url: str, url: str) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        storage.read_bytes(url, label="study 17")
    assert SECRET not in repr(missing.value)
    assert missing.value.filename == "study 17"
    assert SECRET not in "".join(traceback.format_exception(missing.value)) or "://" not in url


def test_other_bytes_than_expected_are_refused_by_label(bucket_url: str) -> None:
    url = f"{bucket_url}/{SECRET}"
    storage.write_bytes(url, b"0123456789")
    for options in ({"size": 11}, {"sha256": "0" * 64}):
        with pytest.raises(ContentError, match="storage: study 17: ") as caught:
            storage.read_bytes(url, label="study 17", **options)
        assert SECRET not in str(caught.value)


def test_passing_trouble_is_tried_again() -> None:
    answers: list[bytes | Exception] = [OSError("reset"), TimeoutError(), b"data"]

    def read(fs: object, path: str) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retried(read, "memory://a", budget_s=30.0) == b"data"


def test_credentials_that_were_had_once_are_looked_for_again() -> None:
    """As of a metadata service that is overloaded for a moment."""
    url, answers = f"s3://{uuid.uuid4().hex}/key", [1, NoCredentialsError(), 2]

    def read(fs: object, path: str) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert [retried(read, url, budget_s=30.0) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (PermissionError("Forbidden"), AccessError),
        (FileNotFoundError("bucket/key"), FileNotFoundError),
        (ValueError("bad"), StorageError),
        (AssertionError(), StorageError),
        (NotImplementedError(), StorageError),
        (ImportError("Please install gcsfs to access Google Storage"), UserError),
    ],
)
def test_permanent_trouble_is_not_tried_again(trouble: Exception, error: type[Exception]) -> None:
    tried = []

    def read(fs: object, path: str) -> bytes:
        tried.append(path)
        raise trouble

    with pytest.raises(error):
        retried(read, "memory://a", budget_s=30.0)
    assert len(tried) == 1


def test_a_read_that_gets_on_is_given_more_time() -> None:
    received = 0

    def read(fs: object, path: str) -> str:
        nonlocal received
        received += 2**20
        if received < 10 * 2**20:  # of 0.2 s each, on average
            raise ConnectionError("cut")
        return "all of it"

    assert retried(read, "memory://a", 1.0, progress=lambda: received) == "all of it"
    with pytest.raises(StorageError, match="memory://a: cut; tried again for 1 s"):
        retried(lambda fs, path: _raise(ConnectionError("cut")), "memory://a", 1.0)


def _raise(error: Exception) -> None:
    raise error
