"""The tables of a store: studies.parquet, quarantine.jsonl and warnings.jsonl."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3

from pneumo import storage
from pneumo.dataset.manifest import Duplicates, FileEntry, Manifest, as_data_error
from pneumo.dataset.source import Rejected
from pneumo.errors import DataError
from pneumo.images.boxes import Box

STUDIES = "studies.parquet"
QUARANTINE = "quarantine.jsonl"
WARNINGS = "warnings.jsonl"
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)  # slots, as a driver may hold millions of rows
class StudyRow:
    """A row of studies.parquet: the metadata of a study, without any identifier."""

    key: str
    patient: str
    split: str
    target: int
    finding: str
    boxes: tuple[Box, ...]
    """In pixels of the stored image."""
    age: int | None
    sex: str | None
    view: str | None
    spacing_mm: float | None
    pixels_digest: str
    """Digest of the stored pixels, 32 hex digits."""
    source_blake3: str
    """Keyed BLAKE3 of the DICOM file, in hex, with the key of `study_keys.derive_file_key`: only
    who has the hash key can find the file of an image."""
    picture_hash: str = ""
    """See `near_duplicates.hash_picture`; empty in stores of older versions."""
    source: str = ""
    """In a joined store: the name of the store that the study comes from."""


@dataclass(frozen=True)
class StudyWarning:
    """A row of warnings.jsonl: a study that is used, though its file was repaired or its image is
    doubtful."""

    key: str
    split: str
    code: str
    """The repair, see `images.elements`, or the doubt, see `images.input_checks`."""


def digest_pixels(pixels: npt.NDArray[np.uint8]) -> str:
    """`StudyRow.pixels_digest`: the first half of the BLAKE3, in hex."""
    return blake3(np.ascontiguousarray(pixels).data).hexdigest()[:32]


def find_duplicates(studies: pa.Table, *, has_patients: bool) -> Duplicates:
    """Count images that more than one study has; `studies` is a table of `tabulate_studies`."""
    groups = studies.group_by("pixels_digest").aggregate(
        [("key", "count"), ("patient", "count_distinct"), ("split", "count_distinct")]
    )
    several = groups.filter(pc.field("key_count") > 1)
    across = sum(n > 1 for n in several["patient_count_distinct"].to_pylist())
    return Duplicates(
        pictures=len(several),
        studies=sum(several["key_count"].to_pylist()),
        across_patients=across if has_patients else None,
        across_splits=sum(n > 1 for n in several["split_count_distinct"].to_pylist()),
    )


def tabulate_studies(rows: Iterable[StudyRow]) -> pa.Table:
    """The rows as a table with the columns of studies.parquet."""
    rows = list(rows)
    types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "target": pa.int64(),
        "age": pa.int64(),
        "spacing_mm": pa.float64(),
    }
    return pa.table(
        {
            name: pa.array([getattr(row, name) for row in rows], types.get(name, pa.string()))
            for name in StudyRow.__dataclass_fields__
        }
    )


def write_studies(store_url: str, table: pa.Table) -> FileEntry:
    """Write studies.parquet, sorted by key; returns its entry of the manifest."""
    return _write_file(store_url, STUDIES, encode_parquet(table.sort_by("key").combine_chunks()))


def encode_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_studies(store_url: str, manifest: Manifest) -> dict[str, StudyRow]:
    """The rows of studies.parquet by key.

    Raises DataError when it is missing, or not what the manifest says.
    """
    data = _read_checked_file(store_url, STUDIES, manifest.studies)
    rows: dict[str, StudyRow] = {}
    texts: dict[str | None, str | None] = {}
    """Equal strings are stored once, to save memory."""
    try:
        table = pq.ParquetFile(io.BytesIO(data))
        fields = StudyRow.__dataclass_fields__
        known = [name for name in table.schema_arrow.names if name in fields]
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=known):
            columns = batch.to_pydict()
            columns["boxes"] = [tuple(Box(*box) for box in boxes) for boxes in columns["boxes"]]
            for name in ("patient", "split", "finding", "sex", "view"):
                columns[name] = [texts.setdefault(text, text) for text in columns[name]]
            for values in zip(*columns.values(), strict=True):
                row = StudyRow(**dict(zip(columns, values, strict=True)))
                rows[row.key] = row
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise DataError(
            f"{storage.join(store_url, STUDIES)}: not a table of studies; delete the store and "
            "prepare it again"
        ) from error
    return rows


def write_quarantine(store_url: str, rejected: Iterable[Rejected]) -> FileEntry:
    """Write quarantine.jsonl, sorted by key; returns its entry of the manifest."""
    return _write_lines(store_url, QUARANTINE, sorted(rejected, key=lambda item: item.key))


def read_quarantine(store_url: str, manifest: Manifest) -> list[Rejected]:
    """The studies that could not be used, sorted by key.

    Raises DataError when the list is missing, or not what the manifest says.
    """
    return [Rejected(**row) for row in _read_lines(store_url, QUARANTINE, manifest.quarantine)]


def write_warnings(store_url: str, warned: Iterable[StudyWarning]) -> FileEntry | None:
    """Write warnings.jsonl, sorted by key, if there is a warning; returns its entry of the
    manifest."""
    rows = sorted(warned, key=lambda item: (item.key, item.code))
    return _write_lines(store_url, WARNINGS, rows) if rows else None


def read_warnings(store_url: str, manifest: Manifest) -> list[StudyWarning]:
    """The store's warnings, sorted by key; empty for a store of an older version.

    Raises DataError when the list is missing, or not what the manifest says.
    """
    if manifest.warnings is None:
        return []
    return [StudyWarning(**row) for row in _read_lines(store_url, WARNINGS, manifest.warnings)]


def _write_lines(
    store_url: str, name: str, rows: Sequence[Rejected] | Sequence[StudyWarning]
) -> FileEntry:
    text = "".join(f"{json.dumps(asdict(row))}\n" for row in rows)
    return _write_file(store_url, name, text.encode())


def _read_lines(store_url: str, name: str, entry: FileEntry) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read_checked_file(store_url, name, entry).splitlines()]


def _write_file(store_url: str, name: str, data: bytes) -> FileEntry:
    storage.write_bytes(storage.join(store_url, name), data)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read_checked_file(store_url: str, name: str, entry: FileEntry) -> bytes:
    with as_data_error(name, store_url):
        return storage.read_bytes(
            storage.join(store_url, name), sha256=entry.sha256, size=entry.bytes
        )
