"""Tables in Kaggle's layout become studies without names; what does not add up is refused."""

import csv
import dataclasses
import gzip
import json
import re
import shutil
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from pneumo.dataset.sources.recognition import read_source, read_split_list
from pneumo.errors import SourceError
from pneumo.images.boxes import Box
from pneumo.images.elements import read_numbers
from pneumo.images.headers import read_from, read_header

FolderMaker = Callable[..., Path]

LABELS = "stage_2_train_labels.csv"
CLASSES = "stage_2_detailed_class_info.csv"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}


def image_ids(folder: Path) -> list[str]:
    return [path.stem for path in next(folder.glob("*train_images")).iterdir()]


def edit(path: Path, pattern: str, replacement: str, count: int = 1) -> None:
    text, number = re.subn(pattern, replacement, path.read_text(), count=count)
    assert number, f"{pattern} is not in {path.name}"
    path.write_text(text)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_source(str(folder), ENVIRON)
    assert not any(image_id in str(caught.value) for image_id in image_ids(folder))


# --- what is read ---------------------------------------------------------------------------------


def test_one_study_an_image_though_tables_repeat_rows(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder(num_studies=24, images_per_patient=3)
    source = read_source(str(folder), ENVIRON)
    assert len(source.studies) == 24
    assert source.has_patients
    assert len({study.patient for study in source.studies}) == 8
    assert sum(study.target for study in source.studies) == 8
    assert {study.finding for study in source.studies if study.target} == {"Lung Opacity"}
    assert sorted(len(s.boxes) for s in source.studies) == [0] * 16 + [1] * 4 + [2] * 4
    assert all(bool(study.boxes) == bool(study.target) for study in source.studies)


def test_boxes_are_those_of_the_table(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder(num_studies=6)
    rows = [line.split(",") for line in (folder / LABELS).read_text().splitlines()[1:]]
    written = sorted(Box(*map(float, row[1:5])) for row in rows if row[1])
    read = sorted(box for s in read_source(str(folder), ENVIRON).studies for box in s.boxes)
    assert read == written


def test_every_study_points_at_its_file(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    urls = {study.url for study in read_source(str(folder), ENVIRON).studies}
    assert urls == {str(path) for path in (folder / "stage_2_train_images").iterdir()}


@pytest.mark.parametrize("stage", ["", "stage_1_"])
@pytest.mark.parametrize("compressed", [False, True])
def test_other_names_and_compressed_tables_give_the_same_studies(
    kaggle_folder: FolderMaker, stage: str, compressed: bool
) -> None:
    usual = read_source(str(kaggle_folder()), ENVIRON)
    other = read_source(str(kaggle_folder(stage=stage, compressed=compressed)), ENVIRON)
    assert other.digest == usual.digest
    assert [dataclasses.replace(s, url="") for s in other.studies] == [
        dataclasses.replace(s, url="") for s in usual.studies
    ]


@pytest.mark.parametrize("name", [LABELS, CLASSES, MAPPING])
def test_a_zipped_table_is_read(kaggle_folder: FolderMaker, name: str) -> None:
    folder = kaggle_folder()
    before = read_source(str(folder), ENVIRON)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.write(folder / name, name)
    (folder / name).unlink()
    assert read_source(str(folder), ENVIRON) == before
    (folder / f"{name}.zip").write_bytes(b"PK\x03\x04 and no more")
    refuse(folder, f"{name}.zip: not a readable archive")


def test_the_folder_that_an_unpacked_download_makes_is_found(
    kaggle_folder: FolderMaker, tmp_path: Path
) -> None:
    folder = kaggle_folder()
    (tmp_path / "download").mkdir()
    inner = folder.rename(tmp_path / "download" / "rsna-pneumonia-detection-challenge")
    (tmp_path / "download" / "GCP Credits Request Link - RSNA.txt").write_text("none")
    outer = read_source(str(tmp_path / "download"), ENVIRON)
    assert outer == read_source(str(inner), ENVIRON)
    shutil.copytree(inner, tmp_path / "download" / "another")
    with pytest.raises(SourceError, match="2 of its folders have a data set"):
        read_source(str(tmp_path / "download"), ENVIRON)


def test_without_a_mapping_every_image_is_its_own_patient(kaggle_folder: FolderMaker) -> None:
    source = read_source(str(kaggle_folder(mapping=False)), ENVIRON)
    assert not source.has_patients
    assert len({study.patient for study in source.studies}) == len(source.studies)


def test_targets_are_integers_though_the_column_holds_decimals(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    before = read_source(str(folder), ENVIRON)
    edit(folder / LABELS, r",([01])(\r?\n)", r",\1.0\2", count=0)
    source = read_source(str(folder), ENVIRON)
    assert source.digest == before.digest
    assert {repr(study.target) for study in source.studies} == {"0", "1"}


def test_ids_of_digits_keep_their_leading_zeros(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder(num_studies=6)
    for i, image_id in enumerate(image_ids(folder)):
        for name in (LABELS, CLASSES, MAPPING):
            edit(folder / name, image_id, f"{i:05d}", count=0)
    urls = {study.url.rsplit("/", 1)[-1] for study in read_source(str(folder), ENVIRON).studies}
    assert urls == {f"{i:05d}.dcm" for i in range(6)}


# --- lists ----------------------------------------------------------------------------------------


def test_a_list_of_images_or_patients_is_read(kaggle_folder: FolderMaker, tmp_path: Path) -> None:
    folder = kaggle_folder(num_studies=6, images_per_patient=2)
    studies = {s.url.rsplit("/")[-1][:-4]: s for s in read_source(str(folder), ENVIRON).studies}
    published = {
        row["subset_img_id"]: row["img_id"] for row in json.loads((folder / MAPPING).read_text())
    }
    splits = dict(zip(studies, ["train", "val", "test", "train", "val", "test"], strict=True))
    path = tmp_path / "list.csv"
    path.write_text("patientId,split\n" + "".join(f"{i},{s}\n" for i, s in splits.items()))
    listed = read_split_list(str(path), str(folder), ENVIRON)
    assert listed == {studies[image_id].key: split for image_id, split in splits.items()}
    numbers = sorted({img_id.split("_")[0] for img_id in published.values()})
    path.write_text("patient,split\n" + "".join(f"{number},val\n" for number in numbers))
    listed = read_split_list(str(path), str(folder), ENVIRON)
    assert listed == {study.patient: "val" for study in studies.values()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,split\na,val\n", "no column patientId or patient"),
        ("patientId,where\na,val\n", "no column split"),
        ("patientId,split\n\na,validation\n", "row 3: a split that is none of train, val and test"),
        ("patientId,split\na,val\na,test\n", "lists a patient or study in two splits"),
        ("", "not a readable CSV"),
    ],
)
def test_a_list_that_is_none_is_refused(
    kaggle_folder: FolderMaker, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=rf"list\.csv: {message}"):
        read_split_list(str(tmp_path / "list.csv"), str(kaggle_folder(num_studies=3)), ENVIRON)


# --- what is missing ------------------------------------------------------------------------------


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SourceError, match=f"^{folder}: no such folder, or it is empty; expec"):
            read_source(str(folder), ENVIRON)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LABELS, f"no label table; expected one of: {LABELS}, train_labels.csv"),
        (CLASSES, f"no class table; expected one of: {CLASSES}, detailed_class_info.csv"),
        (
            "stage_2_train_images",
            "no image folder; expected one of: stage_2_train_images, train_im",
        ),
    ],
)
def test_a_missing_table_is_named(kaggle_folder: FolderMaker, name: str, message: str) -> None:
    folder = kaggle_folder()
    (folder / name).rename(folder.parent / f"{folder.name}-{name}")
    with pytest.raises(SourceError, match=message):
        read_source(str(folder), ENVIRON)


