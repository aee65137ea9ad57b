"""Joining several stores into one for training: shards with images of all, and a column `source`.

A patient or an image of any store's test is in no train or val, and one of any val in no train.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.overlap import (
    KnownStudies,
    check_secret,
    have_one_secret,
    read_secret_check,
)
from pneumo.dataset.preparation import find_store, finish_store
from pneumo.dataset.shard_plans import count_shards
from pneumo.dataset.shard_tasks import ShardRecord, write_studies_shard
from pneumo.dataset.shards import read_blocks, shard_samples
from pneumo.dataset.source import Source, Study
from pneumo.dataset.splits import audit_split
from pneumo.dataset.study_table import StudyRow, read_studies, read_warnings
from pneumo.errors import StoreError
from pneumo.images.gray_levels import Gray

LAYOUT = "joined"
_STRICTEST_FIRST = ("test", "val", "train")
_LOOSER: Mapping[str, Sequence[str]] = {"test": ("val", "train"), "val": ("train",), "train": ()}


@dataclass(frozen=True, eq=False)
class _Store:
    name: str
    url: str
    manifest: Manifest
    rows: Mapping[str, StudyRow]


def join_stores(
    store_urls: Sequence[str],
    joined_url: str,
    *,
    balanced: bool,
    seed: int,
    tell: Callable[[str], None],
) -> Manifest:
    """Join `store_urls` to a store at `joined_url`, unless it exists; returns its manifest.

    `balanced`: train has the same number of studies of each store, random subsets of the larger
    ones. Raises StoreError where stores differ in image size or share patients that cannot be
    found.
    """
    stores = [_read(url) for url in store_urls]
    _check(stores, tell)
    kept, left_out = _choose(stores)
    if balanced:
        _balance(kept, left_out, seed)
    first, has_patients = stores[0].manifest, all(s.manifest.audit.has_patients for s in stores)
    settings = {
        "seed": seed,
        "prepare.image_size": first.image_size,
        "split.unit": "patient" if has_patients else "image",
    }
    config = override(Config(), settings, "the stores")
    source = _make_source(kept, left_out, has_patients)
    by_key = {study.key: str(study.published) for study in source.studies}
    audit = audit_split(
        source.studies, by_key, config.split, seed=seed, salt=None, has_patients=has_patients
    )
    if (manifest := find_store(joined_url, source, config)) is not None:
        return manifest
    shards = [
        shard for split in _STRICTEST_FIRST for shard in _write(split, kept, joined_url, seed)
    ]
    phantoms = any(store.manifest.phantoms for store in stores)
    return finish_store(joined_url, source, shards, audit, config, phantoms=phantoms)


def check_stores(store_urls: Sequence[str], tell: Callable[[str], None]) -> None:
    """Raise StoreError where `join_stores` would; nothing is written."""
    _check([_read(url) for url in store_urls], tell)


def _read(url: str) -> _Store:
    manifest = read_manifest(url)
    return _Store(url.rstrip("/").rsplit("/", 1)[-1], url, manifest, read_studies(url, manifest))


def _check(stores: Sequence[_Store], tell: Callable[[str], None]) -> None:
    first = stores[0]
    if len({store.name for store in stores}) < len(stores):
        raise StoreError(
            "--store: two stores have the same name, which must identify a study's store"
        )
    for store in stores[1:]:
        sizes = (first.manifest.image_size, store.manifest.image_size)
        if sizes[0] != sizes[1]:
            raise StoreError(
                f"{store.url}: pictures of {sizes[1]} px, those of {first.name} are {sizes[0]} px; "
                f"prepare it with --prepare.image-size {sizes[0]}"
            )
    for one, store in combinations(stores, 2):
        warning = check_secret(
            store.url,
            one.name,
            is_one=have_one_secret(one.url, store.url),
            layouts=(one.manifest.layouts, store.manifest.layouts),
        )
        if warning is not None:
            tell(f"warning: {warning}")


KeptRows = dict[_Store, dict[str, StudyRow]]
"""By store, the rows by key of the studies to join."""


def _choose(stores: Sequence[_Store]) -> tuple[KeptRows, Counter[str]]:
    """The studies to join, and the number of the others by reason."""
    kept: KeptRows = {store: {} for store in stores}
    left_out: Counter[str] = Counter()
    for store, row, why in _judge(stores):
        if why is None:
            kept[store][row.key] = replace(row, source=store.name)
        else:
            left_out[why] += 1
    _check_keys(kept)
    return kept, left_out


def _judge(stores: Sequence[_Store]) -> Iterator[tuple[_Store, StudyRow, str | None]]:
    """Every study with its store, and why it is left out; None where it is to be joined."""
    patients, hashes, digests = set[str](), list[str](), set[str]()
    by_picture = set[str]()  # patients of a looser split with a picture of a stricter one
    for split in _STRICTEST_FIRST:
        own_patients = set[str]()
        for store in stores:
            rows = [row for row in store.rows.values() if row.split == split]
            known = KnownStudies(frozenset(patients), frozenset(digests), tuple(hashes))
            for row, is_duplicate in zip(rows, known.match_pictures(rows), strict=True):
                why = None
                if row.patient in patients:
                    why = f"studies of {split} whose patient is in a stricter split"
                elif is_duplicate:
                    why = f"pictures of {split} that are there already"
                elif row.patient in by_picture:
                    why = f"studies of {split} whose patient has a picture in a stricter one"
                yield store, row, why
            # Of those left out too: they are of this split in their own store.
            own_patients |= {row.patient for row in rows}
            hashes += [row.picture_hash for row in rows]
            digests |= {row.pixels_digest for row in rows}
        patients |= own_patients
        known = KnownStudies(frozenset(), frozenset(digests), tuple(hashes))
        looser = [row for s in stores for row in s.rows.values() if row.split in _LOOSER[split]]
        matches = zip(looser, known.match_pictures(looser), strict=True)
        by_picture |= {row.patient for row, is_known in matches if is_known}


def _check_keys(kept: KeptRows) -> None:
    """Raise StoreError where two stores give one key to different pictures."""
    owners: dict[str, _Store] = {}
    for store, rows in kept.items():
        if twice := owners.keys() & rows:
            others = sorted({owners[key].name for key in twice})
            raise StoreError(
                f"--store: {len(twice)} studies of {store.name} have keys of other studies of "
                f"{', '.join(others)}, as own tables with the same file names under one secret do; "
                "give the studies of one a column `study`, and the patients other names"
            )
        owners |= dict.fromkeys(rows, store)


def _balance(kept: KeptRows, left_out: Counter[str], seed: int) -> None:
    """Remove random studies of train, so that every store has as many as the smallest."""
    trains = {
        s: sorted(k for k, row in rows.items() if row.split == "train") for s, rows in kept.items()
    }
    size = min(map(len, trains.values()))
    for store, keys in trains.items():
        for key in random.Random(f"balance/{seed}/{store.name}").sample(keys, len(keys) - size):
            del kept[store][key]
            left_out["studies of train, to balance the stores"] += 1


def _make_source(kept: KeptRows, left_out: Mapping[str, int], has_patients: bool) -> Source:
    secret_checks = {read_secret_check(store.url) for store in kept}
    studies = [
        Study(row.key, row.patient, "", row.target, row.finding, row.boxes, LAYOUT, None, row.split)
        for rows in kept.values()
        for row in rows.values()
    ]
    return Source(
        studies=tuple(sorted(studies, key=lambda study: study.key)),
        rejected=(),
        has_patients=has_patients,
        unlabelled=sum(store.manifest.unlabelled for store in kept),
        file_key=b"",
        secret_check=(secret_checks.pop() or "") if len(secret_checks) == 1 else "",
        layout=LAYOUT,
        joined_layouts=tuple(sorted({name for s in kept for name in s.manifest.layouts})),
        title=" and ".join(store.name for store in kept),
        left_out=left_out,
    )


def _write(split: str, kept: KeptRows, joined_url: str, seed: int) -> Iterator[ShardRecord]:
    """Write the split's shards: the order of the stores is random, that of a store's samples, which
    is random already, is kept."""
    rng = random.Random(f"join/{seed}/{split}")
    numbers = {s: sum(row.split == split for row in rows.values()) for s, rows in kept.items()}
    order = [store for store, number in numbers.items() for _ in range(number)]
    rng.shuffle(order)
    streams = {store: _read_studies(store, split, rows) for store, rows in kept.items()}
    warnings = [w for store in kept for w in read_warnings(store.url, store.manifest)]
    count = count_shards(len(order), shard_samples(next(iter(kept)).manifest.image_size))
    for i in range(count):
        stores = order[len(order) * i // count : len(order) * (i + 1) // count]
        record = write_studies_shard(
            joined_url, f"{split}/{i:06d}", (next(streams[store]) for store in stores)
        )
        keys = {row.key for row in record.rows}
        warned = tuple(warning for warning in warnings if warning.key in keys)
        yield record.model_copy(update={"warned": warned})


def _read_studies(
    store: _Store, split: str, rows: Mapping[str, StudyRow]
) -> Iterator[tuple[StudyRow, Gray]]:
    """Row and stored image of each study of `rows`."""
    shards = store.manifest.splits[split].shards
    blocks = ((entry, block) for entry in shards for block in entry.blocks)
    samples = read_blocks(store.url, blocks, store.manifest.image_size)
    return ((rows[sample.key], sample.pixels) for sample in samples if sample.key in rows)
