"""How well the probabilities of a split are calibrated: Brier score, log loss, expected calibration
error (ECE), reliability curve, Cox's calibration slope and intercept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import SampleWeights, Statistic, StatisticSet, divide
from pneumo.evaluation.calibration import Scaling
from pneumo.evaluation.estimates import Estimate, Floats, with_wilson
from pneumo.evaluation.logistic_regression import LogitSample, offset_statistic
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.predictions import Predictions, sigmoid

NO_ECE_INTERVAL = (
    "resamples make the calibration error greater, so their interval does not cover it"
)
NUM_BINS = 10
"""Bins of equal size in the reliability curve and the calibration error."""
HISTOGRAM_BINS = 20

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
    """Expected calibration error: mean distance of predicted and observed over the bins (Naeini
    2015). Without an interval, as resamples make it greater."""
    slope: Estimate
    """Calibration slope (Cox 1958); 1 is right, below 1 the probabilities are too extreme."""
    intercept: Estimate
    """Of the same fit; 0 is right, and it means little where the slope is not 1."""
    intercept_at_slope_1: Estimate
    """Calibration intercept with the slope fixed at 1: calibration in the large on the logit scale
    (Van Calster 2016); 0 is right, below 0 the probabilities are too high."""
    in_the_large: Estimate
    """Mean probability - fraction of positives; 0 is right, above 0 they are too high."""
    curve: tuple[Bin, ...]
    """From the lowest probability to the highest."""
    smooth: CalibrationCurve | None
    """None where the probabilities hardly vary."""
    histogram: Histogram | None
    brier_decomposition: dict[str, float] | None
    """Brier = reliability - resolution + uncertainty + within_bins (Murphy 1973; `within_bins` is
    the remainder of binning)."""
    ece_if_calibrated: float | None
    """The mean `ece` of samples of this size if these probabilities were right."""

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
    """The bin of each probability (N,), from 0. Bins are as equal in size as ties allow, and none
    is empty."""
    middle = rankdata(probability) / max(len(probability), 1)  # of equal ones the mean rank
    bins = np.ceil(num_bins * middle - 1e-9)
    return np.asarray(np.unique(bins, return_inverse=True)[1])


def reliability_statistics(
    sample: LogitSample, scaling: Scaling | None, num_bins: int = NUM_BINS
) -> dict[str, Statistic]:
    """What `evaluate_reliability` needs to have resampled, of the logits after `scaling`.

    The bins are those of the whole split, in every resample.
    """
    probability = sigmoid(_scale(sample.logit, scaling))
    bins = bin_by_probability(probability, num_bins)
    scaled = _scale(sample.points, scaling)
    mean_losses = metrics.mean_statistic(_find_losses(scaled, sample.target))
    return {
        "losses": lambda weights: mean_losses(sample.weigh(weights)),
        "offset": offset_statistic(sample, scaled),
        "bins": _bins_statistic(bins, sample.positive, probability),
    }


def _find_losses(logit: Floats, target: Floats) -> Floats:
    """Squared error and log loss of each logit: (2, M)."""
    # From logits: finite where a probability rounds to 0.
    log_loss = np.logaddexp(0, np.where(target == 1, -logit, logit))
    return np.stack([(sigmoid(logit) - target) ** 2, log_loss])


def _bins_statistic(
    bins: npt.NDArray[np.int64], positive: npt.NDArray[np.bool_], probability: Floats
) -> Statistic:
    """Studies, positives and probabilities by bin: (3 * bins, R)."""
    num = int(bins.max()) + 1
    sums = bootstrap.sums_statistic(bins + num * positive, 2 * num, None, probability)

    def statistic(weights: SampleWeights) -> Floats:
        by_class = sums(weights).reshape(2, 2, num, -1)
        count, predicted = by_class.sum(axis=1)
        return np.concatenate([count, by_class[0, 1], predicted])

    return statistic


def smooth_curve(positive: npt.NDArray[np.bool_], logit: Floats) -> CalibrationCurve | None:
    """A logistic regression on a cubic spline of the logit (Van Calster 2016), between the 1st and
    the 99th percentile; None for one class, or where the logits allow fewer than two knots."""
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


def evaluate_reliability(
    rows: Predictions,
    scaling: Scaling | None,
    part: StatisticSet,
    recalibration: StatisticSet,
    num_bins: int = NUM_BINS,
) -> Reliability:
    """The calibration of `rows` after `scaling`.

    `part` has the `reliability_statistics`, `recalibration` the `recalibration_statistic` of the
    unscaled logits.
    """
    if part.reason is not None:
        return Reliability.undefined(part.reason)
    positive, logit = check_scores(rows.target, rows.logit, both_classes=False)
    scaled = _scale(logit, scaling)
    probability = sigmoid(scaled)
    bins = bin_by_probability(probability, num_bins)
    found = part.resampled
    observed = found["bins"].derive(_observed)
    sums = found["bins"].value.reshape(3, -1)
    ece = float(_expected_error(found["bins"].value[:, None])[0, 0])
    intercept, slope = _estimate_recalibration(recalibration, scaling)
    return Reliability(
        brier=found["losses"].estimate(0),
        log_loss=found["losses"].estimate(1),
        ece=Estimate(ece, None, None, "none", NO_ECE_INTERVAL),
        slope=slope,
        intercept=intercept,
        intercept_at_slope_1=found["offset"].estimate(reason="one class only"),
        in_the_large=found["bins"].derive(_in_the_large).estimate(),
        curve=tuple(
            Bin(
                int(count),
                float(predicted / count),
                with_wilson(observed.estimate(k), rows.count_patients(bins == k)),
            )
            for k, (count, _, predicted) in enumerate(sums.T)
        ),
        smooth=smooth_curve(positive, scaled),
        histogram=Histogram(
            *(
                tuple(np.histogram(probability[chosen], HISTOGRAM_BINS, (0, 1))[0].tolist())
                for chosen in (~positive, positive)
            )
        ),
        brier_decomposition=_decompose(sums, float(found["losses"].value[0])),
        ece_if_calibrated=_find_ece_if_calibrated(rows.patient, positive, probability, bins),
    )


def _find_ece_if_calibrated(
    patient: npt.NDArray[Any],
    positive: npt.NDArray[np.bool_],
    probability: Floats,
    bins: npt.NDArray[np.int64],
) -> float:
    """See `Reliability`. The sum of a bin's targets is taken as normal. Its variance is that of
    independent targets times a design effect, as the studies of one patient in a bin have similar
    errors beyond the mean error of the bin, which would be 0 if the probabilities were right."""
    _, index = np.unique(patient, return_inverse=True)
    residual = positive - probability
    residual = residual - (np.bincount(bins, residual) / np.bincount(bins))[bins]
    _, patient_and_bin = np.unique(bins * len(index) + index, return_inverse=True)
    squares = float(residual @ residual)
    alike = float((np.bincount(patient_and_bin, residual) ** 2).sum()) / squares if squares else 1.0
    variances = max(1.0, alike) * np.bincount(bins, probability * (1 - probability))
    return float(np.sqrt(2 / np.pi * variances).sum()) / len(bins)


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


def _scale(logit: Floats, scaling: Scaling | None) -> Floats:
    return logit if scaling is None else scaling.slope * logit + scaling.intercept


def _recalibrate_scaled(scaling: Scaling | None, found: Floats) -> Floats:
    """Intercept and slope of the regression on the scaled logit, from those on the logit itself."""
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
