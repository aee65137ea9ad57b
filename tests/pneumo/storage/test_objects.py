"""One object or none: on a disk, on an S3 server, after a crash, and when nobody answers."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
from blake3 import blake3
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from s3fs.errors import translate_boto_error

from pneumo import storage
from pneumo.errors import AccessError, ContentError, StorageError, UserError
from pneumo.storage.failures import permanent_error
from pneumo.storage.retries import retried
from pneumo.storage.s3 import create_object

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


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["pipe", "cmd", "sh", "bash", "ssh", "sftp"])
@pytest.mark.parametrize("rest", ["cat /etc/passwd", "//host/path"])
def test_a_scheme_that_runs_a_command_is_refused(scheme: str, rest: str) -> None:
    with pytest.raises(UserError, match=f"'{scheme}:' URLs are refused; use a path, file:// or s3"):
        storage.normalise(f"{scheme}:{rest}")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match="unknown scheme in 's4://bucket/key'; use a path"):
        storage.normalise("s4://bucket/key")


def test_a_local_url_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.normalise("runs/one/") == f"{tmp_path}/runs/one"
    assert storage.normalise(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    assert storage.normalise("~/a") == f"{tmp_path}/a"
    assert storage.normalise("s3://bucket/a/") == "s3://bucket/a"


names = st.text("abc", min_size=1)


@given(names, st.lists(names.map(lambda name: f"/{name}/"), max_size=3))
def test_join_puts_one_slash_between_parts(base: str, parts: list[str]) -> None:
    joined = storage.join(f"s3://{base}/", *parts)
    assert joined == "s3://" + "/".join([base, *(part.strip("/") for part in parts)])
    assert storage.join(f"s3://{base}", *parts) == joined


# --- reading and writing, wherever it is ----------------------------------------------------------


def test_what_is_written_is_read(root_url: str) -> None:
    for data in (b"", b"x", bytes(range(256)) * 300):
        url = storage.join(root_url, "a", "b.bin")
        storage.write_bytes(url, data)
        assert storage.read_bytes(url) == data
    storage.write_text(url, "½ ‰")
    assert storage.read_text(url) == "½ ‰"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_a_local_object_is_replaced_whole(tmp_path: Path, first: bytes, second: bytes) -> None:
    url = str(tmp_path / "object")
    storage.write_bytes(url, first)
    storage.write_bytes(url, second)
    assert storage.read_bytes(url) == second
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_listings(root_url: str) -> None:
    assert storage.list_urls(root_url) == storage.list_names(root_url) == []
    for name in ("b", "a/2", "a/10", "c/d/e"):
        storage.write_bytes(storage.join(root_url, name), b"x")
    listed = storage.list_urls(root_url)
    plain = root_url.removeprefix("file://")
    assert listed == [f"{plain}/{name}" for name in ("a/10", "a/2", "b", "c/d/e")]
    assert storage.list_names(root_url) == ["a", "b", "c"]
    assert [storage.read_bytes(url) for url in listed] == [b"x"] * 4


def test_existence_and_removal(root_url: str) -> None:
    url = storage.join(root_url, "a", "b")
    assert not storage.exists(url)
    storage.remove(url)
    storage.write_bytes(url, b"x")
    assert storage.exists(url)
    assert storage.exists(storage.join(root_url, "a"))
    storage.remove(url)
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_an_empty_folder_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert not storage.exists(str(folder))
    (folder / ".partial-x").write_bytes(b"half")
    assert not storage.exists(str(folder))
    (folder / "object").write_bytes(b"")
    assert storage.exists(str(folder))


def test_links_are_followed_to_files_and_never_in_circles(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "object").write_bytes(b"x")
    (tmp_path / "folder" / "back").symlink_to(tmp_path)
    (tmp_path / "to-object").symlink_to(tmp_path / "folder" / "object")
    (tmp_path / "to-itself").symlink_to(tmp_path / "to-itself")
    (tmp_path / "to-nothing").symlink_to(tmp_path / "nothing")
    assert storage.list_names(str(tmp_path)) == ["folder", "to-object"]
    names = ["folder/object", "to-object"]
    assert storage.list_urls(str(tmp_path)) == [f"{tmp_path}/{name}" for name in names]
    assert storage.list_names(str(tmp_path / "to-object")) == []


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        for call in (storage.list_names, storage.exists, storage.list_urls):
            with pytest.raises(AccessError, match=f"cannot list {folder}: Permission denied"):
                call(str(folder))
        with pytest.raises(AccessError, match=f"cannot list {folder}: Permission denied"):
            storage.list_urls(str(tmp_path))
    finally:
        os.seteuid(user)


def test_a_folder_is_uploaded_by_relative_name(root_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "from"
    (folder / "deep").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "deep" / "two").write_bytes(b"2")
    storage.upload_folder(folder, root_url)
    assert storage.read_bytes(storage.join(root_url, "one")) == b"1"
    assert storage.read_bytes(storage.join(root_url, "deep/two")) == b"2"
    assert len(storage.list_urls(root_url)) == 2


def test_a_range_is_exact_or_an_error(root_url: str) -> None:
    data = bytes(range(256)) * 20
    url = storage.join(root_url, "object")
    storage.write_bytes(url, data)
    for start, length in ((0, 1), (17, 4_000), (5_119, 1), (0, 5_120), (9, 0)):
        assert storage.read_range(url, start, length) == data[start : start + length]
    with pytest.raises(ContentError, match=r"object: ends at byte \d+; bytes 5119 to 5120 were"):
        storage.read_range(url, 5_119, 2)
    with pytest.raises(ContentError, match=r"object: ends at byte \d+; bytes 6000 to 6001 were"):
        storage.read_range(url, 6_000, 2)
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read_range(storage.join(root_url, "none"), 0, 1)


def test_other_bytes_than_expected_are_refused(root_url: str) -> None:
    url = storage.join(root_url, "object")
    storage.write_bytes(url, b"0123456789")
    digest, part = sha256(b"0123456789").hexdigest(), blake3(b"345").hexdigest()
    assert storage.read_bytes(url, sha256=digest, size=10) == b"0123456789"
    assert storage.read_range(url, 3, 3, blake3=part) == b"345"
    with pytest.raises(ContentError, match="object: 10 bytes, expected 11"):
        storage.read_bytes(url, sha256=digest, size=11)
    with pytest.raises(ContentError, match=f"object: changed or damaged: digest {digest}, expect"):
        storage.read_bytes(url, sha256=part)
    with pytest.raises(ContentError, match="object, bytes 3 to 5: changed or damaged"):
        storage.read_range(url, 3, 3, blake3=digest)


def test_what_is_created_replaces_nothing(root_url: str) -> None:
    url = storage.join(root_url, "deep", "object")
    assert storage.create_bytes(url, b"first")
    assert not storage.create_bytes(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert storage.list_names(storage.join(root_url, "deep")) == ["object"]


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def without_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder lies on a mount that has no hard links."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


def test_a_mount_without_links_takes_what_is_created(without_links: None, tmp_path: Path) -> None:
    url = str(tmp_path / "object")
    assert storage.create_bytes(url, b"first", mode=0o600)
    assert not storage.create_bytes(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert stat.S_IMODE((tmp_path / "object").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["object"]
    with ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(lambda n: storage.create_bytes(f"{url}-2", b"%d" % n * 10_000), range(8))
        )
    assert sum(won) == 1
    assert storage.read_bytes(f"{url}-2") == b"%d" % won.index(True) * 10_000


def test_another_failure_to_link_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match=r"cannot write .*object: the disk is broken"):
        storage.create_bytes(str(tmp_path / "object"), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_many_creators_at_once_one_wins(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root_url = request.getfixturevalue("bucket_url") if kind == "s3" else str(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            url = f"{root_url}/{i}"
            won = list(pool.map(lambda n, url=url: storage.create_bytes(url, b"%d" % n), range(8)))
            assert sum(won) == 1
            assert storage.read_bytes(url) == b"%d" % won.index(True)


# --- crashes --------------------------------------------------------------------------------------

_WRITE_FOR_EVER = """
import sys
from pneumo import storage
data = [bytes([i]) * 30_000_000 for i in (1, 2)]
for i in range(10**6):
    storage.write_bytes(sys.argv[1], data[i % 2])
    print(i, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_object(tmp_path: Path) -> None:
    url = str(tmp_path / "folder" / "object")
    for delay in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITE_FOR_EVER, url], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(delay + 1):
            assert writer.stdout.readline()
        writer.kill()
        writer.communicate()
        data = storage.read_bytes(url)
        assert len(data) == 30_000_000
        assert len(set(data)) == 1


