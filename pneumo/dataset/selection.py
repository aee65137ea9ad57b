"""Which studies of a source go into a store, and the split of each."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pneumo import storage
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.named_splits import NAMED_SPLITS
from pneumo.dataset.overlap import KnownStudies, check_secret, read_secret_check
from pneumo.dataset.phantoms import MARKER
from pneumo.dataset.source import Source
from pneumo.dataset.sources.recognition import read_source, read_split_list
from pneumo.dataset.splits import (
    Split,
    audit_split,
    find_published,
    read_salt,
    save_salt,
    split_studies,
)
from pneumo.dataset.study_table import StudyRow, read_studies
from pneumo.errors import SourceError


@dataclass(frozen=True, eq=False)
class Selection:
    """The input of a preparation."""

    source: Source
    """With only the studies for the store."""
    split: Split
    config: Config
    """With the values that the source or another store decides."""
    known_studies: KnownStudies | None
    """Studies of other stores, whose images are left out."""
    phantoms: bool
    """Whether the source's images are phantoms."""


def select_studies(source_url: str, config: Config, tell: Callable[[str], None]) -> Selection:
    """Read a source's tables, and split its studies as `prepare` and `split` of `config` say.

    Raises SourceError, StoreError and ConfigError.
    """
    named = config.split.named
    source = read_source(
        source_url,
        settings=config.prepare,
        named_split=named if named in NAMED_SPLITS else None,
    )
    known, config = _read_known_studies(source, config, tell)
    if known is not None:
        source = known.leave_out_patients(source)
    tell(f"source: {source.summary}")
    _check_missing(source, config)
    split, config = _split(source, source_url, config, tell)
    source, split = _limit(source, split, config)
    phantoms = storage.exists(storage.join(source_url, MARKER))
    return Selection(source, split, config, known, phantoms)


def _read_known_studies(
    source: Source, config: Config, tell: Callable[[str], None]
) -> tuple[KnownStudies | None, Config]:
    """The studies of the stores of `prepare.without`, and the configuration with their digests.

    Raises StoreError where one is no store, or shares patients that cannot be found.
    """
    if not config.prepare.without:
        return None, config
    rows, digests = list[StudyRow](), list[str]()
    for url in map(storage.normalise, config.prepare.without):
        manifest = read_manifest(url)
        check = read_secret_check(url)
        warning = check_secret(
            url,
            "this source",
            is_one=None if check is None else check == source.secret_check,
            layouts=(manifest.layouts, [source.layout]),
        )
        if warning is not None:
            tell(f"warning: {warning}")
        rows += read_studies(url, manifest).values()
        digests.append(f"sha256:{manifest.digest}")
    return KnownStudies.of(rows), override(
        config, {"prepare.without": digests}, "the stores' manifests"
    )


def _check_missing(source: Source, config: Config) -> None:
    """Raises SourceError where more files are missing than `prepare.max_bad_fraction` allows."""
    missing = sum(item.reason == "missing" for item in source.rejected)
    total = len(source.studies) + len(source.rejected)
    if missing > config.prepare.max_bad_fraction * total:
        raise SourceError(
            f"the source's tables name {total} images, of which {missing} are missing; finish "
            "the download, or raise --prepare.max-bad-fraction to continue without them"
        )


def _split(
    source: Source, source_url: str, config: Config, tell: Callable[[str], None]
) -> tuple[Split, Config]:
    """The split, and the configuration with the name, list or salt that decides it."""
    listed: Mapping[str, str] | None = None
    published = find_published(source, config.split, seed=config.seed)
    if published is not None:
        listed = published
        config = override(config, {"split.named": config.split.named or "published"}, "the source")
    elif config.split.list is not None:
        list_url = storage.normalise(config.split.list)
        listed = read_split_list(list_url, source_url)
        digest = hashlib.sha256(storage.read_bytes(list_url)).hexdigest()
        config = override(config, {"split.list": f"sha256:{digest}"}, "the list")
    elif config.split.salt is None:
        salt = read_salt(source_url, config.split, seed=config.seed)
        config = override(config, {"split.salt": salt}, f"{source_url}/.pneumo")
    is_salt_new = config.split.salt is None
    split = split_studies(
        source.studies,
        config.split,
        seed=config.seed,
        has_patients=source.has_patients,
        listed=listed,
    )
    salt = split.audit.salt
    if salt is None or not is_salt_new:
        return split, config
    if not save_salt(source_url, config.split, seed=config.seed, salt=salt):
        tell(
            f"prepare: the source's folder cannot be written; give --split.salt {salt} next time, "
            "so that studies added later change no patient's split"
        )
    return split, override(config, {"split.salt": salt}, "the balanced split")


def _limit(source: Source, split: Split, config: Config) -> tuple[Source, Split]:
    """A random subset of `prepare.limit` studies, which keep their splits."""
    limit = config.prepare.limit
    studies = [study for study in source.studies if study.key in split.by_key]
    if limit is None or limit >= len(studies):
        return source, split
    chosen = random.Random(f"limit/{config.seed}").sample(range(len(studies)), limit)
    subset = replace(source, studies=tuple(studies[i] for i in sorted(chosen)), rejected=())
    audit = audit_split(
        subset.studies,
        split.by_key,
        config.split,
        seed=config.seed,
        salt=split.audit.salt,
        has_patients=source.has_patients,
    )
    return subset, Split(split.by_key, audit)
