"""Members of archives: each archive is opened once, and of a bucket's only parts are read."""

import gc
import io
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pneumo import storage
from pneumo.images.dicom_files import UnusableFile, read_files
from pneumo.images.packed_files import list_members, read_member


class Counted(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory; the length of each download is noted."""

    protocol = "counted-zips"
    downloads: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("counted-zips://")))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, **kwargs)
        self.downloads.append(len(data))
        return data


fsspec.register_implementation("counted-zips", Counted)


@pytest.fixture
def counted(tmp_path: Path) -> str:
    Counted.downloads.clear()
    return f"counted-zips://{tmp_path}"


def pack(names: list[str], content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content or name)
    return buffer.getvalue()


def read(urls: list[str]) -> list[bytes | UnusableFile]:
    return list(read_files([(url, "a file") for url in urls]))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_small_archives_of_a_bucket_are_downloaded_once(counted: str) -> None:
    names = [f"{i}.png" for i in range(8)]
    archives = [f"{counted}/{name}.zip" for name in "ab"]
    for url in archives:
        storage.write_bytes(url, pack(names))
    members = [f"{url}!/{name}" for url in archives for name in names]
    assert read(members) == [name.encode() for name in names] * 2
    assert len(Counted.downloads) == 2
    assert [member for url in archives for member in list_members(url)] == members
    assert len(Counted.downloads) == 2


def test_an_archive_of_a_bucket_is_never_in_memory(counted: str) -> None:
    large = np.random.default_rng(0).bytes(6_000_000)
    url = f"{counted}/large.zip"
    storage.write_bytes(url, pack([f"{i}.png" for i in range(5)], large))
    assert read_member(list_members(url)[1]) == large
    assert sum(Counted.downloads) < 12_000_000


def test_archives_that_take_turns_are_read_by_many_threads(counted: str, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(40)]
    urls = []
    for number in range(5):
        for root in (counted, str(tmp_path)):
            archive_url = f"{root}/{number}.zip"
            storage.write_bytes(archive_url, pack(names, bytes([number]) * 5000))
            urls += [f"{archive_url}!/{name}" for name in names]
    turns = [urls[i::40] for i in range(40)]
    for turn in turns[:10]:
        assert read(turn) == [bytes([i // 2]) * 5000 for i in range(10)]


def test_the_members_of_a_large_archive_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(2000)]
    archive = tmp_path / "a.zip"
    archive.write_bytes(pack(names))
    opened: list[Any] = []
    whole = zipfile.ZipFile.__init__

    def note(self: zipfile.ZipFile, *args: Any, **kwargs: Any) -> None:
        opened.append(args)
        whole(self, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", note)
    assert read(list_members(str(archive))) == [name.encode() for name in sorted(names)]
    assert len(opened) == 1


def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    for content in (b"old", b"new"):
        storage.write_bytes(str(archive), pack(["b.png"], content))
        assert read_member(f"{archive}!/b.png") == content
    archive.unlink()
    with pytest.raises(FileNotFoundError):
        read_member(f"{archive}!/b.png")


def test_few_archives_stay_open(tmp_path: Path) -> None:
    gc.collect()
    before = open_files()
    for number in range(20):
        storage.write_bytes(f"{tmp_path}/{number}.zip", pack(["a.png"]))
        assert read_member(f"{tmp_path}/{number}.zip!/a.png") == b"a.png"
    assert open_files() <= before + 2
