"""Logistic regressions on one variable, fitted to all resamples of a bootstrap at once.

A library would fit one resample after the other.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import brentq
from scipy.special import expit

from pneumo.evaluation.bootstrap import (
    SampleWeights,
    Statistic,
    as_slice,
    computed_once,
    take,
)
from pneumo.evaluation.estimates import Floats
from pneumo.evaluation.metrics import check_scores

_MAX_STEPS = 40
_TOLERANCE = 1e-9
_MANY = 5_000
"""From this many samples on, `LogitSample` replaces them by fewer points."""
_PIECE_LOGITS, _POINTS = 0.5, 10
"""Width of a piece in logits, and its points. The logistic function interpolated at them has an
error of 1e-12, and of 1e-8 where the slope is four times as steep."""


def fit_logistic(x: Floats, y: Floats, weights: SampleWeights) -> tuple[Floats, Floats]:
    """Slope (R,) and intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,).

    One fit for each column of `weights` (N, R). Where `x` separates the classes the slope is
    infinite and the intercept NaN; both are NaN for one class or a constant `x`.
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


def _separated_slope(x: Floats, y: Floats, weights: SampleWeights) -> Floats:
    """Infinity (R,) where every drawn x of y = 1 is at or above all those of y = 0, minus infinity
    where it is at or below, NaN elsewhere."""
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


def fit_offset(x: Floats, y: Floats, weights: SampleWeights, start: float | None = None) -> Floats:
    """Intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,) with slope 1.

    One fit for each column of `weights` (N, R); NaN where the drawn `y` are all 0 or all 1.
    `start` is the intercept with weights of 1, where it is known.
    """
    if not 0 < y.sum() < len(y):
        return np.full(weights.shape[1], np.nan)
    whole = _fit_whole_offset(x, y) if start is None else start
    column = np.ones((len(x), 1))
    fitted: Floats = _fit_weighted(column, y, weights, np.array([[whole]]), offset=x)[0]
    return fitted


def _fit_whole_offset(x: Floats, y: Floats) -> float:
    reach = float(np.abs(x).max()) + 40.0
    return float(brentq(lambda intercept: np.sum(expit(x + intercept) - y), -reach, reach))


def _fit_weighted(
    columns: Floats, y: Floats, weights: SampleWeights, start: Floats, offset: Floats | float = 0.0
) -> Floats:
    """Coefficients (K, R) of the logistic regressions of `y` (N,) on `columns` (N, K), one for each
    column of `weights` (N, R), by Newton's method from `start` (K, 1); NaN without convergence."""
    num = columns.shape[1]
    converged = np.full((num, weights.shape[1]), np.nan)
    if np.isnan(start).any():
        return converged
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
        converged[:, active[done]] = b[:, done]
        lost = np.isnan(b).any(axis=0) | (np.abs(b - start).max(axis=0) > 50)
        keep = ~(done | lost)
        if not keep.any():
            break
        if not keep.all():
            b, active, drawn = b[:, keep], active[keep], drawn[:, keep]
    return converged


@dataclass(frozen=True, eq=False)
class LogitSample:
    """The logits of N studies, and M points that replace the studies in sums of smooth functions:
    few points for many studies, else the studies themselves."""

    positive: npt.NDArray[np.bool_]
    """(N,)"""
    logit: Floats
    """(N,)"""
    slope: float
    """That of the target on the logits of all studies, without its sign; NaN for few studies."""
    points: Floats
    """Logits: (M,)."""
    target: Floats
    """The class of each point, 0.0 or 1.0: (M,)."""
    weigh: Statistic
    """Weights (N, R) of the studies to weights (M, R) of the points."""

    @classmethod
    def of(cls, target: npt.ArrayLike, logit: npt.ArrayLike, scaling_slope: float = 1.0) -> Self:
        """`scaling_slope` is what the logits are multiplied with at most. All arrays are (N,).

        Raises MetricError for a NaN.
        """
        positive, logit64 = check_scores(target, logit, both_classes=False)
        classes = positive.astype(float)
        if len(logit64) < _MANY:
            return cls(positive, logit64, np.nan, logit64, classes, _as_floats)
        slope = abs(float(fit_logistic(logit64, classes, np.ones((len(logit64), 1)))[0][0]))
        steepest = max(1.0, scaling_slope, slope if np.isfinite(slope) else 1.0)
        points, of_class, weigh = _condense(logit64, positive, _PIECE_LOGITS / steepest)
        return cls(positive, logit64, slope, points, of_class, computed_once(weigh))


def _as_floats(weights: SampleWeights) -> Floats:
    return weights.astype(np.float64)


def _condense(
    x: Floats, positive: npt.NDArray[np.bool_], width: float
) -> tuple[Floats, Floats, Statistic]:
    """Points, class and weights of a LogitSample.

    The weighted sum of a smooth function of x is the same over the points as over the samples: the
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

    def statistic(weights: SampleWeights) -> Floats:
        drawn = take(weights, rows).astype(np.float64)
        sums = [drawn[:, part] @ table for part, (_, table) in zip(parts, pieces, strict=True)]
        return np.concatenate(sums, axis=1).T

    return np.concatenate([at for at, _ in pieces]), np.concatenate(of_class), statistic


def _interpolate(x: Floats) -> tuple[Floats, Floats]:
    """Points (K,) that replace ascending samples `x` (n,), and the weight of each point in each
    sample: (n, K)."""
    values, index = np.unique(x, return_inverse=True)
    if len(values) <= _POINTS:
        return values, np.eye(len(values))[index]
    middle, reach = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
    points = middle + reach * np.cos(np.pi * np.arange(_POINTS) / (_POINTS - 1))
    # One memory layout, so that every process sums up in the same order.
    return points, np.ascontiguousarray(BarycentricInterpolator(points, np.eye(_POINTS))(x))


def offset_statistic(sample: LogitSample, scaled: Floats) -> Statistic:
    """Intercept (R,) of the logistic regression of the target with slope 1 on `scaled` (M,), the
    points of the sample after a scaling."""
    everybody = sample.weigh(np.ones((len(sample.logit), 1)))
    start = float(fit_offset(scaled, sample.target, everybody)[0])
    return lambda weights: fit_offset(scaled, sample.target, sample.weigh(weights), start)


def recalibration_statistic(sample: LogitSample) -> Statistic:
    """Intercept and slope (2, R) of the logistic regression of the target on the logits.

    Raises MetricError for one class.
    """
    check_scores(sample.positive, sample.logit)

    def fit(weights: SampleWeights) -> Floats:
        return np.stack(fit_logistic(sample.logit, sample.positive.astype(float), weights)[::-1])

    if not 0 < sample.slope < np.inf:  # few studies, or none that a point replaces well
        return fit

    def statistic(weights: SampleWeights) -> Floats:
        drawn = sample.weigh(weights)
        found = np.stack(fit_logistic(sample.points, sample.target, drawn)[::-1])
        is_far = ~(np.abs(found[1]) < 4 * sample.slope)
        if is_far.any():
            found[:, is_far] = fit(weights[:, is_far])
        return found

    return statistic
