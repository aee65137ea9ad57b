"""One task of a preparation: it writes a shard, then its record under `parts/`.

The output depends on the source, the settings and the seed alone: a task gives the same bytes on
any machine, and when it is repeated.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from blake3 import blake3
from pydantic import BaseModel, Field, ValidationError

from pneumo import storage
from pneumo.dataset.manifest import ShardEntry
from pneumo.dataset.near_duplicates import hash_picture
from pneumo.dataset.overlap import KnownStudies
from pneumo.dataset.shard_plans import ShardPlan
from pneumo.dataset.shards import SHARD_SUFFIX, Sample, write_shard
from pneumo.dataset.source import RSNA, Rejected, Study
from pneumo.dataset.study_table import StudyRow, StudyWarning, digest_pixels
from pneumo.errors import ContentError
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import UnusableFile, decode_file, read_file, read_files
from pneumo.images.gray_levels import Gray
from pneumo.images.headers import NO_HEADER


class ShardRecord(BaseModel, frozen=True, extra="forbid"):
    """The record of a task: all that the store's tables need, so that no shard is read again."""

    plan_digest: str = ""
    entry: ShardEntry
    """Has 0 samples, and no file, where no study of the plan can be used."""
    rows: tuple[StudyRow, ...]
    rejected: tuple[Rejected, ...] = ()
    histogram: tuple[int, ...]
    """Number of stored pixels of each gray level."""
    contradictions: dict[str, int] = {}
    """Studies whose tables and header disagree or are incomplete, by kind."""
    warned: tuple[StudyWarning, ...] = ()
    known: int = 0
    """Studies left out because their image is in train or val of another store."""
    reused: bool = Field(default=False, exclude=True)
    """Whether an earlier run wrote it."""


def prepare_shard(
    plan: ShardPlan,
    store_url: str,
    image_size: int,
    prepare_digest: str,
    file_key: bytes,
    known_studies: KnownStudies | None = None,
) -> ShardRecord:
    """Write a plan's shard and record; `file_key` is `Source.file_key`, and images of
    `known_studies` are left out.

    A record of an earlier run is returned instead where its shard is intact and the files that it
    rejects still cannot be used.
    """
    cv2.setNumThreads(1)
    digest = plan.digest(prepare_digest)
    existing = _find_record(plan, store_url, image_size, digest)
    if existing is not None:
        return existing.model_copy(update={"reused": True})
    record = _write_shard(plan, store_url, image_size, digest, file_key, known_studies)
    storage.write_text(storage.join(store_url, plan.record), record.model_dump_json())
    return record


def _find_record(
    plan: ShardPlan, store_url: str, image_size: int, digest: str
) -> ShardRecord | None:
    """An earlier run's record of the same plan, if its shard is intact and the same files are
    unusable; else None."""
    try:
        text = storage.read_bytes(storage.join(store_url, plan.record))
        record = ShardRecord.model_validate_json(text)
        if record.plan_digest != digest:
            return None
        entry = record.entry
        if entry.samples:
            url = storage.join(store_url, entry.name)
            storage.read_bytes(url, sha256=entry.sha256, size=entry.bytes)
    except (FileNotFoundError, ValidationError, ContentError):
        return None
    studies = {study.key: study for study in plan.studies}
    now = [read_study(studies[item.key], plan.split, image_size) for item in record.rejected]
    return record if now == list(record.rejected) else None


