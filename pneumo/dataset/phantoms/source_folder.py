"""Phantom chest X-rays in the layout of Kaggle's RSNA Pneumonia data: the embedded default data.

    python -m pneumo.synthetic --out data/phantoms --studies 200 --seed 0

Nothing here comes from a patient: every picture is drawn from (seed, patient index, study index).
The population keeps what makes the real data hard: several studies of one patient, AP views far
more often positive than PA, two kinds of negatives, opacities from obvious to invisible. One real
trap is left out: the study names (UUIDs) are independent of the label.
A folder is whole once `synthetic.json` stands in it; it is written last.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import cv2
import numpy as np
import pydicom.config
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage
from tqdm import tqdm

from pneumo.dataset.phantoms.drawing import (
    HEADER,
    IMAGE_SIDE_PX,
    Anatomy,
    Box,
    Finding,
    PhantomPatient,
    PhantomStudy,
    generator,
    render_study,
)
from pneumo.errors import SourceError, UserError

Item = TypeVar("Item")

_VERSION = 1  # of the pictures: a folder written by another version is not taken for this one's
_MARKER, _CLAIM = "synthetic.json", "synthetic.partial.json"
_IMAGES, _LABELS = "stage_2_train_images", "stage_2_train_labels.csv"
_CLASSES = "stage_2_detailed_class_info.csv"
_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
# Shares in the 26,684 real training images.
_POSITIVE_SHARE, _NORMAL_SHARE = 0.225, 0.332
_PIXEL_SPACINGS_MM = (0.143, 0.168, 0.139, 0.171, 0.194311)


@dataclass(frozen=True)
class PhantomSummary:
    """What stands in a folder of phantoms; `reused` when nothing had to be written."""

    out: Path
    num_studies: int
    num_patients: int
    num_positives: int
    seconds: float
    reused: bool


# --- the population


def draw_patient(seed: int, index: int, *, max_studies: int) -> PhantomPatient:
    """Draw patient `index` of the population `seed`, with 1 to `max_studies` studies.

    The number of studies has a Pareto tail as in the real mapping: 62 % have one, a few dozens;
    patient 0 has two or more, so that even a small population has a patient to split by.
    """
    rng = generator(seed, index)
    num_studies = min(max(int(rng.pareto(1.4)) + 1, 2 if index == 0 else 1), max_studies)
    sex: Literal["M", "F"] = "M" if rng.random() < 0.57 else "F"
    anatomy = Anatomy(
        width=rng.uniform(0.88, 1.06),
        height=rng.uniform(0.9, 1.06),
        habitus=rng.uniform(0.95, 1.2),
        heart=rng.normal(1.0, 0.08),
        right_dome=rng.normal(0.0, 0.012),
        left_dome=rng.normal(0.02, 0.012),
        rib_pitch=rng.uniform(0.066, 0.08),
        rib_slope=rng.uniform(0.1, 0.2),
        clavicle_slope=rng.uniform(0.0, 0.08),
        spine_bend=rng.normal(0.0, 0.008),
        breast=rng.uniform(0.3, 1.0) if sex == "F" else 0.0,
        vessel_seed=int(rng.integers(2**32)),
    )
    age = int(np.clip(rng.normal(47, 17), 1, 90))
    return PhantomPatient(index, sex, age, num_studies, float(rng.normal()), anatomy)


def draw_population(num_studies: int, seed: int) -> tuple[PhantomStudy, ...]:
    """Draw the studies of a population, in order of their names.

    22.5 % are positive, 33.2 % normal, to the rounding; from three studies on every finding is
    there. Findings go by rank of a severity that the
    studies of a patient share in part, so they depend on `num_studies` as well.
    Raises ValueError unless `num_studies` >= 1 and `seed` >= 0.
    """
    if num_studies < 1 or seed < 0:
        raise ValueError(f"phantoms: got {num_studies=}, {seed=}; expected >= 1 and >= 0")
    # A share of the whole at most, so that a small set can still be split by patient.
    cap = int(np.clip(num_studies // 8, 3, 40))
    keys: list[tuple[PhantomPatient, int]] = []
    index = 0
    while len(keys) < num_studies:
        patient = draw_patient(seed, index, max_studies=cap)
        keys += [(patient, i) for i in range(patient.num_studies)]
        index += 1
    keys = keys[:num_studies]
    scores = [0.6 * p.severity + 0.8 * generator(seed, p.index, i).normal() for p, i in keys]
    num_positive = round(_POSITIVE_SHARE * num_studies)
    num_normal = round(_NORMAL_SHARE * num_studies)
    if num_studies >= 3:
        num_positive, num_normal = max(num_positive, 1), max(num_normal, 1)
    findings: list[Finding] = ["No Lung Opacity / Not Normal"] * num_studies
    order = np.argsort(scores)
    for i in order[:num_normal]:
        findings[i] = "Normal"
    for i in order[num_studies - num_positive :]:
        findings[i] = "Lung Opacity"
    studies = (
        _draw_study(seed, *key, finding) for key, finding in zip(keys, findings, strict=True)
    )
    return tuple(sorted(studies, key=lambda study: study.name))


def _draw_study(seed: int, patient: PhantomPatient, index: int, finding: Finding) -> PhantomStudy:
    rng = generator(seed, patient.index, index, HEADER)
    names = [uuid.UUID(bytes=rng.bytes(16), version=4) for _ in range(4)]
    ap_share = {"Lung Opacity": 0.776, "Normal": 0.185}.get(finding, 0.497)
    # About one age in a hundred is a slip of the pen, as 151 is in the real headers.
    age = int(rng.integers(148, 156)) if rng.random() < 0.01 else min(patient.age + index // 3, 90)
    return PhantomStudy(
        seed=seed,
        patient=patient,
        index=index,
        name=str(names[0]),
        finding=finding,
        view="AP" if rng.random() < ap_share else "PA",
        age=age,
        pixel_spacing_mm=float(rng.choice(_PIXEL_SPACINGS_MM, p=(0.34, 0.33, 0.2, 0.08, 0.05))),
        # UIDs made of a UUID: DICOM PS3.5, B.2.
        sop_uid=f"2.25.{names[1].int}",
        series_uid=f"2.25.{names[2].int}",
        study_uid=f"2.25.{names[3].int}",
    )


def write_phantoms(
    out: Path,
    *,
    num_studies: int,
    seed: int,
    num_processes: int | None = None,
    progress: bool = False,
) -> PhantomSummary:
    """Write a folder of phantoms in Kaggle's layout; a whole one of the same arguments is kept.

    `num_processes` None takes one per CPU where there is work enough; the files are the same, to
    the byte, whatever the number. A folder left half-written by the same arguments is written
    anew. Raises SourceError for a folder that holds anything else, or that cannot be written, and
    ValueError unless `num_studies` >= 1 and `seed` >= 0.
    """
    start = time.perf_counter()
    studies = draw_population(num_studies, seed)
    arguments = {"version": _VERSION, "num_studies": num_studies, "seed": seed}
    try:
        reused = _is_whole(out, arguments, studies)
        if not reused:
            num_bytes = _write_folder(out, arguments, studies, num_processes, progress)
            _put_json(out / _MARKER, {**arguments, "num_image_bytes": num_bytes})
            (out / _CLAIM).unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SourceError(f"--out {out}: {reason}; name a folder that can be written") from error
    return PhantomSummary(
        out=out,
        num_studies=num_studies,
        num_patients=len({study.patient.index for study in studies}),
        num_positives=sum(study.positive for study in studies),
        seconds=time.perf_counter() - start,
        reused=reused,
    )


def _is_whole(out: Path, arguments: dict[str, int], studies: Sequence[PhantomStudy]) -> bool:
    """Tell whether all files stand; raise SourceError where none may be written."""
    marker = _read_json(out / _MARKER)
    known = marker or _read_json(out / _CLAIM)
    if known is None:
        if out.exists() and any(out.iterdir()):
            raise SourceError(
                f"--out {out}: got a folder with other files, expected an empty or a new one; "
                "name another folder"
            )
        return False
    found = {key: known.get(key) for key in arguments}
    if found != arguments:
        raise SourceError(
            f"--out {out}: got phantoms of {_spell(found)}, expected {_spell(arguments)}; "
            "name another folder or delete this one"
        )
    if marker is None or not all((out / name).is_file() for name in (_LABELS, _CLASSES, _MAPPING)):
        return False
    images = [out / _IMAGES / f"{study.name}.dcm" for study in studies]
    if not all(image.is_file() for image in images):
        return False
    return sum(image.stat().st_size for image in images) == marker.get("num_image_bytes")


def _spell(arguments: dict[str, object] | dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in arguments.items())


def _read_json(path: Path) -> dict[str, object] | None:
    """Read an object; None when it is absent or was cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _put_json(path: Path, value: dict[str, int]) -> None:
    """Write an object in one step: readers see all of it or nothing."""
    partial_path = path.with_name(path.name + ".tmp")
    partial_path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)


