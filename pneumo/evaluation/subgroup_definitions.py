"""Which studies are in which subgroup, and which studies each subgroup is compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import AGE_BANDS, UNKNOWN, name_age_band
from pneumo.evaluation.operating_points import find_too_few
from pneumo.evaluation.predictions import Predictions, name_each

By = Literal["sex", "age", "view", "sex_age", "view_sex", "negatives", "box_area"]
"""What the studies are divided by."""
Mask = npt.NDArray[np.bool_]

CROSSED: Mapping[By, tuple[By, By]] = {"sex_age": ("sex", "age"), "view_sex": ("view", "sex")}
NEGATIVES = ("Normal", "No Lung Opacity / Not Normal")
TERTILES = ("smallest", "middle", "largest")
SHARED: Mapping[str, str] = {
    "negatives": "the positives are those of the whole split",
    "box_area": "the negatives are those of the whole split",
}
"""Subgroups that divide one class only. Each of them has all studies of the other class."""


@dataclass(frozen=True, eq=False)
class SubgroupMembers:
    """The studies of a subgroup and those that it is compared with; masks (N,)."""

    by: By
    name: str
    own: Mask
    rest: Mask


def divide_studies(rows: Predictions, min_patients: int) -> list[SubgroupMembers]:
    """Every subgroup of `rows`, empty ones included; unknown values make a subgroup of their own.

    A subgroup of two properties needs `min_patients` patients of either class.
    """
    positive = rows.target == 1
    ages = name_each(rows.age, lambda age: name_age_band(None if math.isnan(age) else int(age)))
    found = [
        *_divide_by("sex", rows.sex, ("F", "M")),
        *_divide_by("age", ages, tuple(AGE_BANDS)),
        *_divide_by("view", rows.view, ("AP", "PA")),
    ]
    found += [crossed for by in CROSSED for crossed in _cross(found, by, rows, min_patients)]
    negatives = [positive | (rows.finding == name) for name in NEGATIVES]
    tertile = np.searchsorted(cut_tertiles(rows) or (0, 0), rows.box_area_fraction)
    boxed = ~np.isnan(rows.box_area_fraction)
    tertiles = [~positive | (boxed & (tertile == number)) for number in range(len(TERTILES))]
    return [
        *found,
        *_with_rest("negatives", NEGATIVES, negatives),
        *_with_rest("box_area", TERTILES, tertiles),
    ]


def _cross(
    groups: Sequence[SubgroupMembers], by: By, rows: Predictions, min_patients: int
) -> list[SubgroupMembers]:
    first, second = (
        [group for group in groups if group.by == one and group.name != UNKNOWN]
        for one in CROSSED[by]
    )
    crossed = [
        SubgroupMembers(by, f"{one.name}, {two.name}", both, ~both)
        for one, two in product(first, second)
        for both in (one.own & two.own,)
    ]
    return [
        group
        for group in crossed
        if not any(find_too_few(rows, value, min_patients, group.own) for value in (1, 0))
    ]


def _divide_by(by: By, column: npt.NDArray[np.str_], names: Sequence[str]) -> list[SubgroupMembers]:
    masks = {name: column == name for name in names}
    unknown = ~np.isin(column, names)
    if unknown.any():
        masks[UNKNOWN] = unknown
    return _with_rest(by, tuple(masks), list(masks.values()))


def _with_rest(by: By, names: Sequence[str], masks: Sequence[Mask]) -> list[SubgroupMembers]:
    return [
        SubgroupMembers(
            by, name, own, np.any([other for other in masks if other is not own], axis=0)
        )
        for name, own in zip(names, masks, strict=True)
    ]


def cut_tertiles(rows: Predictions) -> tuple[float, float] | None:
    """Box areas between the tertiles of the positives with a box; None without any."""
    areas = rows.box_area_fraction[(rows.target == 1) & ~np.isnan(rows.box_area_fraction)]
    if len(areas) == 0:
        return None
    low, high = np.quantile(areas, [1 / 3, 2 / 3])
    return float(low), float(high)
