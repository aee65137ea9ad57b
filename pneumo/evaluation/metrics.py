"""How good predictions are, and how sure that is: pure arithmetic, arrays in, values out.

Conventions. `target` (N,) holds 0 and 1. A ranking metric takes `score` (N,), the logit: a
probability is computed once, in float64, since a float32 sigmoid turns every large logit into
exactly 1 and so invents ties. A thresholded metric calls a study positive when its probability is
greater than or equal to the threshold.

A metric with an interval is a `Statistic` of sample weights, see `bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import Floats, Statistic, divide

MAX_CURVE_POINTS = 500
MAX_JSON_POINTS = 100


def auroc(target: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """The chance that a random positive scores above a random negative, ties counting one half.

    Exact, by midranks (Hanley & McNeil 1982). `target` (N,) of 0 and 1, `score` (N,) of any real
    numbers, best the logits. Raises MetricError for one class only, a NaN or an infinity.

    >>> pneumo.auroc([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    0.75
    """
    positive, score64 = check_scores(target, score)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    rank_sum = scipy.stats.rankdata(score64)[positive].sum()
    wins = rank_sum - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def auroc_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """`auroc` of weighted samples; NaN where a resample has one class only."""
    positive, score64 = check_scores(target, score)
    positives = np.flatnonzero(positive)
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(score64[negatives], kind="stable")]
    below = np.searchsorted(score64[negatives], score64[positives], side="left")
    up_to = np.searchsorted(score64[negatives], score64[positives], side="right")

    def statistic(weights: Floats) -> Floats:
        beaten = _cumulated(weights[negatives])
        drawn = weights[positives]
        wins = np.einsum("nr,nr->r", drawn, beaten[below] + beaten[up_to]) / 2
        return divide(wins, drawn.sum(axis=0) * beaten[-1])

    return statistic


def average_precision_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """Mean precision over the positives, scikit-learn's step-wise sum; NaN without a positive."""
    positive, score64 = check_scores(target, score)
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
        return divide(np.einsum("nr,nr->r", drawn, precision), drawn.sum(axis=0))

    return statistic


def sensitivity_at_statistic(
    target: npt.ArrayLike, score: npt.ArrayLike, specificity: float
) -> Statistic:
    """The highest sensitivity of any threshold that clears at least `specificity` (0, 1] of the
    negatives; the threshold is found anew in each resample. NaN where one has one class only."""
    positive, score64 = check_scores(target, score)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    positives = positives[np.argsort(score64[positives], kind="stable")]
    negatives = negatives[np.argsort(score64[negatives], kind="stable")]
    # Of each negative, how many positives score no higher: missed at a threshold just above it.
    missed = np.searchsorted(score64[positives], score64[negatives], side="right")
    last_of_ties = np.searchsorted(score64[negatives], score64[negatives], side="right")

    def statistic(weights: Floats) -> Floats:
        misses = _cumulated(weights[positives])
        cleared = _cumulated(weights[negatives])
        enough = cleared[last_of_ties] >= specificity * cleared[-1] - 1e-9
        lowest = enough.argmax(axis=0)
        return divide(misses[-1] - misses[missed[lowest], np.arange(len(lowest))], misses[-1])

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

    def to_json(self) -> dict[str, Any]:
        """Columns of at most MAX_JSON_POINTS; null for the threshold that nothing reaches."""
        keep = _decimate(self.x, self.y, MAX_JSON_POINTS)
        threshold = self.threshold[keep].tolist()
        return {
            "x": self.x[keep].tolist(),
            "y": self.y[keep].tolist(),
            "threshold": [value if math.isfinite(value) else None for value in threshold],
        }


def roc_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The ROC curve: x = 1 - specificity, y = sensitivity, from (0, 0) to (1, 1).

    At most MAX_CURVE_POINTS, spread evenly along the curve: what is dropped moves the drawn line
    by less than a pixel, but the area under it is no longer the exact AUROC. `threshold` is in the
    unit of `score`, +inf at (0, 0). Raises MetricError as `auroc` does.
    """
    from sklearn.metrics import roc_curve  # a second; who asks for no curve has no need of it

    positive, score64 = check_scores(target, score)
    x, y, threshold = roc_curve(positive, score64)
    keep = _decimate(x, y)
    return Curve(x[keep], y[keep], threshold[keep])


def precision_recall_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The precision-recall curve: x = recall, y = precision, from recall 1 down to 0.

    At most MAX_CURVE_POINTS; `threshold` is in the unit of `score`, +inf at recall 0.
    Raises MetricError as `auroc` does.
    """
    from sklearn.metrics import precision_recall_curve  # see roc_points

    positive, score64 = check_scores(target, score)
    y, x, threshold = precision_recall_curve(positive, score64)
    keep = _decimate(x, y)
    return Curve(x[keep], y[keep], np.append(threshold, np.inf)[keep])


def _decimate(x: Floats, y: Floats, count: int = MAX_CURVE_POINTS) -> npt.NDArray[np.intp]:
    """Indices of at most `count` points, evenly along the curve's length, ends kept."""
    if len(x) <= count:
        return np.arange(len(x))
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    wanted = np.linspace(0, length[-1], count)
    keep: npt.NDArray[np.intp] = np.unique(np.searchsorted(length, wanted))
    return keep


@dataclass(frozen=True)
class Confusion:
    """How many studies went which way."""

    tp: int
    fp: int
    fn: int
    tn: int


def confusion(target: npt.ArrayLike, probability: npt.ArrayLike, threshold: float) -> Confusion:
    """Counts at `probability >= threshold`; one class only is fine, a NaN raises MetricError.

    >>> pneumo.confusion([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.5)
    Confusion(tp=1, fp=1, fn=1, tn=1)
    """
    table = _outcomes(target, probability, threshold)
    return Confusion(*(int(count) for count in table.sum(axis=1)))


RATES: Mapping[str, Callable[[Floats, Floats, Floats, Floats], Floats]] = {
    "accuracy": lambda tp, fp, fn, tn: divide(tp + tn, tp + fp + fn + tn),
    "precision": lambda tp, fp, fn, tn: divide(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: divide(tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn: divide(tn, tn + fp),
    "npv": lambda tp, fp, fn, tn: divide(tn, tn + fn),
    "f1": lambda tp, fp, fn, tn: divide(2 * tp, 2 * tp + fp + fn),
    "mcc": lambda tp, fp, fn, tn: divide(
        tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    ),
    "balanced_accuracy": lambda tp, fp, fn, tn: (divide(tp, tp + fn) + divide(tn, tn + fp)) / 2,
    "lr_positive": lambda tp, fp, fn, tn: divide(divide(tp, tp + fn), divide(fp, tn + fp)),
    "lr_negative": lambda tp, fp, fn, tn: divide(divide(fn, tp + fn), divide(tn, tn + fp)),
}
"""Every metric of the four counts tp, fp, fn, tn (each (R,)); NaN where a denominator is 0.
Recall is sensitivity, precision is PPV; mcc is Matthews' correlation (1975); the likelihood ratios
are sensitivity / (1 - specificity) and (1 - sensitivity) / specificity."""


UNDEFINED: Mapping[str, str] = {
    "accuracy": "no study",
    "precision": "no study is called positive",
    "recall": "no study is positive",
    "specificity": "no study is negative",
    "npv": "no study is called negative",
    "f1": "no study is positive or called positive",
    "mcc": "one class only, or every study called the same",
    "balanced_accuracy": "one class only",
    "lr_positive": "one class only, or no negative is called positive",
    "lr_negative": "one class only, or no negative is called negative",
}
"""Why a metric of RATES has no value."""


DENOMINATORS: Mapping[str, list[int]] = {
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


def log_loss_statistic(target: npt.ArrayLike, logit: npt.ArrayLike) -> Statistic:
    """Mean negative log-likelihood in nats, from logits: finite where a probability rounds to 0."""
    positive, logit64 = check_scores(target, logit, both_classes=False)
    return _mean_statistic(np.logaddexp(0, np.where(positive, -logit64, logit64)))


def brier_statistic(target: npt.ArrayLike, probability: npt.ArrayLike) -> Statistic:
    """Mean squared difference of probability and target (Brier 1950), from 0 (best) to 1."""
    positive, probability64 = check_scores(target, probability, both_classes=False)
    return _mean_statistic((probability64 - positive) ** 2)


def _mean_statistic(values: Floats) -> Statistic:
    return lambda weights: divide(values @ weights, weights.sum(axis=0))


def check_scores(
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
    positive, probability64 = check_scores(target, probability, both_classes=False)
    called = probability64 >= threshold
    table = (positive & called, ~positive & called, positive & ~called, ~positive & ~called)
    return np.stack(table).astype(np.float64)
