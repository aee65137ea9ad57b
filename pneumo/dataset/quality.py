"""Data quality of a store: counts by split, and properties in which val or test differ from train.

Unknown values are counted as 'unknown', never left out. Nothing here identifies a patient.
"""

import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from scipy.special import stdtrit

from pneumo.dataset.manifest import Duplicates, Manifest
from pneumo.dataset.source import Finding
from pneumo.dataset.splits import SPLITS, Moments, measure
from pneumo.dataset.study_table import StudyRow, StudyWarning
from pneumo.errors import DataError

UNKNOWN = "unknown"


AGE_BANDS: Mapping[str, int] = {
    "under 18": 0,
    "18–39": 18,
    "40–59": 40,
    "60–79": 60,
    "80 and over": 80,
}
"""Name -> first year of the band."""


AGE_BIN_YEARS = 10
NOTABLE_DIFFERENCE = 0.1
"""Standardised differences above it are reported (Austin 2009, doi:10.1002/sim.3697)."""
_OLDEST = 120
_FEW_SPACINGS = 8


@dataclass(frozen=True)
class Intensity:
    """Gray levels of a split's stored images; the statistics are None for an empty split."""

    histogram: tuple[int, ...]
    """Number of pixels of each gray level, 0 to 255; letterbox borders are black pixels."""

    @property
    def mean(self) -> float | None:
        """In [0, 1]."""
        levels = sum(level * pixels for level, pixels in enumerate(self.histogram))
        return levels / 255 / sum(self.histogram) if sum(self.histogram) else None

    @property
    def black(self) -> float | None:
        """Fraction of pixels that are 0."""
        return self._fraction(0)

    @property
    def white(self) -> float | None:
        """Fraction of pixels that are 255."""
        return self._fraction(-1)

    def _fraction(self, level: int) -> float | None:
        total = sum(self.histogram)
        return self.histogram[level] / total if total else None


@dataclass(frozen=True)
class SplitQuality:
    """Counts of one split."""

    studies: int
    patients: int
    counts: Mapping[str, Mapping[str, int]]
    """'label', 'finding', 'view', 'sex', 'age', 'spacing' -> value -> studies. Every split has the
    same values in the same order, 'unknown' last; each sums to `studies`."""
    ages: tuple[int, ...]
    """Number of studies of known age in bins of AGE_BIN_YEARS, from 0."""
    age_median: float | None
    """Years; of studies of known age."""
    spacing_quartiles: tuple[float, float, float] | None
    """mm; of studies of known spacing."""
    intensity: Intensity

    @property
    def positives(self) -> int:
        """Studies with target 1."""
        return self.counts["label"]["positive"]


@dataclass(frozen=True)
class Shift:
    """A property in which a split differs from train."""

    what: str
    """`AP among known views`."""
    unit: Literal["%", "years", "mm"]
    split: str
    in_train: float
    """Mean in train: a fraction where `unit` is %, else in `unit`."""
    in_split: float
    """Mean in the split, likewise."""
    difference: float
    """(in_split - in_train) / pooled standard deviation; infinite where neither varies."""
    by_chance: float
    """95 % limit of the largest |difference| over all properties and splits, for random splits with
    the same number of patients."""

    @property
    def is_by_chance(self) -> bool:
        """Whether random splits with the same number of patients differ as much."""
        return abs(self.difference) <= self.by_chance

    def __str__(self) -> str:
        """`Mean age: 46.9 years in train, 50.2 years in test (standardised difference +0.20,
        chance explains ±0.15)`."""
        shown = "no spread at all" if math.isinf(self.difference) else f"{self.difference:+.2f}"
        return (
            f"{self.what}: {self._show(self.in_train)} in train, {self._show(self.in_split)} in "
            f"{self.split} (standardised difference {shown}, chance explains ±{self.by_chance:.2f})"
        )

    def _show(self, value: float) -> str:
        digits = 3 if self.unit == "mm" else 1
        scale = 100 if self.unit == "%" else 1
        return f"{scale * value:.{digits}f}\N{NO-BREAK SPACE}{self.unit}"


