"""Score val and test once per study, judge, draw, report: all that a run says of its model."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from threadpoolctl import threadpool_limits

from jobs.command import run_job, say
from jobs.lineage import describe_dataset, describe_weights
from jobs.pictures import choose_pictures, score_saliency
from jobs.scoring import Scored, Scoring, Weights, score_splits
from jobs.sending import (
    describe_faults,
    log_data,
    log_evaluation,
    log_pictures,
)
from jobs.session import ray_session, wait_for_resources
from jobs.train import close_tracker, tracking_folder
from pneumo import figures, storage
from pneumo.baselines import Metadata
from pneumo.checkpoint import Checkpoint, load_checkpoint, read_index
from pneumo.comparison import ComparedRuns, Comparison, compare
from pneumo.config import Config, EvaluateArguments, EvaluateConfig, Invocation
from pneumo.errors import RunError, StoreError
from pneumo.evaluate import DECISION, Evaluation, check_complete, evaluate
from pneumo.figures import Pictures
from pneumo.predict import Predictions, join_predictions
from pneumo.quality import read_contact_sheets, summarise_quality
from pneumo.report import DataFacts, ModelFacts, Provenance, render_report
from pneumo.saliency import SaliencySummary
from pneumo.shards import Manifest, StudyRow, read_manifest, read_studies
from pneumo.tracking import Artifact, Page, open_tracker

METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"
REPORT = "report.html"
DATA_FIGURE = "data_quality.png"
JUDGED_SPLITS = ("val", "test")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated: a run's checkpoints, and those of other runs, on a store."""

    run_url: str
    store_url: str
    manifest: Manifest
    checkpoint: Checkpoint
    """The first of those that are scored: its maps are shown."""
    scored: Scored


def evaluate_run(invocation: Invocation) -> None:
    """Evaluate the run of `--run` on `--store`, leaving the results in it, metrics.json last."""
    arguments, config = invocation.arguments, invocation.config
    assert isinstance(arguments, EvaluateArguments)
    subject = find_subject(arguments, config.evaluate)
    studies = read_studies(subject.store_url, subject.manifest)
    data = describe_data(subject.store_url, subject.manifest, studies)
    other = None if arguments.compare_with is None else read_other(arguments.compare_with, studies)
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        logits = score_splits(subject.scored, JUDGED_SPLITS, config)
        predictions = join_predictions(
            logits,
            studies,
            checkpoint=subject.scored.scoring.checkpoint,
            image_size=subject.manifest.image_size,
        )
        expected = {name: subject.manifest.splits[name].samples for name in JUDGED_SPLITS}
        check_complete(predictions, expected)
        say("evaluate: intervals, figures, Grad-CAM")
        with threadpool_limits(1):  # the bootstrap's small products are slower on many threads
            evaluation = evaluate(
                predictions,
                config=config.evaluate,
                seed=config.seed,
                train=Metadata.of_split(studies.values(), "train"),
            )
        predictions = evaluation.predictions
        threshold = evaluation.points[DECISION].threshold
        pictures = choose_pictures(subject.scored, predictions, studies, threshold, config)
        looks = find_looks(subject, predictions, studies, threshold, config)
    metrics = evaluation.to_metrics(
        run=subject.run_url.rsplit("/", 1)[-1],
        dataset={
            "digest": subject.manifest.digest,
            "unit": subject.manifest.audit.unit,
            "image_size": subject.manifest.image_size,
            **describe_faults(data),
        },
        model={
            "backbone": subject.checkpoint.config.model.backbone,
            "initialisation": subject.checkpoint.initialisation,
            "epoch": subject.checkpoint.epoch,
            "image_size": subject.checkpoint.image_size,
            "scoring": subject.scored.scoring.to_json(),
        },
    )
    for split, found in describe_looks(looks).items():
        metrics[split] |= found
    metrics["test"]["errors_by_finding"] = {
        found.finding: found.to_json() for found in pictures.by_finding
    }
    compared = None
    if other is not None and arguments.compare_with is not None:
        second = storage.normalise(arguments.compare_with).rsplit("/", 1)[-1]
        compared = ComparedRuns(metrics["run"], second, compare_splits(predictions, other, config))
        metrics["comparison"] = compared.to_json()
    judged = Judged(data, evaluation, pictures, looks, compared)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        report = write_files(files, subject, judged, config)
        _clear(subject.run_url)
        storage.upload_folder(files, subject.run_url)
        metrics_text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
        (files / METRICS).write_text(metrics_text)
        track(subject, judged, report, files, config)
    storage.write_text(storage.join(subject.run_url, METRICS), metrics_text)
    print_summary(metrics, subject.run_url)


