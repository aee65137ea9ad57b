"""Which group the model serves worst: gaps of AUROC, sensitivity, specificity and calibration.

A gap is a group's value less that of the other studies. So many are looked at that some are large
by chance, so the interval of the worst is widened for their number (Bonferroni). Bootstrap
variances of few patients are too small, and 0 where a group is without an error: they get the floor
of a proportion with one success and one failure more (Agresti & Caffo 2000), and t replaces the
normal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import stdtrit

from pneumo.evaluation.bootstrap import Estimate, Resampled, as_json

Measure = Literal["auroc", "sensitivity", "specificity", "in_the_large"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
WORST_RULE = (
    "of the gaps in AUROC, sensitivity, specificity and calibration in the large between a group "
    "(by sex, age, view, sex and age, view and sex) and the other studies, the largest for its "
    "standard error; shown where its interval, widened for their number (Bonferroni), excludes 0"
)
FAMILY_ERROR = 0.05


@dataclass(frozen=True, eq=False)
class Gap:
    """A group beside the other studies in one measure."""

    by: str
    name: str
    measure: Measure
    pair: Resampled
    """The group's value and that of the others."""
    patients: tuple[int, int]
    """That the group's value and that of the others rest on, the rarer class where both count."""

    @property
    def value(self) -> float:
        """The group less the others."""
        return float(self.pair.value[0] - self.pair.value[1])

    @property
    def is_worse(self) -> bool:
        """Whether the group is the one that is served worse."""
        if self.measure == "in_the_large":
            return bool(abs(self.pair.value[0]) > abs(self.pair.value[1]))
        return self.value < 0

    @property
    def standard_error(self) -> float:
        """Of `value`; NaN where it cannot be had."""
        drawn = self.pair.drawn
        variance = float(np.nanvar(drawn[0] - drawn[1]))
        if self.measure == "in_the_large":
            return math.sqrt(variance) or math.nan
        share = 2 if self.measure == "auroc" else 1  # AUROC: less than a proportion's of one class
        for row, n in enumerate(self.patients):
            smoothed = (float(self.pair.value[row]) * n + 1) / (n + 2)
            least = smoothed * (1 - smoothed) / (share * (n + 2))
            variance += max(0.0, least - float(np.nanvar(drawn[row])))
        return math.sqrt(variance)

    def widen(self, compared: int) -> Estimate:
        """The gap with its interval among so many."""
        tail = FAMILY_ERROR / 2 / compared
        margin = float(stdtrit(min(self.patients) - 1, 1 - tail)) * self.standard_error
        method = f"patient bootstrap, t, Bonferroni over {compared} gaps"
        return Estimate(self.value, self.value - margin, self.value + margin, method)


@dataclass(frozen=True)
class Worst:
    """The largest gap to a group's harm, by WORST_RULE."""

    by: str | None
    """None where no group can be compared."""
    name: str | None
    measure: Measure | None
    gap: Estimate
    """With the interval widened for the number of gaps."""
    compared: int
    """Gaps that could be compared."""
    measures: tuple[Measure, ...]
    """In which any could."""

    @property
    def is_shown(self) -> bool:
        """Whether chance, and having looked at many gaps, do not explain it."""
        low, high = self.gap.low, self.gap.high
        return low is not None and high is not None and not low <= 0 <= high

    def to_json(self) -> dict[str, Any]:
        """The group, the measure, the gap, whether it is shown, and the rule."""
        return {**as_json(vars(self)), "shown": self.is_shown, "rule": WORST_RULE}


def find_worst(gaps: Sequence[Gap], min_patients: int) -> Worst:
    """The worst of the gaps that have a standard error, by WORST_RULE."""
    compared = [gap for gap in gaps if gap.standard_error > 0 and min(gap.patients) > 1]
    measures = tuple(name for name in MEASURES if any(gap.measure == name for gap in compared))
    worse = [gap for gap in compared if gap.is_worse]
    if not worse:
        reason = "no gap is to a group's harm"
        if not compared:
            reason = f"each needs {min_patients} patients with and {min_patients} without pneumonia"
        return Worst(None, None, None, Estimate.undefined(reason), len(compared), measures)

    def excess(gap: Gap) -> float:
        found = gap.widen(len(compared))
        assert found.value is not None
        assert found.high is not None
        return abs(found.value) / (found.high - found.value)

    worst = max(worse, key=excess)
    found = worst.widen(len(compared))
    return Worst(worst.by, worst.name, worst.measure, found, len(compared), measures)


def describe_measures() -> Mapping[Measure, str]:
    """Their names in a sentence."""
    return {
        "auroc": "AUROC",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "in_the_large": "calibration (mean predicted − observed risk)",
    }
