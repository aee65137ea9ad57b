"""Subgroups: for whom the model is good, and for whom it is worst.

Groups are looked at side by side, so some will look bad by chance: the intervals of the table are
each by themselves, and only the worst group's is widened for the number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from pneumo.dataset.quality import AGE_BANDS, UNKNOWN, name_age_band
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    Statistics,
    StatisticSet,
    as_json,
    divide,
    within,
)
from pneumo.evaluation.operating_points import find_too_few
from pneumo.evaluation.predictions import Predictions

By = Literal["sex", "age", "view", "negatives", "box_area"]
Bools = npt.NDArray[np.bool_]

COMPARED: tuple[By, ...] = ("sex", "age", "view")
"""The worst group is looked for among these. The others divide the studies by the
readers' findings: that subtle findings are harder tells nothing about a kind of patient."""
WORST_RULE = (
    "of the groups by sex, age and view that can be judged, the one whose AUROC less that of the "
    "rest has the lowest upper bound, which a small group's wide interval keeps high; shown worse "
    "where that bound, widened for the number of groups (Bonferroni), is below 0"
)
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
    gap: Estimate
    """AUROC - AUROC of the studies in the other groups."""

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
            "gap": self.gap,
        }

    def to_json(self) -> dict[str, Any]:
        """Names, counts and estimates."""
        counts = as_json(self, leave_out={"rates", *self.estimates})
        return {**counts, **as_json(self.estimates)}


@dataclass(frozen=True)
class Worst:
    """The group that the model serves worst, by WORST_RULE."""

    by: By | None
    """None where no two groups can be compared."""
    name: str | None
    gap: Estimate
    """With the interval widened for the number of groups."""
    compared: int
    """Groups that could be compared."""

    @property
    def is_shown(self) -> bool:
        """Whether chance, and having looked at many groups, do not explain it."""
        return self.gap.high is not None and self.gap.high < 0

    def to_json(self) -> dict[str, Any]:
        """The group, its gap, whether it is shown, and the rule."""
        return {**as_json(vars(self)), "shown": self.is_shown, "rule": WORST_RULE}


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


def divide_studies(rows: Predictions) -> list[GroupRows]:
    """Every group of `rows`, empty ones included; what is unknown is a group where it occurs."""
    positive = rows.target == 1
    ages = [name_age_band(None if math.isnan(age) else int(age)) for age in rows.age]
    found = [
        *_by_name("sex", rows.sex, ("F", "M")),
        *_by_name("age", np.array(ages, dtype=np.str_), tuple(AGE_BANDS)),
        *_by_name("view", rows.view, ("AP", "PA")),
    ]
    findings = np.where(positive, "", rows.finding)
    areas = np.array([*TERTILES, ""])[_tertile(rows)]
    found += _groups_with_shared("negatives", positive, findings, NEGATIVES)
    found += _groups_with_shared("box_area", ~positive, areas, TERTILES)
    return found


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


def subgroup_statistics(rows: Predictions, threshold: float | None) -> Statistics:
    """What `evaluate_subgroups` needs to have resampled, by part."""
    sets: dict[str, Callable[[], Mapping[str, Statistic]]] = {}
    for members in divide_studies(rows):
        sets[_name(members, "rank")] = partial(_rank, rows, members)
        sets[_name(members, "sums")] = partial(_sums, rows, members, threshold)
    return sets


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
    """tp, fp, fn, tn, sum of probabilities and of their squared errors: (6, R)."""
    positive, probability = metrics.check_scores(rows.target, rows.probability, both_classes=False)
    called = probability >= (math.inf if threshold is None else threshold)
    calibrated = np.nan_to_num(rows.calibrated_probability)
    outcomes = positive & called, ~positive & called, positive & ~called, ~positive & ~called
    squared = (calibrated - positive) ** 2
    code = np.where(members.rows, 0, -1)
    return {"sums": bootstrap.sums_statistic(code, 1, *outcomes, calibrated, squared)}


def evaluate_subgroups(
    rows: Predictions, threshold: float | None, found: Mapping[str, StatisticSet], min_patients: int
) -> Subgroups:
    """Every group of `rows`; null with a reason where it has fewer than `min_patients` patients of
    a class that a number counts."""
    groups, gaps = [], {}
    for members in divide_studies(rows):
        rank, sums = found[_name(members, "rank")], found[_name(members, "sums")]
        group = _evaluate_group(rows, members, threshold, rank, sums, min_patients)
        groups.append(group)
        if members.by in COMPARED and members.name != UNKNOWN and group.gap.low is not None:
            gap = rank.resampled["aurocs"].derive(bootstrap.first_less_second)
            gaps[(members.by, members.name)] = gap
    return Subgroups(tuple(groups), find_worst(gaps), cut_tertiles(rows))


def _evaluate_group(
    rows: Predictions,
    members: GroupRows,
    threshold: float | None,
    rank: StatisticSet,
    sums: StatisticSet,
    min_patients: int,
) -> Subgroup:
    group = rows.take(members.rows)
    few = {value: find_too_few(group, value, min_patients) for value in (1, 0)}
    if members.by == "box_area" and cut_tertiles(rows) is None:
        few[1] = "no positive has a box"
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
        in_the_large=_derive(
            sums, mixed, lambda s: divide(s[4] - s[0] - s[2], s[:4].sum(axis=0))[None]
        ),
        gap=_gap(rank, either or _few_in_rest(rows, members, min_patients)),
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
        if key in metrics.DENOMINATORS and threshold is not None:
            one = bootstrap.with_wilson(one, _count_patients(group, threshold, key))
        found[key] = one
    return found


def _apply(rate: Callable[[Floats, Floats, Floats, Floats], Floats], sums: Floats) -> Floats:
    return rate(sums[0], sums[1], sums[2], sums[3])[None]


def _count_patients(group: Predictions, threshold: float, key: str) -> int:
    """The patients in the denominator of a rate."""
    positive, called = group.target == 1, group.probability >= threshold
    outcome = np.where(called, np.where(positive, 0, 1), np.where(positive, 2, 3))
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


def _gap(rank: StatisticSet, few: str | None) -> Estimate:
    if few is not None:
        return Estimate.undefined(few)
    if rank.reason is None and len(rank.resampled["aurocs"].value) < 2:
        return Estimate.undefined("nothing to compare with")
    return rank.difference("aurocs")


def _few_in_rest(rows: Predictions, members: GroupRows, min_patients: int) -> str | None:
    rest = rows.take(members.rest)
    found = [find_too_few(rest, value, min_patients) for value in (1, 0)]
    return next((f"the rest is {reason}" for reason in found if reason is not None), None)


def find_worst(gaps: Mapping[tuple[By, str], Resampled]) -> Worst:
    """The worst of the groups by WORST_RULE; `gaps` are AUROC less that of the rest, resampled."""
    compared = len(gaps)
    if not compared:
        return Worst(None, None, Estimate.undefined("no two groups can be compared"), 0)
    method = f"patient bootstrap, normal, Bonferroni over {compared} groups"
    z = float(ndtri(1 - 0.025 / compared))
    found = {}
    for key, gap in gaps.items():
        value, margin = float(gap.value[0]), z * float(np.nanstd(gap.drawn[0]))
        found[key] = Estimate(value, value - margin, value + margin, method)
    by, name = min(found, key=lambda key: (found[key].high, get_args(By).index(key[0]), key[1]))
    return Worst(by, name, found[by, name], compared)