def _clear(run_url: str) -> None:
    """Remove an earlier evaluation, its marker first, so that it never vouches for a mixture."""
    storage.remove(storage.join(run_url, METRICS))
    for folder in ("gallery", "figures"):
        for url in storage.list_urls(storage.join(run_url, folder)):
            storage.remove(url)


def find_subject(arguments: EvaluateArguments, config: EvaluateConfig) -> Subject:
    """The checkpoints that are to be scored, checked against the store.

    Raises RunError when a run is not trained or evaluated already, StoreError when the store is not
    the one that it was trained on.
    """
    store_url, run_url = storage.normalise(arguments.store), storage.normalise(arguments.run)
    manifest = read_manifest(store_url)
    run_urls = [run_url, *(storage.normalise(url) for url in arguments.members)]
    if len(set(run_urls)) < len(run_urls):
        raise RunError("--members: a run is named twice; each counts once")
    weights = tuple(found for url in run_urls for found in find_weights(url, config.ensemble))
    if not arguments.overwrite and storage.exists(storage.join(run_url, METRICS)):
        raise RunError(
            f"{run_url}: is evaluated already (a test set is looked at once); --overwrite does it "
            "again"
        )
    first = _load_trained_on(weights[0], store_url, manifest)
    for other in weights[1:]:
        _load_trained_on(other, store_url, manifest)
    scored = Scored(Scoring(weights, views=config.tta or 1), store_url)
    return Subject(run_url, store_url, manifest, first, scored)


def find_weights(run_url: str, ensemble: int | str) -> tuple[Weights, ...]:
    """The run's best checkpoint, or its last so many, newest first.

    Raises RunError where there are fewer.
    """
    index = read_index(run_url)
    if not index.finished:
        say(f"warning: {run_url} is not trained to its end; evaluating what there is so far")
    if isinstance(ensemble, str):
        return (Weights(run_url, index.best),)
    if len(index.entries) < ensemble:
        raise RunError(
            f"{run_url}: has {len(index.entries)} checkpoints, not the {ensemble} of "
            "evaluate.ensemble; lower it, or train with a higher train.keep_checkpoints"
        )
    return tuple(Weights(run_url, entry) for entry in reversed(index.entries[-ensemble:]))


def _load_trained_on(weights: Weights, store_url: str, manifest: Manifest) -> Checkpoint:
    checkpoint = load_checkpoint(weights.run_url, weights.entry)
    if checkpoint.manifest_digest != manifest.digest:
        raise StoreError(
            f"{store_url}: is not the store that {weights.run_url} was trained on (manifest "
            f"{manifest.digest[:12]}, not {checkpoint.manifest_digest[:12]}); its test studies may "
            "be in that training set"
        )
    return checkpoint


def read_other(run_url: str, studies: Mapping[str, StudyRow]) -> Predictions:
    """What another run said. Raises RunError where it is not evaluated, or on other studies."""
    url = storage.join(storage.normalise(run_url), PREDICTIONS)
    try:
        other = Predictions.from_parquet(storage.read_bytes(url))
    except FileNotFoundError as error:
        raise RunError(f"--compare-with {run_url}: is not evaluated; evaluate it first") from error
    except KeyError as error:
        raise RunError(
            f"--compare-with {run_url}: its {PREDICTIONS} has no column {error}: an older version "
            "wrote it; evaluate it again with --overwrite"
        ) from error
    judged = {key for key, row in studies.items() if row.split in JUDGED_SPLITS}
    if set(other.key.tolist()) != judged:
        raise RunError(
            f"--compare-with {run_url}: was evaluated on another store, or another split of it; "
            "evaluate both runs on one store"
        )
    return other