_HANG_WHILE_WRITING = """
import os, sys
from pneumo import storage
def never_return(descriptor):
    print("begun", flush=True)
    sys.stdin.read()
os.fsync = never_return  # a disk that hangs, so that the kill comes in the middle
storage.write_bytes(sys.argv[1], b"half")
"""


def test_what_a_killed_writer_leaves_is_no_object(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _HANG_WHILE_WRITING, str(tmp_path / "object")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begun\n"
    writer.kill()
    writer.communicate()
    assert len(list(tmp_path.iterdir())) == 1, "the crash was to leave something"
    assert storage.list_urls(str(tmp_path)) == []
    assert storage.list_names(str(tmp_path)) == []
    assert not storage.exists(str(tmp_path / "object"))
    storage.upload_folder(tmp_path, str(tmp_path.parent / "copy"))
    assert storage.list_urls(str(tmp_path.parent / "copy")) == []


def test_several_remove_the_same_folder_at_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            for number in range(20):
                storage.write_text(str(root / f"{number % 5}" / f"{number}" / "object"), "x")
            removals = [pool.submit(storage.remove_below, str(root)) for _ in range(4)]
            for removal in removals:
                removal.result()
            assert not root.exists()


def test_what_killed_writers_leave_is_cleared(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "below", tmp_path / "below" / "deep"):
        folder.mkdir(exist_ok=True)
        (folder / ".partial-abc").write_bytes(b"half")
    (tmp_path / "object").write_bytes(b"x")
    storage.remove_partials(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "object"]
    storage.remove_below(str(tmp_path / "below"))
    assert [path.name for path in tmp_path.iterdir()] == ["object"]
    storage.remove_partials("memory://nothing/is/left")


@pytest.mark.parametrize("write", [storage.write_bytes, storage.create_bytes])
def test_a_writer_whose_unfinished_file_is_cleared_away_writes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[str, bytes], object]
) -> None:
    folder = tmp_path / "folder"
    fsync, lost = os.fsync, []

    def lose(descriptor: int) -> None:
        fsync(descriptor)
        if len(lost) < 3:
            lost.append(1)
            storage.remove_below(str(folder))

    monkeypatch.setattr(os, "fsync", lose)
    write(str(folder / "object"), b"data")
    assert len(lost) == 3
    assert storage.read_bytes(str(folder / "object")) == b"data"
    lost.clear()
    monkeypatch.setattr(os, "fsync", lambda _: storage.remove_below(str(folder)))
    with pytest.raises(StorageError, match=r"cannot write .*object2: No such file"):
        write(str(folder / "object2"), b"data")


