"""What W&B is told of an evaluation.

Its numbers are those of metrics.json. Its pictures are coarser than the run's own, so the
evaluation leaves W&B's beside them, in `<run>/tracking/`.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from jobs.evaluation.evaluated_run import METRICS, PREDICTIONS, Subject
from jobs.evaluation.result_files import DATA_FIGURE, REPORT, Results, render
from jobs.evaluation.shown_studies import MAX_TOLD_AGE
from pneumo import storage
from pneumo.config import Config, TrackingConfig
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.reporting.figures import case_pictures, data_charts, style
from pneumo.reporting.figures.case_pictures import Case, shrink
from pneumo.reporting.tracking import (
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    Media,
    Overlay,
    Page,
    Picture,
    Scalar,
    Table,
    TrackedRun,
    name_run,
)
from pneumo.reporting.tracking.artifacts import describe_dataset, describe_weights, record_weights
from pneumo.reporting.tracking.tracked_run import (
    FOLDER,
    describe_store,
    read_config,
    read_dataset,
)

LARGEST_PIXELS = 192
"""No picture of a study is higher in W&B."""
CAM_LEVELS: Mapping[int, str] = {1: "map ≥ 25 %", 2: "map ≥ 50 %", 3: "map ≥ 75 %"}
"""Classes of the mask: fractions of the map's own maximum."""
STUDIES = "eval/predictions"
_RECORD, _PICTURES = "evaluation.json", "pictures.parquet"
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
_COLUMNS = ("outcome", "label", "probability", "threshold", "finding", "view", "age band", "boxes",
            "drawn of")  # fmt: skip

_SCHEMA = pa.schema(
    {
        "key": pa.string(),  # under which W&B shows it
        "caption": pa.string(),
        "picture": pa.binary(),
        "boxes": pa.list_(pa.list_(pa.float64())),
        "map": pa.binary(),
        "cells": pa.string(),  # of the table of studies, the other cells as JSON
    }
)

# --- left in the folder ---------------------------------------------------------------------------


def write_tracking(folder: Path, subject: Subject, results: Results, config: Config) -> None:
    """Leave in `folder` what W&B gets besides the run's own files: no study's picture in it is
    higher than LARGEST_PIXELS."""
    folder.mkdir(exist_ok=True)
    coarse, quality = results.shrink(LARGEST_PIXELS), results.data.quality
    record = {
        "tracking": config.tracking.model_dump(mode="json"),
        "models": [
            record_weights(weights.run_url, weights.entry, subject.manifest.digest)
            for weights in subject.scored.scoring.weights
        ],
        "counts": {
            "columns": ["property", "value", *(f"studies of {name}" for name in quality.splits)],
            "rows": quality.rows(),
        },
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1))
    (folder / REPORT).write_text(render(subject, coarse, config))
    pq.write_table(_list_pictures(coarse), folder / _PICTURES)


def _list_pictures(results: Results) -> pa.Table:
    """A row of _SCHEMA a picture."""
    pictures, n = results.pictures, results.evaluation.test.n
    rows = [
        _describe("data/contact", Picture(data_charts.draw_contact_sheet(sheet), sheet.caption))
        for sheet in results.data.contact
    ]
    if pictures.grid:
        title = f"Predictions: {len(pictures.grid)} of {n} test studies"
        grid = case_pictures.draw_prediction_grid(pictures.grid, title=title)
        rows.append(_describe("eval/prediction_grid", Picture(grid, title)))
    for kind, groups in (("gallery", pictures.gallery), ("errors", pictures.errors)):
        for outcome, cases in groups.items():
            rows += [_describe(f"eval/{kind}/{outcome}", show_case(case)) for case in cases]
    for case in pictures.sample:
        thumbnail = show_case(shrink(case, data_charts.CONTACT_PIXELS))
        rows.append(_describe(STUDIES, thumbnail, json.dumps(_list_cells(case))))
    return pa.Table.from_pylist(rows, _SCHEMA)


def _describe(key: str, picture: Picture, cells: str | None = None) -> dict[str, Any]:
    return {
        "key": key,
        "caption": picture.caption,
        "picture": picture.data,
        "boxes": [list(box) for box in picture.boxes],
        "map": picture.mask and picture.mask.classes,
        "cells": cells,
    }


def show_case(case: Case) -> Picture:
    """The study with the readers' boxes and the network's map as overlays."""
    has_map = case.cam is not None and bool(np.isfinite(case.cam).all())
    overlay = Overlay(_draw_levels(case), CAM_LEVELS, "Grad-CAM") if has_map else None
    caption = f"{case.outcome.upper()}  {case.caption}"
    return Picture(style.encode_image(case.image), caption, case.boxes, mask=overlay)


