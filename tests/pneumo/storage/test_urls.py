"""What URLs are refused, and how the others are spelled."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo import storage
from pneumo.errors import ContentError, UserError


@pytest.mark.parametrize("scheme", ["pipe", "cmd", "sh", "bash", "ssh", "sftp"])
@pytest.mark.parametrize("rest", ["cat /etc/passwd", "//host/path"])
def test_a_scheme_that_runs_a_command_is_refused(scheme: str, rest: str) -> None:
    with pytest.raises(UserError, match=f"'{scheme}:' URLs are refused; use a path, file:// or s3"):
        storage.normalise(f"{scheme}:{rest}")


@pytest.mark.parametrize(
    "url", ["simplecache::sftp://host/a", "filecache::s3://b/k", "zip://a::s3://b/a.zip"]
)
def test_a_chain_of_schemes_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="chained URLs are refused"):
        storage.normalise(url)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match="unknown scheme in 's4://bucket/key'; use a path"):
        storage.normalise("s4://bucket/key")


@pytest.mark.parametrize("url", ["s3://", "s3:///", "gs://"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="names no bucket"):
        storage.normalise(url)


@pytest.mark.parametrize("url", ["s3:/bucket/key", "gs:/bucket", "file:/tmp/a", "file://tmp/a"])
def test_a_scheme_without_its_slashes_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="too few slashes"):
        storage.normalise(url)


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


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "/../a", "a/.."])
def test_join_refuses_what_leads_out(name: str) -> None:
    with pytest.raises(ContentError, match="refused a name below it"):
        storage.join("/data/runs/1", "logs", name)


def test_join_takes_an_absolute_name_below() -> None:
    assert storage.join("/data/runs/1", "/etc/passwd") == "/data/runs/1/etc/passwd"
    assert storage.join("/data", "a..b", "..c") == "/data/a..b/..c"


def test_a_file_url_may_be_percent_encoded(tmp_path: Path) -> None:
    assert storage.normalise(f"file://{tmp_path}/a%20b%25") == f"{tmp_path}/a b%"
    assert storage.normalise(f"{tmp_path}/a%20b") == f"{tmp_path}/a%20b"
