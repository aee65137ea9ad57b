"""AUROC with an interval without resampling: DeLong's variance, also clustered by patient.

DeLong, DeLong & Clarke-Pearson (Biometrics 1988) take studies as independent; Obuchowski
(Biometrics 1997) takes patients as independent and allows for the correlation of their studies.
Both use the placement value of each study: the fraction of the other class that it is ranked
correctly against. Placement values come from midranks in O(n log n) (Sun & Xu, IEEE Signal
Processing Letters 2014). Clustered by patient, Student's t with the patients of the rarer class
replaces the normal distribution, and the interval of an AUROC is made on the logit scale (Pepe
2003), as its distribution is skewed near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, ndtr, stdtr
from scipy.stats import rankdata

from pneumo.errors import MetricError
from pneumo.evaluation.estimates import MIN_FOR_INTERVAL, Z_95, Estimate, Floats, t_quantile
from pneumo.evaluation.metrics import check_scores

INDEPENDENT = "DeLong, images taken as independent"
_NO_VARIANCE = 1e-20
"""Variances below this are rounding errors of equal placement values."""
CLUSTERED = "DeLong, clustered by patient (Obuchowski 1997)"


@dataclass(frozen=True, eq=False)
class Placements:
    """Placement values: for a positive the fraction of the negatives below it, for a negative the
    fraction of the positives above it; ties count one half."""

    positive: npt.NDArray[np.bool_]
    """(N,)"""
    value: Floats
    """(N,); its mean over either class is the AUROC."""

    @property
    def auroc(self) -> float:
        """The mean over the positives."""
        return float(self.value[self.positive].mean())

    def minus(self, other: Placements) -> Placements:
        """Placement values of the difference of two AUROCs on the same studies."""
        return Placements(self.positive, self.value - other.value)

    def variance(self) -> float:
        """DeLong's variance, studies taken as independent. Raises MetricError for fewer than two
        studies of a class."""
        classes = self.value[self.positive], self.value[~self.positive]
        if min(len(part) for part in classes) < 2:
            raise MetricError("DeLong's variance needs two positives and two negatives")
        return float(sum(part.var(ddof=1) / len(part) for part in classes))

    def count_rarer_class(self, patient: npt.NDArray[np.intp]) -> int:
        """The number of patients of the class that fewer patients have; they are numbered, (N,)."""
        of_class = (patient[rows] for rows in (self.positive, ~self.positive))
        return min(int(np.count_nonzero(np.bincount(part))) for part in of_class)

    def clustered_variance(self, patient: npt.NDArray[np.intp]) -> float:
        """Obuchowski's variance; patients, numbered from 0 (N,), are taken as independent.

        It is DeLong's where each patient has one study.

        Raises MetricError for fewer than two patients with a positive or with a negative.
        """
        num = int(patient.max()) + 1
        sums, present = [], []
        for rows in (self.positive, ~self.positive):
            excess = np.where(rows, self.value - self.auroc, 0.0)
            sums.append(np.bincount(patient, excess, minlength=num) / rows.sum())
            present.append(int(np.count_nonzero(np.bincount(patient[rows]))))
        if min(present) < 2:
            raise MetricError("DeLong's variance needs two patients of either class")
        own = sum(n / (n - 1) * float((s**2).sum()) for s, n in zip(sums, present, strict=True))
        mixed = num / (num - 1) * float((sums[0] * sums[1]).sum())
        return own + 2 * mixed


def placements(target: npt.ArrayLike, score: npt.ArrayLike) -> Placements:
    """The placement values. Raises MetricError for one class only, a NaN or an infinity."""
    positive, score64 = check_scores(target, score)
    rank = rankdata(score64)
    num_positive = int(positive.sum())
    value = np.empty(len(rank))
    value[positive] = (rank[positive] - rankdata(score64[positive])) / (len(rank) - num_positive)
    value[~positive] = 1 - (rank[~positive] - rankdata(score64[~positive])) / num_positive
    return Placements(positive, value)


def delong(
    target: npt.ArrayLike, score: npt.ArrayLike, patient: npt.NDArray[Any] | None = None
) -> Estimate:
    """AUROC with DeLong's 95 % interval, clipped to [0, 1]; with `patient` (N,) Obuchowski's.

    Without `patient` the interval is too narrow where patients have several studies. Where it is
    undefined the estimate has a reason; nothing is raised.
    """
    method = INDEPENDENT if patient is None else CLUSTERED
    try:
        placed = placements(target, score)
    except MetricError as error:
        return Estimate.undefined(str(error), method)
    estimate = _find_interval(placed, _number(patient), method)
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    if patient is None or not 0 < estimate.value < 1:
        low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    else:
        centre = float(logit(estimate.value))
        margin = (estimate.high - estimate.value) / (estimate.value * (1 - estimate.value))
        low, high = map(float, expit([centre - margin, centre + margin]))
    return Estimate(estimate.value, low, high, method)


@dataclass(frozen=True)
class PairedTest:
    """The difference of two AUROCs on the same studies, and the test that it is 0."""

    difference: Estimate
    """First minus second."""
    p_value: float | None
    """Two-sided; None where the difference has no variance."""

    def to_json(self) -> dict[str, Any]:
        """The difference's estimate and `p_value`."""
        return {**self.difference.to_json(), "p_value": self.p_value}


def delong_test(
    target: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    patient: npt.NDArray[Any] | None = None,
) -> PairedTest:
    """AUROC of `first` minus that of `second`, both (N,) scores of the same studies.

    With `patient` (N,) the variance is Obuchowski's. Undefined input gives a reason; nothing is
    raised.
    """
    method = INDEPENDENT if patient is None else CLUSTERED
    try:
        gain = placements(target, first).minus(placements(target, second))
    except MetricError as error:
        return PairedTest(Estimate.undefined(str(error), method), None)
    index = _number(patient)
    difference = _find_interval(gain, index, method)
    if difference.value is None or difference.high is None:
        return PairedTest(difference, None)
    num = None if index is None else gain.count_rarer_class(index)
    distance = abs(difference.value) / (difference.high - difference.value) * _quantile(num)
    tail = ndtr(-distance) if num is None else stdtr(num - 1, -distance)
    return PairedTest(difference, float(2 * tail))


def _number(patient: npt.NDArray[Any] | None) -> npt.NDArray[np.intp] | None:
    """The patients (N,) numbered from 0, in the order of their names."""
    return None if patient is None else np.unique(patient, return_inverse=True)[1]


def _find_interval(
    placed: Placements, patient: npt.NDArray[np.intp] | None, method: str
) -> Estimate:
    value = placed.auroc
    num = None if patient is None else placed.count_rarer_class(patient)
    try:
        variance = placed.variance() if patient is None else placed.clustered_variance(patient)
    except MetricError as error:
        return Estimate(value, None, None, method, str(error))
    if num is not None and num < MIN_FOR_INTERVAL:
        why = f"too few patients for an interval: {num} of the rarer class"
        return Estimate(value, None, None, method, why)
    if variance < _NO_VARIANCE:
        return Estimate(value, None, None, method, "these studies show no variance")
    margin = _quantile(num) * math.sqrt(variance)
    return Estimate(value, value - margin, value + margin, method)


def _quantile(num_patients: int | None) -> float:
    return Z_95 if num_patients is None else t_quantile(num_patients)
