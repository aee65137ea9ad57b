"""The store's table of contents: its shards, their blocks and digests, and how they were made.

It is written last; without it there is no store.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, Field, ValidationError, field_validator

from pneumo import storage
from pneumo.config import SplitConfig
from pneumo.dataset.source import RSNA
from pneumo.dataset.splits import SPLITS, LeakageAudit
from pneumo.errors import ContentError, DataError, StoreError

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"


class BlockEntry(BaseModel, frozen=True, extra="forbid"):
    """Neighbouring samples of a shard: a whole tar without its end marker."""

    offset: int
    """Where the block begins in the shard, in bytes."""
    bytes: int
    samples: int
    blake3: str
    """Every reader checks every block; BLAKE3 takes a third of the time of SHA-256."""


class ShardEntry(BaseModel, frozen=True, extra="forbid"):
    """What the manifest says of one shard."""

    name: str
    """Relative to the store: `train/000000-0123456789ab.tar`, with digits of its SHA-256."""
    samples: int
    positives: int
    bytes: int
    sha256: str
    blocks: tuple[BlockEntry, ...]
    """The shard's blocks in order; all but the last hold equally many samples."""


class SplitEntry(BaseModel, frozen=True, extra="forbid"):
    """What the manifest says of one split."""

    samples: int
    positives: int
    patients: int | None
    """Null where the source's mapping does not say who they are."""
    histogram: tuple[int, ...]
    """Stored pixels of each gray level, 0 to 255; letterbox borders count as 0."""
    shards: tuple[ShardEntry, ...]


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """What the manifest says of a file beside the shards."""

    bytes: int
    sha256: str


class Duplicates(BaseModel, frozen=True, extra="forbid"):
    """Studies whose stored pictures are equal, pixel by pixel."""

    pictures: int
    """Pictures that more than one study has."""
    studies: int
    """Studies that have one of them."""
    across_patients: int | None
    """Of the pictures, those found with more than one patient; null where nobody knows who they
    are."""
    across_splits: int
    """Of the pictures, those found in more than one split: each leaks."""


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The store's table of contents."""

    schema_version: int = SCHEMA_VERSION
    source_digest: str
    """SHA-256 of the source's tables, with hashed ids."""
    prepare_digest: str
    """SHA-256 of the settings that decided what the shards hold."""
    image_size: int
    """Height and width of the images, in pixels."""
    codec: str = "npy"
    """How an image is encoded in its shard."""
    layout: str = Field(default=RSNA, exclude_if=lambda value: value == RSNA)
    """How the source was laid out. Not written of RSNA: such manifests stay as they were."""
    left_out: dict[str, int] = Field(default={}, exclude_if=lambda value: not value)
    """Images that the layout's rules left out, by why."""
    phantoms: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether the images are drawn. Written where they are: other manifests stay as they were."""
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
    warnings: FileEntry | None = Field(default=None, exclude_if=lambda value: value is None)
    """warnings.jsonl; absent where nothing was repaired or is doubtful, so that the digest is that
    of earlier versions."""
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


@contextmanager
def naming_file(what: str, store_url: str) -> Iterator[None]:
    """Inside, a file that is missing or changed raises DataError, which names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{what}: missing from {store_url}; delete the store and prepare it again"
        ) from error
    except ContentError as error:
        raise DataError(
            f"{what}: not what the manifest says: {error}; delete the store and prepare it again"
        ) from error


def write_manifest(store_url: str, manifest: Manifest) -> None:
    """Publish the manifest: the last write of a preparation, which never replaces another.

    An equal one may be there. Raises StoreError when another is there.
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
