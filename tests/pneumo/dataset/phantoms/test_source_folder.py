"""The phantoms' folder is Kaggle's to the quirk, the same from the same seed, and never half."""

import csv
import json
import subprocess
import sys
import uuid
from collections import Counter, defaultdict

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo.dataset.phantoms.drawing import render_study
from pneumo.dataset.phantoms.population import draw_population
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.errors import SourceError
from pneumo.synthetic import main
from tests.examples import examples

FINDINGS = {"Lung Opacity", "No Lung Opacity / Not Normal", "Normal"}
NUM_STUDIES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "kaggle"
    assert write_phantoms(out, num_studies=NUM_STUDIES, seed=3, num_processes=1)
    return out


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_cli(*arguments):
    command = [sys.executable, "-m", "pneumo.synthetic", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- the population


@given(seed=st.integers(0, 2**32), num_studies=st.integers(1, 300))
@examples(25)
def test_population_keeps_its_promises_at_any_size(seed, num_studies):
    studies = draw_population(num_studies, seed)
    assert len(studies) == num_studies == len({s.name for s in studies})
    assert [s.name for s in studies] == sorted(s.name for s in studies)
    findings = Counter(s.finding for s in studies)
    assert abs(findings["Lung Opacity"] - 0.225 * num_studies) <= 1
    assert abs(findings["Normal"] - 0.332 * num_studies) <= 1
    if num_studies >= 3:
        assert set(findings) == FINDINGS
    if num_studies >= 2:
        assert max(Counter(s.patient for s in studies).values()) >= 2
    assert all(1 <= s.age <= 90 or 148 <= s.age <= 155 for s in studies)
    assert all(uuid.UUID(s.name).version == 4 for s in studies)


def test_population_has_the_shares_of_the_real_one():
    studies = draw_population(4000, seed=1)
    patients = Counter(s.patient for s in studies)
    assert 1.9 < len(studies) / len(patients) < 2.8
    assert max(patients.values()) > 15
    positive = defaultdict(list)
    for s in studies:
        positive[s.view].append(s.positive)
    assert np.mean(positive["AP"]) == pytest.approx(0.38, abs=0.04)
    assert np.mean(positive["PA"]) == pytest.approx(0.09, abs=0.03)
    assert np.mean([s.sex == "M" for s in studies]) == pytest.approx(0.57, abs=0.06)
    assert 0 < sum(s.age > 90 for s in studies) < 0.03 * len(studies)
    # Unlike the real names, these say nothing about the label.
    low = [s.positive for s in studies if s.name < "8"]
    high = [s.positive for s in studies if s.name >= "8"]
    assert np.mean(low) == pytest.approx(np.mean(high), abs=0.05)


def test_a_patients_studies_share_sex_and_age_but_not_the_picture():
    studies = [s for s in draw_population(20, seed=0) if s.patient == 0]
    assert len(studies) >= 2
    assert len({s.sex for s in studies}) == 1
    ages = [s.age for s in studies if s.age <= 90]
    assert max(ages) - min(ages) <= len(studies) // 3
    first, second = (render_study(s)[0] for s in studies[:2])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("num_studies", "seed"), [(0, 0), (-1, 0), (5, -1)])
def test_population_refuses_impossible_arguments(num_studies, seed):
    with pytest.raises(ValueError, match="expected >= 1 and >= 0"):
        draw_population(num_studies, seed)


# --- the pictures


@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_boxes_hold_the_opacity_and_nothing_else_changes(seed):
    study = next(s for s in draw_population(6, seed) if s.positive)
    pixels, boxes = render_study(study)
    clear, no_boxes = render_study(study, with_opacity=False)
    assert pixels.shape == (1024, 1024)
    assert pixels.dtype == np.uint8
    assert not no_boxes
    assert 1 <= len(boxes) <= 4
    gain = pixels.astype(int) - clear
    inside = np.zeros(gain.shape, bool)
    for b in boxes:
        assert b.x >= 0
        assert b.y >= 0
        assert min(b.width, b.height) >= 20
        assert b.x + b.width <= 1024
        assert b.y + b.height <= 1024
        part = np.s_[int(b.y) : int(b.y + b.height), int(b.x) : int(b.x + b.width)]
        assert gain[part].mean() > 0
        inside[part] = True
    assert gain[inside].sum() > 0.6 * gain.sum()
    assert gain.min() >= -3  # scatter and rounding at most


def test_a_study_is_the_same_wherever_it_is_rendered_and_differs_between_seeds():
    one, other = (draw_population(3, seed)[0] for seed in (0, 1))
    first, again = render_study(one), render_study(one)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.array_equal(first[0], render_study(other)[0])
    assert one.name != other.name


def test_median_box_covers_about_six_percent():
    positives = [s for s in draw_population(120, seed=5) if s.positive]
    boxes = [b for s in positives for b in render_study(s)[1]]
    assert 0.04 < np.median([b.width * b.height for b in boxes]) / 1024**2 < 0.085


# --- the folder


