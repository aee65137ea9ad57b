"""Each layout is recognised by what lies in the folder, and its rules are kept."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from pneumo.command_line import parse_command_line
from pneumo.config import PrepareConfig, SplitConfig
from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
from pneumo.dataset.phantoms.population import draw_population
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.shard_tasks import read_study
from pneumo.dataset.source import Source
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import find_published, split_studies
from pneumo.errors import PneumoError, SourceError
from pneumo.images.dicom import GrayImage

ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}
NUM_STUDIES = 16


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of phantoms in each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, layout in PHANTOM_LAYOUTS.items():
        write_phantoms(folder / name, num_studies=NUM_STUDIES, seed=2, layout=layout)
    return folder


@pytest.fixture
def copied(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of all of them, to be changed."""
    return Path(shutil.copytree(phantoms, tmp_path / "copied"))


def read(folder: Path, **settings: object) -> Source:
    return read_source(str(folder), ENVIRON, settings=PrepareConfig.model_validate(settings))


@pytest.mark.parametrize("name", PHANTOM_LAYOUTS)
def test_a_layout_is_recognised_and_whole(phantoms: Path, name: str) -> None:
    source = read(phantoms / name)
    assert source.layout == name
    drawn = draw_population(NUM_STUDIES, 2)
    left_out = source.left_out.get("of uncertain label (prepare.uncertain ignore)", 0)
    assert len(source.studies) == NUM_STUDIES - left_out
    assert sum(study.target for study in source.studies) == sum(one.positive for one in drawn)
    image = read_study(source.studies[0], "train", 64)
    assert isinstance(image, GrayImage)
    assert image.pixels.std() > 10


@pytest.mark.parametrize("name", PHANTOM_LAYOUTS)
def test_phantoms_are_whole_or_anothers(phantoms: Path, name: str) -> None:
    same = {"num_studies": NUM_STUDIES, "seed": 2}
    assert not write_phantoms(phantoms / name, layout=PHANTOM_LAYOUTS[name], **same)
    other = PHANTOM_LAYOUTS["nih" if name == "rsna" else "rsna"]
    with pytest.raises(SourceError, match="expected phantoms of"):
        write_phantoms(phantoms / name, layout=other, **same)


