"""Source -> store, one shard at a time: what each task does, what it leaves, how it all is joined.

A task writes its shard and then a receipt for it, under `parts/`, and hands both back as a part. A
preparation that was killed finds the receipts, checks the shards that they vouch for, tries the
files that they reject anew, and does the rest. Everything depends on the source, the settings and
the seed alone, so whoever does a task, and however often, the bytes are the same. The manifest
comes last, and the receipts go.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from pneumo import storage
from pneumo.config import Config
from pneumo.dataset.shards import (
    QUARANTINE,
    SHARD_SUFFIX,
    Manifest,
    Sample,
    ShardEntry,
    SplitEntry,
    StudyRow,
    digest_pixels,
    find_duplicates,
    find_manifest,
    read_quarantine,
    sample_bytes,
    shard_samples,
    tabulate_studies,
    write_manifest,
    write_quarantine,
    write_shard,
    write_studies,
)
from pneumo.dataset.source import Rejected, Source, Study
from pneumo.dataset.splits import SPLITS, LeakageAudit, audit_split, check_shards
from pneumo.errors import (
    BadFilesError,
    ContentError,
    SourceError,
    StoreError,
)
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import Unusable, decode_file, read_file, read_files

PARTS = "parts"
CLAIM = "parts/claim.json"
_LIBRARIES_BYTES = 384 * 2**20
_FORMAT = 3
"""Raised when the same source and settings would give other bytes than before."""


@dataclass(frozen=True)
class ShardPlan:
    """One task's work."""

    split: str
    name: str
    """`train/000000`, relative to the store; its shard's name has the digest besides."""
    studies: tuple[Study, ...]

    @property
    def receipt(self) -> str:
        """Where the task's receipt goes, relative to the store."""
        return f"{PARTS}/{self.name}.json"

    def digest(self, prepare_digest: str) -> str:
        """SHA-256 of all that the shard's bytes follow from, the DICOM files aside."""
        described = [_FORMAT, prepare_digest, self.split, [_describe(s) for s in self.studies]]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


