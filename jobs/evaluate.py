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
from jobs.pictures import Pictures, choose_pictures, score_saliency
from jobs.scoring import Scored, Scoring, Weights, score_splits
from jobs.session import ray_session, wait_for_resources
from jobs.train import close_tracker, tracking_folder
from pneumo import figures, storage
from pneumo.baselines import Metadata
from pneumo.checkpoint import Checkpoint, load_checkpoint, read_index
from pneumo.comparison import compare
from pneumo.config import Config, EvaluateArguments, EvaluateConfig, Invocation
from pneumo.errors import RunError, StoreError
from pneumo.evaluate import DECISION, Evaluation, check_complete, evaluate
from pneumo.predict import Predictions, join_predictions
from pneumo.quality import read_contact_sheets, summarise_quality
from pneumo.report import DataFacts, ModelFacts, Provenance, render_report
from pneumo.shards import Manifest, StudyRow, read_manifest, read_studies
from pneumo.tracking import (
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    Page,
    Picture,
    Table,
    Tracker,
    open_tracker,
)

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
    studies = read_studies(subject.store_url)
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
        looks = describe_looks(subject, predictions, studies, threshold, config)
        looks["test"]["errors_by_finding"] = {
            found.finding: found.to_json() for found in pictures.by_finding
        }
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
    for split, found in looks.items():
        metrics[split] |= found
    if other is not None and arguments.compare_with is not None:
        metrics["comparison"] = {
            "first": metrics["run"],
            "second": storage.normalise(arguments.compare_with).rsplit("/", 1)[-1],
            **compare_splits(predictions, other, config),
        }
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        report = write_files(files, subject, data, predictions, evaluation, pictures, config)
        _clear(subject.run_url)
        storage.upload_folder(files, subject.run_url)
        metrics_text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
        (files / METRICS).write_text(metrics_text)
        track(subject, data, evaluation, pictures, report, files, config)
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


def compare_splits(first: Predictions, second: Predictions, config: Config) -> dict[str, Any]:
    """Both models on val and on test, for metrics.json.

    Raises DataError when they are not of the same studies.
    """
    resamples = config.evaluate.bootstrap_resamples
    return {
        split: compare(
            first.subset(split), second.subset(split), resamples=resamples, seed=config.seed
        ).to_json()
        for split in JUDGED_SPLITS
    }


def describe_looks(
    subject: Subject,
    predictions: Predictions,
    studies: Mapping[str, StudyRow],
    threshold: float | None,
    config: Config,
) -> dict[str, dict[str, Any]]:
    """By split, what metrics.json says of where the network looks."""
    if config.evaluate.saliency:
        summaries = score_saliency(
            subject.scored,
            predictions,
            studies,
            threshold,
            config,
            stored_size=subject.manifest.image_size,
            image_size=subject.checkpoint.image_size,
        )
        return {split: {"saliency": found.to_json()} for split, found in summaries.items()}
    reason = "evaluate.saliency is off"
    return {split: {"saliency": None, "saliency_reason": reason} for split in JUDGED_SPLITS}


def write_files(
    folder: Path,
    subject: Subject,
    data: DataFacts,
    predictions: Predictions,
    evaluation: Evaluation,
    pictures: Pictures,
    config: Config,
) -> str:
    """Predictions, figures, gallery and report below `folder`; the report's HTML."""
    (folder / PREDICTIONS).write_bytes(predictions.to_parquet(subject.scored.scoring.to_json()))
    history = subject.checkpoint.history
    n = evaluation.test.n
    first_of_each = [cases[0] for cases in pictures.gallery.values() if cases]
    drawn = {
        "metrics.png": figures.draw_metrics(evaluation, history),
        "roc.svg": figures.draw_roc(evaluation),
        "precision_recall.svg": figures.draw_precision_recall(evaluation),
        "confusion.svg": figures.draw_confusion(evaluation),
        "prediction_grid.png": figures.draw_prediction_grid(
            pictures.grid, title=f"Predictions: {len(pictures.grid)} of {n} test studies"
        ),
        "gradcam_example.png": figures.draw_gradcam_example(
            first_of_each, title="Grad-CAM, one test study of each outcome"
        ),
        DATA_FIGURE: figures.draw_quality(data.quality),
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
        data=data,
        model=describe_model(subject.checkpoint),
        provenance=describe_provenance(subject, config),
        history=history,
        grid=pictures.grid,
        gallery=pictures.gallery,
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


def describe_faults(data: DataFacts) -> dict[str, Any]:
    """What is wrong with the data, for machines."""
    return {
        "quarantined": sum(data.quality.quarantined.values()),
        "duplicates_across_splits": data.quality.duplicates.across_splits,
        "warning": data.audit.warning,
    }


def describe_model(checkpoint: Checkpoint) -> ModelFacts:
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
    )


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


