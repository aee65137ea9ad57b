"""A cache of blocks: never trusted, never larger than allowed, shared by processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blake3 import blake3

from pneumo.errors import ConfigError
from pneumo.loading.block_cache import BlockCache


def make_block(number: int, size: int = 1000) -> tuple[str, bytes]:
    data = f"{number:08d}".encode() * (size // 8)
    return blake3(data).hexdigest(), data


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def make_old(folder: Path, *blocks: tuple[str, bytes], age_s: float = 1000) -> None:
    """As if the blocks had last been used long ago, each a second after the one before."""
    for i, (name, _) in enumerate(blocks):
        then_s = time.time() - age_s + i
        os.utime(folder / name, (then_s, then_s))


def test_a_block_is_found_as_it_was_kept(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "made" / "here"), 10**6)
    name, data = make_block(1)
    assert cache.find(name) is None
    cache.keep(name, data)
    cache.keep(name, data)
    assert cache.find(name) == data
    assert BlockCache(str(tmp_path / "made" / "here"), 10**6).find(name) == data
    assert [path.name for path in (tmp_path / "made" / "here").iterdir()] == [name]


@pytest.mark.parametrize("damage", [b"", b"other", b"x" * 1000])
def test_a_damaged_block_is_forgotten(tmp_path: Path, damage: bytes) -> None:
    cache = BlockCache(str(tmp_path), 10**6)
    name, data = make_block(1)
    cache.keep(name, data)
    (tmp_path / name).write_bytes(damage)
    assert cache.find(name) is None
    assert not (tmp_path / name).exists()
    cache.keep(name, data)
    assert cache.find(name) == data


def test_the_limit_is_kept_and_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    before = BlockCache(str(tmp_path), 10_000)
    blocks = [make_block(i) for i in range(9)]
    for block in blocks:
        before.keep(*block)
    make_old(tmp_path, *blocks)
    cache = BlockCache(str(tmp_path), 10_000)
    assert cache.find(blocks[0][0]) is not None  # used again
    for i in range(100, 104):
        cache.keep(*make_block(i))
        assert bytes_in(tmp_path) <= 10_000
    left = {path.name for path in tmp_path.iterdir()}
    assert blocks[0][0] in left
    assert {make_block(i)[0] for i in range(100, 104)} <= left
    survivors = [i for i in range(1, 9) if blocks[i][0] in left]
    assert survivors == list(range(9 - len(survivors), 9))
    assert len(survivors) >= 4


def test_blocks_of_this_run_are_not_thrown_out_for_others_of_it(tmp_path: Path) -> None:
    """Half of a split in the cache is half of the reads saved, in any order of the epochs."""
    cache = BlockCache(str(tmp_path), 50_000)
    blocks = [make_block(i) for i in range(100)]
    hits = []
    for epoch in range(3):
        hits.append(0)
        for name, data in sorted(blocks, key=lambda block: hash((epoch, block[0]))):
            if cache.find(name) is None:
                cache.keep(name, data)
            else:
                hits[-1] += 1
    assert hits == [0, 50, 50]


def test_a_block_that_cannot_fit_is_not_kept(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 1500)
    old, large = make_block(1), make_block(2, size=2000)
    cache.keep(*old)
    cache.keep(*large)
    assert cache.find(large[0]) is None
    assert cache.find(old[0]) == old[1]


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_bytes(b"x" * 10**6)
    (tmp_path / "folder").mkdir()
    make = BlockCache(str(tmp_path), 5000)
    blocks = [make_block(i) for i in range(5)]
    for block in blocks:
        make.keep(*block)
    make_old(tmp_path, *blocks)
    cache = BlockCache(str(tmp_path), 3000)
    cache.keep(*make_block(9))
    assert cache.find(make_block(9)[0]) is not None
    assert (tmp_path / "thesis.txt").stat().st_size == 10**6
    assert bytes_in(tmp_path) - 10**6 - (tmp_path / "folder").stat().st_size <= 3000


def test_what_a_crash_left_goes_after_an_hour(tmp_path: Path) -> None:
    stale, fresh = tmp_path / ".partial-block-1", tmp_path / ".partial-block-2"
    for path in (stale, fresh):
        path.write_bytes(b"x")
    os.utime(stale, (time.time() - 4000,) * 2)
    BlockCache(str(tmp_path), 5000).keep(*make_block(1))
    assert not stale.exists()
    assert fresh.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^data\.cache_dir: cannot write .*/file"):
        BlockCache(str(tmp_path / "file"), 1000)


def test_a_disk_that_fails_later_is_said_once_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    cache = BlockCache(str(folder), 10**6)
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            cache.keep(*make_block(i))
            assert cache.find(make_block(i)[0]) is None
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text


_PROCESS = """
import random, sys
from blake3 import blake3
from pneumo.loading.block_cache import BlockCache
cache = BlockCache(sys.argv[1], 20_000)
draw = random.Random(sys.argv[2])
for _ in range(400):
    data = f"{draw.randrange(60):08d}".encode() * 125
    name = blake3(data).hexdigest()
    found = cache.find(name)
    assert found in (None, data)
    if found is None:
        cache.keep(name, data)
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(tmp_path), str(number)])
        for number in range(4)
    ]
    while any(process.poll() is None for process in processes):
        for path in tmp_path.glob("[0-9a-f]*"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            assert blake3(data).hexdigest() == path.name
    assert [process.returncode for process in processes] == [0] * 4
    # Each counts its own writes exactly and the others' after a hundredth of the limit.
    assert 15_000 <= bytes_in(tmp_path) <= 24_000
    assert list(tmp_path.glob(".partial*")) == []