class Receipt(BaseModel):
    """What one task leaves: enough to write the store's tables without looking at its shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    plan_digest: str
    entry: ShardEntry
    """Of 0 samples, and without a file, when no study of the plan could be used."""
    rows: tuple[StudyRow, ...]
    rejected: tuple[Rejected, ...]
    histogram: tuple[int, ...]
    """Stored pixels of each gray level."""
    contradictions: dict[str, int]
    """Studies whose tables and header disagree, or lack something, by what it is."""


@dataclass(frozen=True, eq=False)
class Part:
    """What a task hands back: its receipt, the rows tabulated, so that the driver has nothing to
    read or to parse when all are done."""

    entry: ShardEntry
    studies: pa.Table
    """As in studies.parquet."""
    rejected: tuple[Rejected, ...]
    histogram: tuple[int, ...]
    contradictions: Mapping[str, int]
    reused: bool
    """Whether an earlier run had done it."""

    @classmethod
    def of(cls, receipt: Receipt, *, reused: bool) -> Part:
        """The part that a receipt describes."""
        return cls(
            entry=receipt.entry,
            studies=tabulate_studies(receipt.rows),
            rejected=receipt.rejected,
            histogram=receipt.histogram,
            contradictions=receipt.contradictions,
            reused=reused,
        )

    @property
    def split(self) -> str:
        """Of the shard, whose name begins with it."""
        return self.entry.name.split("/")[0]


def find_store(store_url: str, source: Source, config: Config) -> Manifest | None:
    """The manifest that is there already for these tables and settings, or None; whether a file has
    changed since is not looked at.

    Raises StoreError when the store, or what a preparation left of one, is of another source or of
    other settings.
    """
    wanted = (source.digest, digest_settings(config))
    url, claim = storage.join(store_url, CLAIM), _encode_claim(wanted)
    while True:
        manifest = _find_own(store_url, wanted)
        if manifest is not None:
            return manifest
        if storage.create_bytes(url, claim):
            break
        try:
            claimed = storage.read_bytes(url)
        except FileNotFoundError:  # finished since
            continue
        if claimed == claim:
            return None
        raise StoreError(
            f"{store_url}: a preparation of another source or with other settings is under way "
            "there, or was left unfinished; give another --store, or delete it first"
        )
    # Since the manifest was looked for, another job may have written it and given up its claim.
    try:
        return _find_own(store_url, wanted)
    except StoreError:
        storage.remove(url)
        raise


def _find_own(store_url: str, wanted: tuple[str, str]) -> Manifest | None:
    """The manifest, if there is one; StoreError if it is of another source or other settings."""
    manifest = find_manifest(store_url)
    if manifest is None or (manifest.source_digest, manifest.prepare_digest) == wanted:
        return manifest
    raise StoreError(
        f"{store_url}: holds a store of another source or of other settings; give another "
        "--store, or delete it first"
    )


def plan_shards(
    studies: Sequence[Study], by_key: Mapping[str, str], config: Config
) -> list[ShardPlan]:
    """Which studies go to which shard: shuffled by the seed, so that no shard is skewed by a
    name."""
    per_shard = config.prepare.samples_per_shard or shard_samples(config.prepare.image_size)
    plans = []
    for name in SPLITS:
        members = [study for study in studies if by_key.get(study.key) == name]
        random.Random(f"shards/{config.seed}/{name}").shuffle(members)
        # Equal shards, none above the wanted size, and enough of them to share out a small source;
        # never a question of how many workers there are, or the store would depend on it.
        count = max(-(-len(members) // per_shard), min(8, len(members) // 16), 1)
        if count > 8:  # so that 2, 4 or 8 workers have equally many, and end together
            count = min(-(-count // 8) * 8, len(members))
        bounds = [len(members) * i // count for i in range(count + 1)]
        plans += [
            ShardPlan(name, f"{name}/{i:06d}", tuple(members[bounds[i] : bounds[i + 1]]))
            for i in range(count)
        ]
    return plans


def estimate_memory(plans: Sequence[ShardPlan], image_size: int) -> int:
    """Bytes that a task holds at most: its libraries, and the largest shard with a copy."""
    largest = max(len(plan.studies) for plan in plans)
    return _LIBRARIES_BYTES + 2 * largest * sample_bytes(image_size)


def prepare_shard(
    plan: ShardPlan, store_url: str, image_size: int, prepare_digest: str, file_key: bytes
) -> Part:
    """Make sure that a plan's shard and receipt are there; what they add to the store. `file_key`
    is `Source.file_key`.

    A receipt that vouches for the same plan, with its shard as it says, is left as it is while the
    files that it rejects still cannot be used.
    """
    cv2.setNumThreads(1)
    digest = plan.digest(prepare_digest)
    kept = _find_receipt(plan, store_url, image_size, digest)
    if kept is not None:
        return Part.of(kept, reused=True)
    receipt = _write_shard(plan, store_url, image_size, digest, file_key)
    storage.write_text(storage.join(store_url, plan.receipt), receipt.model_dump_json())
    return Part.of(receipt, reused=False)


def finish_store(
    store_url: str, source: Source, parts: Iterable[Part], audit: LeakageAudit, config: Config
) -> Manifest:
    """Join the parts, in whatever order they come: the policy on bad files, the tables, the
    manifest; then clear what the tasks left besides. Where another job has finished this store
    meanwhile, it is left as it is.

    Raises BadFilesError when too many of the studies that have a place, and of those that the
    tables contradict themselves on, could not be used; SourceError when a split or a shard is left
    lopsided.
    """
    finished = _find_own(store_url, (source.digest, digest_settings(config)))
    if finished is not None:
        clear_parts(store_url, finished)
        return finished
    parts = sorted(parts, key=lambda part: part.entry.name)
    rejected = [*source.rejected, *(item for part in parts for item in part.rejected)]
    quarantine = write_quarantine(store_url, rejected)
    wanted = sum(part.entry.samples for part in parts) + len(rejected)
    _check_policy(rejected, wanted, config, store_url)
    table = pa.concat_tables([part.studies for part in parts])
    splits = _join_splits(parts, table, has_patients=source.has_patients)
    shard_prevalence = _check_classes(splits)
    if len(rejected) > len(source.rejected):
        audit = _audit_used(source, table, audit, config)
    studies = write_studies(store_url, table)
    contradictions = sum((Counter(part.contradictions) for part in parts), Counter())
    mean, std = _moments(splits["train"].histogram)
    manifest = Manifest(
        source_digest=source.digest,
        prepare_digest=digest_settings(config),
        image_size=config.prepare.image_size,
        seed=config.seed,
        split=config.split,
        audit=audit.model_copy(update={"shard_prevalence": shard_prevalence}),
        mean=mean,
        std=std,
        quarantined=dict(sorted(Counter(item.reason for item in rejected).items())),
        contradictions=dict(sorted(contradictions.items())),
        unlabelled=source.unlabelled,
        duplicates=find_duplicates(table, has_patients=source.has_patients),
        studies=studies,
        quarantine=quarantine,
        splits=splits,
    )
    write_manifest(store_url, manifest)
    clear_parts(store_url, manifest)
    return manifest


def has_mended(store_url: str, manifest: Manifest, source: Source) -> bool:
    """Whether a file that a finished store had to leave out can be used now.

    Raises DataError when the store's list of them is not what the manifest vouches for.
    """
    studies = {study.key: study for study in source.studies}
    left_out = (studies.get(item.key) for item in read_quarantine(store_url, manifest))
    return any(
        not isinstance(_read_study(study, "", manifest.image_size), Rejected)
        for study in left_out
        if study is not None
    )


def clear_parts(store_url: str, manifest: Manifest) -> None:
    """Remove what preparations leave besides the finished store itself, killed ones included: a
    shard that the manifest does not name is of a job that found other files."""
    storage.remove_below(storage.join(store_url, PARTS))
    for url in _list_shards(store_url) - _shard_urls(store_url, manifest):
        storage.remove(url)
    for folder in (store_url, *(storage.join(store_url, name) for name in SPLITS)):
        storage.remove_partials(folder)


def check_shards_are_there(store_url: str, manifest: Manifest) -> None:
    """Raise StoreError where a finished store has lost shards; what they hold, readers check."""
    wanted = _shard_urls(store_url, manifest)
    if lost := wanted - _list_shards(store_url):
        raise StoreError(
            f"{store_url}: {len(lost)} of the finished store's {len(wanted)} shards are missing; "
            "delete it, and repeat the command"
        )


def _list_shards(store_url: str) -> set[str]:
    return {
        url
        for name in SPLITS
        for url in storage.list_urls(storage.join(store_url, name))
        if url.endswith(SHARD_SUFFIX)
    }


def _shard_urls(store_url: str, manifest: Manifest) -> set[str]:
    return {
        storage.join(store_url, shard.name)
        for entry in manifest.splits.values()
        for shard in entry.shards
    }


def digest_settings(config: Config) -> str:
    """SHA-256 of the settings that decide what a store holds.

    How many bad files are too many is none of them: a preparation that failed for that goes on.
    """
    neutral = config.prepare.model_copy(update={"max_bad_fraction": 0.0})
    return config.model_copy(update={"prepare": neutral}).digest("seed", "prepare", "split")


def _describe(study: Study) -> list[object]:
    return [study.key, study.patient, study.target, study.finding, study.boxes]


def _encode_claim(claim: tuple[str, str]) -> bytes:
    return json.dumps({"source_digest": claim[0], "prepare_digest": claim[1]}).encode()


def _find_receipt(plan: ShardPlan, store_url: str, image_size: int, digest: str) -> Receipt | None:
    """The receipt of an earlier run for just this plan, if its shard is whole and what it rejects
    is as it was; else None.

    A file may have come since, its permission may have been mended, its server may be back.
    """
    try:
        text = storage.read_bytes(storage.join(store_url, plan.receipt))
        receipt = Receipt.model_validate_json(text)
        if receipt.plan_digest != digest:
            return None
        if receipt.entry.samples:
            entry = receipt.entry
            url = storage.join(store_url, entry.name)
            storage.read_bytes(url, sha256=entry.sha256, size=entry.bytes)
    except (FileNotFoundError, ValidationError, ContentError):
        return None
    studies = {study.key: study for study in plan.studies}
    as_it_was = all(
        _read_study(studies[item.key], plan.split, image_size) == item for item in receipt.rejected
    )
    return receipt if as_it_was else None


def _write_shard(
    plan: ShardPlan, store_url: str, image_size: int, digest: str, file_key: bytes
) -> Receipt:
    rows: list[StudyRow] = []
    rejected: list[Rejected] = []
    contradictions: Counter[str] = Counter()
    histogram = np.zeros(256, np.int64)

    def samples() -> Iterator[Sample]:
        files = read_files([(study.url, _label(study)) for study in plan.studies])
        for study, data in zip(plan.studies, files, strict=True):
            # First, while the file is in the core's cache.
            hashed = "" if isinstance(data, Unusable) else blake3(data, key=file_key).hexdigest()
            image = _decode_study(study, data, plan.split, image_size)
            if isinstance(image, Rejected):
                rejected.append(image)
                continue
            # OpenCV counts in float32, exact to 16 million pixels, and five times as fast as numpy.
            counts = cv2.calcHist([image.pixels], [0], None, [256], [0, 256])
            np.add(histogram, counts.ravel().astype(np.int64), out=histogram)
            contradictions.update(_contradictions(study, image))
            rows.append(_make_row(study, plan.split, image, hashed))
            yield Sample(study.key, image.pixels, study.target)

    entry = write_shard(store_url, f"{plan.name}-{{digest}}{SHARD_SUFFIX}", samples())
    return Receipt(
        plan_digest=digest,
        entry=entry,
        rows=tuple(rows),
        rejected=tuple(rejected),
        histogram=tuple(histogram.tolist()),
        contradictions=dict(contradictions),
    )


def _label(study: Study) -> str:
    """What errors call the study's file, whose own name is an identifier."""
    return f"study {study.key}"


