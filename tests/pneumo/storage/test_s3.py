"""An S3 server: how it is reached, and what it may refuse."""

from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs

from pneumo import storage
from pneumo.errors import AccessError, UserError
from pneumo.storage.s3 import create_object
from tests.pneumo.storage.conftest import BUCKET, answer


def test_a_missing_key_is_not_a_missing_bucket(bucket_url: str) -> None:
    url = f"{bucket_url}/manifest.json"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)
    assert not storage.exists(url)
    assert storage.list_names(f"{bucket_url}/nothing") == []


def test_a_missing_bucket_is_named(bucket_url: str) -> None:
    url = "s3://another-one/key"
    with pytest.raises(AccessError, match=f"no such bucket: {url}; create it first"):
        storage.read_bytes(url)
    with pytest.raises(AccessError, match="no such bucket"):
        storage.write_bytes(url, b"x")
    with pytest.raises(AccessError, match="no such bucket"):
        storage.list_names("s3://another-one")


def test_a_profile_names_keys_and_endpoint(
    s3_environment: None,
    bucket_url: str,
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage.write_bytes(f"{bucket_url}/key", b"x")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile ward]\nendpoint_url = {s3_server}\nregion = us-east-1\n"
        "aws_access_key_id = a\naws_secret_access_key = b\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "ward")
    s3fs.S3FileSystem.clear_instance_cache()
    assert storage.read_bytes(f"{bucket_url}/key") == b"x"
    monkeypatch.setenv("AWS_PROFILE", "none")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AccessError, match=r"key: The config profile \(none\) could not be found"):
        storage.read_bytes(f"{bucket_url}/key")


def test_the_role_of_a_service_account_is_taken(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket_url}/key", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("a.service.account")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pneumo")
    s3fs.S3FileSystem.clear_instance_cache()
    assert storage.read_bytes(f"{bucket_url}/key") == b"x"


def test_an_anonymous_request_needs_no_key(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{bucket_url}/key", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3", aws_access_key_id="a", aws_secret_access_key="b").put_bucket_acl(
        Bucket=BUCKET, ACL="public-read"
    )
    monkeypatch.setenv(storage.ANONYMOUS, "1")
    assert storage.list_names(bucket_url) == ["key"]
    monkeypatch.setenv(storage.ANONYMOUS, "yes")
    with pytest.raises(UserError, match="PNEUMO_S3_ANONYMOUS=yes: expected 1 or 0"):
        storage.list_names(bucket_url)


def test_a_key_of_another_process_is_seen_after_a_listing(bucket_url: str) -> None:
    storage.write_bytes(f"{bucket_url}/early", b"x")
    assert storage.list_names(bucket_url) == ["early"]
    assert storage.list_urls(bucket_url) == [f"{bucket_url}/early"]
    assert not storage.exists(f"{bucket_url}/late")
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file(f"{BUCKET}/late", b"x")
    assert storage.list_names(bucket_url) == ["early", "late"]
    assert storage.list_urls(bucket_url) == [f"{bucket_url}/early", f"{bucket_url}/late"]
    assert storage.exists(f"{bucket_url}/late")


def test_missing_credentials_are_named(
    s3_environment: None, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for call in (storage.read_bytes, storage.list_urls, storage.exists):
        with pytest.raises(
            AccessError, match="no credentials for s3://b/k; set AWS_PROFILE or AWS"
        ):
            call("s3://b/k")


@pytest.mark.parametrize(
    ("head", "code", "status", "message"),
    [
        (400, "ExpiredToken", 400, "the session token has expired: s3://b/k; sign in again"),
        (301, "PermanentRedirect", 301, "the bucket is in another region: s3://b/k; set AWS"),
        (403, "InvalidAccessKeyId", 403, "unknown access key: s3://b/k; check AWS_ACCESS"),
    ],
)
def test_a_refusal_without_a_reason_is_asked_for_it(
    head: int, code: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_s3(fs: s3fs.S3FileSystem, method: str, **options: Any) -> None:
        if method == "head_object":  # its answer has no body
            raise answer(str(head), head, "HeadObject")
        raise answer(code, status, "ListObjectsV2")

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call_s3)
    with pytest.raises(AccessError, match=message):
        storage.exists("s3://b/k")


class _WithoutConditions:
    """An S3 filesystem whose server does not know If-None-Match."""

    def __init__(self, *, says_so: bool = True) -> None:
        self.says_so = says_so
        self.objects: dict[str, dict[str, Any]] = {}

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, key = path.split("/", 1)
        return bucket, key, None

    def call_s3(self, method: str, *, Key: str, **options: Any) -> dict[str, Any]:  # noqa: N803
        if method == "head_object":
            if Key not in self.objects:
                raise answer("404", 404, "HeadObject")
            return self.objects[Key]
        if "IfNoneMatch" in options and self.says_so:
            raise answer("NotImplemented", 501, "PutObject")
        self.objects[Key] = options
        return {}


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_without_conditions_is_asked_first(says_so: bool) -> None:
    server = _WithoutConditions(says_so=says_so)
    assert create_object(server, "bucket/key", b"first", "writer 1")
    assert not create_object(server, "bucket/key", b"second", "writer 2")
    assert server.objects["key"]["Body"] == b"first"
    assert create_object(server, "bucket/key", b"first", "writer 1"), "sent again"


def test_a_refused_creation_says_why() -> None:
    class Server(_WithoutConditions):
        def call_s3(self, method: str, **options: Any) -> dict[str, Any]:
            if method == "head_object":  # its answer has no body
                raise answer("400", 400, "HeadObject")
            raise answer("ExpiredToken", 400, "PutObject")

    with pytest.raises(OSError, match="ExpiredToken"):
        create_object(Server(), "bucket/key", b"mine", "writer 1")


def test_an_object_that_goes_before_it_is_looked_at_is_created() -> None:
    class Server(_WithoutConditions):
        refusals = 2

        def call_s3(self, method: str, *, Key: str, **options: Any) -> dict[str, Any]:  # noqa: N803
            if options.pop("IfNoneMatch", None) and self.refusals:
                self.refusals -= 1
                raise answer("PreconditionFailed", 412, "PutObject")
            return super().call_s3(method, Key=Key, **options)

    server = Server()
    assert create_object(server, "bucket/key", b"mine", "writer 1")
    assert (server.refusals, server.objects["key"]["Body"]) == (0, b"mine")
