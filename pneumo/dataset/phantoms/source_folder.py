"""A folder of phantom chest X-rays in the layout of Kaggle's RSNA Pneumonia data.

Nothing here comes from a patient. `synthetic.json` says what the folder holds; it is written first,
and once more, with the size of the images, when the folder is whole.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage
from tqdm import tqdm

from pneumo.dataset.phantoms import MARKER
from pneumo.dataset.phantoms.drawing import IMAGE_SIDE_PX, render_study
from pneumo.dataset.phantoms.population import PhantomStudy, draw_population
from pneumo.dataset.source import CLASS_TABLES, IMAGE_FOLDERS, LABEL_TABLES, MAPPING
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

_VERSION = 2  # of the pictures: a folder written by another version is not taken for this one's


def write_phantoms(
    out: Path, *, num_studies: int, seed: int, num_processes: int | None = None
) -> bool:
    """Write a folder of phantoms; False where a whole one of the same arguments was there already.

    The files are the same, to the byte, whatever the number of processes (None: one per CPU where
    there is work enough). What an interrupted call left is written anew. Raises SourceError for a
    folder that holds anything else or cannot be written, else as `draw_population`.
    """
    studies = draw_population(num_studies, seed)
    holds = {"version": _VERSION, "num_studies": num_studies, "seed": seed}
    try:
        if _is_whole(out, holds, studies):
            return False
        (out / IMAGE_FOLDERS[0]).mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(json.dumps(holds))
        sizes, boxes = zip(*_write_images(out, studies, num_processes), strict=True)
        _write_tables(out, studies, boxes)
        (out / MARKER).write_text(json.dumps({**holds, "num_image_bytes": sum(sizes)}))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SourceError(f"--out {out}: {reason}; name a folder that can be written") from error
    return True


def _is_whole(out: Path, holds: dict[str, int], studies: Sequence[PhantomStudy]) -> bool:
    """Whether all is there; raises SourceError where something else is."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / MARKER).read_text())
    except (FileNotFoundError, ValueError):
        found = {}
    if {name: found.get(name) for name in holds} != holds:
        raise SourceError(
            f"--out {out}: got {found or 'other files'}, expected phantoms of {holds}; name "
            "another folder, or delete this one"
        )
    tables = [out / name for name in (LABEL_TABLES[0], CLASS_TABLES[0], MAPPING[0])]
    images = [out / IMAGE_FOLDERS[0] / f"{study.name}.dcm" for study in studies]
    if not all(path.is_file() for path in (*tables, *images)):
        return False
    return bool(found.get("num_image_bytes") == sum(path.stat().st_size for path in images))


def _write_images(
    out: Path, studies: Sequence[PhantomStudy], num_processes: int | None
) -> list[tuple[int, tuple[Box, ...]]]:
    """Bytes and boxes of each image."""
    if num_processes is None:  # starting a process costs as much as ten studies
        num_processes = min(os.cpu_count() or 1, 1 + len(studies) // 32)
    write = partial(_write_image, out / IMAGE_FOLDERS[0])
    every_s = 0.1 if sys.stderr.isatty() else 10
    show = partial(tqdm, desc="phantoms", total=len(studies), delay=5, mininterval=every_s)
    if num_processes == 1:
        return list(show(map(write, studies)))
    # Spawned, not forked: the caller may hold threads, of torch for instance.
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes, signal.signal, ignore_interrupts) as pool:
        return list(show(pool.imap(write, studies, chunksize=4)))


def _write_image(folder: Path, study: PhantomStudy) -> tuple[int, tuple[Box, ...]]:
    cv2.setNumThreads(1)
    pixels, boxes = render_study(study)
    content = _encode_dicom(study, pixels)
    (folder / f"{study.name}.dcm").write_bytes(content)
    return len(content), boxes


def _encode_dicom(study: PhantomStudy, pixels: NDArray[np.uint8]) -> bytes:
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


def _write_tables(
    out: Path, studies: Sequence[PhantomStudy], boxes: Sequence[tuple[Box, ...]]
) -> None:
    """Labels and classes, a row a box, and the mapping to the patients."""
    labels: list[Sequence[object]] = [("patientId", *Box._fields, "Target")]
    classes: list[Sequence[object]] = [("patientId", "class")]
    for study, own in zip(studies, boxes, strict=True):
        labels += [(study.name, *box, int(study.positive)) for box in own or [("",) * 4]]
        classes += [(study.name, study.finding)] * max(len(own), 1)
    for name, rows in ((LABEL_TABLES[0], labels), (CLASS_TABLES[0], classes)):
        with (out / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    mapping = [
        {
            "subset_img_id": study.name,
            "img_id": f"{study.patient + 1:08d}_{study.index:03d}.png",
            **_make_uids(study),
        }
        for study in studies
    ]
    (out / MAPPING[0]).write_text(json.dumps(mapping, indent=0) + "\n")
