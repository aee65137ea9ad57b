"""Intervals of estimates that have one; a test fails with the reason where there is none."""

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
