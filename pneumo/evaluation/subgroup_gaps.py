"""Which subgroup the model serves worst: gaps of AUROC, sensitivity, specificity and calibration.

A gap is a subgroup's value minus that of the other studies; of calibration in the large, how much
farther it is from 0. Among many gaps some are large by chance, so the interval of the worst is
widened for their number (Bonferroni). The bootstrap variance of few patients is too small, and 0 in
a subgroup without errors: it is at least that of a proportion with one more success and one more
failure (Agresti & Caffo 2000). Student's t replaces the normal distribution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import stdtrit

from pneumo.evaluation.bootstrap import Resampled, first_minus_second
from pneumo.evaluation.estimates import Estimate, Floats, as_json, subtract, with_wilson

Measure = Literal["auroc", "sensitivity", "specificity", "in_the_large"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
MEASURE_NAMES: Mapping[Measure, str] = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "in_the_large": "calibration (|mean predicted − observed risk|)",
}
"""In a sentence."""
WORST_RULE = (
    "of the gaps in AUROC, sensitivity, specificity and calibration in the large between a group "
    "(by sex, age, view, sex and age, view and sex) and the other studies, the largest for its "
    "standard error; shown where its interval, widened for their number (Bonferroni), excludes 0"
)
FAMILY_ERROR = 0.05


@dataclass(frozen=True, eq=False)
class Gap:
    """A subgroup and the other studies in one measure."""

    by: str
    name: str
    measure: Measure
    pair: Resampled
    """The subgroup's value, then that of the others."""
    patients: tuple[int, int]
    """Patients of the subgroup and of the others; of the rarer class where both classes count."""

    def _subtract(self, pair: Floats) -> Floats:
        """The subgroup minus the others; in calibration how much farther it is from 0, as
        calibrating the whole makes groups err in opposite directions."""
        own, rest = np.abs(pair) if self.measure == "in_the_large" else pair
        gap: Floats = np.subtract(own, rest)
        return gap

    @property
    def value(self) -> float:
        """The subgroup minus the others, see `_subtract`."""
        return float(self._subtract(self.pair.value))

    @property
    def is_worse(self) -> bool:
        """Whether the subgroup is served worse than the others."""
        return self.value > 0 if self.measure == "in_the_large" else self.value < 0

    @property
    def standard_error(self) -> float:
        """Of `value`; NaN where it cannot be estimated."""
        drawn = self.pair.drawn
        variance = float(np.nanvar(self._subtract(drawn)))
        if self.measure == "in_the_large":
            return math.sqrt(variance) or math.nan
        # An AUROC varies less than a proportion of one class.
        divisor = 2 if self.measure == "auroc" else 1
        for row, n in enumerate(self.patients):
            smoothed = (float(self.pair.value[row]) * n + 1) / (n + 2)
            least = smoothed * (1 - smoothed) / (divisor * (n + 2))
            variance += max(0.0, least - float(np.nanvar(drawn[row])))
        return math.sqrt(variance)

    def estimate_alone(self) -> Estimate:
        """The subgroup minus the others, its interval by itself; a rate of exactly 0 or 1, which
        never varies under resampling, with Wilson's."""
        if self.measure in ("sensitivity", "specificity") and {0.0, 1.0} & {*self.pair.value}:
            own, rest = (
                with_wilson(replace(self.pair, effective_patients=n).estimate(row), n)
                for row, n in enumerate(self.patients)
            )
            return subtract(own, rest)
        return self.pair.derive(first_minus_second).estimate()

    def estimate(self, num_gaps: int) -> Estimate:
        """The gap, its interval widened for the number of gaps (Bonferroni)."""
        tail = FAMILY_ERROR / 2 / num_gaps
        margin = float(stdtrit(min(self.patients) - 1, 1 - tail)) * self.standard_error
        method = f"patient bootstrap, t, Bonferroni over {num_gaps} gaps"
        return Estimate(self.value, self.value - margin, self.value + margin, method)


@dataclass(frozen=True)
class WorstSubgroup:
    """The subgroup that is served worst, by WORST_RULE."""

    by: str | None
    """None where no subgroup can be compared."""
    name: str | None
    measure: Measure | None
    gap: Estimate
    """See `Gap.estimate`."""
    compared: int
    """Gaps that could be compared."""
    measures: tuple[Measure, ...]
    """Of these gaps."""

    @property
    def is_shown(self) -> bool:
        """Whether the gap is larger than chance explains among so many."""
        low, high = self.gap.low, self.gap.high
        return low is not None and high is not None and not low <= 0 <= high

    def to_json(self) -> dict[str, Any]:
        """The fields by name, `shown` and the rule."""
        return {**as_json(vars(self)), "shown": self.is_shown, "rule": WORST_RULE}


def find_worst_subgroup(gaps: Sequence[Gap], min_patients: int) -> WorstSubgroup:
    """The worst of the gaps that have a standard error, by WORST_RULE."""
    compared = [gap for gap in gaps if gap.standard_error > 0 and min(gap.patients) > 1]
    measures = tuple(name for name in MEASURES if any(gap.measure == name for gap in compared))
    worse = [gap for gap in compared if gap.is_worse]
    if not worse:
        reason = "no group is served worse than the other studies"
        if not compared:
            reason = f"each needs {min_patients} patients with and {min_patients} without pneumonia"
        undefined = Estimate.undefined(reason)
        return WorstSubgroup(None, None, None, undefined, len(compared), measures)

    def excess(gap: Gap) -> float:
        found = gap.estimate(len(compared))
        assert found.value is not None
        assert found.high is not None
        return abs(found.value) / (found.high - found.value)

    worst = max(worse, key=excess)
    found = worst.estimate(len(compared))
    return WorstSubgroup(worst.by, worst.name, worst.measure, found, len(compared), measures)
