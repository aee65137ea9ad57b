"""External validation of a run: on other stores, with everything frozen, without known patients."""

import json
import re
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
from scipy.special import logit
from threadpoolctl import threadpool_limits

from jobs.evaluation.evaluated_run import (
    METRICS,
    PREDICTIONS,
    find_evaluated_checkpoints,
    find_metrics,
    read_predictions,
)
from jobs.evaluation.ray_resampling import choose_map
from jobs.evaluation.ray_scoring import ScoredStore, Scoring, score_splits
from jobs.evaluation.result_files import EXTERNAL_FOLDER, EXTERNAL_MATRIX, REPORT
from jobs.ray_cluster.session import ray_session, wait_for_resources
from jobs.terminal.entry_point import tell
from jobs.tracking.sending import send_now
from pneumo import storage
from pneumo.command_line import EvaluateArguments
from pneumo.config import Config
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.overlap import Overlap, check_secret, find_overlap, have_one_secret
from pneumo.dataset.shards import Sample, read_shard
from pneumo.dataset.splits import SPLITS
from pneumo.dataset.study_table import StudyRow, read_studies
from pneumo.errors import RunError, StoreError
from pneumo.evaluation.baselines import Metadata, fit_metadata
from pneumo.evaluation.estimates import Estimate, as_json
from pneumo.evaluation.external import ExternalEvaluation, FrozenChoices, evaluate_external
from pneumo.evaluation.file_predictions import FrozenRule
from pneumo.evaluation.operating_points import DECISION, OperatingPoint
from pneumo.evaluation.predictions import Predictions, check_complete, find_fault, join_predictions
from pneumo.evaluation.set_shift import SetShift, classify_sets, measure_shift
from pneumo.reporting.figures.external import draw_matrix
from pneumo.reporting.page.external_page import ExternalSet, insert_external, render_external

