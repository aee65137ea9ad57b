"""Score val and test once per study, evaluate, draw, report: all that a run says of its model."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from jobs.evaluation.evaluated_run import (
    EVALUATED_SPLITS,
    EVALUATIONS,
    METRICS,
    Subject,
    find_subject,
    name_run,
    read_other,
)
from jobs.evaluation.external import evaluate_externally
from jobs.evaluation.ray_resampling import share_resamples
from jobs.evaluation.ray_scoring import Scored, Scoring, score_splits
from jobs.evaluation.result_files import REPORT, Results, compose_metrics, write_files
from jobs.evaluation.shown_studies import choose_pictures, score_saliency
from jobs.evaluation.wandb_results import write_tracking
from jobs.ray_cluster.session import ray_session, wait_for_resources
from jobs.terminal.entry_point import tell
from jobs.tracking.sending import send_now
from pneumo import storage
from pneumo.command_line import EvaluateArguments, Invocation
from pneumo.config import Config
from pneumo.dataset.contact_sheets import read_contact_sheets
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.quality import summarise_quality
from pneumo.dataset.study_table import StudyRow, read_studies, read_warnings
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.comparison import ComparedRuns, Comparison, compare
from pneumo.evaluation.evaluation import Evaluation, evaluate
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.member_spread import MemberSpread, compare_members
from pneumo.evaluation.predictions import Predictions, check_complete, join_predictions
from pneumo.network.scoring import Scores, average_scores
from pneumo.reporting.page import DataFacts
from pneumo.reporting.tracking import prepare_tracking
from pneumo.reporting.tracking.tracked_run import FOLDER


def evaluate_run(invocation: Invocation) -> None:
    """Evaluate the run of `--run` on `--store`, leaving the results in it, metrics.json last."""
    arguments, config = invocation.arguments, invocation.config
    assert isinstance(arguments, EvaluateArguments)
    if arguments.external:
        evaluate_externally(arguments, config)
        return
    subject = find_subject(arguments, config.evaluate)
    studies = read_studies(subject.store_url, subject.manifest)
    data = describe_data(subject.store_url, subject.manifest, studies)
    other = None if arguments.compare_with is None else read_other(arguments.compare_with, studies)
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        evaluation, members = score_and_evaluate(subject, studies, config)
        pictures = choose_pictures(
            subject.scored, evaluation.predictions, studies, evaluation.decide("test"), config
        )
        saliency = find_saliency(subject, evaluation, studies, config)
    compared = None
    if other is not None and arguments.compare_with is not None:
        splits = compare_splits(evaluation.predictions, other, config)
        compared = ComparedRuns(subject.name, name_run(arguments.compare_with), splits)
    results = Results(data, evaluation, pictures, saliency, compared, members)
    with tempfile.TemporaryDirectory() as folder:
        write_results(subject, results, Path(folder), config)


def score_and_evaluate(
    subject: Subject, studies: Mapping[str, StudyRow], config: Config
) -> tuple[Evaluation, MemberSpread | None]:
    """Score val and test, each study exactly once by each run, and evaluate the mean of the runs;
    with several runs also each of them alone."""
    store_url, parts = subject.store_url, subject.scored.scoring.by_run()
    scores = {
        name: score_splits(Scored(part, store_url), EVALUATED_SPLITS, config)
        for name, part in parts.items()
    }

    def join(scored: Scores, scoring: Scoring) -> Predictions:
        size = subject.manifest.image_size
        return join_predictions(scored, studies, checkpoint=scoring.checkpoint, image_size=size)

    predictions = join(average_scores(list(scores.values())), subject.scored.scoring)
    expected = {name: subject.manifest.splits[name].samples for name in EVALUATED_SPLITS}
    check_complete(predictions, expected)
    tell("evaluate: intervals, figures, Grad-CAM")
    singles = {name: join(scores[name], part) for name, part in parts.items()}
    with threadpool_limits(1):  # the bootstrap's small products are slower on many threads
        evaluation = evaluate(
            predictions,
            config=config.evaluate,
            seed=config.seed,
            train=Metadata.of_split(studies.values(), "train"),
            has_patients=subject.manifest.audit.patients is not None,
            share=share_resamples(config.cluster, len(predictions)),
        )
    return evaluation, compare_members(singles, subject.differ_in, config.evaluate)


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
        for split in EVALUATED_SPLITS
    }


def find_saliency(
    subject: Subject, evaluation: Evaluation, studies: Mapping[str, StudyRow], config: Config
) -> Mapping[str, SaliencySummary]:
    """By split, where the network looks; empty with evaluate.saliency off."""
    if not config.evaluate.saliency:
        return {}
    return score_saliency(
        subject.scored,
        evaluation.predictions,
        studies,
        {"val": evaluation.decide("val"), "test": evaluation.decide("test")},
        config,
        stored_size=subject.manifest.image_size,
        image_size=subject.checkpoint.image_size,
    )


def describe_data(store_url: str, manifest: Manifest, studies: Mapping[str, StudyRow]) -> DataFacts:
    """What the report says of the store, some pictures of train included.

    Raises DataError when `studies`, by key, or a shard of train is not what the manifest says.
    """
    return DataFacts(
        digest=manifest.digest,
        image_size=manifest.image_size,
        seed=manifest.seed,
        audit=manifest.audit,
        quality=summarise_quality(studies.values(), manifest, read_warnings(store_url, manifest)),
        contact=read_contact_sheets(store_url, manifest, studies),
        phantoms=manifest.phantoms,
    )


def write_results(subject: Subject, results: Results, folder: Path, config: Config) -> None:
    """Write everything to `folder` and the run, metrics.json last; then send it to W&B."""
    prepare_tracking(subject.run_url, subject.manifest)
    write_files(folder, subject, results, config)
    write_tracking(folder / FOLDER, subject, results, config)
    metrics = compose_metrics(subject, results, config)
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    _clear(subject.run_url)
    storage.upload_folder(folder, subject.run_url)
    line = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checkpoints": subject.digests,
        "test_auroc": metrics["test"]["auroc"]["value"],
    }
    storage.write_text(
        storage.join(subject.run_url, EVALUATIONS), f"{subject.earlier}{json.dumps(line)}\n"
    )
    storage.write_text(storage.join(subject.run_url, METRICS), text)
    print_summary(metrics, subject.run_url)
    # All is there, whatever W&B does now, or a person who does not want to wait for it.
    send_now(subject.run_url, config.tracking, "evaluate", tell)


def _clear(run_url: str) -> None:
    """Remove an earlier evaluation, its marker first, so that it never marks a mixture as whole."""
    storage.remove(storage.join(run_url, METRICS))
    for folder in ("gallery", "figures"):
        for url in storage.list_urls(storage.join(run_url, folder)):
            storage.remove(url)


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
