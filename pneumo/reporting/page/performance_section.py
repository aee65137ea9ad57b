"""How good, at what threshold, against what: the tables of numbers, for the template."""

import statistics
from typing import Any

import numpy as np

from pneumo.evaluation.baselines import Baseline, ViewBaseline
from pneumo.evaluation.bootstrap import MIN_INDEPENDENT
from pneumo.evaluation.calibration import Calibration
from pneumo.evaluation.comparison import COMPARED, ComparedRuns
from pneumo.evaluation.decision_curve import THRESHOLDS, DecisionCurve
from pneumo.evaluation.delong import PairedTest
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.evaluation.operating_points import DECISION, SCREENING, STANDARD, OperatingPoint
from pneumo.evaluation.reliability import Reliability
from pneumo.reporting.figures import charts, style
from pneumo.reporting.page.formatting import Cell, Row, decimal, p_value

_RANKING_ROWS = (
    ("AUROC", "chance that a positive scores above a negative; 0.5 is a coin", "auroc"),
    ("Average precision", "mean precision over the positives", "average_precision"),
    (
        "Sensitivity at a specificity of 0.90",
        "read off the split's own ROC curve, whatever the threshold",
        "sensitivity_at_specificity_90",
    ),
)
_RATE_ROWS = (
    ("Accuracy", "fraction of studies called right", "accuracy"),
    ("Precision (PPV)", "fraction of positive calls that are right", "precision"),
    ("Recall (sensitivity)", "fraction of positives found", "recall"),
    ("Specificity", "fraction of negatives cleared", "specificity"),
    ("NPV", "fraction of negative calls that are right", "npv"),
    ("F1", "harmonic mean of precision and recall", "f1"),
    ("MCC", "correlation of call and label; 0 is a guess, 1 is right throughout", "mcc"),
    ("Balanced accuracy", "mean of sensitivity and specificity", "balanced_accuracy"),
    ("Likelihood ratio +", "sensitivity / (1 − specificity)", "lr_positive"),
    ("Likelihood ratio −", "(1 − sensitivity) / specificity", "lr_negative"),
)
_RELIABILITY_ROWS = (
    ("Brier score", "mean squared error of the probability; lower is better", "brier"),
    ("Log loss", "surprise in nats; lower is better", "log_loss"),
    ("Calibration error", "mean distance of predicted and observed over the bins", "ece"),
    ("Slope", "1 is right; below 1 the probabilities are too extreme", "slope"),
    ("Calibration intercept", "of the same fit as the slope; 0 is right", "intercept"),
    (
        "Calibration intercept at slope 1",
        "log odds; 0 is right, below 0 the probabilities are too high",
        "intercept_at_slope_1",
    ),
    ("Mean predicted − observed risk", "0 is right, above 0 too high", "in_the_large"),
)
_SIGNED = ("intercept", "intercept_at_slope_1", "in_the_large")
_COMPARED_NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "brier": "Brier score, calibrated (lower is better)",
}
SHOWN_THRESHOLDS = (0.05, 0.10, 0.20, 0.30, 0.40, 0.50)


def headline_rows(evaluation: Evaluation) -> list[Row]:
    """What needs no threshold of val, then the decision point."""
    val, test = evaluation.val, evaluation.test
    ranking = [
        Row.of(name, meaning, getattr(test, key), getattr(val, key))
        for name, meaning, key in _RANKING_ROWS
    ]
    at_point = [
        Row.of(name, meaning, test.at[DECISION].rates[key], val.at[DECISION].rates[key])
        for name, meaning, key in _RATE_ROWS
    ]
    return [*ranking, *at_point]


def describe_members(members: MemberSpread | None) -> dict[str, Any] | None:
    """Each run of an ensemble alone, for the template; None where there is but one."""
    if members is None or not members.values:
        return None
    names = {key: name for name, _, key in (*_RANKING_ROWS, *_RATE_ROWS)}
    return {
        "sentence": tell_members(members),
        "runs": members.runs,
        "rows": [
            {
                "name": names[key],
                "cells": [decimal(value) for value in values],
                "mean": decimal(statistics.mean(values)),
                "spread": decimal(statistics.stdev(values)),
            }
            for key, values in members.values.items()
        ],
    }


def tell_members(members: MemberSpread) -> str:
    """What the spread of the runs is one of."""
    number = len(members.runs)
    if members.is_of_seeds:
        return (
            f"The {number} runs differ in their seed alone. Their standard deviation is that "
            "between seeds, which the intervals above do not hold."
        )
    if not members.differ_in:
        return f"The {number} runs have one setting and one seed, so they show no spread of seeds."
    return (
        f"The {number} runs differ in {', '.join(members.differ_in)}, so their standard deviation "
        "is not that between seeds."
    )


