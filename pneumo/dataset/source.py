"""A folder in Kaggle's layout -> its studies, keyed so that nobody can be named.

Kaggle's `patientId` is an image id. The patient stands in the published mapping to NIH
ChestX-ray14, whose file names begin with the patient's number.
https://www.rsna.org/rsnai/ai-image-challenge/rsna-pneumonia-detection-challenge-2018
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import IO, Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from pyarrow.types import is_floating, is_integer, is_null

from pneumo import storage
from pneumo.dataset.study_keys import derive_file_key, derive_key, read_hash_key
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

Finding = Literal["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]
LABEL_TABLES = ("stage_2_train_labels.csv", "train_labels.csv", "stage_1_train_labels.csv")
PACKINGS = ("", ".gz", ".zip")
CLASS_TABLES = (
    "stage_2_detailed_class_info.csv",
    "detailed_class_info.csv",
    "stage_1_detailed_class_info.csv",
)
IMAGE_FOLDERS = ("stage_2_train_images", "train_images", "stage_1_train_images")
MAPPING = ("pneumonia-challenge-dataset-mappings_2018.json",)


@dataclass(frozen=True, slots=True)
class Study:
    """One frontal radiograph and what the readers said of it."""

    key: str
    """Keyed hash of the image id, 20 hex digits; in webdataset, no key holds a dot."""
    patient: str
    """Keyed hash of the patient; of the image id where there is no mapping."""
    url: str
    """The DICOM file. It carries an identifier and stays beside the source."""
    target: int
    """1 for pneumonia, 0 otherwise."""
    finding: Finding
    """The detailed class."""
    boxes: tuple[Box, ...]
    """Opacities in pixels of the original image; empty for negatives."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A study that cannot be used. Nothing from its header or its file's name stands in it."""

    key: str
    split: str | None
    """None when it was rejected before it was given one."""
    reason: str
    """A code: contradiction, missing, unreadable, or one of `pneumo.errors.DicomError`."""
    message: str


@dataclass(frozen=True)
class Source:
    """A folder in Kaggle's layout, read."""

    studies: tuple[Study, ...]
    """Sorted by key, so in no order of ids or labels."""
    rejected: tuple[Rejected, ...]
    """Studies of which the tables say two different things."""
    has_patients: bool
    """Whether the mapping told who the patients are."""
    unlabelled: int
    """Images that have a DICOM file or a class, but no label; they are left out."""
    file_key: bytes = field(repr=False)
    """See `study_keys.derive_file_key`."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the tables say, with keyed hashes for ids."""
        rows = [(s.key, s.patient, s.target, s.finding, s.boxes) for s in self.studies]
        rejected = [(item.key, item.message) for item in self.rejected]
        return hashlib.sha256(json.dumps([rows, rejected]).encode()).hexdigest()


def read_source(source_url: str, environ: Mapping[str, str] | None = None) -> Source:
    """Read the tables of a source folder: under Kaggle's names or the older plain ones, bare, .gz
    or .zip, in the folder or in the one folder that an unpacked download makes.

    Raises SourceError when the folder, a table or a column is missing, or a value is not
    understood. A study of which the tables say two different things is rejected, not guessed.
    """
    environ = os.environ if environ is None else environ
    files = _list_source(source_url)
    label_url = _find(files, LABEL_TABLES, "label table", source_url)
    class_url = _find(files, CLASS_TABLES, "class table", source_url)
    images_url = _find_images(files, source_url)
    targets, boxes, faulty = _collect_labels(_read_table(label_url, "patientId", "Target"))
    findings = _collect_findings(_read_table(class_url, "patientId", "class"))
    patients, remapped = _read_patients(files, targets.keys())
    faulty.update(remapped)
    hash_key = read_hash_key(source_url, environ)
    derive_patient = lru_cache(maxsize=None)(partial(derive_key, hash_key, "patient"))
    studies, rejected = [], []
    for image_id, values in targets.items():
        key = derive_key(hash_key, "study", image_id)
        own, named = tuple(boxes.get(image_id, ())), findings.get(image_id, [])
        wrong = faulty.get(image_id) or _contradiction(values, named, own)
        if wrong is not None:
            rejected.append(Rejected(key, None, "contradiction", wrong))
            continue
        patient = derive_patient(image_id if patients is None else patients[image_id])
        url = storage.join(images_url, f"{image_id}.dcm")
        studies.append(Study(key, patient, url, values[0], named[0], own))
    if len({study.key for study in studies}) != len(studies):
        raise SourceError(f"{source_url}: two image ids have one hash; set another hash key")
    return Source(
        studies=tuple(sorted(studies, key=lambda study: study.key)),
        rejected=tuple(sorted(rejected, key=lambda item: item.key)),
        has_patients=patients is not None,
        unlabelled=len((_list_images(images_url, targets) | findings.keys()) - targets.keys()),
        file_key=derive_file_key(hash_key),
    )


