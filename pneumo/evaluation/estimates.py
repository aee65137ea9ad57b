"""A value with its 95 % interval: Wilson's for a proportion, and BCa from resamples.

Bootstrap intervals are bias-corrected and accelerated (BCa, Efron 1987), as most statistics here
are skewed. The percentiles of few patients' resamples are too narrow, so they are taken farther
out, as those of a t distribution are (Hesterberg 2015, section 5.1). `make bench-verdicts` shows
what the intervals cover.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named
from scipy.special import ndtr, ndtri, stdtrit

Floats = npt.NDArray[np.float64]

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point: every interval here is a 95 % interval."""
MAX_UNDEFINED_FRACTION = 0.05
"""With more undefined resamples than this there is no interval."""
MIN_FOR_INTERVAL = 5
"""Patients that an interval needs at least, see `count_equal_patients`."""
TELL_AS_MUCH = "they tell as much as {} with equally many studies"


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
        return {name: one for name, one in vars(self).items() if name != "reason" or one}


def as_json(value: Any, *, leave_out: Collection[str] = ()) -> Any:
    """A result as metrics.json holds it: by its own `to_json`, else by the names of its fields.

    `leave_out` names fields that the caller puts elsewhere.
    """
    if hasattr(value, "to_json") and not leave_out:
        return value.to_json()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items() if key not in leave_out}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value


WILSON = "Wilson, images taken as independent"
WILSON_OVER_PATIENTS = "Wilson over patients"
"""The method of a proportion of exactly 0 or 1, which never varies under resampling."""


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of the proportion `value` of `n` independent trials, n > 0."""
    interval = scipy.stats.binomtest(round(value * n), n).proportion_ci(0.95, method="wilson")
    # Rounding must not push an end past the value.
    return min(value, float(interval.low)), max(value, float(interval.high))


def with_wilson(rate: Estimate, num_patients: int) -> Estimate:
    """`rate`; where it is exactly 0 or 1, and so never varies under resampling, with Wilson's
    interval over the patients in its denominator."""
    if rate.value is None or 0 < rate.value < 1:
        return rate
    return Estimate(rate.value, *wilson(rate.value, num_patients), WILSON_OVER_PATIENTS)


NEWCOMBE = "Newcombe, of both intervals"


def subtract(first: Estimate, second: Estimate) -> Estimate:
    """`first` - `second`, which are independent, with an interval of their two intervals: square
    and add (Newcombe 1998), also where one of them never varies under resampling."""
    if first.value is None or second.value is None:
        return Estimate.undefined(first.reason or second.reason or "undefined", NEWCOMBE)
    gap = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(gap, None, None, NEWCOMBE, first.reason or second.reason)
    low = gap - math.hypot(first.value - first.low, second.high - second.value)
    high = gap + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(gap, low, high, NEWCOMBE)


def average(first: Estimate, second: Estimate) -> Estimate:
    """The mean of two independent proportions, with an interval as by `subtract`."""
    others = [None if end is None else 1 - end for end in (second.value, second.high, second.low)]
    gap = subtract(first, replace(second, value=others[0], low=others[1], high=others[2]))
    value, low, high = (
        None if end is None else (1 + end) / 2 for end in (gap.value, gap.low, gap.high)
    )
    return replace(gap, value=value, low=low, high=high)


def count_equal_patients(patient: npt.NDArray[Any], weights: Floats | None = None) -> int:
    """How many patients with equally many studies would tell as much, rounded down (Kish 1965): the
    sample size of patients of whom some have many studies. Patients who have equally many count in
    full. `patient` (N,) names that of each study, which count by `weights` (N,)."""
    is_number = patient.dtype.kind == "i"
    index = patient if is_number else np.unique(patient, return_inverse=True)[1]
    sums = np.bincount(index, weights).astype(np.float64)
    squares = float(sums @ sums)
    return int(sums.sum() ** 2 / squares + 1e-9) if squares else 0


def t_quantile(num_patients: int) -> float:
    """The 97.5 % point of Student's t with `num_patients` - 1 degrees of freedom, at least 1."""
    return float(stdtrit(num_patients - 1, 0.975))


def _find_tails(value: float, drawn: Floats, left_out: Floats, z: float) -> tuple[float, float]:
    """Which quantiles of `drawn` (R,) are the ends of an interval that reaches `z` standard normal
    deviations: BCa (Efron 1987); plain percentiles where resamples lie on one side of the value."""
    # Of equal draws a last bit of rounding would decide otherwise, by the processor.
    equal = np.isclose(drawn, value, rtol=1e-12, atol=0.0)
    bias = float(ndtri(np.mean((drawn < value) & ~equal) + np.mean(equal) / 2))
    known = left_out[np.isfinite(left_out)]
    excess = known.mean() - known if len(known) else known
    spread = float((excess**2).sum()) ** 1.5
    acceleration = float((excess**3).sum()) / (6 * spread) if spread else 0.0
    reach = np.array([bias - z, bias + z])
    shrinkage = 1 - acceleration * reach
    if not np.isfinite(bias) or shrinkage.min() <= 0:
        return float(ndtr(-z)), float(ndtr(z))
    low, high = ndtr(bias + reach / shrinkage)
    return float(low), float(high)


def find_interval(
    value: float, drawn: Floats, left_out: Floats, num_patients: int, reason: str
) -> Estimate:
    """The 95 % interval of `value`, from its resamples `drawn` (R,) and its jackknife `left_out`
    (J,). `num_patients` is the sample size; `reason` is said where `value` is NaN or infinite."""
    method = "patient bootstrap"
    if not math.isfinite(value):
        return Estimate.undefined(reason, method)
    defined = drawn[~np.isnan(drawn)]
    num_undefined = len(drawn) - len(defined)
    if num_undefined > MAX_UNDEFINED_FRACTION * len(drawn):
        why = f"too few patients: undefined in {num_undefined} of {len(drawn)} resamples"
        return Estimate(value, None, None, method, why)
    if num_patients < MIN_FOR_INTERVAL:
        why = f"too few patients for an interval: {TELL_AS_MUCH.format(num_patients)}"
        return Estimate(value, None, None, method, why)
    z = math.sqrt(num_patients / (num_patients - 1)) * t_quantile(num_patients)
    tails = _find_tails(value, defined, left_out, z)
    # Between an infinity and a number there is nothing to interpolate.
    kind: Literal["linear", "nearest"] = "linear" if np.isfinite(defined).all() else "nearest"
    low, high = map(float, np.quantile(defined, tails, method=kind))
    if low == high:
        return Estimate(value, None, None, method, "the same in nearly every resample")
    # Of a skewed statistic the value itself can lie just outside the percentiles.
    low, high = min(low, value), max(high, value)
    if math.isinf(low) or math.isinf(high):
        why = "without a bound: infinite in some resamples"
        ends = [None if math.isinf(end) else end for end in (low, high)]
        return Estimate(value, ends[0], ends[1], method, why)
    return Estimate(value, low, high, method)
