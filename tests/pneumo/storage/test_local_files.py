"""Files of this machine: whole or absent, after a crash and on any mount."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumo import storage
from pneumo.errors import AccessError, StorageError
from tests.conftest import without_root


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_a_local_object_is_replaced_whole(tmp_path: Path, first: bytes, second: bytes) -> None:
    url = str(tmp_path / "object")
    storage.write_bytes(url, first)
    storage.write_bytes(url, second)
    assert storage.read_bytes(url) == second
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


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


def test_a_folder_that_may_not_be_listed_is_named(folder_without_root: Path) -> None:
    folder = folder_without_root / "folder"
    folder.mkdir(mode=0)
    with without_root(folder_without_root):
        for call in (storage.list_names, storage.exists, storage.list_urls):
            with pytest.raises(AccessError, match=f"cannot list {folder}: Permission denied"):
                call(str(folder))
        with pytest.raises(AccessError, match=f"cannot list {folder}: Permission denied"):
            storage.list_urls(str(folder_without_root))


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
    fsync, lost = os.fsync, list[int]()

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


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AccessError, match=r"cannot write .*file"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_applies_to_what_is_written(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        storage.write_bytes(str(tmp_path / "object"), b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "object").stat().st_mode) == 0o666 & ~umask


def test_everything_is_listed_and_links_to_folders_are_entered(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    (source / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (source / "deep" / "a").write_bytes(b"")
    (elsewhere / "b").write_bytes(b"")
    (source / "linked").symlink_to(elsewhere)
    (source / "broken").symlink_to(tmp_path / "nowhere")
    (source / "itself").symlink_to("itself")
    (source / "deep" / "up").symlink_to(source)
    os.mkfifo(source / "pipe")
    found = [url.removeprefix(f"{source}/") for url in storage.list_everything(str(source))]
    assert found == ["broken", "deep/a", "deep/up", "itself", "linked/b", "pipe"]