def _read_study(study: Study, split: str, image_size: int) -> GrayImage | Rejected:
    return _decode_study(study, read_file(study.url, _label(study)), split, image_size)


def _decode_study(
    study: Study, data: bytes | Unusable, split: str, image_size: int
) -> GrayImage | Rejected:
    """The study's picture, or why it cannot be used."""
    image = data if isinstance(data, Unusable) else decode_file(data, image_size)
    if isinstance(image, Unusable):
        return Rejected(study.key, split, image.reason, image.message)
    return image


def _make_row(study: Study, split: str, image: GrayImage, source_blake3: str) -> StudyRow:
    return StudyRow(
        key=study.key,
        patient=study.patient,
        split=split,
        target=study.target,
        finding=study.finding,
        boxes=tuple(image.place(box) for box in study.boxes),
        age=image.header.age,
        sex=image.header.sex,
        view=image.header.view,
        spacing_mm=image.header.spacing_mm,
        pixels_digest=digest_pixels(image.pixels),
        source_blake3=source_blake3,
    )


def _contradictions(study: Study, image: GrayImage) -> Iterator[str]:
    """What the tables say of a study that its file does not bear out."""
    image_id = study.url.rsplit("/", 1)[-1].removesuffix(".dcm")
    if image.identifier is not None and image.identifier != image_id:
        yield "patient_id"
    if any(
        min(box) < 0 or box.x + box.width > image.columns or box.y + box.height > image.rows
        for box in study.boxes
    ):
        yield "box_outside"
    if study.target and not study.boxes:
        yield "no_box"