def test_tables_mapping_and_images_tell_the_same(folder):
    out = folder
    labels = table(out / "stage_2_train_labels.csv")
    classes = table(out / "stage_2_detailed_class_info.csv")
    mapping = json.loads((out / "pneumonia-challenge-dataset-mappings_2018.json").read_text())
    names = {p.stem for p in (out / "stage_2_train_images").iterdir()}
    assert list(labels[0]) == ["patientId", "x", "y", "width", "height", "Target"]
    assert list(classes[0]) == ["patientId", "class"]
    assert names == {r["patientId"] for r in labels} == {r["subset_img_id"] for r in mapping}
    assert [r["patientId"] for r in labels] == [r["patientId"] for r in classes]
    assert len(names) == len(mapping) == NUM_STUDIES
    for label, row in zip(labels, classes, strict=True):
        positive = label["Target"] == "1"
        assert positive == (row["class"] == "Lung Opacity")
        assert all(bool(label[key]) == positive for key in ("x", "y", "width", "height"))
    assert {r["class"] for r in classes} == FINDINGS
    positives = {r["patientId"] for r in labels if r["Target"] == "1"}
    assert len(positives) == round(0.225 * NUM_STUDIES)
    assert len({r["img_id"] for r in mapping}) == NUM_STUDIES
    patients = Counter(r["img_id"][:8] for r in mapping)
    assert len(patients) < NUM_STUDIES
    assert max(patients.values()) >= 2


def test_headers_have_the_real_quirks(folder):
    out = folder
    mapping = json.loads((out / "pneumonia-challenge-dataset-mappings_2018.json").read_text())
    by_name = {row["subset_img_id"]: row for row in mapping}
    for path in sorted((out / "stage_2_train_images").iterdir())[:6]:
        dataset = pydicom.dcmread(path)
        assert dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
        assert dataset.SOPClassUID == SecondaryCaptureImageStorage
        assert (dataset.Modality, dataset.PhotometricInterpretation) == ("CR", "MONOCHROME2")
        assert (dataset.Rows, dataset.Columns, dataset.BitsStored) == (1024, 1024, 8)
        assert dataset.PatientID == dataset.PatientName == path.stem
        assert dataset.PatientSex in {"M", "F"}
        assert dataset.ViewPosition in {"AP", "PA"}
        assert 0.13 < dataset.PixelSpacing[0] < 0.2
        assert not {"WindowCenter", "WindowWidth", "RescaleSlope"} & set(dataset.dir())
        # A bare integer, where the standard asks for 062Y.
        assert str(int(dataset.PatientAge)) == dataset.PatientAge
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            assert dataset[keyword].value == by_name[path.stem][keyword]
        pixels = dataset.pixel_array
        assert pixels.shape == (1024, 1024)
        assert pixels.std() > 25


def test_bytes_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    out = folder
    write_phantoms(tmp_path, num_studies=NUM_STUDIES, seed=3, num_processes=2)
    assert contents(tmp_path) == contents(out)


def test_a_whole_folder_is_left_alone_and_a_damaged_one_mended(tmp_path):
    assert write_phantoms(tmp_path, num_studies=3, seed=0)
    whole = contents(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not write_phantoms(tmp_path, num_studies=3, seed=0)
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    image = next((tmp_path / "stage_2_train_images").iterdir())
    for damage in (image.unlink, lambda: image.write_bytes(b"half")):
        damage()
        assert write_phantoms(tmp_path, num_studies=3, seed=0)
        assert contents(tmp_path) == whole


def test_a_half_written_folder_is_written_anew(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    write_phantoms(whole, num_studies=3, seed=0)
    expected = contents(whole)
    # What an interrupted run leaves: a marker of no images yet, and some of them.
    half.mkdir()
    marker = json.loads((whole / "synthetic.json").read_text())
    del marker["num_image_bytes"]
    (half / "synthetic.json").write_text(json.dumps(marker))
    (half / "stage_2_train_images").mkdir()
    name = next((whole / "stage_2_train_images").iterdir()).name
    (half / "stage_2_train_images" / name).write_bytes(b"cut sh")
    assert write_phantoms(half, num_studies=3, seed=0)
    assert contents(half) == expected


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(SourceError, match="choose another folder"):
        write_phantoms(tmp_path, num_studies=3, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_phantoms_of_other_arguments_are_refused_by_both_values(tmp_path):
    write_phantoms(tmp_path, num_studies=1, seed=0)
    with pytest.raises(SourceError, match=r"got .*num_studies': 1, .*expected .*num_studies': 2"):
        write_phantoms(tmp_path, num_studies=2, seed=0)


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="choose a folder that can be written"):
        write_phantoms(tmp_path / "file", num_studies=1, seed=0)


# --- the command


def test_command_writes_says_so_and_does_nothing_twice(tmp_path):
    out = tmp_path / "new" / "folder"
    first = run_cli("--out", out, "--studies", 4, "--seed", 1)
    assert first.returncode == 0
    assert first.stdout.startswith("phantoms: written: 4 studies of ")
    assert first.stdout.endswith(f"1 positive, in {out}\n")
    again = run_cli("--out", out, "--studies", 4, "--seed", 1)
    assert again.returncode == 0
    assert again.stdout.startswith("phantoms: already complete: 4 studies of ")


def test_command_answers_mistakes_with_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    refused = run_cli("--out", tmp_path, "--studies", 4)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("out", ["", "s3://bucket/x"])
def test_an_out_that_is_no_folder_here_is_refused(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", out, "--studies", "1"])
    assert f"got {out!r}, expected a folder of this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--studies=0", "--seed=-1", "--jobs=0"])
def test_flags_out_of_range_are_refused(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / "x"), flag])
    assert exit_info.value.code == 2
    assert "or more" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