@dataclass(frozen=True)
class Quality:
    """Data quality of a store."""

    splits: Mapping[str, SplitQuality]
    shifts: tuple[Shift, ...]
    """Notable differences of val and test from train, the largest first."""
    duplicates: Duplicates
    quarantined: Mapping[str, int]
    """Studies that could not be used, by reason."""
    contradictions: Mapping[str, int]
    """Studies whose tables and header disagree, by kind."""
    warnings: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Code of the repair or doubt -> split -> keys of the studies."""

    def rows(self) -> list[tuple[str, str, int, int, int]]:
        """(property, value, studies of train, of val, of test) of every count."""
        train, val, test = (self.splits[name] for name in SPLITS)
        return [
            (what, value, number, val.counts[what][value], test.counts[what][value])
            for what, numbers in train.counts.items()
            for value, number in numbers.items()
        ]


def summarise_quality(
    studies: Iterable[StudyRow], manifest: Manifest, warned: Iterable[StudyWarning] = ()
) -> Quality:
    """The data quality of a store with these rows and warnings.

    Raises DataError when the number of studies is not that of the manifest.
    """
    rows = list(studies)
    by_split = {name: [row for row in rows if row.split == name] for name in SPLITS}
    for name, members in by_split.items():
        if len(members) != manifest.splits[name].samples:
            raise DataError(
                f"studies.parquet: {len(members)} studies of {name}, the manifest says "
                f"{manifest.splits[name].samples}; delete the store and prepare it again"
            )
    are_listed = len({row.spacing_mm for row in rows} - {None}) <= _FEW_SPACINGS
    described = {
        name: [_describe(row, are_listed) for row in members] for name, members in by_split.items()
    }
    values = {
        what: order_values({one[what] for part in described.values() for one in part}, expected)
        for what, expected in _EXPECTED.items()
    }
    return Quality(
        splits={
            name: _summarise_split(
                members, described[name], values, Intensity(manifest.splits[name].histogram)
            )
            for name, members in by_split.items()
        },
        shifts=find_shifts(by_split),
        duplicates=manifest.duplicates,
        quarantined=manifest.quarantined,
        contradictions=manifest.contradictions,
        warnings=group_warnings(warned),
    )


def group_warnings(warned: Iterable[StudyWarning]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Code -> split -> keys; every code has all splits."""
    rows = sorted(warned, key=lambda item: (item.code, item.key))
    return {
        code: {
            split: tuple(row.key for row in rows if (row.code, row.split) == (code, split))
            for split in SPLITS
        }
        for code in dict.fromkeys(row.code for row in rows)
    }


def name_age_band(age: int | None) -> str:
    """The name of the band of AGE_BANDS for `age` in years."""
    if age is None:
        return UNKNOWN
    return list(AGE_BANDS)[bisect_right(list(AGE_BANDS.values()), age) - 1]


_EXPECTED: Mapping[str, Sequence[str]] = {
    "label": ("positive", "negative"),
    "finding": get_args(Finding),
    "view": ("AP", "PA", UNKNOWN),
    "sex": ("F", "M", UNKNOWN),
    "age": (*AGE_BANDS, UNKNOWN),
    "spacing": (UNKNOWN,),
}
"""The counted properties, and the values to list even where no study has them."""


def _describe(row: StudyRow, is_spacing_listed: bool) -> dict[str, str]:
    """The study's value of each property of _EXPECTED."""
    spacing = "known"
    if row.spacing_mm is None:
        spacing = UNKNOWN
    elif is_spacing_listed:
        spacing = f"{row.spacing_mm:.3f} mm"
    return {
        "label": "positive" if row.target else "negative",
        "finding": row.finding or UNKNOWN,
        "view": row.view or UNKNOWN,
        "sex": row.sex or UNKNOWN,
        "age": name_age_band(row.age),
        "spacing": spacing,
    }


