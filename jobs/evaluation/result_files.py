"""The files of an evaluation: metrics, predictions, figures, gallery, report."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import tomli_w
import torch

from jobs.evaluation.evaluated_run import EVALUATED_SPLITS, PREDICTIONS, EvaluatedRun
from jobs.evaluation.ray_scoring import Scoring
from jobs.terminal.entry_point import tell
from pneumo import __version__
from pneumo.command_line import JOBS
from pneumo.config import Config
from pneumo.evaluation.comparison import ComparedRuns
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.reporting.figures import case_pictures, charts, data_charts
from pneumo.reporting.figures.case_pictures import Pictures
from pneumo.reporting.page.formatting import count
from pneumo.reporting.page.page import MAX_PAGE_BYTES, describe_report, render_report
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts, Provenance
from pneumo.training.checkpoints import Checkpoint

REPORT = "report.html"
DATA_FIGURE = "data_quality.png"
EXTERNAL_FOLDER, EXTERNAL_MATRIX = "external", "matrix.png"
"""The folder of an external validation in the run, and its figure there."""


@dataclass(frozen=True, eq=False)
class Results:
    """All that the result files contain."""

    data: DataFacts
    evaluation: Evaluation
    pictures: Pictures
    saliency: Mapping[str, SaliencySummary]
    """By split; empty with evaluate.saliency off."""
    compared: ComparedRuns | None
    members: MemberSpread | None = None
    """Each run of an ensemble alone."""


# --- metrics.json ---------------------------------------------------------------------------------


def compose_metrics(run: EvaluatedRun, results: Results, config: Config) -> dict[str, Any]:
    """The content of metrics.json."""
    quality = results.data.quality
    metrics = results.evaluation.to_metrics(
        run=run.name,
        dataset={
            "digest": run.manifest.digest,
            "unit": run.manifest.audit.unit,
            "image_size": run.manifest.image_size,
            "quarantined": sum(quality.quarantined.values()),
            "duplicates_across_splits": quality.duplicates.across_splits,
            "duplicates_across_patients": quality.duplicates.across_patients,
            "warning": results.data.audit.warning,
            "phantoms": results.data.phantoms,
        },
        model={
            "backbone": run.checkpoint.config.model.backbone,
            "initialisation": run.checkpoint.initialisation,
            "epoch": run.checkpoint.epoch,
            "image_size": run.checkpoint.image_size,
            "scoring": run.scored.scoring.to_json(),
        },
    )
    for split in EVALUATED_SPLITS:
        maps = results.saliency.get(split)
        metrics[split]["saliency"] = maps and maps.to_json()
        if maps is None:
            metrics[split]["saliency_reason"] = "evaluate.saliency is off"
    metrics["test"] |= describe_errors(results.pictures)
    metrics["evaluation"] = {
        "seed": config.seed,
        "earlier": run.num_earlier,
        **config.evaluate.model_dump(mode="json"),
    }
    if results.compared is not None:
        metrics["comparison"] = results.compared.to_json()
    if results.members is not None:
        metrics["members"] = results.members.to_json()
    return metrics


def describe_errors(pictures: Pictures) -> dict[str, Any]:
    """The errors by finding for metrics.json; null without a threshold."""
    if pictures.reason is not None:
        return {"errors_by_finding": None, "errors_by_finding_reason": pictures.reason}
    return {"errors_by_finding": {found.finding: found.to_json() for found in pictures.by_finding}}


# --- files ----------------------------------------------------------------------------------------


def write_files(
    folder: Path, run: EvaluatedRun, results: Results, report: Mapping[str, Any]
) -> None:
    """Write predictions, figures, gallery and the page of `report` to `folder`."""
    evaluation, pictures = results.evaluation, results.pictures
    table = evaluation.predictions.to_parquet(run.scored.scoring.to_json())
    (folder / PREDICTIONS).write_bytes(table)
    n = evaluation.test.n
    first_of_each = [cases[0] for cases in pictures.gallery.values() if cases]
    drawn = {
        "metrics.png": charts.draw_metrics(evaluation, run.history, run.checkpoint.epoch),
        "roc.svg": charts.draw_roc(evaluation),
        "precision_recall.svg": charts.draw_precision_recall(evaluation),
        "reliability.svg": charts.draw_reliability(evaluation),
        "decision_curve.svg": charts.draw_decision_curve(evaluation),
        "confusion.svg": charts.draw_confusion(evaluation),
        "prediction_grid.png": case_pictures.draw_prediction_grid(
            pictures.grid,
            title=f"Predictions: {len(pictures.grid)} of {n} test studies",
            reason=pictures.reason,
        ),
        "gradcam_example.png": case_pictures.draw_gradcam_example(
            first_of_each,
            title="Grad-CAM, one test study of each outcome",
            reason=pictures.reason,
        ),
        DATA_FIGURE: data_charts.draw_quality(results.data.quality),
    }
    (folder / "figures").mkdir()
    for name, picture in drawn.items():
        (folder / "figures" / name).write_bytes(picture)
    (folder / "gallery").mkdir()
    for outcome, cases in pictures.gallery.items():
        for number, shown in enumerate(cases):
            path = folder / "gallery" / f"{outcome}-{number:02d}.webp"
            path.write_bytes(case_pictures.draw_case(shown))
    page = render_report(report, pictures).encode()
    if len(page) > MAX_PAGE_BYTES:
        tell(f"warning: {REPORT} has {len(page) / 1e6:.1f} MB; lower evaluate.pictures")
    (folder / REPORT).write_bytes(page)


def describe_results(run: EvaluatedRun, results: Results, config: Config) -> dict[str, Any]:
    """What report.html says and draws, for `render_report`."""
    return describe_report(
        results.evaluation,
        data=results.data,
        model=describe_model(run.checkpoint, run.scored.scoring, config.evaluate.ensemble),
        provenance=describe_provenance(run, config),
        history=run.history,
        saliency=results.saliency.get("test"),
        compared=results.compared,
        members=results.members,
    )


def describe_model(checkpoint: Checkpoint, scoring: Scoring, ensemble: int | str) -> ModelFacts:
    """What the report says of the model."""
    wanted, source = checkpoint.config.model.weights, checkpoint.initialisation
    sentence = {
        "imagenet": "ImageNet weights of torchvision",
        "random": f"Random weights, seed {checkpoint.config.seed}",
        "file": f"Weights of {wanted.rsplit('/', 1)[-1]}",
    }[source]
    return ModelFacts(
        backbone=checkpoint.config.model.backbone,
        initialisation=sentence,
        is_pretrained=source != "random",
        fell_back=source == "random" and wanted != "random",
        epoch=checkpoint.epoch,
        image_size=checkpoint.image_size,
        selection=describe_selection(scoring, ensemble),
        mean=checkpoint.mean,
        std=checkpoint.std,
    )


def describe_selection(scoring: Scoring, ensemble: int | str) -> str:
    """Which checkpoints are scored, and how their logits are combined; `ensemble` is
    evaluate.ensemble."""
    number = len(scoring.checkpoints)
    if ensemble == "best":
        words = "The checkpoint of the highest AUROC on val."
    else:
        words = "The last checkpoint."
    if number > 1:
        words = f"The mean logit of {number} checkpoints: {scoring.checkpoint_name}."
    if scoring.views > 1:
        words += f" Each image is scored in {scoring.views} views, whose logits are averaged."
    return words


def describe_command(run: EvaluatedRun, config: Config) -> str:
    """The evaluation's command line, with all settings that are not the default."""
    usual = Config()
    flags = [] if config.seed == usual.seed else [f"--seed {config.seed}"]
    runs = {checkpoint.run_url for checkpoint in run.scored.scoring.checkpoints}
    if len(runs) > 1:
        flags.append(f"--members {','.join(f'RUN{n}' for n in range(2, len(runs) + 1))}")
    for name, value in config.evaluate.model_dump(mode="json").items():
        if value != getattr(usual.evaluate, name):
            flags.append(f"--evaluate.{name.replace('_', '-')} {json.dumps(value)}")
    return " ".join(["python -m jobs.evaluate --store STORE --run RUN", *flags])


