"""Calibration: how far a probability can be trusted, and how it is corrected on val.

Temperature scaling (Guo 2017) and Platt's scaling (1999) are fitted on val by maximum likelihood
and used where they are better than nothing; test only reports. A weight of positives in training
shifts every logit by its logarithm, which only Platt's intercept can take back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    StatisticSet,
    as_json,
    divide,
    with_wilson,
)
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.operating_points import check_enough
from pneumo.evaluation.predictions import Predictions, sigmoid

Method = Literal["none", "temperature", "platt"]
"""From the simplest to the one with most numbers."""

FOLDS = 5
RULE = (
    "the simplest of none, temperature and Platt whose log loss on val, under "
    f"{FOLDS}-fold cross-validation by patient, is within one standard error of the lowest"
)
NO_ECE_INTERVAL = (
    "resamples make the calibration error greater, so their interval does not cover it"
)
_MAX_STEPS = 40
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Scaling:
    """Calibrated probability = sigmoid(slope * logit + intercept); a temperature is 1 / slope."""

    method: Method
    slope: float
    intercept: float
    log_loss: float
    """On val in nats, cross-validated by patient."""

    def apply(self, logit: npt.ArrayLike) -> Floats:
        """The calibrated probabilities of logits of any shape."""
        return sigmoid(self.slope * np.asarray(logit, dtype=np.float64) + self.intercept)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `temperature` too where it is one."""
        numbers = as_json(self, leave_out={"method"})
        if self.method == "temperature":
            numbers["temperature"] = 1 / self.slope
        return dict(numbers)


@dataclass(frozen=True)
class Calibration:
    """Both scalings as fitted on val, and which one is used."""

    chosen: Scaling | None
    """None where val can't be calibrated on; of method "none" where that is as good as scaling."""
    temperature: Scaling | None
    """As fitted; None where its slope is not above 0, as `platt`."""
    platt: Scaling | None
    log_loss_before: float | None
    """On val in nats, of the logits as they are."""
    reason: str | None = None
    """Why there is none."""

    def apply(self, logit: npt.NDArray[Any]) -> Floats:
        """The calibrated probabilities (N,); NaN where there is no calibration."""
        if self.chosen is None:
            return np.full(len(logit), np.nan)
        return self.chosen.apply(logit)

    def to_json(self) -> dict[str, Any]:
        """The chosen one flat, both as they were fitted, and the rule."""
        chosen = self.chosen
        return {
            "method": None if chosen is None else chosen.method,
            **({} if chosen is None else chosen.to_json()),
            "chosen_on": "val",
            "rule": RULE,
            "log_loss_before": self.log_loss_before,
            "fitted": {
                "temperature": as_json(self.temperature),
                "platt": as_json(self.platt),
            },
            **({} if self.reason is None else {"reason": self.reason}),
        }


# --- fitted on val --------------------------------------------------------------------------------


def calibrate(val: Predictions, *, min_patients: int, seed: int) -> Calibration:
    """Both scalings fitted on `val`, and the one that RULE chooses.

    There is none where `val` has fewer than `min_patients` patients of a class, or can't be ranked.
    Where the free one, Platt's, would turn the order round (slope not above 0), neither is used: a
    temperature cannot turn the order of logits round that are all of one sign.
    """
    try:
        positive, logit = check_scores(val.target, val.logit)
        check_enough(val, "youden", min_patients)
    except MetricError as error:
        return Calibration(None, None, None, None, f"val: {error}")
    folds = _draw_folds(val.patient, seed)
    losses = {"none": _log_losses(positive, logit)}
    before = float(np.mean(losses["none"]))
    fitted: dict[str, Scaling] = {"none": Scaling("none", 1.0, 0.0, before)}
    for method in ("temperature", "platt"):
        slope, intercept = fit_scaling(method, positive, logit)
        if slope > 0:
            scaled = _scale_by_others(method, positive, logit, folds)
            losses[method] = _log_losses(positive, scaled)
            fitted[method] = Scaling(method, slope, intercept, float(np.mean(losses[method])))
    if "platt" not in fitted:
        reason = "val: a higher logit does not mean a higher risk, so scaling can't correct it"
        return Calibration(None, None, None, before, reason)
    chosen = fitted[_choose_simplest(losses, val.patient)]
    return Calibration(chosen, fitted.get("temperature"), fitted["platt"], before)


def _choose_simplest(losses: Mapping[str, Floats], patient: npt.NDArray[Any]) -> str:
    """The first whose mean loss is above the lowest by no more than the standard error of that
    difference, whose studies are alike within a patient."""
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    _, index = np.unique(patient, return_inverse=True)

    def is_close(loss: Floats) -> bool:
        excess = loss - best
        by_patient = np.bincount(index, excess - excess.mean())
        return bool(excess.mean() <= math.sqrt(float((by_patient**2).sum())) / len(excess))

    return next(method for method, loss in losses.items() if is_close(loss))


