from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pydicom
import pytest

from jobs import prepare
from jobs.prepare import plan_shards
from pneumo.config import Config, override
from pneumo.shards import find_manifest, read_manifest, read_studies
from pneumo.splits import split_studies
from pneumo.studies import read_source
from tests.jobs.conftest import NUM_STUDIES, Prepared


def run(source: Path, store: Path, *flags: str) -> int:
    return prepare.main(
        ["--source", str(source), "--store", str(store), "--prepare.image-size", "64", *flags]
    )


def copy_source(prepared: Prepared, folder: Path) -> Path:
    return Path(shutil.copytree(prepared.source, folder / "source"))


def test_the_manifest_counts_what_lies_in_the_shards(prepared: Prepared) -> None:
    manifest = read_manifest(str(prepared.store))
    assert sum(entry.samples for entry in manifest.splits.values()) == NUM_STUDIES
    assert manifest.quarantined == 0
    assert manifest.audit.shared_patients == 0
    for entry in manifest.splits.values():
        for shard in entry.shards:
            with tarfile.open(prepared.store / shard.name) as tar:
                names = tar.getnames()
            assert sum(name.endswith(".npy") for name in names) == shard.samples
            assert sum(name.endswith(".cls") for name in names) == shard.samples


def test_targets_and_boxes_are_those_of_the_tables(prepared: Prepared) -> None:
    studies = read_studies(str(prepared.store))
    with (prepared.source / "stage_2_train_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    positives = {row["patientId"] for row in rows if row["Target"] == "1"}
    assert sum(row.target for row in studies.values()) == len(positives)
    boxes = sum(len(row.boxes) for row in studies.values())
    assert boxes == sum(row["Target"] == "1" for row in rows)
    for row in studies.values():
        for box in row.boxes:  # of 1024 pixels in the tables, of 64 in the store
            assert 0 <= box.x < box.x + box.width <= 64.01
            assert 0 <= box.y < box.y + box.height <= 64.01


def test_nothing_of_the_source_can_be_named_in_the_store(prepared: Prepared) -> None:
    identifiers: set[bytes] = set()
    for path in (prepared.source / "stage_2_train_images").glob("*.dcm"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        identifiers |= {
            path.stem.encode(),
            str(dataset.PatientID).encode(),
            str(dataset.SOPInstanceUID).encode(),
            str(dataset.StudyInstanceUID).encode(),
        }
    mapping = next(prepared.source.glob("*mappings*.json"))
    identifiers |= {row["img_id"].encode() for row in json.loads(mapping.read_text())}
    whole = b"".join(path.read_bytes() for path in prepared.store.rglob("*") if path.is_file())
    assert len(identifiers) > 3 * NUM_STUDIES
    assert [name for name in identifiers if name in whole] == []


def test_the_same_source_gives_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    source = copy_source(prepared, tmp_path)
    assert run(source, tmp_path / "again") == 0
    first, again = read_manifest(str(prepared.store)), read_manifest(str(tmp_path / "again"))
    assert first == again


def test_a_second_run_has_nothing_to_do_and_another_setting_is_refused(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (prepared.store / "manifest.json").stat().st_mtime_ns
    assert run(prepared.source, prepared.store) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert run(prepared.source, prepared.store, "--seed", "9") == 2
    assert "give another --store" in capsys.readouterr().err
    assert (prepared.store / "manifest.json").stat().st_mtime_ns == before


def test_bad_files_are_listed_with_a_reason_and_capped(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    files = sorted((source / "stage_2_train_images").glob("*.dcm"))
    files[0].write_bytes(b"")
    files[1].write_bytes(b"no DICOM" * 100)
    files[2].write_bytes(files[2].read_bytes()[:20_000])
    files[3].unlink()
    store = tmp_path / "store"
    assert run(source, store) == 1
    error = capsys.readouterr().err
    assert f"4 of {NUM_STUDIES} studies cannot be used" in error
    assert "missing 1" in error
    assert find_manifest(str(store)) is None  # nothing half-made is taken for whole
    assert run(source, store, "--prepare.max-bad-fraction", "0.1") == 0
    manifest = read_manifest(str(store))
    assert manifest.quarantined == 4
    assert sum(entry.samples for entry in manifest.splits.values()) == NUM_STUDIES - 4
    listed = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in listed)[:2] == ["missing", "no_pixels"]
    assert not any(path.stem in (store / "quarantine.jsonl").read_text() for path in files[:4])


def test_a_source_without_the_mapping_needs_a_word(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source(prepared, tmp_path)
    next(source.glob("*mappings*.json")).unlink()
    assert run(source, tmp_path / "store") == 2
    assert "--split.unit image" in capsys.readouterr().err
    assert run(source, tmp_path / "store", "--split.unit", "image") == 0
    assert "every metric will be too good" in capsys.readouterr().err
    manifest = read_manifest(str(tmp_path / "store"))
    assert manifest.audit.unit == "image"
    assert manifest.audit.leaked_by_image is None


def test_a_limit_takes_that_many(prepared: Prepared, tmp_path: Path) -> None:
    assert run(prepared.source, tmp_path / "store", "--prepare.limit", "60") == 0
    manifest = read_manifest(str(tmp_path / "store"))
    assert sum(entry.samples for entry in manifest.splits.values()) == 60


@pytest.mark.parametrize("samples_per_shard", [1, 7, 64, 1024])
def test_plans_hold_every_study_once_in_shards_of_a_size(
    prepared: Prepared, samples_per_shard: int
) -> None:
    source = read_source(str(prepared.source))
    config = override(Config(), {"prepare.samples_per_shard": samples_per_shard})
    split = split_studies(source.studies, config.split, seed=0, has_patients=True)
    plans = plan_shards(source.studies, split, config)
    keys = [study.key for plan in plans for study in plan.studies]
    assert sorted(keys) == sorted(study.key for study in source.studies)
    sizes = {len(plan.studies) for plan in plans if plan.split == "train"}
    assert max(sizes) <= samples_per_shard
    assert max(sizes) - min(sizes) <= 1
    assert all(split.by_key[study.key] == plan.split for plan in plans for study in plan.studies)
