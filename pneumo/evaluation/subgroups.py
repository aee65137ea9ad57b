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


# --- judged ---------------------------------------------------------------------------------------


def count_rarer(rows: Predictions) -> int:
    """The patients of the class that fewer have; of the only one where there is one."""
    return min(filter(None, count_by_class(rows)), default=0)


def count_by_class(rows: Predictions) -> tuple[int, int]:
    """The patients with a negative study, and those with a positive one."""
    negative, positive = (len(np.unique(rows.patient[rows.target == value])) for value in (0, 1))
    return negative, positive


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What `evaluate_subgroups` needs to have resampled."""

    sets: Statistics
    independent: Mapping[str, int]
    """By set, the patients that its statistics rest on."""


def subgroup_statistics(
    rows: Predictions, threshold: float | None, min_patients: int
) -> GroupStatistics:
    """Of all groups at a threshold on the logit."""
    sets: dict[str, Callable[[], Mapping[str, Statistic]]] = {}
    independent = {}
    for members in divide_studies(rows, min_patients):
        rank, sums = _name(members, "rank"), _name(members, "sums")
        sets[rank] = partial(_rank, rows, members)
        sets[sums] = partial(_sums, rows, members, threshold)
        independent[rank] = independent[sums] = count_rarer(rows.take(members.rows))
    return GroupStatistics(sets, independent)


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
    groups, compared = [], []
    for members in divide_studies(rows, min_patients):
        rank, sums = found[_name(members, "rank")], found[_name(members, "sums")]
        pairs = _pair_with_rest(rows, members, threshold, rank, sums, min_patients)
        groups.append(_evaluate_group(rows, members, threshold, rank, sums, pairs, min_patients))
        if members.by in COMPARED and members.name != UNKNOWN:
            compared += [gap for gap in pairs.values() if isinstance(gap, Gap)]
    return Subgroups(tuple(groups), find_worst(compared, min_patients), cut_tertiles(rows))


def _pair_with_rest(
    rows: Predictions,
    members: GroupRows,
    threshold: float | None,
    rank: StatisticSet,
    sums: StatisticSet,
    min_patients: int,
) -> dict[Measure, Gap | str]:
    """The group beside the rest in each measure, or why not."""
    both = rows.take(members.rows), rows.take(members.rest)
    own = _find_few(rows, members, min_patients)
    few = {
        value: own[value] or _in_rest(find_too_few(both[1], value, min_patients))
        for value in (1, 0)
    }
    no_point = "no threshold was chosen on val" if threshold is None else None
    uncalibrated = "no calibration" if np.isnan(rows.calibrated_probability).any() else None
    shared = _SHARED.get(members.by)
    either = few[1] or few[0]
    reasons: dict[Measure, str | None] = {
        "auroc": either or rank.reason,
        "sensitivity": shared or few[1] or no_point or sums.reason,
        "specificity": shared or few[0] or no_point or sums.reason,
        "in_the_large": shared or either or uncalibrated or sums.reason,
    }
    found: dict[Measure, Gap | str] = {}
    for measure, reason in reasons.items():
        if reason is not None:
            found[measure] = reason
            continue
        patients = tuple(_count_behind(part, measure) for part in both)
        if measure == "auroc":
            pair = rank.resampled["aurocs"]
        else:
            group, rest = (
                sums.resampled[name].derive(_MEASURED[measure]) for name in ("sums", "rest")
            )
            pair = group.beside(rest)
        pair = replace(pair, independent=min(patients))
        found[measure] = Gap(members.by, members.name, measure, pair, (patients[0], patients[1]))
    return found


_MEASURED: Mapping[Measure, Callable[[Floats], Floats]] = {
    "sensitivity": lambda s: divide(s[0], s[0] + s[2])[None],
    "specificity": lambda s: divide(s[3], s[3] + s[1])[None],
    "in_the_large": lambda s: divide(s[4] - s[0] - s[2], s[:4].sum(axis=0))[None],
}


def _find_few(rows: Predictions, members: GroupRows, min_patients: int) -> dict[int, str | None]:
    """By class why the group has too few patients of it."""
    group = rows.take(members.rows)
    few = {value: find_too_few(group, value, min_patients) for value in (1, 0)}
    if members.by == "box_area" and cut_tertiles(rows) is None:
        few[1] = "no positive has a box"
    return few


def _in_rest(reason: str | None) -> str | None:
    return None if reason is None else f"the rest is {reason}"


def _count_behind(part: Predictions, measure: Measure) -> int:
    classes = {"sensitivity": (1,), "specificity": (0,)}.get(measure, (1, 0))
    return min(len(np.unique(part.patient[part.target == value])) for value in classes)


def _evaluate_group(
    rows: Predictions,
    members: GroupRows,
    threshold: float | None,
    rank: StatisticSet,
    sums: StatisticSet,
    pairs: Mapping[Measure, Gap | str],
    min_patients: int,
) -> Subgroup:
    group = rows.take(members.rows)
    few = _find_few(rows, members, min_patients)
    either = few[1] or few[0]
    uncalibrated = "no calibration" if np.isnan(rows.calibrated_probability).any() else None
    mixed = _SHARED.get(members.by) or either or uncalibrated
    return Subgroup(
        by=members.by,
        name=members.name,
        n=len(group),
        positives=int(group.target.sum()),
        patients=len(np.unique(group.patient)),
        auroc=Estimate.undefined(either) if either else rank.estimate("aurocs"),
        average_precision=Estimate.undefined(either)
        if either
        else rank.estimate("average_precision"),
        rates=_estimate_rates(group, members.by, threshold, sums, few),
        brier=_derive(sums, mixed, lambda s: divide(s[5], s[:4].sum(axis=0))[None]),
        in_the_large=_derive(sums, mixed, _MEASURED["in_the_large"]),
        gaps={
            measure: Estimate.undefined(pair)
            if isinstance(pair, str)
            else pair.pair.derive(bootstrap.first_less_second).estimate()
            for measure, pair in pairs.items()
        },
    )


def _estimate_rates(
    group: Predictions,
    by: By,
    threshold: float | None,
    sums: StatisticSet,
    few: Mapping[int, str | None],
) -> dict[str, Estimate]:
    """Every metric of `metrics.RATES`; `few` is by class why the group has too few patients."""
    shared = _SHARED.get(by)
    no_point = "no threshold was chosen on val" if threshold is None else None
    counted = {"recall": few[1], "specificity": few[0]}
    found = {}
    for key, rate in metrics.RATES.items():
        is_shared = by in _COUNTED[key] if key in _COUNTED else True
        reason = (shared if is_shared else None) or counted.get(key, few[1] or few[0]) or no_point
        one = _derive(sums, reason, partial(_apply, rate), metrics.UNDEFINED[key])
        if key in metrics.DENOMINATORS and one.value is not None and threshold is not None:
            one = bootstrap.with_wilson(one, _count_patients(group, threshold, key))
        found[key] = one
    return found


def _apply(rate: Callable[[Floats, Floats, Floats, Floats], Floats], sums: Floats) -> Floats:
    return rate(sums[0], sums[1], sums[2], sums[3])[None]


def _count_patients(group: Predictions, threshold: float, key: str) -> int:
    """The patients in the denominator of a rate."""
    outcome = code_outcomes(group, threshold)
    return len(np.unique(group.patient[np.isin(outcome, metrics.DENOMINATORS[key])]))


def _derive(
    sums: StatisticSet,
    reason: str | None,
    function: Callable[[Floats], Floats],
    undefined: str = "undefined for these studies",
) -> Estimate:
    reason = sums.reason or reason
    if reason is not None:
        return Estimate.undefined(reason)
    return sums.resampled["sums"].derive(function).estimate(reason=undefined)