def _write_folder(
    out: Path,
    arguments: dict[str, int],
    studies: Sequence[PhantomStudy],
    num_processes: int | None,
    progress: bool,
) -> int:
    """Write images and tables under a claim, without the marker; return the images' bytes."""
    out.mkdir(parents=True, exist_ok=True)
    _put_json(out / _CLAIM, arguments)
    (out / _MARKER).unlink(missing_ok=True)
    (out / _IMAGES).mkdir(exist_ok=True)
    if num_processes is None:  # starting a process costs as much as ten studies
        num_processes = min(os.cpu_count() or 1, 1 + len(studies) // 32)
    write = partial(_write_image, out / _IMAGES)
    if num_processes == 1:
        results = list(_show_progress(map(write, studies), len(studies), progress))
    else:
        # Spawned, not forked: the caller may hold threads, of torch for instance.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, _start_worker) as pool:
            try:
                pending = pool.map(write, studies, chunksize=4)
                results = list(_show_progress(pending, len(studies), progress))
            except BaseException:  # an interrupt too must not wait for what is queued
                pool.shutdown(cancel_futures=True)
                raise
    _write_tables(out, studies, [boxes for _, boxes in results])
    return sum(num_bytes for num_bytes, _ in results)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    cv2.setNumThreads(1)


def _show_progress(items: Iterable[Item], total: int, progress: bool) -> Iterator[Item]:
    """Pass the items on; show a bar in a terminal after 2 s, elsewhere a line every 10 s."""
    if sys.stderr.isatty() or not progress:
        yield from tqdm(items, "phantoms", total, unit="study", delay=2, disable=not progress)
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"phantoms: {done} of {total} studies", file=sys.stderr, flush=True)


