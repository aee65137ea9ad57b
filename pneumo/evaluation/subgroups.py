"""Subgroups: for whom the model is good, and for whom it is worst.

Groups are looked at side by side, so some will look bad by chance: the intervals of the table are
each by themselves, and only that of the worst gap allows for their number, see `group_gaps`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import AGE_BANDS, UNKNOWN, name_age_band
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    Statistics,
    StatisticSet,
    Weights,
    as_json,
    divide,
)
from pneumo.evaluation.group_gaps import Gap, Measure, Worst, find_worst
from pneumo.evaluation.operating_points import code_outcomes, find_too_few
from pneumo.evaluation.predictions import Predictions, name_each

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
    ages = name_each(rows.age, lambda age: name_age_band(None if math.isnan(age) else int(age)))
    found = [
        *_by_name("sex", rows.sex, ("F", "M")),
        *_by_name("age", ages, tuple(AGE_BANDS)),
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
        if not any(find_too_few(rows, value, min_patients, group.rows) for value in (1, 0))
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


def count_rarer(rows: Predictions, part: Bools | None = None) -> int:
    """The patients of the class that fewer have, of the mask `part` if given; of the only one where
    there is one."""
    return min(filter(None, count_by_class(rows, part)), default=0)


def count_by_class(rows: Predictions, part: Bools | None = None) -> tuple[int, int]:
    """The patients with a negative study, and those with a positive one."""
    masks = (rows.target == value for value in (0, 1))
    negative, positive = (
        rows.count_patients(mask if part is None else mask & part) for mask in masks
    )
    return negative, positive


def subgroup_statistics(
    rows: Predictions, threshold: float | None, min_patients: int
) -> Statistics:
    """What `evaluate_subgroups` needs to have resampled, at a threshold on the logit."""
    groups = divide_studies(rows, min_patients)
    return {"subgroups": lambda: {"groups": _groups_statistic(rows, groups, threshold)}}


_AUROC, _REST_AUROC, _PRECISION = 0, 1, 2
_SUMS, _REST_SUMS = slice(3, 9), slice(9, 15)
"""tp, fp, fn, tn, sum of probabilities and of their squared errors."""
_NUM_ROWS = 15
"""Of a group in what `_groups_statistic` gives."""


def _groups_statistic(
    rows: Predictions, groups: Sequence[GroupRows], threshold: float | None
) -> Statistic:
    """AUROC of each group and of its rest, average precision, sums of both, one group after the
    other: (groups * _NUM_ROWS, R).

    The rest is not ranked anew: it wins what all studies win, less what the group's studies win or
    lose, plus what they win over each other.
    """
    positive, logit = metrics.check_scores(rows.target, rows.logit, both_classes=False)
    everybody = metrics.Ranking.of(positive, logit)
    mirror = metrics.Ranking.of(~positive, -logit)
    cells = _Cells.of(rows, groups, threshold)
    sum_won, sum_lost = cells.sum_by_cell(everybody), cells.sum_by_cell(mirror)
    rankings = [metrics.Ranking.of(positive, logit, group.rows) for group in groups]
    have_all = [bool(group.rows[~positive].all()) for group in groups]
    kinds = [np.flatnonzero([group.by == by for group in groups]) for by in _SHARED]

    def statistic(weights: Weights) -> Floats:
        own, total = cells.sum_up(weights)
        whole = everybody.weigh(weights)
        weighed = (
            ranking.weigh(weights, whole.cleared if has_all else None)
            for ranking, has_all in zip(rankings, have_all, strict=True)
        )
        ranked = np.array([(one.wins, one.average_precision) for one in weighed])
        inside, precision = ranked[:, 0], ranked[:, 1]
        positives, negatives = own[:, 0] + own[:, 2], own[:, 1] + own[:, 3]
        all_positives, all_negatives = total[0] + total[2], total[1] + total[3]
        # Of each cell's studies over all of the other class.
        wins = sum_won((whole.drawn * whole.beaten).T)
        lost = mirror.weigh(weights)
        wins += sum_lost((lost.drawn * lost.beaten).T)
        rest = wins.sum(axis=0) / 2 - cells.members @ wins + inside
        rest = divide(rest, (all_positives - positives) * (all_negatives - negatives))
        shared = (negatives, all_positives), (positives, all_negatives)
        for kind, (core, of_all) in zip(kinds, shared, strict=True):
            others = (one[kind].sum(axis=0) - one[kind] for one in (inside, core))
            of_others, num_others = others
            rest[kind] = divide(of_others, num_others * of_all)
        ranks = np.stack([divide(inside, positives * negatives), rest, precision], axis=1)
        table = np.concatenate([ranks, own, total - own], axis=1)
        return table.reshape(-1, weights.shape[1])

    return bootstrap.few_at_once(statistic)


@dataclass(frozen=True, eq=False)
class _Cells:
    """Studies that are in the same groups and have the same outcome, so that a sum over a group is
    one over its cells."""

    cell: npt.NDArray[np.intp]
    """Of each study: (N,)."""
    members: Floats
    """1 where a cell is in a group: (groups, cells)."""
    outcome: npt.NDArray[np.int64]
    """Which of tp, fp, fn, tn a cell is: (cells,)."""
    sums: Statistic
    """Weights, probabilities and squared errors by cell."""

    @classmethod
    def of(cls, rows: Predictions, groups: Sequence[GroupRows], threshold: float | None) -> Self:
        code = code_outcomes(rows, threshold)
        for bit, group in enumerate(groups):
            code += group.rows.astype(np.int64) << (bit + 2)
        names, cell = np.unique(code, return_inverse=True)
        members = (names >> (np.arange(len(groups))[:, None] + 2)) & 1
        calibrated = np.nan_to_num(rows.calibrated_probability)
        values = None, calibrated, (calibrated - rows.target) ** 2
        sums = bootstrap.sums_statistic(cell, len(names), *values)
        return cls(cell, members.astype(np.float64), names & 3, sums)

    def sum_up(self, weights: Weights) -> tuple[Floats, Floats]:
        """The six sums of each group (groups, 6, R), and those of all studies (6, R)."""
        counts, probability, squared = self.sums(weights).reshape(3, -1, weights.shape[1])
        of_outcome = [counts * (self.outcome == code)[:, None] for code in range(4)]
        values = np.stack([*of_outcome, probability, squared])
        return np.moveaxis(self.members @ values, 0, 1), values.sum(axis=1)

    def sum_by_cell(self, ranking: metrics.Ranking) -> Statistic:
        """Of weights of the ranking's positives (P, R), in its order: (cells, R)."""
        cell = self.cell[ranking.positives]
        return bootstrap.sums_statistic(cell, len(self.outcome), None)


