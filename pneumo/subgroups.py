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

from pneumo import metrics
from pneumo.metrics import Estimate, Floats, Part, Resampled, Statistic, divide, within
from pneumo.predict import Predictions
from pneumo.quality import AGE_BANDS, UNKNOWN, name_age_band

By = Literal["sex", "age", "view", "negatives", "box_area"]
Bools = npt.NDArray[np.bool_]

COMPARED: tuple[By, ...] = ("sex", "age", "view")
"""The worst group is looked for among these. The others part the studies by what the readers said:
that subtle findings are harder is no news of a patient."""
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


@dataclass(frozen=True, eq=False)
class Members:
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
    sensitivity: Estimate
    """At the decision point, as `specificity`."""
    specificity: Estimate
    in_the_large: Estimate
    """Mean calibrated probability - share of positives."""
    gap: Estimate
    """AUROC - AUROC of the studies in the other groups."""

    def to_json(self) -> dict[str, Any]:
        """Names, counts and estimates."""
        names = ("auroc", "average_precision", "sensitivity", "specificity", "in_the_large", "gap")
        return {
            "by": self.by,
            "name": self.name,
            "n": self.n,
            "positives": self.positives,
            "patients": self.patients,
            **{name: getattr(self, name).to_json() for name in names},
        }


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
        return {
            "by": self.by,
            "name": self.name,
            "gap": self.gap.to_json(),
            "shown": self.is_shown,
            "compared": self.compared,
            "rule": WORST_RULE,
        }