def compare_splits(
    first: Predictions, second: Predictions, config: Config
) -> dict[str, Comparison]:
    """Both models on val and on test.

    Raises DataError when they are not of the same studies.
    """
    resamples = config.evaluate.bootstrap_resamples
    return {
        split: compare(
            first.subset(split), second.subset(split), resamples=resamples, seed=config.seed
        )
        for split in JUDGED_SPLITS
    }


def find_looks(
    subject: Subject,
    predictions: Predictions,
    studies: Mapping[str, StudyRow],
    threshold: float | None,
    config: Config,
) -> Mapping[str, SaliencySummary]:
    """By split, where the network looks; empty with evaluate.saliency off."""
    if not config.evaluate.saliency:
        return {}
    return score_saliency(
        subject.scored,
        predictions,
        studies,
        threshold,
        config,
        stored_size=subject.manifest.image_size,
        image_size=subject.checkpoint.image_size,
    )


def describe_looks(looks: Mapping[str, SaliencySummary]) -> dict[str, dict[str, Any]]:
    """By split, what metrics.json says of where the network looks."""
    if looks:
        return {split: {"saliency": found.to_json()} for split, found in looks.items()}
    reason = "evaluate.saliency is off"
    return {split: {"saliency": None, "saliency_reason": reason} for split in JUDGED_SPLITS}


@dataclass(frozen=True, eq=False)
class Judged:
    """All that is known when the results are written."""

    data: DataFacts
    evaluation: Evaluation
    pictures: Pictures
    looks: Mapping[str, SaliencySummary]
    compared: ComparedRuns | None


def write_files(folder: Path, subject: Subject, judged: Judged, config: Config) -> str:
    """Predictions, figures, gallery and report below `folder`; the report's HTML."""
    evaluation, pictures = judged.evaluation, judged.pictures
    table = evaluation.predictions.to_parquet(subject.scored.scoring.to_json())
    (folder / PREDICTIONS).write_bytes(table)
    history = subject.checkpoint.history
    n = evaluation.test.n
    first_of_each = [cases[0] for cases in pictures.gallery.values() if cases]
    drawn = {
        "metrics.png": figures.draw_metrics(evaluation, history),
        "roc.svg": figures.draw_roc(evaluation),
        "precision_recall.svg": figures.draw_precision_recall(evaluation),
        "reliability.svg": figures.draw_reliability(evaluation),
        "decision_curve.svg": figures.draw_decision_curve(evaluation),
        "confusion.svg": figures.draw_confusion(evaluation),
        "prediction_grid.png": figures.draw_prediction_grid(
            pictures.grid, title=f"Predictions: {len(pictures.grid)} of {n} test studies"
        ),
        "gradcam_example.png": figures.draw_gradcam_example(
            first_of_each, title="Grad-CAM, one test study of each outcome"
        ),
        DATA_FIGURE: figures.draw_quality(judged.data.quality),
    }
    (folder / "figures").mkdir()
    for name, picture in drawn.items():
        (folder / "figures" / name).write_bytes(picture)
    (folder / "gallery").mkdir()
    for outcome, cases in pictures.gallery.items():
        for number, shown in enumerate(cases):
            path = folder / "gallery" / f"{outcome}-{number:02d}.webp"
            path.write_bytes(figures.draw_case(shown))
    report = render_report(
        evaluation,
        data=judged.data,
        model=describe_model(subject.checkpoint, subject.scored.scoring),
        provenance=describe_provenance(subject, config),
        history=history,
        pictures=pictures,
        looks=judged.looks.get("test"),
        compared=judged.compared,
    )
    (folder / REPORT).write_text(report)
    return report


def describe_data(store_url: str, manifest: Manifest, studies: Mapping[str, StudyRow]) -> DataFacts:
    """What the report says of the store, some pictures of train included.

    Raises DataError when `studies`, by key, or a shard of train is not what the manifest vouches
    for.
    """
    return DataFacts(
        digest=manifest.digest,
        image_size=manifest.image_size,
        seed=manifest.seed,
        audit=manifest.audit,
        quality=summarise_quality(studies.values(), manifest),
        contact=read_contact_sheets(store_url, manifest, studies),
    )


