"""Prepare a store from a data set's folder: each Ray task writes a shard; the manifest is last."""

from collections.abc import Sequence

import ray

from jobs.ray_cluster.nodes import list_nodes
from jobs.ray_cluster.session import ray_session
from jobs.ray_cluster.spreading import spread
from jobs.terminal.entry_point import tell
from jobs.terminal.progress import Progress
from pneumo import storage
from pneumo.command_line import Invocation, PrepareArguments
from pneumo.config import Config
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.overlap import KNOWN_PICTURES, KnownStudies
from pneumo.dataset.preparation import (
    can_use_rejected,
    check_shards_are_there,
    check_store_folder,
    find_store,
    finish_store,
    remove_unfinished,
)
from pneumo.dataset.quality import group_warnings
from pneumo.dataset.selection import select_studies
from pneumo.dataset.shard_plans import ShardPlan, digest_settings, estimate_memory, plan_shards
from pneumo.dataset.shard_tasks import ShardRecord, prepare_shard
from pneumo.dataset.shards import shard_samples
from pneumo.dataset.study_table import QUARANTINE, read_warnings


def prepare(invocation: Invocation) -> None:
    """Prepare the store of `--source` in `--store`."""
    arguments = invocation.arguments
    assert isinstance(arguments, PrepareArguments)
    source_url, store_url = storage.normalise(arguments.source), storage.normalise(arguments.store)
    check_store_folder(store_url, source_url)
    chosen = select_studies(source_url, invocation.config, tell)
    source, split, config = chosen.source, chosen.split, chosen.config
    existing = find_store(store_url, source, config)
    if existing is not None:
        remove_unfinished(store_url, existing)
        check_shards_are_there(store_url, existing)
        tell(f"prepare: {store_url} holds a store of these tables and settings; nothing to do")
        if can_use_rejected(store_url, existing, source):
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
        prepared = _run_plans(plans, store_url, config, source.file_key, chosen.known_studies)
        if reused := sum(shard.reused for shard in prepared):
            tell(f"prepare: {reused} of {len(plans)} shards were complete already")
        manifest = finish_store(
            store_url, source, prepared, split.audit, config, phantoms=chosen.phantoms
        )
    _report(store_url, manifest)


def _run_plans(
    plans: Sequence[ShardPlan],
    store_url: str,
    config: Config,
    file_key: bytes,
    known_studies: KnownStudies | None,
) -> list[ShardRecord]:
    """Run a task per shard; a limited number at a time, as pending tasks keep their arguments."""
    memory = estimate_memory(plans, config.prepare.image_size)
    # At most what the largest node has, or no task would ever start; it runs one at a time then.
    memory = min(memory, max(int(node.total.get("memory", 0)) for node in list_nodes()))
    digest, size, known = digest_settings(config), config.prepare.image_size, ray.put(known_studies)
    calls = [(plan, store_url, size, digest, file_key, known) for plan in plans]
    options = {"num_cpus": 1, "memory": memory, "max_retries": 3}
    prepared: list[ShardRecord] = []
    with Progress("prepare", sum(len(plan.studies) for plan in plans), "studies") as progress:
        for ended in spread(prepare_shard, calls, _max_running_tasks, **options):
            prepared += ended
            bad = sum(len(shard.rejected) for shard in prepared)
            done = bad + sum(shard.entry.samples + shard.known for shard in prepared)
            progress.advance_to(done, note=f"{bad} bad" if bad else "")
    return prepared


def _max_running_tasks() -> int:
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
    """Print which studies are not used, or doubtful."""
    if manifest.quarantined:
        counts = ", ".join(f"{reason} {number}" for reason, number in manifest.quarantined.items())
        print(
            f"{sum(manifest.quarantined.values())} studies quarantined ({counts}), see {QUARANTINE}"
        )
    for code, by_split in group_warnings(read_warnings(store_url, manifest)).items():
        counts = ", ".join(f"{split} {len(keys)}" for split, keys in by_split.items() if keys)
        print(f"{sum(map(len, by_split.values()))} studies used with a warning: {code} ({counts})")
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