def _write_shard(
    plan: ShardPlan,
    store_url: str,
    image_size: int,
    digest: str,
    file_key: bytes,
    known_studies: KnownStudies | None,
) -> ShardRecord:
    rejected, warned, known = list[Rejected](), list[StudyWarning](), list[str]()
    contradictions: Counter[str] = Counter()

    def studies() -> Iterator[tuple[StudyRow, Gray]]:
        files = read_files([(study.url, _label(study)) for study in plan.studies])
        for study, data in zip(plan.studies, files, strict=True):
            # Hashed first, while the file is in the CPU's cache.
            hashed = (
                "" if isinstance(data, UnusableFile) else blake3(data, key=file_key).hexdigest()
            )
            image = _decode_study(study, data, plan.split, image_size)
            if isinstance(image, Rejected):
                rejected.append(image)
                continue
            row = _make_row(study, plan.split, image, hashed)
            if known_studies is not None and known_studies.match_pictures([row])[0]:
                known.append(study.key)
                continue
            contradictions.update(_contradictions(study, image))
            warned.extend(StudyWarning(study.key, plan.split, code) for code in image.warnings)
            yield row, image.pixels

    record = write_studies_shard(store_url, plan.name, studies())
    return record.model_copy(
        update={
            "plan_digest": digest,
            "rejected": tuple(rejected),
            "contradictions": dict(contradictions),
            "warned": tuple(warned),
            "known": len(known),
        }
    )


def write_studies_shard(
    store_url: str, name: str, studies: Iterable[tuple[StudyRow, Gray]]
) -> ShardRecord:
    """Write a shard of studies, given as row and stored image; returns its record."""
    rows, histogram = list[StudyRow](), np.zeros(256, np.int64)

    def samples() -> Iterator[Sample]:
        for row, pixels in studies:
            rows.append(row)
            # OpenCV counts in float32: exact up to 16 million pixels, five times as fast as numpy.
            counts = cv2.calcHist([pixels], [0], None, [256], [0, 256])
            np.add(histogram, counts.ravel().astype(np.int64), out=histogram)
            yield Sample(row.key, pixels, row.target)

    entry = write_shard(store_url, f"{name}-{{digest}}{SHARD_SUFFIX}", samples())
    return ShardRecord(entry=entry, rows=tuple(rows), histogram=tuple(histogram.tolist()))


def _label(study: Study) -> str:
    """The name of the study's file in errors, as the file's own name is an identifier."""
    return f"study {study.key}"


def read_study(study: Study, split: str, image_size: int) -> GrayImage | Rejected:
    """The study's image, or why it cannot be used. Raises as `dicom_files.read_pictures`."""
    return _decode_study(study, read_file(study.url, _label(study)), split, image_size)


def _decode_study(
    study: Study, data: bytes | UnusableFile, split: str, image_size: int
) -> GrayImage | Rejected:
    image = data if isinstance(data, UnusableFile) else decode_file(data, image_size)
    if isinstance(image, UnusableFile):
        return Rejected(study.key, split, image.reason, image.message)
    return image


def _make_row(study: Study, split: str, image: GrayImage, source_blake3: str) -> StudyRow:
    stated, own = study.header or NO_HEADER, image.header
    return StudyRow(
        key=study.key,
        patient=study.patient,
        split=split,
        target=study.target,
        finding=study.finding,
        boxes=tuple(image.to_stored(box) for box in study.boxes),
        age=own.age if stated.age is None else stated.age,
        sex=stated.sex or own.sex,
        view=stated.view or own.view,
        spacing_mm=stated.spacing_mm or own.spacing_mm,
        pixels_digest=digest_pixels(image.pixels),
        source_blake3=source_blake3,
        picture_hash=hash_picture(image.pixels),
    )


def _contradictions(study: Study, image: GrayImage) -> Iterator[str]:
    """The kinds of disagreement between the tables and the study's file."""
    image_id = study.url.rsplit("/", 1)[-1].removesuffix(".dcm")
    is_rsna = study.layout.startswith(RSNA)
    if is_rsna and image.identifier is not None and image.identifier != image_id:
        yield "patient_id"
    if any(
        min(box) < 0 or box.x + box.width > image.columns or box.y + box.height > image.rows
        for box in study.boxes
    ):
        yield "box_outside"
    if is_rsna and study.target and not study.boxes:
        yield "no_box"
