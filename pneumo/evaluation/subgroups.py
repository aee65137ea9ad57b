"""Subgroups: for whom the model is good, and for whom it is worst.

Groups are looked at side by side, so some will look bad by chance: the intervals of the table are
each by themselves, and only that of the worst gap allows for their number, see `group_gaps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import AGE_BANDS, UNKNOWN, name_age_band
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Statistic,
    Statistics,
    StatisticSet,
    as_json,
    divide,
    within,
)
from pneumo.evaluation.group_gaps import Gap, Measure, Worst, find_worst
from pneumo.evaluation.operating_points import code_outcomes, find_too_few
from pneumo.evaluation.predictions import Predictions

By = Literal["sex", "age", "view", "sex_age", "view_sex", "negatives", "box_area"]
Bools = npt.NDArray[np.bool_]

COMPARED: tuple[By, ...] = ("sex", "age", "view", "sex_age", "view_sex")
"""The worst group is looked for among these. The others divide the studies by the
readers' findings: that subtle findings are harder tells nothing about a kind of patient."""
CROSSED: Mapping[By, tuple[By, By]] = {"sex_age": ("sex", "age"), "view_sex": ("view", "sex")}
NEGATIVES = ("Normal", "No Lung Opacity / Not Normal")
TERTILES = ("smallest", "middle", "largest")
_SHARED: Mapping[str, str] = {
    "negatives": "the positives are those of the whole split",
    "box_area": "the negatives are those of the whole split",
}
_NAMES = {"recall": "sensitivity"}
_COUNTED: Mapping[str, tuple[By, ...]] = {"recall": ("negatives",), "specificity": ("box_area",)}
"""In which kinds of group a rate is that of the whole split. Rates not named here depend on the
ratio of the classes, which is artificial in both kinds, so they are undefined in either."""


@dataclass(frozen=True, eq=False)
class GroupRows:
    """Which studies are in a group, and which it is compared with; masks (N,)."""

    by: By
    name: str
    rows: Bools
    rest: Bools


@dataclass(frozen=True)
class Subgroup:
    """The headline of the studies in a group; of `negatives` against all positives, of `box_area`
    against all negatives."""

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
    """The group's value - that of the studies in the other groups."""

    @property
    def estimates(self) -> dict[str, Estimate]:
        """All of them, by the names of metrics.json."""
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
    """All groups of a split, and the worst."""

    groups: tuple[Subgroup, ...]
    worst: Worst
    box_area_cuts: tuple[float, float] | None
    """Between the tertiles: fractions of the image; None without boxes."""

    def to_json(self) -> dict[str, Any]:
        """The groups as a list, the worst, and where the tertiles were cut."""
        multiplicity = "each interval is by itself; only worst.gap allows for their number"
        return {**as_json(vars(self)), "multiplicity": multiplicity}


# --- who is where ---------------------------------------------------------------------------------


def divide_studies(rows: Predictions, min_patients: int) -> list[GroupRows]:
    """Every group of `rows`, empty ones included; what is unknown is a group where it occurs. Two
    properties are crossed where `min_patients` patients of both classes are in both."""
    positive = rows.target == 1
    ages = [name_age_band(None if math.isnan(age) else int(age)) for age in rows.age]
    found = [
        *_by_name("sex", rows.sex, ("F", "M")),
        *_by_name("age", np.array(ages, dtype=np.str_), tuple(AGE_BANDS)),
        *_by_name("view", rows.view, ("AP", "PA")),
    ]
    found += [crossed for by in CROSSED for crossed in _cross(found, by, rows, min_patients)]
    findings = np.where(positive, "", rows.finding)
    areas = np.array([*TERTILES, ""])[_tertile(rows)]
    found += _groups_with_shared("negatives", positive, findings, NEGATIVES)
    found += _groups_with_shared("box_area", ~positive, areas, TERTILES)
    return found


def _cross(
    groups: Sequence[GroupRows], by: By, rows: Predictions, min_patients: int
) -> list[GroupRows]:
    first, second = (
        [group for group in groups if group.by == one and group.name != UNKNOWN]
        for one in CROSSED[by]
    )
    crossed = [
        GroupRows(by, f"{one.name}, {two.name}", both, ~both)
        for one, two in product(first, second)
        for both in (one.rows & two.rows,)
    ]
    return [
        group
        for group in crossed
        if not any(find_too_few(rows.take(group.rows), value, min_patients) for value in (1, 0))
    ]


def _groups_with_shared(
    by: By, shared: Bools, column: npt.NDArray[np.str_], names: Sequence[str]
) -> list[GroupRows]:
    """Groups that each hold the `shared` studies too."""
    return _with_rest(by, names, [shared | (column == name) for name in names])


def _by_name(by: By, column: npt.NDArray[np.str_], names: Sequence[str]) -> list[GroupRows]:
    known = {name: column == name for name in names}
    unknown = ~np.isin(column, names)
    if unknown.any():
        known[UNKNOWN] = unknown
    return _with_rest(by, tuple(known), list(known.values()))


