"""Metrics of predictions: arrays in, values out.

`target` (N,) holds 0 and 1. A ranking metric takes `score` (N,), the logit: a float32 sigmoid makes
every large logit exactly 1, which are ties that the logits do not have. A thresholded metric calls
a study positive when its probability is greater than or equal to the threshold.

A metric with an interval is a `Statistic` of sample weights, see `bootstrap`; those of the order of
the scores are in `ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import SampleWeights, Statistic, divide, sums_statistic
from pneumo.evaluation.estimates import Floats

MAX_CURVE_POINTS = 500
MAX_JSON_POINTS = 100


def auroc(target: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """The probability that a random positive scores above a random negative; ties count one half.

    Exact, by midranks (Hanley & McNeil 1982). `target` (N,) of 0 and 1, `score` (N,) of real
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


def called_statistic(
    positive: npt.NDArray[np.bool_], score: Floats, thresholds: Sequence[float]
) -> Statistic:
    """Positives, then negatives, called positive at each of `thresholds` (T,), in any order:
    (2 * (1 + T), R); the first row of each class counts all of its samples."""
    ascending, place = np.unique(np.asarray(thresholds, dtype=np.float64), return_inverse=True)
    level = np.searchsorted(ascending, score, side="right")
    num_levels = len(ascending) + 1
    sums = sums_statistic(level + num_levels * positive, 2 * num_levels, None)
    rows = np.concatenate([[0], place + 1])

    def statistic(weights: SampleWeights) -> Floats:
        by_class = sums(weights).reshape(2, num_levels, -1)
        called = np.cumsum(by_class[:, ::-1], axis=1)[::-1, ::-1]
        return called[:, rows].reshape(2 * len(rows), -1)

    return statistic


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of a curve: x (K,), y (K,) and the probability threshold (K,) of each."""

    x: Floats
    y: Floats
    threshold: Floats

    def to_json(self) -> dict[str, Any]:
        """At most MAX_JSON_POINTS points, by column; null for the infinite threshold."""
        keep = _decimate(self.x, self.y, MAX_JSON_POINTS)
        threshold = self.threshold[keep].tolist()
        return {
            "x": self.x[keep].tolist(),
            "y": self.y[keep].tolist(),
            "threshold": [value if math.isfinite(value) else None for value in threshold],
        }


def roc_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The ROC curve: x = 1 - specificity, y = sensitivity, from (0, 0) to (1, 1).

    At most MAX_CURVE_POINTS, spread evenly along the curve. That moves a drawn curve by less than a
    pixel, but the area under it is not the exact AUROC. `threshold` is in the unit of `score`, +inf
    at (0, 0). Raises MetricError as `auroc` does.
    """
    from sklearn.metrics import roc_curve  # takes a second to import

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
    """Counts of a confusion matrix."""

    tp: int
    fp: int
    fn: int
    tn: int


def confusion(target: npt.ArrayLike, probability: npt.ArrayLike, threshold: float) -> Confusion:
    """Counts at `probability >= threshold`. One class is enough; a NaN raises MetricError.

    >>> pneumo.confusion([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.5)
    Confusion(tp=1, fp=1, fn=1, tn=1)
    """
    positive, probability64 = check_scores(target, probability, both_classes=False)
    called = probability64 >= threshold
    cells = (positive & called, ~positive & called, positive & ~called, ~positive & ~called)
    return Confusion(*(int(cell.sum()) for cell in cells))


def _likelihood_ratio(of_positives: Floats, of_negatives: Floats) -> Floats:
    """Infinite where no negative is called so, but a positive is: such a resample has no bound."""
    is_infinite = (of_negatives == 0) & (of_positives > 0)
    return np.where(is_infinite, np.inf, divide(of_positives, of_negatives))


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
    "lr_positive": lambda tp, fp, fn, tn: _likelihood_ratio(
        divide(tp, tp + fn), divide(fp, tn + fp)
    ),
    "lr_negative": lambda tp, fp, fn, tn: _likelihood_ratio(
        divide(fn, tp + fn), divide(tn, tn + fp)
    ),
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
"""The indices of tp, fp, fn, tn that make up the denominator of each proportion in RATES."""


def rates(counts: Confusion) -> dict[str, float]:
    """Every metric of RATES at these counts; NaN where undefined."""
    columns = [np.array([float(n)]) for n in (counts.tp, counts.fp, counts.fn, counts.tn)]
    return {name: float(rate(*columns)[0]) for name, rate in RATES.items()}


def youden_threshold(target: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The threshold of the greatest sensitivity + specificity - 1 (Youden 1950).

    One of the probabilities; of equally good ones the highest. Raises MetricError for one class
    only or a NaN.

    >>> pneumo.youden_threshold([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    0.9
    """
    from sklearn.metrics import roc_curve  # takes a second to import

    positive, probability64 = check_scores(target, probability)
    false_alarms, sensitivity, threshold = roc_curve(
        positive, probability64, drop_intermediate=False
    )
    positives, negatives = int(positive.sum()), int((~positive).sum())
    true = np.rint(sensitivity * positives).astype(np.int64)
    false = np.rint(false_alarms * negatives).astype(np.int64)
    # In integers, so that equally good ones are equal. The first point has an infinite threshold,
    # which calls nothing positive.
    return float(threshold[1:][np.argmax((true * negatives - false * positives)[1:])])


def sensitivity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, sensitivity: float
) -> float:
    """The highest threshold with at least `sensitivity` (0, 1].

    It is the probability of a positive. Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    descending = np.sort(probability64[positive])[::-1]
    # Without the 1e-9, 0.9 * 10 = 9.000000000000002 would require a tenth positive.
    needed = math.ceil(sensitivity * len(descending) - 1e-9)
    return float(descending[max(needed, 1) - 1])


def specificity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, specificity: float
) -> float:
    """The lowest threshold with at least `specificity` (0, 1].

    It is one of the probabilities, or the next float above the highest of them. Raises MetricError
    for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    negatives = np.sort(probability64[~positive])
    candidates = np.unique(probability64)
    below = np.searchsorted(negatives, candidates, side="left")
    enough = np.flatnonzero(below >= specificity * len(negatives) - 1e-9)
    if len(enough) == 0:
        return float(np.nextafter(candidates[-1], np.inf))
    return float(candidates[enough[0]])


def brier_statistic(target: npt.ArrayLike, probability: npt.ArrayLike) -> Statistic:
    """Mean squared difference of probability and target (Brier 1950), 0 (best) to 1."""
    positive, probability64 = check_scores(target, probability, both_classes=False)
    return mean_statistic((probability64 - positive) ** 2)


def mean_statistic(values: Floats) -> Statistic:
    """The mean of `values`, (N,) or (K, N)."""
    return lambda weights: divide(values @ weights.astype(np.float64), weights.sum(axis=0))


def mean_of_known_statistic(values: Floats) -> Statistic:
    """The mean of the `values` (N,) that are not NaN; NaN where none is drawn."""
    table = np.stack([np.nan_to_num(values), ~np.isnan(values)])

    def statistic(weights: SampleWeights) -> Floats:
        return divide(*(table @ weights))

    return statistic


def check_scores(
    target: npt.ArrayLike, score: npt.ArrayLike, *, both_classes: bool = True
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """The targets as booleans and the scores as float64. Raises MetricError for unusable ones."""
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
