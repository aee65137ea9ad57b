"""Kaggle folder -> store: Ray tasks decode DICOM files, one shard a task; the manifest comes
last."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import ray

from jobs.command import run_job, say
from jobs.progress import Progress
from jobs.session import ray_session
from pneumo import storage
from pneumo.config import Config, Invocation, PrepareArguments
from pneumo.dicom import read_study_image
from pneumo.errors import BadFilesError, DicomError, SourceError, StoreError
from pneumo.shards import (
    QUARANTINE,
    Manifest,
    Sample,
    ShardEntry,
    SplitEntry,
    StudyRow,
    find_manifest,
    write_manifest,
    write_shard,
    write_studies,
)
from pneumo.splits import SPLITS, Split, split_studies
from pneumo.studies import Source, Study, read_source


@dataclass(frozen=True)
class ShardPlan:
    """One task's work."""

    split: str
    name: str
    studies: tuple[Study, ...]


@dataclass(frozen=True)
class Rejected:
    """One line of quarantine.jsonl. Nothing from the file's header stands in it."""

    key: str
    split: str
    reason: str
    message: str


@dataclass(frozen=True)
class ShardResult:
    """What a task gives back."""

    plan: ShardPlan
    entry: ShardEntry | None
    """None when no study of it could be used."""
    rows: tuple[StudyRow, ...]
    rejected: tuple[Rejected, ...]
    gray_sum: float
    """Sum of the pixels' gray levels in [0, 1]."""
    gray_square_sum: float
    pixels: int


def prepare(invocation: Invocation) -> None:
    """Write the store of `--source` to `--store`."""
    arguments = invocation.arguments
    assert isinstance(arguments, PrepareArguments)
    config = invocation.config
    source_url, store_url = storage.normalise(arguments.source), storage.normalise(arguments.store)
    source = _limit(read_source(source_url), config)
    split = split_studies(
        source.studies, config.split, seed=config.seed, has_patients=source.has_patients
    )
    if _is_prepared(store_url, source, config):
        say(f"prepare: {store_url} holds exactly this already; nothing to do")
        return
    _warn_of_image_split(split)
    with ray_session(show_logs=arguments.debug):
        results = list(_run_plans(plan_shards(source.studies, split, config), store_url, config))
    _finish(store_url, source, split, config, results)


