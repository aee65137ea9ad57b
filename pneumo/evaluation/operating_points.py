"""Operating points: thresholds chosen on val, frozen, and the metrics of a split at each.

Thresholds stand on the logit, which never saturates as a probability does; a calibration keeps the
order, so it moves no study across one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pneumo.config import EvaluateConfig
from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, metrics, thresholds
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    Weights,
    as_json,
    divide,
)
from pneumo.evaluation.metrics import Confusion
from pneumo.evaluation.predictions import Predictions

ThresholdRule = Literal["youden", "sensitivity", "specificity"]
Proportion = Literal["accuracy", "precision", "recall", "specificity", "npv"]

DECISION = "decision"
"""The operating point that headline numbers are given at."""
SCREENING = "screening"
"""The operating point that keeps `evaluate.sensitivity` on val."""
STANDARD: Mapping[str, tuple[ThresholdRule, float]] = {
    "youden": ("youden", math.nan),
    "sensitivity_90": ("sensitivity", 0.90),
    "sensitivity_95": ("sensitivity", 0.95),
    "specificity_90": ("specificity", 0.90),
}
"""Chosen for every run, whatever is configured, so that any two can be compared at one."""
PREVALENCES = (0.05, 0.10, 0.225, 0.365)
"""At which predictive values are given, from rare to common; RSNA has 22.5 %."""
BAYES_ENDS = "Bayes at the ends of sensitivity's and specificity's intervals"


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on the logit, chosen on val; None where val gives none."""

    name: str
    rule: str
    """In words, such as `sensitivity ≥ 0.90`."""
    logit: float | None
    """A study at or above it is called positive."""
    reason: str | None = None

    @property
    def threshold(self) -> float | None:
        """The same on the network's own probability."""
        return None if self.logit is None else float(expit(self.logit))


@dataclass(frozen=True)
class PredictiveValues:
    """What a call would mean where another fraction of the studies is positive."""

    prevalence: float
    ppv: Estimate
    npv: Estimate


@dataclass(frozen=True)
class AtPoint:
    """A split at an operating point."""

    counts: Confusion | None
    """None where there is no threshold or the split can't be evaluated."""
    rates: Mapping[str, Estimate]
    """accuracy, precision, recall, specificity, npv, f1, mcc; intervals over patients."""
    wilson: Mapping[str, Estimate]
    """The proportions among the rates with Wilson's interval, which takes images as independent."""
    at_prevalence: tuple[PredictiveValues, ...]
    """At each of PREVALENCES, by Bayes from this split's sensitivity and specificity."""

    @property
    def reason(self) -> str | None:
        """Why nothing is counted, where nothing is."""
        return None if self.counts is not None else self.rates["accuracy"].reason

    @classmethod
    def undefined(cls, reason: str) -> AtPoint:
        """No estimate, and why."""
        nothing = Estimate.undefined(reason)
        return cls(
            None,
            dict.fromkeys(metrics.RATES, nothing),
            dict.fromkeys(get_args(Proportion), nothing),
            tuple(PredictiveValues(p, nothing, nothing) for p in PREVALENCES),
        )

    def to_json(self) -> dict[str, Any]:
        """The rates by name, `confusion` (four counts or null), `wilson` and `at_prevalence`."""
        return {
            **as_json(self.rates),
            "confusion": as_json(self.counts),
            "wilson": as_json(self.wilson),
            "at_prevalence": as_json(self.at_prevalence),
        }