@pytest.mark.parametrize(
    ("table", "column"),
    [(LABELS, "patientId"), (LABELS, "Target"), (CLASSES, "patientId"), (CLASSES, "class")],
)
def test_a_missing_column_is_named(kaggle_folder: FolderMaker, table: str, column: str) -> None:
    folder = kaggle_folder()
    edit(folder / table, column, "other")
    known = "x, y, width, height" if table == LABELS else ".*"
    refuse(folder, rf"{table}: no column {column}; its first line names .*: .*{known}")


@pytest.mark.parametrize("table", [LABELS, CLASSES])
def test_a_table_that_is_none_is_named(kaggle_folder: FolderMaker, table: str) -> None:
    folder = kaggle_folder()
    (folder / table).write_text("")
    refuse(folder, f"{table}: not a readable CSV")
    (folder / table).write_text("a,b\n1,2\n1,2,3\n")
    refuse(folder, f"{table}: not a readable CSV: row 3 has 3 cells, not 2")
    (folder / table).write_bytes(b"a\xff,b\n1,2\n")
    refuse(folder, f"{table}: not a readable CSV: empty, cut off, or no UTF-8")


@pytest.mark.parametrize("table", [LABELS, CLASSES])
def test_a_table_without_rows_is_named(kaggle_folder: FolderMaker, table: str) -> None:
    folder = kaggle_folder()
    path = folder / table
    path.write_text(path.read_text().splitlines()[0] + "\n")
    refuse(folder, f"{table}: no rows")


