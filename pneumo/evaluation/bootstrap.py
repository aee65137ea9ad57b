"""Intervals by resampling patients.

Images of one patient resemble each other, so intervals resample patients, never images. A metric is
therefore written once, as a `Statistic` of sample weights: weights of 1 give the value, the number
of times that each patient was drawn gives one resample, and weights of 0 for some patients what the
others alone give. Intervals are bias-corrected and accelerated (Efron 1987), as most statistics
here are skewed. Percentiles of few patients' resamples are too narrow, so they are taken farther
out, as a t distribution's are (Hesterberg 2015, section 5.1). `make bench-verdicts` shows what they
cover.

Resamples are computed in blocks, which bounds the memory, and which `Share` may spread over other
processes: the draws of each block are settled beforehand, so the result is the same, to rounding,
wherever it is computed.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named
from scipy.special import ndtr, ndtri, stdtrit

from pneumo.errors import MetricError

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.floating[Any] | np.integer[Any]]
"""(N, R), one column a resample; fastest where a column is contiguous."""
Statistic = Callable[[Weights], Floats]
"""Weights (N, R) to values (R,) or (K, R); NaN where undefined."""
Statistics = Mapping[str, Callable[[], Mapping[str, Statistic]]]
"""By the name of a set: what builds its statistics, or raises MetricError where there are none."""

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point: every interval here is a 95 % interval."""
MAX_UNDEFINED_FRACTION = 0.05
"""More undefined resamples than this, and what is left no longer stands for the data."""
MIN_INDEPENDENT = 5
"""Patients below which an interval would say nothing."""
_MAX_GROUPS = 200
"""Of patients, for the acceleration: a skewness, which needs no more."""
_BLOCK_WEIGHTS, _CACHED_WEIGHTS = 4_000_000, 500_000
"""Computed at once: 16 MB, so that the memory stays flat, and 2 MB where the cache matters."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where there is none, and `reason` says why."""

    value: float | None
    low: float | None
    high: float | None
    method: str
    """How the interval was made."""
    reason: str | None = None

    @classmethod
    def undefined(cls, reason: str, method: str = "none") -> Self:
        """Neither value nor interval."""
        return cls(None, None, None, method, reason)

    def to_json(self) -> dict[str, Any]:
        """The object of metrics.json: value, low, high, method, and a reason where one is due."""
        return {name: one for name, one in vars(self).items() if name != "reason" or one}


def as_json(value: Any, *, leave_out: Collection[str] = ()) -> Any:
    """A result as metrics.json holds it: by its own `to_json`, else by the names of its fields.

    `leave_out` names fields that the caller puts elsewhere.
    """
    if hasattr(value, "to_json") and not leave_out:
        return value.to_json()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items() if key not in leave_out}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value


WILSON = "Wilson, images taken as independent"
WILSON_OVER_PATIENTS = "Wilson over patients"
"""The method of a proportion of exactly 0 or 1, which never varies under resampling."""


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of the proportion `value` of `n` independent trials, n > 0."""
    interval = scipy.stats.binomtest(round(value * n), n).proportion_ci(0.95, method="wilson")
    # Rounding must not push an end past the value.
    return min(value, float(interval.low)), max(value, float(interval.high))


def with_wilson(rate: Estimate, num_patients: int) -> Estimate:
    """`rate`; where it is exactly 0 or 1, and so never varies under resampling, with Wilson's
    interval over the patients in its denominator."""
    if rate.value is None or 0 < rate.value < 1:
        return rate
    return Estimate(rate.value, *wilson(rate.value, num_patients), WILSON_OVER_PATIENTS)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Statistics of one kind: their values (K,), and what they were in each resample (K, R)."""

    value: Floats
    drawn: Floats
    independent: int
    """Patients that the values rest on: those of the rarer class where both count."""
    jackknife: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """(K, J): without one of J groups of patients each."""

    def derive(self, function: Callable[[Floats], Floats]) -> Self:
        """A function (K, R) -> (J, R) of these statistics, as statistics of their own."""
        return replace(
            self,
            value=function(self.value[:, None])[:, 0],
            drawn=function(self.drawn),
            jackknife=function(self.jackknife) if self.jackknife.size else self.jackknife,
        )

    def beside(self, other: Self) -> Self:
        """Both one after the other."""
        value, drawn, jackknife = (
            np.concatenate([getattr(one, part) for one in (self, other)])
            for part in ("value", "drawn", "jackknife")
        )
        return replace(self, value=value, drawn=drawn, jackknife=jackknife)

    def take(self, rows: slice) -> Self:
        """Some of them."""
        value, drawn = self.value[rows], self.drawn[rows]
        return replace(self, value=value, drawn=drawn, jackknife=self.jackknife[rows])

    def estimate(self, row: int = 0, reason: str = "undefined for these studies") -> Estimate:
        """One of them with its 95 % interval, or `reason` where it has no value."""
        left_out = self.jackknife[row] if self.jackknife.size else np.empty(0)
        value, drawn = float(self.value[row]), self.drawn[row]
        return _find_interval(value, drawn, left_out, self.independent, reason)