def track(
    subject: Subject,
    data: DataFacts,
    evaluation: Evaluation,
    pictures: Pictures,
    report: str,
    folder: Path,
    config: Config,
) -> None:
    """Push everything to W&B, whose faults never fail the evaluation."""
    tracker = open_tracker(
        config.tracking,
        run_dir=tracking_folder(subject.run_url),
        name=f"{subject.run_url.rsplit('/', 1)[-1]}-evaluate",
        job_type="evaluate",
        group=config.tracking.group,
        settings={
            **subject.checkpoint.config.model_dump(mode="json"),
            "dataset_digest": subject.manifest.digest,
            "checkpoint_sha256": " ".join(_digests(subject)),
            "data_warning": data.audit.warning,
        },
    )
    log_data(tracker, data, (folder / "figures" / DATA_FIGURE).read_bytes())
    _log_charts(tracker, evaluation)
    for outcome, cases in pictures.gallery.items():
        shown = [Picture(figures.draw_case(case), case.caption) for case in cases]
        if shown:
            tracker.log_media(f"eval/gallery/{outcome}", Gallery(shown))
    grid = (folder / "figures" / "prediction_grid.png").read_bytes()
    tracker.log_media("eval/prediction_grid", Gallery([Picture(grid, "prediction grid")]))
    tracker.log_media("eval/report", Page(report))
    _log_lineage(tracker, subject, folder)
    close_tracker(tracker, subject.run_url)


def log_data(tracker: Tracker, data: DataFacts, drawing: bytes) -> None:
    """What the data hold: counts, drawing, contact sheets, and what is wrong with them."""
    tracker.summarise({f"data/{name}": value for name, value in describe_faults(data).items()})
    columns = ["property", "value", *(f"studies of {name}" for name in data.quality.splits)]
    tracker.log_media("data/counts", Table(columns, data.quality.rows()))
    tracker.log_media("data/quality", Gallery([Picture(drawing, "findings, ages, gray levels")]))
    sheets = [Picture(figures.draw_contact_sheet(sheet), sheet.caption) for sheet in data.contact]
    if sheets:
        tracker.log_media("data/contact", Gallery(sheets))


def _log_charts(tracker: Tracker, evaluation: Evaluation) -> None:
    test = evaluation.test
    rates = {name: estimate.value for name, estimate in test.at[DECISION].rates.items()}
    tracker.summarise(
        {
            "eval/test/auroc": test.auroc.value,
            "eval/test/auroc_low": test.auroc.low,
            "eval/test/auroc_high": test.auroc.high,
            "eval/test/average_precision": test.average_precision.value,
            "eval/threshold": evaluation.points[DECISION].threshold,
            **{f"eval/test/{name}": value for name, value in rates.items()},
        }
    )
    roc = {
        part.split: (part.roc.x.tolist(), part.roc.y.tolist())
        for part in (evaluation.val, test)
        if part.roc is not None
    }
    if roc:
        tracker.log_media(
            "eval/roc", LineChart(roc, f"ROC, n = {test.n}", "1 - specificity", "sensitivity")
        )
    counts = test.at[DECISION].counts
    if counts is not None:
        tracker.log_media(
            "eval/confusion", ConfusionChart(counts.to_json(), f"Confusion, test, n = {test.n}")
        )


def _log_lineage(tracker: Tracker, subject: Subject, folder: Path) -> None:
    """data set -> evaluation; the manifest stands for the data, by its digests of the shards."""
    manifest_path = folder / "manifest.json"
    manifest_path.write_text(subject.manifest.model_dump_json(indent=1))
    dataset = Artifact(
        name="dataset",
        type="dataset",
        files={"manifest.json": manifest_path},
        metadata={"digest": subject.manifest.digest},
    )
    tracker.log_artifact(dataset, role="input")
    names = (METRICS, PREDICTIONS, REPORT)
    files = {name: folder / name for name in names}
    tracker.log_artifact(Artifact(name="evaluation", type="evaluation", files=files))


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