def test_a_write_that_fails_leaves_nothing_and_the_old_object_stays(tmp_path: Path) -> None:
    url = str(tmp_path / "object")
    storage.write_bytes(url, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(url, "text")  # type: ignore[arg-type]
    assert storage.read_bytes(url) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


# --- an object store that refuses -----------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AccessError, match=r"cannot write .*file"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


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
        retried(read, "s3://b/k", budget_s=5)
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
            assert time.monotonic() - started_s < 60
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


def test_a_scheme_whose_package_is_missing_says_what_to_install() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=r"gs://b/k: .*install gcsfs.*, on every node") as caught:
        storage.read_bytes("gs://b/k")
    assert caught.value.exit_code == 2


def _answer(code: str, status: int, operation: str = "GetObject") -> Exception:
    """What s3fs raises for a server's answer."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(response, operation))
    return error


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("NoSuchBucket", 404, "no such bucket: s3://b/k; create it first"),
        ("AccessDenied", 403, "no right to do this: s3://b/k; the key needs s3:GetObject"),
        ("InvalidAccessKeyId", 403, "unknown access key: s3://b/k; check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "wrong secret key: s3://b/k; check AWS_SECRET_ACCESS_KEY"),
        ("RequestTimeTooSkewed", 403, "clock differs too much from the server's: s3://b/k; set"),
        ("ExpiredToken", 400, "session token has expired: s3://b/k; sign in again"),
        ("PermanentRedirect", 301, "in another region: s3://b/k; set AWS_DEFAULT_REGION"),
        ("InvalidObjectState", 403, "access to s3://b/k refused: InvalidObjectState"),
        ("404", 404, r"s3://b/k: .* not as an S3 server does \(HTTP 404\); check AWS_ENDPOINT_URL"),
        ("403", 403, r"s3://b/k: .* not as an S3 server does \(HTTP 403\); check AWS_ENDPOINT_URL"),
    ],
)
def test_a_refusal_says_which_and_what_to_do(code: str, status: int, message: str) -> None:
    permanent = permanent_error(_answer(code, status), "s3://b/k")
    assert isinstance(permanent, AccessError)
    assert re.search(message, str(permanent))


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, None),
        ("InternalError", 500, None),
        ("502", 502, None),
        ("RequestTimeout", 400, None),
        ("BadDigest", 400, None),
        ("429", 429, None),
        ("NoSuchKey", 404, FileNotFoundError),
        ("EntityTooLarge", 400, StorageError),
        ("KeyTooLongError", 400, StorageError),
        ("NotImplemented", 501, StorageError),
    ],
)
def test_only_what_may_pass_is_waited_for(
    code: str, status: int, kind: type[Exception] | None
) -> None:
    permanent = permanent_error(_answer(code, status), "s3://b/k")
    assert permanent is None if kind is None else type(permanent) is kind


class _WithoutConditions:
    """An S3 filesystem whose server does not know If-None-Match."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, key = path.split("/", 1)
        return bucket, key, None

    def call_s3(self, method: str, *, Key: str, **options: Any) -> dict[str, Any]:  # noqa: N803
        if method == "head_object":
            if Key not in self.objects:
                raise _answer("404", 404, "HeadObject")
            return self.objects[Key]
        if "IfNoneMatch" in options:
            raise _answer("NotImplemented", 501, "PutObject")
        self.objects[Key] = options
        return {}


def test_a_server_without_conditions_is_asked_first() -> None:
    server = _WithoutConditions()
    assert create_object(server, "bucket/key", b"first", "writer 1")
    assert not create_object(server, "bucket/key", b"second", "writer 2")
    assert server.objects["key"]["Body"] == b"first"
    assert create_object(server, "bucket/key", b"first", "writer 1"), "sent again"


def test_a_read_that_gets_on_is_given_more_time() -> None:
    received = 0

    def read(fs: object, path: str) -> str:
        nonlocal received
        received += 2**20
        if received < 30 * 2**20:
            raise ConnectionError("cut")
        return "all of it"

    assert retried(read, "memory://a", 1.0, progress=lambda: received) == "all of it"
    with pytest.raises(StorageError, match="memory://a: cut; tried again for 1 s"):
        retried(lambda fs, path: _raise(ConnectionError("cut")), "memory://a", 1.0)


def _raise(error: Exception) -> None:
    raise error