@dataclass(frozen=True)
class Subgroups:
    """All groups of a split, and the worst."""

    groups: tuple[Subgroup, ...]
    worst: Worst
    box_area_cuts: tuple[float, float] | None
    """Between the tertiles: shares of the image; None without boxes."""

    def to_json(self) -> dict[str, Any]:
        """The groups as a list, the worst, and where the tertiles were cut."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "worst": self.worst.to_json(),
            "box_area_cuts": None if self.box_area_cuts is None else list(self.box_area_cuts),
            "multiplicity": "each interval is by itself; only worst.gap allows for their number",
        }


# --- who is where ---------------------------------------------------------------------------------


def divide_studies(rows: Predictions) -> list[Members]:
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
    found += _beside("negatives", positive, findings, NEGATIVES)
    found += _beside("box_area", ~positive, areas, TERTILES)
    return found


def _beside(
    by: By, shared: Bools, column: npt.NDArray[np.str_], names: Sequence[str]
) -> list[Members]:
    """Groups that each hold the `shared` studies too."""
    return _with_rest(by, names, [shared | (column == name) for name in names])


def _by_name(by: By, column: npt.NDArray[np.str_], names: Sequence[str]) -> list[Members]:
    known = {name: column == name for name in names}
    unknown = ~np.isin(column, names)
    if unknown.any():
        known[UNKNOWN] = unknown
    return _with_rest(by, tuple(known), list(known.values()))


def _with_rest(by: By, names: Sequence[str], masks: Sequence[Bools]) -> list[Members]:
    return [
        Members(by, name, mask, np.any([other for other in masks if other is not mask], axis=0))
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


def subgroup_parts(
    rows: Predictions, threshold: float | None
) -> dict[str, Callable[[], Mapping[str, Statistic]]]:
    """What `judge_subgroups` needs to have resampled, by part."""
    parts: dict[str, Callable[[], Mapping[str, Statistic]]] = {}
    for members in divide_studies(rows):
        parts[_name(members, "rank")] = partial(_rank, rows, members)
        parts[_name(members, "sums")] = partial(_sums, rows, members, threshold)
    return parts


def _name(members: Members, part: str) -> str:
    return f"subgroup/{members.by}/{members.name}/{part}"


def _rank(rows: Predictions, members: Members) -> dict[str, Statistic]:
    group, rest = np.flatnonzero(members.rows), np.flatnonzero(members.rest)
    target, logit = rows.target, rows.logit
    precision = metrics.average_precision_statistic(target[group], logit[group])
    aurocs = [within(group, metrics.auroc_statistic(target[group], logit[group]))]
    if 0 < target[rest].sum() < len(rest):
        aurocs.append(within(rest, metrics.auroc_statistic(target[rest], logit[rest])))
    return {"aurocs": metrics.stack(*aurocs), "average_precision": within(group, precision)}


def _sums(rows: Predictions, members: Members, threshold: float | None) -> dict[str, Statistic]:
    """Positives found, positives, negatives cleared, negatives, sum of probabilities: (5, R)."""
    positive, probability = metrics.check_scores(rows.target, rows.probability, both_classes=False)
    called = probability >= (math.inf if threshold is None else threshold)
    values = (positive & called, positive, ~positive & ~called, ~positive)
    code = np.where(members.rows, 0, -1)
    sums = metrics.sums_statistic(code, 1, *values, np.nan_to_num(rows.calibrated_probability))
    return {"sums": sums}


def judge_subgroups(
    rows: Predictions, threshold: float | None, found: Mapping[str, Part], min_patients: int
) -> Subgroups:
    """Every group of `rows`; null with a reason where it has fewer than `min_patients` patients of
    a class that a number counts."""
    groups, gaps = [], {}
    for members in divide_studies(rows):
        rank, sums = found[_name(members, "rank")], found[_name(members, "sums")]
        group = _judge_group(rows, members, threshold, rank, sums, min_patients)
        groups.append(group)
        if members.by in COMPARED and members.name != UNKNOWN and group.gap.low is not None:
            gap = rank.resampled["aurocs"].derive(metrics.first_less_second)
            gaps[(members.by, members.name)] = gap
    return Subgroups(tuple(groups), find_worst(gaps), cut_tertiles(rows))


def _judge_group(
    rows: Predictions,
    members: Members,
    threshold: float | None,
    rank: Part,
    sums: Part,
    min_patients: int,
) -> Subgroup:
    target, patient = rows.target[members.rows], rows.patient[members.rows]
    few_positive = _too_few(target, patient, 1, min_patients)
    few_negative = _too_few(target, patient, 0, min_patients)
    if members.by == "box_area" and cut_tertiles(rows) is None:
        few_positive = "no positive has a box"
    few = few_positive or few_negative
    no_point = "no threshold was chosen on val" if threshold is None else None
    shared = _SHARED.get(members.by)
    uncalibrated = "no calibration" if np.isnan(rows.calibrated_probability).any() else None

    return Subgroup(
        by=members.by,
        name=members.name,
        n=len(target),
        positives=int(target.sum()),
        patients=len(np.unique(patient)),
        auroc=Estimate.undefined(few) if few else rank.estimate("aurocs"),
        average_precision=Estimate.undefined(few) if few else rank.estimate("average_precision"),
        sensitivity=_rate(
            sums,
            (shared if members.by == "negatives" else None) or few_positive or no_point,
            lambda s: divide(s[0], s[1])[None],
            patient[target == 1],
        ),
        specificity=_rate(
            sums,
            (shared if members.by == "box_area" else None) or few_negative or no_point,
            lambda s: divide(s[2], s[3])[None],
            patient[target == 0],
        ),
        in_the_large=_sum_estimate(
            sums,
            shared or few or uncalibrated,
            lambda s: divide(s[4] - s[1], s[1] + s[3])[None],
        ),
        gap=_gap(rank, few or _few_in_rest(rows, members, min_patients)),
    )


def _sum_estimate(sums: Part, reason: str | None, function: Callable[[Floats], Floats]) -> Estimate:
    reason = sums.reason or reason
    if reason is not None:
        return Estimate.undefined(reason)
    return sums.resampled["sums"].derive(function).estimate()


def _rate(
    sums: Part,
    reason: str | None,
    function: Callable[[Floats], Floats],
    patient: npt.NDArray[Any],
) -> Estimate:
    """A proportion of the studies of `patient`; of exactly 0 or 1 with Wilson's interval."""
    found = _sum_estimate(sums, reason, function)
    if found.value in (0.0, 1.0):
        interval = metrics.wilson(found.value, len(np.unique(patient)))
        return Estimate(found.value, *interval, metrics.WILSON_OVER_PATIENTS)
    return found


def _gap(rank: Part, few: str | None) -> Estimate:
    if few is not None:
        return Estimate.undefined(few)
    if rank.reason is None and len(rank.resampled["aurocs"].value) < 2:
        return Estimate.undefined("nothing to compare with")
    return rank.difference("aurocs")


def _few_in_rest(rows: Predictions, members: Members, min_patients: int) -> str | None:
    target, patient = rows.target[members.rest], rows.patient[members.rest]
    found = [_too_few(target, patient, value, min_patients) for value in (1, 0)]
    reasons = [f"the rest is {reason}" for reason in found if reason is not None]
    return reasons[0] if reasons else None


def _too_few(
    target: npt.NDArray[Any], patient: npt.NDArray[Any], value: int, min_patients: int
) -> str | None:
    found = len(np.unique(patient[target == value]))
    if found >= min_patients:
        return None
    word = "positive" if value else "negative"
    return f"too small: {found} patients with a {word} study, {min_patients} are needed"


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
