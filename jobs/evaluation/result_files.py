"""What an evaluation leaves in its run: metrics, predictions, figures, gallery, report."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import ray
import tomli_w
import torch

from jobs.evaluation.evaluated_run import EVALUATED_SPLITS, PREDICTIONS, Subject
from jobs.evaluation.ray_scoring import Scoring
from jobs.terminal.entry_point import tell
from pneumo import __version__
from pneumo.config import Config
from pneumo.evaluation.comparison import ComparedRuns
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.reporting.figures import case_pictures, charts, data_charts
from pneumo.reporting.figures.case_pictures import Pictures
from pneumo.reporting.figures.data_charts import shrink_sheet
from pneumo.reporting.page import MAX_PAGE_BYTES, DataFacts, ModelFacts, Provenance, render_report
from pneumo.reporting.page.formatting import count
from pneumo.training.checkpoints import Checkpoint

REPORT = "report.html"
DATA_FIGURE = "data_quality.png"


@dataclass(frozen=True, eq=False)
class Results:
    """All that is known when the results are written."""

    data: DataFacts
    evaluation: Evaluation
    pictures: Pictures
    saliency: Mapping[str, SaliencySummary]
    """By split; empty with evaluate.saliency off."""
    compared: ComparedRuns | None
    members: MemberSpread | None = None
    """Each run of an ensemble alone."""

    def shrink(self, size: int) -> Self:
        """The same with no study's picture higher than `size` pixels."""
        sheets = [shrink_sheet(sheet, size) for sheet in self.data.contact]
        return replace(
            self, data=replace(self.data, contact=sheets), pictures=self.pictures.shrink(size)
        )


# --- metrics.json ---------------------------------------------------------------------------------


def compose_metrics(subject: Subject, results: Results, config: Config) -> dict[str, Any]:
    """The content of metrics.json."""
    quality = results.data.quality
    metrics = results.evaluation.to_metrics(
        run=subject.name,
        dataset={
            "digest": subject.manifest.digest,
            "unit": subject.manifest.audit.unit,
            "image_size": subject.manifest.image_size,
            "quarantined": sum(quality.quarantined.values()),
            "duplicates_across_splits": quality.duplicates.across_splits,
            "duplicates_across_patients": quality.duplicates.across_patients,
            "warning": results.data.audit.warning,
            "phantoms": results.data.phantoms,
        },
        model={
            "backbone": subject.checkpoint.config.model.backbone,
            "initialisation": subject.checkpoint.initialisation,
            "epoch": subject.checkpoint.epoch,
            "image_size": subject.checkpoint.image_size,
            "scoring": subject.scored.scoring.to_json(),
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
        "earlier": subject.num_earlier,
        **config.evaluate.model_dump(mode="json"),
    }
    if results.compared is not None:
        metrics["comparison"] = results.compared.to_json()
    if results.members is not None:
        metrics["members"] = results.members.to_json()
    return metrics


def describe_errors(pictures: Pictures) -> dict[str, Any]:
    """What metrics.json says of the errors by finding: null where no study is called anything."""
    if pictures.reason is not None:
        return {"errors_by_finding": None, "errors_by_finding_reason": pictures.reason}
    return {"errors_by_finding": {found.finding: found.to_json() for found in pictures.by_finding}}


# --- files ----------------------------------------------------------------------------------------


def write_files(folder: Path, subject: Subject, results: Results, config: Config) -> None:
    """Predictions, figures, gallery and report below `folder`."""
    evaluation, pictures = results.evaluation, results.pictures
    table = evaluation.predictions.to_parquet(subject.scored.scoring.to_json())
    (folder / PREDICTIONS).write_bytes(table)
    n = evaluation.test.n
    first_of_each = [cases[0] for cases in pictures.gallery.values() if cases]
    drawn = {
        "metrics.png": charts.draw_metrics(evaluation, subject.history, subject.checkpoint.epoch),
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
    report = render(subject, results, config).encode()
    if len(report) > MAX_PAGE_BYTES:
        tell(f"warning: {REPORT} has {len(report) / 1e6:.1f} MB; lower evaluate.pictures")
    (folder / REPORT).write_bytes(report)


def render(subject: Subject, results: Results, config: Config) -> str:
    """report.html."""
    return render_report(
        results.evaluation,
        data=results.data,
        model=describe_model(subject.checkpoint, subject.scored.scoring, config.evaluate.ensemble),
        provenance=describe_provenance(subject, config),
        history=subject.history,
        pictures=results.pictures,
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
    """Which checkpoints were taken, and how a study's score is made of them; `ensemble` is
    evaluate.ensemble."""
    number = len(scoring.weights)
    if ensemble == "best":
        words = "The checkpoint of the highest AUROC on val."
    else:
        words = "The last checkpoint."
    if number > 1:
        words = f"The mean logit of {number} checkpoints: {scoring.checkpoint}."
    if scoring.views > 1:
        words += f" Each image is scored in {scoring.views} views, whose logits are averaged."
    return words


def describe_command(subject: Subject, config: Config) -> str:
    """The evaluation's, with every setting that is not the default."""
    usual = Config()
    flags = [] if config.seed == usual.seed else [f"--seed {config.seed}"]
    runs = {weights.run_url for weights in subject.scored.scoring.weights}
    if len(runs) > 1:
        flags.append(f"--members {','.join(f'RUN{n}' for n in range(2, len(runs) + 1))}")
    for name, value in config.evaluate.model_dump(mode="json").items():
        if value != getattr(usual.evaluate, name):
            flags.append(f"--evaluate.{name.replace('_', '-')} {json.dumps(value)}")
    return " ".join(["python -m jobs.evaluate --store STORE --run RUN", *flags])


def write_recipe(config: Config) -> str:
    """The configuration as TOML, which has no null: every setting that may be none is so by
    default, and left out."""
    tree = config.without_paths()
    sections = {
        name: {key: value for key, value in part.items() if value is not None}
        if isinstance(part, Mapping)
        else part
        for name, part in tree.items()
    }
    return tomli_w.dumps(sections)


def describe_provenance(subject: Subject, config: Config) -> Provenance:
    """What it takes to do it again."""
    trained = subject.checkpoint.config.model_copy(update={"evaluate": config.evaluate})
    return Provenance(
        run=subject.name,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        seed=trained.seed,
        recipe=write_recipe(trained),
        command="python -m jobs.train --store STORE --run RUN --recipe RECIPE; "
        + describe_command(subject, config),
        citation=(
            f"pneumo {__version__}, run {subject.name}, checkpoint SHA-256 "
            f"{subject.digests[0][:16]}, data set SHA-256 {subject.manifest.digest[:16]}"
        ),
        facts={
            "test evaluated before": f"{count(subject.num_earlier, 'time')} in this run",
            "seed of the evaluation": str(config.seed),
            "code": subject.checkpoint.code_version,
            "manifest": subject.manifest.digest,
            "checkpoint": " ".join(subject.digests),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    )
