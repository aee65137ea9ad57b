"""A named split hangs on the NIH patient number alone, and is the one that was written down."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pneumo.config import NUM_SALTS, SplitConfig
from pneumo.dataset.named_splits import NAMED_SPLITS, SALT, assign_patient
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import find_published
from pneumo.errors import SourceError


def test_it_never_changes() -> None:
    drawn = [assign_patient("rsna-v1", f"{number:08d}") for number in range(1, 13)]
    assert drawn == EXPECTED
    assert [assign_patient("nih-v1", f"{number:08d}") for number in range(1, 13)] == drawn


EXPECTED = ["val", "test", "train", "test", "train", "val", "train", "train", "test", "train"]
EXPECTED += ["train", "val"]


@pytest.mark.parametrize("patient", [None, "p1", "123", "123456789"])
def test_who_has_no_nih_number_is_refused(patient: str | None) -> None:
    with pytest.raises(SourceError, match="not an NIH number of eight digits"):
        assign_patient("rsna-v1", patient)


def test_it_hangs_on_no_secret(kaggle_folder: object) -> None:
    folder = str(kaggle_folder(num_studies=60))  # type: ignore[operator]
    places = []
    for secret in ("one", "two"):
        source = read_source(folder, {"PNEUMO_HASH_KEY": secret}, named_split="rsna-v1")
        by_key = find_published(source, SplitConfig(named="rsna-v1"), seed=0)
        assert by_key is not None
        places.append({study.url: by_key[study.key] for study in source.studies})
    assert places[0] == places[1]
    assert {*places[0].values()} == {"train", "val", "test"}


def test_it_needs_the_mapping(kaggle_folder: object) -> None:
    folder = str(kaggle_folder(mapping=False))  # type: ignore[operator]
    with pytest.raises(SourceError, match="it needs the mapping file"):
        read_source(folder, {"PNEUMO_HASH_KEY": "one"}, named_split="rsna-v1")


@pytest.mark.parametrize("setting", [{"list": "a.csv"}, {"salt": 1}, {"val_fraction": 0.2}])
def test_a_setting_that_would_have_no_effect_is_refused(setting: dict[str, object]) -> None:
    for name in NAMED_SPLITS:
        with pytest.raises(ValueError, match="no effect"):
            SplitConfig.model_validate({"named": name, **setting})


@pytest.mark.slow
def test_the_salt_is_the_best_balanced_on_all_of_rsna(shared_data: Path) -> None:
    """By the counts of findings, views, sexes and age bands in val and test: the salt whose worst
    deviates least from 15 %."""
    patients, features = _read_rsna(shared_data / "rsna-metadata")
    worst = []
    for salt in range(NUM_SALTS):
        place = {p: assign_patient("rsna-v1", p, salt) for p in {*patients}}
        split = np.array([place[p] for p in patients])
        fractions = [features[split == s].sum(axis=0) / features.sum(axis=0) for s in TESTED]
        worst.append(float(np.abs(np.array(fractions) / 0.15 - 1).max()))
    assert int(np.argmin(worst)) == SALT


def test_the_counts_of_all_of_rsna_are_those_of_the_docs(shared_data: Path) -> None:
    patients, _ = _read_rsna(shared_data / "rsna-metadata")
    place = {p: assign_patient("rsna-v1", p) for p in {*patients}}
    own, studies = Counter(place.values()), Counter(place[p] for p in patients)
    told = (Path(__file__).parents[3] / "docs" / "benchmark.md").read_text()
    for split in ("train", "val", "test"):
        assert f"| {split} | {own[split]:,} | {studies[split]:,} |" in told


TESTED = ("val", "test")


def _read_rsna(folder: Path) -> tuple[list[str], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    def rows(name: str) -> list[dict[str, str]]:
        with gzip.open(folder / name, "rt") as file:
            return list(csv.DictReader(file))

    headers = {row["PatientID"]: row for row in rows("dicom_headers.csv.gz")}
    findings = {
        row["patientId"]: row["class"] for row in rows("stage_2_detailed_class_info.csv.gz")
    }
    with gzip.open(folder / "pneumonia-challenge-dataset-mappings_2018.json.gz") as file:
        patients = {r["subset_img_id"]: r["img_id"].split("_")[0] for r in json.load(file)}
    counted = []
    for image_id, finding in findings.items():
        row, age = headers[image_id], int(headers[image_id]["PatientAge"])
        band = sum(age >= first for first in (18, 40, 60)) if age <= 120 else -1
        values = [finding == name for name in sorted({*findings.values()})]
        values += [row["ViewPosition"] == view for view in ("AP", "PA")]
        values += [row["PatientSex"] == sex for sex in ("F", "M")]
        counted.append([True, *values, *(band == number for number in range(4))])
    return [patients[image_id] for image_id in findings], np.array(counted, np.float64)
