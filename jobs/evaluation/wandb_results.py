"""What W&B gets of an evaluation.

The numbers are those of metrics.json. The pictures are smaller than the run's own, so the
evaluation writes them for W&B, to `<run>/tracking/`.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.evaluation.evaluated_run import METRICS, PREDICTIONS, EvaluatedRun
from jobs.evaluation.result_files import DATA_FIGURE, REPORT, Results
from jobs.evaluation.shown_studies import MAX_EXACT_AGE
from jobs.evaluation.wandb_pictures import list_pictures, read_pictures
from pneumo.config import TrackingConfig
from pneumo.dataset.study_table import encode_parquet
from pneumo.evaluation.comparison import COMPARED
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.reporting.page.page import render_report
from pneumo.reporting.tracking import artifacts, media, tracked_run
from pneumo.reporting.tracking.media import LineChart, Media, Scalar, Table
from pneumo.reporting.tracking.tracked_run import FOLDER, TrackedRun

LARGEST_PIXELS = 192
"""Height of a study's picture in W&B, at most."""
_RECORD, _PICTURES = "evaluation.json", "pictures.parquet"
_FILES = (METRICS, f"{FOLDER}/{_RECORD}", f"{FOLDER}/{_PICTURES}", f"{FOLDER}/{REPORT}",
          PREDICTIONS, f"figures/{DATA_FIGURE}")  # fmt: skip
"""What W&B gets, below the run."""
_DATA_FAULTS = (
    "quarantined", "duplicates_across_splits", "duplicates_across_patients", "warning", "phantoms",
)  # fmt: skip
_RANKED = ("auroc", "average_precision", "sensitivity_at_specificity_90", "brier", "log_loss")
_CALIBRATION = {
    "brier": "brier",
    "log_loss": "log_loss",
    "ece": "ece",
    "calibration_slope": "slope",
    "calibration_intercept": "intercept",
    "predicted_minus_observed": "in_the_large",
}


def write_tracking(
    folder: Path,
    run: EvaluatedRun,
    results: Results,
    report: Mapping[str, Any],
    tracking: TrackingConfig,
) -> None:
    """Write to `folder` what W&B gets besides the run's own files, with the page of `report`; no
    study's picture in it is higher than LARGEST_PIXELS."""
    folder.mkdir(exist_ok=True)
    pictures, quality = results.pictures.shrink(LARGEST_PIXELS), results.data.quality
    record = {
        "tracking": tracking.model_dump(exclude_unset=True),
        "models": [
            artifacts.record_checkpoint(checkpoint.run_url, checkpoint.entry, run.manifest.digest)
            for checkpoint in run.scored.scoring.checkpoints
        ],
        "counts": {
            "columns": ["property", "value", *(f"studies of {name}" for name in quality.splits)],
            "rows": quality.rows(),
        },
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1))
    (folder / REPORT).write_text(render_report(report, pictures))
    pq.write_table(list_pictures(replace(results, pictures=pictures)), folder / _PICTURES)


def read_evaluation(run_url: str) -> TrackedRun | None:
    """The evaluation in the run's folder; None where there is none.

    Its id depends on its numbers and pictures: a repeated evaluation is another W&B run. Raises
    TrackingError where a part of it is missing.
    """
    contents = tracked_run.read_files(run_url, *_FILES)
    if contents is None:
        return None
    metrics_json, record_json, pictures, report, predictions, drawing = contents
    metrics, record = json.loads(metrics_json), json.loads(record_json)
    models, manifest = record["models"], tracked_run.read_dataset(run_url)
    name, trained = tracked_run.make_run_id(run_url), tracked_run.read_config(run_url)
    tracking = tracked_run.choose_tracking(trained, record["tracking"])
    files = {METRICS: metrics_json, PREDICTIONS: cap_ages(predictions), REPORT: report}
    digest = hashlib.sha256(metrics_json + pictures).hexdigest()
    datasets = [] if manifest is None else [artifacts.describe_dataset(manifest)]
    return TrackedRun(
        id=f"{name}-evaluate-{digest[:8]}",
        name=f"{name}-evaluate",
        group=tracking.group or name,
        job_type="evaluate",
        tracking=tracking,
        config={
            **({} if trained is None else trained.without_paths()),
            "evaluate": metrics["evaluation"],
            **tracked_run.describe_store(manifest),
            "checkpoint_sha256": " ".join(model["sha256"] for model in models),
        },
        summary=summarise(metrics),
        media={
            "data/counts": Table(**record["counts"]),
            "data/quality": media.Gallery([media.Picture(drawing, "findings, ages, gray levels")]),
            **draw_charts(metrics),
            "eval/subgroups": tabulate_subgroups(metrics["test"]["subgroups"]["groups"]),
            **read_pictures(pictures),
            "eval/report": media.Page(report.decode()),
        },
        inputs=[*datasets, *map(artifacts.describe_checkpoint, models)],
        outputs=[media.Artifact(f"evaluation-{name}", "evaluation", files)],
    )


