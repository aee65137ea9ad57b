"""Subgroups: for whom the model is good, and for whom it is worst.

Many subgroups are compared, so some look bad by chance: each interval of the table is by itself,
and only that of the worst gap allows for the number of comparisons, see `subgroup_gaps`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import UNKNOWN
from pneumo.evaluation import metrics
from pneumo.evaluation.bootstrap import (
    Resampled,
    StatisticBuilders,
    StatisticSet,
    divide,
)
from pneumo.evaluation.estimates import Estimate, Floats, as_json
from pneumo.evaluation.operating_points import code_outcomes, estimate_rates, find_too_few
from pneumo.evaluation.predictions import Predictions
from pneumo.evaluation.subgroup_definitions import (
    SHARED,
    By,
    SubgroupMembers,
    cut_tertiles,
    divide_studies,
)
from pneumo.evaluation.subgroup_gaps import Gap, Measure, WorstSubgroup, find_worst_subgroup
from pneumo.evaluation.subgroup_statistics import (
    AUROC,
    AVERAGE_PRECISION,
    NUM_ROWS,
    REST_AUROC,
    REST_SUMS,
    SUMS,
    subgroups_statistic,
)

COMPARED: tuple[By, ...] = ("sex", "age", "view", "sex_age", "view_sex")
"""The worst subgroup is one of these. The others divide the studies by the readers' findings: that
subtle findings are harder says nothing about a kind of patient."""
_NAMES = {"recall": "sensitivity"}
_DEFINED: Mapping[str, tuple[By, ...]] = {"recall": ("box_area",), "specificity": ("negatives",)}
"""Which subgroups of SHARED have a rate of their own. All other rates depend on the ratio of the
classes, which is artificial in SHARED, so they are undefined there."""


@dataclass(frozen=True)
class Subgroup:
    """A subgroup's size and its estimates; `negatives` have all positives, `box_area` all
    negatives of the split beside them."""

    by: By
    name: str
    n: int
    positives: int
    patients: int
    auroc: Estimate
    average_precision: Estimate
    rates: Mapping[str, Estimate]
    """Every metric of `metrics.RATES` at the decision point."""
    brier: Estimate
    """Of the calibrated probability."""
    in_the_large: Estimate
    """Mean calibrated probability - fraction of positives."""
    gaps: Mapping[Measure, Estimate]
    """The subgroup's value - that of the studies in the other subgroups."""

    @property
    def estimates(self) -> dict[str, Estimate]:
        """By their names in metrics.json."""
        rates = {_NAMES.get(key, key): rate for key, rate in self.rates.items()}
        return {
            "auroc": self.auroc,
            "average_precision": self.average_precision,
            **rates,
            "brier": self.brier,
            "in_the_large": self.in_the_large,
            "gap": self.gaps["auroc"],
            **{f"gap_{name}": gap for name, gap in self.gaps.items() if name != "auroc"},
        }

    def to_json(self) -> dict[str, Any]:
        """Names, counts and estimates."""
        counts = as_json(self, leave_out={"rates", "gaps", *self.estimates})
        return {**counts, **as_json(self.estimates)}


@dataclass(frozen=True)
class Subgroups:
    """All subgroups of a split, and the one that is served worst."""

    groups: tuple[Subgroup, ...]
    worst: WorstSubgroup
    box_area_cuts: tuple[float, float] | None
    """Between the tertiles, as fractions of the image; None without boxes."""

    def to_json(self) -> dict[str, Any]:
        """The subgroups as a list, the worst one, and the cuts between the tertiles."""
        multiplicity = "each interval is by itself; only worst.gap allows for their number"
        return {**as_json(vars(self)), "multiplicity": multiplicity}


def subgroup_statistics(
    rows: Predictions, threshold: float | None, min_patients: int
) -> StatisticBuilders:
    """What `evaluate_subgroups` needs to have resampled, at a threshold on the logit."""
    groups = divide_studies(rows, min_patients)
    return {"subgroups": lambda: {"groups": subgroups_statistic(rows, groups, threshold)}}


def evaluate_subgroups(
    rows: Predictions, threshold: float | None, found: Mapping[str, StatisticSet], min_patients: int
) -> Subgroups:
    """Every subgroup of `rows` at a threshold on the logit.

    A number is null, with a reason, where fewer than `min_patients` patients have a class that it
    counts.
    """
    groups, compared, part = [], [], found["subgroups"]
    for number, members in enumerate(divide_studies(rows, min_patients)):
        resampled = part.resampled.get("groups")
        if resampled is not None:
            here = slice(number * NUM_ROWS, (number + 1) * NUM_ROWS)
            patients = rows.count_rarer_class(members.own)
            resampled = replace(resampled.take(here), effective_patients=patients)
        group = _Evaluated(rows, members, threshold, resampled, part.reason, min_patients)
        gaps = group.compare_with_rest()
        groups.append(group.summarise(gaps))
        if members.by in COMPARED and members.name != UNKNOWN:
            compared += [gap for gap in gaps.values() if isinstance(gap, Gap)]
    return Subgroups(tuple(groups), find_worst_subgroup(compared, min_patients), cut_tertiles(rows))


_OF_SUMS: Mapping[Measure, Callable[[Floats], Floats]] = {
    "sensitivity": lambda s: divide(s[0], s[0] + s[2])[None],
    "specificity": lambda s: divide(s[3], s[3] + s[1])[None],
    "in_the_large": lambda s: divide(s[4] - s[0] - s[2], s[:4].sum(axis=0))[None],
}
"""Measures (1, R) of the six sums (6, R), see SUMS."""
_CLASSES: Mapping[Measure, tuple[int, ...]] = {"sensitivity": (1,), "specificity": (0,)}
"""Which classes a measure counts, where it counts one."""


