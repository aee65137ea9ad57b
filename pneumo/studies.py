"""RSNA tables and the NIH mapping -> Study: one row a study, keyed so that nobody can be named.

Kaggle's `patientId` is an image id. Who the patient is stands in the published mapping to NIH
ChestX-ray14, whose file names begin with the patient's number. Facts: RSNA Pneumonia Detection
Challenge, https://www.rsna.org/rsnai/ai-image-challenge/rsna-pneumonia-detection-challenge-2018
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.csv as pacsv

from pneumo import storage
from pneumo.errors import SourceError

Finding = Literal["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]

LABEL_TABLES = ("stage_2_train_labels.csv", "train_labels.csv", "stage_1_train_labels.csv")
CLASS_TABLES = (
    "stage_2_detailed_class_info.csv",
    "detailed_class_info.csv",
    "stage_1_detailed_class_info.csv",
)
IMAGE_FOLDERS = ("stage_2_train_images", "train_images", "stage_1_train_images")
MAPPING = ("pneumonia-challenge-dataset-mappings_2018.json",)
PRIVATE_FOLDER = ".pneumo"
HASH_KEY_VARIABLE = "PNEUMO_HASH_KEY"


class Box(NamedTuple):
    """A rectangle around an opacity, in pixels; (x, y) is its upper left corner."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Study:
    """One frontal radiograph and what the readers said of it."""

    key: str
    """Keyed hash of the image id: 20 hex digits, no dots (webdataset ends a key at the first
    one)."""
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


@dataclass(frozen=True)
class Source:
    """A folder in Kaggle's layout, read."""

    studies: tuple[Study, ...]
    """Sorted by key: an order that has nothing to do with ids or labels."""
    has_patients: bool
    """Whether the mapping told who the patients are."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that the tables say, with keyed hashes for ids."""
        rows = [(s.key, s.patient, s.target, s.finding, s.boxes) for s in self.studies]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_source(source_url: str, environ: Mapping[str, str] | None = None) -> Source:
    """Read the tables of a source folder.

    Raises SourceError when the folder, a table or a column is missing, a value is not understood,
    or the tables contradict each other.
    """
    environ = os.environ if environ is None else environ
    files = _list_folder(source_url)
    labels = _read_table(
        _find(files, LABEL_TABLES, "label table", source_url), "patientId", "Target"
    )
    classes = _read_table(
        _find(files, CLASS_TABLES, "class table", source_url), "patientId", "class"
    )
    images_url = _find(files, IMAGE_FOLDERS, "image folder", source_url)
    targets, boxes = _collect_labels(labels)
    findings = _collect_findings(classes, targets)
    patients = _read_patients(files)
    hash_key = read_hash_key(source_url, environ)

    unmapped = [] if patients is None else [i for i in targets if i not in patients]
    if unmapped:
        raise SourceError(
            f"{MAPPING[0]}: {len(unmapped)} of {len(targets)} labelled images are not in it; "
            "use the complete mapping file"
        )
    studies = [
        Study(
            key=_derive(hash_key, "study", image_id),
            patient=_derive(
                hash_key, "patient", image_id if patients is None else patients[image_id]
            ),
            url=storage.join(images_url, f"{image_id}.dcm"),
            target=target,
            finding=findings[image_id],
            boxes=tuple(boxes.get(image_id, ())),
        )
        for image_id, target in targets.items()
    ]
    if len({study.key for study in studies}) != len(studies):
        raise SourceError(f"{source_url}: two image ids share a hash; set another hash key")
    return Source(tuple(sorted(studies, key=lambda study: study.key)), patients is not None)


def read_hash_key(source_url: str, environ: Mapping[str, str]) -> bytes:
    """The secret behind study keys: PNEUMO_HASH_KEY, or a file beside the source made on first use.

    The file is `.pneumo/hash_key`, mode 600. Who has it can link keys to ids; who loses it gets
    other keys from the same source.
    """
    if environ.get(HASH_KEY_VARIABLE):
        return environ[HASH_KEY_VARIABLE].encode()
    if not storage.is_local(source_url):
        raise SourceError(f"{source_url}: set {HASH_KEY_VARIABLE} to a secret; keys derive from it")
    path = storage.local_path(source_url) / PRIVATE_FOLDER / "hash_key"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        except FileExistsError:
            pass
        hash_key = path.read_text().strip().encode()
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}; make it writable, or set {HASH_KEY_VARIABLE} to a secret"
        ) from error
    if not hash_key:
        raise SourceError(f"{path}: empty; delete it, or set {HASH_KEY_VARIABLE} to a secret")
    return hash_key


