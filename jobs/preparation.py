"""A data set's folder -> store: Ray tasks decode its files, one shard a task; the manifest comes
last."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import ray

from jobs.ray_cluster.nodes import list_nodes
from jobs.ray_cluster.session import ray_session
from jobs.ray_cluster.spreading import spread
from jobs.terminal.entry_point import tell
from jobs.terminal.progress import Progress
from pneumo import storage
from pneumo.command_line import Invocation, PrepareArguments
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.named_splits import NAMED_SPLITS
from pneumo.dataset.overlap import KNOWN_PICTURES, Seen, check_secret, read_secret_check
from pneumo.dataset.phantoms import MARKER
from pneumo.dataset.preparation import (
    check_shards_are_there,
    clear_parts,
    find_store,
    finish_store,
    has_mended,
)
from pneumo.dataset.quality import group_warnings
from pneumo.dataset.receipts import PreparedShard, prepare_shard
from pneumo.dataset.shard_plans import ShardPlan, digest_settings, estimate_memory, plan_shards
from pneumo.dataset.shards import shard_samples
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
from pneumo.dataset.study_table import QUARANTINE, StudyRow, read_studies, read_warnings
from pneumo.errors import SourceError


def prepare(invocation: Invocation) -> None:
    """Write the store of `--source` to `--store`."""
    arguments = invocation.arguments
    assert isinstance(arguments, PrepareArguments)
    source_url, store_url = storage.normalise(arguments.source), storage.normalise(arguments.store)
    named = invocation.config.split.named
    source = read_source(
        source_url,
        settings=invocation.config.prepare,
        named_split=named if named in NAMED_SPLITS else None,
    )
    seen, config = _read_seen(source, invocation.config)
    if seen is not None:
        source = seen.leave_out_patients(source)
    tell(f"source: {source.summary}")
    _check_missing(source, config)
    split, config = _split(source, source_url, config)
    source, split = _limit(source, split, config)
    there = find_store(store_url, source, config)
    if there is not None:
        clear_parts(store_url, there)
        check_shards_are_there(store_url, there)
        tell(f"prepare: {store_url} holds a store of these tables and settings; nothing to do")
        if has_mended(store_url, there, source):
            tell(
                "warning: a study that was quarantined then can be used now; a finished store "
                "never changes: delete it first, or give another --store"
            )
        return
    if split.audit.warning:
        tell(f"warning: {split.audit.warning}")
    per_shard = shard_samples(config.prepare.image_size)
    plans = plan_shards(source.studies, split.by_key, seed=config.seed, samples_per_shard=per_shard)
    with ray_session(show_logs=arguments.debug):
        prepared = _run_plans(plans, store_url, config, source.file_key, seen)
        if reused := sum(shard.reused for shard in prepared):
            tell(f"prepare: {reused} of {len(plans)} shards were there already, and whole")
        phantoms = storage.exists(storage.join(source_url, MARKER))
        manifest = finish_store(store_url, source, prepared, split.audit, config, phantoms=phantoms)
    _report(store_url, manifest)


def _read_seen(source: Source, config: Config) -> tuple[Seen | None, Config]:
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


def _split(source: Source, source_url: str, config: Config) -> tuple[Split, Config]:
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


def _run_plans(
    plans: Sequence[ShardPlan], store_url: str, config: Config, file_key: bytes, seen: Seen | None
) -> list[PreparedShard]:
    """Run the tasks, only so many at once that arguments stay small."""
    memory = estimate_memory(plans, config.prepare.image_size)
    # No more than the largest node has, or no task would ever start; it then runs one at a time.
    memory = min(memory, max(int(node.total.get("memory", 0)) for node in list_nodes()))
    digest, size, known = digest_settings(config), config.prepare.image_size, ray.put(seen)
    calls = [(plan, store_url, size, digest, file_key, known) for plan in plans]
    options = {"num_cpus": 1, "memory": memory, "max_retries": 3}
    prepared: list[PreparedShard] = []
    with Progress("prepare", sum(len(plan.studies) for plan in plans), "studies") as progress:
        for ended in spread(prepare_shard, calls, _tasks_at_once, **options):
            prepared += ended
            bad = sum(len(shard.receipt.rejected) for shard in prepared)
            done = bad + sum(s.receipt.entry.samples + s.receipt.known for s in prepared)
            progress.advance_to(done, note=f"{bad} bad" if bad else "")
    return prepared


def _tasks_at_once() -> int:
    return max(2 * int(ray.cluster_resources().get("CPU", 1)), 2)


def _report(store_url: str, manifest: Manifest) -> None:
    audit = manifest.audit
    for name, entry in manifest.splits.items():
        prevalence = audit.prevalence[name]
        patients = "" if entry.patients is None else f"{entry.patients:6} patients  "
        print(
            f"{name:5}  {entry.samples:6} studies  {patients}"
            f"{entry.positives / entry.samples:6.1%} positive "
            f"[{prevalence.low:.1%}, {prevalence.high:.1%}]  "
            f"{len(entry.shards)} shards"
        )
    if audit.leaked_by_image is not None and audit.unit == "patient":
        print(
            f"no patient is in two splits; a split by image would have leaked "
            f"{audit.leaked_by_image:.0%} of val"
        )
    if audit.unlisted:
        print(f"{audit.unlisted} studies are not on the list and are in no split")
    if audit.named is not None:
        print(f"split {audit.named}")
    _report_findings(store_url, manifest)
    print(f"store {store_url}  manifest {manifest.digest[:12]}")


def _report_findings(store_url: str, manifest: Manifest) -> None:
    """What of the source is not used, or odd."""
    if manifest.quarantined:
        told = ", ".join(f"{reason} {number}" for reason, number in manifest.quarantined.items())
        print(
            f"{sum(manifest.quarantined.values())} studies quarantined ({told}), see {QUARANTINE}"
        )
    for code, by_split in group_warnings(read_warnings(store_url, manifest)).items():
        told = ", ".join(f"{split} {len(keys)}" for split, keys in by_split.items() if keys)
        print(f"{sum(map(len, by_split.values()))} studies used with a warning: {code} ({told})")
    if KNOWN_PICTURES in manifest.left_out:
        print(f"{manifest.left_out[KNOWN_PICTURES]} {KNOWN_PICTURES} left out")
    if manifest.unlabelled:
        print(f"{manifest.unlabelled} images are not in the label table and are left out")
    for kind, number in manifest.contradictions.items():
        print(f"{number} studies: {_CONTRADICTIONS[kind]}")
    same = manifest.duplicates
    if same.pictures:
        several = [f"{same.across_splits} of them in several splits"]
        if same.across_patients is not None:
            several.append(f"{same.across_patients} with several patients")
        print(f"{same.pictures} pictures occur in {same.studies} studies; {', '.join(several)}")


_CONTRADICTIONS = {
    "patient_id": "the header's PatientID is not the id that the tables give the image",
    "box_outside": "a box reaches beyond the image",
    "no_box": "positive, but no box says where",
}