@pytest.mark.parametrize("table", [LABELS, CLASSES, MAPPING])
@pytest.mark.parametrize("damage", ["cut", "changed", "plain"])
def test_a_damaged_gzip_file_is_named(kaggle_folder: FolderMaker, table: str, damage: str) -> None:
    folder = kaggle_folder(compressed=True)
    path = folder / f"{table}.gz"
    data = path.read_bytes()
    broken = {
        "cut": data[: len(data) // 2],
        "changed": data[:40] + bytes(b ^ 255 for b in data[40:60]) + data[60:],
        "plain": gzip.decompress(data),
    }
    path.write_bytes(broken[damage])
    message = "not a gzip file, though its name ends in"
    refuse(folder, f"{table}.gz: {message if damage == 'plain' else 'not a readable archive'}")


def one_cell_more(text: str) -> str:
    lines = text.splitlines()
    return "\n".join([*lines[:3], f"{lines[3]},1", *lines[4:]])


def no_header(text: str) -> str:
    return "\n".join(text.splitlines()[1:])


def columns_turned(text: str) -> str:
    """Each row's cells in the opposite order, under the same names."""
    first, *rows = text.splitlines()
    return "\n".join([first, *(",".join(row.split(",")[::-1]) for row in rows)])


@pytest.mark.parametrize("table", [LABELS, CLASSES])
@pytest.mark.parametrize("damage", [one_cell_more, no_header, columns_turned])
def test_no_id_of_a_damaged_table_is_repeated(
    kaggle_folder: FolderMaker, table: str, damage: Callable[[str], str]
) -> None:
    folder = kaggle_folder()
    path = folder / table
    path.write_text(damage(path.read_text()))
    assert any(image_id in path.read_text() for image_id in image_ids(folder))
    with pytest.raises(SourceError) as caught:
        read_source(str(folder), ENVIRON)
    told = "".join(traceback.format_exception(caught.value))  # --debug prints it
    assert not [image_id for image_id in image_ids(folder) if image_id in told]


def test_no_id_of_a_damaged_list_is_repeated(kaggle_folder: FolderMaker, tmp_path: Path) -> None:
    folder = kaggle_folder(num_studies=3)
    ids = image_ids(folder)
    for rows in ([f"val,{i}" for i in ids], [f"{i},val,1" for i in ids]):
        (tmp_path / "list.csv").write_text("\n".join(["patientId,split", *rows]))
        with pytest.raises(SourceError) as caught:
            read_split_list(str(tmp_path / "list.csv"), str(folder), ENVIRON)
        told = "".join(traceback.format_exception(caught.value))
        assert not [image_id for image_id in ids if image_id in told]


# --- what contradicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["2", "-1", ""])
def test_a_target_that_is_none_is_refused(kaggle_folder: FolderMaker, value: str) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r",0(\r?\n)", rf",{value}\1")
    refuse(folder, r"label table: row [0-9]+: a Target that is neither 0 nor 1")