def cap_ages(predictions: bytes) -> bytes:
    """The table with every age above MAX_EXACT_AGE given as 90."""
    table = pq.read_table(io.BytesIO(predictions))
    age, at = table["age"], table.schema.get_field_index("age")
    capped = pc.if_else(pc.greater(age, MAX_EXACT_AGE), MAX_EXACT_AGE + 1.0, age)
    return encode_parquet(table.set_column(at, table.schema.field(at), capped))


def summarise(metrics: Mapping[str, Any]) -> dict[str, Scalar]:
    """The headlines of test and val with their intervals, the comparison with another run, and what
    is wrong with the data."""
    test, dataset = metrics["test"], metrics["dataset"]
    found: dict[str, Scalar] = {f"data/{name}": dataset.get(name) for name in _DATA_FAULTS}
    for name, one in _name_estimates(metrics).items():
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            found[f"eval/{name}{suffix}"] = one.get(end)
    for name, one in (metrics.get("members") or {}).items():
        if isinstance(one, dict):
            for end in ("mean", "standard_deviation"):
                found[f"eval/members/{name}_{end}"] = one[end]
    worst, comparison = test["subgroups"]["worst"] or {}, metrics.get("comparison") or {}
    delong = comparison.get("test", {}).get("auroc_delong_clustered", {})
    found |= {
        "eval/test/n": test["n"],
        "eval/test/positives": test["positives"],
        "eval/threshold": metrics["operating_points"][DECISION]["threshold"],
        "eval/worst_group": worst.get("name"),
        "eval/worst_group_measure": worst.get("measure"),
        "eval/worst_group_shown": worst.get("shown"),
        "eval/compared_with": comparison.get("second"),
        "eval/compared_p_value": delong.get("p_value"),
        "eval/not_shown": test.get("errors_by_finding_reason"),
    }
    return tracked_run.drop_none(found)