def _check_policy(rejected: Sequence[Rejected], total: int, config: Config, store_url: str) -> None:
    if len(rejected) > config.prepare.max_bad_fraction * total:
        reasons = sorted(Counter(item.reason for item in rejected).items())
        told = ", ".join(f"{reason} {number}" for reason, number in reasons)
        raise BadFilesError(
            f"prepare: {len(rejected)} of {total} studies cannot be used ({told}), more than "
            f"prepare.max_bad_fraction {config.prepare.max_bad_fraction:g}; see "
            f"{storage.join(store_url, QUARANTINE)}, mend them and repeat the command"
        )


def _join_splits(
    parts: Sequence[Part], table: pa.Table, *, has_patients: bool
) -> dict[str, SplitEntry]:
    counted = table.group_by("split").aggregate([("patient", "count_distinct")]).to_pylist()
    patients = {row["split"]: row["patient_count_distinct"] for row in counted}
    joined = {}
    for name in SPLITS:
        mine = [part for part in parts if part.split == name]
        histogram = np.array([part.histogram for part in mine], np.int64).sum(axis=0)
        joined[name] = SplitEntry(
            samples=sum(part.entry.samples for part in mine),
            positives=sum(part.entry.positives for part in mine),
            patients=patients.get(name, 0) if has_patients else None,
            histogram=tuple(histogram.tolist()),
            shards=tuple(part.entry for part in mine if part.entry.samples),
        )
    return joined


def _check_classes(splits: Mapping[str, SplitEntry]) -> dict[str, tuple[float, float]]:
    for name, entry in splits.items():
        if not 0 < entry.positives < entry.samples:
            raise SourceError(f"split {name}: only one class is left after quarantine")
    return check_shards(
        {
            name: [(shard.samples, shard.positives) for shard in entry.shards]
            for name, entry in splits.items()
        }
    )


def _audit_used(
    source: Source, table: pa.Table, audit: LeakageAudit, config: Config
) -> LeakageAudit:
    """The audit of what the store holds: `audit` was of all that was to go into it."""
    by_key = dict(zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True))
    of_used = audit_split(
        [study for study in source.studies if study.key in by_key],
        by_key,
        config.split,
        seed=config.seed,
        salt=audit.salt,
        has_patients=source.has_patients,
    )
    return of_used.model_copy(update={"unlisted": audit.unlisted})


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of the gray level in [0, 1], from the pixels of each level; exact
    sums, so the same anywhere."""
    pixels = sum(counts)
    total = sum(level * count for level, count in enumerate(counts))
    squares = sum(level * level * count for level, count in enumerate(counts))
    mean = total / pixels
    variance = squares / pixels - mean**2
    return round(mean / 255, 6), round(max(variance, 0.0) ** 0.5 / 255, 6)
