"""A run evaluated on other sets than its own: all is frozen, and patients it knows are left out."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logit
from threadpoolctl import threadpool_limits

from jobs.evaluation.evaluated_run import METRICS, PREDICTIONS, find_evaluated, name_run
from jobs.evaluation.ray_scoring import Scored, Scoring, score_splits
from jobs.evaluation.result_files import REPORT
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
from pneumo.evaluation.bootstrap import Estimate, as_json
from pneumo.evaluation.external import ExternalEvaluation, Frozen, evaluate_external
from pneumo.evaluation.file_predictions import FrozenRule
from pneumo.evaluation.operating_points import DECISION, OperatingPoint
from pneumo.evaluation.predictions import Predictions, find_fault, join_predictions
from pneumo.evaluation.set_shift import SetShift, measure_shift, tell_apart
from pneumo.reporting.figures.external import draw_matrix
from pneumo.reporting.page.external_page import ExternalSet, insert_external, render_external

SCHEMA_VERSION = 1
FOLDER, MATRIX = "external", "matrix.png"
_PICTURES = 200
"""Of each set, that the classifier sees which tells the sets apart."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The run and the store of its training, as its own evaluation left them."""

    run_url: str
    store_url: str
    manifest: Manifest
    studies: Mapping[str, StudyRow]
    scoring: Scoring
    test: Predictions
    frozen: Frozen


@dataclass(frozen=True, eq=False)
class External:
    """A store that is to be evaluated, without what the model knows."""

    name: str
    store_url: str
    manifest: Manifest
    studies: Mapping[str, StudyRow]
    overlap: Overlap
    warning: str | None
    """What its reader must know of the overlap."""


def evaluate_externally(arguments: EvaluateArguments, config: Config) -> None:
    """Evaluate the run of `--run` on each store of `--external`; the results go to
    `<run>/external/`, metrics.json last.

    Raises RunError for a run without an evaluation, thresholds or its checkpoints; StoreError for
    an external store of another image size, or of which too few patients are left.
    """
    trained = _read_trained(arguments, config)
    sets = [_read_external(url, trained, config) for url in arguments.external]
    if len({one.name for one in sets}) < len(sets):
        raise StoreError("--external: two stores of one name; results are kept by it")
    others = _read_others(arguments.compare_with)
    evaluated: dict[str, ExternalSet] = {}
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        for one in sets:
            evaluated[one.name] = _evaluate_set(one, trained, config)
    _write_results(trained, evaluated, others)
    send_now(trained.run_url, config.tracking, "external", tell)


# --- what is evaluated ----------------------------------------------------------------------------


def _read_trained(arguments: EvaluateArguments, config: Config) -> Trained:
    run_url, store_url = storage.normalise(arguments.run), storage.normalise(arguments.store)
    metrics = json.loads(storage.read_text(storage.join(run_url, METRICS)))
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
    weights = find_evaluated([run_url, *members], rule)
    studies = read_studies(store_url, manifest)
    predictions = Predictions.from_parquet(storage.read_bytes(storage.join(run_url, PREDICTIONS)))
    train = fit_metadata(Metadata.of_split(studies.values(), "train"))
    frozen = Frozen(points, rule.calibration, train)
    return Trained(
        run_url,
        store_url,
        manifest,
        studies,
        Scoring(weights, views=rule.views),
        predictions.subset("test"),
        frozen,
    )


def _read_point(name: str, point: Mapping[str, Any]) -> OperatingPoint:
    """One of metrics.json; runs that were evaluated before have it on the probability alone."""
    found = point.get("threshold_logit")
    if found is None and point["threshold"] is not None:
        found = logit(point["threshold"])
    return OperatingPoint(name, str(point["rule"]), None if found is None else float(found))


def _read_external(store_url: str, trained: Trained, config: Config) -> External:
    store_url = storage.normalise(store_url)
    manifest = read_manifest(store_url)
    name = name_run(store_url)
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
    warning = _check_secret(store_url, manifest, trained)
    studies = read_studies(store_url, manifest)
    overlap = find_overlap(trained.studies, studies)
    _check_enough(store_url, studies, overlap, config.evaluate.min_patients)
    return External(name, store_url, manifest, studies, overlap, warning)


def _check_secret(store_url: str, manifest: Manifest, trained: Trained) -> str | None:
    """What to warn of where shared patients cannot be found."""
    warning = check_secret(
        store_url,
        "the run's store",
        is_one=have_one_secret(trained.store_url, store_url),
        layouts=(manifest.layout, trained.manifest.layout),
    )
    if warning is not None:
        tell(f"warning: {warning}")
    return warning


def _check_enough(
    store_url: str, studies: Mapping[str, StudyRow], overlap: Overlap, fewest: int
) -> None:
    left = [row for row in studies.values() if row.key not in overlap.keys]
    if not left:
        raise StoreError(
            f"{store_url}: the model was trained or chosen on all of its patients or pictures"
        )
    for target, word in ((1, "positive"), (0, "negative")):
        patients = len({row.patient for row in left if row.target == target})
        if patients < fewest:
            raise StoreError(
                f"{store_url}: {patients} patients with a {word} study are left, after "
                f"{len(overlap.keys)} studies of patients and pictures that the model knows; "
                f"a verdict needs evaluate.min_patients, {fewest}"
            )


