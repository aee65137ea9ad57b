"""Numbers as text; where there is no number, the reason."""

from dataclasses import dataclass
from typing import Self

from pneumo.evaluation.estimates import Estimate

NO_INTERVAL = "no interval"


@dataclass(frozen=True)
class Cell:
    """An estimate as text; `reason` is not empty where `value` is."""

    value: str
    interval: str = ""
    reason: str = ""

    @classmethod
    def of(cls, estimate: Estimate, digits: int = 3, *, signed: bool = False) -> Self:
        """`0.913` and `0.854–0.962`, or the reason."""
        if estimate.value is None:
            return cls("", "", estimate.reason or "undefined")
        value = decimal(estimate.value, digits, signed=signed)
        if estimate.low is not None and estimate.high is None:
            return cls(value, f"{decimal(estimate.low, digits, signed=signed)} or more")
        if estimate.low is None or estimate.high is None:
            return cls(value, "", estimate.reason or NO_INTERVAL)
        low, high = (decimal(x, digits, signed=signed) for x in (estimate.low, estimate.high))
        # A minus sign next to a dash is hard to read.
        return cls(value, f"{low} to {high}" if signed else f"{low}–{high}")

    def __str__(self) -> str:
        """As part of a sentence."""
        if not self.value:
            return f"not known ({self.reason})"
        return f"{self.value} ({self.interval or self.reason})"


def decimal(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """`0.913`, `−0.020` with a minus sign; never a negative zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    sign = "+" if signed and value > 0 else ""
    return sign + text.replace("-", "\N{MINUS SIGN}")


def percent(fraction: float) -> str:
    """`91 %`, with a no-break space; `99.7 %` where less would read 100 or 0."""
    return f"{_inside(fraction, 0)}\N{NO-BREAK SPACE}%"


def fine_percent(fraction: float) -> str:
    """`91.3 %`; with more digits where less would read 100.0 or 0.0."""
    return f"{_inside(fraction, 1)}\N{NO-BREAK SPACE}%"


def percent_range(low: float, high: float) -> str:
    """`21.0 to 33.0 %`."""
    return f"{_inside(low, 1)} to {fine_percent(high)}"


def _inside(fraction: float, digits: int) -> str:
    """The percentage; strictly between 0 and 100 wherever the fraction is between 0 and 1, but for
    an error of rounding."""
    fraction = round(fraction, 11)
    while 0 < fraction < 1 and float(f"{100 * fraction:.{digits}f}") in (0.0, 100.0):
        digits += 1
    return f"{100 * fraction:.{digits}f}"


def count(number: int, one: str, several: str = "") -> str:
    """`1 study`, `2,000 studies`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def p_value(value: float | None) -> str:
    """`p = 0.031`, `p < 0.001`, or why there is none."""
    if value is None:
        return "no p value, as the difference does not vary"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
