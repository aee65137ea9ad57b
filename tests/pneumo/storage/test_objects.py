"""One object or none, read and written the same way wherever it is."""

import io
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest
from blake3 import blake3

from pneumo import storage
from pneumo.errors import ContentError


def test_what_is_written_is_read(root_url: str) -> None:
    for data in (b"", b"x", bytes(range(256)) * 300):
        url = storage.join(root_url, "a", "b.bin")
        storage.write_bytes(url, data)
        assert storage.read_bytes(url) == data
    storage.write_text(url, "½ ‰")
    assert storage.read_text(url) == "½ ‰"


@pytest.mark.parametrize("root_url", ["s3", "memory"], indirect=True)
def test_an_object_is_read_as_a_file(root_url: str) -> None:
    data = bytes(range(256)) * 40_000
    url = storage.join(root_url, "a.bin")
    storage.write_bytes(url, data)
    with storage.open_object(url) as file:
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        assert file.read(1) == b""
        for start in (0, 3, 5_000_000, 4, len(data) - 1):
            file.seek(start)
            assert file.read(7) == data[start : start + 7]
        file.seek(1)
        assert file.read() == data[1:]
    with pytest.raises(FileNotFoundError):
        storage.open_object(storage.join(root_url, "no"))


def test_listings(root_url: str) -> None:
    assert storage.list_urls(root_url) == storage.list_names(root_url) == []
    for name in ("b", "a/2", "a/10", "c/d/e"):
        storage.write_bytes(storage.join(root_url, name), b"x")
    listed = storage.list_urls(root_url)
    plain = root_url.removeprefix("file://")
    assert listed == [f"{plain}/{name}" for name in ("a/10", "a/2", "b", "c/d/e")]
    assert storage.list_names(root_url) == ["a", "b", "c"]
    assert [storage.read_bytes(url) for url in listed] == [b"x"] * 4


def test_what_is_below_a_url_is_listed_and_removed_by_that_url() -> None:
    """Also where the filesystem's paths lack a part of it, as a host."""
    names = ("train/a", "train/b", "c")
    for name in names:
        storage.write_bytes(f"memory://host/{name}", b"x")
    assert storage.list_urls("memory://host/train") == [f"memory://host/{n}" for n in names[:2]]
    storage.remove_below("memory://host", only="train/.|b")
    assert storage.list_urls("memory://host") == ["memory://host/c"]
    assert storage.list_urls("memory://host/c") == []


def test_listed_names_are_names_of_the_folder_alone() -> None:
    """An object store takes any key, and each of these names becomes a path of somebody."""
    memory = fsspec.filesystem("memory")
    for key in ("b.log", "../../etc/passwd", "./x", "/y", "a/../../c"):
        memory.pipe(f"/keys/{key}", b"x")
    names = storage.list_names("memory://keys")
    assert {"a", "b.log"} <= set(names)
    assert not [name for name in names if name in ("", ".", "..") or "/" in name]


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


def test_of_many_creators_at_once_one_wins(tmp_path: Path) -> None:
    """On S3: tests/s3, as moto looks and writes in two steps."""
    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            url = f"{tmp_path}/{i}"
            won = list(pool.map(lambda n, url=url: storage.create_bytes(url, b"%d" % n), range(8)))
            assert sum(won) == 1
            assert storage.read_bytes(url) == b"%d" % won.index(True)