def write_recipe(config: Config) -> str:
    """The settings of training and evaluation as TOML. TOML has no null, so settings that are None
    are left out: None is their default."""
    used = {*JOBS["train"].sections, *JOBS["evaluate"].sections}
    tree = {name: part for name, part in config.without_paths().items() if name in used}
    sections = {
        name: {key: value for key, value in part.items() if value is not None}
        if isinstance(part, Mapping)
        else part
        for name, part in tree.items()
    }
    return tomli_w.dumps(sections)


def describe_provenance(run: EvaluatedRun, config: Config) -> Provenance:
    """What is needed to reproduce the evaluation."""
    trained = run.checkpoint.config.model_copy(update={"evaluate": config.evaluate})
    return Provenance(
        run=run.name,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        seed=trained.seed,
        recipe=write_recipe(trained),
        command="python -m jobs.train --store STORE --run RUN --recipe RECIPE; "
        + describe_command(run, config),
        citation=(
            f"pneumo {__version__}, run {run.name}, checkpoint SHA-256 "
            f"{run.digests[0][:16]}, data set SHA-256 {run.manifest.digest[:16]}"
        ),
        facts={
            "test evaluated before": f"{count(run.num_earlier, 'time')} in this run",
            "seed of the evaluation": str(config.seed),
            "code": run.checkpoint.code_version,
            "manifest": run.manifest.digest,
            "checkpoint": " ".join(run.digests),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    )
