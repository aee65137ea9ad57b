"""AUROC with an interval without resampling: DeLong's variance, also clustered by patient.

DeLong, DeLong & Clarke-Pearson (Biometrics 1988) take studies as independent; Obuchowski
(Biometrics 1997) takes patients as independent and allows for the correlation of their studies.
Both use the placement value of each study: the fraction of the other class that it is ranked
correctly against. Placement values come from midranks in O(n log n) (Sun & Xu, IEEE Signal
Processing Letters 2014). Clustered by patient, Student's t with the sample size of the rarer class
replaces the normal distribution, and the interval of an AUROC is made on the logit scale (Pepe
2003), as its distribution is skewed near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, ndtr, stdtr
from scipy.stats import rankdata

from pneumo.errors import MetricError
from pneumo.evaluation.estimates import (
    MIN_FOR_INTERVAL,
    TELL_AS_MUCH,
    Z_95,
    Estimate,
    Floats,
    count_equal_patients,
    t_quantile,
)
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
    patient: npt.NDArray[np.intp]
    """(N,), numbered from 0; a number for each study where these are taken as independent."""
    method: str
    """INDEPENDENT or CLUSTERED."""

    @property
    def auroc(self) -> float:
        """The mean over the positives."""
        return float(self.value[self.positive].mean())

    @cached_property
    def patients_by_class(self) -> list[int]:
        """The number of patients with a positive study, and with a negative one."""
        masks = self.positive, ~self.positive
        return [int(np.count_nonzero(np.bincount(self.patient[rows]))) for rows in masks]

    @cached_property
    def effective_patients(self) -> int:
        """The sample size of the class that has the smaller one."""
        return min(count_equal_patients(self.patient[c]) for c in (self.positive, ~self.positive))

    @property
    def quantile(self) -> float:
        """The 97.5 % point: of the normal distribution, by patient of Student's t."""
        return Z_95 if self.method == INDEPENDENT else t_quantile(self.effective_patients)

    def minus(self, other: Placements) -> Placements:
        """Placement values of the difference of two AUROCs on the same studies."""
        return replace(self, value=self.value - other.value)

    def variance(self) -> float:
        """Obuchowski's variance, which is DeLong's where each patient has one study.

        Raises MetricError for fewer than two patients with a positive or with a negative.
        """
        present = self.patients_by_class
        if min(present) < 2:
            unit = "studies" if self.method == INDEPENDENT else "patients"
            raise MetricError(f"DeLong's variance needs two {unit} of either class")
        num, excess = int(self.patient.max()) + 1, self.value - self.auroc
        sums = [
            np.bincount(self.patient, np.where(rows, excess, 0.0)) / rows.sum()
            for rows in (self.positive, ~self.positive)
        ]
        own = sum(n / (n - 1) * float((s**2).sum()) for s, n in zip(sums, present, strict=True))
        mixed = num / (num - 1) * float((sums[0] * sums[1]).sum())
        return own + 2 * mixed

    def estimate(self) -> Estimate:
        """The AUROC with an interval that is not clipped, or the reason why there is none."""
        try:
            variance = self.variance()
        except MetricError as error:
            return Estimate(self.auroc, None, None, self.method, str(error))
        num = self.effective_patients
        if self.method == CLUSTERED and num < MIN_FOR_INTERVAL:
            why = f"too few patients for an interval: {TELL_AS_MUCH.format(num)}"
            return Estimate(self.auroc, None, None, self.method, why)
        if variance < _NO_VARIANCE:
            why = "these studies show no variance"
            return Estimate(self.auroc, None, None, self.method, why)
        margin = self.quantile * math.sqrt(variance)
        return Estimate(self.auroc, self.auroc - margin, self.auroc + margin, self.method)


def placements(
    target: npt.ArrayLike, score: npt.ArrayLike, patient: npt.NDArray[Any] | None = None
) -> Placements:
    """The placement values. Raises MetricError for one class only, a NaN or an infinity."""
    positive, score64 = check_scores(target, score)
    rank = rankdata(score64)
    num_positive = int(positive.sum())
    value = np.empty(len(rank))
    value[positive] = (rank[positive] - rankdata(score64[positive])) / (len(rank) - num_positive)
    value[~positive] = 1 - (rank[~positive] - rankdata(score64[~positive])) / num_positive
    if patient is None:
        return Placements(positive, value, np.arange(len(value)), INDEPENDENT)
    return Placements(positive, value, np.unique(patient, return_inverse=True)[1], CLUSTERED)


def delong(
    target: npt.ArrayLike, score: npt.ArrayLike, patient: npt.NDArray[Any] | None = None
) -> Estimate:
    """AUROC with DeLong's 95 % interval, clipped to [0, 1]; with `patient` (N,) Obuchowski's.

    Without `patient` the interval is too narrow where patients have several studies. Where it is
    undefined the estimate has a reason; nothing is raised.
    """
    try:
        found = placements(target, score, patient).estimate()
    except MetricError as error:
        return _undefined(error, patient)
    if found.value is None or found.low is None or found.high is None:
        return found
    if patient is None or not 0 < found.value < 1:
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))
    centre = float(logit(found.value))
    margin = (found.high - found.value) / (found.value * (1 - found.value))
    low, high = map(float, expit([centre - margin, centre + margin]))
    return replace(found, low=low, high=high)


def _undefined(error: MetricError, patient: npt.NDArray[Any] | None) -> Estimate:
    return Estimate.undefined(str(error), INDEPENDENT if patient is None else CLUSTERED)


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
    try:
        gain = placements(target, first, patient).minus(placements(target, second))
    except MetricError as error:
        return PairedTest(_undefined(error, patient), None)
    found = gain.estimate()
    if found.value is None or found.high is None:
        return PairedTest(found, None)
    distance = abs(found.value) / (found.high - found.value) * gain.quantile
    degrees = gain.effective_patients - 1
    tail = ndtr(-distance) if patient is None else stdtr(degrees, -distance)
    return PairedTest(found, float(2 * tail))
