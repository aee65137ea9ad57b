"""Intervals of estimates that have one; a test fails with the reason where there is none."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.bootstrap import Statistic, resample
from pneumo.evaluation.estimates import Estimate


def _interval(estimate: Estimate) -> tuple[float, float]:
    """(low, high)."""
    assert estimate.low is not None, estimate.reason
    assert estimate.high is not None, estimate.reason
    return estimate.low, estimate.high


def width(estimate: Estimate) -> float:
    """high - low."""
    low, high = _interval(estimate)
    return high - low


def contains(estimate: Estimate, value: float) -> bool:
    """Whether low <= value <= high."""
    low, high = _interval(estimate)
    return low <= value <= high


def patient_bootstrap(
    patient: npt.NDArray[Any], statistics: Mapping[str, Statistic], *, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Each statistic (R,) with its 95 % interval over resamples of the patients, who all count."""
    count = len(np.unique(patient))
    found = resample(patient, statistics, resamples=resamples, seed=seed, effective_patients=count)
    return {key: one.estimate() for key, one in found.items()}