def _derive(hash_key: bytes, kind: str, identifier: str) -> str:
    return hmac.new(hash_key, f"{kind}:{identifier}".encode(), hashlib.sha256).hexdigest()[:20]


def _list_folder(source_url: str) -> dict[str, str]:
    """Name -> URL of what lies directly in the folder."""
    names = storage.list_names(source_url)
    if not names:
        raise SourceError(
            f"{source_url}: no such folder, or nothing in it; expected Kaggle's layout"
        )
    return {name: storage.join(source_url, name) for name in names}


def _find(files: Mapping[str, str], names: tuple[str, ...], what: str, source_url: str) -> str:
    for name in names:
        for candidate in (name, f"{name}.gz"):
            if candidate in files:
                return files[candidate]
    raise SourceError(f"{source_url}: no {what}; expected one of: {', '.join(names)}")


def _read_plain(url: str) -> bytes:
    data = storage.read_bytes(url)
    try:
        return gzip.decompress(data) if url.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{url}: not a readable gzip file: {error}") from error


def _read_table(url: str, *required: str) -> pa.Table:
    # An id of digits alone must keep its leading zeros.
    options = pacsv.ConvertOptions(column_types={"patientId": pa.string()})
    try:
        table = pacsv.read_csv(io.BytesIO(_read_plain(url)), convert_options=options)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{url}: not a readable CSV: {str(error).splitlines()[0]}") from error
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise SourceError(
            f"{url}: no column {', '.join(missing)}; it has: {', '.join(table.column_names)}"
        )
    if not len(table):
        raise SourceError(f"{url}: no rows")
    return table


def _collect_labels(table: pa.Table) -> tuple[dict[str, int], dict[str, list[Box]]]:
    """Targets and boxes by image id; the table repeats an image's row for each of its boxes."""
    targets: dict[str, int] = {}
    boxes: dict[str, list[Box]] = {}
    columns = [c for c in Box._fields if c in table.column_names]
    for row in table.select(["patientId", "Target", *columns]).to_pylist():
        image_id, target = str(row["patientId"]), row["Target"]
        if target not in (0, 1):
            raise SourceError(f"label table: Target is {target!r} in a row, expected 0 or 1")
        if targets.setdefault(image_id, int(target)) != target:
            raise SourceError("label table: an image has both Target 0 and Target 1")
        corners = [row.get(name) for name in Box._fields]
        if all(value is not None and math.isfinite(value) for value in corners):
            boxes.setdefault(image_id, []).append(
                Box(*(float(v) for v in corners if v is not None))
            )
    return targets, boxes


def _collect_findings(table: pa.Table, targets: Mapping[str, int]) -> dict[str, Finding]:
    allowed = get_args(Finding)
    findings: dict[str, Any] = {}
    for row in table.select(["patientId", "class"]).to_pylist():
        if row["class"] not in allowed:
            raise SourceError(
                f"class table: class {row['class']!r}, expected one of: {', '.join(allowed)}"
            )
        if findings.setdefault(str(row["patientId"]), row["class"]) != row["class"]:
            raise SourceError("class table: an image has two classes")
    missing = sum(image_id not in findings for image_id in targets)
    if missing:
        raise SourceError(f"class table: {missing} of {len(targets)} labelled images have no row")
    contradictions = sum((findings[i] == "Lung Opacity") != (t == 1) for i, t in targets.items())
    if contradictions:
        raise SourceError(
            f"tables contradict each other: {contradictions} images are 'Lung Opacity' in one and "
            "not Target 1 in the other, or the reverse"
        )
    return findings


def _read_patients(files: Mapping[str, str]) -> dict[str, str] | None:
    """Image id -> NIH patient number; None without the mapping file."""
    url = next((files[n] for name in MAPPING for n in (name, f"{name}.gz") if n in files), None)
    if url is None:
        return None
    try:
        rows = json.loads(_read_plain(url))
        return {row["subset_img_id"]: row["img_id"].split("_")[0] for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{url}: not the published mapping: expected a JSON list of objects with "
            "subset_img_id and img_id"
        ) from error