def evaluate_subgroups(
    rows: Predictions, threshold: float | None, found: Mapping[str, StatisticSet], min_patients: int
) -> Subgroups:
    """Every group of `rows` at a threshold on the logit; null with a reason where it has fewer than
    `min_patients` patients of a class that a number counts."""
    cuts, groups, compared = cut_tertiles(rows), [], []
    part = found["subgroups"]
    for number, members in enumerate(divide_studies(rows, min_patients)):
        resampled = part.resampled.get("groups")
        if resampled is not None:
            here = slice(number * _NUM_ROWS, (number + 1) * _NUM_ROWS)
            few = count_rarer(rows, members.rows)
            resampled = replace(resampled.take(here), independent=few)
        group = _Group(rows, members, threshold, resampled, part.reason)
        few_of = group.find_few(min_patients, has_boxes=cuts is not None)
        pairs = group.pair_with_rest(few_of, min_patients)
        groups.append(group.summarise(few_of, pairs))
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
    """A group of `rows`, and what was resampled of it."""

    rows: Predictions
    members: GroupRows
    threshold: float | None
    resampled: Resampled | None
    """_NUM_ROWS statistics; None where there is `fault`."""
    fault: str | None

    @property
    def by(self) -> By:
        return self.members.by

    def find_few(self, min_patients: int, *, has_boxes: bool) -> dict[int, str | None]:
        """By class why the group has too few patients of it."""
        own = self.members.rows
        few = {value: find_too_few(self.rows, value, min_patients, own) for value in (1, 0)}
        if self.by == "box_area" and not has_boxes:
            few[1] = "no positive has a box"
        return few

    @property
    def _no_point(self) -> str | None:
        return "no threshold was chosen on val" if self.threshold is None else None

    @property
    def _uncalibrated(self) -> str | None:
        unknown = np.isnan(self.rows.calibrated_probability[self.members.rows])
        return "no calibration" if unknown.any() else None

    def pair_with_rest(
        self, few: Mapping[int, str | None], min_patients: int
    ) -> dict[Measure, Gap | str]:
        """The group beside the rest in each measure, or why not."""
        rest = self.members.rest
        in_rest = {v: find_too_few(self.rows, v, min_patients, rest) for v in (1, 0)}
        few = {v: few[v] or (in_rest[v] and f"the rest is {in_rest[v]}") for v in (1, 0)}
        shared, either = _SHARED.get(self.by), few[1] or few[0]
        reasons: dict[Measure, str | None] = {
            "auroc": either,
            "sensitivity": shared or few[1] or self._no_point,
            "specificity": shared or few[0] or self._no_point,
            "in_the_large": shared or either or self._uncalibrated,
        }
        return {
            measure: reason or self.fault or self._make_gap(measure)
            for measure, reason in reasons.items()
        }

    def _make_gap(self, measure: Measure) -> Gap:
        assert self.resampled is not None
        classes = _CLASSES.get(measure, (1, 0))
        counts = (
            count_by_class(self.rows, part) for part in (self.members.rows, self.members.rest)
        )
        own, rest = (min(of_class[value] for value in classes) for of_class in counts)
        if measure == "auroc":
            pair = self.resampled.take(slice(_AUROC, _REST_AUROC + 1))
        else:
            of_group, of_rest = (
                self.resampled.take(part).derive(_MEASURED[measure]) for part in (_SUMS, _REST_SUMS)
            )
            pair = of_group.beside(of_rest)
        pair = replace(pair, independent=min(own, rest))
        return Gap(self.by, self.members.name, measure, pair, (own, rest))

    def summarise(
        self, few: Mapping[int, str | None], pairs: Mapping[Measure, Gap | str]
    ) -> Subgroup:
        """All numbers of the group."""
        own, either = self.members.rows, few[1] or few[0]
        mixed = _SHARED.get(self.by) or either or self._uncalibrated
        return Subgroup(
            by=self.by,
            name=self.members.name,
            n=int(own.sum()),
            positives=int(self.rows.target[own].sum()),
            patients=self.rows.count_patients(own),
            auroc=self._estimate(either, lambda s: s[_AUROC][None]),
            average_precision=self._estimate(either, lambda s: s[_PRECISION][None]),
            rates={key: self._estimate_rate(key, few) for key in metrics.RATES},
            brier=self._estimate(mixed, _brier),
            in_the_large=self._estimate(mixed, lambda s: _MEASURED["in_the_large"](s[_SUMS])),
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
        found = self._estimate(reason, lambda s: rate(*s[_SUMS][:4])[None], metrics.UNDEFINED[key])
        if key not in metrics.DENOMINATORS or found.value is None:
            return found
        is_counted = np.isin(code_outcomes(self.rows, self.threshold), metrics.DENOMINATORS[key])
        patients = self.rows.count_patients(is_counted & self.members.rows)
        return bootstrap.with_wilson(found, patients)

    def _estimate(
        self,
        reason: str | None,
        function: Callable[[Floats], Floats],
        undefined: str = "undefined for these studies",
    ) -> Estimate:
        if self.resampled is None or reason:
            return Estimate.undefined(self.fault or reason or undefined)
        return self.resampled.derive(function).estimate(reason=undefined)


def _brier(table: Floats) -> Floats:
    sums = table[_SUMS]
    return divide(sums[5], sums[:4].sum(axis=0))[None]
