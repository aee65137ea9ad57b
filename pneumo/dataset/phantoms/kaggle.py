"""Phantoms in the layout of Kaggle's RSNA Pneumonia data."""

import csv
import io
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo.dataset.phantoms.drawing import IMAGE_SIDE_PX
from pneumo.dataset.phantoms.population import PhantomStudy
from pneumo.dataset.sources.rsna import CLASS_TABLES, LABEL_TABLES, MAPPING
from pneumo.images.boxes import Box

Boxes = Sequence[tuple[Box, ...]]
"""Of each study."""


def encode_dicom(study: PhantomStudy, pixels: NDArray[np.uint8]) -> bytes:
    """(1024, 1024) uint8 as the real files are: JPEG Baseline, PatientAge a bare integer such as
    `62`, no valid AS (PS3.5 6.2); name and id are the image's UUID; no window, no rescale."""
    ok, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok, "OpenCV encodes any 8-bit image"
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    # Our own, or the bytes would change with the version of pydicom.
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
    """UIDs made of UUIDs (PS3.5 B.2)."""
    levels = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    return {level: f"2.25.{uuid.uuid5(uuid.UUID(study.name), level).int}" for level in levels}


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """A CSV of `rows`, the first the names of the columns."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_kaggle_tables(out: Path, studies: Sequence[PhantomStudy], boxes: Boxes) -> None:
    """Labels and classes, a row a box, and the mapping to the patients."""
    labels: list[Sequence[object]] = [("patientId", *Box._fields, "Target")]
    classes: list[Sequence[object]] = [("patientId", "class")]
    for study, own in zip(studies, boxes, strict=True):
        labels += [(study.name, *box, int(study.positive)) for box in own or [("",) * 4]]
        classes += [(study.name, study.finding)] * max(len(own), 1)
    write_rows(out / LABEL_TABLES[0], labels)
    write_rows(out / CLASS_TABLES[0], classes)
    mapping = [
        {
            "subset_img_id": study.name,
            "img_id": f"{study.patient + 1:08d}_{study.index:03d}.png",
            **_make_uids(study),
        }
        for study in studies
    ]
    (out / MAPPING[0]).write_text(json.dumps(mapping, indent=0) + "\n")