def plan_shards(studies: Sequence[Study], split: Split, config: Config) -> list[ShardPlan]:
    """Which studies go to which shard: shuffled by the seed, so that no shard is skewed by a
    name."""
    plans = []
    for name in SPLITS:
        members = [study for study in studies if split.by_key[study.key] == name]
        random.Random(f"shards/{config.seed}/{name}").shuffle(members)
        # Equal shards, none above the wanted size, and enough of them to share out a small source;
        # never a question of how many workers there are, or the store would depend on it.
        count = max(
            -(-len(members) // config.prepare.samples_per_shard), min(8, len(members) // 16), 1
        )
        bounds = [len(members) * i // count for i in range(count + 1)]
        plans += [
            ShardPlan(name, f"{name}/{i:06d}.tar", tuple(members[bounds[i] : bounds[i + 1]]))
            for i in range(count)
        ]
    return plans


def prepare_shard(plan: ShardPlan, store_url: str, image_size: int) -> ShardResult:
    """Decode a plan's studies and publish their shard; studies that cannot be used are listed."""
    cv2.setNumThreads(1)
    samples, rows, rejected = [], [], []
    for study in plan.studies:
        try:
            image = read_study_image(storage.read_bytes(study.url), image_size)
        except FileNotFoundError:
            rejected.append(Rejected(study.key, plan.split, "missing", "no DICOM file"))
            continue
        except (OSError, DicomError) as error:
            reason = error.reason if isinstance(error, DicomError) else "unreadable"
            message = str(error) if isinstance(error, DicomError) else type(error).__name__
            rejected.append(Rejected(study.key, plan.split, reason, message))
            continue
        samples.append(Sample(study.key, image.pixels, study.target))
        rows.append(
            StudyRow(
                key=study.key,
                patient=study.patient,
                split=plan.split,
                target=study.target,
                finding=study.finding,
                boxes=tuple(image.place(box) for box in study.boxes),
                **asdict(image.header),
            )
        )
    gray = np.array(
        [[s.pixels.sum(), np.square(s.pixels, dtype=np.float64).sum()] for s in samples]
    )
    return ShardResult(
        plan=plan,
        entry=write_shard(store_url, plan.name, samples) if samples else None,
        rows=tuple(rows),
        rejected=tuple(rejected),
        gray_sum=float(gray[:, 0].sum() / 255) if samples else 0.0,
        gray_square_sum=float(gray[:, 1].sum() / 255**2) if samples else 0.0,
        pixels=len(samples) * image_size**2,
    )


def _limit(source: Source, config: Config) -> Source:
    limit = config.prepare.limit
    if limit is None or limit >= len(source.studies):
        return source
    chosen = random.Random(f"limit/{config.seed}").sample(range(len(source.studies)), limit)
    return Source(tuple(source.studies[i] for i in sorted(chosen)), source.has_patients)


def _is_prepared(store_url: str, source: Source, config: Config) -> bool:
    manifest = find_manifest(store_url)
    if manifest is None:
        return False
    same = manifest.source_digest == source.digest and manifest.prepare_digest == _digest(config)
    if not same:
        raise StoreError(
            f"{store_url}: holds a store of another source or of other settings; give another "
            "--store, or delete it first"
        )
    return True


def _digest(config: Config) -> str:
    return config.digest("seed", "prepare", "split")


def _warn_of_image_split(split: Split) -> None:
    if split.audit.unit == "image":
        leaked = split.audit.leaked_by_image
        share = "an unknown share" if leaked is None else f"{leaked:.0%}"
        say(
            f"warning: split by image: {share} of the val studies have their patient in train; "
            "every metric will be too good"
        )


def _run_plans(plans: Sequence[ShardPlan], store_url: str, config: Config) -> Iterator[ShardResult]:
    """Run the tasks, only so many at once that results and arguments stay small."""
    task = ray.remote(num_cpus=1, max_retries=3)(prepare_shard)
    in_flight = max(2 * int(ray.cluster_resources().get("CPU", 1)), 2)
    total = sum(len(plan.studies) for plan in plans)
    todo, done = list(reversed(plans)), 0
    running: list[Any] = []
    with Progress("prepare", total, "studies") as progress:
        while todo or running:
            while todo and len(running) < in_flight:
                running.append(task.remote(todo.pop(), store_url, config.prepare.image_size))
            ready, running = ray.wait(running, timeout=1.0)
            for reference in ready:
                result: ShardResult = ray.get(reference)
                done += len(result.plan.studies)
                yield result
            progress.advance_to(done)


def _finish(
    store_url: str, source: Source, split: Split, config: Config, results: Sequence[ShardResult]
) -> None:
    """Check the policy on bad files, then write the tables, then the manifest."""
    rejected = [item for result in results for item in result.rejected]
    lines = (json.dumps(asdict(item)) for item in sorted(rejected, key=lambda item: item.key))
    storage.write_text(storage.join(store_url, QUARANTINE), "".join(f"{line}\n" for line in lines))
    _check_policy(rejected, len(source.studies), config, store_url)
    rows = sorted((row for result in results for row in result.rows), key=lambda row: row.key)
    write_studies(store_url, rows)
    splits = {name: _split_entry(name, results) for name in SPLITS}
    for name, entry in splits.items():
        if not 0 < entry.positives < entry.samples:
            raise SourceError(f"split {name}: only one class is left after quarantine")
    train = [result for result in results if result.plan.split == "train"]
    pixels = sum(result.pixels for result in train)
    mean = sum(result.gray_sum for result in train) / pixels
    variance = sum(result.gray_square_sum for result in train) / pixels - mean**2
    manifest = Manifest(
        source_digest=source.digest,
        prepare_digest=_digest(config),
        image_size=config.prepare.image_size,
        seed=config.seed,
        split=config.split.model_copy(update={"salt": split.audit.salt}),
        audit=split.audit,
        mean=round(mean, 6),
        std=round(max(variance, 0.0) ** 0.5, 6),
        quarantined=len(rejected),
        splits=splits,
    )
    write_manifest(store_url, manifest)
    _report(store_url, manifest)


def _check_policy(rejected: Sequence[Rejected], total: int, config: Config, store_url: str) -> None:
    if len(rejected) > config.prepare.max_bad_fraction * total:
        reasons: dict[str, int] = {}
        for item in rejected:
            reasons[item.reason] = reasons.get(item.reason, 0) + 1
        told = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
        raise BadFilesError(
            f"prepare: {len(rejected)} of {total} studies cannot be used ({told}), more than "
            f"prepare.max_bad_fraction {config.prepare.max_bad_fraction:g}; see "
            f"{storage.join(store_url, QUARANTINE)}"
        )


def _split_entry(name: str, results: Sequence[ShardResult]) -> SplitEntry:
    mine = [result for result in results if result.plan.split == name]
    entries = sorted((r.entry for r in mine if r.entry is not None), key=lambda entry: entry.name)
    return SplitEntry(
        samples=sum(entry.samples for entry in entries),
        positives=sum(entry.positives for entry in entries),
        patients=len({row.patient for result in mine for row in result.rows}),
        shards=tuple(entries),
    )


def _report(store_url: str, manifest: Manifest) -> None:
    audit = manifest.audit
    for name, entry in manifest.splits.items():
        share = entry.positives / entry.samples
        print(
            f"{name:5}  {entry.samples:6} studies  {entry.patients:6} patients  "
            f"{share:6.1%} positive  {len(entry.shards)} shards"
        )
    if audit.leaked_by_image is not None and audit.unit == "patient":
        print(
            f"no patient is in two splits; a split by image would have leaked "
            f"{audit.leaked_by_image:.0%} of val"
        )
    if manifest.quarantined:
        print(f"{manifest.quarantined} studies quarantined, see {QUARANTINE}")
    print(f"store {store_url}  manifest {manifest.digest[:12]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("prepare", prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
