"""Operating points: thresholds chosen on val and frozen, and the metrics of a split at each.

Thresholds are on the logit, which does not saturate as a probability does. Calibration keeps the
order of the scores, so it moves no study across a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pneumo.config import EvaluateConfig
from pneumo.errors import MetricError
from pneumo.evaluation import metrics
from pneumo.evaluation.bootstrap import Resampled, SampleWeights, Statistic, StatisticSet, divide
from pneumo.evaluation.estimates import (
    WILSON,
    Estimate,
    Floats,
    as_json,
    average,
    wilson,
    with_wilson,
)
from pneumo.evaluation.metrics import Confusion
from pneumo.evaluation.predictions import Predictions

ThresholdRule = Literal["youden", "sensitivity", "specificity"]
Proportion = Literal["accuracy", "precision", "recall", "specificity", "npv"]

DECISION = "decision"
"""The operating point of the headline numbers."""
SCREENING = "screening"
"""The operating point with `evaluate.sensitivity` on val."""
STANDARD: Mapping[str, tuple[ThresholdRule, float]] = {
    "youden": ("youden", math.nan),
    "sensitivity_90": ("sensitivity", 0.90),
    "sensitivity_95": ("sensitivity", 0.95),
    "specificity_90": ("specificity", 0.90),
}
"""Chosen for every run, whatever is configured, so that any two runs can be compared."""
PREVALENCES = (0.05, 0.10, 0.225, 0.365)
"""For which predictive values are given, from rare to common; RSNA has 22.5 %."""
AT_ENDS = "at the ends of sensitivity's and specificity's intervals"


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold chosen on val."""

    name: str
    rule: str
    """In words, such as `sensitivity ≥ 0.90`."""
    logit: float | None
    """A study at or above it is called positive; None where val gives no threshold."""
    reason: str | None = None

    @property
    def threshold(self) -> float | None:
        """The same on the network's own probability."""
        return None if self.logit is None else float(expit(self.logit))


@dataclass(frozen=True)
class PredictiveValues:
    """PPV and NPV at another prevalence."""

    prevalence: float
    ppv: Estimate
    npv: Estimate


@dataclass(frozen=True)
class PointEvaluation:
    """The metrics of a split at an operating point."""

    counts: Confusion | None
    """None where there is no threshold or the split can't be evaluated."""
    rates: Mapping[str, Estimate]
    """The metrics of `metrics.RATES`, with intervals over patients."""
    wilson: Mapping[str, Estimate]
    """The proportions among the rates with Wilson's interval, which takes images as independent."""
    at_prevalence: tuple[PredictiveValues, ...]
    """At each of PREVALENCES, by Bayes' theorem from this split's sensitivity and specificity."""

    @property
    def reason(self) -> str | None:
        """Why there are no counts; None where there are."""
        return None if self.counts is not None else self.rates["accuracy"].reason

    @classmethod
    def undefined(cls, reason: str) -> PointEvaluation:
        """No estimate, with the reason."""
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
    """The threshold that calls a study of a split positive."""

    logit: float | None
    """None where studies are called neither positive nor negative."""
    reason: str | None = None
    """Why there is no threshold."""
    calibrated: float | None = None
    """The threshold on the calibrated probability; None without a calibration."""

    @property
    def threshold(self) -> float | None:
        """The same on the network's own probability."""
        return None if self.logit is None else float(expit(self.logit))

    def call(self, logit: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which logits, of any shape, are called positive; none without a threshold."""
        return call_positive(logit, self.logit)


def call_positive(logit: npt.ArrayLike, threshold: float | None) -> npt.NDArray[np.bool_]:
    """Which logits, of any shape, are at or above a threshold on the logit; none without one."""
    # In float64: float32 would round a threshold just above the highest logit down to it.
    above = np.asarray(logit, dtype=np.float64) >= (math.inf if threshold is None else threshold)
    return np.asarray(above)


# --- chosen on val --------------------------------------------------------------------------------


def choose_points(val: Predictions, config: EvaluateConfig) -> dict[str, OperatingPoint]:
    """DECISION, SCREENING and the STANDARD points, by name.

    A point has no threshold where val has fewer than `evaluate.min_patients` patients of a class
    that its rule counts, or fewer than 1 / (1 - target): with fewer than 20 positives, "at least
    0.95" would mean all of them.
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
        "youden": metrics.youden_threshold,
        "sensitivity": partial(metrics.sensitivity_threshold, sensitivity=target),
        "specificity": partial(metrics.specificity_threshold, specificity=target),
    }
    try:
        threshold = rules[rule](val.target, val.logit)
        check_enough(val, rule, min_patients, target)
    except MetricError as error:
        return OperatingPoint(name, words, None, f"val: {error}")
    return OperatingPoint(name, words, threshold)


def _spell(target: float) -> str:
    """`0.90`, `0.904`: not rounded, as the rule in words identifies the point."""
    short = f"{target:.2f}"
    return short if float(short) == target else repr(target)


def check_enough(
    val: Predictions, rule: ThresholdRule, min_patients: int, target: float = math.nan
) -> None:
    """Raise MetricError where `val` is too small for the rule; Youden's counts both classes."""
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
    """Why `rows`, or those of the mask `part`, have too few patients of a class, 1 or 0; None where
    `needed` patients have it."""
    chosen = rows.target == value
    found = rows.count_patients(chosen if part is None else chosen & part)
    if found >= needed:
        return None
    word = "positive" if value else "negative"
    return f"too small: {found} patients with a {word} study, {needed} are needed"


# --- on any split -----------------------------------------------------------------------------