@dataclass(frozen=True, eq=False)
class _Evaluated:
    """A subgroup of `rows`, and what was resampled of it."""

    rows: Predictions
    members: SubgroupMembers
    threshold: float | None
    resampled: Resampled | None
    """NUM_ROWS statistics; None where there is `fault`."""
    fault: str | None
    min_patients: int

    @property
    def _shared(self) -> str | None:
        return SHARED.get(self.members.by)

    @property
    def _no_threshold(self) -> str | None:
        return "no threshold was chosen on val" if self.threshold is None else None

    @property
    def _uncalibrated(self) -> str | None:
        unknown = np.isnan(self.rows.calibrated_probability[self.members.own])
        return "no calibration" if unknown.any() else None

    @cached_property
    def _patients_by_class(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Patients with a negative study and with a positive one, of the subgroup and of its
        rest."""
        own, rest = map(self.rows.count_by_class, (self.members.own, self.members.rest))
        return own, rest

    @cached_property
    def _too_few(self) -> dict[int, str | None]:
        """By class, why the subgroup has too few patients of it; None where it has enough."""
        too_few = self._find_too_few(self.members.own)
        if self.members.by == "box_area" and cut_tertiles(self.rows) is None:
            too_few[1] = "no positive has a box"
        return too_few

    def _find_too_few(self, mask: npt.NDArray[np.bool_]) -> dict[int, str | None]:
        return {v: find_too_few(self.rows, v, self.min_patients, mask) for v in (1, 0)}

    def compare_with_rest(self) -> dict[Measure, Gap | str]:
        """The subgroup and the rest in each measure, or why they cannot be compared."""
        own, rest = self._too_few, self._find_too_few(self.members.rest)
        few = {v: own[v] or (rest[v] and f"the rest is {rest[v]}") for v in (1, 0)}
        shared, either = self._shared, few[1] or few[0]
        reasons: dict[Measure, str | None] = {
            "auroc": either,
            "sensitivity": shared or few[1] or self._no_threshold,
            "specificity": shared or few[0] or self._no_threshold,
            "in_the_large": shared or either or self._uncalibrated,
        }
        return {
            measure: reason or self.fault or self._find_gap(measure)
            for measure, reason in reasons.items()
        }

    def _find_gap(self, measure: Measure) -> Gap:
        assert self.resampled is not None
        classes = _CLASSES.get(measure, (1, 0))
        own, rest = (min(part[value] for value in classes) for part in self._patients_by_class)
        if measure == "auroc":
            pair = self.resampled.take(slice(AUROC, REST_AUROC + 1))
        else:
            of_group, of_rest = (
                self.resampled.take(part).derive(_OF_SUMS[measure]) for part in (SUMS, REST_SUMS)
            )
            pair = of_group.concatenate(of_rest)
        size = min(
            self.rows.count_equal_patients(part & (self.rows.target == value))
            for part in (self.members.own, self.members.rest)
            for value in classes
        )
        pair = replace(pair, effective_patients=size)
        return Gap(self.members.by, self.members.name, measure, pair, (own, rest))

    def summarise(self, gaps: Mapping[Measure, Gap | str]) -> Subgroup:
        """All numbers of the subgroup."""
        own, either = self.members.own, self._too_few[1] or self._too_few[0]
        calibrated = self._shared or either or self._uncalibrated
        return Subgroup(
            by=self.members.by,
            name=self.members.name,
            n=int(own.sum()),
            positives=int(self.rows.target[own].sum()),
            patients=self.rows.count_patients(own),
            auroc=self._estimate(either, lambda s: s[AUROC][None]),
            average_precision=self._estimate(either, lambda s: s[AVERAGE_PRECISION][None]),
            rates=self._estimate_rates(),
            brier=self._estimate(calibrated, _find_brier),
            in_the_large=self._estimate(calibrated, lambda s: _OF_SUMS["in_the_large"](s[SUMS])),
            gaps={
                measure: Estimate.undefined(gap) if isinstance(gap, str) else gap.estimate_alone()
                for measure, gap in gaps.items()
            },
        )

    def _estimate_rates(self) -> dict[str, Estimate]:
        """The metrics of `metrics.RATES`."""
        few = {"recall": self._too_few[1], "specificity": self._too_few[0]}
        reasons = {
            key: self.fault
            or (None if self.members.by in _DEFINED.get(key, ()) else self._shared)
            or few.get(key, self._too_few[1] or self._too_few[0])
            or self._no_threshold
            for key in metrics.RATES
        }
        found: dict[str, Estimate] = {}
        if self.resampled is not None:
            code = code_outcomes(self.rows, self.threshold)
            cells = self.resampled.take(SUMS).take(slice(0, 4))
            found = estimate_rates(cells, self.rows, np.where(self.members.own, code, -1))
        return {
            key: Estimate.undefined(reason) if reason else found[key]
            for key, reason in reasons.items()
        }

    def _estimate(self, reason: str | None, function: Callable[[Floats], Floats]) -> Estimate:
        undefined = "undefined for these studies"
        if self.resampled is None or reason:
            return Estimate.undefined(self.fault or reason or undefined)
        return self.resampled.derive(function).estimate(reason=undefined)


def _find_brier(table: Floats) -> Floats:
    sums = table[SUMS]
    return divide(sums[5], sums[:4].sum(axis=0))[None]