@dataclass(frozen=True)
class Decision:
    """What calls a study of one split positive."""

    logit: float | None
    """None where no study may be called anything."""
    reason: str | None = None
    """Why there is none."""
    calibrated: float | None = None
    """The threshold on the calibrated probability; None without a calibration."""

    @property
    def threshold(self) -> float | None:
        """The same on the network's own probability."""
        return None if self.logit is None else float(expit(self.logit))

    def call(self, logit: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which of these logits, of any shape, are called positive: none without a threshold."""
        return call_positive(logit, self.logit)


def call_positive(logit: npt.ArrayLike, threshold: float | None) -> npt.NDArray[np.bool_]:
    """Which logits, of any shape, are at or above a threshold on the logit; none without one."""
    # In float64: a threshold just above the highest float32 would be rounded down to it.
    above = np.asarray(logit, dtype=np.float64) >= (math.inf if threshold is None else threshold)
    return np.asarray(above)


# --- chosen on val --------------------------------------------------------------------------------


def choose_points(val: Predictions, config: EvaluateConfig) -> dict[str, OperatingPoint]:
    """DECISION, SCREENING and the STANDARD points, by name.

    A point has no threshold where val has fewer than `evaluate.min_patients` patients of a class
    that its rule counts, or fewer than 1 / (1 - target): with fewer positives than 20, "at least
    0.95" could only mean all of them.
    """
    wanted: dict[str, tuple[ThresholdRule, float]] = {
        DECISION: (config.operating_point, config.sensitivity),
        SCREENING: ("sensitivity", config.sensitivity),
        **STANDARD,
    }
    return {
        name: _choose(name, val, rule, target, config.min_patients)
        for name, (rule, target) in wanted.items()
    }


def _choose(
    name: str, val: Predictions, rule: ThresholdRule, target: float, min_patients: int
) -> OperatingPoint:
    words = "Youden's index" if rule == "youden" else f"{rule} ≥ {_spell(target)}"
    rules: Mapping[ThresholdRule, Callable[[npt.ArrayLike, npt.ArrayLike], float]] = {
        "youden": thresholds.youden_threshold,
        "sensitivity": partial(thresholds.sensitivity_threshold, sensitivity=target),
        "specificity": partial(thresholds.specificity_threshold, specificity=target),
    }
    try:
        threshold = rules[rule](val.target, val.logit)
        check_enough(val, rule, min_patients, target)
    except MetricError as error:
        return OperatingPoint(name, words, None, f"val: {error}")
    return OperatingPoint(name, words, threshold)


def _spell(target: float) -> str:
    """`0.90`, `0.904`: never rounded, as a point is known by its rule in words."""
    short = f"{target:.2f}"
    return short if float(short) == target else repr(target)


def check_enough(
    val: Predictions, rule: ThresholdRule, min_patients: int, target: float = math.nan
) -> None:
    """Raise MetricError where `val` is too small for the rule (Youden's counts both classes)."""
    of_class = {"sensitivity": (1,), "specificity": (0,), "youden": (1, 0)}[rule]
    needed = min_patients
    if rule != "youden" and target < 1:
        needed = max(needed, math.ceil(1 / (1 - target) - 1e-9))
    for value in of_class:
        if reason := find_too_few(val, value, needed):
            raise MetricError(reason)


def find_too_few(
    rows: Predictions, value: int, needed: int, part: npt.NDArray[np.bool_] | None = None
) -> str | None:
    """Why `rows`, or those of the mask `part`, are too few of a class, 1 or 0; None where `needed`
    patients have it."""
    chosen = rows.target == value
    found = rows.count_patients(chosen if part is None else chosen & part)
    if found >= needed:
        return None
    word = "positive" if value else "negative"
    return f"too small: {found} patients with a {word} study, {needed} are needed"


# --- on any split -----------------------------------------------------------------------------


def outcomes_statistic(rows: Predictions, points: Mapping[str, OperatingPoint]) -> Statistic:
    """tp, fp, fn, tn at every point that has a threshold: (4 * points, R), a point after another.

    Raises MetricError for no study or a NaN.
    """
    positive, logit = metrics.check_scores(rows.target, rows.logit, both_classes=False)
    chosen = [p.logit for p in points.values() if p.logit is not None]
    called = metrics.called_statistic(positive, logit, chosen)

    def statistic(weights: Weights) -> Floats:
        hits, alarms = np.split(called(weights), 2)
        cells = (hits[1:], alarms[1:], hits[0] - hits[1:], alarms[0] - alarms[1:])
        return np.stack(cells, axis=1).reshape(-1, weights.shape[1])

    return statistic


def code_outcomes(rows: Predictions, threshold: float | None) -> npt.NDArray[np.int64]:
    """Which of tp, fp, fn, tn each study is, from 0 to 3, at a threshold on the logit: (N,)."""
    positive, logit = metrics.check_scores(rows.target, rows.logit, both_classes=False)
    called = call_positive(logit, threshold)
    return np.where(called, np.where(positive, 0, 1), np.where(positive, 2, 3))


def evaluate_points(
    rows: Predictions, points: Mapping[str, OperatingPoint], found: Resampled
) -> dict[str, AtPoint]:
    """`rows` at every point; `found` is what `outcomes_statistic` made of them."""
    found_at = {}
    start = 0
    for name, point in points.items():
        if point.logit is None:
            found_at[name] = AtPoint.undefined(f"no threshold: {point.reason}")
            continue
        four = slice(start, start + 4)
        found_at[name] = _evaluate_at(rows, point.logit, found.take(four))
        start += 4
    return found_at


def _evaluate_at(rows: Predictions, threshold: float, cells: Resampled) -> AtPoint:
    counts = Confusion(*(int(count) for count in cells.value))
    estimates = {
        key: cells.derive(partial(_rate, key)).estimate(reason=metrics.UNDEFINED[key])
        for key in metrics.RATES
    }
    by_wilson = {}
    code = code_outcomes(rows, threshold)
    for key, members in metrics.DENOMINATORS.items():
        value, n = estimates[key].value, int(sum(cells.value[members]))
        if value is None:
            by_wilson[key] = Estimate.undefined(metrics.UNDEFINED[key], bootstrap.WILSON)
            continue
        by_wilson[key] = Estimate(value, *bootstrap.wilson(value, n), bootstrap.WILSON)
        patients = rows.count_patients(np.isin(code, members))
        estimates[key] = bootstrap.with_wilson(estimates[key], patients)
    predictive = tuple(
        PredictiveValues(p, *_predict_values(cells, p, estimates)) for p in PREVALENCES
    )
    return AtPoint(counts, estimates, by_wilson, predictive)


def _rate(key: str, cells: Floats) -> Floats:
    return metrics.RATES[key](*cells)[None]


def predictive_values(
    sensitivity: Floats, specificity: Floats, prevalence: float
) -> tuple[Floats, Floats]:
    """PPV and NPV by Bayes (Altman & Bland 1994), any shape; NaN where nobody is called so."""
    hits, misses = prevalence * sensitivity, prevalence * (1 - sensitivity)
    cleared, alarms = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
    return divide(hits, hits + alarms), divide(cleared, cleared + misses)


def _predict_values(
    cells: Resampled, prevalence: float, rates: Mapping[str, Estimate]
) -> tuple[Estimate, Estimate]:
    def by_bayes(cells: Floats) -> Floats:
        sensitivity, specificity = _rate("recall", cells), _rate("specificity", cells)
        return np.concatenate(predictive_values(sensitivity, specificity, prevalence))

    both = cells.derive(by_bayes)
    reasons = ("nobody would be called positive", "nobody would be called negative")
    for key in ("recall", "specificity"):
        if rates[key].value is None:
            reasons = (str(rates[key].reason),) * 2
    found = tuple(both.estimate(row, reasons[row]) for row in (0, 1))
    ends = _bayes_ends(rates, prevalence)
    ppv, npv = (
        one if one.value is None or one.low is not None or end is None else _with_ends(one, *end)
        for one, end in zip(found, ends, strict=True)
    )
    return ppv, npv


def _bayes_ends(
    rates: Mapping[str, Estimate], prevalence: float
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Intervals of PPV and NPV where resampling gives none: wider than 95 % can need."""
    ends = np.array(
        [[math.nan if x is None else x for x in (rates[k].low, rates[k].high)]
         for k in ("recall", "specificity")]
    )  # fmt: skip
    if np.isnan(ends).any():
        return None, None
    ppv, npv = predictive_values(ends[0], ends[1], prevalence)
    return (float(ppv[0]), float(ppv[1])), (float(npv[0]), float(npv[1]))


def _with_ends(one: Estimate, low: float, high: float) -> Estimate:
    if one.value is None or math.isnan(low) or math.isnan(high):
        return one
    return Estimate(one.value, min(low, one.value), max(high, one.value), BAYES_ENDS)
