"""The store's format, owned here: samples in tar shards, and the manifest that vouches for them.

A sample is two WebDataset members, `<key>.npy` (uint8 (S, S)) and `<key>.cls` (the target in
ASCII). Who the study is (patient group, age, boxes) stands in studies.parquet, not in the shards.
The manifest is written last; without it a store is not there.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from webdataset.tariterators import group_by_keys, tar_file_expander

from pneumo import storage
from pneumo.config import SplitConfig
from pneumo.errors import DataError, StoreError
from pneumo.splits import SPLITS, LeakageAudit
from pneumo.studies import Box

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STUDIES = "studies.parquet"
QUARANTINE = "quarantine.jsonl"


class ShardEntry(BaseModel):
    """What the manifest says of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """Relative to the store: `train/000000.tar`."""
    samples: int
    positives: int
    bytes: int
    sha256: str


class SplitEntry(BaseModel):
    """What the manifest says of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int
    positives: int
    patients: int
    shards: tuple[ShardEntry, ...]


class Manifest(BaseModel):
    """The store's table of contents."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA_VERSION
    source_digest: str
    """SHA-256 of the source's tables, with hashed ids."""
    prepare_digest: str
    """SHA-256 of the settings that decided what the shards hold."""
    image_size: int
    """Height and width of the images, in pixels."""
    codec: str = "npy"
    """How an image is encoded in its shard."""
    seed: int
    split: SplitConfig
    audit: LeakageAudit
    mean: float
    """Mean gray level of the training images, in [0, 1]."""
    std: float
    """Standard deviation of the gray level of the training images' pixels, in [0, 1]."""
    quarantined: int
    """Studies that could not be used; quarantine.jsonl lists them."""
    splits: dict[str, SplitEntry]

    @field_validator("splits")
    @classmethod
    def _has_every_split(cls, splits: dict[str, SplitEntry]) -> dict[str, SplitEntry]:
        if set(splits) != set(SPLITS):
            raise ValueError(f"expected {', '.join(SPLITS)}, got {', '.join(splits) or 'none'}")
        return splits

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: the data set's version."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One study in a shard."""

    key: str
    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8, 0 = black."""
    target: int


@dataclass(frozen=True)
class StudyRow:
    """One row of studies.parquet: what is known of a study, without any identifier."""

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


def encode_shard(samples: Iterable[Sample]) -> bytes:
    """The tar of `samples`, in their order; equal samples give equal bytes."""
    buffer = io.BytesIO()
    # A float mtime would add a PAX header to every member: slower to read, and never twice the
    # same.
    with wds.TarWriter(buffer, mtime=0, user="", group="", encoder=False) as writer:
        for sample in samples:
            image = io.BytesIO()
            np.save(image, sample.pixels, allow_pickle=False)
            writer.write(
                {
                    "__key__": sample.key,
                    "npy": image.getvalue(),
                    "cls": str(sample.target).encode(),
                }
            )
    return buffer.getvalue()


def decode_shard(data: bytes, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard, checked against its entry.

    webdataset alone ends early and silently on a shard cut at a member's end; so digest, count and
    each sample's parts are checked here. Raises DataError, naming the shard.
    """
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(
            f"shard {entry.name}: {len(data)} bytes, not the {entry.bytes} that the manifest "
            "vouches for, or changed since; prepare the store again"
        )
    count = 0
    for group in _read_groups(data, entry):
        try:
            pixels = _decode_image(group["npy"], image_size)
            target = int(group["cls"])
        except (KeyError, ValueError, EOFError) as error:
            raise DataError(f"shard {entry.name}: sample {count} does not decode") from error
        if pixels.shape != (image_size, image_size) or pixels.dtype != np.uint8:
            raise DataError(
                f"shard {entry.name}: sample {count} is {pixels.dtype} {pixels.shape}, expected "
                f"uint8 {(image_size, image_size)}"
            )
        count += 1
        yield Sample(str(group["__key__"]), pixels, target)
    if count != entry.samples:
        raise DataError(f"shard {entry.name}: {count} samples, the manifest says {entry.samples}")