SCHEMA_VERSION = 1
_PICTURES = 400
"""Images of each set for the domain classifier."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """An evaluated run and the store of its training."""

    run_url: str
    store_url: str
    manifest: Manifest
    studies: Mapping[str, StudyRow]
    scoring: Scoring
    test: Predictions
    frozen: FrozenChoices


@dataclass(frozen=True, eq=False)
class ExternalStore:
    """A store to evaluate the run on, without the patients and images that the model knows."""

    name: str
    store_url: str
    manifest: Manifest
    studies: Mapping[str, StudyRow]
    overlap: Overlap
    warning: str | None
    """Why the overlap may be incomplete; None where it is complete."""


def evaluate_externally(arguments: EvaluateArguments, config: Config) -> None:
    """Evaluate the run of `--run` on each store of `--external`; writes `<run>/external/`,
    metrics.json last.

    Raises RunError where the run's evaluation, threshold or checkpoints are missing, StoreError for
    a store of another image size or with too few patients left.
    """
    trained = _read_trained(arguments)
    sets = [_read_external(url, trained, config) for url in arguments.external]
    if len({one.name for one in sets}) < len(sets):
        raise StoreError("--external: two stores have the same name, which names their results")
    run, own = storage.last_part(trained.run_url), {one.name: one.manifest.digest for one in sets}
    others, digests = read_others(arguments.compare_with, run, own)
    evaluated, tables = dict[str, ExternalSet](), dict[str, bytes]()
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        for one in sets:
            evaluated[one.name], tables[one.name] = _evaluate_set(one, trained, config)
    folder = storage.join(trained.run_url, EXTERNAL_FOLDER)
    storage.remove(storage.join(folder, METRICS))
    storage.remove_below(folder)
    for name, table in tables.items():
        storage.write_bytes(storage.join(folder, name, PREDICTIONS), table)
    _write_results(trained, evaluated, others, digests, config)
    send_now(trained.run_url, config.tracking, "external", tell)


# --- what is evaluated ----------------------------------------------------------------------------


def _read_trained(arguments: EvaluateArguments) -> TrainedRun:
    run_url, store_url = storage.normalise(arguments.run), storage.normalise(arguments.store)
    metrics = find_metrics(run_url)
    assert metrics is not None  # `check_places` has found it
    rule = FrozenRule.from_metrics(metrics)
    found = {name: _read_point(name, point) for name, point in metrics["operating_points"].items()}
    points = {name: point for name, point in found.items() if point.logit is not None}
    if DECISION not in points:
        raise RunError(f"{run_url}: its val gave no threshold: {rule.threshold_reason}")
    manifest = read_manifest(store_url)
    if metrics["dataset"]["digest"] != manifest.digest:
        raise StoreError(
            f"{store_url}: is not the store that {run_url} was trained on; give that one as "
            "--store, and this one as --external"
        )
    members = [storage.normalise(url) for url in arguments.members]
    checkpoints = find_evaluated_checkpoints([run_url, *members], rule)
    studies = read_studies(store_url, manifest)
    predictions = read_predictions(run_url, "--run")
    train = fit_metadata(Metadata.of_split(studies.values(), "train"))
    frozen = FrozenChoices(points, rule.calibration, train)
    return TrainedRun(
        run_url,
        store_url,
        manifest,
        studies,
        Scoring(checkpoints, views=rule.views),
        predictions.subset("test"),
        frozen,
    )


def _read_point(name: str, point: Mapping[str, Any]) -> OperatingPoint:
    """A point of metrics.json; older versions have the threshold on the probability alone."""
    found = point.get("threshold_logit")
    if found is None and point["threshold"] is not None:
        found = logit(point["threshold"])
    return OperatingPoint(name, str(point["rule"]), None if found is None else float(found))


def _read_external(store_url: str, trained: TrainedRun, config: Config) -> ExternalStore:
    store_url = storage.normalise(store_url)
    manifest = read_manifest(store_url)
    name = storage.last_part(store_url)
    if manifest.digest == trained.manifest.digest:
        raise StoreError(
            f"{store_url}: is the store of the training; its test is evaluated already"
        )
    if manifest.image_size != trained.manifest.image_size:
        raise StoreError(
            f"{store_url}: pictures of {manifest.image_size} px, the run's own are "
            f"{trained.manifest.image_size} px; prepare it with --prepare.image-size "
            f"{trained.manifest.image_size}"
        )
    warning = check_secret(
        store_url,
        "the run's store",
        is_one=have_one_secret(trained.store_url, store_url),
        layouts=(manifest.layouts, trained.manifest.layouts),
    )
    if warning is not None:
        tell(f"warning: {warning}")
    studies = read_studies(store_url, manifest)
    overlap = find_overlap(trained.studies, studies)
    _check_enough(store_url, studies, overlap, config.evaluate.min_patients)
    return ExternalStore(name, store_url, manifest, studies, overlap, warning)


def _check_enough(
    store_url: str, studies: Mapping[str, StudyRow], overlap: Overlap, min_patients: int
) -> None:
    left = [row for row in studies.values() if row.key not in overlap.keys]
    if not left:
        raise StoreError(
            f"{store_url}: the model was trained or chosen on all of its patients or images"
        )
    for target, word in ((1, "positive"), (0, "negative")):
        patients = len({row.patient for row in left if row.target == target})
        if patients < min_patients:
            raise StoreError(
                f"{store_url}: {patients} patients with a {word} study are left, after "
                f"{len(overlap.keys)} studies of patients and images that the model knows; "
                f"evaluate.min_patients requires {min_patients}"
            )


# --- evaluation -----------------------------------------------------------------------------------


def _evaluate_set(
    one: ExternalStore, trained: TrainedRun, config: Config
) -> tuple[ExternalSet, bytes]:
    """The results, and the set's predictions.parquet."""
    scores = score_splits(ScoredStore(trained.scoring, one.store_url), SPLITS, config)
    scored = join_predictions(
        scores,
        one.studies,
        checkpoint=trained.scoring.checkpoint_name,
        image_size=one.manifest.image_size,
    )
    check_complete(scored, {name: one.manifest.splits[name].samples for name in SPLITS})
    rows = scored.take(~np.isin(scored.key, sorted(one.overlap.keys)))
    for what, each in (("test of the run", trained.test), (one.name, rows)):
        if (fault := find_fault(each)) is not None:
            raise RunError(f"{what}: {fault}")
    tell(f"evaluate: {one.name}: intervals, data set shift")
    with threadpool_limits(1):
        evaluation = evaluate_external(
            trained.test,
            rows,
            trained.frozen,
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
            min_patients=config.evaluate.min_patients,
            has_patients=(trained.manifest.audit.has_patients, one.manifest.audit.has_patients),
            map_blocks=choose_map(config.cluster, len(rows)),
        )
        shift = _find_shift(one, rows, trained, config)
    table = rows.to_parquet(trained.scoring.to_json())
    layout, phantoms = one.manifest.layout, one.manifest.phantoms
    return ExternalSet(layout, phantoms, evaluation, shift, one.overlap, one.warning), table


def _find_shift(
    one: ExternalStore, rows: Predictions, trained: TrainedRun, config: Config
) -> SetShift:
    inside = _read_samples(trained.store_url, trained.manifest, ("test",), frozenset())
    outside = _read_samples(one.store_url, one.manifest, SPLITS, one.overlap.keys)
    patients = [trained.studies[sample.key].patient for sample in inside]
    patients += [one.studies[sample.key].patient for sample in outside]
    told_apart = classify_sets(
        [sample.pixels for sample in inside],
        [sample.pixels for sample in outside],
        patients,
        resamples=config.evaluate.bootstrap_resamples,
        seed=config.seed,
    )
    whole = np.sum([one.manifest.splits[name].histogram for name in SPLITS], axis=0)
    return measure_shift(
        (trained.manifest.splits["test"].histogram, whole.tolist()),
        (trained.test.spacing_mm, rows.spacing_mm),
        told_apart,
        (len(inside), len(outside)),
    )


