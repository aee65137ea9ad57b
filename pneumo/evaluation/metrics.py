"""How good predictions are, and how sure that is: pure arithmetic, arrays in, values out.

Conventions. `target` (N,) holds 0 and 1. A ranking metric takes `score` (N,), the logit: a
probability is computed once, in float64, since a float32 sigmoid turns every large logit into
exactly 1 and so invents ties. A thresholded metric calls a study positive when its probability is
greater than or equal to the threshold.

A metric with an interval is a `Statistic` of sample weights, see `bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import (
    Floats,
    Statistic,
    Weights,
    as_slice,
    divide,
    sums_statistic,
    take,
)

Indices = npt.NDArray[np.intp]

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


@dataclass(frozen=True, eq=False)
class Ranking:
    """Some samples of a set, each class sorted by score from the lowest up."""

    positives: Indices | slice
    """Of the set: (P,)."""
    negatives: Indices | slice
    below: Indices
    """How many of the negatives score lower than each positive: (P,)."""
    tied: Indices
    """Which of the positives score the same as a negative."""
    up_to: Indices
    """How many of the negatives score no higher than each of those."""
    worse: Indices | slice
    """How many of the positives score lower than each positive: (P,)."""

    @classmethod
    def of(
        cls,
        positive: npt.NDArray[np.bool_],
        score: Floats,
        rows: npt.NDArray[np.bool_] | None = None,
    ) -> Self:
        """That of the samples of the mask `rows`; None: of all. All are (N,)."""
        chosen = np.argsort(score, kind="stable")
        chosen = chosen if rows is None else chosen[rows[chosen]]
        positives, negatives = chosen[positive[chosen]], chosen[~positive[chosen]]
        high, low = score[positives], score[negatives]
        below, up_to = np.searchsorted(low, high), np.searchsorted(low, high, side="right")
        tied = np.flatnonzero(up_to > below)
        worse = as_slice(np.searchsorted(high, high))
        return cls(as_slice(positives), as_slice(negatives), below, tied, up_to[tied], worse)

    def weigh(self, weights: Weights, cleared: Weights | None = None) -> WeighedRanking:
        """Under weights (N, R) of the samples of the set; `cleared` where it is known."""
        if cleared is None:
            cleared = _cumulate(take(weights, self.negatives))
        drawn = take(weights, self.positives)
        return WeighedRanking(self, drawn, drawn.astype(np.float64), cleared)


@dataclass(frozen=True, eq=False)
class WeighedRanking:
    """A ranking whose samples count as often as R resamples drew them."""

    ranking: Ranking
    counts: Weights
    """Of the positives: (R, P)."""
    drawn: Floats
    """The same."""
    cleared: Weights
    """Of so many negatives from the lowest up: (R, negatives + 1)."""

    @cached_property
    def missed(self) -> Weights:
        """Of so many positives from the lowest up: (R, P + 1)."""
        return _cumulate(self.counts)

    @cached_property
    def below(self) -> Floats:
        """Of the negatives that score lower than each positive: (R, P)."""
        return np.take(self.cleared, self.ranking.below, axis=1).astype(np.float64)

    @property
    def beaten(self) -> Floats:
        """`below`, and half of the negatives that score the same."""
        if not len(self.ranking.tied):
            return self.below
        beaten = self.below.copy()
        up_to = np.take(self.cleared, self.ranking.up_to, axis=1)
        beaten[:, self.ranking.tied] = (beaten[:, self.ranking.tied] + up_to) / 2
        return beaten

    @cached_property
    def wins(self) -> Floats:
        """Of all positives over negatives: (R,)."""
        found: Floats = np.vecdot(self.drawn, self.beaten)
        return found

    @property
    def auroc(self) -> Floats:
        """(R,)"""
        return divide(self.wins, self.drawn.sum(axis=1) * self.cleared[:, -1])

    @property
    def average_precision(self) -> Floats:
        """(R,)"""
        # Ties enter all at once.
        worse = take(self.missed[:, :-1].T, self.ranking.worse)
        worse64 = worse.astype(np.float64)
        hits: Floats = np.subtract(self.missed[:, -1:], worse64, out=worse64)
        calls = self.cleared[:, -1:] - self.below
        calls += hits
        np.maximum(calls, np.finfo(np.float64).tiny, out=calls)  # 0 of no call is 0
        hits /= calls
        return divide(np.vecdot(self.drawn, hits), self.drawn.sum(axis=1))


def auroc_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """`auroc` of weighted samples; NaN where a resample has one class only."""
    ranking = Ranking.of(*check_scores(target, score))
    return lambda weights: ranking.weigh(weights).auroc


def few_values_auroc_statistic(
    target: npt.ArrayLike, score: npt.ArrayLike, rows: npt.NDArray[np.bool_]
) -> Statistic:
    """`auroc` of the samples of a mask, whose scores (N,) have few values."""
    positive, score64 = check_scores(target, score)
    values, level = np.unique(score64, return_inverse=True)
    num = len(values)
    code = np.where(rows, 2 * level + positive, 2 * num)

    def statistic(weights: Weights) -> Floats:
        counts = [np.bincount(code, one, 2 * num + 1)[:-1] for one in weights.T]
        table = np.reshape(counts, (-1, num, 2))
        negatives, positives = table[..., 0], table[..., 1]
        beaten = np.cumsum(negatives, axis=1) - negatives / 2
        wins = np.vecdot(positives, beaten)
        return divide(wins, positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def average_precision_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """Mean precision over the positives, scikit-learn's step-wise sum; NaN without a positive."""
    ranking = Ranking.of(*check_scores(target, score))
    return lambda weights: ranking.weigh(weights).average_precision