def first_less_second(pair: Floats) -> Floats:
    """(2, R) to (1, R)."""
    return pair[:1] - pair[1:]


@dataclass(frozen=True)
class Block:
    """Columns of weights that are computed together."""

    size: int
    first: int = 0
    """Of the columns without one group of patients each; column 0 leaves nobody out."""
    generator: Any = None
    """The bit generator's state before the block's first draw; None where patients are left out."""

    def count(self, num_patients: int) -> npt.NDArray[np.int32]:
        """How often each patient is drawn: (size, P)."""
        if self.generator is None:
            group = np.arange(num_patients) % min(num_patients, _MAX_GROUPS)
            left_out = np.arange(self.first, self.first + self.size)[:, None] - 1
            everybody_else: npt.NDArray[np.int32] = (group != left_out).astype(np.int32)
            return everybody_else
        bits = np.random.PCG64()
        bits.state = self.generator
        rng = np.random.Generator(bits)
        counts = np.empty((self.size, num_patients), dtype=np.int32)
        for row in counts:
            row[:] = np.bincount(_draw(rng, num_patients), minlength=num_patients)
        return counts


Columns = Mapping[str, Floats]
"""By statistic, its values (K, size) in a block."""
Share = Callable[[Callable[[Block], Columns], Iterable[Block]], Iterable[Columns]]
"""What computes a function of many blocks, in whatever process; the results in their order."""
in_turn: Share = map
"""One block after the other, in this process."""


