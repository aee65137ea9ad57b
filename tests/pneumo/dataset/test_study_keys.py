"""Keys of studies and patients: they name nobody, and the secret behind them stays one."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.study_keys import derive_file_key, read_hash_key
from pneumo.errors import SourceError

FolderMaker = Callable[..., Path]

ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}


def test_keys_name_nobody_and_have_no_dots(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    source = read_source(str(folder), ENVIRON)
    for study in source.studies:
        assert re.fullmatch(r"[0-9a-f]{20}", study.key)
        assert re.fullmatch(r"[0-9a-f]{20}", study.patient)
        assert study.key != study.patient
    keys = "".join(study.key + study.patient for study in source.studies)
    for image in (folder / "stage_2_train_images").iterdir():
        assert image.stem.replace("-", "")[:8] not in keys
    assert [s.key for s in source.studies] == sorted(s.key for s in source.studies)


def test_keys_depend_on_the_secret_and_on_nothing_else(kaggle_folder: FolderMaker) -> None:
    here, there = kaggle_folder(), kaggle_folder()
    keys = [study.key for study in read_source(str(here), ENVIRON).studies]
    assert [study.key for study in read_source(str(there), ENVIRON).studies] == keys
    other = read_source(str(here), {"PNEUMO_HASH_KEY": "another"})
    assert not {study.key for study in other.studies} & set(keys)
    assert other.digest != read_source(str(here), ENVIRON).digest


def test_the_secret_in_the_environment_leaves_no_file(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    before = sorted(folder.iterdir())
    read_source(str(folder), ENVIRON)
    assert sorted(folder.iterdir()) == before


def test_the_secret_beside_the_source_is_private_and_stays(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    first = read_source(str(folder), {})
    path = folder / ".pneumo" / "hash_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert re.fullmatch(r"[0-9a-f]{64}", path.read_text())
    assert read_source(str(folder), {}) == first
    assert read_hash_key(str(kaggle_folder()), {}) != read_hash_key(str(folder), {})


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o644, True)])
def test_a_secret_that_others_can_read_is_warned_of(
    kaggle_folder: FolderMaker, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    folder = kaggle_folder(num_studies=3)
    hash_key = read_hash_key(str(folder), {})
    path = folder / ".pneumo" / "hash_key"
    path.chmod(mode)
    assert read_hash_key(str(folder), {}) == hash_key
    assert (f"{path}: mode 644: other users can read the secret" in caplog.text) == warns
    assert hash_key.decode() not in caplog.text


def test_a_secret_of_any_bytes_is_read(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder(num_studies=2)
    (folder / ".pneumo").mkdir(exist_ok=True)
    (folder / ".pneumo" / "hash_key").write_bytes(b"\xff\xfe\0")
    assert len(read_source(str(folder), {}).studies) == 2


def test_an_empty_secret_is_refused(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    (folder / ".pneumo").mkdir()
    (folder / ".pneumo" / "hash_key").write_text("\n")
    with pytest.raises(SourceError, match="hash_key: empty; delete it, or set PNEUMO_HASH_KEY"):
        read_source(str(folder), {})


def test_a_bucket_needs_the_secret_in_the_environment() -> None:
    with pytest.raises(SourceError, match="s3://b/rsna: set PNEUMO_HASH_KEY to a secret"):
        read_hash_key("s3://b/rsna", {})


def test_a_secret_that_can_be_guessed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for secret, is_short in (("x", True), ("a secret of the tests", False)):
        caplog.clear()
        assert read_hash_key("s3://b/rsna", {"PNEUMO_HASH_KEY": secret}) == secret.encode()
        assert ("take: openssl rand -hex 32" in caplog.text) is is_short


def test_a_source_that_cannot_be_written_says_how_to_go_on(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    (folder / ".pneumo").write_text("a file where the folder would be")
    with pytest.raises(SourceError, match="make it writable, or set PNEUMO_HASH_KEY to a secret"):
        read_source(str(folder), {})


def test_jobs_that_start_at_once_agree_on_the_secret(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder(num_studies=3)
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda _: read_hash_key(str(folder), {}), range(8)))
        assert len(keys) == 1
        assert [path.name for path in (folder / ".pneumo").iterdir()] == ["hash_key"]
        shutil.rmtree(folder / ".pneumo")


def test_the_secret_can_be_made_on_a_mount_without_hard_links(
    kaggle_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = kaggle_folder(num_studies=3)
    assert read_hash_key(str(folder), {}) == read_hash_key(str(folder), {})
    assert stat.S_IMODE((folder / ".pneumo" / "hash_key").stat().st_mode) == 0o600


def test_the_key_of_files_is_made_of_the_secret(kaggle_folder: FolderMaker) -> None:
    source = read_source(str(kaggle_folder()), ENVIRON)
    secret = ENVIRON["PNEUMO_HASH_KEY"].encode()
    assert source.file_key == derive_file_key(secret) != derive_file_key(secret + b"x")
    assert repr(source.file_key) not in repr(source)