def _write_image(folder: Path, study: PhantomStudy) -> tuple[int, tuple[Box, ...]]:
    phantom = render_study(study)
    content = encode_dicom(study, phantom.pixels)
    (folder / f"{study.name}.dcm").write_bytes(content)
    return len(content), phantom.boxes


def encode_dicom(study: PhantomStudy, pixels: NDArray[np.uint8]) -> bytes:
    """Encode (1024, 1024) uint8 pixels as the real files are: JPEG Baseline, odd header values.

    PatientAge is a bare integer such as `62`, no valid AS (PS3.5, 6.2); name and id are the UUID;
    window and rescale are absent.
    """
    ok, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok, "OpenCV encodes any 8-bit image"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID(study.sop_uid)
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    # Our own, or the bytes would change with the version of pydicom.
    meta.ImplementationClassUID = UID("2.25.175849603127349585134938293420189201337")
    meta.ImplementationVersionName = "PNEUMO_PHANTOM"
    dataset = Dataset()
    dataset.file_meta = meta
    for keyword, value in _header(study).items():
        setattr(dataset, keyword, value)
    ignore = pydicom.config.IGNORE
    dataset.add(DataElement(0x00101010, "AS", str(study.age), validation_mode=ignore))
    dataset.PixelData = encapsulate([jpeg.tobytes()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _header(study: PhantomStudy) -> dict[str, object]:
    return {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": SecondaryCaptureImageStorage,
        "SOPInstanceUID": study.sop_uid,
        "StudyDate": "19010101",
        "StudyTime": "000000.00",
        "AccessionNumber": "",
        "Modality": "CR",
        "ConversionType": "WSD",
        "ReferringPhysicianName": "",
        "SeriesDescription": f"view: {study.view}",
        "PatientName": study.name,
        "PatientID": study.name,
        "PatientBirthDate": "",
        "PatientSex": study.patient.sex,
        "BodyPartExamined": "CHEST",
        "ViewPosition": study.view,
        "StudyInstanceUID": study.study_uid,
        "SeriesInstanceUID": study.series_uid,
        "StudyID": "",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "PatientOrientation": "",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": IMAGE_SIDE_PX,
        "Columns": IMAGE_SIDE_PX,
        "PixelSpacing": [study.pixel_spacing_mm, study.pixel_spacing_mm],
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "LossyImageCompression": "01",
        "LossyImageCompressionMethod": "ISO_10918_1",
    }


def _write_tables(
    out: Path, studies: Sequence[PhantomStudy], boxes: Sequence[tuple[Box, ...]]
) -> None:
    """Write labels and classes, a row per box, and the mapping to the patients."""
    labels: list[Sequence[object]] = [("patientId", "x", "y", "width", "height", "Target")]
    classes: list[Sequence[object]] = [("patientId", "class")]
    for study, of_study in zip(studies, boxes, strict=True):
        target = int(study.positive)
        cells: list[Sequence[object]] = [(b.x, b.y, b.width, b.height) for b in of_study]
        cells = cells or [("", "", "", "")]
        labels += [(study.name, *four, target) for four in cells]
        classes += [(study.name, study.finding)] * len(cells)
    for name, rows in ((_LABELS, labels), (_CLASSES, classes)):
        with (out / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    mapping = [
        {
            "subset_img_id": study.name,
            "img_id": f"{study.patient.index + 1:08d}_{study.index:03d}.png",
            "SOPInstanceUID": study.sop_uid,
            "StudyInstanceUID": study.study_uid,
            "SeriesInstanceUID": study.series_uid,
        }
        for study in studies
    ]
    (out / _MAPPING).write_text(json.dumps(mapping, indent=0) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder of phantoms; return 0, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pneumo.synthetic",
        description="Write phantom chest X-rays in the layout of Kaggle's RSNA Pneumonia data.",
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write (required)")
    add("--studies", type=int, default=200, metavar="N", help=f"images to draw {default}")
    add("--seed", type=int, default=0, metavar="S", help=f"seed of the population {default}")
    add("--jobs", type=int, metavar="P", help="processes to use (default: one per CPU)")
    options = parser.parse_args(argv)
    for flag, least in (("studies", 1), ("seed", 0), ("jobs", 1)):
        value = getattr(options, flag)
        if value is not None and value < least:
            parser.error(f"--{flag}: got {value}, expected {least} or more")
    try:
        summary = write_phantoms(
            options.out,
            num_studies=options.studies,
            seed=options.seed,
            num_processes=options.jobs,
            progress=True,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    print(
        f"phantoms: {'already whole' if summary.reused else 'written'}: "
        f"{summary.num_studies} studies of {summary.num_patients} patients, "
        f"{summary.num_positives} positive, in {summary.out} ({summary.seconds:.1f} s)"
    )
    return 0
