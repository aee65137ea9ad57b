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
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, vstack
from scipy.stats import rankdata
from sklearn.metrics import precision_recall_curve, roc_curve

from pneumo.errors import MetricError

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights (N, R), one column a resample, to values (R,) or (K, R); NaN where undefined."""

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point: every interval here is a 95 % interval."""
MAX_CURVE_POINTS = 500
MAX_JSON_POINTS = 100
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
    positive, score64 = check_scores(target, score)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    rank_sum = rankdata(score64)[positive].sum()
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
    positive, score64 = check_scores(target, score)
    x, y, threshold = roc_curve(positive, score64)
    keep = _decimate(x, y)
    return Curve(x[keep], y[keep], threshold[keep])


def precision_recall_points(target: npt.ArrayLike, score: npt.ArrayLike) -> Curve:
    """The precision-recall curve: x = recall, y = precision, from recall 1 down to 0.

    At most MAX_CURVE_POINTS; `threshold` is in the unit of `score`, +inf at recall 0.
    Raises MetricError as `auroc` does.
    """
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
    "accuracy": lambda tp, fp, fn, tn: divide(tp + tn, tp + fp + fn + tn),
    "precision": lambda tp, fp, fn, tn: divide(tp, tp + fp),
    "recall": lambda tp, fp, fn, tn: divide(tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn: divide(tn, tn + fp),
    "npv": lambda tp, fp, fn, tn: divide(tn, tn + fn),
    "f1": lambda tp, fp, fn, tn: divide(2 * tp, 2 * tp + fp + fn),
    "mcc": lambda tp, fp, fn, tn: divide(
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


WILSON = "Wilson, images taken as independent"
WILSON_OVER_PATIENTS = "Wilson over patients"
"""The method of a proportion of exactly 0 or 1, which never varies under resampling."""


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of the proportion `value` of `n` independent trials, n > 0."""
    z = Z_95
    centre = value + z * z / (2 * n)
    margin = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push an end past the value at 0 or 1.
    return min(value, max(0.0, (centre - margin) / scale)), max(value, (centre + margin) / scale)


# --- operating points -----------------------------------------------------------------------------


def youden_threshold(target: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """The threshold of the greatest sensitivity + specificity - 1 (Youden 1950).

    Always one of the probabilities; of equally good ones the highest. Raises MetricError for one
    class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    false_alarms, sensitivity, threshold = roc_curve(
        positive, probability64, drop_intermediate=False
    )
    positives, negatives = int(positive.sum()), int((~positive).sum())
    true = np.rint(sensitivity * positives).astype(np.int64)
    false = np.rint(false_alarms * negatives).astype(np.int64)
    # In whole numbers, so that equally good ones are equal. The first point calls nothing positive:
    # its threshold is infinite and no use on new data.
    return float(threshold[1:][np.argmax((true * negatives - false * positives)[1:])])


def sensitivity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, sensitivity: float
) -> float:
    """The highest threshold that keeps at least `sensitivity` (0, 1] of the positives.

    Always the probability of a positive. Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    descending = np.sort(probability64[positive])[::-1]
    # The guard keeps 0.9 * 10 = 9.000000000000002 from asking for a tenth positive.
    needed = math.ceil(sensitivity * len(descending) - 1e-9)
    return float(descending[max(needed, 1) - 1])


def specificity_threshold(
    target: npt.ArrayLike, probability: npt.ArrayLike, specificity: float
) -> float:
    """The lowest threshold that clears at least `specificity` (0, 1] of the negatives.

    Always one of the probabilities, or the next float above the highest where none clears enough.
    Raises MetricError for one class only or a NaN.
    """
    positive, probability64 = check_scores(target, probability)
    negatives = np.sort(probability64[~positive])
    candidates = np.unique(probability64)
    cleared = np.searchsorted(negatives, candidates, side="left")
    enough = np.flatnonzero(cleared >= specificity * len(negatives) - 1e-9)
    if len(enough) == 0:
        return float(np.nextafter(candidates[-1], np.inf))
    return float(candidates[enough[0]])


# --- probabilities --------------------------------------------------------------------------------


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


# --- intervals ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Resampled:
    """Statistics of one kind: their values (K,), and what they were in each resample (K, R)."""

    value: Floats
    drawn: Floats

    def derive(self, function: Callable[[Floats], Floats]) -> Self:
        """A function (K, R) -> (J, R) of these statistics, as statistics of their own."""
        return replace(self, value=function(self.value[:, None])[:, 0], drawn=function(self.drawn))

    def estimate(self, row: int = 0, reason: str = "undefined for these studies") -> Estimate:
        """One of them with its 95 % percentile interval; `reason` is said where it has no value."""
        return _percentile_interval(float(self.value[row]), self.drawn[row], reason)


def first_less_second(pair: Floats) -> Floats:
    """(2, R) to (1, R)."""
    return pair[:1] - pair[1:]


def resample(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Resampled]:
    """Each statistic on all studies and on `resamples` draws of the patients, with replacement.

    `patient` (N,) names the patient of each sample. All statistics see the same resamples, so a
    difference of two is a statistic like any other. The result does not depend on the order of the
    samples. (Field & Welsh 2007: bootstrapping clustered data.)
    """
    name, index = np.unique(patient, return_inverse=True)
    if len(index) == 0:
        return {key: Resampled(np.full(1, np.nan), np.full((1, 1), np.nan)) for key in statistics}
    drawn: dict[str, list[Floats]] = {key: [] for key in statistics}
    for counts in _resample_counts(len(name), len(index), resamples, seed):
        weights = counts[index]
        for key, statistic in statistics.items():
            drawn[key].append(np.atleast_2d(statistic(weights)))
    one = np.ones((len(index), 1))
    return {
        key: Resampled(np.atleast_2d(statistic(one))[:, 0], np.concatenate(drawn[key], axis=1))
        for key, statistic in statistics.items()
    }


@dataclass(frozen=True, eq=False)
class Part:
    """Some statistics after resampling, or the reason why there are none."""

    resampled: Mapping[str, Resampled]
    reason: str | None = None

    def estimate(self, key: str, row: int = 0, reason: str = "undefined here") -> Estimate:
        """The estimate of a statistic of the part; undefined where the part is."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].estimate(row, reason)

    def difference(self, key: str) -> Estimate:
        """The estimate of the first of two stacked statistics less the second."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].derive(first_less_second).estimate()


def resample_parts(
    patient: npt.NDArray[Any],
    parts: Mapping[str, Callable[[], Mapping[str, Statistic]]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Part]:
    """`resample` of all statistics of all parts in one pass; a part may raise MetricError."""
    statistics: dict[str, Mapping[str, Statistic]] = {}
    reasons: dict[str, str] = {}
    for name, build in parts.items():
        try:
            statistics[name] = build()
        except MetricError as error:
            reasons[name] = str(error)
    flat = {f"{name}/{key}": one for name, some in statistics.items() for key, one in some.items()}
    found = resample(patient, flat, resamples=resamples, seed=seed)
    return {
        name: Part({}, reasons[name])
        if name in reasons
        else Part({key: found[f"{name}/{key}"] for key in statistics[name]})
        for name in parts
    }


def patient_bootstrap(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Each statistic (R,) with its 95 % percentile interval over resamples of the patients.

    An interval is null, with a reason, where more than 5 % of the resamples leave the statistic
    undefined (too few patients of a class) or where it never varies.
    """
    found = resample(patient, statistics, resamples=resamples, seed=seed)
    return {key: one.estimate() for key, one in found.items()}


def within(rows: npt.NDArray[np.intp], statistic: Statistic) -> Statistic:
    """`statistic`, which was built of the samples `rows` (indices) alone, of weights of all."""
    return lambda weights: statistic(weights[rows])


def stack(*statistics: Statistic) -> Statistic:
    """Several statistics (R,) as one (K, R)."""
    return lambda weights: np.stack([statistic(weights) for statistic in statistics])


def sums_statistic(
    code: npt.NDArray[np.integer[Any]], num_codes: int, *values: npt.NDArray[Any]
) -> Statistic:
    """Weighted sums by group: (N, R) to (len(values) * num_codes, R), the first value's sums first.

    `code` (N,) names the group of each sample, 0 to num_codes - 1, or -1 for none; each of `values`
    is (N,). Sparse: the cost does not grow with the number of groups.
    """
    rows = np.flatnonzero(code >= 0)
    tables = [
        csr_array(
            (np.asarray(value, dtype=np.float64)[rows], (code[rows], rows)),
            shape=(num_codes, len(code)),
        )
        for value in values
    ]
    table = vstack(tables, format="csr")
    return lambda weights: np.asarray(table @ weights)


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


# --- checks ---------------------------------------------------------------------------------------


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


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where the denominator is 0."""
    missing = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=missing, where=denominator != 0)
