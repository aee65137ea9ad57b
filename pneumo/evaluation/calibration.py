"""Calibration: how far a probability can be trusted, and how it is corrected on val.

Temperature scaling (Guo 2017) and Platt's scaling (1999) are fitted on val by maximum likelihood;
test only reports. A weight of positives in training shifts every logit by its logarithm, which only
Platt's intercept can take back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import Estimate, Floats, Resampled, Statistic, as_json, divide
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.operating_points import check_enough
from pneumo.evaluation.predictions import Predictions, sigmoid

Method = Literal["temperature", "platt"]

FOLDS = 5
RULE = (
    f"the lower log loss on val under {FOLDS}-fold cross-validation by patient; temperature, which "
    "has one number less, where they tie"
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
    """None where val can't be calibrated on."""
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
    """Both scalings fitted on `val`, and the better one chosen by RULE.

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
    before = _log_loss(positive, logit)
    temperature = _fit_checked("temperature", positive, logit, folds)
    platt = _fit_checked("platt", positive, logit, folds)
    fitted = [scaling for scaling in (temperature, platt) if scaling is not None]
    if platt is None:
        reason = "val: a higher logit does not mean a higher risk, so scaling can't correct it"
        return Calibration(None, None, None, before, reason)
    chosen = min(fitted, key=lambda scaling: scaling.log_loss)
    return Calibration(chosen, temperature, platt, before)


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


def _fit_checked(
    method: Method, positive: npt.NDArray[np.bool_], logit: Floats, folds: npt.NDArray[np.intp]
) -> Scaling | None:
    slope, intercept = fit_scaling(method, positive, logit)
    if not slope > 0:
        return None
    return Scaling(method, slope, intercept, _cross_validate(method, positive, logit, folds))


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


def _cross_validate(
    method: Method, positive: npt.NDArray[np.bool_], logit: Floats, folds: npt.NDArray[np.intp]
) -> float:
    return float(np.mean(_log_losses(positive, _scale_by_others(method, positive, logit, folds))))


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


def _log_loss(positive: npt.NDArray[np.bool_], logit: Floats) -> float:
    return float(np.mean(_log_losses(positive, logit)))


def _log_losses(positive: npt.NDArray[np.bool_], logit: Floats) -> Floats:
    return np.logaddexp(0, np.where(positive, -logit, logit))


def fit_logistic(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Slope (R,) and intercept (R,) of logistic regressions of `y` (N,) in [0, 1] on `x` (N,).

    One a column of `weights` (N, R); NaN where it does not settle, as when `x` separates the
    classes.
    """
    centre, spread = float(x.mean()), float(x.std())
    if spread == 0:
        nothing = np.full(weights.shape[1], np.nan)
        return nothing, nothing
    columns = np.stack([np.ones(len(x)), (x - centre) / spread], axis=1)
    whole = _fit_weighted(columns, y, np.ones((len(x), 1)), np.zeros((2, 1)))
    intercept, slope = _fit_weighted(columns, y, weights, whole)
    return slope / spread, intercept - slope / spread * centre


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
    """Mean distance of predicted and observed over the bins (Naeini 2015)."""
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

    @classmethod
    def undefined(cls, reason: str) -> Reliability:
        """No estimate, and why."""
        nothing = Estimate.undefined(reason)
        return cls(**dict.fromkeys(MEASURES, nothing), curve=(), brier_decomposition=None)


def bin_by_probability(probability: Floats, num_bins: int) -> npt.NDArray[np.int64]:
    """The bin of each probability (N,), from 0: as equal in number as ties allow, none empty."""
    inner = np.quantile(probability, np.arange(1, num_bins) / num_bins, method="inverted_cdf")
    bins = np.searchsorted(inner, probability, side="left")
    return np.asarray(np.unique(bins, return_inverse=True)[1])


def reliability_statistics(
    target: npt.ArrayLike, logit: npt.ArrayLike, scaling: Scaling | None, num_bins: int
) -> dict[str, Statistic]:
    """What `summarise_reliability` needs to have resampled, of the logits after `scaling`.

    The bins are those of the whole split, in every resample. Raises MetricError for one class only
    or a NaN.
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


def recalibration_statistic(target: npt.ArrayLike, logit: npt.ArrayLike) -> Statistic:
    """Intercept and slope (2, R) of the logistic regression of the target on the logits."""
    positive, logit64 = check_scores(target, logit)
    return lambda weights: np.stack(fit_logistic(logit64, positive.astype(float), weights)[::-1])


def summarise_reliability(
    found: Mapping[str, Resampled], recalibration: Resampled, scaling: Scaling | None
) -> Reliability:
    """`found` as by `reliability_statistics`, `recalibration` of the logits as they are."""
    num_bins = len(found["bins"].value) // 3
    after = recalibration.derive(partial(_recalibrate_scaled, scaling))
    sums = found["bins"].value.reshape(3, num_bins)
    observed = found["bins"].derive(_observed)
    settles = "the regression does not settle: the logits separate the classes"
    return Reliability(
        brier=found["brier"].estimate(),
        log_loss=found["log_loss"].estimate(),
        ece=found["bins"].derive(_expected_error).estimate(),
        slope=after.estimate(1, settles),
        intercept=after.estimate(0, settles),
        intercept_at_slope_1=found["offset"].estimate(reason="one class only"),
        in_the_large=found["bins"].derive(_in_the_large).estimate(),
        curve=tuple(
            Bin(int(sums[0, k]), float(sums[2, k] / sums[0, k]), observed.estimate(k))
            for k in range(num_bins)
        ),
        brier_decomposition=_decompose(sums, float(found["brier"].value[0])),
    )


def _scale(
    target: npt.ArrayLike, logit: npt.ArrayLike, scaling: Scaling | None
) -> tuple[npt.NDArray[np.bool_], Floats]:
    positive, logit64 = check_scores(target, logit)
    if scaling is None:
        return positive, logit64
    return positive, scaling.slope * logit64 + scaling.intercept


def _recalibrate_scaled(scaling: Scaling | None, found: Floats) -> Floats:
    """Regressing on slope * logit + intercept instead of the logit itself, with no new fit."""
    if scaling is None:
        return found
    slope = found[1] / scaling.slope
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
