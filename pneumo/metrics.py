"""How good predictions are, and how sure that is: pure arithmetic, arrays in, values out.

Conventions. `target` (N,) holds 0 and 1. A ranking metric takes `score` (N,), the logit: a
probability is computed once, in float64, since a float32 sigmoid turns every large logit into
exactly 1 and so invents ties. A thresholded metric calls a study positive when its probability is
greater than or equal to the threshold.

Images of one patient resemble each other, so intervals resample patients, never images. A metric is
therefore written once, as a `Statistic` of sample weights: weights of 1 give the value, the number
of times that each patient was drawn gives one resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.metrics import precision_recall_curve, roc_curve

from pneumo.errors import MetricError

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights (N, R), one column a resample, to values (R,); NaN where the metric is undefined."""

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point: every interval here is a 95 % interval."""
MAX_CURVE_POINTS = 500
MAX_UNDEFINED_SHARE = 0.05
"""More undefined resamples than this, and what is left no longer stands for the data."""
_CHUNK_ELEMENTS = 2_000_000
"""Weights held at once: 16 MB, small enough for the cache to help and the memory to stay flat."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there is none, and `reason` says why."""

    value: float | None
    low: float | None
    high: float | None
    method: str
    """How the interval was made."""
    reason: str | None = None

    @classmethod
    def undefined(cls, reason: str, method: str = "none") -> Self:
        """Neither value nor interval."""
        return cls(None, None, None, method, reason)

    def to_json(self) -> dict[str, Any]:
        """The object of metrics.json: value, low, high, method, and a reason where one is due."""
        estimate = {"value": self.value, "low": self.low, "high": self.high, "method": self.method}
        return estimate if self.reason is None else {**estimate, "reason": self.reason}


# --- ranking --------------------------------------------------------------------------------------