def resample(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
    independent: Mapping[str, int] | None = None,
    share: Share = in_turn,
) -> dict[str, Resampled]:
    """Each statistic on all studies and on `resamples` draws of the patients, with replacement.

    `patient` (N,) names the patient of each sample; `independent`, by statistic, the patients that
    it rests on, where those are not all. All statistics see the same resamples, so a
    difference of two is a statistic like any other. The result does not depend on the order of the
    samples, nor on `share`. (Field & Welsh 2007: bootstrapping clustered data.)
    """
    name, index = np.unique(patient, return_inverse=True)
    if len(index) == 0:
        return {
            key: Resampled(np.full(1, np.nan), np.full((1, 1), np.nan), 0) for key in statistics
        }
    few = independent or {}
    blocks = _cut_blocks(len(name), max(1, _BLOCK_WEIGHTS // len(index)), resamples, seed)
    parts = list(share(partial(_compute, index, statistics), blocks))
    first = 1 + min(len(name), _MAX_GROUPS)  # of the resamples' columns
    return {
        key: Resampled(
            columns[:, 0], columns[:, first:], few.get(key, len(name)), columns[:, 1:first]
        )
        for key in statistics
        for columns in (np.concatenate([part[key] for part in parts], axis=1),)
    }


def _compute(
    index: npt.NDArray[np.intp], statistics: Mapping[str, Statistic], block: Block
) -> Columns:
    """The statistics in one block; `index` (N,) numbers the patient of each sample."""
    weights = np.take(block.count(int(index.max()) + 1), index, axis=1).T
    return {key: np.atleast_2d(statistic(weights)) for key, statistic in statistics.items()}


def _cut_blocks(num_patients: int, size: int, resamples: int, seed: int) -> Iterator[Block]:
    """Everybody once and everybody but one of the groups, then the draws."""
    left_out = 1 + min(num_patients, _MAX_GROUPS)
    for first in range(0, left_out, size):
        yield Block(min(size, left_out - first), first)
    rng = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, resamples, size):
        block = Block(min(size, resamples - start), generator=rng.bit_generator.state)
        yield block
        for _ in range(block.size):
            _draw(rng, num_patients)


def _draw(rng: np.random.Generator, num_patients: int) -> npt.NDArray[np.int64]:
    return rng.integers(num_patients, size=num_patients)


@dataclass(frozen=True, eq=False)
class StatisticSet:
    """Some statistics after resampling, or the reason why there are none."""

    resampled: Mapping[str, Resampled]
    reason: str | None = None

    def estimate(self, key: str, row: int = 0, reason: str = "undefined here") -> Estimate:
        """The estimate of one statistic; undefined where the set is."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].estimate(row, reason)

    def difference(self, key: str) -> Estimate:
        """The estimate of the first of two stacked statistics less the second."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].derive(first_less_second).estimate()


def resample_sets(
    patient: npt.NDArray[Any],
    sets: Statistics,
    *,
    resamples: int,
    seed: int,
    independent: Mapping[str, int] | None = None,
    share: Share = in_turn,
) -> dict[str, StatisticSet]:
    """`resample` of the statistics of all sets in one pass; `independent` is by set."""
    statistics: dict[str, Mapping[str, Statistic]] = {}
    reasons: dict[str, str] = {}
    for name, build in sets.items():
        try:
            statistics[name] = build()
        except MetricError as error:
            reasons[name] = str(error)
    flat = {f"{name}/{key}": one for name, some in statistics.items() for key, one in some.items()}
    of_set = independent or {}
    few = {key: of_set[name] for key in flat if (name := key.rsplit("/", 1)[0]) in of_set}
    found = resample(patient, flat, resamples=resamples, seed=seed, independent=few, share=share)
    return {
        name: StatisticSet({}, reasons[name])
        if name in reasons
        else StatisticSet({key: found[f"{name}/{key}"] for key in statistics[name]})
        for name in sets
    }


def patient_bootstrap(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Each statistic (R,) with its 95 % interval over resamples of the patients.

    An interval is null, with a reason, where more than 5 % of the resamples leave the statistic
    undefined (too few patients of a class) or where it never varies.
    """
    found = resample(patient, statistics, resamples=resamples, seed=seed)
    return {key: one.estimate() for key, one in found.items()}


def stack(*statistics: Statistic) -> Statistic:
    """Several statistics (R,) as one (K, R)."""
    return lambda weights: np.stack([statistic(weights) for statistic in statistics])


def few_at_once(statistic: Statistic) -> Statistic:
    """The same, of so few resamples at a time that the processor's cache holds their weights."""

    def in_pieces(weights: Weights) -> Floats:
        size = max(1, _CACHED_WEIGHTS // len(weights))
        starts = range(0, weights.shape[1], size)
        return np.concatenate([statistic(weights[:, i : i + size]) for i in starts], axis=1)

    return in_pieces


def sums_statistic(
    code: npt.NDArray[np.integer[Any]], num_codes: int, *values: npt.NDArray[Any] | None
) -> Statistic:
    """Weighted sums by group: (N, R) to (len(values) * num_codes, R), the first value's sums first.

    `code` (N,) names the group of each sample, 0 to num_codes - 1, or -1 for none; each of `values`
    is (N,), or None for the weights themselves. The cost does not grow with the number of groups.
    """
    order = np.argsort(code, kind="stable")[np.count_nonzero(code < 0) :]
    present, starts = np.unique(code[order], return_index=True)
    columns = [None if one is None else one.astype(np.float64)[order] for one in values]
    rows = as_slice(order)

    def statistic(weights: Weights) -> Floats:
        drawn = take(weights, rows).astype(np.float64)
        sums = np.zeros((len(columns), num_codes, len(drawn)))
        for row, column in zip(sums, columns, strict=True):
            if len(order):
                weighed = drawn if column is None else drawn * column
                row[present] = np.add.reduceat(weighed, starts, axis=1).T
        return sums.reshape(-1, len(drawn))

    return statistic


def as_slice(rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp] | slice:
    """The same rows, as a slice where they follow each other: nothing is copied then."""
    follow = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if follow else rows


def take(weights: Weights, rows: npt.NDArray[np.intp] | slice) -> Weights:
    """Some samples' weights, each resample's contiguous: (N, R) to (R, len(rows))."""
    if isinstance(rows, slice):
        return weights.T[:, rows]
    return np.take(weights.T, rows, axis=1, mode="clip")  # "raise" is slower


def t_quantile(num_patients: int) -> float:
    """The 97.5 % point of Student's t of so many patients, 2 or more."""
    return float(stdtrit(num_patients - 1, 0.975))


def _find_tails(value: float, drawn: Floats, left_out: Floats, z: float) -> tuple[float, float]:
    """Which quantiles of `drawn` (R,) are the ends of an interval that reaches `z` standard normal
    deviations: BCa (Efron 1987); plain percentiles where resamples lie on one side of the value."""
    # Of equal draws a last bit of rounding would decide otherwise, by the processor.
    equal = np.isclose(drawn, value, rtol=1e-12, atol=0.0)
    bias = float(ndtri(np.mean((drawn < value) & ~equal) + np.mean(equal) / 2))
    known = left_out[np.isfinite(left_out)]
    excess = known.mean() - known if len(known) else known
    spread = float((excess**2).sum()) ** 1.5
    acceleration = float((excess**3).sum()) / (6 * spread) if spread else 0.0
    reach = np.array([bias - z, bias + z])
    shrinkage = 1 - acceleration * reach
    if not np.isfinite(bias) or shrinkage.min() <= 0:
        return float(ndtr(-z)), float(ndtr(z))
    low, high = ndtr(bias + reach / shrinkage)
    return float(low), float(high)


def _find_interval(
    value: float, drawn: Floats, left_out: Floats, independent: int, reason: str
) -> Estimate:
    method = "patient bootstrap"
    if math.isnan(value):
        return Estimate.undefined(reason, method)
    defined = drawn[~np.isnan(drawn)]
    num_undefined = len(drawn) - len(defined)
    if num_undefined > MAX_UNDEFINED_FRACTION * len(drawn):
        why = f"too few patients: undefined in {num_undefined} of {len(drawn)} resamples"
        return Estimate(value, None, None, method, why)
    if independent < MIN_INDEPENDENT:
        why = f"too few patients for an interval: {independent} of the rarer class"
        return Estimate(value, None, None, method, why)
    z = math.sqrt(independent / (independent - 1)) * t_quantile(independent)
    tails = _find_tails(value, defined, left_out, z)
    # Between an infinity and a number there is nothing to interpolate.
    kind: Literal["linear", "nearest"] = "linear" if np.isfinite(defined).all() else "nearest"
    low, high = map(float, np.quantile(defined, tails, method=kind))
    if low == high:
        return Estimate(value, None, None, method, "the same in nearly every resample")
    # Of a skewed statistic the value itself can lie just outside the percentiles.
    low, high = min(low, value), max(high, value)
    if math.isinf(low) or math.isinf(high):
        why = "without a bound: in some resamples the classes are separated"
        ends = [None if math.isinf(end) else end for end in (low, high)]
        return Estimate(value, ends[0], ends[1], method, why)
    return Estimate(value, low, high, method)


def divide(numerator: Weights, denominator: Weights) -> Floats:
    """NaN where the denominator is 0."""
    missing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    found: Floats = np.divide(numerator, denominator, out=missing, where=denominator != 0)
    return found
