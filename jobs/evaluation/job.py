"""The job `evaluate`: score val and test, compute metrics, draw figures, write the report."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from jobs.evaluation import evaluated_run, result_files
from jobs.evaluation.evaluated_run import EVALUATED_SPLITS, EVALUATIONS, METRICS, EvaluatedRun
from jobs.evaluation.external import evaluate_externally
from jobs.evaluation.ray_resampling import choose_map
from jobs.evaluation.ray_scoring import ScoredStore, Scoring, name_runs, score_splits
from jobs.evaluation.result_files import EXTERNAL_FOLDER, REPORT, Results
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
from pneumo.evaluation.member_spread import MemberSpread, compare_members
from pneumo.evaluation.predictions import Predictions, check_complete, join_predictions
from pneumo.network.scoring import Scores, average_scores
from pneumo.reporting.page.page_inputs import DataFacts
from pneumo.reporting.tracking.tracked_run import FOLDER, prepare_tracking


def evaluate_run(invocation: Invocation) -> None:
    """Evaluate the run of `--run` on `--store`; the results go into the run, metrics.json last."""
    arguments, config = invocation.arguments, invocation.config
    assert isinstance(arguments, EvaluateArguments)
    if arguments.external:
        evaluate_externally(arguments, config)
        return
    run = evaluated_run.find_evaluated_run(arguments, config.evaluate)
    studies = read_studies(run.store_url, run.manifest)
    data = read_data_facts(run.store_url, run.manifest, studies)
    compare_with, other = arguments.compare_with, None
    if compare_with is not None:
        other = evaluated_run.read_other_predictions(compare_with, studies)
    with ray_session(show_logs=arguments.debug):
        wait_for_resources(config.cluster, 1)
        evaluation, members = score_and_evaluate(run, studies, config)
        pictures = choose_pictures(
            run.scored, evaluation.predictions, studies, evaluation.decide("test"), config
        )
        saliency = score_saliency(run, evaluation, studies, config)
        compared = None
        if compare_with is not None and other is not None:
            splits = compare_splits(evaluation.predictions, other, config)
            first, second = name_runs([run.run_url, compare_with])
            compared = ComparedRuns(first, second, splits)
    results = Results(data, evaluation, pictures, saliency, compared, members)
    with tempfile.TemporaryDirectory() as folder:
        write_results(run, results, Path(folder), config)


def score_and_evaluate(
    run: EvaluatedRun, studies: Mapping[str, StudyRow], config: Config
) -> tuple[Evaluation, MemberSpread | None]:
    """Score each study of val and test once by each run, and evaluate the mean of the runs; of
    several runs, each alone too."""
    store_url, parts = run.store_url, run.scored.scoring.by_run()
    scores = {
        name: score_splits(ScoredStore(part, store_url), EVALUATED_SPLITS, config)
        for name, part in parts.items()
    }

    def join(scored: Scores, scoring: Scoring) -> Predictions:
        size = run.manifest.image_size
        return join_predictions(
            scored, studies, checkpoint=scoring.checkpoint_name, image_size=size
        )

    predictions = join(average_scores(list(scores.values())), run.scored.scoring)
    expected = {name: run.manifest.splits[name].samples for name in EVALUATED_SPLITS}
    check_complete(predictions, expected)
    tell("evaluate: intervals, figures, Grad-CAM")
    singles = {name: join(scores[name], part) for name, part in parts.items()}
    with threadpool_limits(1):  # small matrix products are slower on many threads
        evaluation = evaluate(
            predictions,
            config=config.evaluate,
            seed=config.seed,
            train=Metadata.of_split(studies.values(), "train"),
            has_patients=run.manifest.audit.has_patients,
            map_blocks=choose_map(config.cluster, len(predictions)),
        )
    return evaluation, compare_members(singles, run.differ_in, config.evaluate)


def compare_splits(
    first: Predictions, second: Predictions, config: Config
) -> dict[str, Comparison]:
    """Compare both models on val and on test. Raises DataError when their studies differ."""
    return {
        split: compare(
            first.subset(split),
            second.subset(split),
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
            map_blocks=choose_map(config.cluster, len(first)),
        )
        for split in EVALUATED_SPLITS
    }


def read_data_facts(
    store_url: str, manifest: Manifest, studies: Mapping[str, StudyRow]
) -> DataFacts:
    """What the report says of the store, with some images of train.

    Raises DataError when `studies`, by key, or a shard of train differs from the manifest.
    """
    return DataFacts(
        digest=manifest.digest,
        image_size=manifest.image_size,
        seed=manifest.seed,
        audit=manifest.audit,
        quality=summarise_quality(studies.values(), manifest, read_warnings(store_url, manifest)),
        contact=read_contact_sheets(store_url, manifest, studies),
        phantoms=manifest.phantoms,
        layout=manifest.layout,
        sources=sorted({row.source for row in studies.values()} - {""}),
        left_out=manifest.left_out,
    )


def write_results(run: EvaluatedRun, results: Results, folder: Path, config: Config) -> None:
    """Write all to `folder`, copy it to the run, metrics.json last, then send it to W&B."""
    prepare_tracking(run.run_url, run.manifest)
    log_url = storage.join(run.run_url, EVALUATIONS)
    # Read now, and again below: another evaluation may have ended since this one began.
    run = replace(run, num_earlier=len((storage.find_text(log_url) or "").splitlines()))
    report = result_files.describe_results(run, results, config)
    result_files.write_files(folder, run, results, report)
    write_tracking(folder / FOLDER, run, results, report, config.tracking)
    metrics = result_files.compose_metrics(run, results, config)
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    if storage.exists(storage.join(run.run_url, EXTERNAL_FOLDER, METRICS)):
        tell("warning: the report loses its other sets; repeat --external with --overwrite")
    _clear(run.run_url)
    storage.upload_folder(folder, run.run_url)
    line = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checkpoints": run.digests,
        "test_auroc": metrics["test"]["auroc"]["value"],
    }
    storage.write_text(log_url, f"{storage.find_text(log_url) or ''}{json.dumps(line)}\n")
    storage.write_text(storage.join(run.run_url, METRICS), text)
    print_summary(metrics, run.run_url)
    # Last: the results are complete, even if W&B fails or the user interrupts.
    send_now(run.run_url, config.tracking, "evaluate", tell)


def _clear(run_url: str) -> None:
    """Remove an earlier evaluation, metrics.json first: it marks a complete evaluation."""
    storage.remove(storage.join(run_url, METRICS))
    for folder in ("gallery", "figures"):
        for url in storage.list_urls(storage.join(run_url, folder)):
            storage.remove(url)


def print_summary(metrics: Mapping[str, Any], run_url: str) -> None:
    """Print the headline metrics of test."""
    test = metrics["test"]
    unit = "images" if test["patients"] is None else "patients"
    print(f"test: {test['n']} studies, {test['positives']} positive; 95 % intervals over {unit}")
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