# --- evaluation -----------------------------------------------------------------------------------


def _evaluate_set(one: External, trained: Trained, config: Config) -> ExternalSet:
    scores = score_splits(Scored(trained.scoring, one.store_url), SPLITS, config)
    scored = join_predictions(
        scores,
        one.studies,
        checkpoint=trained.scoring.checkpoint,
        image_size=one.manifest.image_size,
    )
    rows = scored.take(~np.isin(scored.key, sorted(one.overlap.keys)))
    for what, each in (("test of the run", trained.test), (one.name, rows)):
        if (fault := find_fault(each)) is not None:
            raise RunError(f"{what}: {fault}")
    tell(f"evaluate: {one.name}: intervals, shift of the pictures")
    with threadpool_limits(1):
        evaluation = evaluate_external(
            trained.test,
            rows,
            trained.frozen,
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
        )
        shift = _find_shift(one, rows, trained, config)
    table = rows.to_parquet(trained.scoring.to_json())
    where = storage.join(trained.run_url, FOLDER, one.name, PREDICTIONS)
    storage.write_bytes(where, table)
    return ExternalSet(one.manifest.layout, evaluation, shift, one.overlap, one.warning)


def _find_shift(one: External, rows: Predictions, trained: Trained, config: Config) -> SetShift:
    inside = _take(trained.store_url, trained.manifest, ("test",), frozenset())
    outside = _take(one.store_url, one.manifest, SPLITS, one.overlap.keys)
    patients = [trained.studies[sample.key].patient for sample in inside]
    patients += [one.studies[sample.key].patient for sample in outside]
    told_apart = tell_apart(
        _pictures(inside),
        _pictures(outside),
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


def _take(
    store_url: str, manifest: Manifest, splits: Sequence[str], without: frozenset[str]
) -> list[Sample]:
    """The first pictures of the shards, which are shuffled."""
    samples = (
        sample
        for split in splits
        for shard in manifest.splits[split].shards
        for sample in read_shard(store_url, shard, manifest.image_size)
        if sample.key not in without
    )
    return list(islice(samples, _PICTURES))


def _pictures(samples: Sequence[Sample]) -> list[npt.NDArray[np.uint8]]:
    return [sample.pixels for sample in samples]


# --- results --------------------------------------------------------------------------------------


def _read_others(run_url: str | None) -> dict[str, dict[str, Any]]:
    """The AUROCs of another run that was evaluated on external sets, for the matrix."""
    if run_url is None:
        return {}
    url = storage.join(storage.normalise(run_url), FOLDER, METRICS)
    try:
        found = json.loads(storage.read_text(url))
    except FileNotFoundError as error:
        raise RunError(f"--compare-with {run_url}: was evaluated on no external set") from error
    return {str(found["run"]): dict(found["matrix"])}


def _write_results(
    trained: Trained, evaluated: Mapping[str, ExternalSet], others: dict[str, dict[str, Any]]
) -> None:
    """Everything to `<run>/external/`, and the table to stdout."""
    run, folder = name_run(trained.run_url), storage.join(trained.run_url, FOLDER)
    first: ExternalEvaluation = next(iter(evaluated.values())).evaluation
    row = {"own test": first.auroc.internal.to_json()}
    row |= {name: one.evaluation.auroc.external.to_json() for name, one in evaluated.items()}
    matrix = {run: row, **others}
    storage.write_bytes(storage.join(folder, MATRIX), draw_matrix(matrix))
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page, sections = render_external(run, evaluated, trained.frozen, matrix, created=created)
    storage.write_text(storage.join(folder, REPORT), page)
    report_url = storage.join(trained.run_url, REPORT)
    report = storage.read_text(report_url)
    storage.write_text(report_url, insert_external(report, sections))
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "store": trained.manifest.digest,
        "thresholds": {n: point.threshold for n, point in trained.frozen.points.items()},
        "calibration": as_json(trained.frozen.scaling, leave_out={"log_loss"}),
        "matrix": row,
        "matrix_of_others": others,
        "sets": {name: one.to_json() for name, one in evaluated.items()},
    }
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    storage.write_text(storage.join(folder, METRICS), text)
    for name, one in evaluated.items():
        _print(name, one)
    print(f"report {report_url}")


def _print(name: str, one: ExternalSet) -> None:
    found = one.evaluation
    print(
        f"{name}: {found.external.n} studies of {found.external.patients} patients, "
        f"{found.external.positives} positive; left out {one.overlap.of_patients} studies of "
        f"{one.overlap.patients} patients that the model knows, {one.overlap.of_pictures} pictures"
    )
    rows = {"auroc": found.auroc, "sensitivity": found.sensitivity[DECISION]}
    rows |= {"specificity": found.specificity[DECISION], "brier": found.brier}
    rows |= {"metadata alone": found.metadata_auroc}
    for what, both in rows.items():
        own, here, gap = map(_show, (both.internal, both.external, both.difference))
        print(f"  {what:14}  own test {own}  here {here}  difference {gap}")


def _show(found: Estimate) -> str:
    if found.value is None:
        return "-"
    has_interval = found.low is not None and found.high is not None
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if has_interval else "")
