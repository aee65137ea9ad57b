"""`studies.csv`: what it may hold, and that each mistake in it is told by its row."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from pneumo.dataset.source import Source
from pneumo.dataset.sources.recognition import read_source
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}
FIRST = "file,patient,target"


def write(folder: Path, *lines: str, files: int = 4) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(files):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), np.full((8, 8), 50 * i % 256, np.uint8))
    (folder / "studies.csv").write_text("\n".join(lines) + "\n")
    return folder


def read(folder: Path) -> Source:
    return read_source(str(folder), ENVIRON)


def test_three_columns_are_enough(tmp_path: Path) -> None:
    rows = ["images/0.png,007,0", "images/1.png,007,1", "images/2.png,7,0"]
    source = read(write(tmp_path, FIRST, *rows))
    assert source.summary == "own table (studies.csv), 3 studies of 2 patients"
    assert sorted((s.target, s.finding) for s in source.studies) == [
        (0, "No pneumonia"),
        (0, "No pneumonia"),
        (1, "Pneumonia"),
    ]
    assert all(Path(study.url).is_file() for study in source.studies)


def test_every_column_is_heard(tmp_path: Path) -> None:
    names = f"{FIRST},study,view,age,sex,finding,split,x,y,width,height"
    row = "images/0.png,p,1,s1,ap,062Y,f,Lobar pneumonia,test"
    source = read(write(tmp_path, names, f"{row},1,2,3,4", f"{row},5,5,2,2"))
    (study,) = source.studies
    assert (study.finding, study.published) == ("Lobar pneumonia", "test")
    assert study.boxes == (Box(1, 2, 3, 4), Box(5, 5, 2, 2))
    assert study.header is not None
    assert (study.header.age, study.header.sex, study.header.view) == (62, "F", "AP")


def test_a_patient_has_one_key_in_every_layout_under_one_secret(
    tmp_path: Path, kaggle_folder: object
) -> None:
    rsna = kaggle_folder(num_studies=2, images_per_patient=1)  # type: ignore[operator]
    own = read(write(tmp_path, FIRST, "images/0.png,00000100,1", "images/1.png,00000999,0"))
    patients = {study.patient for study in read_source(str(rsna), ENVIRON).studies}
    assert len(patients & {study.patient for study in own.studies}) == 1
    other = read_source(str(tmp_path), {"PNEUMO_HASH_KEY": "another"})
    assert other.secret_check != own.secret_check
    assert not patients & {study.patient for study in other.studies}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["images/9.png,p,0"], "1 of 1 files are missing, the first in row 2"),
        (["../images/0.png,p,0"], "row 2: a file outside the folder"),
        (["/etc/passwd,p,0"], "row 2: a file outside the folder"),
        (["C:\\0.png,p,0"], "row 2: a file outside the folder"),
        (["images\\..\\..\\0.png,p,0"], "row 2: a file outside the folder"),
        (["s3://bucket/0.png,p,0"], "row 2: a file outside the folder"),
        (["images/0.png,p,0", "", "images/0.png,p,0"], "rows 2 and 4 name one file"),
        (["images/0.png,p,0", "images/./0.png,q,0"], "rows 2 and 3 name one file"),
        (["images/0.png,p,2"], "row 2: a target that is neither 0 nor 1"),
        (["images/0.png,p,"], "row 2: a target that is neither 0 nor 1"),
        (["images/0.png,,1"], "row 2: no patient"),
        (["images/0.png,nan,1"], "row 2: no patient"),
    ],
)
def test_a_mistake_is_told_by_its_row(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path, FIRST, *lines))


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        ("split", "both", "row 2: a split that is none of train, val and test"),
        ("x,y,width,height", "1,2,3,4", "row 2: target 0 with a box"),
        ("x,y,width,height", "1,2,3,", "row 2: a box that lacks a side"),
        ("x,y,width,height", "1,2,a,4", "column width has values that are not numbers"),
    ],
)
def test_a_mistake_in_an_optional_column_is_told(
    tmp_path: Path, names: str, row: str, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path, f"{FIRST},{names}", f"images/0.png,p,0,{row}"))


@pytest.mark.parametrize(
    "names",
    [
        "File,Patient,TARGET,Split,X,Y,Width,Height",
        "file, patient, target, split, x, y, width, height",
    ],
)
def test_names_and_cells_may_be_spelt_otherwise(tmp_path: Path, names: str) -> None:
    rows = ["images\\0.png,p ,0,train,,,,", "images/1.png, p,1.0, test,1,2,3,4"]
    source = read(write(tmp_path, names, *rows))
    assert len({study.patient for study in source.studies}) == 1
    assert {(s.target, s.published, len(s.boxes)) for s in source.studies} == {
        (0, "train", 0),
        (1, "test", 1),
    }


@pytest.mark.parametrize("cells", ["062Y,F,PA", "62.0,female,pa", "62, Female ,PA "])
def test_values_of_a_header_may_be_spelt_otherwise(tmp_path: Path, cells: str) -> None:
    source = read(write(tmp_path, f"{FIRST},age,sex,view", f"images/0.png,p,0,{cells}"))
    header = source.studies[0].header
    assert header is not None
    assert (header.age, header.sex, header.view) == (62, "F", "PA")


def test_views_that_are_not_frontal_are_left_out(tmp_path: Path) -> None:
    views = [
        "PA",
        "AP supine",
        "L",
        "lateral",
        "LL",
        "lat.",
        "LLAT",
        "Lateral left",
        "RAO",
        "portable",
        "left lateral decubitus",
    ]
    rows = [f"images/{i}.png,p{i},0,{view}" for i, view in enumerate(views)]
    source = read(write(tmp_path, f"{FIRST},view", *rows, files=len(rows)))
    assert source.summary.endswith("4 patients; 7 views that are not frontal left out")


@pytest.mark.parametrize("views", [("PA", "LATERAL"), ("lateral", "PA")])
def test_a_lateral_view_of_a_study_is_no_second_file(
    tmp_path: Path, views: tuple[str, str]
) -> None:
    rows = [f"images/{i}.png,p,1,s,{view}" for i, view in enumerate(views)]
    (study,) = read(write(tmp_path, f"{FIRST},study,view", *rows)).studies
    assert study.url.endswith(f"{views.index('PA')}.png")
    frontal = [row.replace("LATERAL", "AP").replace("lateral", "AP") for row in rows]
    with pytest.raises(SourceError, match="rows 2 and 3 give one study two files"):
        read(write(tmp_path, f"{FIRST},study,view", *frontal))


def test_a_long_table_of_texts_with_line_breaks(tmp_path: Path) -> None:
    report = '"first line\nsecond, ' + "x" * 10_000 + '"'
    rows = [f"images/0.png,p,1,{i},{i},5,5,{report}" for i in range(300)]
    (study,) = read(write(tmp_path, f"{FIRST},x,y,width,height,report", *rows)).studies
    assert len(study.boxes) == 300


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        (["seen by Dr. M. on 12 March: suspected pneumonia of the left lower lobe"], "up to 70"),
        ([f"text {i}" for i in range(101)], "got 101 different texts"),
    ],
)
def test_a_finding_is_a_category_not_a_report(
    findings: list[str], message: str, tmp_path: Path
) -> None:
    rows = [f"images/{i}.png,p{i},0,{finding}" for i, finding in enumerate(findings)]
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path, f"{FIRST},finding", *rows, files=len(rows)))


def test_one_study_of_two_files_is_refused(tmp_path: Path) -> None:
    rows = ["images/0.png,p,0,s", "images/1.png,p,0,s"]
    with pytest.raises(SourceError, match="rows 2 and 3 give one study two files"):
        read(write(tmp_path, f"{FIRST},study", *rows))


def test_no_message_quotes_a_cell(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read(write(tmp_path, FIRST, "images/Jane_Doe.png,Jane,0"))
    assert "Jane" not in str(caught.value)
