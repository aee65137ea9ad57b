"""What W&B is told of an evaluation: the data, the numbers, the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.evaluation.evaluated_run import METRICS, PREDICTIONS, Subject
from jobs.evaluation.result_files import DATA_FIGURE, REPORT, Judged, describe_faults, render
from jobs.evaluation.shown_studies import MAX_TOLD_AGE
from pneumo.config import Config
from pneumo.evaluation.decision_curve import THRESHOLDS
from pneumo.evaluation.evaluation import Evaluation, SplitEvaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.evaluation.predictions import Predictions
from pneumo.reporting.figures import case_pictures, data_charts, style
from pneumo.reporting.figures.case_pictures import Case, Pictures, shrink
from pneumo.reporting.page import DataFacts
from pneumo.reporting.tracking import (
    ConfusionChart,
    Gallery,
    LineChart,
    Overlay,
    Page,
    Picture,
    PictureTable,
    Scalar,
    Table,
    Tracker,
)
from pneumo.reporting.tracking.artifacts import describe_dataset, describe_results, describe_weights

LARGEST_PIXELS = 192
"""No picture of a study is higher in W&B."""
CAM_LEVELS: Mapping[int, str] = {1: "map ≥ 25 %", 2: "map ≥ 50 %", 3: "map ≥ 75 %"}
"""Classes of the mask: shares of the map's own maximum."""


def send_evaluation(
    tracker: Tracker, subject: Subject, judged: Judged, folder: Path, config: Config
) -> None:
    """All of it; `folder` holds what the run has. Pictures and ages are coarser than there."""
    tracker.log_artifact(describe_dataset(subject.manifest), role="input")
    for weights in subject.scored.scoring.weights:
        record = describe_weights(weights.entry, weights.run_url, subject.manifest)
        tracker.log_artifact(record, role="input")
    coarse = judged.shrink(LARGEST_PIXELS)
    report = render(subject, coarse, config)
    log_data(tracker, coarse.data, (folder / "figures" / DATA_FIGURE).read_bytes())
    log_evaluation(tracker, judged.evaluation, judged.saliency.get("test"))
    log_pictures(tracker, coarse.pictures, judged.evaluation)
    tracker.log_media("eval/report", Page(report))
    files: dict[str, Path | bytes] = {
        METRICS: folder / METRICS,
        PREDICTIONS: cap_ages(judged.evaluation.predictions).to_parquet(
            subject.scored.scoring.to_json()
        ),
        REPORT: report.encode(),
    }
    tracker.log_artifact(describe_results(subject.name, files))


def cap_ages(predictions: Predictions) -> Predictions:
    """The same with every age above MAX_TOLD_AGE told as 90."""
    age = predictions.age
    return replace(predictions, age=np.where(age > MAX_TOLD_AGE, MAX_TOLD_AGE + 1.0, age))


# --- the data ------------------------------------------------------------------------------------


def log_data(tracker: Tracker, data: DataFacts, drawing: bytes) -> None:
    """What the data hold: counts, drawing, contact sheets, and what is wrong with them."""
    tracker.summarise({f"data/{name}": value for name, value in describe_faults(data).items()})
    columns = ["property", "value", *(f"studies of {name}" for name in data.quality.splits)]
    tracker.log_media("data/counts", Table(columns, data.quality.rows()))
    tracker.log_media("data/quality", Gallery([Picture(drawing, "findings, ages, gray levels")]))
    sheets = [
        Picture(data_charts.draw_contact_sheet(sheet), sheet.caption) for sheet in data.contact
    ]
    if sheets:
        tracker.log_media("data/contact", Gallery(sheets))


# --- the numbers ---------------------------------------------------------------------------------


def log_evaluation(
    tracker: Tracker, evaluation: Evaluation, saliency: SaliencySummary | None
) -> None:
    """Headlines, curves, confusion matrices, subgroups, and the maps' scores."""
    tracker.summarise(_summarise(evaluation, saliency))
    for key, chart in _draw_charts(evaluation).items():
        if chart.series:
            tracker.log_media(f"eval/{key}", chart)
    for name in (DECISION, SCREENING):
        counts = evaluation.test.at[name].counts
        if counts is not None:
            title = f"Confusion at the {name} point, test, n = {evaluation.test.n}"
            key = "eval/confusion" if name == DECISION else f"eval/confusion_{name}"
            tracker.log_media(key, ConfusionChart(asdict(counts), title))
    tracker.log_media("eval/subgroups", _tabulate_subgroups(evaluation.test))


def _summarise(evaluation: Evaluation, saliency: SaliencySummary | None) -> dict[str, Scalar]:
    test = evaluation.test
    found = {
        "auroc": test.auroc,
        "average_precision": test.average_precision,
        **test.at[DECISION].rates,
        "brier": test.brier,
        "brier_calibrated": test.after.brier,
        "ece": test.before.ece,
        "ece_calibrated": test.after.ece,
        "calibration_slope": test.before.slope,
        "gain_over_view": test.view.gain,
        "gain_over_metadata": test.metadata.gain,
        "auroc_within_AP": test.view.within["AP"],
        "auroc_within_PA": test.view.within["PA"],
    }
    if saliency is not None and saliency.groups["all"].maps is not None:
        found["map_auprc"] = saliency.groups["all"].maps["cam"].auprc
        found["map_auprc_of_prior"] = saliency.groups["all"].maps["prior"].auprc
    ends: dict[str, Scalar] = {}
    for name, estimate in found.items():
        ends[f"eval/test/{name}"] = estimate.value
        ends[f"eval/test/{name}_low"] = estimate.low
        ends[f"eval/test/{name}_high"] = estimate.high
    return {
        **ends,
        "eval/test/n": test.n,
        "eval/test/positives": test.positives,
        "eval/threshold": evaluation.points[DECISION].threshold,
        "eval/worst_group": test.subgroups.worst.name,
    }


