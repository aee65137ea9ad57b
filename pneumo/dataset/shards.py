"""The store's format, owned here: samples in tar shards, and the manifest that vouches for them.

A sample is two WebDataset members, `<key>.npy` (uint8 (S, S)) and `<key>.cls` (the target in
ASCII). Who the study is (patient group, age, boxes) stands in studies.parquet, not in the shards.
The manifest is written last; without it a store is not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pneumo import storage
from pneumo.config import SplitConfig
from pneumo.dataset.source import Rejected
from pneumo.dataset.splits import SPLITS, LeakageAudit
from pneumo.errors import ContentError, DataError, StoreError
from pneumo.images.boxes import Box

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
STUDIES = "studies.parquet"
SHARD_SUFFIX = ".tar"
QUARANTINE = "quarantine.jsonl"
BLOCK_SAMPLES = 64
"""Neighbours in a shard that are read and shuffled together: one range request of 3.3 MB at 224
px. Of large pictures they are fewer."""
SHARD_SAMPLES = 512
"""Samples in a shard: 27 MB at 224 px, one PUT; all of RSNA makes 53, enough to share out. Of large
pictures they are fewer."""
_BLOCK_BYTES = 4_300_000
_SHARD_BYTES = 27_000_000

_CHECKSUM_AT = 148
"""Where a tar header has its checksum: six octal digits and a zero."""


class BlockEntry(BaseModel):
    """Some neighbouring samples of a shard: bytes that are a whole tar but for its end marker."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    offset: int
    """Where the block begins in the shard, in bytes."""
    bytes: int
    samples: int
    blake3: str
    """Every reader checks every block, and this takes a third of the time of SHA-256."""


class ShardEntry(BaseModel):
    """What the manifest says of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """Relative to the store: `train/000000-0123456789ab.tar`, with digits of its SHA-256."""
    samples: int
    positives: int
    bytes: int
    sha256: str
    blocks: tuple[BlockEntry, ...]
    """The shard's blocks in order; all but the last hold equally many samples."""


class SplitEntry(BaseModel):
    """What the manifest says of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int
    positives: int
    patients: int | None
    """Null where the source's mapping does not say who they are."""
    histogram: tuple[int, ...]
    """Stored pixels of each gray level, 0 to 255; letterbox borders count as 0."""
    shards: tuple[ShardEntry, ...]


class FileEntry(BaseModel):
    """What the manifest says of a file beside the shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


class Duplicates(BaseModel):
    """Studies whose stored pictures are equal, pixel by pixel."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    pictures: int
    """Pictures that more than one study has."""
    studies: int
    """Studies that have one of them."""
    across_patients: int | None
    """Of the pictures, those found with more than one patient; null where nobody knows who they
    are."""
    across_splits: int
    """Of the pictures, those found in more than one split: each leaks."""


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
    quarantined: dict[str, int]
    """Studies that could not be used, by reason code; quarantine.jsonl lists them."""
    contradictions: dict[str, int]
    """Studies whose tables and header disagree, or lack something, by what it is; they are used."""
    unlabelled: int
    """Images of the source that have a DICOM file or a class, but no label; they are left out."""
    duplicates: Duplicates
    studies: FileEntry
    """studies.parquet, by which an evaluation judges."""
    quarantine: FileEntry
    """quarantine.jsonl."""
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
    pixels_digest: str
    """Digest of the stored picture, 32 hex digits: equal pictures have equal ones."""
    source_blake3: str
    """BLAKE3 of the DICOM file, in hex, keyed by `studies.derive_file_key`: a picture that looks
    wrong is traced to its file by whoever has the hash key, and by nobody else."""


def sample_bytes(image_size: int) -> int:
    """What a sample takes in a shard: two headers, the target, and the picture."""
    picture = len(_npy_header((image_size, image_size))) + image_size**2
    return 3 * tarfile.BLOCKSIZE + picture + -picture % tarfile.BLOCKSIZE