# --- thresholds ----------------------------------------------------------------------------------


def describe_point(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The confusion matrix at an operating point, with fractions of its rows."""
    point, at_test = evaluation.points[name], evaluation.test.at[name]
    described: dict[str, Any] = {
        "name": name.capitalize(),
        "rule": point.rule,
        "threshold": None if point.threshold is None else style.show_threshold(point.threshold),
        "calibrated": _show_calibrated(evaluation, point),
        "reason": at_test.rates["accuracy"].reason,
        "cells": None,
    }
    if at_test.counts is not None:
        table = charts.confusion_table(at_test.counts)
        fraction = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        described["cells"] = [
            [(int(table[i, j]), float(fraction[i, j])) for j in (0, 1)] for i in (0, 1)
        ]
    return described


def _show_calibrated(evaluation: Evaluation, point: OperatingPoint) -> str:
    risk = evaluation.calibrate(point.logit)
    return "" if risk is None else style.show_threshold(risk)


def describe_points(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every operating point once: what it is used for, its threshold, its rates on test.

    The configured points mostly are standard ones by another name, and then share a row.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in (DECISION, SCREENING, *STANDARD):
        point = evaluation.points[name]
        row = rows.setdefault(point.rule, _describe_rates(evaluation, point))
        if name in (DECISION, SCREENING):
            row["uses"].append(name)
    return list(rows.values())


def _describe_rates(evaluation: Evaluation, point: OperatingPoint) -> dict[str, Any]:
    at = evaluation.test.at[point.name]
    names = ("recall", "specificity", "precision", "npv")
    return {
        "rule": point.rule,
        "uses": [],
        "threshold": None if point.threshold is None else style.show_threshold(point.threshold),
        "calibrated": _show_calibrated(evaluation, point),
        "reason": point.reason or at.rates["accuracy"].reason,
        "rates": [(Cell.of(at.rates[key], 2), Cell.of(at.wilson[key], 2)) for key in names],
    }


def describe_prevalences(evaluation: Evaluation) -> list[dict[str, Any]]:
    """PPV and NPV at each prevalence, at the decision and the screening point, on test."""
    columns = [evaluation.test.at[name].at_prevalence for name in (DECISION, SCREENING)]
    return [
        {
            "prevalence": f"{100 * found[0].prevalence:g}\N{NO-BREAK SPACE}%",
            "cells": [Cell.of(one, 2) for point in found for one in (point.ppv, point.npv)],
        }
        for found in zip(*columns, strict=True)
    ]


# --- calibration ---------------------------------------------------------------------------------


def describe_calibration(evaluation: Evaluation) -> dict[str, Any]:
    """How the probabilities were mended on val, and test before and after."""
    test = evaluation.test
    rows = [
        {
            "name": name,
            "meaning": meaning,
            "cells": [_cell_of(found, key) for found in (test.before, test.after)],
        }
        for name, meaning, key in _RELIABILITY_ROWS
    ]
    return {"sentence": tell_calibration(evaluation.calibration), "rows": rows}


def _cell_of(found: Reliability, key: str) -> Cell:
    estimate = getattr(found, key)
    if key != "ece" or found.ece_if_calibrated is None:
        return Cell.of(estimate, signed=key in _SIGNED)
    told = f"{decimal(found.ece_if_calibrated)} on average if calibrated"
    return Cell(Cell.of(estimate).value, reason=told)


def tell_calibration(calibration: Calibration) -> str:
    """Which scaling is used, and why, in words."""
    chosen = calibration.chosen
    if chosen is None:
        return f"No calibration could be fitted: {calibration.reason}."
    if chosen.method == "none":
        return (
            "The probabilities are the network's own: neither temperature nor Platt's scaling had "
            "a cross-validated log loss on val that was lower by more than one standard error."
        )
    how = f"temperature scaling (T = {1 / chosen.slope:.2f})"
    if chosen.method == "platt":
        how = (
            f"Platt's scaling (slope {decimal(chosen.slope, 2)}, intercept "
            f"{decimal(chosen.intercept, 2, signed=True)})"
        )
    return (
        f"Fitted on val: {how}, the simplest of none, temperature and Platt's whose log loss, "
        "cross-validated there, was within one standard error of the lowest. It moves no study "
        "across a threshold and changes no ranking."
    )


# --- worth ---------------------------------------------------------------------------------------


def describe_decision(evaluation: Evaluation) -> dict[str, Any]:
    """Net benefit over acting on all or on nobody, at some thresholds, on test."""
    curve = evaluation.test.decision_curve
    if curve.reason is not None:
        return {"sentence": f"There is no decision curve: {curve.reason}.", "rows": []}
    rows = [
        {
            "threshold": f"{threshold:.2f}",
            "model": Cell.of(curve.model[k], signed=True),
            "gain": decimal(curve.gain[k], signed=True) if curve.is_supported[k] else "",
            "treat_all": decimal(curve.treat_all[k], signed=True),
        }
        for k, threshold in enumerate(THRESHOLDS)
        if threshold in SHOWN_THRESHOLDS
    ]
    return {"sentence": tell_decision(curve), "rows": rows}


def tell_decision(curve: DecisionCurve) -> str:
    """What the curve shows of these studies; it is no test of anything."""
    known = [k for k in range(len(THRESHOLDS)) if curve.is_supported[k]]
    if not known:
        return (
            f"Too few cases for a decision curve: at no threshold do {MIN_INDEPENDENT} patients "
            "with a positive study lie on either side."
        )
    better = sum(curve.gain[k] > 0 for k in known)
    best = max(known, key=lambda k: curve.gain[k])
    return (
        f"From {THRESHOLDS[known[0]]:.2f} to {THRESHOLDS[known[-1]]:.2f}, where at least "
        f"{MIN_INDEPENDENT} patients with a positive study lie on either side of the threshold, "
        f"the model's curve is above both others at {better} of {len(known)} thresholds; the "
        f"greatest difference is {decimal(curve.gain[best], signed=True)}, at "
        f"{THRESHOLDS[best]:.2f}. This describes the studies of test and tests nothing."
    )


# --- against what --------------------------------------------------------------------------------


def describe_baselines(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The model beside each guess without pixels, on test."""
    test = evaluation.test
    return [
        _describe_baseline(
            "View alone", f"{test.view.sicker_view or 'neither'} counts as positive", test.view
        ),
        _describe_baseline(
            "View, sex, age, pixel spacing",
            "logistic regression fitted on train",
            test.metadata,
        ),
    ]


def _describe_baseline(name: str, meaning: str, found: ViewBaseline | Baseline) -> dict[str, Any]:
    alone = found.view_only_auroc if isinstance(found, ViewBaseline) else found.alone_auroc
    return {
        "name": name,
        "meaning": meaning,
        "n": found.n,
        "alone": Cell.of(alone),
        "model": Cell.of(found.model_auroc),
        "gain": Cell.of(found.gain_delong.difference, signed=True),
        "test": _tell_test(found.gain_delong),
    }


def _tell_test(found: PairedTest) -> str:
    return "" if found.difference.value is None else f"DeLong by patient: {p_value(found.p_value)}"


def view_rows(evaluation: Evaluation) -> list[Row]:
    """The model where the view is of no help."""
    val, test = evaluation.val.view.within, evaluation.test.view.within
    return [
        Row.of(f"Model within {view}", "the view is of no help here", test[view], val[view])
        for view in ("AP", "PA")
    ]


def describe_comparison(compared: ComparedRuns | None) -> dict[str, Any] | None:
    """Both runs on test and val, and whether one is shown to be better."""
    if compared is None:
        return None
    test = compared.splits["test"]
    return {
        "first": compared.first,
        "second": compared.second,
        "n": test.n,
        "positives": test.positives,
        "patients": test.patients,
        "rows": [
            {
                "name": _COMPARED_NAMES[key],
                "cells": [
                    Cell.of(getattr(test, key).first),
                    Cell.of(getattr(test, key).second),
                    Cell.of(getattr(test, key).difference, signed=True),
                ],
            }
            for key in COMPARED
        ],
        "sentence": tell_comparison(compared),
    }


def tell_comparison(compared: ComparedRuns) -> str:
    """Which run ranks better on test, in a sentence."""
    found = compared.splits["test"].auroc_delong_clustered
    gain = found.difference
    if gain.value is None:
        return f"The runs cannot be compared on test: {gain.reason}."
    numbers = f"{Cell.of(gain, signed=True)}; {_tell_test(found)}"
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return f"Neither run is shown to rank better: the difference in AUROC is {numbers}."
    better = compared.first if gain.low > 0 else compared.second
    return f"{better} ranks better: the difference in AUROC is {numbers}."