def _name_estimates(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The estimates of the summary: of test and val, of the errors by finding, of the difference to
    another run."""
    test = metrics["test"]
    of_test = {
        **_list_estimates(metrics, "test"),
        "gain_over_view": test["view"]["gain"],
        "gain_over_metadata": test["metadata"]["gain"],
        "auroc_within_AP": test["view"]["auroc_within_AP"],
        "auroc_within_PA": test["view"]["auroc_within_PA"],
    }
    if maps := ((test["saliency"] or {}).get("all") or {}).get("maps"):
        of_test |= {"map_auprc": maps["cam"]["auprc"], "map_auprc_of_prior": maps["prior"]["auprc"]}
    named = {f"test/{name}": one for name, one in of_test.items()}
    named |= {f"val/{name}": one for name, one in _list_estimates(metrics, "val").items()}
    for finding, errors in (test.get("errors_by_finding") or {}).items():
        named[f"test/error_rate/{finding}"] = errors["error_rate"]
    compared = (metrics.get("comparison") or {}).get("test", {})
    for name in COMPARED:
        if name in compared:
            named[f"test/{name}_difference"] = compared[name]["difference"]
    return named


def _list_estimates(metrics: Mapping[str, Any], split: str) -> dict[str, Mapping[str, Any]]:
    """Estimates of one split by name: ranking, both operating points, calibration."""
    found = metrics[split]
    points = metrics["operating_points"]
    named = {name: found[name] for name in _RANKED if name in found}
    for point, suffix in ((DECISION, ""), (SCREENING, f"_{SCREENING}")):
        rates = points[point][split].items()
        named |= {f"{name}{suffix}": one for name, one in rates if _is_estimate(one)}
    for when, suffix in (("before", ""), ("after", "_calibrated")):
        measured = found["calibration"][when]
        named |= {
            f"{name}{suffix}": measured[key]
            for name, key in _CALIBRATION.items()
            if (when, name) not in (("before", "brier"), ("before", "log_loss"))
        }
    return named


def _is_estimate(value: object) -> bool:
    return isinstance(value, dict) and "value" in value


def draw_charts(metrics: Mapping[str, Any]) -> dict[str, Media]:
    """Curves and confusion matrices; undefined ones are left out."""
    test = metrics["test"]
    n = f"test n = {test['n']}"
    roc, precision_recall = (_read_curves(metrics, name) for name in ("roc", "precision_recall"))
    if roc:
        roc["chance"] = ([0.0, 1.0], [0.0, 1.0])
    if precision_recall:
        prevalence = test["positives"] / max(test["n"], 1)
        precision_recall["chance (prevalence of test)"] = ([0.0, 1.0], [prevalence] * 2)
    calibration = _read_reliability(test["calibration"])
    benefit = _read_benefit(test["decision_curve"])
    recall, precision = "recall (sensitivity)", "precision (PPV)"
    net_benefit = "net benefit (true positives per study)"
    charts = {
        "roc": (roc, "ROC", "1 - specificity", "sensitivity"),
        "precision_recall": (precision_recall, "Precision-recall", recall, precision),
        "reliability": (calibration, "Calibration", "predicted probability", "observed fraction"),
        "decision_curve": (benefit, "Decision curve", "threshold", net_benefit),
    }
    drawn: dict[str, Media] = {
        f"eval/{name}": LineChart(curves, f"{title}, {n}", x, y)
        for name, (curves, title, x, y) in charts.items()
        if curves
    }
    for name, key in ((DECISION, "eval/confusion"), (SCREENING, f"eval/confusion_{SCREENING}")):
        counts = metrics["operating_points"][name]["test"]["confusion"]
        if counts is not None:
            drawn[key] = media.ConfusionChart(counts, f"Confusion at the {name} point, {n}")
    return drawn


Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


def _read_curves(metrics: Mapping[str, Any], name: str) -> Curves:
    both = (("val (chosen on it)", metrics["val"][name]), ("test", metrics["test"][name]))
    return {split: (curve["x"], curve["y"]) for split, curve in both if curve is not None}


def _read_reliability(calibration: Mapping[str, Any]) -> Curves:
    curves: Curves = {}
    for key, name in (("before", "as the network says"), ("after", "calibrated")):
        bins = [one for one in calibration[key]["curve"] if one["observed"]["value"] is not None]
        if bins:
            observed = [one["observed"]["value"] for one in bins]
            curves[name] = ([one["predicted"] for one in bins], observed)
        if smooth := calibration[key].get("smooth"):
            curves[f"{name}, smoothed"] = (smooth["predicted"], smooth["observed"])
    return curves


def _read_benefit(curve: Mapping[str, Any]) -> Curves:
    thresholds = curve["threshold"]
    if thresholds is None:
        return {}
    known = [(t, y) for t, y in zip(thresholds, curve["model"], strict=True) if y is not None]
    return {
        "model": ([t for t, _ in known], [y for _, y in known]),
        "act on all": (thresholds, curve["treat_all"]),
        "act on nobody": (thresholds, [0.0] * len(thresholds)),
    }


def tabulate_subgroups(groups: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each subgroup: its size, its estimates with intervals, and why one is unknown."""
    names = [name for group in groups[:1] for name, one in group.items() if _is_estimate(one)]
    ends = [column for name in names for column in (name, f"{name} low", f"{name} high")]
    rows = [
        [
            *(group[key] for key in ("by", "name", "n", "positives", "patients")),
            *(group[name].get(end) for name in names for end in ("value", "low", "high")),
            group["auroc"].get("reason"),
        ]
        for group in groups
    ]
    return Table(["by", "group", "n", "positives", "patients", *ends, "why not known"], rows)
