"""Source -> store: claiming the store, collecting the tasks' shards, writing the manifest.

A killed preparation is resumed from the records of finished shards under `parts/`. The manifest is
written last, then the records are removed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from pneumo import storage
from pneumo.config import Config
from pneumo.dataset.manifest import Manifest, SplitEntry, find_manifest, write_manifest
from pneumo.dataset.overlap import KNOWN_PICTURES
from pneumo.dataset.shard_plans import PARTS, digest_settings
from pneumo.dataset.shard_tasks import ShardRecord, read_study
from pneumo.dataset.source import Rejected, Source
from pneumo.dataset.splits import SPLITS, LeakageAudit, audit_split, check_shard_balance
from pneumo.dataset.study_keys import SECRET_CHECK
from pneumo.dataset.study_table import (
    QUARANTINE,
    find_duplicates,
    read_quarantine,
    tabulate_studies,
    write_quarantine,
    write_studies,
    write_warnings,
)
from pneumo.errors import BadFilesError, SourceError, StoreError

CLAIM = "parts/claim.json"
TABLES_CLAIM = "parts/tables.txt"
_PART_NAME = r"claim\.json|tables\.txt|quarantine\.jsonl|(train|val|test)/\d{6}\.json"
_SHARD_URL = re.compile(r"/\d{6}-[0-9a-f]{12}\.tar$")


def check_store_folder(store_url: str, source_url: str) -> None:
    """Raises StoreError where the store would stand in the source's own folder, or in a run's."""
    if source_url == store_url:
        raise StoreError(f"--store {store_url}: is the source's own folder; give another")
    for held, marker in (("run", "checkpoints/index.json"), ("search", "search.json")):
        if storage.exists(storage.join(store_url, marker)):
            raise StoreError(f"--store {store_url}: is a {held}; give another folder for the store")


def find_store(store_url: str, source: Source, config: Config) -> Manifest | None:
    """The manifest of the finished store, where its tables and settings are the same; else claims
    the store and returns None. Whether a DICOM file has changed since is not checked.

    Raises StoreError when a store, finished or not, of another source or other settings is there.
    """
    digests = (source.digest, digest_settings(config))
    claim = json.dumps({"source_digest": digests[0], "prepare_digest": digests[1]}).encode()
    url = storage.join(store_url, CLAIM)
    while True:
        manifest = _find_finished(store_url, digests)
        if manifest is not None:
            return manifest
        if storage.create_bytes(url, claim):
            break
        try:
            existing_claim = storage.read_bytes(url)
        except FileNotFoundError:  # another job has finished the store
            continue
        if existing_claim == claim:
            return None
        raise StoreError(
            f"{store_url}: a preparation of another source or with other settings is running "
            "there, or was interrupted; give another --store, or delete it first"
        )
    # Since the first look another job may have written the manifest and removed its claim.
    try:
        return _find_finished(store_url, digests)
    except StoreError:
        storage.remove(url)
        raise


def _find_finished(store_url: str, digests: tuple[str, str]) -> Manifest | None:
    """The manifest, if there is one. Raises StoreError for another source or other settings."""
    manifest = find_manifest(store_url)
    if manifest is None or (manifest.source_digest, manifest.prepare_digest) == digests:
        return manifest
    raise StoreError(
        f"{store_url}: holds a store of another source or of other settings; give another "
        "--store, or delete it first"
    )


def finish_store(
    store_url: str,
    source: Source,
    prepared: Iterable[ShardRecord],
    audit: LeakageAudit,
    config: Config,
    *,
    phantoms: bool = False,
) -> Manifest:
    """Finish the store of the shards in `prepared`, in any order: check the number of bad files,
    write the tables and the manifest, remove the records. Where another job has finished the store
    meanwhile, its manifest is returned.

    Raises BadFilesError when too many studies cannot be used, for their file or for contradictory
    tables; SourceError when a split has one class, or a shard an improbable class ratio; StoreError
    when a job that read other files is finishing the store.
    """
    finished = _find_finished(store_url, (source.digest, digest_settings(config)))
    if finished is not None:
        remove_unfinished(store_url, finished)
        return finished
    manifest = _write_tables(store_url, source, prepared, audit, config, phantoms=phantoms)
    storage.write_text(storage.join(store_url, SECRET_CHECK), f"{source.secret_check}\n")
    write_manifest(store_url, manifest)
    remove_unfinished(store_url, manifest)
    return manifest


def _write_tables(
    store_url: str,
    source: Source,
    prepared: Iterable[ShardRecord],
    audit: LeakageAudit,
    config: Config,
    *,
    phantoms: bool,
) -> Manifest:
    """Write the tables; returns the manifest, also one that another job has written meanwhile.
    Raises as `finish_store`."""
    records = sorted(prepared, key=lambda record: record.entry.name)
    rejected = [*source.rejected, *(item for record in records for item in record.rejected)]
    _check_bad_files(rejected, sum(r.entry.samples for r in records), config, store_url)
    table = tabulate_studies(row for record in records for row in record.rows)
    splits = {name: _join_split(name, records, source.has_patients) for name in SPLITS}
    shard_prevalence = _check_classes(splits)
    known = sum(record.known for record in records)
    if known or len(rejected) > len(source.rejected):
        audit = _audit_used(source, table, audit, config)
    contradictions = sum((Counter(record.contradictions) for record in records), Counter())
    mean, std = _moments(splits["train"].histogram)
    digests = (source.digest, digest_settings(config))
    if (finished := _claim_tables(store_url, records, digests)) is not None:
        return finished
    return Manifest(
        source_digest=digests[0],
        prepare_digest=digests[1],
        image_size=config.prepare.image_size,
        layout=source.layout,
        joined_layouts=source.joined_layouts,
        left_out={**source.left_out, **({KNOWN_PICTURES: known} if known else {})},
        phantoms=phantoms,
        seed=config.seed,
        split=config.split,
        audit=audit.model_copy(update={"shard_prevalence": shard_prevalence}),
        mean=mean,
        std=std,
        quarantined=dict(sorted(Counter(item.reason for item in rejected).items())),
        contradictions=dict(sorted(contradictions.items())),
        unlabelled=source.unlabelled,
        duplicates=find_duplicates(table, has_patients=source.has_patients),
        studies=write_studies(store_url, table),
        quarantine=write_quarantine(store_url, rejected),
        warnings=write_warnings(store_url, (w for item in records for w in item.warned)),
        splits=splits,
    )


def _claim_tables(
    store_url: str, records: Sequence[ShardRecord], digests: tuple[str, str]
) -> Manifest | None:
    """Claim the tables, whose names are the same for every job, for what `records` say; returns the
    manifest where another job has finished the store.

    Raises StoreError where the tables are claimed for other records, as of a file that was mended
    meanwhile. A repeated job takes over its own claim.
    """
    content = hashlib.sha256(pa.__version__.encode())
    for record in records:
        content.update(record.model_dump_json().encode())
    claim, url = content.hexdigest(), storage.join(store_url, TABLES_CLAIM)
    while True:
        storage.create_bytes(url, claim.encode())
        # After the claim, as the manifest is written before claims are removed.
        if (finished := _find_finished(store_url, digests)) is not None:
            return finished
        found = storage.find_text(url)
        if found == claim:
            return None
        if found is not None:
            raise StoreError(
                f"{store_url}: another preparation, which could read other files, is finishing it, "
                f"or was interrupted then; when none is running, delete {url} and repeat the "
                "command"
            )


def can_use_rejected(store_url: str, manifest: Manifest, source: Source) -> bool:
    """Whether a file that is quarantined in a finished store can be used now.

    Raises DataError when the quarantine list is not what the manifest says.
    """
    studies = {study.key: study for study in source.studies}
    left_out = (studies.get(item.key) for item in read_quarantine(store_url, manifest))
    return any(
        not isinstance(read_study(study, "", manifest.image_size), Rejected)
        for study in left_out
        if study is not None
    )


def remove_unfinished(store_url: str, manifest: Manifest) -> None:
    """Remove what finished and killed preparations leave in the store: records, shards that are not
    in the manifest, and temporary files."""
    storage.remove_below(storage.join(store_url, PARTS), only=_PART_NAME)
    for url in _list_shards(store_url) - _shard_urls(store_url, manifest):
        storage.remove(url)
    for folder in (store_url, *(storage.join(store_url, name) for name in SPLITS)):
        storage.remove_partials(folder)


def check_shards_are_there(store_url: str, manifest: Manifest) -> None:
    """Raises StoreError where shards of a finished store are missing; their content is checked when
    they are read."""
    expected = _shard_urls(store_url, manifest)
    if lost := expected - _list_shards(store_url):
        raise StoreError(
            f"{store_url}: {len(lost)} of the finished store's {len(expected)} shards are missing; "
            "delete it, and repeat the command"
        )


def _list_shards(store_url: str) -> set[str]:
    return {
        url
        for name in SPLITS
        for url in storage.list_urls(storage.join(store_url, name))
        if _SHARD_URL.search(url)  # archives of others are left alone
    }


def _shard_urls(store_url: str, manifest: Manifest) -> set[str]:
    return {
        storage.join(store_url, shard.name)
        for entry in manifest.splits.values()
        for shard in entry.shards
    }


def _check_bad_files(
    rejected: Sequence[Rejected], used: int, config: Config, store_url: str
) -> None:
    total = used + len(rejected)
    if len(rejected) > config.prepare.max_bad_fraction * total:
        # Not beside the tables, which may be another job's.
        parts_url = storage.join(store_url, PARTS)
        write_quarantine(parts_url, rejected)
        counts = sorted(Counter(item.reason for item in rejected).items())
        reasons = ", ".join(f"{reason} {number}" for reason, number in counts)
        raise BadFilesError(
            f"prepare: {len(rejected)} of {total} studies cannot be used ({reasons}), more than "
            f"prepare.max_bad_fraction {config.prepare.max_bad_fraction:g}; see "
            f"{storage.join(parts_url, QUARANTINE)}, repair them and repeat the command"
        )


def _join_split(name: str, records: Sequence[ShardRecord], has_patients: bool) -> SplitEntry:
    own = [item for item in records if item.entry.name.startswith(f"{name}/")]
    patients = {row.patient for item in own for row in item.rows}
    histogram = np.array([item.histogram for item in own], np.int64).sum(axis=0)
    return SplitEntry(
        samples=sum(item.entry.samples for item in own),
        positives=sum(item.entry.positives for item in own),
        patients=len(patients) if has_patients else None,
        histogram=tuple(histogram.tolist()),
        shards=tuple(item.entry for item in own if item.entry.samples),
    )


def _check_classes(splits: Mapping[str, SplitEntry]) -> dict[str, tuple[float, float]]:
    for name, entry in splits.items():
        if not 0 < entry.positives < entry.samples:
            raise SourceError(f"split {name}: only one class is left after quarantine")
    return check_shard_balance(
        {
            name: [(shard.samples, shard.positives) for shard in entry.shards]
            for name, entry in splits.items()
        }
    )


def _audit_used(
    source: Source, table: pa.Table, audit: LeakageAudit, config: Config
) -> LeakageAudit:
    """The audit of the studies in the store; `audit` was of all selected studies."""
    by_key = dict(zip(table["key"].to_pylist(), table["split"].to_pylist(), strict=True))
    audit_of_store = audit_split(
        [study for study in source.studies if study.key in by_key],
        by_key,
        config.split,
        seed=config.seed,
        salt=audit.salt,
        has_patients=source.has_patients,
    )
    return audit_of_store.model_copy(update={"unlisted": audit.unlisted})


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of the gray level in [0, 1], from the number of pixels of each
    level; the sums are of integers, so the same on any machine."""
    pixels = sum(counts)
    total = sum(level * count for level, count in enumerate(counts))
    squares = sum(level * level * count for level, count in enumerate(counts))
    mean = total / pixels
    variance = squares / pixels - mean**2
    return round(mean / 255, 6), round(max(variance, 0.0) ** 0.5 / 255, 6)
