"""The layouts of phantom folders: paths and encoding of images, and the tables."""

import csv
import io
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo.dataset.phantoms.drawing import IMAGE_SIDE_PX
from pneumo.dataset.phantoms.population import PhantomStudy
from pneumo.dataset.sources.rsna import CLASS_TABLES, IMAGE_FOLDERS, LABEL_TABLES, MAPPING
from pneumo.images.boxes import Box

Boxes = Sequence[tuple[Box, ...]]
"""The boxes of each study."""


@dataclass(frozen=True)
class PhantomLayout:
    """A folder layout of phantoms."""

    name: str
    tables: tuple[str, ...]
    """Files of a complete folder besides the images."""
    path_of: Callable[[PhantomStudy], str]
    """Path of the study's image in the folder."""
    write_tables: Callable[[Path, Sequence[PhantomStudy], Boxes], None]

    def encode(self, study: PhantomStudy, pixels: NDArray[np.uint8]) -> bytes:
        """The study's image file, in the format of its extension."""
        ending = Path(self.path_of(study)).suffix
        if ending in (".dcm", ".dicom"):
            return _encode_dicom(study, pixels)
        return cv2.imencode(ending, pixels)[1].tobytes()


def _encode_dicom(study: PhantomStudy, pixels: NDArray[np.uint8]) -> bytes:
    """(1024, 1024) uint8 as in RSNA's files: JPEG Baseline; PatientAge is an integer such as `62`,
    no valid AS (PS3.5 6.2); name and id are the image's UUID; no window, no rescale."""
    ok, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok, "OpenCV encodes any 8-bit image"
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    # Set explicitly, as pydicom's default depends on its version.
    dataset.file_meta.ImplementationClassUID = UID("2.25.175849603127349585134938293420189201337")
    dataset.file_meta.ImplementationVersionName = "PNEUMO_PHANTOM"
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    for keyword, uid in _make_uids(study).items():
        setattr(dataset, keyword, uid)
    dataset.Modality, dataset.ConversionType, dataset.BodyPartExamined = "CR", "WSD", "CHEST"
    dataset.PatientName = dataset.PatientID = study.name
    dataset.PatientSex, dataset.ViewPosition = study.sex, study.view
    with pydicom.config.disable_value_validation():
        dataset.PatientAge = str(study.age)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = IMAGE_SIDE_PX
    dataset.PixelSpacing = [study.pixel_spacing_mm] * 2
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = encapsulate([jpeg.tobytes()])
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _make_uids(study: PhantomStudy) -> dict[str, str]:
    """UIDs derived from UUIDs (PS3.5 B.2)."""
    levels = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    return {level: f"2.25.{uuid.uuid5(uuid.UUID(study.name), level).int}" for level in levels}