def _draw_charts(evaluation: Evaluation) -> dict[str, LineChart]:
    test, both = evaluation.test, (evaluation.val, evaluation.test)
    n = f"test n = {test.n}"
    roc = {p.split: (p.roc.x.tolist(), p.roc.y.tolist()) for p in both if p.roc is not None}
    precision = {
        p.split: (p.precision_recall.x.tolist(), p.precision_recall.y.tolist())
        for p in both
        if p.precision_recall is not None
    }
    if precision:
        precision["chance (prevalence of test)"] = ([0.0, 1.0], [test.prevalence] * 2)
    reliability = {
        name: (
            [part.predicted for part in found.curve if part.observed.value is not None],
            [part.observed.value for part in found.curve if part.observed.value is not None],
        )
        for name, found in (("as the network says", test.before), ("calibrated", test.after))
        if found.curve
    }
    return {
        "roc": LineChart(roc, f"ROC, {n}", "1 - specificity", "sensitivity"),
        "precision_recall": LineChart(
            precision, f"Precision-recall, {n}", "recall (sensitivity)", "precision (PPV)"
        ),
        "reliability": LineChart(
            reliability, f"Calibration, {n}", "predicted probability", "share of positives"
        ),
        "decision_curve": LineChart(
            _trace_benefit(test), f"Net benefit, {n}", "threshold", "true positives a study, net"
        ),
    }


def _trace_benefit(test: SplitEvaluation) -> dict[str, tuple[list[float], list[float]]]:
    curve = test.decision_curve
    if curve.reason is not None:
        return {}
    thresholds = list(THRESHOLDS)
    known = [(t, one.value) for t, one in zip(thresholds, curve.model, strict=True)]
    return {
        "model": ([t for t, y in known if y is not None], [y for _, y in known if y is not None]),
        "act on all": (thresholds, list(curve.treat_all)),
        "act on nobody": (thresholds, [0.0] * len(thresholds)),
    }


def _tabulate_subgroups(test: SplitEvaluation) -> Table:
    groups = test.subgroups.groups
    names = [name for group in groups[:1] for name in group.estimates]
    ends = [column for name in names for column in (name, f"{name} low", f"{name} high")]
    rows = [
        [
            *(group.by, group.name, group.n, group.positives, group.patients),
            *(end for one in group.estimates.values() for end in (one.value, one.low, one.high)),
            group.auroc.reason,
        ]
        for group in groups
    ]
    return Table(["by", "group", "n", "positives", "patients", *ends, "why not known"], rows)


# --- the pictures --------------------------------------------------------------------------------


def log_pictures(tracker: Tracker, pictures: Pictures, evaluation: Evaluation) -> None:
    """Galleries and errors with boxes and maps as overlays, the grid, and a table of studies."""
    kinds = (("gallery", pictures.gallery), ("errors", pictures.errors))
    for kind, groups in kinds:
        for outcome, cases in groups.items():
            if cases:
                shown = [show_case(case) for case in cases]
                tracker.log_media(f"eval/{kind}/{outcome}", Gallery(shown))
    if pictures.grid:
        title = f"Predictions: {len(pictures.grid)} of {evaluation.test.n} test studies"
        drawn = Picture(case_pictures.draw_prediction_grid(pictures.grid, title=title), title)
        tracker.log_media("eval/prediction_grid", Gallery([drawn]))
    table = tabulate_cases(pictures)
    if table.rows:
        tracker.log_media("eval/predictions", table)
    tracker.summarise({"eval/not_shown": pictures.reason})


def show_case(case: Case) -> Picture:
    """The study with the readers' boxes and the network's map as overlays."""
    has_map = case.cam is not None and bool(np.isfinite(case.cam).all())
    overlay = Overlay(_level(case), dict(CAM_LEVELS), "Grad-CAM") if has_map else None
    caption = f"{case.outcome.upper()}  {case.caption}"
    return Picture(style.encode_image(case.image), caption, case.boxes, mask=overlay)


def _level(case: Case) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The map's level at each pixel, 0 to 3: (H, W) uint8."""
    assert case.cam is not None
    rows, columns = (
        (np.arange(shown) * given // shown)
        for shown, given in zip(case.image.shape, case.cam.shape, strict=True)
    )
    return np.digitize(case.cam[np.ix_(rows, columns)], [0.25, 0.5, 0.75]).astype(np.uint8)


def tabulate_cases(pictures: Pictures) -> PictureTable:
    """A sample of test with thumbnails and without a key, so many of each outcome and view; a row
    stands for 1 / (rows of its outcome and view) of the studies `drawn of`."""
    columns = ["picture", "outcome", "label", "probability", "threshold", "finding", "view",
               "age band", "boxes", "drawn of"]  # fmt: skip
    rows: list[list[Picture | Scalar]] = [
        [
            show_case(shrink(case, data_charts.CONTACT_PIXELS)),
            *(case.outcome, case.target, case.probability, case.threshold),
            *(case.finding, case.view or None, case.age_band or None),
            *(len(case.boxes), case.drawn_of),
        ]
        for case in pictures.sample
    ]
    return PictureTable(columns, rows)