def _with_rest(by: By, names: Sequence[str], masks: Sequence[Bools]) -> list[GroupRows]:
    return [
        GroupRows(by, name, mask, np.any([other for other in masks if other is not mask], axis=0))
        for name, mask in zip(names, masks, strict=True)
    ]


def cut_tertiles(rows: Predictions) -> tuple[float, float] | None:
    """Box areas between the tertiles of the positives with a box; None without any."""
    areas = rows.box_area_fraction[(rows.target == 1) & ~np.isnan(rows.box_area_fraction)]
    if len(areas) == 0:
        return None
    low, high = np.quantile(areas, [1 / 3, 2 / 3])
    return float(low), float(high)


def _tertile(rows: Predictions) -> npt.NDArray[np.int64]:
    """0 to 2 of a positive with a box, 3 of every other study: (N,)."""
    cuts = cut_tertiles(rows)
    tertile = np.full(len(rows), 3)
    if cuts is not None:
        boxed = (rows.target == 1) & ~np.isnan(rows.box_area_fraction)
        tertile[boxed] = np.searchsorted(cuts, rows.box_area_fraction[boxed], side="left")
    return tertile


# --- estimates ------------------------------------------------------------------------------------


def count_rarer(rows: Predictions) -> int:
    """The patients of the class that fewer have; of the only one where there is one."""
    return min(filter(None, count_by_class(rows)), default=0)


def count_by_class(rows: Predictions) -> tuple[int, int]:
    """The patients with a negative study, and those with a positive one."""
    negative, positive = (len(np.unique(rows.patient[rows.target == value])) for value in (0, 1))
    return negative, positive


def subgroup_statistics(
    rows: Predictions, threshold: float | None, min_patients: int
) -> tuple[Statistics, dict[str, int]]:
    """What `evaluate_subgroups` needs to have resampled, at a threshold on the logit; and by set
    the patients that its statistics rest on."""
    sets: dict[str, Callable[[], Mapping[str, Statistic]]] = {}
    independent = {}
    for members in divide_studies(rows, min_patients):
        rank, sums = _name(members, "rank"), _name(members, "sums")
        sets[rank] = partial(_rank, rows, members)
        sets[sums] = partial(_sums, rows, members, threshold)
        independent[rank] = independent[sums] = count_rarer(rows.take(members.rows))
    return sets, independent


def _name(members: GroupRows, part: str) -> str:
    return f"subgroup/{members.by}/{members.name}/{part}"


def _rank(rows: Predictions, members: GroupRows) -> dict[str, Statistic]:
    group, rest = np.flatnonzero(members.rows), np.flatnonzero(members.rest)
    target, logit = rows.target, rows.logit
    precision = metrics.average_precision_statistic(target[group], logit[group])
    aurocs = [within(group, metrics.auroc_statistic(target[group], logit[group]))]
    if 0 < target[rest].sum() < len(rest):
        aurocs.append(within(rest, metrics.auroc_statistic(target[rest], logit[rest])))
    return {"aurocs": bootstrap.stack(*aurocs), "average_precision": within(group, precision)}


def _sums(rows: Predictions, members: GroupRows, threshold: float | None) -> dict[str, Statistic]:
    """tp, fp, fn, tn, sum of probabilities and of their squared errors: (6, R), of the group and of
    the rest."""
    outcome = code_outcomes(rows, threshold)
    calibrated = np.nan_to_num(rows.calibrated_probability)
    squared = (calibrated - rows.target) ** 2
    values = [*(outcome == code for code in range(4)), calibrated, squared]
    parts = {"sums": members.rows, "rest": members.rest}
    return {
        name: bootstrap.sums_statistic(np.where(part, 0, -1), 1, *values)
        for name, part in parts.items()
    }


def evaluate_subgroups(
    rows: Predictions, threshold: float | None, found: Mapping[str, StatisticSet], min_patients: int
) -> Subgroups:
    """Every group of `rows` at a threshold on the logit; null with a reason where it has fewer than
    `min_patients` patients of a class that a number counts."""
    cuts, groups, compared = cut_tertiles(rows), [], []
    for members in divide_studies(rows, min_patients):
        group = _Group(
            members.by,
            rows.take(members.rows),
            rows.take(members.rest),
            threshold,
            found[_name(members, "rank")],
            found[_name(members, "sums")],
        )
        few = group.find_few(min_patients, has_boxes=cuts is not None)
        pairs = group.pair_with_rest(few, min_patients, members.name)
        groups.append(group.summarise(few, pairs, members.name))
        if members.by in COMPARED and members.name != UNKNOWN:
            compared += [gap for gap in pairs.values() if isinstance(gap, Gap)]
    return Subgroups(tuple(groups), find_worst(compared, min_patients), cuts)