def test_the_one_folder_of_a_download_is_looked_into(copied: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.move(copied / "kermany", outer / "chest_xray")
    assert len(read(outer).studies) == NUM_STUDIES


@pytest.mark.parametrize("name", PHANTOM_LAYOUTS)
def test_a_name_of_a_table_does_not_lead_out_of_the_folder(copied: Path, name: str) -> None:
    for table in (copied / name).rglob("*.csv"):
        header, first, *rest = table.read_text().splitlines(keepends=True)
        file, comma, values = first.partition(",")
        outside = f"../../{Path(file).name}"
        table.write_text("".join([header, f"{outside}{comma}{values}", *rest]))
        shutil.copyfile(next((copied / name).rglob("*.[dpj]*")), copied / Path(outside).name)
    try:
        studies = read(copied / name).studies
    except PneumoError:
        return
    assert studies
    for study in studies:
        assert Path(study.url).resolve().is_relative_to(copied / name), study.url


@pytest.mark.parametrize("name", PHANTOM_LAYOUTS)
def test_folders_may_be_links_to_another_disk(phantoms: Path, tmp_path: Path, name: str) -> None:
    linked, disk = tmp_path / "linked", phantoms / name
    shutil.copytree(disk, linked, ignore=lambda where, names: [n for n in names if "." not in n])
    folders = [path for path in disk.iterdir() if path.is_dir() and "." not in path.name]
    assert folders
    for folder in folders:
        (linked / folder.name).symlink_to(folder)
    found, whole = read(linked), read(disk)
    assert [study.key for study in found.studies] == [study.key for study in whole.studies]
    assert found.rejected == whole.rejected
    assert all(Path(study.url).is_file() for study in found.studies)


def test_two_layouts_in_one_folder_are_refused_until_one_is_named(copied: Path) -> None:
    shutil.copytree(copied / "own-table", copied / "nih", dirs_exist_ok=True)
    with pytest.raises(SourceError, match=r"two layouts, .*own table.* and NIH.*own-table or nih"):
        read(copied / "nih")
    flags = ["--source", "x", "--store", "y", "--prepare.layout", "nih"]
    settings = parse_command_line("prepare", flags, {}).config.prepare
    assert read_source(str(copied / "nih"), ENVIRON, settings=settings).layout == "nih"


def test_an_unknown_folder_is_told_what_would_do(copied: Path) -> None:
    (copied / "nih" / "Data_Entry_2017.csv").unlink()
    with pytest.raises(SourceError) as caught:
        read(copied / "nih")
    message = str(caught.value)
    assert "nearest is NIH ChestX-ray14: no table Data_Entry_2017*.csv" in message
    lines = message.splitlines()[1:]
    assert len(lines) == 5
    assert lines[0] == "file,patient,target"


def test_the_five_lines_that_are_told_would_do(tmp_path: Path, phantoms: Path) -> None:
    (tmp_path / "other.txt").write_text("no data set")
    with pytest.raises(SourceError) as caught:
        read(tmp_path)
    (tmp_path / "studies.csv").write_text("\n".join(str(caught.value).splitlines()[1:]))
    picture = next((phantoms / "own-table" / "images").iterdir())
    (tmp_path / "images").mkdir()
    for number in range(1, 5):
        shutil.copy(picture, tmp_path / "images" / f"{number:04d}.png")
    assert len(read(tmp_path).studies) == 4


def test_a_setting_without_effect_is_refused(phantoms: Path) -> None:
    with pytest.raises(SourceError, match=r"prepare.uncertain has no effect .* NIH"):
        read(phantoms / "nih", uncertain="positive")
    with pytest.raises(SourceError, match=r"prepare.positive has no effect .* chest_xray"):
        read(phantoms / "kermany", positive=["Effusion"])


def test_rsna_without_its_classes(copied: Path) -> None:
    (copied / "rsna" / "stage_2_detailed_class_info.csv").unlink()
    with pytest.raises(SourceError, match="no class table"):
        read(copied / "rsna")
    source = read(copied / "rsna", layout="rsna-without-classes")
    assert {study.finding for study in source.studies} == {"Lung Opacity", "No Lung Opacity"}


# --- NIH ------------------------------------------------------------------------------------------


def test_nih_labels_can_be_named(phantoms: Path) -> None:
    usual, other = read(phantoms / "nih"), read(phantoms / "nih", positive=["Effusion"])
    assert {study.finding for study in other.studies if study.target} == {"Effusion"}
    assert not {s.key for s in usual.studies if s.target} & {
        s.key for s in other.studies if s.target
    }
    assert all(bool(study.boxes) == bool(study.target) for study in usual.studies)
    assert not any(study.boxes for study in other.studies)
    with pytest.raises(SourceError, match="no image is labelled Edema"):
        read(phantoms / "nih", positive=["Edema"])


def test_nih_boxes_of_infiltration_are_spelt_otherwise(copied: Path) -> None:
    folder = copied / "nih"
    table = (folder / "Data_Entry_2017.csv").read_text()
    (folder / "Data_Entry_2017.csv").write_text(table.replace("Pneumonia", "Infiltration"))
    boxes = folder / "BBox_List_2017.csv"
    boxes.write_text(boxes.read_text().replace("Pneumonia", "Infiltrate"))
    positive = [s for s in read(folder, positive=["Infiltration"]).studies if s.target]
    assert positive
    assert all(study.boxes for study in positive)


def test_nih_labels_may_have_spaces_between(copied: Path) -> None:
    path = copied / "nih" / "Data_Entry_2017.csv"
    digest = read(copied / "nih").digest
    text = path.read_text()
    assert "|" in text
    path.write_text(text.replace("|", " | "))
    assert read(copied / "nih").digest == digest


def test_nih_patients_are_those_of_rsna(phantoms: Path) -> None:
    both = [{s.patient for s in read(phantoms / name).studies} for name in ("rsna", "nih")]
    assert both[0] == both[1]


def test_nih_pictures_in_two_sizes_are_refused(copied: Path) -> None:
    folder = next((copied / "nih").glob("images*"))
    shutil.copytree(folder, folder.with_name("images_224"))
    with pytest.raises(SourceError, match="two files of one name"):
        read(copied / "nih")


@pytest.mark.parametrize(
    ("names", "cells", "spacing"),
    [
        ("[Width,Height],OriginalImagePixelSpacing[x,y]", "2560,2048,0.143,0.15", 0.15 * 2),
        ("[Width],OriginalImagePixelSpacing[x]", "2560,0.143", 0.143 * 2.5),
    ],
)
def test_nih_spacing_is_that_of_the_rows_of_the_published_pictures(
    copied: Path, names: str, cells: str, spacing: float
) -> None:
    """The table gives that of the larger originals; the published ones have 1024 rows."""
    path = copied / "nih" / "Data_Entry_2017.csv"
    head, *rows = path.read_text().splitlines()
    head += f",OriginalImage{names}"
    path.write_text("\n".join([head, *(f"{row},{cells}" for row in rows)]))
    headers = [study.header for study in read(copied / "nih").studies]
    assert [header and header.spacing_mm for header in headers] == [spacing] * NUM_STUDIES


def test_nih_lists_decide_who_is_in_test(copied: Path) -> None:
    folder = copied / "nih"
    names = sorted(path.name for path in (folder / "images_001" / "images").iterdir())
    patients = sorted({name.split("_")[0] for name in names})
    chosen = [name for name in names if name.split("_")[0] in patients[::2]]
    (folder / "test_list.txt").write_text("\n".join(chosen))
    (folder / "train_val_list.txt").write_text("\n".join({*names} - {*chosen}))
    source = read(folder)
    placed = find_published(source, SplitConfig(), seed=0)
    assert placed is not None
    in_test = {s.url.rsplit("/", 1)[-1] for s in source.studies if placed[s.key] == "test"}
    assert in_test == {*chosen}
    assert find_published(source, SplitConfig(named="hash"), seed=0) is None
    others = {s.patient: placed[s.key] for s in source.studies if placed[s.key] != "test"}
    assert all(others[s.patient] == placed[s.key] for s in source.studies if s.patient in others)


def test_nih_lists_that_do_not_fit_are_refused(copied: Path) -> None:
    folder = copied / "nih"
    names = sorted(path.name for path in folder.glob("images_001/images/*"))

    def write(train: list[str], test: list[str], ending: str = "") -> None:
        for name, lines in (("train_val_list.txt", train), ("test_list.txt", test)):
            (folder / name).write_text("\ufeff" + "".join(f"{one}{ending}\r\n" for one in lines))

    write(names[3:], names[:3], ending=",")
    with pytest.raises(SourceError, match=r"test_list\.txt have no image of the table"):
        read(folder)
    write(names[3:], names[:4])
    with pytest.raises(SourceError, match="1 images are in both lists"):
        read(folder)
    write(names[3:], names[:3])
    assert sum(study.published == "test" for study in read(folder).studies) == 3
    write(names, [])
    assert {study.published for study in read(folder).studies} == {"train_val"}


def test_pictures_that_are_missing_are_counted(copied: Path) -> None:
    next((copied / "nih" / "images_001" / "images").iterdir()).unlink()
    source = read(copied / "nih")
    assert [item.reason for item in source.rejected] == ["missing"]


# --- CheXpert -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table"), [("nih", "Data_Entry_2017.csv"), ("chexpert", "train.csv")]
)
def test_a_table_that_is_no_utf8_is_told(copied: Path, name: str, table: str) -> None:
    path = next((copied / name).rglob(table))
    path.write_bytes(path.read_bytes().replace(b"0", b"\xe9", 1))
    with pytest.raises(SourceError, match="no UTF-8"):
        read(copied / name)


