"""AUROC with an interval and no resampling: DeLong's variance, also for patients who recur.

DeLong, DeLong & Clarke-Pearson (Biometrics 1988) take studies as independent; Obuchowski
(Biometrics 1997) takes patients as independent and their studies as alike as they are. Both rest
on each study's placement: the fraction of the other class that it is ranked right against.
Placements come from midranks in O(n log n) (Sun & Xu, IEEE Signal Processing Letters 2014). By
patient, Student's t of the patients of the rarer class replaces the normal, and the interval of an
AUROC is made on the logit's scale (Pepe 2003), as near 1 its distribution is skewed.
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
from pneumo.evaluation.bootstrap import MIN_INDEPENDENT, Z_95, Estimate, Floats, t_quantile
from pneumo.evaluation.metrics import check_scores

INDEPENDENT = "DeLong, images taken as independent"
_NO_VARIANCE = 1e-20
"""What rounding leaves of placements that are all the same."""
CLUSTERED = "DeLong, clustered by patient (Obuchowski 1997)"


@dataclass(frozen=True, eq=False)
class Placements:
    """How well each study is ranked: of a positive the fraction of the negatives below it, of a
    negative the fraction of the positives above it, ties counting one half."""

    positive: npt.NDArray[np.bool_]
    """(N,)"""
    value: Floats
    """(N,); its mean over either class is the AUROC."""

    @property
    def auroc(self) -> float:
        """The mean over the positives."""
        return float(self.value[self.positive].mean())

    def minus(self, other: Placements) -> Placements:
        """Of the difference of two AUROCs on the same studies: all below holds for it too."""
        return Placements(self.positive, self.value - other.value)

    def variance(self) -> float:
        """DeLong's, studies taken as independent. Raises MetricError for fewer than two of a
        class."""
        classes = self.value[self.positive], self.value[~self.positive]
        if min(len(part) for part in classes) < 2:
            raise MetricError("DeLong's variance needs two positives and two negatives")
        return float(sum(part.var(ddof=1) / len(part) for part in classes))

    def count_rarer(self, patient: npt.NDArray[Any]) -> int:
        """The patients of the class that fewer have."""
        return min(len(np.unique(patient[rows])) for rows in (self.positive, ~self.positive))

    def clustered_variance(self, patient: npt.NDArray[Any]) -> float:
        """Obuchowski's, patients (N,) taken as independent; DeLong's where nobody recurs.

        Raises MetricError for fewer than two patients with a positive or with a negative.
        """
        name, index = np.unique(patient, return_inverse=True)
        sums, present = [], []
        for rows in (self.positive, ~self.positive):
            excess = np.where(rows, self.value - self.auroc, 0.0)
            sums.append(np.bincount(index, excess, minlength=len(name)) / rows.sum())
            present.append(int((np.bincount(index, rows, minlength=len(name)) > 0).sum()))
        if min(present) < 2:
            raise MetricError("DeLong's variance needs two patients of either class")
        own = sum(n / (n - 1) * float((s**2).sum()) for s, n in zip(sums, present, strict=True))
        mixed = len(name) / (len(name) - 1) * float((sums[0] * sums[1]).sum())
        return own + 2 * mixed


def placements(target: npt.ArrayLike, score: npt.ArrayLike) -> Placements:
    """Each study's placement. Raises MetricError for one class only, a NaN or an infinity."""
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
    """AUROC with DeLong's 95 % interval, cut at 0 and 1; with `patient` (N,) Obuchowski's.

    Without `patient` it is too narrow when patients recur. Undefined input gives an estimate with a
    reason instead of an error.
    """
    method = INDEPENDENT if patient is None else CLUSTERED
    try:
        placed = placements(target, score)
    except MetricError as error:
        return Estimate.undefined(str(error), method)
    estimate = _find_interval(placed, patient, method)
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
    """The difference of two AUROCs on the same studies, and how surprising it would be of none."""

    difference: Estimate
    """First minus second."""
    p_value: float | None
    """Two-sided, of a difference of 0; None where the difference has no variance."""

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

    With `patient` (N,) the variance is Obuchowski's. Undefined input gives a reason, no error.
    """
    method = INDEPENDENT if patient is None else CLUSTERED
    try:
        gain = placements(target, first).minus(placements(target, second))
    except MetricError as error:
        return PairedTest(Estimate.undefined(str(error), method), None)
    difference = _find_interval(gain, patient, method)
    if difference.value is None or difference.high is None:
        return PairedTest(difference, None)
    num = None if patient is None else gain.count_rarer(patient)
    distance = abs(difference.value) / (difference.high - difference.value) * _quantile(num)
    tail = ndtr(-distance) if num is None else stdtr(num - 1, -distance)
    return PairedTest(difference, float(2 * tail))


def _find_interval(placed: Placements, patient: npt.NDArray[Any] | None, method: str) -> Estimate:
    value = placed.auroc
    num = None if patient is None else placed.count_rarer(patient)
    try:
        variance = placed.variance() if patient is None else placed.clustered_variance(patient)
    except MetricError as error:
        return Estimate(value, None, None, method, str(error))
    if num is not None and num < MIN_INDEPENDENT:
        why = f"too few patients for an interval: {num} of the rarer class"
        return Estimate(value, None, None, method, why)
    if variance < _NO_VARIANCE:
        return Estimate(value, None, None, method, "these studies show no variance")
    margin = _quantile(num) * math.sqrt(variance)
    return Estimate(value, value - margin, value + margin, method)


def _quantile(num_patients: int | None) -> float:
    return Z_95 if num_patients is None else t_quantile(num_patients)