def block_samples(image_size: int) -> int:
    """Samples in a full block: BLOCK_SAMPLES, or as many as make about 4 MB."""
    return max(1, min(BLOCK_SAMPLES, _BLOCK_BYTES // sample_bytes(image_size)))


def shard_samples(image_size: int) -> int:
    """Samples in a full shard, unless told otherwise: SHARD_SAMPLES, or as many as make 27 MB."""
    return max(1, min(SHARD_SAMPLES, _SHARD_BYTES // sample_bytes(image_size)))


def encode_shard(name: str, samples: Iterable[Sample]) -> tuple[ShardEntry, bytes]:
    """The tar of `samples`, in their order, and what the manifest will say of it.

    Equal samples give equal bytes. They are taken one at a time, so only the tar is in memory.
    """
    buffer = io.BytesIO()
    entry = _encode_shard(buffer, name, samples)
    return entry, buffer.getvalue()


def _encode_shard(buffer: io.BytesIO, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """`encode_shard` into the first bytes of `buffer`, whose content is of no account.

    All is hashed as it is written: later it would have to come back from memory, for twice the
    time.
    """
    buffer.seek(0)
    whole, part = hashlib.sha256(), blake3()
    blocks = list[BlockEntry]()
    start = count = counted = positives = 0
    in_block = BLOCK_SAMPLES

    def end_block() -> None:
        nonlocal start, counted, part
        if count > counted:
            end = buffer.tell()
            blocks.append(
                BlockEntry(
                    offset=start,
                    bytes=end - start,
                    samples=count - counted,
                    blake3=part.hexdigest(),
                )
            )
            start, counted, part = end, count, blake3()

    for sample in samples:
        if not count:
            in_block = block_samples(len(sample.pixels))
        for content in _encode_sample(sample):
            buffer.write(content)
            whole.update(content)
            part.update(content)
        count += 1
        positives += sample.target
        if count % in_block == 0:
            end_block()
    end_block()
    end_marker = bytes(2 * tarfile.BLOCKSIZE)
    buffer.write(end_marker)
    whole.update(end_marker)
    return ShardEntry(
        name=name,
        samples=count,
        positives=positives,
        bytes=buffer.tell(),
        sha256=whole.hexdigest(),
        blocks=tuple(blocks),
    )


def _encode_sample(sample: Sample) -> Iterator[bytes | memoryview]:
    """Its members of the tar, in the order of webdataset's own writer."""
    target = str(sample.target).encode()
    label = _encode_header(f"{sample.key}.cls", len(target)) + target + _padding(len(target))
    header = _npy_header(sample.pixels.shape, sample.pixels.dtype.str)
    pixels = np.ascontiguousarray(sample.pixels).reshape(-1).view(np.uint8).data
    size = len(header) + pixels.nbytes
    yield label + _encode_header(f"{sample.key}.npy", size) + header
    yield pixels
    yield _padding(size)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _encode_header(name: str, size: int) -> bytes:
    """What tarfile makes of a file without time, owner and extended header, so that the bytes are
    the same every time; twenty times as fast: members differ in little but the name."""
    encoded = name.encode("ascii")
    assert len(encoded) <= tarfile.LENGTH_NAME, name
    nameless, checksum = _nameless_header(size)
    return b"".join(
        (
            encoded,
            nameless[len(encoded) : _CHECKSUM_AT],
            b"%06o\0" % (checksum + sum(encoded)),
            nameless[_CHECKSUM_AT + 7 :],
        )
    )


@lru_cache(maxsize=16)
def _nameless_header(size: int) -> tuple[bytes, int]:
    """The header of a member without a name, and the sum of its bytes, the sum itself aside."""
    info = tarfile.TarInfo()
    info.size, info.mode = size, 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, int(header[_CHECKSUM_AT : _CHECKSUM_AT + 6], 8)


@lru_cache(maxsize=16)
def _npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The first bytes of the .npy file of an image."""
    header = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def decode_shard(data: bytes, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard, checked against its entry. Raises DataError, naming the shard."""
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(
            f"shard {entry.name}: {len(data)} bytes, not the {entry.bytes} that the manifest "
            "vouches for, or changed since; delete the store and prepare it again"
        )
    yield from _decode_samples(data, entry, image_size)


def _decode_samples(data: bytes, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard whose digest is right.

    webdataset alone ends early and silently on a shard cut at a member's end; so the count and each
    sample's parts are checked here.
    """
    count = 0
    for group in _read_groups(data, entry):
        try:
            pixels = _decode_image(group["npy"], image_size).copy()
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


def _decode_image(data: bytes | memoryview, image_size: int) -> npt.NDArray[Any]:
    """The array of a .npy file, a view of it; its header is not parsed where it is as we write it.

    np.load parses the header with `ast`, which fails at random in threads before Python 3.11.9
    (python/cpython#106905), and takes seven times as long.
    """
    header = _npy_header((image_size, image_size))
    if data[: len(header)] == header and len(data) == len(header) + image_size**2:
        pixels = np.frombuffer(data, np.uint8, offset=len(header))
        return pixels.reshape(image_size, image_size)
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def _read_groups(data: bytes, entry: ShardEntry) -> Iterator[dict[str, Any]]:
    # It imports torch, which whoever prepares a store has no use for: 2 s and 400 MB a process.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        yield from group_by_keys(
            tar_file_expander([{"url": entry.name, "stream": io.BytesIO(data)}])
        )
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {entry.name}: not a readable tar") from error


def read_shard(store_url: str, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of one shard of a store. Raises DataError when it is missing or not as
    vouched."""
    with _naming(f"shard {entry.name}", store_url):
        url = storage.join(store_url, entry.name)
        data = storage.read_bytes(url, sha256=entry.sha256, size=entry.bytes)
    return _decode_samples(data, entry, image_size)


def read_block(store_url: str, entry: ShardEntry, block: BlockEntry) -> bytes:
    """The bytes of one block of a shard, by one range request, checked against their digest.

    Raises DataError, naming the shard, when it is missing, cut or changed since its preparation.
    """
    with _naming(f"shard {entry.name}", store_url):
        url = storage.join(store_url, entry.name)
        return storage.read_range(url, block.offset, block.bytes, blake3=block.blake3)


@contextmanager
def _naming(what: str, store_url: str) -> Iterator[None]:
    """Within it, what is wrong with the bytes of a file is a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{what}: missing from {store_url}; delete the store and prepare it again"
        ) from error
    except ContentError as error:
        raise DataError(
            f"{what}: not what the manifest vouches for: {error}; delete the store and prepare it "
            "again"
        ) from error


def decode_block(
    data: bytes, entry: ShardEntry, block: BlockEntry, image_size: int
) -> Iterator[Sample]:
    """The samples of a block, whose bytes the caller has compared with its digest.

    Their pixels are views of `data`, not to be written to. Raises DataError, naming the shard, when
    a sample does not decode or one is missing or too many.
    """
    where = f"shard {entry.name}, block at byte {block.offset}"
    members = list(_read_members(data, where))
    if len(members) != 2 * block.samples:
        raise DataError(
            f"{where}: {len(members)} members, the manifest says {block.samples} samples of two"
        )
    for i, (label, image) in enumerate(zip(members[::2], members[1::2], strict=True)):
        key = label.name.removesuffix(".cls")
        if (label.name, image.name) != (f"{key}.cls", f"{key}.npy"):
            raise DataError(f"{where}: sample {i} is not a .cls and a .npy of one key")
        try:
            pixels = _decode_image(image.content, image_size)
            target = int(bytes(label.content))
        except (ValueError, EOFError) as error:
            raise DataError(f"{where}: sample {i} does not decode") from error
        if pixels.shape != (image_size, image_size) or pixels.dtype != np.uint8:
            raise DataError(
                f"{where}: sample {i} is {pixels.dtype} {pixels.shape}, expected uint8 "
                f"{(image_size, image_size)}"
            )
        yield Sample(key, pixels, target)


class _Member(NamedTuple):
    name: str
    content: memoryview
    """Of the tar: nothing is copied."""


def _read_members(data: bytes, where: str) -> Iterator[_Member]:
    """The plain files in a tar as `encode_shard` writes it.

    webdataset's reader takes 90 us a sample under the interpreter's lock, more than all else that
    a stream does; this takes 5. The digest has vouched that these are the bytes that we wrote.
    """
    whole, position = memoryview(data), 0
    while position < len(data):
        header = data[position : position + tarfile.BLOCKSIZE]
        try:
            name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)
        except ValueError as error:
            raise DataError(f"{where}: not a readable tar") from error
        start = position + tarfile.BLOCKSIZE
        if header[156:157] != tarfile.REGTYPE or start + size > len(data):
            raise DataError(f"{where}: not a readable tar")
        yield _Member(name, whole[start : start + size])
        position = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_shard(store_url: str, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Encode and publish one shard, if it has samples; the entry that the manifest will carry.

    `{digest}` in `name` becomes the first digits of its SHA-256: another content is then another
    shard, and never replaces one that a manifest vouches for.
    """
    buffer = _MEMORY.buffer
    entry = _encode_shard(buffer, name, samples)
    entry = entry.model_copy(update={"name": name.format(digest=entry.sha256[:12])})
    if entry.samples:
        with buffer.getbuffer() as memory, memory[: entry.bytes] as data:
            storage.write_bytes(storage.join(store_url, entry.name), data)
    return entry


class _Memory(threading.local):
    """Memory of a thread that one shard after the other is made in: fresh pages cost as much as
    writing to them does."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()


_MEMORY = _Memory()


def digest_pixels(pixels: npt.NDArray[np.uint8]) -> str:
    """What `StudyRow.pixels_digest` holds: the first half of the BLAKE3, in hex."""
    return blake3(np.ascontiguousarray(pixels).data).hexdigest()[:32]


def find_duplicates(studies: pa.Table, *, has_patients: bool) -> Duplicates:
    """Which pictures occur with more than one study; `studies` as `tabulate_studies` makes it, and
    whether its patients are more than images."""
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


def write_manifest(store_url: str, manifest: Manifest) -> None:
    """Publish the manifest: the last write of a preparation, which never replaces another.

    An equal one is as good as this. Raises StoreError when another is there.
    """
    text = manifest.model_dump_json(indent=1) + "\n"
    if storage.create_bytes(storage.join(store_url, MANIFEST), text.encode()):
        return
    there = find_manifest(store_url)
    if there != manifest:
        raise StoreError(
            f"{store_url}: another job has finished another store there meanwhile; give another "
            "--store"
        )


def find_manifest(store_url: str) -> Manifest | None:
    """The manifest of a store, or None where there is none.

    Raises StoreError when it is unreadable or of another schema.
    """
    url = storage.join(store_url, MANIFEST)
    try:
        text = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    _check_schema(url, text)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(
            f"{url}: not a manifest of schema {SCHEMA_VERSION}: {where}: {first['msg']}; "
            "delete the store and prepare it again with this version"
        ) from error


def _check_schema(url: str, text: bytes) -> None:
    try:
        found = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError):
        return  # not a manifest at all: its validation says what is wrong
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"{url}: manifest of schema {found}, this version reads {SCHEMA_VERSION}; prepare the "
            "store again"
        )


def read_manifest(store_url: str) -> Manifest:
    """The manifest of a store. Raises StoreError when it is absent, unreadable or of another
    schema."""
    manifest = find_manifest(store_url)
    if manifest is None:
        raise StoreError(
            f"{store_url}: no {MANIFEST}, so nothing is prepared there (or not to its end); "
            "run jobs.prepare"
        )
    return manifest


def tabulate_studies(rows: Iterable[StudyRow]) -> pa.Table:
    """The rows as they stand in studies.parquet."""
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
    return pa.table(
        {name: pa.array(column, types.get(name, pa.string())) for name, column in columns.items()}
    )


def write_studies(store_url: str, table: pa.Table) -> FileEntry:
    """Publish studies.parquet, its rows sorted by key; the entry that the manifest will carry."""
    buffer = io.BytesIO()
    pq.write_table(table.sort_by("key").combine_chunks(), buffer)
    return _write_vouched(store_url, STUDIES, buffer.getvalue())


def read_studies(store_url: str, manifest: Manifest) -> dict[str, StudyRow]:
    """The rows of studies.parquet by key.

    Raises DataError when it is missing, or not what the manifest vouches for.
    """
    data = _read_vouched(store_url, STUDIES, manifest.studies)
    try:
        table = pq.read_table(io.BytesIO(data), columns=list(StudyRow.__dataclass_fields__))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{storage.join(store_url, STUDIES)}: not a table of studies; delete the store and "
            "prepare it again"
        ) from error
    rows = (
        StudyRow(**{**row, "boxes": tuple(Box(*box) for box in row["boxes"])})
        for row in table.to_pylist()
    )
    return {row.key: row for row in rows}


def write_quarantine(store_url: str, rejected: Iterable[Rejected]) -> FileEntry:
    """Publish quarantine.jsonl, sorted by key; the entry that the manifest will carry."""
    lines = (json.dumps(asdict(item)) for item in sorted(rejected, key=lambda item: item.key))
    text = "".join(f"{line}\n" for line in lines)
    return _write_vouched(store_url, QUARANTINE, text.encode())


def read_quarantine(store_url: str, manifest: Manifest) -> list[Rejected]:
    """The studies that could not be used, sorted by key.

    Raises DataError when the list is missing, or not what the manifest vouches for.
    """
    data = _read_vouched(store_url, QUARANTINE, manifest.quarantine)
    return [Rejected(**json.loads(line)) for line in data.splitlines()]


def _write_vouched(store_url: str, name: str, data: bytes) -> FileEntry:
    storage.write_bytes(storage.join(store_url, name), data)
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read_vouched(store_url: str, name: str, entry: FileEntry) -> bytes:
    with _naming(name, store_url):
        return storage.read_bytes(
            storage.join(store_url, name), sha256=entry.sha256, size=entry.bytes
        )
