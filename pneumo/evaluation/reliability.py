"""How well the probabilities of a split are calibrated: bins, Brier, ECE, Cox's recalibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    StatisticSet,
    Weights,
    as_slice,
    divide,
    take,
    with_wilson,
)
from pneumo.evaluation.calibration import Scaling
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.predictions import Predictions, sigmoid

NO_ECE_INTERVAL = (
    "resamples make the calibration error greater, so their interval does not cover it"
)

_MAX_STEPS = 40
_TOLERANCE = 1e-9
_MANY = 5_000
"""Studies above which `condense` puts fewer points in their place."""
_PIECE_LOGITS, _POINTS = 0.5, 10
"""Interpolating the logistic function at so many points of a piece so wide errs by 1e-12; where a
slope is four times as steep by 1e-8."""


def fit_logistic(x: Floats, y: Floats, weights: Weights) -> tuple[Floats, Floats]:
    """Slope (R,) and intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,).

    One a column of `weights` (N, R). Where `x` separates the classes the slope is infinite and
    there is no intercept; NaN for one class or an `x` without spread.
    """
    centre, spread = float(x.mean()), float(x.std())
    if spread == 0:
        nothing = np.full(weights.shape[1], np.nan)
        return nothing, nothing
    columns = np.stack([np.ones(len(x)), (x - centre) / spread], axis=1)
    whole = _fit_weighted(columns, y, np.ones((len(x), 1)), np.zeros((2, 1)))
    intercept, slope = _fit_weighted(columns, y, weights, whole)
    lost = np.flatnonzero(np.isnan(slope))
    slope[lost] = _separated_slope(x, y, weights[:, lost])
    with np.errstate(invalid="ignore"):
        intercept = np.where(np.isfinite(slope), intercept - slope / spread * centre, np.nan)
    return slope / spread, intercept


def _separated_slope(x: Floats, y: Floats, weights: Weights) -> Floats:
    """Infinity (R,) where every drawn x of y = 1 is at or above all of y = 0, minus infinity where
    below, NaN elsewhere."""
    found = np.full(weights.shape[1], np.nan)
    if not 0 < y.sum() < len(y):
        return found
    ends = {}
    for value in (0, 1):
        drawn = (weights > 0) & (y == value)[:, None]
        lowest = np.where(drawn, x[:, None], np.inf).min(axis=0)
        ends[value] = lowest, np.where(drawn, x[:, None], -np.inf).max(axis=0)
    (low_0, high_0), (low_1, high_1) = ends[0], ends[1]
    varies = np.isfinite(low_0 + low_1) & (np.minimum(low_0, low_1) < np.maximum(high_0, high_1))
    found[varies & (low_1 >= high_0)] = np.inf
    found[varies & (high_1 <= low_0)] = -np.inf
    return found


def fit_offset(x: Floats, y: Floats, weights: Weights, start: float | None = None) -> Floats:
    """Intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,) with slope 1.

    One a column of `weights` (N, R); NaN where the drawn `y` are all 0 or all 1. `start`: of
    weights of 1, where it is known.
    """
    if not 0 < y.sum() < len(y):
        return np.full(weights.shape[1], np.nan)
    whole = _fit_whole_offset(x, y) if start is None else start
    fitted: Floats = _fit_weighted(np.ones((len(x), 1)), y, weights, np.array([[whole]]), offset=x)[
        0
    ]
    return fitted


def _fit_whole_offset(x: Floats, y: Floats) -> float:
    reach = float(np.abs(x).max()) + 40.0
    return float(brentq(lambda intercept: np.sum(expit(x + intercept) - y), -reach, reach))


def _fit_weighted(
    columns: Floats, y: Floats, weights: Weights, start: Floats, offset: Floats | float = 0.0
) -> Floats:
    """Coefficients (K, R) of the logistic regressions of `y` (N,) on `columns` (N, K), one for each
    column of `weights` (N, R), by Newton's method from `start` (K, 1); NaN where not settled.

    All resamples of a bootstrap at once, which a library would fit one after the other.
    """
    num = columns.shape[1]
    settled = np.full((num, weights.shape[1]), np.nan)
    if np.isnan(start).any():
        return settled
    products = np.einsum("nk,nl->kln", columns, columns).reshape(num * num, -1)
    shift = np.broadcast_to(offset, len(y))[:, None]
    active, drawn = np.arange(weights.shape[1]), weights
    b = np.repeat(start, len(active), axis=1)
    for _ in range(_MAX_STEPS):
        p = expit(columns @ b + shift)
        gradient = columns.T @ (drawn * (y[:, None] - p))
        curvature = (products @ (drawn * p * (1 - p))).T.reshape(-1, num, num)
        curvature[np.linalg.det(curvature) == 0] = np.nan
        step = np.linalg.solve(curvature, gradient.T[:, :, None])[:, :, 0].T
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(axis=0), _TOLERANCE))
        b = b + step
        done = np.abs(step).max(axis=0) < _TOLERANCE
        settled[:, active[done]] = b[:, done]
        lost = np.isnan(b).any(axis=0) | (np.abs(b - start).max(axis=0) > 50)
        keep = ~(done | lost)
        if not keep.any():
            break
        if not keep.all():
            b, active, drawn = b[:, keep], active[keep], drawn[:, keep]
    return settled


def condense(
    x: Floats, positive: npt.NDArray[np.bool_], width: float
) -> tuple[Floats, Floats, Statistic]:
    """Few points in place of many samples: their x (M,), their class (M,) as 0.0 or 1.0, and what
    makes weights (N, R) of the samples weights (M, R) of the points.

    A weighted sum of a smooth function of x over the points is that over the samples, as the
    function is interpolated at Chebyshev points in each piece of `width` (Trefethen 2013,
    Approximation Theory and Approximation Practice, chapters 5 and 8).
    """
    order = np.lexsort((x, positive))
    rows = as_slice(order)
    piece = np.floor(x[order] / width) * 2 + positive[order]
    bounds = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(x)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    pieces = [_interpolate(x[order[part]]) for part in parts]
    of_class = [
        np.full(len(at), piece[part.start] % 2) for (at, _), part in zip(pieces, parts, strict=True)
    ]

    def statistic(weights: Weights) -> Floats:
        drawn = take(weights, rows).astype(np.float64)
        sums = [drawn[:, part] @ table for part, (_, table) in zip(parts, pieces, strict=True)]
        return np.concatenate(sums, axis=1).T

    return np.concatenate([at for at, _ in pieces]), np.concatenate(of_class), statistic


def _interpolate(x: Floats) -> tuple[Floats, Floats]:
    """Points (K,) in place of ascending samples `x` (n,), and each one's part in each sample:
    (n, K)."""
    values, index = np.unique(x, return_inverse=True)
    if len(values) <= _POINTS:
        return values, np.eye(len(values))[index]
    middle, reach = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    points = middle + reach * np.cos(np.pi * np.arange(_POINTS) / (_POINTS - 1))
    # In one order, so that it is summed up in one order in whatever process.
    return points, np.ascontiguousarray(BarycentricInterpolator(points, np.eye(_POINTS))(x))


MEASURES = (
    "brier",
    "log_loss",
    "ece",
    "slope",
    "intercept",
    "intercept_at_slope_1",
    "in_the_large",
)


@dataclass(frozen=True)
class Bin:
    """Studies of nearly the same predicted probability."""

    n: int
    predicted: float
    """Their mean probability."""
    observed: Estimate
    """The fraction of them that is positive."""


@dataclass(frozen=True)
class CalibrationCurve:
    """The observed fraction of positives as a smooth function of the predicted probability."""

    predicted: tuple[float, ...]
    observed: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """Studies by predicted probability, in bins of equal width from 0 to 1."""

    negatives: tuple[int, ...]
    positives: tuple[int, ...]


@dataclass(frozen=True)
class Reliability:
    """How well the probabilities of a split are calibrated."""

    brier: Estimate
    log_loss: Estimate
    ece: Estimate
    """Mean distance of predicted and observed over the bins (Naeini 2015); never an interval, as
    resamples make it greater still."""
    slope: Estimate
    """Of the logistic recalibration (Cox 1958); 1 is right, below 1 too extreme."""
    intercept: Estimate
    """Of the same fit; 0 is right, and means little where the slope is not 1."""
    intercept_at_slope_1: Estimate
    """Of the recalibration whose slope is held at 1: calibration in the large on the logit's scale
    (Van Calster 2016); 0 is right, below 0 the probabilities are too high."""
    in_the_large: Estimate
    """Mean probability - fraction of positives; 0 is right, above 0 too high."""
    curve: tuple[Bin, ...]
    """From the lowest probability to the highest."""
    smooth: CalibrationCurve | None
    """None where the probabilities hardly vary."""
    histogram: Histogram | None
    brier_decomposition: dict[str, float] | None
    """Brier = reliability - resolution + uncertainty + within_bins (Murphy 1973; the last is what
    binning leaves over)."""

    ece_if_calibrated: float | None
    """What `ece` would be on average if these probabilities were right."""

    @classmethod
    def undefined(cls, reason: str) -> Reliability:
        """No estimate, and why."""
        nothing = Estimate.undefined(reason)
        return cls(
            **dict.fromkeys(MEASURES, nothing),
            curve=(),
            smooth=None,
            histogram=None,
            brier_decomposition=None,
            ece_if_calibrated=None,
        )


def bin_by_probability(probability: Floats, num_bins: int) -> npt.NDArray[np.int64]:
    """The bin of each probability (N,), from 0: as equal in number as ties allow, none empty."""
    middle = rankdata(probability) / max(len(probability), 1)  # of equal ones the mean rank
    bins = np.ceil(num_bins * middle - 1e-9)
    return np.asarray(np.unique(bins, return_inverse=True)[1])


def reliability_statistics(
    target: npt.ArrayLike, logit: npt.ArrayLike, scaling: Scaling | None, num_bins: int
) -> dict[str, Statistic]:
    """What `summarise_reliability` needs to have resampled, of the logits after `scaling`.

    The bins are those of the whole split, in every resample. Raises MetricError for a NaN.
    """
    positive, scaled = _scale(target, logit, scaling)
    probability = sigmoid(scaled)
    bins = bin_by_probability(probability, num_bins)
    # From logits: finite where a probability rounds to 0.
    log_loss = np.logaddexp(0, np.where(positive, -scaled, scaled))
    losses = (probability - positive) ** 2, log_loss
    return {
        "losses": metrics.mean_statistic(np.stack(losses)),
        "offset": _offset_statistic(scaled, positive),
        "bins": _bins_statistic(bins, positive, probability),
    }


def _bins_statistic(
    bins: npt.NDArray[np.int64], positive: npt.NDArray[np.bool_], probability: Floats
) -> Statistic:
    """Studies, positives and probabilities by bin: (3 * bins, R)."""
    num = int(bins.max()) + 1
    sums = bootstrap.sums_statistic(bins + num * positive, 2 * num, None, probability)

    def statistic(weights: Weights) -> Floats:
        by_class = sums(weights).reshape(2, 2, num, -1)
        count, predicted = by_class.sum(axis=1)
        return np.concatenate([count, by_class[0, 1], predicted])

    return statistic


@dataclass(frozen=True)
class BinFacts:
    """What the resampled sums of the bins do not hold."""

    patients: tuple[int, ...]
    """By bin."""
    ece_if_calibrated: float
    smooth: CalibrationCurve | None
    histogram: Histogram


def describe_bins(rows: Predictions, scaling: Scaling | None, num_bins: int) -> BinFacts:
    """Of the probabilities of `rows`: who is in each bin, and how large the calibration error is on
    average if they are right: a sum of targets is about normal, its variance that of independent
    ones times the design effect of a patient's studies in one bin, which err alike."""
    positive, scaled = _scale(rows.target, rows.logit, scaling)
    probability = sigmoid(scaled)
    bins = bin_by_probability(probability, num_bins)
    _, index = np.unique(rows.patient, return_inverse=True)
    residual = positive - probability
    num_patients = int(index.max()) + 1
    pairs, pair = np.unique(bins * num_patients + index, return_inverse=True)
    squares = float(residual @ residual)
    alike = float((np.bincount(pair, residual) ** 2).sum()) / squares if squares else 1.0
    variances = max(1.0, alike) * np.bincount(bins, probability * (1 - probability))
    return BinFacts(
        patients=tuple(np.bincount(pairs // num_patients).tolist()),
        ece_if_calibrated=float(np.sqrt(2 / np.pi * variances).sum()) / len(bins),
        smooth=fit_curve(positive, scaled),
        histogram=Histogram(
            *(
                tuple(np.histogram(probability[part], HISTOGRAM_BINS, (0, 1))[0].tolist())
                for part in (~positive, positive)
            )
        ),
    )


HISTOGRAM_BINS = 20


def fit_curve(positive: npt.NDArray[np.bool_], logit: Floats) -> CalibrationCurve | None:
    """A logistic regression on a cubic spline of the logit (Van Calster 2016), between the 1st and
    the 99th percentile; None of one class, or of logits too much alike for two knots."""
    knots = np.unique(np.quantile(logit, [0.05, 0.35, 0.65, 0.95]))
    if len(knots) < 2 or not 0 < positive.sum() < len(positive):
        return None
    model = make_pipeline(
        SplineTransformer(knots=knots[:, None], extrapolation="linear"),
        LogisticRegression(C=1000, solver="newton-cholesky"),  # finite where classes are separated
    )
    model.fit(logit[:, None], positive)
    shown = np.quantile(logit, np.linspace(0.01, 0.99, 50))
    observed = model.predict_proba(shown[:, None])[:, 1]
    return CalibrationCurve(tuple(sigmoid(shown).tolist()), tuple(observed.tolist()))


def _offset_statistic(logit: Floats, positive: npt.NDArray[np.bool_]) -> Statistic:
    target = positive.astype(float)
    if len(logit) < _MANY or not 0 < target.sum() < len(target):
        return partial(fit_offset, logit, target)
    points, of_class, weigh = condense(logit, positive, _PIECE_LOGITS)
    start = _fit_whole_offset(logit, target)
    return lambda weights: fit_offset(points, of_class, weigh(weights), start)


def recalibration_statistic(target: npt.ArrayLike, logit: npt.ArrayLike) -> Statistic:
    """Intercept and slope (2, R) of the logistic regression of the target on the logits."""
    positive, logit64 = check_scores(target, logit)

    def fit(weights: Weights) -> Floats:
        return np.stack(fit_logistic(logit64, positive.astype(float), weights)[::-1])

    if len(logit64) < _MANY:
        return fit
    slope = abs(float(fit(np.ones((len(logit64), 1)))[1, 0]))
    if not 0 < slope < np.inf:
        return fit
    points, of_class, weigh = condense(logit64, positive, _PIECE_LOGITS / slope)

    def statistic(weights: Weights) -> Floats:
        found = np.stack(fit_logistic(points, of_class, weigh(weights))[::-1])
        is_far = ~(np.abs(found[1]) < 4 * slope)
        if is_far.any():
            found[:, is_far] = fit(weights[:, is_far])
        return found

    return statistic


def summarise_reliability(
    found: Mapping[str, Resampled],
    recalibration: StatisticSet,
    facts: BinFacts,
    scaling: Scaling | None,
) -> Reliability:
    """`found` as by `reliability_statistics`, `recalibration` of the logits as they are."""
    num_bins = len(found["bins"].value) // 3
    sums = found["bins"].value.reshape(3, num_bins)
    observed = found["bins"].derive(_observed)
    error = found["bins"].derive(_expected_error)
    intercept, slope = _estimate_recalibration(recalibration, scaling)
    return Reliability(
        brier=found["losses"].estimate(0),
        log_loss=found["losses"].estimate(1),
        ece=Estimate(float(error.value[0]), None, None, "none", NO_ECE_INTERVAL),
        slope=slope,
        intercept=intercept,
        intercept_at_slope_1=found["offset"].estimate(reason="one class only"),
        in_the_large=found["bins"].derive(_in_the_large).estimate(),
        curve=tuple(
            Bin(
                int(sums[0, k]),
                float(sums[2, k] / sums[0, k]),
                with_wilson(observed.estimate(k), facts.patients[k]),
            )
            for k in range(num_bins)
        ),
        smooth=facts.smooth,
        histogram=facts.histogram,
        brier_decomposition=_decompose(sums, float(found["losses"].value[0])),
        ece_if_calibrated=facts.ece_if_calibrated,
    )


def _estimate_recalibration(
    found: StatisticSet, scaling: Scaling | None
) -> tuple[Estimate, Estimate]:
    """Intercept and slope after `scaling`."""
    if found.reason is not None:
        return (Estimate.undefined(found.reason),) * 2
    after = found.resampled["fit"].derive(partial(_recalibrate_scaled, scaling))
    reasons = {True: "the logits separate the classes", False: "the logits are all the same"}
    reason = reasons[bool(np.isinf(after.value[1]))]
    if np.isinf(after.value[1]):
        return (Estimate.undefined(reason, "patient bootstrap"),) * 2
    return after.estimate(0, reason), after.estimate(1, reason)


def _scale(
    target: npt.ArrayLike, logit: npt.ArrayLike, scaling: Scaling | None
) -> tuple[npt.NDArray[np.bool_], Floats]:
    positive, logit64 = check_scores(target, logit, both_classes=False)
    if scaling is None:
        return positive, logit64
    return positive, scaling.slope * logit64 + scaling.intercept


def _recalibrate_scaled(scaling: Scaling | None, found: Floats) -> Floats:
    """Regressing on slope * logit + intercept instead of the logit itself, with no new fit."""
    if scaling is None:
        return found
    slope = found[1] / scaling.slope
    with np.errstate(invalid="ignore"):
        return np.stack([found[0] - slope * scaling.intercept, slope])


def _observed(sums: Floats) -> Floats:
    count, positives, _ = np.split(sums, 3)
    return divide(positives, count)


def _expected_error(sums: Floats) -> Floats:
    count, positives, predicted = np.split(sums, 3)
    return divide(np.abs(positives - predicted).sum(axis=0), count.sum(axis=0))[None]


def _in_the_large(sums: Floats) -> Floats:
    count, positives, predicted = (part.sum(axis=0) for part in np.split(sums, 3))
    return divide(predicted - positives, count)[None]


def _decompose(sums: Floats, brier: float) -> dict[str, float]:
    count, positives, predicted = sums
    n, prevalence = count.sum(), positives.sum() / count.sum()
    reliability = float(count @ ((predicted - positives) / count) ** 2 / n)
    resolution = float(count @ (positives / count - prevalence) ** 2 / n)
    uncertainty = float(prevalence * (1 - prevalence))
    return {
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": uncertainty,
        "within_bins": brier - (reliability - resolution + uncertainty),
    }