def _find_sensitivity(
    weighed: WeighedRanking, high: Floats, low: Floats, specificity: float
) -> Floats:
    """The highest sensitivity (R,) of any threshold that clears at least `specificity` (0, 1] of
    the negatives; found anew in each resample, NaN where it has no positive. `high` and `low` are
    the sorted scores of the positives and of the negatives."""
    needed = specificity * weighed.cleared[:, -1] - 1e-9
    last = [np.searchsorted(*pair) - 1 for pair in zip(weighed.cleared, needed, strict=True)]
    missed = np.searchsorted(high, low[np.maximum(last, 0)], side="right")
    all_positives = weighed.missed[:, -1]
    found = all_positives - weighed.missed[np.arange(len(missed)), missed]
    return divide(found, all_positives)


def headline_statistic(
    target: npt.ArrayLike, score: npt.ArrayLike, specificity: float
) -> Statistic:
    """AUROC, average precision and the sensitivity at a specificity: (3, R)."""
    positive, score64 = check_scores(target, score)
    ranking = Ranking.of(positive, score64)
    high, low = score64[ranking.positives], score64[ranking.negatives]

    def statistic(weights: Weights) -> Floats:
        weighed = ranking.weigh(weights)
        sensitivity = _find_sensitivity(weighed, high, low, specificity)
        return np.stack([weighed.auroc, weighed.average_precision, sensitivity])

    return statistic


def called_statistic(
    positive: npt.NDArray[np.bool_], score: Floats, thresholds: Sequence[float]
) -> Statistic:
    """Positives, then negatives, that score at or above each of `thresholds` (T,), which may stand
    in any order: (2 * (1 + T), R), all of the class first."""
    ascending, place = np.unique(np.asarray(thresholds, dtype=np.float64), return_inverse=True)
    level = np.searchsorted(ascending, score, side="right")
    num_levels = len(ascending) + 1
    sums = sums_statistic(level + num_levels * positive, 2 * num_levels, None)
    rows = np.concatenate([[0], place + 1])

    def statistic(weights: Weights) -> Floats:
        by_class = sums(weights).reshape(2, num_levels, -1)
        called = np.cumsum(by_class[:, ::-1], axis=1)[::-1, ::-1]
        return called[:, rows].reshape(2 * len(rows), -1)

    return statistic


def _cumulate(weights: Weights) -> Weights:
    """Column k holds the sum of the first k columns: (R, N) to (R, N + 1)."""
    sums = np.empty((len(weights), weights.shape[1] + 1), dtype=weights.dtype)
    sums[:, 0] = 0
    import torch  # numpy's takes twice as long; who resamples nothing has no need of it

    given, out = torch.from_numpy(weights), torch.from_numpy(sums[:, 1:])
    torch.cumsum(given, dim=1, dtype=given.dtype, out=out)
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


def brier_statistic(target: npt.ArrayLike, probability: npt.ArrayLike) -> Statistic:
    """Mean squared difference of probability and target (Brier 1950), from 0 (best) to 1."""
    positive, probability64 = check_scores(target, probability, both_classes=False)
    return mean_statistic((probability64 - positive) ** 2)


def mean_statistic(values: Floats) -> Statistic:
    """The mean of `values`, (N,) or (K, N)."""
    return lambda weights: divide(values @ weights.astype(np.float64), weights.sum(axis=0))


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