def describe_model(checkpoint: Checkpoint, scoring: Scoring) -> ModelFacts:
    """What the report says of the model."""
    wanted, source = checkpoint.config.model.weights, checkpoint.initialisation
    sentence = {
        "imagenet": "ImageNet weights of torchvision",
        "random": f"random weights, seed {checkpoint.config.seed}",
        "file": f"weights of {wanted.rsplit('/', 1)[-1]}",
    }[source]
    return ModelFacts(
        backbone=checkpoint.config.model.backbone,
        initialisation=sentence,
        is_pretrained=source != "random",
        fell_back=source == "random" and wanted != "random",
        epoch=checkpoint.epoch,
        image_size=checkpoint.image_size,
        selection=describe_selection(scoring),
    )


def describe_selection(scoring: Scoring) -> str:
    """Which checkpoints were taken, and how a study's score is made of them."""
    count = len(scoring.weights)
    words = "The checkpoint of the highest AUROC on val."
    if count > 1:
        words = f"The mean logit of {count} checkpoints: {scoring.checkpoint}."
    if scoring.views > 1:
        words += f" Each image is scored in {scoring.views} views, whose logits are averaged."
    return words


def describe_provenance(subject: Subject, config: Config) -> Provenance:
    """What it takes to do it again."""
    trained = subject.checkpoint.config.model_copy(update={"evaluate": config.evaluate})
    return Provenance(
        run=subject.run_url.rsplit("/", 1)[-1],
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        seed=trained.seed,
        config_json=trained.to_json(),
        command="python -m jobs.train --store STORE --run RUN --recipe RECIPE; "
        "python -m jobs.evaluate --store STORE --run RUN",
        facts={
            "code": subject.checkpoint.code_version,
            "manifest": subject.manifest.digest,
            "checkpoint": " ".join(_digests(subject)),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    )


def _digests(subject: Subject) -> list[str]:
    return [weights.entry.sha256 for weights in subject.scored.scoring.weights]


def track(subject: Subject, judged: Judged, report: str, folder: Path, config: Config) -> None:
    """Push everything to W&B, whose faults never fail the evaluation."""
    name = subject.run_url.rsplit("/", 1)[-1]
    tracker = open_tracker(
        config.tracking,
        run_dir=tracking_folder(subject.run_url),
        name=f"{name}-evaluate",
        job_type="evaluate",
        group=config.tracking.group,
        settings={
            **subject.checkpoint.config.model_dump(mode="json"),
            "dataset_digest": subject.manifest.digest,
            "checkpoint_sha256": " ".join(_digests(subject)),
            "data_warning": judged.data.audit.warning,
        },
    )
    tracker.log_artifact(describe_dataset(subject.manifest), role="input")
    for weights in subject.scored.scoring.weights:
        tracker.log_artifact(
            describe_weights(weights.entry, weights.run_url, subject.manifest), role="input"
        )
    log_data(tracker, judged.data, (folder / "figures" / DATA_FIGURE).read_bytes())
    log_evaluation(tracker, judged.evaluation, judged.looks.get("test"))
    log_pictures(tracker, judged.pictures, judged.evaluation, config)
    tracker.log_media("eval/report", Page(report))
    files = {name: folder / name for name in (METRICS, PREDICTIONS, REPORT)}
    tracker.log_artifact(Artifact(name="evaluation", type="evaluation", files=files))
    close_tracker(tracker, subject.run_url)


def print_summary(metrics: Mapping[str, Any], run_url: str) -> None:
    """The headline of test on stdout."""
    test = metrics["test"]
    print(f"test: {test['n']} studies, {test['positives']} positive; 95 % intervals over patients")
    for name in ("auroc", "accuracy", "precision", "recall", "f1"):
        estimate = test[name]
        if estimate["value"] is None:
            print(f"  {name:9}  -      {estimate['reason']}")
        elif estimate["low"] is None:
            print(f"  {name:9}  {estimate['value']:.3f}  {estimate.get('reason', '')}")
        else:
            low, high = estimate["low"], estimate["high"]
            print(f"  {name:9}  {estimate['value']:.3f}  [{low:.3f}, {high:.3f}]")
    print(f"report {storage.join(run_url, REPORT)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("evaluate", evaluate_run, argv)


if __name__ == "__main__":
    sys.exit(main())