def read_split_list(
    list_url: str, source_url: str, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The split of each study key or patient (hashed) that a CSV lists.

    Columns: `patientId` (the images' ids) or `patient` (NIH numbers), and `split`. Raises
    SourceError.
    """
    environ = os.environ if environ is None else environ
    table = _read_table(list_url, "split")
    column = next((name for name in ("patientId", "patient") if name in table.column_names), None)
    if column is None:
        raise SourceError(f"{list_url}: no column patientId or patient, so nobody is listed")
    hash_key = read_hash_key(source_url, environ)
    kind = "study" if column == "patientId" else "patient"
    listed: dict[str, str] = {}
    pairs = zip(table[column].to_pylist(), table["split"].to_pylist(), strict=True)
    for row, (value, split) in enumerate(pairs, _FIRST_ROW):
        identifier = str(value)
        if split not in ("train", "val", "test"):
            # The value is not repeated: of columns in another order it would be an id.
            raise SourceError(f"{list_url}: row {row}: a split that is none of train, val and test")
        if listed.setdefault(derive_key(hash_key, kind, identifier), split) != split:
            raise SourceError(f"{list_url}: lists somebody in two splits")
    return listed


def _list_source(source_url: str) -> dict[str, str]:
    """Name -> URL of what the source holds, or its only folder that has a label table."""
    files = _list_folder(source_url)
    if not files:
        raise SourceError(
            f"{source_url}: no such folder, or nothing in it; expected Kaggle's layout"
        )
    if _first_present(files, LABEL_TABLES) is None:
        below = [_list_folder(url) for name, url in files.items() if not name.startswith(".")]
        candidates = [found for found in below if _first_present(found, LABEL_TABLES) is not None]
        if len(candidates) == 1:
            return {**files, **candidates[0]}
    return files


def _list_folder(folder_url: str) -> dict[str, str]:
    """Name -> URL of what lies directly in the folder; empty for a file."""
    return {name: storage.join(folder_url, name) for name in storage.list_names(folder_url)}


def _first_present(
    files: Mapping[str, str], names: Sequence[str], packings: Sequence[str] = PACKINGS
) -> str | None:
    return next((f"{n}{p}" for n in names for p in packings if f"{n}{p}" in files), None)


def _find(files: Mapping[str, str], names: tuple[str, ...], what: str, source_url: str) -> str:
    name = _first_present(files, names)
    if name is None:
        raise SourceError(f"{source_url}: no {what}; expected one of: {', '.join(names)}")
    return files[name]


def _find_images(files: Mapping[str, str], source_url: str) -> str:
    name = _first_present(files, IMAGE_FOLDERS, ("",))
    if name is not None:
        return files[name]
    packed = _first_present(files, IMAGE_FOLDERS, PACKINGS[1:])
    if packed is not None:
        folder = packed.split(".", 1)[0]
        raise SourceError(f"{source_url}: {packed} is still packed; unpack it into {folder}/")
    return _find(files, IMAGE_FOLDERS, "image folder", source_url)


def _read_plain(url: str) -> bytes:
    data = storage.read_bytes(url)
    try:
        if url.endswith(".gz"):
            with gzip.open(io.BytesIO(data)) as file:
                return _read_bounded(file, url)
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # macOS adds files of its own, which begin with a dot.
                names = [n for n in archive.namelist() if not n.rsplit("/", 1)[-1].startswith(".")]
                (name,) = [n for n in names if not n.endswith("/")]
                with archive.open(name) as file:
                    return _read_bounded(file, url)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise SourceError(f"{url}: not a readable archive of one file: {error}") from error
    return data


_MOST_BYTES = 128 * 2**20


def _read_bounded(file: IO[bytes] | gzip.GzipFile, url: str) -> bytes:
    """What a packed table holds. Raises SourceError where that is far more than any table."""
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise SourceError(f"{url}: unpacks to more than {_MOST_BYTES // 2**20} MiB: no such table")
    return data


def _read_table(url: str, *required: str) -> pa.Table:
    """The CSV at `url`. No error quotes a cell, nor a first line that may be no header."""
    wrong: list[Any] = []

    def keep(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        table = pacsv.read_csv(
            io.BytesIO(_read_plain(url)),
            # Threads would not know a row's number.
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(invalid_row_handler=keep),
            # An id of digits alone must keep its leading zeros.
            convert_options=pacsv.ConvertOptions(
                column_types={"patientId": pa.string(), "patient": pa.string()}
            ),
        )
        names: list[str] = table.column_names
    except ValueError:  # its text, and that of its cause, quotes the row
        what = "empty, cut off, or no UTF-8"
        if wrong:
            row = wrong[0]
            what = f"row {row.number} has {row.actual_columns} cells, not {row.expected_columns}"
        raise SourceError(f"{url}: not a readable CSV: {what}") from None
    missing = [name for name in required if name not in names]
    if missing:
        known = [name for name in names if name in _COLUMNS]
        raise SourceError(
            f"{url}: no column {', '.join(missing)}; its first line names {len(names)}, of those "
            f"that are known here: {', '.join(known) or 'none'}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1 and name in _COLUMNS}):
        raise SourceError(f"{url}: its first line names {', '.join(twice)} more than once")
    if not len(table):
        raise SourceError(f"{url}: no rows")
    empty = pc.and_kleene(*(_is_empty(table[name]) for name in (required * 2)[:2]))
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise SourceError(f"{url}: row {row + _FIRST_ROW} is empty; delete it")
    return table


_FIRST_ROW = 2
"""The number of the first row below the header, as an editor counts lines."""


def _is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.coalesce(pc.cast(column, pa.string()), ""), "")


_COLUMNS = ("patientId", *Box._fields, "Target", "class", "patient", "split")


def _collect_labels(
    table: pa.Table,
) -> tuple[dict[str, list[int]], dict[str, list[Box]], dict[str, str]]:
    """By image id: different targets, boxes, and what is wrong with a box. There is a row a box."""
    targets: dict[str, list[int]] = {}
    boxes: dict[str, list[Box]] = {}
    faulty: dict[str, str] = {}
    corners = [_read_numbers(table, name) for name in Box._fields]
    rows = zip(table["patientId"].to_pylist(), table["Target"].to_pylist(), *corners, strict=True)
    for row, (image_id, target, *corner) in enumerate(rows, _FIRST_ROW):
        if target not in (0, 1):
            raise SourceError(f"label table: row {row}: a Target that is neither 0 nor 1")
        if not image_id:
            raise SourceError(f"label table: row {row}: no patientId")
        known = targets.setdefault(image_id, [])
        if target not in known:
            known.append(int(target))
        if not (given := [value for value in corner if value is not None]):
            continue
        box = Box(*map(float, given)) if len(given) == len(corner) else None
        if box is None or not all(map(math.isfinite, box)):
            faulty[image_id] = "a box that lacks a side"
        elif box.width <= 0 or box.height <= 0:
            faulty[image_id] = "a box of no size"
        else:
            known_boxes = boxes.setdefault(image_id, [])
            if box not in known_boxes:  # a row that is there twice
                known_boxes.append(box)
    return targets, boxes, faulty


def _read_numbers(table: pa.Table, name: str) -> list[float | None]:
    """A column of numbers, None where a cell is empty; all None where there is no such column."""
    if name not in table.column_names:
        return [None] * len(table)
    column = table[name]
    kind = column.type
    if not any(is_kind(kind) for is_kind in (is_null, is_integer, is_floating)):
        raise SourceError(f"label table: column {name} holds something else than numbers")
    found: list[float | None] = column.to_pylist()
    return found


def _collect_findings(table: pa.Table) -> dict[str, list[Finding]]:
    """Different findings by image id."""
    allowed = get_args(Finding)
    findings: dict[str, list[Any]] = {}
    pairs = zip(table["patientId"].to_pylist(), table["class"].to_pylist(), strict=True)
    for row, (image_id, finding) in enumerate(pairs, _FIRST_ROW):
        if finding not in allowed:
            raise SourceError(
                f"class table: row {row}: a class that is none of: {', '.join(allowed)}"
            )
        known = findings.setdefault(image_id, [])
        if finding not in known:
            known.append(finding)
    return findings


def _contradiction(
    targets: Sequence[int], findings: Sequence[Finding], boxes: Sequence[Box]
) -> str | None:
    """What the tables disagree on for one image, or None."""
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
    """The image ids that have a DICOM file.

    Raises SourceError where none is of a `labelled` image, and it can be said why.
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
    """Where the images are instead."""

    def holds(found: Sequence[str]) -> bool:
        return any(name.rsplit(".", 1)[0] in labelled for name in found)

    if holds(names):
        endings = sorted({name.rsplit(".", 1)[-1] for name in names if "." in name})
        return f"the files end in .{', .'.join(endings[:3])}; rename them to end in .dcm"
    if packed := [n for n in names if n.endswith((".zip", ".gz", ".tar", ".tgz", ".7z"))]:
        return f"{packed[0]} is still packed; unpack it there"
    for name in names[:_FOLDERS_LOOKED_INTO]:
        below = storage.list_names(storage.join(images_url, name))
        if holds(below):
            return f"they lie one folder deeper, in {name}/; move them up"
    return None


_FOLDERS_LOOKED_INTO = 20


def _read_patients(
    files: Mapping[str, str], labelled: Collection[str]
) -> tuple[dict[str, str] | None, dict[str, str]]:
    """Image id -> NIH patient number, None without the mapping file; and what is wrong with the
    images that it gives to two patients."""
    name = _first_present(files, MAPPING)
    if name is None:
        return None, {}
    url = files[name]
    patients: dict[str, str] = {}
    remapped: dict[str, str] = {}
    try:
        for row in json.loads(_read_plain(url)):
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
