"""Which studies of a source go into a store, and in which split each is."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pneumo import storage
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.named_splits import NAMED_SPLITS
from pneumo.dataset.overlap import Seen, check_secret, read_secret_check
from pneumo.dataset.phantoms import MARKER
from pneumo.dataset.source import Source
from pneumo.dataset.sources.recognition import read_source, read_split_list
from pneumo.dataset.splits import (
    Split,
    audit_split,
    find_published,
    recall_salt,
    remember_salt,
    split_studies,
)
from pneumo.dataset.study_table import StudyRow, read_studies
from pneumo.errors import SourceError


@dataclass(frozen=True, eq=False)
class Selection:
    """What a store is to be made of."""

    source: Source
    """With only the studies that are to go into the store."""
    split: Split
    config: Config
    """With what the source or another store decided in place of a setting."""
    seen: Seen | None
    """Pictures that are left out where they turn up."""
    phantoms: bool
    """Whether the source's pictures are drawn."""


def select_studies(source_url: str, config: Config, tell: Callable[[str], None]) -> Selection:
    """Read a source's tables, and decide what goes where as `prepare` and `split` of `config` say.

    Raises SourceError, StoreError and ConfigError.
    """
    named = config.split.named
    source = read_source(
        source_url,
        settings=config.prepare,
        named_split=named if named in NAMED_SPLITS else None,
    )
    seen, config = _read_seen(source, config, tell)
    if seen is not None:
        source = seen.leave_out_patients(source)
    tell(f"source: {source.summary}")
    _check_missing(source, config)
    split, config = _split(source, source_url, config, tell)
    source, split = _limit(source, split, config)
    phantoms = storage.exists(storage.join(source_url, MARKER))
    return Selection(source, split, config, seen, phantoms)


def _read_seen(
    source: Source, config: Config, tell: Callable[[str], None]
) -> tuple[Seen | None, Config]:
    """What `prepare.without` names, and the configuration with what these stores hold in its place.

    Raises StoreError where one is none, or shares patients that cannot be found.
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
            layouts=(manifest.layout, source.layout),
        )
        if warning is not None:
            tell(f"warning: {warning}")
        rows += read_studies(url, manifest).values()
        digests.append(f"sha256:{manifest.digest}")
    return Seen.of(rows), override(config, {"prepare.without": digests}, "the stores' manifests")


def _check_missing(source: Source, config: Config) -> None:
    """Raise SourceError where the tables name more pictures that are not there than may be bad."""
    missing = sum(item.reason == "missing" for item in source.rejected)
    total = len(source.studies) + len(source.rejected)
    if missing > config.prepare.max_bad_fraction * total:
        raise SourceError(
            f"the source's tables name {total} pictures, of which {missing} are not there; finish "
            "the download, or say --prepare.max-bad-fraction to do without them"
        )


def _split(
    source: Source, source_url: str, config: Config, tell: Callable[[str], None]
) -> tuple[Split, Config]:
    """The split, and the configuration with what it was decided by filled in."""
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
        salt = recall_salt(source_url, config.split, seed=config.seed)
        config = override(config, {"split.salt": salt}, f"{source_url}/.pneumo")
    chosen = config.split.salt is None
    split = split_studies(
        source.studies,
        config.split,
        seed=config.seed,
        has_patients=source.has_patients,
        listed=listed,
    )
    salt = split.audit.salt
    if salt is None or not chosen:
        return split, config
    if not remember_salt(source_url, config.split, seed=config.seed, salt=salt):
        tell(
            f"prepare: cannot write beside the source; give --split.salt {salt} next time, so that "
            "studies that come later move no patient"
        )
    return split, override(config, {"split.salt": salt}, "the balanced split")


def _limit(source: Source, split: Split, config: Config) -> tuple[Source, Split]:
    """A random subset of the studies, in the splits that the whole source gives them."""
    limit = config.prepare.limit
    placed = [study for study in source.studies if study.key in split.by_key]
    if limit is None or limit >= len(placed):
        return source, split
    chosen = random.Random(f"limit/{config.seed}").sample(range(len(placed)), limit)
    subset = replace(source, studies=tuple(placed[i] for i in sorted(chosen)), rejected=())
    audit = audit_split(
        subset.studies,
        split.by_key,
        config.split,
        seed=config.seed,
        salt=split.audit.salt,
        has_patients=source.has_patients,
    )
    return subset, Split(split.by_key, audit)