def _read_samples(
    store_url: str, manifest: Manifest, splits: Sequence[str], without: frozenset[str]
) -> list[Sample]:
    """The first samples of the shards, which are shuffled."""
    samples = (
        sample
        for split in splits
        for shard in manifest.splits[split].shards
        for sample in read_shard(store_url, shard, manifest.image_size)
        if sample.key not in without
    )
    return list(islice(samples, _PICTURES))


# --- results --------------------------------------------------------------------------------------


def read_others(
    run_url: str | None, own_name: str, own_sets: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str | None]]:
    """The AUROCs of another run, and of those in its own matrix, on external sets, by the runs'
    names; a name that another run has, or `own_name`, gets a number. And the digests of all sets by
    their names, those of `own_sets` too: another set of such a name gets a number, and so does one
    without a digest."""
    if run_url is None:
        return {}, dict(own_sets)
    url = storage.join(storage.normalise(run_url), EXTERNAL_FOLDER, METRICS)
    try:
        found = json.loads(storage.read_text(url))
    except FileNotFoundError as error:
        raise RunError(f"--compare-with {run_url}: has no external validation") from error
    rows = {found["run"]: found["matrix"], **found["matrix_of_others"]}
    known = {digest: name for name, digest in own_sets.items()}
    digests: dict[str, str | None] = dict(own_sets)
    columns = {"own test": "own test"}
    for column in dict.fromkeys(name for row in rows.values() for name in row):
        if column not in columns:
            digest = found.get("digests", {}).get(column)  # older versions wrote none
            columns[column] = known.get(digest) or _find_free(column, digests)
            digests[columns[column]] = digest
    others: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        renamed = {columns[column]: value for column, value in row.items()}
        others[_find_free(name, {own_name, *others})] = renamed
    return others, digests


def _find_free(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name (2)`, `name (3)`, … that is not taken."""
    stem = re.sub(r" \(\d+\)$", "", name)
    names = chain([name], (f"{stem} ({number})" for number in count(2)))
    return next(one for one in names if one not in taken)


def _write_results(
    trained: TrainedRun,
    evaluated: Mapping[str, ExternalSet],
    others: dict[str, dict[str, Any]],
    digests: dict[str, str | None],
    config: Config,
) -> None:
    """Write everything to `<run>/external/`, and print the table."""
    run = storage.last_part(trained.run_url)
    folder = storage.join(trained.run_url, EXTERNAL_FOLDER)
    first: ExternalEvaluation = next(iter(evaluated.values())).evaluation
    row = {"own test": first.auroc.internal.to_json()}
    row |= {name: one.evaluation.auroc.external.to_json() for name, one in evaluated.items()}
    matrix = {run: row, **others}
    storage.write_bytes(storage.join(folder, EXTERNAL_MATRIX), draw_matrix(matrix))
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page, sections = render_external(
        run,
        evaluated,
        trained.frozen,
        matrix,
        created=created,
        split_warning=trained.manifest.audit.warning,
        phantoms=trained.manifest.phantoms,
    )
    storage.write_text(storage.join(folder, REPORT), page)
    report_url = storage.join(trained.run_url, REPORT)
    report = storage.find_text(report_url)
    if report is None:
        report_url = storage.join(folder, REPORT)
        tell(f"warning: {trained.run_url}: has no {REPORT}, which would show this too")
    else:
        storage.write_text(report_url, insert_external(report, sections))
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "store": trained.manifest.digest,
        "thresholds": {n: point.threshold for n, point in trained.frozen.points.items()},
        "calibration": as_json(trained.frozen.scaling, leave_out={"log_loss"}),
        "matrix": row,
        "matrix_of_others": others,
        "digests": digests,
        "sets": {name: one.to_json() for name, one in evaluated.items()},
        "tracking": config.tracking.model_dump(exclude_unset=True),
    }
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    storage.write_text(storage.join(folder, METRICS), text)
    for name, one in evaluated.items():
        _print_result(name, one)
    print(f"report {report_url}")


def _print_result(name: str, one: ExternalSet) -> None:
    found, left = one.evaluation, one.overlap
    patients = "unknown" if found.external.patients is None else found.external.patients
    print(
        f"{name}: {found.external.n} studies of {patients} patients, "
        f"{found.external.positives} positive; left out {left.of_patients} studies of "
        f"{left.patients} patients that the model knows, {left.of_pictures} pictures, "
        f"{left.of_their_patients} other studies of their patients"
    )
    rows = {"auroc": found.auroc, "sensitivity": found.sensitivity[DECISION]}
    rows |= {"specificity": found.specificity[DECISION], "brier": found.brier}
    rows |= {"metadata alone": found.metadata_auroc}
    for what, both in rows.items():
        own, here, gap = map(_format, (both.internal, both.external, both.difference))
        print(f"  {what:14}  own test {own}  here {here}  difference {gap}")


def _format(found: Estimate) -> str:
    if found.value is None:
        return "-"
    has_interval = found.low is not None and found.high is not None
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if has_interval else "")