def fit_scaling(method: Method, target: npt.ArrayLike, logit: npt.ArrayLike) -> tuple[float, float]:
    """Slope and intercept of the greatest likelihood; the intercept of a temperature is 0.

    The targets are Platt's, (P + 1) / (P + 2) and 1 / (Q + 2) of P positives and Q negatives: as if
    one more study of each class had been seen. That keeps the fit finite where the logits
    separate the classes, and does not matter where there are many. Raises MetricError.
    """
    positive, logit64 = check_scores(target, logit)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    soft = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    reach = float(np.abs(logit64).max())
    if np.ptp(logit64) == 0 or reach == 0:
        return 0.0, 0.0  # logits without information
    # A soft target is a study of either class, each with a weight.
    model = LogisticRegression(
        C=np.inf, fit_intercept=method == "platt", solver="newton-cholesky", tol=1e-10
    )
    both = np.concatenate([logit64, logit64])[:, None] / reach
    classes = np.repeat([1, 0], len(logit64))
    model.fit(both, classes, sample_weight=np.concatenate([soft, 1 - soft]))
    slope = float(model.coef_[0, 0]) / reach
    if method == "temperature":
        return max(slope, 0.0), 0.0  # 0: a higher logit means a lower risk
    return slope, float(model.intercept_[0])


def cross_validated_losses(
    method: Method,
    target: npt.ArrayLike,
    logit: npt.ArrayLike,
    patient: npt.NDArray[Any],
    *,
    seed: int,
) -> Floats:
    """The log loss in nats of each study (N,), scaled by a fit on the other folds' patients.

    Raises MetricError for one class only, a NaN or an infinity.
    """
    positive, logit64 = check_scores(target, logit)
    scaled = _scale_by_others(method, positive, logit64, _draw_folds(patient, seed))
    return _log_losses(positive, scaled)


def _scale_by_others(
    method: Method, positive: npt.NDArray[np.bool_], logit: Floats, folds: npt.NDArray[np.intp]
) -> Floats:
    scaled = np.empty(len(logit))
    for fold in range(FOLDS):
        held_out = folds == fold
        try:
            slope, intercept = fit_scaling(method, positive[~held_out], logit[~held_out])
        except MetricError:  # a fold of one class only
            slope, intercept = 1.0, 0.0
        scaled[held_out] = slope * logit[held_out] + intercept
    return scaled


def _draw_folds(patient: npt.NDArray[Any], seed: int) -> npt.NDArray[np.intp]:
    """The fold of each study, 0 to FOLDS - 1; a patient's studies share one. (N,)"""
    name, index = np.unique(patient, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(name))
    return np.asarray(order[index] % FOLDS)


def _log_losses(positive: npt.NDArray[np.bool_], logit: Floats) -> Floats:
    return np.logaddexp(0, np.where(positive, -logit, logit))


def fit_logistic(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
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


def _separated_slope(x: Floats, y: Floats, weights: Floats) -> Floats:
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


def fit_offset(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,) with slope 1.

    One a column of `weights` (N, R); NaN where the drawn `y` are all 0 or all 1.
    """
    if not 0 < y.sum() < len(y):
        return np.full(weights.shape[1], np.nan)

    def surplus(intercept: float) -> float:
        return float(np.sum(expit(x + intercept) - y))

    reach = float(np.abs(x).max()) + 40.0
    whole = np.array([[brentq(surplus, -reach, reach)]])
    fitted: Floats = _fit_weighted(np.ones((len(x), 1)), y, weights, whole, offset=x)[0]
    return fitted


def _fit_weighted(
    columns: Floats, y: Floats, weights: Floats, start: Floats, offset: Floats | float = 0.0
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


# --- reported on any split ------------------------------------------------------------------------


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
    one = np.ones(len(bins))
    return {
        "brier": metrics.brier_statistic(positive, probability),
        "log_loss": metrics.log_loss_statistic(positive, scaled),
        "offset": partial(fit_offset, scaled, positive.astype(float)),
        "bins": bootstrap.sums_statistic(bins, int(bins.max()) + 1, one, positive, probability),
    }


@dataclass(frozen=True)
class BinFacts:
    """What the resampled sums of the bins do not hold."""

    patients: tuple[int, ...]
    """By bin."""
    ece_if_calibrated: float


def describe_bins(rows: Predictions, scaling: Scaling | None, num_bins: int) -> BinFacts:
    """Of the probabilities of `rows`: who is in each bin, and how large the calibration error is on
    average if they are right: a sum of targets is about normal, its variance that of independent
    ones times the design effect of a patient's studies in one bin, which err alike."""
    positive, scaled = _scale(rows.target, rows.logit, scaling)
    probability = sigmoid(scaled)
    bins = bin_by_probability(probability, num_bins)
    _, index = np.unique(rows.patient, return_inverse=True)
    residual = positive - probability
    pairs, pair = np.unique(np.stack([bins, index]), axis=1, return_inverse=True)
    squares = float(residual @ residual)
    alike = float((np.bincount(pair, residual) ** 2).sum()) / squares if squares else 1.0
    variances = max(1.0, alike) * np.bincount(bins, probability * (1 - probability))
    return BinFacts(
        patients=tuple(np.bincount(pairs[0]).tolist()),
        ece_if_calibrated=float(np.sqrt(2 / np.pi * variances).sum()) / len(bins),
    )


def recalibration_statistic(target: npt.ArrayLike, logit: npt.ArrayLike) -> Statistic:
    """Intercept and slope (2, R) of the logistic regression of the target on the logits."""
    positive, logit64 = check_scores(target, logit)
    return lambda weights: np.stack(fit_logistic(logit64, positive.astype(float), weights)[::-1])


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
        brier=found["brier"].estimate(),
        log_loss=found["log_loss"].estimate(),
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
        brier_decomposition=_decompose(sums, float(found["brier"].value[0])),
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