def _draw_levels(case: Case) -> bytes:
    """The map's level at each pixel, 0 to 3, as a gray PNG of the picture's size."""
    assert case.cam is not None
    rows, columns = (
        (np.arange(shown) * given // shown)
        for shown, given in zip(case.image.shape, case.cam.shape, strict=True)
    )
    levels = np.digitize(case.cam[np.ix_(rows, columns)], [0.25, 0.5, 0.75]).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def _list_cells(case: Case) -> list[Scalar]:
    """_COLUMNS; no key. A row stands for 1 / (rows of its outcome and view) of those `drawn of`."""
    return [
        *(case.outcome, case.target, case.probability, case.threshold),
        *(case.finding, case.view or None, case.age_band or None),
        *(len(case.boxes), case.drawn_of),
    ]


# --- read from the folder -------------------------------------------------------------------------


def read_evaluation(run_url: str) -> TrackedRun | None:
    """The evaluation in the run's folder; None where there is none, or one of an older version.

    Its id changes with its numbers and pictures: an evaluation that is done again is another run.
    """
    try:
        texts = [storage.read_bytes(storage.join(run_url, name)) for name in (
            METRICS, f"{FOLDER}/{_RECORD}", f"{FOLDER}/{_PICTURES}", f"{FOLDER}/{REPORT}",
            PREDICTIONS, f"figures/{DATA_FIGURE}",
        )]  # fmt: skip
    except FileNotFoundError:
        return None
    metrics_json, record_json, pictures, report, predictions, drawing = texts
    metrics, record = json.loads(metrics_json), json.loads(record_json)
    name, trained = name_run(run_url), read_config(run_url)
    tracking, manifest = TrackingConfig.model_validate(record["tracking"]), read_dataset(run_url)
    files = {METRICS: metrics_json, PREDICTIONS: cap_ages(predictions), REPORT: report}
    digest = hashlib.sha256(metrics_json + pictures).hexdigest()
    quality = Gallery([Picture(drawing, "findings, ages, gray levels")])
    return TrackedRun(
        id=f"{name}-evaluate-{digest[:8]}",
        name=f"{name}-evaluate",
        group=tracking.group or name,
        job_type="evaluate",
        tracking=tracking,
        config={
            **({} if trained is None else trained.without_paths()),
            "evaluate": metrics["evaluation"],
            **describe_store(manifest),
            "checkpoint_sha256": " ".join(model["sha256"] for model in record["models"]),
        },
        summary=summarise(metrics),
        media={
            "data/counts": Table(**record["counts"]),
            "data/quality": quality,
            **draw_charts(metrics),
            "eval/subgroups": tabulate_subgroups(metrics["test"]["subgroups"]["groups"]),
            **read_pictures(pictures),
            "eval/report": Page(report.decode()),
        },
        inputs=[
            *([] if manifest is None else [describe_dataset(manifest)]),
            *(describe_weights(model) for model in record["models"]),
        ],
        outputs=[Artifact(f"evaluation-{name}", "evaluation", files)],
    )


def cap_ages(predictions: bytes) -> bytes:
    """The table with every age above MAX_TOLD_AGE told as 90."""
    table = pq.read_table(io.BytesIO(predictions))
    age, at = table["age"], table.schema.get_field_index("age")
    capped = pc.if_else(pc.greater(age, MAX_TOLD_AGE), MAX_TOLD_AGE + 1.0, age)
    buffer = io.BytesIO()
    pq.write_table(table.set_column(at, table.schema.field(at), capped), buffer)
    return buffer.getvalue()


def summarise(metrics: Mapping[str, Any]) -> dict[str, Scalar]:
    """The headlines of test and val with their intervals, the comparison with another run, and what
    is wrong with the data."""
    test, dataset = metrics["test"], metrics["dataset"]
    found = {
        **_list_estimates(metrics, "test"),
        "gain_over_view": test["view"]["gain"],
        "gain_over_metadata": test["metadata"]["gain"],
        "auroc_within_AP": test["view"]["auroc_within_AP"],
        "auroc_within_PA": test["view"]["auroc_within_PA"],
    }
    if maps := ((test["saliency"] or {}).get("all") or {}).get("maps"):
        found |= {"map_auprc": maps["cam"]["auprc"], "map_auprc_of_prior": maps["prior"]["auprc"]}
    told: dict[str, Scalar] = {f"data/{name}": dataset.get(name) for name in _DATA_FAULTS}
    named = {f"test/{name}": one for name, one in found.items()}
    named |= {f"val/{name}": one for name, one in _list_estimates(metrics, "val").items()}
    for finding, errors in (test.get("errors_by_finding") or {}).items():
        named[f"test/error_rate/{finding}"] = errors["error_rate"]
    compared = (metrics.get("comparison") or {}).get("test", {})
    for name in ("auroc", "average_precision", "brier"):
        if name in compared:
            named[f"test/{name}_difference"] = compared[name]["difference"]
    for name, one in named.items():
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            told[f"eval/{name}{suffix}"] = one.get(end)
    for name, one in (metrics.get("members") or {}).items():
        if isinstance(one, dict):
            for end in ("mean", "standard_deviation"):
                told[f"eval/members/{name}_{end}"] = one[end]
    worst = test["subgroups"]["worst"] or {}
    told |= {
        "eval/test/n": test["n"],
        "eval/test/positives": test["positives"],
        "eval/threshold": metrics["operating_points"][DECISION]["threshold"],
        "eval/worst_group": worst.get("name"),
        "eval/worst_group_measure": worst.get("measure"),
        "eval/worst_group_shown": worst.get("shown"),
        "eval/compared_with": (metrics.get("comparison") or {}).get("second"),
        "eval/compared_p_value": compared.get("auroc_delong_clustered", {}).get("p_value"),
        "eval/not_shown": test.get("errors_by_finding_reason"),
    }
    return {name: value for name, value in told.items() if value is not None}


def _list_estimates(metrics: Mapping[str, Any], split: str) -> dict[str, Mapping[str, Any]]:
    """Of one split, by name: ranking, both operating points, calibration."""
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
    """Curves and confusion matrices, without those that are not defined."""
    test = metrics["test"]
    n = f"test n = {test['n']}"
    calibration = _read_reliability(test["calibration"])
    benefit = _read_benefit(test["decision_curve"])
    recall, precision = "recall (sensitivity)", "precision (PPV)"
    worth = "net benefit (true positives per study)"
    charts = {
        "roc": (_read_roc(metrics), "ROC", "1 - specificity", "sensitivity"),
        "precision_recall": (_read_precision(metrics), "Precision-recall", recall, precision),
        "reliability": (calibration, "Calibration", "predicted probability", "observed fraction"),
        "decision_curve": (benefit, "Decision curve", "threshold", worth),
    }
    drawn: dict[str, Media] = {
        f"eval/{name}": LineChart(curves, f"{title}, {n}", x, y)
        for name, (curves, title, x, y) in charts.items()
        if curves
    }
    for name, key in ((DECISION, "eval/confusion"), (SCREENING, f"eval/confusion_{SCREENING}")):
        counts = metrics["operating_points"][name]["test"]["confusion"]
        if counts is not None:
            drawn[key] = ConfusionChart(counts, f"Confusion at the {name} point, {n}")
    return drawn


Curves = dict[str, tuple[Sequence[float], Sequence[float]]]


def _read_curves(metrics: Mapping[str, Any], name: str) -> Curves:
    both = (("val (chosen on it)", metrics["val"][name]), ("test", metrics["test"][name]))
    return {split: (curve["x"], curve["y"]) for split, curve in both if curve is not None}


def _read_roc(metrics: Mapping[str, Any]) -> Curves:
    curves = _read_curves(metrics, "roc")
    return {**curves, "chance": ([0.0, 1.0], [0.0, 1.0])} if curves else {}


def _read_precision(metrics: Mapping[str, Any]) -> Curves:
    curves, test = _read_curves(metrics, "precision_recall"), metrics["test"]
    if not curves:
        return {}
    prevalence = test["positives"] / max(test["n"], 1)
    return {**curves, "chance (prevalence of test)": ([0.0, 1.0], [prevalence] * 2)}


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
    """A row a subgroup: its size, its estimates with their intervals, and why one is unknown."""
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


def read_pictures(data: bytes) -> dict[str, Media]:
    """The galleries by key, and the table of studies with thumbnails."""
    galleries: dict[str, list[Picture]] = {}
    studies: list[list[Picture | Scalar]] = []
    for row in pq.read_table(io.BytesIO(data)).to_pylist():
        mask = Overlay(row["map"], CAM_LEVELS, "Grad-CAM") if row["map"] else None
        picture = Picture(
            row["picture"], row["caption"], [tuple(b) for b in row["boxes"]], mask=mask
        )
        if row["key"] == STUDIES:
            studies.append([picture, *json.loads(row["cells"])])
        else:
            galleries.setdefault(row["key"], []).append(picture)
    shown: dict[str, Media] = {key: Gallery(found) for key, found in galleries.items()}
    return shown | ({STUDIES: Table(["picture", *_COLUMNS], studies)} if studies else {})