def order_values(found: set[str], expected: Sequence[str]) -> list[str]:
    """The expected values in their order, then the other ones found, 'unknown' last."""
    known = [*expected, *sorted(found - {*expected})]
    return sorted(known, key=lambda value: value == UNKNOWN)


def _summarise_split(
    rows: Sequence[StudyRow],
    described: Sequence[Mapping[str, str]],
    values: Mapping[str, Sequence[str]],
    intensity: Intensity,
) -> SplitQuality:
    counts = {what: Counter(one[what] for one in described) for what in values}
    ages = [row.age for row in rows if row.age is not None]
    bins = Counter(age // AGE_BIN_YEARS for age in ages)
    spacings = [row.spacing_mm for row in rows if row.spacing_mm is not None]
    quartiles = np.quantile(spacings, [0.25, 0.5, 0.75]).tolist() if spacings else None
    return SplitQuality(
        studies=len(rows),
        patients=len({row.patient for row in rows}),
        counts={
            what: {value: counts[what][value] for value in order} for what, order in values.items()
        },
        ages=tuple(bins[i] for i in range(max([*bins, _OLDEST // AGE_BIN_YEARS]) + 1)),
        age_median=statistics.median(ages) if ages else None,
        spacing_quartiles=None if quartiles is None else tuple(quartiles),
        intensity=intensity,
    )


_COMPARED: Sequence[tuple[str, Literal["%", "years", "mm"], Callable[[StudyRow], float | None]]] = (
    ("Positive studies", "%", lambda row: row.target),
    ("Studies without any finding", "%", lambda row: row.finding == "Normal"),
    ("AP among known views", "%", lambda row: None if row.view is None else row.view == "AP"),
    ("Unknown views", "%", lambda row: row.view is None),
    ("Women among known sexes", "%", lambda row: None if row.sex is None else row.sex == "F"),
    ("Unknown sexes", "%", lambda row: row.sex is None),
    ("Mean age", "years", lambda row: row.age),
    ("Unknown ages", "%", lambda row: row.age is None),
    ("Mean pixel spacing", "mm", lambda row: row.spacing_mm),
    ("Unknown spacings", "%", lambda row: row.spacing_mm is None),
)
"""Name of a property, its unit, and its value for a study; None leaves the study out."""


def find_shifts(
    by_split: Mapping[str, Sequence[StudyRow]], notable: float = NOTABLE_DIFFERENCE
) -> tuple[Shift, ...]:
    """Properties in which val or test differ from train by more than `notable`, largest first."""
    compared = [
        (what, unit, split, train, other)
        for what, unit, value in _COMPARED
        for train in (_measure(by_split["train"], value),)
        for split in ("val", "test")
        for other in (_measure(by_split[split], value),)
        if train is not None and other is not None
    ]
    shifts = []
    for what, unit, split, train, other in compared:
        difference = standardise_difference(train.mean, other.mean, train.variance, other.variance)
        if abs(difference) > notable:
            # Bonferroni for the number of comparisons; Student's t, as a split may be small.
            degrees_of_freedom = max(1.0, min(train.effective, other.effective) - 1)
            t = float(stdtrit(degrees_of_freedom, 1 - 0.025 / len(compared)))
            by_chance = t * math.sqrt(1 / train.effective + 1 / other.effective)
            shifts.append(Shift(what, unit, split, train.mean, other.mean, difference, by_chance))
    return tuple(sorted(shifts, key=lambda shift: -abs(shift.difference)))


def standardise_difference(
    first: float, second: float, first_variance: float, second_variance: float
) -> float:
    """(second - first) / square root of the mean variance; infinite where they differ and neither
    varies."""
    if math.isclose(first, second):
        return 0.0
    spread = math.sqrt((first_variance + second_variance) / 2)
    return (second - first) / spread if spread else math.copysign(math.inf, second - first)


def _measure(rows: Sequence[StudyRow], value: Callable[[StudyRow], float | None]) -> Moments | None:
    """The moments over the studies where the value is known."""
    known = [(row.patient, float(found)) for row in rows if (found := value(row)) is not None]
    return measure(known) if known else None
