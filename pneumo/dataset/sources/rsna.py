"""RSNA's tables in Kaggle's layout -> studies.

Kaggle's `patientId` is an image id. The patient is in the published mapping to NIH ChestX-ray14,
whose file names start with the patient's number.
https://www.rsna.org/rsnai/ai-image-challenge/rsna-pneumonia-detection-challenge-2018
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, get_args

import pyarrow as pa

from pneumo import storage
from pneumo.dataset.source import RSNA, Finding, Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector
from pneumo.dataset.sources.tables import (
    LINE,
    PACKINGS,
    first_present,
    make_box,
    read_numbers,
    read_table,
    read_unpacked,
)
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

LABEL_TABLES = ("stage_2_train_labels.csv", "train_labels.csv", "stage_1_train_labels.csv")
CLASS_TABLES = (
    "stage_2_detailed_class_info.csv",
    "detailed_class_info.csv",
    "stage_1_detailed_class_info.csv",
)
IMAGE_FOLDERS = ("stage_2_train_images", "train_images", "stage_1_train_images")
MAPPING = ("pneumonia-challenge-dataset-mappings_2018.json",)
_COLUMNS = ("patientId", *Box._fields, "Target", "class", "patient", "split")
_MAX_FOLDERS_SEARCHED = 20
_WITHOUT_CLASS = {1: "Lung Opacity", 0: "No Lung Opacity"}


def read_rsna(folder: Folder, layout: Layout, *, with_classes: bool = True) -> Source:
    """The studies of the label table, under Kaggle's current or older names, uncompressed, .gz or
    .zip.

    Raises SourceError for a missing table or column, and an invalid value. A study with
    contradictory rows is rejected.
    """
    files, source_url = folder.files, folder.source_url
    label_url = _find(files, LABEL_TABLES, "label table", source_url)
    class_url = _find(files, CLASS_TABLES, "class table", source_url) if with_classes else None
    images_url = _find_images(files, source_url)
    targets, boxes, faulty = _collect_labels(read_rsna_table(label_url, "patientId", "Target"))
    findings: Mapping[str, list[Any]] = {
        image_id: [_WITHOUT_CLASS[values[0]]] for image_id, values in targets.items()
    }
    if class_url is not None:
        findings = _collect_findings(read_rsna_table(class_url, "patientId", "class"))
    patients, remapped = _read_patients(files, targets.keys())
    faulty.update(remapped)
    studies = StudyCollector(folder, layout)
    for image_id, values in targets.items():
        own, named = tuple(boxes.get(image_id, ())), findings.get(image_id, [])
        wrong = faulty.get(image_id) or _contradiction(values, named, own)
        if wrong is not None:
            studies.reject(image_id, "contradiction", wrong)
            continue
        patient = None if patients is None else patients[image_id]
        url = storage.join(images_url, f"{image_id}.dcm")
        studies.add(image_id, patient, url, values[0], named[0], boxes=own)
    return studies.finish(
        has_patients=patients is not None,
        unlabelled=len((_list_images(images_url, targets) | findings.keys()) - targets.keys()),
    )


def read_rsna_table(url: str, *required: str) -> pa.Table:
    """A table of RSNA, or a split list. Raises SourceError."""
    return read_table(url, *required, texts=("patientId", "patient"), known=_COLUMNS)


def _find(files: Mapping[str, str], names: tuple[str, ...], what: str, source_url: str) -> str:
    name = first_present(files, names)
    if name is None:
        raise SourceError(f"{source_url}: no {what}; expected one of: {', '.join(names)}")
    return files[name]


def _find_images(files: Mapping[str, str], source_url: str) -> str:
    name = first_present(files, IMAGE_FOLDERS, ("",))
    if name is not None:
        return files[name]
    packed = first_present(files, IMAGE_FOLDERS, PACKINGS[1:])
    if packed is not None:
        folder = packed.split(".", 1)[0]
        raise SourceError(f"{source_url}: {packed} is still packed; unpack it into {folder}/")
    return _find(files, IMAGE_FOLDERS, "image folder", source_url)


def _collect_labels(
    table: pa.Table,
) -> tuple[dict[str, list[int]], dict[str, list[Box]], dict[str, str]]:
    """Distinct targets, boxes, and errors in boxes, by image id. The table has a row per box."""
    targets: dict[str, list[int]] = {}
    boxes: dict[str, list[Box]] = {}
    faulty: dict[str, str] = {}
    corners = [read_numbers(table, name, "label table") for name in Box._fields]
    columns = [table[name].to_pylist() for name in (LINE, "patientId", "Target")]
    for row, image_id, target, *corner in zip(*columns, *corners, strict=True):
        if target not in (0, 1, "0", "1"):  # strings where a cell of the column is no number
            raise SourceError(f"label table: row {row}: a Target that is neither 0 nor 1")
        if not image_id:
            raise SourceError(f"label table: row {row}: no patientId")
        known = targets.setdefault(image_id, [])
        if int(target) not in known:
            known.append(int(target))
        box = make_box(corner)
        if isinstance(box, str):
            faulty[image_id] = box
        elif box is not None:
            known_boxes = boxes.setdefault(image_id, [])
            if box not in known_boxes:  # a duplicate row
                known_boxes.append(box)
    return targets, boxes, faulty


def _collect_findings(table: pa.Table) -> dict[str, list[Finding]]:
    """Distinct findings by image id."""
    allowed = get_args(Finding)
    findings: dict[str, list[Any]] = {}
    columns = [table[name].to_pylist() for name in (LINE, "patientId", "class")]
    for row, image_id, finding in zip(*columns, strict=True):
        if finding not in allowed:
            raise SourceError(
                f"class table: row {row}: a class that is none of: {', '.join(allowed)}"
            )
        known = findings.setdefault(image_id, [])
        if finding not in known:
            known.append(finding)
    return findings


def _contradiction(
    targets: Sequence[int], findings: Sequence[str], boxes: Sequence[Box]
) -> str | None:
    """The contradiction in the tables for one image, or None."""
    if len(targets) > 1:
        return "both Target 0 and Target 1"
    if len(findings) > 1:
        return "two classes"
    if not findings:
        return "labelled, but without a class"
    if (findings[0] == "Lung Opacity") != (targets[0] == 1):
        return f"class {findings[0]!r} with Target {targets[0]}"
    if boxes and not targets[0]:
        return "Target 0 with a box"
    return None


def _list_images(images_url: str, labelled: Collection[str]) -> set[str]:
    """The ids of the images with a DICOM file.

    Raises SourceError where no `labelled` image has one and the reason can be found.
    """
    names = storage.list_names(images_url)
    found = {name.removesuffix(".dcm") for name in names if name.endswith(".dcm")}
    if found.isdisjoint(labelled) and (why := _find_elsewhere(images_url, names, labelled)):
        raise SourceError(
            f"{images_url}: none of the {len(labelled)} labelled images is there as "
            f"<patientId>.dcm: {why}"
        )
    return found


def _find_elsewhere(images_url: str, names: Sequence[str], labelled: Collection[str]) -> str | None:
    """Where the images are instead; None if unknown."""

    def has_labelled(found: Sequence[str]) -> bool:
        return any(name.rsplit(".", 1)[0] in labelled for name in found)

    if has_labelled(names):
        endings = sorted({PurePosixPath(name).suffix or "nothing" for name in names})
        return f"the files end in {', '.join(endings[:3])}; rename them to end in .dcm"
    if packed := [n for n in names if n.endswith((".zip", ".gz", ".tar", ".tgz", ".7z"))]:
        return f"{packed[0]} is still packed; unpack it there"
    for name in names[:_MAX_FOLDERS_SEARCHED]:
        below = storage.list_names(storage.join(images_url, name))
        if has_labelled(below):
            return f"they lie one folder deeper, in {name}/; move them up"
    return None


def _read_patients(
    files: Mapping[str, str], labelled: Collection[str]
) -> tuple[dict[str, str] | None, dict[str, str]]:
    """Image id -> NIH patient number, None without the mapping file; and errors by image id, for
    images of two patients."""
    name = first_present(files, MAPPING)
    if name is None:
        return None, {}
    url = files[name]
    patients: dict[str, str] = {}
    remapped: dict[str, str] = {}
    try:
        for row in json.loads(read_unpacked(url)):
            image_id, patient = row["subset_img_id"], row["img_id"].split("_")[0]
            if patients.setdefault(image_id, patient) != patient:
                remapped[image_id] = "two patients"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{url}: not the published mapping: expected a JSON list of objects with "
            "subset_img_id and img_id"
        ) from error
    if unmapped := sum(image_id not in patients for image_id in labelled):
        raise SourceError(
            f"{MAPPING[0]}: {unmapped} of {len(labelled)} labelled images are not in it; "
            "use the complete mapping file"
        )
    return patients, remapped


def _is_rsna(files: Mapping[str, str]) -> bool:
    return first_present(files, LABEL_TABLES) is not None


LAYOUT = Layout(
    name=RSNA,
    title="RSNA (Kaggle)",
    name_patterns=(
        r"(stage_[12]_)?train_(images|labels)",
        r".*detailed_class_info",
        "pneumonia-challenge",
    ),
    missing=f"no label table; expected one of: {', '.join(LABEL_TABLES)}",
    recognise=_is_rsna,
    read=read_rsna,
)
WITHOUT_CLASSES = Layout(
    name="rsna-without-classes",
    title="RSNA (Kaggle) without its classes",
    name_patterns=(),
    missing=LAYOUT.missing,
    recognise=_is_rsna,
    read=partial(read_rsna, with_classes=False),
)
