"""What a model has seen is found in another store: patients by key, pictures by digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.overlap import find_overlap, have_one_secret
from pneumo.dataset.study_table import StudyRow, read_studies


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


def test_who_is_in_test_alone_is_not_known_to_the_model(tiny_store: Any) -> None:
    own = read(tiny_store())
    unseen = {key: row for key, row in own.items() if row.split == "test"}
    assert find_overlap(own, unseen).keys == frozenset()


def test_secrets(tmp_path: Path) -> None:
    for name, check in (("a", "1\n"), ("b", "1\n"), ("c", "2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret_check.txt").write_text(check)
    a, b, c, none = (str(tmp_path / name) for name in "abcd")
    assert have_one_secret(a, b) is True
    assert have_one_secret(a, c) is False
    assert have_one_secret(a, none) is None