def test_chexpert_policies(copied: Path) -> None:
    numbers, drawn = {}, draw_population(NUM_STUDIES, 2)
    for policy in ("ignore", "negative", "positive"):
        source = read(copied / "chexpert", uncertain=policy)
        numbers[policy] = Counter(study.target for study in source.studies)
        assert source.left_out["lateral views"] == len({s.patient for s in drawn})
        assert "blank labels count as negative" in source.summary
    uncertain = NUM_STUDIES - numbers["ignore"].total()
    assert uncertain > 0
    assert numbers["negative"] == numbers["ignore"] + Counter({0: uncertain})
    assert numbers["positive"] == numbers["ignore"] + Counter({1: uncertain})


def test_chexpert_views_in_small_letters(copied: Path) -> None:
    path = copied / "chexpert" / "train.csv"
    expected = read(copied / "chexpert")
    path.write_text(path.read_text().replace("Frontal,", "frontal,"))
    found = read(copied / "chexpert")
    assert (found.studies, found.left_out) == (expected.studies, expected.left_out)


@pytest.mark.parametrize("layout", ["chexpert", "vindr"])
def test_names_of_columns_may_be_in_capitals(copied: Path, layout: str) -> None:
    expected = read(copied / layout)
    path = copied / layout / "train.csv"
    names, _, rows = path.read_text().partition("\n")
    path.write_text(names.upper().replace(",", ", ") + "\n" + rows)
    found = read(copied / layout)
    assert [study.key for study in found.studies] == [study.key for study in expected.studies]
    assert found.layout == layout


def test_chexpert_columns_of_positive_labels(copied: Path) -> None:
    path = copied / "chexpert" / "train.csv"
    expected = read(copied / "chexpert")
    text = path.read_text().replace("Pneumonia", "Consolidation")
    path.write_text(text.replace("Consolidation", " consolidation"))
    found = read(copied / "chexpert", positive=["Consolidation"])
    assert [study.target for study in found.studies] == [s.target for s in expected.studies]
    lines = text.splitlines()
    twice = [f"{lines[0]},Consolidation", *(f"{line}," for line in lines[1:])]
    path.write_text("\n".join(twice) + "\n")
    with pytest.raises(SourceError, match="names Consolidation more than once"):
        read(copied / "chexpert", positive=["Consolidation"])