def rejections(folder: Path, *, left: int) -> list[str]:
    """What is said of the studies that the tables contradict themselves on."""
    source = read_source(str(folder), ENVIRON)
    assert len(source.studies) == left
    assert len(source.studies) + len(source.rejected) == 24
    assert {item.reason for item in source.rejected} <= {"contradiction"}
    assert not {item.key for item in source.rejected} & {study.key for study in source.studies}
    return [item.message for item in source.rejected]


def test_mixed_targets_of_one_image_are_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r"(\S+),1(\r?\n)", r"\1,1\2\1,0\2")
    assert rejections(folder, left=23) == ["both Target 0 and Target 1"]


def test_an_unknown_class_is_refused(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / CLASSES, ",Normal", ",Healthy")
    refuse(
        folder, r"class table: row \d+: a class that is none of: Lung Opacity, No Lung .*, Normal"
    )


def test_two_classes_of_one_image_are_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / CLASSES, r"(\S+),Normal(\r?\n)", r"\1,Normal\2\1,No Lung Opacity / Not Normal\2")
    assert rejections(folder, left=23) == ["two classes"]


def test_a_labelled_image_without_a_class_is_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / CLASSES, r"\S+,Normal\r?\n", "")
    assert rejections(folder, left=23) == ["labelled, but without a class"]


def test_tables_that_contradict_each_other_are_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / CLASSES, ",Normal", ",Lung Opacity", count=3)
    assert rejections(folder, left=21) == ["class 'Lung Opacity' with Target 0"] * 3


def test_a_negative_with_a_box_is_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r",,,,,0", ",1.0,2.0,3.0,4.0,0")
    assert rejections(folder, left=23) == ["Target 0 with a box"]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("1.0,2.0,0,4.0", "a box of no size"),
        ("1.0,2.0,3.0,-4.0", "a box of no size"),
        ("1.0,2.0,3.0,", "a box that lacks a side"),
        (",2.0,3.0,4.0", "a box that lacks a side"),
        ("1.0,2.0,inf,4.0", "a box that lacks a side"),
    ],
)
def test_a_box_that_is_none_is_rejected(kaggle_folder: FolderMaker, box: str, message: str) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r"(?m)^([^,]+)(,[\d.]+){4},1", rf"\1,{box},1")
    assert rejections(folder, left=23) == [message]


def test_a_column_of_boxes_that_holds_texts_is_refused(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r",,,,,0", ",left,,,,0")
    refuse(folder, "label table: column x has values that are not numbers")


