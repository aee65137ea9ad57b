"""What a model has seen is found in another store: patients by key, pictures by digest or hash."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.overlap import (
    KNOWN_PATIENTS,
    KnownStudies,
    check_secret,
    find_overlap,
    have_one_secret,
)
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.study_table import StudyRow, read_studies
from pneumo.errors import StoreError


def read(store_url: str) -> dict[str, StudyRow]:
    return read_studies(store_url, read_manifest(store_url))


def rename(studies: dict[str, StudyRow], **columns: str) -> dict[str, StudyRow]:
    """Other studies of other patients, with other pictures, unless `columns` say what stays."""
    rows = {}
    for key, row in studies.items():
        changed: dict[str, Any] = {n: f"other {getattr(row, n)}" for n in ("patient", "key")}
        changed["pixels_digest"] = f"other {row.pixels_digest}"
        changed |= {name: getattr(row, name) for name in columns}
        rows[f"other {key}"] = replace(row, **changed)
    return rows


def test_patients_and_pictures_are_found(tiny_store: Any) -> None:
    own = read(tiny_store())
    seen = [row for row in own.values() if row.split in ("train", "val")]
    assert find_overlap(own, rename(own)).keys == frozenset()
    shared = find_overlap(own, rename(own, patient="same"))
    assert len(shared.keys) == shared.of_patients == len(seen)
    assert shared.patients == len({row.patient for row in seen})
    same = find_overlap(own, rename(own, pixels_digest="same"))
    assert (same.patients, same.of_patients, same.of_pictures) == (0, 0, len(seen))


def test_pictures_that_were_saved_otherwise_are_found(tiny_store: Any) -> None:
    rng = np.random.default_rng(0)
    own = {
        k: replace(row, picture_hash=rng.bytes(32).hex()) for k, row in read(tiny_store()).items()
    }
    others = rename(own, picture_hash="same")
    seen = sum(row.split in ("train", "val") for row in own.values())
    assert find_overlap(own, others).of_pictures == seen


@pytest.mark.parametrize("column", ["pixels_digest", "picture_hash"])
def test_who_is_known_by_a_picture_alone_is_left_out_with_all_others(
    tiny_store: Any, column: str
) -> None:
    """A patient has another key in each data set whose tables number patients anew."""
    rng = np.random.default_rng(0)
    own = {
        k: replace(row, picture_hash=rng.bytes(32).hex()) for k, row in read(tiny_store()).items()
    }
    known = next(row for row in own.values() if row.split == "train")
    x, y, z = (
        replace(
            known, key=key, patient=patient, pixels_digest=key, picture_hash=rng.bytes(32).hex()
        )
        for key, patient in (("x", "Q"), ("y", "Q"), ("z", "R"))
    )
    x = replace(x, **{column: getattr(known, column)})
    found = find_overlap(own, {row.key: row for row in (x, y, z)})
    assert found.keys == {"x", "y"}
    assert (found.of_patients, found.of_pictures, found.of_their_patients) == (0, 1, 1)


def test_what_another_store_trains_on_is_left_out_of_a_source(kaggle_folder: Any) -> None:
    source = read_source(str(kaggle_folder(num_studies=30)), {"PNEUMO_HASH_KEY": "secret"})
    patients = frozenset(study.patient for study in source.studies[:5])
    left = KnownStudies(patients, frozenset(), ()).leave_out_patients(source)
    assert {study.patient for study in left.studies}.isdisjoint(patients)
    assert left.left_out[KNOWN_PATIENTS] == len(source.studies) - len(left.studies) >= 5
    assert f"{KNOWN_PATIENTS} left out" in left.summary


def test_secrets_that_differ_are_warned_of_and_of_nih_patients_refused() -> None:
    assert check_secret("s", "the run's", is_one=True, layouts=(["rsna"], ["nih"])) is None
    told = check_secret("a/s", "the run's", is_one=None, layouts=(["rsna"], ["chexpert"]))
    assert told is not None
    assert told.startswith("s may have another secret than the run's")
    with pytest.raises(StoreError, match="RSNA's patients are a part of NIH's"):
        check_secret("s", "the run's", is_one=False, layouts=(["rsna"], ["vindr", "nih"]))


def test_who_is_in_test_alone_is_not_known_to_the_model(tiny_store: Any) -> None:
    own = read(tiny_store())
    unseen = {key: row for key, row in own.items() if row.split == "test"}
    assert find_overlap(own, unseen).keys == frozenset()


def test_secrets(tmp_path: Path) -> None:
    for name, check in (("a", "1\n"), ("b", "1\n"), ("c", "2\n"), ("e", "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret_check.txt").write_text(check)
    a, b, c, none, empty = (str(tmp_path / name) for name in "abcde")
    assert have_one_secret(a, b) is True
    assert have_one_secret(a, c) is False
    assert have_one_secret(a, none) is None
    assert have_one_secret(empty, empty) is None