def test_chexpert_labels_are_checked(copied: Path) -> None:
    path = copied / "chexpert" / "train.csv"
    path.write_text(re.sub(r"1\.0$", "3.0", path.read_text(), count=1, flags=re.MULTILINE))
    with pytest.raises(SourceError, match=r"row \d+: a label that is none of 1, 0, -1 and blank"):
        read(copied / "chexpert")


# --- VinDr ----------------------------------------------------------------------------------------


def test_vindr_needs_more_than_half_of_the_readers(copied: Path) -> None:
    path = copied / "vindr" / "train.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert sum(s.target for s in read(copied / "vindr").studies) > 0
    kept = [r for r in rows if r["class_name"] != "Pneumonia" or r["rad_id"] == "R1"]
    seen = {(row["image_id"], row["rad_id"]) for row in kept}
    every = {(row["image_id"], row["rad_id"]) for row in rows}
    empty = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), "")
    kept += [
        {"image_id": i, "rad_id": r, "class_name": "No finding", "class_id": "14", **empty}
        for i, r in sorted(every - seen)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    assert sum(s.target for s in read(copied / "vindr").studies) == 0


def test_vindr_files_may_have_other_endings(copied: Path) -> None:
    expected = [study.key for study in read(copied / "vindr").studies]
    for number, path in enumerate(sorted((copied / "vindr" / "train").iterdir())):
        path.rename(path.with_suffix((".DICOM", ".jpeg", ".tiff")[number % 3]))
    source = read(copied / "vindr")
    assert [study.key for study in source.studies] == expected
    assert source.rejected == ()


def test_vindr_has_no_patients(phantoms: Path) -> None:
    source = read(phantoms / "vindr")
    assert not source.has_patients
    with pytest.raises(SourceError, match=r"--split\.unit image"):
        split_studies(source.studies, SplitConfig(), seed=0, has_patients=False)
    with pytest.raises(SourceError, match="no reader drew Nodule"):
        read(phantoms / "vindr", positive=["Nodule"])


# --- chest_xray -----------------------------------------------------------------------------------


def test_kermany_says_that_patients_are_a_guess(copied: Path) -> None:
    source = read(copied / "kermany")
    assert "patients are guessed" in source.summary
    image = next((copied / "kermany").glob("*/PNEUMONIA/*"))
    image.with_name(f"._{image.name}").write_bytes(b"of macOS")
    assert read(copied / "kermany").digest == source.digest
    shutil.copy(image, copied / "kermany" / "train" / "NORMAL" / image.name)
    with pytest.raises(SourceError, match="in both classes"):
        read(copied / "kermany")


def test_kermany_names_patients_in_either_release(tmp_path: Path) -> None:
    names = {
        "NORMAL": ["NORMAL-1049278-0001.jpeg", "NORMAL-1049278-0002.jpeg", "IM-0001-0001.jpeg"],
        "PNEUMONIA": [
            *("BACTERIA-1351146-0001.jpeg", "VIRUS-1351146-0002.jpeg"),
            *("person7_bacteria_1.jpeg", "person7_virus_2.jpeg", "other.jpeg"),
        ],
    }
    for label, images in names.items():
        (tmp_path / "train" / label).mkdir(parents=True)
        for image in images:
            (tmp_path / "train" / label / image).touch()
    source = read(tmp_path)
    assert len({study.patient for study in source.studies}) == 5
    assert "1 that name none count as a patient each" in source.summary
    causes = [study.finding for study in source.studies if study.target]
    assert sorted(causes) == [
        "Pneumonia",
        *["Pneumonia (bacteria)"] * 2,
        *["Pneumonia (virus)"] * 2,
    ]
    for label, images in names.items():
        for i, image in enumerate(images):
            (tmp_path / "train" / label / image).rename(
                tmp_path / "train" / label / f"{label}{i}.png"
            )
    assert not read(tmp_path).has_patients


# --- the real thing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "studies", "positives", "patients"),
    [("kermany-mini", 600, 400, 537), ("nih-mini", 200, 77, 156), ("lung-crops", 10_170, 2_791, 0)],
)
def test_real_folders(
    shared_data: Path, name: str, studies: int, positives: int, patients: int
) -> None:
    source = read(shared_data / name)
    assert len(source.studies) == studies
    assert sum(study.target for study in source.studies) == positives
    if patients:
        assert len({study.patient for study in source.studies}) == patients
    assert json.dumps(source.summary)