def outcomes_statistic(rows: Predictions, points: Mapping[str, OperatingPoint]) -> Statistic:
    """tp, fp, fn, tn at each point with a threshold, point by point: (4 * points, R).

    Raises MetricError for no study or a NaN.
    """
    positive, logit = metrics.check_scores(rows.target, rows.logit, both_classes=False)
    chosen = [p.logit for p in points.values() if p.logit is not None]
    called = metrics.called_statistic(positive, logit, chosen)

    def statistic(weights: SampleWeights) -> Floats:
        hits, alarms = np.split(called(weights), 2)
        cells = (hits[1:], alarms[1:], hits[0] - hits[1:], alarms[0] - alarms[1:])
        return np.stack(cells, axis=1).reshape(-1, weights.shape[1])

    return statistic


def code_outcomes(rows: Predictions, threshold: float | None) -> npt.NDArray[np.int64]:
    """Whether each study is tp (0), fp (1), fn (2) or tn (3) at a threshold on the logit: (N,)."""
    positive, logit = metrics.check_scores(rows.target, rows.logit, both_classes=False)
    called = call_positive(logit, threshold)
    return np.where(called, np.where(positive, 0, 1), np.where(positive, 2, 3))


def evaluate_points(
    rows: Predictions, points: Mapping[str, OperatingPoint], part: StatisticSet
) -> dict[str, PointEvaluation]:
    """The metrics of `rows` at every point; `part` has their `outcomes_statistic` as `outcomes`."""
    found_at = {}
    start = 0
    for name, point in points.items():
        if point.logit is None:
            found_at[name] = PointEvaluation.undefined(f"no threshold: {point.reason}")
            continue
        if part.reason is not None:
            found_at[name] = PointEvaluation.undefined(part.reason)
            continue
        cells = part.resampled["outcomes"].take(slice(start, start + 4))
        found_at[name] = _evaluate_at(rows, point.logit, cells)
        start += 4
    return found_at


def _evaluate_at(rows: Predictions, threshold: float, cells: Resampled) -> PointEvaluation:
    counts = Confusion(*(int(count) for count in cells.value))
    estimates = estimate_rates(cells, rows, code_outcomes(rows, threshold))
    by_wilson = {}
    for key, members in metrics.DENOMINATORS.items():
        value, n = estimates[key].value, int(sum(cells.value[members]))
        by_wilson[key] = (
            Estimate.undefined(metrics.UNDEFINED[key], WILSON)
            if value is None
            else Estimate(value, *wilson(value, n), WILSON)
        )
    predictive = tuple(
        PredictiveValues(p, *_predict_values(cells, p, estimates)) for p in PREVALENCES
    )
    return PointEvaluation(counts, estimates, by_wilson, predictive)


def estimate_rates(
    cells: Resampled, rows: Predictions, code: npt.NDArray[np.int64]
) -> dict[str, Estimate]:
    """Every metric of `metrics.RATES` from tp, fp, fn, tn (4, R); `code` (N,) as by
    `code_outcomes`, or another number for studies that do not count.

    The sample size of a proportion is the patients in its own denominator.
    """
    found = {}
    for key in metrics.RATES:
        rate = cells.derive(partial(_rate, key))
        if key not in metrics.DENOMINATORS:
            found[key] = rate.estimate(reason=metrics.UNDEFINED[key])
            continue
        part = np.isin(code, metrics.DENOMINATORS[key])
        rate = replace(rate, effective_patients=rows.count_equal_patients(part))
        one = rate.estimate(reason=metrics.UNDEFINED[key])
        found[key] = with_wilson(one, rows.count_patients(part))
    if _is_exact(found):
        found["balanced_accuracy"] = average(found["recall"], found["specificity"])
    sensitivity, specificity = _find_ends(found)
    cells_at_ends = np.array([sensitivity, 1 - specificity, 1 - sensitivity, specificity])
    for key in ("lr_positive", "lr_negative"):
        found[key] = _with_ends(found[key], _rate(key, cells_at_ends)[0], found)
    return found


def _rate(key: str, cells: Floats) -> Floats:
    return metrics.RATES[key](*cells)[None]


def predictive_values(
    sensitivity: Floats, specificity: Floats, prevalence: float
) -> tuple[Floats, Floats]:
    """PPV and NPV by Bayes' theorem (Altman & Bland 1994), of any shape; NaN where no study would
    be called positive or negative."""
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
    sensitivity, specificity = _find_ends(rates)
    bounds = predictive_values(sensitivity, specificity, prevalence)
    ppv, npv = (_with_ends(both.estimate(row, reasons[row]), bounds[row], rates) for row in (0, 1))
    return ppv, npv


def _is_exact(rates: Mapping[str, Estimate]) -> bool:
    """Whether sensitivity or specificity is 0 or 1, and so the same in every resample."""
    return not {0.0, 1.0}.isdisjoint({rates["recall"].value, rates["specificity"].value})


def _find_ends(rates: Mapping[str, Estimate]) -> Floats:
    """Low and high of sensitivity, then of specificity: (2, 2); NaN where unknown."""
    ends = [(rates[key].low, rates[key].high) for key in ("recall", "specificity")]
    return np.array(ends, dtype=np.float64)


def _with_ends(one: Estimate, ends: Floats, rates: Mapping[str, Estimate]) -> Estimate:
    """`one`; where resampling does not vary sensitivity or specificity, with its values at the
    `ends` (2,) of their intervals, which are conservative bounds."""
    is_known = one.low is not None and not _is_exact(rates)
    if one.value is None or is_known or np.isnan(ends).any():
        return one
    low, high = min(one.value, *ends.tolist()), max(one.value, *ends.tolist())
    if math.isinf(high):
        return Estimate(one.value, low, None, AT_ENDS, "without a bound")
    return Estimate(one.value, low, high, AT_ENDS)