def test_classes_without_a_label_are_counted(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    edit(folder / LABELS, r"\S+,0\r?\n", "", count=2)
    for path in (folder / "stage_2_train_images").iterdir():
        path.unlink()
    source = read_source(str(folder), ENVIRON)
    assert (len(source.studies), source.unlabelled, source.rejected) == (22, 2, ())


def test_files_that_nobody_labelled_are_counted(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    images = folder / "stage_2_train_images"
    assert read_source(str(folder), ENVIRON).unlabelled == 0
    for name in ("one.dcm", "two.dcm", "README.txt"):
        (images / name).write_bytes(b"")
    next(path for path in images.iterdir() if len(path.stem) > 30).unlink()
    assert read_source(str(folder), ENVIRON).unlabelled == 2


def test_an_incomplete_mapping_is_refused(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    path = folder / MAPPING
    path.write_text(json.dumps(json.loads(path.read_text())[2:]))
    refuse(folder, "mappings_2018.json: 2 of 24 labelled images are not in it; use the complete")


@pytest.mark.parametrize("text", ["", "{", "{}", "3", '[{"subset_img_id": "a"}]', "[1]", '["a"]'])
def test_a_mapping_that_is_none_is_refused(kaggle_folder: FolderMaker, text: str) -> None:
    folder = kaggle_folder()
    (folder / MAPPING).write_text(text)
    refuse(folder, "mappings_2018.json: ")


def test_an_image_of_two_patients_is_rejected(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    path = folder / MAPPING
    rows = json.loads(path.read_text())
    other = next(r for r in rows if r["img_id"].split("_")[0] != rows[0]["img_id"].split("_")[0])
    again = [{**rows[0], "img_id": other["img_id"]}, dict(rows[1])]
    for first in (rows + again, again + rows):
        path.write_text(json.dumps(first))
        assert rejections(folder, left=23) == ["two patients"]


def test_a_row_that_is_there_twice_adds_no_box(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    before = {s.key: s.boxes for s in read_source(str(folder), ENVIRON).studies}
    edit(folder / LABELS, r"(\S+,\S+,\S+,\S+,\S+,1\r?\n)", r"\1\1")
    assert {s.key: s.boxes for s in read_source(str(folder), ENVIRON).studies} == before


def test_the_digest_tells_of_a_new_contradiction(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    before = read_source(str(folder), ENVIRON)
    edit(folder / LABELS, r"(\r?\n)$", r"\1one-more,1.0,2.0,3.0,4.0,1\1one-more,,,,,0\1")
    mapping = json.loads((folder / MAPPING).read_text())
    more = {**mapping[0], "subset_img_id": "one-more"}
    (folder / MAPPING).write_text(json.dumps([*mapping, more]))
    after = read_source(str(folder), ENVIRON)
    assert after.studies == before.studies
    assert len(after.rejected) == 1
    assert after.digest != before.digest


def test_pictures_that_are_still_packed_are_told(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    images = folder / "stage_2_train_images"
    (folder / "stage_2_train_images.zip").write_bytes(b"PK")
    assert all(images in Path(s.url).parents for s in read_source(str(folder), ENVIRON).studies)
    images.rename(folder / "elsewhere")
    with pytest.raises(SourceError, match=r"stage_2_train_images\.zip is still packed; unpack it"):
        read_source(str(folder), ENVIRON)


# --- the real thing -------------------------------------------------------------------------------


def test_all_of_rsna(shared_data: Path, tmp_path: Path) -> None:
    for path in (shared_data / "rsna-metadata").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "stage_2_train_images").mkdir()
    started_s = time.process_time()
    source = read_source(str(tmp_path), ENVIRON)
    print(f"indexed in {time.process_time() - started_s:.1f} s of one core")
    studies = source.studies
    assert len(studies) == 26_684
    assert not source.rejected
    assert all(bool(study.boxes) == bool(study.target) for study in studies)
    assert Counter(study.finding for study in studies) == {
        "Lung Opacity": 6_012,
        "No Lung Opacity / Not Normal": 11_821,
        "Normal": 8_851,
    }
    assert sum(study.target for study in studies) == 6_012
    assert Counter(len(study.boxes) for study in studies if study.target) == {
        1: 2_614,
        2: 3_266,
        3: 119,
        4: 13,
    }
    assert sum(len(study.boxes) for study in studies) == 9_555
    images_of = Counter(study.patient for study in studies)
    assert len(images_of) == 11_439
    assert max(images_of.values()) == 65


def test_the_headers_of_all_of_rsna(shared_data: Path) -> None:
    with gzip.open(shared_data / "rsna-metadata" / "dicom_headers.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    headers = []
    with pydicom.config.disable_value_validation():
        for row in rows:
            dataset = pydicom.Dataset()
            dataset.PatientAge, dataset.PatientSex = row["PatientAge"], row["PatientSex"]
            dataset.ViewPosition = row["ViewPosition"]
            dataset.PixelSpacing = [row["PixelSpacing"]] * 2
            spacing = read_numbers(dataset, "PixelSpacing", set())
            headers.append(read_header(read_from(dataset, set()), spacing))
    assert Counter(header.view for header in headers) == {"PA": 14_511, "AP": 12_173}
    assert Counter(header.sex for header in headers) == {"M": 15_166, "F": 11_518}
    ages = [header.age for header in headers]
    assert ages.count(None) == 5
    assert sum(age is not None and age < 18 for age in ages) == 1_276
    assert None not in {header.spacing_mm for header in headers}


def test_a_part_of_rsna(shared_data: Path) -> None:
    source = read_source(str(shared_data / "rsna-mini"), ENVIRON)
    assert len(source.studies) == 246
    assert sum(study.target for study in source.studies) == 97
    assert len({study.patient for study in source.studies}) == 193
    assert not source.rejected
    assert source.unlabelled == 0
    assert all(Path(study.url).is_file() for study in source.studies)


# --- what spreadsheets, macOS and copying make of a source ----------------------------------------


def test_a_column_that_is_there_twice_is_told(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    lines = (folder / LABELS).read_text().splitlines()
    twice = [f"{lines[0]},patientId", *(f"{line},x" for line in lines[1:])]
    (folder / LABELS).write_text("\n".join(twice))
    refuse(folder, "its first line names patientId more than once")


@pytest.mark.parametrize("table", [LABELS, CLASSES])
@pytest.mark.parametrize("place", [2, 5, -1])
def test_a_row_of_commas_is_told_by_its_number(
    kaggle_folder: FolderMaker, table: str, place: int
) -> None:
    folder = kaggle_folder()
    lines = (folder / table).read_text().splitlines()
    place = len(lines) + 1 if place < 0 else place
    lines.insert(place - 1, "," * lines[0].count(","))
    (folder / table).write_text("\n".join(lines) + "\n")
    refuse(folder, f"row {place} is empty; delete it")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (",,,,,", " is empty; delete it"),
        ("a,,,,,7", ": a Target that is neither 0 nor 1"),
        ("a,0", " has 2 cells, not 6"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("before", ["", "{end}", '{end}{end}"two{end}lines",,,,,0{end}'])
def test_rows_are_counted_by_the_lines_of_an_editor(
    kaggle_folder: FolderMaker, before: str, end: str, row: str, fault: str
) -> None:
    folder = kaggle_folder()
    header, *rows = (folder / LABELS).read_text().splitlines()
    head = end.join([header, *rows[:3], ""]) + before.format(end=end)
    (folder / LABELS).write_bytes((head + end.join([row, *rows[3:], ""])).encode())
    refuse(folder, rf"row {1 + head.count(end)}{fault}")


def test_a_zip_that_macos_made_is_read(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    expected = read_source(str(folder), ENVIRON)
    with zipfile.ZipFile(folder / f"{LABELS}.zip", "w") as archive:
        archive.write(folder / LABELS, LABELS)
        archive.writestr(f"__MACOSX/._{LABELS}", "of macOS")
        archive.writestr(".DS_Store", "of macOS")
    (folder / LABELS).unlink()
    assert read_source(str(folder), ENVIRON) == expected


def test_images_that_lie_elsewhere_are_told(kaggle_folder: FolderMaker) -> None:
    folder = kaggle_folder()
    (images,) = folder.glob("*train_images")
    for path in list(images.iterdir()):
        path.rename(path.with_suffix(".DCM"))
    refuse(folder, "the files end in .DCM; rename them to end in .dcm")
    (images / "deep").mkdir()
    for path in list(images.glob("*.DCM")):
        path.rename(images / "deep" / f"{path.stem}.dcm")
    with pytest.raises(SourceError, match="one folder deeper, in deep/; move them up"):
        read_source(str(folder), ENVIRON)
    shutil.rmtree(images / "deep")
    (images / "all.zip").write_bytes(b"")
    with pytest.raises(SourceError, match=r"all\.zip is still packed; unpack it there"):
        read_source(str(folder), ENVIRON)


@pytest.mark.parametrize("packing", ["gz", "zip"])
def test_a_table_that_unpacks_to_very_much_is_refused(
    kaggle_folder: FolderMaker, packing: str
) -> None:
    folder = kaggle_folder()
    packed = folder / f"{LABELS}.{packing}"
    (folder / LABELS).unlink()
    zeros = bytes(2**20)
    if packing == "gz":
        with gzip.open(packed, "wb") as file:
            for _ in range(130):
                file.write(zeros)
    else:
        with (
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(LABELS, "w") as member,
        ):
            for _ in range(130):
                member.write(zeros)
    refuse(folder, "unpacks to more than 128 MiB")
