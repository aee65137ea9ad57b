"""The manifest of a store: its shards, their blocks and digests, and how they were made.

It is written last; a store without it is not finished.
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
    """Neighbouring samples of a shard; its bytes are a tar without end marker."""

    offset: int
    """Start of the block in the shard, in bytes."""
    bytes: int
    samples: int
    blake3: str
    """Checked at every read; BLAKE3 takes a third of the time of SHA-256."""


class ShardEntry(BaseModel, frozen=True, extra="forbid"):
    """A shard in the manifest."""

    name: str
    """Relative to the store: `train/000000-0123456789ab.tar`, with digits of its SHA-256."""
    samples: int
    positives: int
    bytes: int
    sha256: str
    blocks: tuple[BlockEntry, ...]
    """The shard's blocks in order; all but the last have the same number of samples."""


class SplitEntry(BaseModel, frozen=True, extra="forbid"):
    """A split in the manifest."""

    samples: int
    positives: int
    patients: int | None
    """Null where patients are unknown."""
    histogram: tuple[int, ...]
    """Number of stored pixels of each gray level, 0 to 255; letterbox borders have level 0."""
    shards: tuple[ShardEntry, ...]


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """A file of the store that is no shard, in the manifest."""

    bytes: int
    sha256: str


class Duplicates(BaseModel, frozen=True, extra="forbid"):
    """Studies whose stored images are equal, pixel by pixel."""

    pictures: int
    """Images of more than one study."""
    studies: int
    """Studies with one of these images."""
    across_patients: int | None
    """Those of the images that more than one patient has; null where patients are unknown."""
    across_splits: int
    """Those of the images that are in more than one split: each leaks."""


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of manifest.json."""

    schema_version: int = SCHEMA_VERSION
    source_digest: str
    """SHA-256 of the source's tables, with hashed ids."""
    prepare_digest: str
    """SHA-256 of the settings that the shards depend on."""
    image_size: int
    """Height and width of the images, in pixels."""
    codec: str = "npy"
    """Encoding of an image in its shard."""
    layout: str = Field(default=RSNA, exclude_if=lambda value: value == RSNA)
    """Layout of the source. Not written for RSNA, so that the digest is that of older versions."""
    joined_layouts: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Layouts of the stores that were joined."""
    left_out: dict[str, int] = Field(default={}, exclude_if=lambda value: not value)
    """Number of images that were left out by a rule, by reason."""
    phantoms: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether the images are phantoms. Written only where true, as `layout`."""
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
    """Studies whose tables and header disagree or are incomplete, by kind; they are used."""
    unlabelled: int
    """Images of the source with a DICOM file or a class, but without a label; they are left out."""
    duplicates: Duplicates
    studies: FileEntry
    """studies.parquet, with the targets and metadata that an evaluation uses."""
    quarantine: FileEntry
    """quarantine.jsonl."""
    warnings: FileEntry | None = Field(default=None, exclude_if=lambda value: value is None)
    """warnings.jsonl; not written where no study has a warning, as `layout`."""
    splits: dict[str, SplitEntry]

    @field_validator("splits")
    @classmethod
    def _has_every_split(cls, splits: dict[str, SplitEntry]) -> dict[str, SplitEntry]:
        if set(splits) != set(SPLITS):
            raise ValueError(f"expected {', '.join(SPLITS)}, got {', '.join(splits) or 'none'}")
        return splits

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts of all sources whose studies are in the store."""
        return self.joined_layouts or (self.layout,)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest; identifies the version of the data set."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@contextmanager
def as_data_error(what: str, store_url: str) -> Iterator[None]:
    """Inside the context, a missing or changed file raises DataError, with `what` as its name."""
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
    """Write the manifest, the last write of a preparation; an existing one is never replaced.

    Raises StoreError where another manifest is there; an equal one may be there.
    """
    text = manifest.model_dump_json(indent=1) + "\n"
    if storage.create_bytes(storage.join(store_url, MANIFEST), text.encode()):
        return
    if find_manifest(store_url) != manifest:
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
        return  # not a manifest at all: the caller's validation reports it
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
            f"{store_url}: no {MANIFEST}, so nothing is prepared there (or not completely); "
            "run jobs.prepare"
        )
    return manifest