def _decode_image(data: bytes, image_size: int) -> npt.NDArray[Any]:
    """The array of a .npy file; without parsing its header where that is as we write it.

    np.load parses the header with `ast`, which fails at random in threads before Python 3.11.9
    (python/cpython#106905), and takes seven times as long.
    """
    header = io.BytesIO()
    shape = (image_size, image_size)
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    start = header.tell()
    if data[:start] == header.getvalue() and len(data) == start + image_size**2:
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def _read_groups(data: bytes, entry: ShardEntry) -> Iterator[dict[str, Any]]:
    try:
        yield from group_by_keys(
            tar_file_expander([{"url": entry.name, "stream": io.BytesIO(data)}])
        )
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {entry.name}: not a readable tar") from error


def read_shard(store_url: str, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of one shard of a store. Raises DataError when it is missing or not as
    vouched."""
    try:
        data = storage.read_bytes(storage.join(store_url, entry.name))
    except FileNotFoundError as error:
        raise DataError(f"shard {entry.name}: missing from {store_url}") from error
    return decode_shard(data, entry, image_size)


def write_shard(store_url: str, name: str, samples: list[Sample]) -> ShardEntry:
    """Encode and publish one shard; the entry that the manifest will carry."""
    data = encode_shard(samples)
    storage.write_bytes(storage.join(store_url, name), data)
    return ShardEntry(
        name=name,
        samples=len(samples),
        positives=sum(sample.target for sample in samples),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def write_manifest(store_url: str, manifest: Manifest) -> None:
    """Publish the manifest: the last write of a preparation."""
    storage.write_text(storage.join(store_url, MANIFEST), manifest.model_dump_json(indent=1) + "\n")


def find_manifest(store_url: str) -> Manifest | None:
    """The manifest of a store, or None where there is none. Raises StoreError when unreadable."""
    url = storage.join(store_url, MANIFEST)
    try:
        return Manifest.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(
            f"{url}: not a manifest of schema {SCHEMA_VERSION}: {where}: {first['msg']}; "
            "prepare the store again with this version"
        ) from error


def read_manifest(store_url: str) -> Manifest:
    """The manifest of a store. Raises StoreError when it is absent, unreadable or of another
    schema."""
    manifest = find_manifest(store_url)
    if manifest is None:
        raise StoreError(
            f"{store_url}: no {MANIFEST}, so nothing is prepared there (or not to its end); "
            "run jobs.prepare"
        )
    if manifest.schema_version != SCHEMA_VERSION:
        raise StoreError(
            f"{store_url}: manifest of schema {manifest.schema_version}, this version reads "
            f"{SCHEMA_VERSION}; prepare the store again"
        )
    return manifest


def write_studies(store_url: str, rows: Iterable[StudyRow]) -> None:
    """Publish studies.parquet."""
    columns: dict[str, list[Any]] = {name: [] for name in StudyRow.__dataclass_fields__}
    for row in rows:
        for name, values in columns.items():
            value = getattr(row, name)
            values.append([list(box) for box in value] if name == "boxes" else value)
    types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "target": pa.int64(),
        "age": pa.int64(),
        "spacing_mm": pa.float64(),
    }
    strings = {"key", "patient", "split", "finding", "sex", "view"}
    table = pa.table(
        {
            name: pa.array(values, pa.string() if name in strings else types.get(name))
            for name, values in columns.items()
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(storage.join(store_url, STUDIES), buffer.getvalue())


def read_studies(store_url: str) -> dict[str, StudyRow]:
    """The rows of studies.parquet by key. Raises DataError when missing or unreadable."""
    url = storage.join(store_url, STUDIES)
    try:
        table = pq.read_table(
            io.BytesIO(storage.read_bytes(url)), columns=list(StudyRow.__dataclass_fields__)
        )
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}: missing or unreadable; prepare the store again") from error
    rows = (
        StudyRow(**{**row, "boxes": tuple(Box(*box) for box in row["boxes"])})
        for row in table.to_pylist()
    )
    return {row.key: row for row in rows}