def _write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV of `rows`; the first one has the names of the columns."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_kaggle_tables(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    """Labels and classes, with a row per box, and the mapping to patients."""
    labels: list[Sequence[object]] = [("patientId", *Box._fields, "Target")]
    classes: list[Sequence[object]] = [("patientId", "class")]
    for study, own in zip(studies, boxes, strict=True):
        labels += [(study.name, *box, int(study.positive)) for box in own or [("",) * 4]]
        classes += [(study.name, study.finding)] * max(len(own), 1)
    _write_rows(out / LABEL_TABLES[0], labels)
    _write_rows(out / CLASS_TABLES[0], classes)
    mapping = [
        {
            "subset_img_id": study.name,
            "img_id": _name_nih(study),
            **_make_uids(study),
        }
        for study in studies
    ]
    (out / MAPPING[0]).write_text(json.dumps(mapping, indent=0) + "\n")


def _path_of_own(study: PhantomStudy) -> str:
    return f"images/{study.name}.png"


def _write_own_table(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    rows: list[Sequence[object]] = [
        ("file", "patient", "target", "finding", "view", "age", "sex", *Box._fields)
    ]
    for study, own in zip(studies, boxes, strict=True):
        row = (_path_of_own(study), f"p{study.patient}", int(study.positive), study.finding)
        header = (study.view, study.age, study.sex)
        rows += [(*row, *header, *box) for box in own or [("",) * 4]]
    _write_rows(out / "studies.csv", rows)


def _name_nih(study: PhantomStudy) -> str:
    return f"{study.patient + 1:08d}_{study.index:03d}.png"


def _write_nih_tables(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    labels = {
        "Lung Opacity": "Infiltration|Pneumonia",
        "No Lung Opacity / Not Normal": "Effusion",
        "Normal": "No Finding",
    }
    names = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age")
    rows: list[Sequence[object]] = [(*names, "Patient Gender", "View Position")]
    drawn: list[Sequence[object]] = [("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")]
    for study, own in zip(studies, boxes, strict=True):
        labelled = (_name_nih(study), labels[study.finding], study.index, study.patient + 1)
        rows.append((*labelled, study.age, study.sex, study.view))
        drawn += [(_name_nih(study), "Pneumonia", *box) for box in own]
    _write_rows(out / "Data_Entry_2017.csv", rows)
    _write_rows(out / "BBox_List_2017.csv", drawn)


def _path_of_chexpert(study: PhantomStudy) -> str:
    folder = f"train/patient{study.patient + 1:05d}/study{study.index + 1}"
    return f"{folder}/view1_frontal.jpg"


def _write_chexpert_tables(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    """Every seventh negative is uncertain, every fifth blank; each patient has a lateral view."""
    names = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Pneumonia")
    rows: list[Sequence[object]] = []
    for number, study in enumerate(studies):
        path = f"CheXpert-v1.0-small/{_path_of_chexpert(study)}"
        sex = {"F": "Female", "M": "Male"}[study.sex]
        label = "1.0" if study.positive else "-1.0" if number % 7 == 0 else "0.0"
        label = "" if label == "0.0" and number % 5 == 0 else label
        healthy = "1.0" if study.finding == "Normal" else ""
        rows.append((path, sex, study.age, "Frontal", study.view, healthy, label))
        if study.index == 0:
            side = path.replace("view1_frontal", "view2_lateral")
            rows.append((side, sex, study.age, "Lateral", "", healthy, label))
    _write_rows(out / "train.csv", [names, *rows])


def _write_vindr_table(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    """Three readers; the last one misses the opacities of every third study."""
    corners = ("x_min", "y_min", "x_max", "y_max")
    rows: list[Sequence[object]] = [("image_id", "class_name", "class_id", "rad_id", *corners)]
    for number, (study, own) in enumerate(zip(studies, boxes, strict=True)):
        for reader in ("R1", "R2", "R3"):
            found = own if reader != "R3" or number % 3 else ()
            rows += [
                (study.name, "Pneumonia", 7, reader, b.x, b.y, b.x + b.width, b.y + b.height)
                for b in found
            ]
            if not found:
                rows.append((study.name, "No finding", 14, reader, "", "", "", ""))
    _write_rows(out / "train.csv", rows)


def _path_of_kermany(study: PhantomStudy) -> str:
    split = "test" if study.patient % 5 == 0 else "train"
    if study.positive:
        cause = "virus" if study.patient % 3 == 0 else "bacteria"
        name = f"person{study.patient}_{cause}_{study.index}.jpeg"
        return f"{split}/PNEUMONIA/{name}"
    return f"{split}/NORMAL/IM-{study.patient:04d}-{study.index:04d}.jpeg"


KAGGLE = PhantomLayout(
    "rsna",
    (LABEL_TABLES[0], CLASS_TABLES[0], MAPPING[0]),
    lambda study: f"{IMAGE_FOLDERS[0]}/{study.name}.dcm",
    _write_kaggle_tables,
)
PHANTOM_LAYOUTS: Mapping[str, PhantomLayout] = {
    layout.name: layout
    for layout in (
        KAGGLE,
        PhantomLayout("own-table", ("studies.csv",), _path_of_own, _write_own_table),
        PhantomLayout(
            "nih",
            ("Data_Entry_2017.csv", "BBox_List_2017.csv"),
            lambda study: f"images_001/images/{_name_nih(study)}",
            _write_nih_tables,
        ),
        PhantomLayout("chexpert", ("train.csv",), _path_of_chexpert, _write_chexpert_tables),
        PhantomLayout(
            "vindr",
            ("train.csv",),
            lambda study: f"train/{study.name}.dicom",
            _write_vindr_table,
        ),
        # No tables: the folders' names are the labels.
        PhantomLayout("kermany", (), _path_of_kermany, lambda out, studies, boxes: None),
    )
}