_MEASURED: Mapping[Measure, Callable[[Floats], Floats]] = {
    "sensitivity": lambda s: divide(s[0], s[0] + s[2])[None],
    "specificity": lambda s: divide(s[3], s[3] + s[1])[None],
    "in_the_large": lambda s: divide(s[4] - s[0] - s[2], s[:4].sum(axis=0))[None],
}
_CLASSES: Mapping[Measure, tuple[int, ...]] = {"sensitivity": (1,), "specificity": (0,)}
"""Which classes a measure counts, where it counts one."""


@dataclass(frozen=True, eq=False)
class _Group:
    """The studies of a group and of the rest, and what was resampled of them."""

    by: By
    own: Predictions
    rest: Predictions
    threshold: float | None
    rank: StatisticSet
    sums: StatisticSet

    def find_few(self, min_patients: int, *, has_boxes: bool) -> dict[int, str | None]:
        """By class why the group has too few patients of it."""
        few = {value: find_too_few(self.own, value, min_patients) for value in (1, 0)}
        if self.by == "box_area" and not has_boxes:
            few[1] = "no positive has a box"
        return few

    @property
    def _no_point(self) -> str | None:
        return "no threshold was chosen on val" if self.threshold is None else None

    @property
    def _uncalibrated(self) -> str | None:
        return "no calibration" if np.isnan(self.own.calibrated_probability).any() else None

    def pair_with_rest(
        self, few: Mapping[int, str | None], min_patients: int, name: str
    ) -> dict[Measure, Gap | str]:
        """The group beside the rest in each measure, or why not."""
        in_rest = {value: find_too_few(self.rest, value, min_patients) for value in (1, 0)}
        few = {v: few[v] or (in_rest[v] and f"the rest is {in_rest[v]}") for v in (1, 0)}
        shared, either = _SHARED.get(self.by), few[1] or few[0]
        reasons: dict[Measure, str | None] = {
            "auroc": either or self.rank.reason,
            "sensitivity": shared or few[1] or self._no_point or self.sums.reason,
            "specificity": shared or few[0] or self._no_point or self.sums.reason,
            "in_the_large": shared or either or self._uncalibrated or self.sums.reason,
        }
        return {
            measure: self._make_gap(measure, name) if reason is None else reason
            for measure, reason in reasons.items()
        }

    def _make_gap(self, measure: Measure, name: str) -> Gap:
        own, rest = (
            min(
                len(np.unique(part.patient[part.target == v]))
                for v in _CLASSES.get(measure, (1, 0))
            )
            for part in (self.own, self.rest)
        )
        if measure == "auroc":
            pair = self.rank.resampled["aurocs"]
        else:
            of_group, of_rest = (
                self.sums.resampled[part].derive(_MEASURED[measure]) for part in ("sums", "rest")
            )
            pair = of_group.beside(of_rest)
        pair = replace(pair, independent=min(own, rest))
        return Gap(self.by, name, measure, pair, (own, rest))

    def summarise(
        self, few: Mapping[int, str | None], pairs: Mapping[Measure, Gap | str], name: str
    ) -> Subgroup:
        """All numbers of the group."""
        either = few[1] or few[0]
        mixed = _SHARED.get(self.by) or either or self._uncalibrated
        rank = StatisticSet({}, either) if either else self.rank
        return Subgroup(
            by=self.by,
            name=name,
            n=len(self.own),
            positives=int(self.own.target.sum()),
            patients=len(np.unique(self.own.patient)),
            auroc=rank.estimate("aurocs"),
            average_precision=rank.estimate("average_precision"),
            rates={key: self._estimate_rate(key, few) for key in metrics.RATES},
            brier=self._derive(mixed, lambda s: divide(s[5], s[:4].sum(axis=0))[None]),
            in_the_large=self._derive(mixed, _MEASURED["in_the_large"]),
            gaps={
                measure: Estimate.undefined(pair)
                if isinstance(pair, str)
                else pair.pair.derive(bootstrap.first_less_second).estimate()
                for measure, pair in pairs.items()
            },
        )

    def _estimate_rate(self, key: str, few: Mapping[int, str | None]) -> Estimate:
        """A metric of `metrics.RATES`."""
        is_shared = self.by in _COUNTED.get(key, tuple(_SHARED))
        too_few = {"recall": few[1], "specificity": few[0]}.get(key, few[1] or few[0])
        reason = (_SHARED.get(self.by) if is_shared else None) or too_few or self._no_point
        rate = metrics.RATES[key]
        found = self._derive(reason, lambda s: rate(*s[:4])[None], metrics.UNDEFINED[key])
        if key not in metrics.DENOMINATORS or found.value is None:
            return found
        is_counted = np.isin(code_outcomes(self.own, self.threshold), metrics.DENOMINATORS[key])
        return bootstrap.with_wilson(found, len(np.unique(self.own.patient[is_counted])))

    def _derive(
        self,
        reason: str | None,
        function: Callable[[Floats], Floats],
        undefined: str = "undefined for these studies",
    ) -> Estimate:
        if reason := self.sums.reason or reason:
            return Estimate.undefined(reason)
        return self.sums.resampled["sums"].derive(function).estimate(reason=undefined)
