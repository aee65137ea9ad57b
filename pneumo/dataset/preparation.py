"""Source -> store, one shard at a time: what each task does, what it leaves, how it all is joined.

A task writes its shard and then a receipt for it, under `parts/`, and hands both back as a part. A
preparation that was killed finds the receipts, checks the shards that they vouch for, tries the
files that they reject anew, and does the rest. Everything depends on the source, the settings and
the seed alone, so whoever does a task, and however often, the bytes are the same. The manifest
comes last, and the receipts go.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pneumo import storage
from pneumo.config import Config
from pneumo.dataset.manifest import Manifest, SplitEntry, find_manifest, write_manifest
from pneumo.dataset.receipts import Part, read_study
from pneumo.dataset.shard_plans import PARTS, digest_settings
from pneumo.dataset.shards import SHARD_SUFFIX
from pneumo.dataset.source import Rejected, Source
from pneumo.dataset.splits import SPLITS, LeakageAudit, audit_split, check_shards
from pneumo.dataset.study_table import (
    QUARANTINE,
    find_duplicates,
    read_quarantine,
    write_quarantine,
    write_studies,
)
from pneumo.errors import (
    BadFilesError,
    SourceError,
    StoreError,
)

CLAIM = "parts/claim.json"


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
        not isinstance(read_study(study, "", manifest.image_size), Rejected)
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


def _encode_claim(claim: tuple[str, str]) -> bytes:
    return json.dumps({"source_digest": claim[0], "prepare_digest": claim[1]}).encode()


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