def auroc(target: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """The chance that a random positive scores above a random negative, ties counting one half.

    Exact, by midranks (Hanley & McNeil 1982). `target` (N,) of 0 and 1, `score` (N,) of any real
    numbers, best the logits. Raises MetricError for one class only, a NaN or an infinity.
    """
    positive, score64 = _check(target, score)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    rank_sum = rankdata(score64)[positive].sum()
    wins = rank_sum - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def delong_variance(target: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """The variance of the AUROC when images are independent (DeLong 1988; Sun & Xu 2014).

    Raises MetricError for fewer than two positives or negatives, or a NaN.
    """
    positive, score64 = _check(target, score)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if min(num_positive, num_negative) < 2:
        raise MetricError("DeLong's variance needs two positives and two negatives")
    rank = rankdata(score64)
    # Share of the negatives that each positive beats, and of the positives that beat each negative.
    beaten = (rank[positive] - rankdata(score64[positive])) / num_negative
    beating = 1 - (rank[~positive] - rankdata(score64[~positive])) / num_positive
    return float(beaten.var(ddof=1) / num_positive + beating.var(ddof=1) / num_negative)


def delong(target: npt.ArrayLike, score: npt.ArrayLike) -> Estimate:
    """AUROC with DeLong's normal 95 % interval, cut at 0 and 1; too narrow when patients recur.

    Undefined input gives an estimate with a reason instead of an error.
    """
    method = "DeLong, images taken as independent"
    try:
        value, variance = auroc(target, score), delong_variance(target, score)
    except MetricError as error:
        return Estimate.undefined(str(error), method)
    if variance == 0:
        return Estimate(value, None, None, method, "the classes do not overlap: no variance")
    margin = Z_95 * math.sqrt(variance)
    return Estimate(value, max(0.0, value - margin), min(1.0, value + margin), method)


def auroc_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """`auroc` of weighted samples; NaN where a resample has one class only."""
    positive, score64 = _check(target, score)
    positives = np.flatnonzero(positive)
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(score64[negatives], kind="stable")]
    below = np.searchsorted(score64[negatives], score64[positives], side="left")
    up_to = np.searchsorted(score64[negatives], score64[positives], side="right")

    def statistic(weights: Floats) -> Floats:
        beaten = _cumulated(weights[negatives])
        drawn = weights[positives]
        wins = np.einsum("nr,nr->r", drawn, beaten[below] + beaten[up_to]) / 2
        return _divide(wins, drawn.sum(axis=0) * beaten[-1])

    return statistic


def average_precision_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """Mean precision over the positives, scikit-learn's step-wise sum; NaN without a positive."""
    positive, score64 = _check(target, score)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    positives = positives[np.argsort(score64[positives], kind="stable")][::-1]
    negatives = negatives[np.argsort(score64[negatives], kind="stable")][::-1]
    # How many of either class score at least as high as each positive: ties enter all at once.
    hits = np.searchsorted(-score64[positives], -score64[positives], side="right")
    false_alarms = np.searchsorted(-score64[negatives], -score64[positives], side="right")

    def statistic(weights: Floats) -> Floats:
        drawn = weights[positives]
        true_calls = _cumulated(drawn)[hits]
        calls = true_calls + _cumulated(weights[negatives])[false_alarms]
        precision = np.divide(true_calls, calls, out=np.zeros_like(calls), where=calls > 0)
        return _divide(np.einsum("nr,nr->r", drawn, precision), drawn.sum(axis=0))

    return statistic


def _cumulated(weights: Floats) -> Floats:
    """Row k holds the sum of the first k rows: (N, R) to (N + 1, R)."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a curve: x (K,), y (K,) and the probability threshold (K,) of each."""

    x: Floats
    y: Floats
    threshold: Floats


def roc_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The ROC curve: x = 1 - specificity, y = sensitivity, from (0, 0) to (1, 1).

    At most MAX_CURVE_POINTS, spread evenly along the curve: what is dropped moves the drawn line
    by less than a pixel, but the area under it is no longer the exact AUROC. `threshold` is in the
    unit of `score`, +inf at (0, 0). Raises MetricError as `auroc` does.
    """
    positive, score64 = _check(target, score)
    x, y, threshold = roc_curve(positive, score64)
    keep = _decimate(x, y)
    return Curve(x[keep], y[keep], threshold[keep])


def precision_recall_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The precision-recall curve: x = recall, y = precision, from recall 1 down to 0.

    At most MAX_CURVE_POINTS; `threshold` is in the unit of `score`, +inf at recall 0.
    Raises MetricError as `auroc` does.
    """
    positive, score64 = _check(target, score)
    y, x, threshold = precision_recall_curve(positive, score64)
    keep = _decimate(x, y)
    return Curve(x[keep], y[keep], np.append(threshold, np.inf)[keep])


def _decimate(x: Floats, y: Floats) -> npt.NDArray[np.intp]:
    """Indices of at most MAX_CURVE_POINTS points, evenly along the curve's length, ends kept."""
    if len(x) <= MAX_CURVE_POINTS:
        return np.arange(len(x))
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    wanted = np.linspace(0, length[-1], MAX_CURVE_POINTS)
    keep: npt.NDArray[np.intp] = np.unique(np.searchsorted(length, wanted))
    return keep


# --- at a threshold -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """How many studies went which way."""

    tp: int
    fp: int
    fn: int
    tn: int

    def to_json(self) -> dict[str, int]:
        """Four plain counts."""
        return {"tp": self.tp, "fp": self.fp, "fn": self.fn, "tn": self.tn}


def confusion(target: npt.ArrayLike, probability: npt.ArrayLike, threshold: float) -> Confusion:
    """Counts at `probability >= threshold`; one class only is fine, a NaN raises MetricError."""
    table = _outcomes(target, probability, threshold)
    return Confusion(*(int(count) for count in table.sum(axis=1)))


RATES: Mapping[str, Callable[[Floats, Floats, Floats, Floats], Floats]] = {
    "accuracy": lambda tp, fp, fn, tn: _divide(tp + tn, tp + fp + fn + tn),
    "precision": lambda tp, fp, fn, tn: _divide(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: _divide(tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn: _divide(tn, tn + fp),
    "npv": lambda tp, fp, fn, tn: _divide(tn, tn + fn),
    "f1": lambda tp, fp, fn, tn: _divide(2 * tp, 2 * tp + fp + fn),
    "mcc": lambda tp, fp, fn, tn: _divide(
        tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    ),
}
"""Every metric of the four counts tp, fp, fn, tn (each (R,)); NaN where a denominator is 0.
Recall is sensitivity, precision is PPV; mcc is Matthews' correlation (1975)."""

UNDEFINED: Mapping[str, str] = {
    "accuracy": "no study",
    "precision": "no study is called positive",
    "recall": "no study is positive",
    "specificity": "no study is negative",
    "npv": "no study is called negative",
    "f1": "no study is positive or called positive",
    "mcc": "one class only, or every study called the same",
}
"""Why a metric of RATES has no value."""

_DENOMINATORS: Mapping[str, list[int]] = {
    "accuracy": [0, 1, 2, 3],
    "precision": [0, 1],
    "recall": [0, 2],
    "specificity": [1, 3],
    "npv": [2, 3],
}
"""Of the proportions among RATES, which of tp, fp, fn, tn make up the denominator."""


def rates(counts: Confusion) -> dict[str, float]:
    """Every metric of RATES at these counts; NaN where undefined."""
    table = (np.array([float(n)]) for n in (counts.tp, counts.fp, counts.fn, counts.tn))
    columns = tuple(table)
    return {name: float(rate(*columns)[0]) for name, rate in RATES.items()}


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of the proportion `value` of `n` independent trials, n > 0."""
    z = Z_95
    centre = value + z * z / (2 * n)
    margin = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push an end past the value at 0 or 1.
    return min(value, max(0.0, (centre - margin) / scale)), max(value, (centre + margin) / scale)


def rate_estimates(
    target: npt.ArrayLike,
    probability: npt.ArrayLike,
    threshold: float,
    patient: npt.NDArray[Any],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Every metric of RATES at `threshold`, with patient-bootstrap intervals.

    A proportion of exactly 0 or 1 never varies under resampling; it gets Wilson's interval over the
    patients in its denominator instead. All inputs (N,); a NaN raises MetricError.
    """
    outcomes = _outcomes(target, probability, threshold)
    name, index = np.unique(patient, return_inverse=True)
    of_patient = np.stack([np.bincount(index, row, minlength=len(name)) for row in outcomes])
    pieces = _resample_counts(len(name), len(index), resamples, seed)
    drawn = np.concatenate([of_patient @ counts for counts in pieces], axis=1)
    total = outcomes.sum(axis=1, keepdims=True)
    estimates = {
        key: _percentile_interval(float(rate(*total)[0]), rate(*drawn), UNDEFINED[key])
        for key, rate in RATES.items()
    }
    for key, cells in _DENOMINATORS.items():
        value = estimates[key].value
        if value in (0.0, 1.0):
            num_patients = int((of_patient[cells] > 0).any(axis=0).sum())
            low, high = wilson(value, num_patients)
            estimates[key] = Estimate(value, low, high, "Wilson over patients")
    return estimates


# --- operating points -----------------------------------------------------------------------------


def youden_threshold(target: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The threshold of the greatest sensitivity + specificity - 1 (Youden 1950).

    Always one of the probabilities; of equally good ones the highest. Raises MetricError for one
    class only or a NaN.
    """
    positive, probability64 = _check(target, probability)
    false_alarms, sensitivity, threshold = roc_curve(
        positive, probability64, drop_intermediate=False
    )
    # The first point calls nothing positive: its threshold is infinite and no use on new data.
    return float(threshold[1:][np.argmax((sensitivity - false_alarms)[1:])])


def sensitivity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, sensitivity: float
) -> float:
    """The highest threshold that keeps at least `sensitivity` (0, 1] of the positives.

    Always the probability of a positive. Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = _check(target, probability)
    descending = np.sort(probability64[positive])[::-1]
    # The guard keeps 0.9 * 10 = 9.000000000000002 from asking for a tenth positive.
    needed = math.ceil(sensitivity * len(descending) - 1e-9)
    return float(descending[max(needed, 1) - 1])


# --- probabilities --------------------------------------------------------------------------------


def log_loss_statistic(target: npt.ArrayLike, logit: npt.ArrayLike) -> Statistic:
    """Mean negative log-likelihood in nats, from logits: finite where a probability rounds to 0."""
    positive, logit64 = _check(target, logit, both_classes=False)
    return _mean_statistic(np.logaddexp(0, np.where(positive, -logit64, logit64)))


def brier_statistic(target: npt.ArrayLike, probability: npt.ArrayLike) -> Statistic:
    """Mean squared difference of probability and target (Brier 1950), from 0 (best) to 1."""
    positive, probability64 = _check(target, probability, both_classes=False)
    return _mean_statistic((probability64 - positive) ** 2)


def _mean_statistic(values: Floats) -> Statistic:
    return lambda weights: _divide(values @ weights, weights.sum(axis=0))


# --- intervals ------------------------------------------------------------------------------------


def patient_bootstrap(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Each statistic with its 95 % percentile interval over resamples of the patients.

    `patient` (N,) names the patient of each sample. All statistics see the same resamples, so a
    difference of two is a statistic like any other. An interval is null, with a reason, where more
    than 5 % of the resamples leave the statistic undefined (too few patients of a class) or where
    it never varies.
    (Field & Welsh 2007: bootstrapping clustered data.)
    """
    name, index = np.unique(patient, return_inverse=True)
    drawn: dict[str, list[Floats]] = {key: [] for key in statistics}
    for counts in _resample_counts(len(name), len(index), resamples, seed):
        weights = counts[index]
        for key, statistic in statistics.items():
            drawn[key].append(statistic(weights))
    one = np.ones((len(index), 1))
    return {
        key: _percentile_interval(
            float(statistic(one)[0]),
            np.concatenate(drawn[key]),
            "undefined for these studies",
        )
        for key, statistic in statistics.items()
    }


def _resample_counts(
    num_patients: int, num_samples: int, resamples: int, seed: int
) -> Iterator[Floats]:
    """How often each patient is drawn: (P, R) pieces that add up to all resamples."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // num_samples)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = np.empty((num_patients, size))
        for column in range(size):
            picked = rng.integers(num_patients, size=num_patients)
            counts[:, column] = np.bincount(picked, minlength=num_patients)
        yield counts


def _percentile_interval(value: float, drawn: Floats, reason: str) -> Estimate:
    method = "patient bootstrap"
    if math.isnan(value):
        return Estimate.undefined(reason, method)
    defined = drawn[~np.isnan(drawn)]
    num_undefined = len(drawn) - len(defined)
    if num_undefined > MAX_UNDEFINED_SHARE * len(drawn):
        why = f"too few patients: undefined in {num_undefined} of {len(drawn)} resamples"
        return Estimate(value, None, None, method, why)
    low, high = np.quantile(defined, [0.025, 0.975])
    if low == high:
        return Estimate(value, None, None, method, "the same in nearly every resample")
    # Of a skewed statistic the value itself can lie just outside the percentiles.
    return Estimate(value, min(float(low), value), max(float(high), value), method)


# --- the trainer's --------------------------------------------------------------------------------


def binary_metrics_from_logits(target: npt.ArrayLike, logit: npt.ArrayLike) -> dict[str, float]:
    """What a training epoch prints: auroc, and accuracy, precision, recall at p >= 0.5.

    `target` (N,) of 0 and 1, `logit` (N,). NaN where undefined: AUROC of one class, precision
    without a positive call, recall without a positive, and all four when a logit is NaN, which a
    diverging training is free to bring about.
    """
    try:
        positive, logit64 = _check(target, logit, both_classes=False)
    except MetricError:
        return dict.fromkeys(("auroc", "accuracy", "precision", "recall"), math.nan)
    has_both = 0 < positive.sum() < len(positive)
    at_half = rates(confusion(positive, logit64, 0.0))  # p >= 0.5 is logit >= 0
    return {
        "auroc": auroc(positive, logit64) if has_both else math.nan,
        **{name: at_half[name] for name in ("accuracy", "precision", "recall")},
    }


# --- checks ---------------------------------------------------------------------------------------


def _check(
    target: npt.ArrayLike, score: npt.ArrayLike, *, both_classes: bool = True
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """The targets as booleans and the scores as float64, or MetricError."""
    target_array, score64 = np.asarray(target), np.asarray(score, dtype=np.float64)
    if target_array.ndim != 1 or target_array.shape != score64.shape:
        raise MetricError(
            f"target {target_array.shape} and score {score64.shape} must be (N,) of one length"
        )
    if len(target_array) == 0:
        raise MetricError("no study")
    positive = target_array == 1
    if not np.all(positive | (target_array == 0)):
        raise MetricError("a target is neither 0 nor 1")
    num_bad = len(score64) - int(np.isfinite(score64).sum())
    if num_bad:
        raise MetricError(f"{num_bad} of {len(score64)} scores are NaN or infinite")
    if both_classes and positive.all() | ~positive.any():
        raise MetricError(f"one class only: {int(positive.sum())} of {len(positive)} are positive")
    return positive, score64


def _outcomes(target: npt.ArrayLike, probability: npt.ArrayLike, threshold: float) -> Floats:
    """Indicators of tp, fp, fn, tn as rows: (4, N)."""
    positive, probability64 = _check(target, probability, both_classes=False)
    called = probability64 >= threshold
    table = (positive & called, ~positive & called, positive & ~called, ~positive & ~called)
    return np.stack(table).astype(np.float64)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is 0."""
    missing = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=missing, where=denominator != 0)
