"""Intervals by resampling patients.

Images of one patient resemble each other, so intervals resample patients, never images. A metric is
therefore written once, as a `Statistic` of sample weights. Weights of 1 give the value, the number
of times that each patient was drawn gives one resample, and weights of 0 for some patients give the
value without them (the jackknife). `estimates` makes intervals of the resamples.

Resamples are computed in blocks, to bound the memory. A `MapBlocks` may compute the blocks in other
processes: each block carries the state of the random generator, so the result is the same, to
rounding, wherever it is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.estimates import Estimate, Floats, find_interval

SampleWeights = npt.NDArray[np.floating[Any] | np.integer[Any]]
"""(N, R): a column for each resample; fastest where a column is contiguous."""
Statistic = Callable[[SampleWeights], Floats]
"""Weights (N, R) to values (R,) or (K, R); NaN where undefined."""
StatisticBuilders = Mapping[str, Callable[[], Mapping[str, Statistic]]]
"""By the name of a set: a function that builds its statistics, or raises MetricError."""

_MAX_GROUPS = 200
"""Groups of patients that the jackknife leaves out: enough for the acceleration of BCa."""
_BLOCK_WEIGHTS = 4_000_000
"""Weights that are computed at once: 16 MB."""
_CACHED_WEIGHTS = 1_000_000
"""Weights that `in_chunks` takes at a time: 4 MB, the fastest of 2 to 16 MB or as fast."""


@dataclass(frozen=True, eq=False)
class Resampled:
    """K statistics: their values, and the values in each resample."""

    value: Floats
    """On all samples: (K,)."""
    drawn: Floats
    """In each of R resamples: (K, R)."""
    effective_patients: int
    """Sample size of the intervals: `count_equal_patients`, of the rarer class where both classes
    count."""
    jackknife: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """Without each of J groups of patients: (K, J)."""

    def derive(self, function: Callable[[Floats], Floats]) -> Self:
        """Statistics that are a function (K, R) -> (L, R) of these."""
        return replace(
            self,
            value=function(self.value[:, None])[:, 0],
            drawn=function(self.drawn),
            jackknife=function(self.jackknife) if self.jackknife.size else self.jackknife,
        )

    def concatenate(self, other: Self) -> Self:
        """These statistics, then the other ones."""
        value, drawn, jackknife = (
            np.concatenate([getattr(one, part) for one in (self, other)])
            for part in ("value", "drawn", "jackknife")
        )
        return replace(self, value=value, drawn=drawn, jackknife=jackknife)

    def take(self, rows: slice) -> Self:
        """Some of the statistics."""
        value, drawn = self.value[rows], self.drawn[rows]
        return replace(self, value=value, drawn=drawn, jackknife=self.jackknife[rows])

    def estimate(self, row: int = 0, reason: str = "undefined for these studies") -> Estimate:
        """One statistic with its 95 % interval, or `reason` where it has no value."""
        left_out = self.jackknife[row] if self.jackknife.size else np.empty(0)
        value, drawn = float(self.value[row]), self.drawn[row]
        return find_interval(value, drawn, left_out, self.effective_patients, reason)


def first_minus_second(pair: Floats) -> Floats:
    """(2, R) to (1, R)."""
    return pair[:1] - pair[1:]


@dataclass(frozen=True)
class ResampleBlock:
    """Columns of weights that are computed together: of the jackknife, or of resamples."""

    size: int
    first: int = 0
    """The first column, of the jackknife; its column 0 leaves nobody out."""
    generator: Any = None
    """State of the random generator before the block's first draw; None for the jackknife."""

    def count(self, num_patients: int) -> npt.NDArray[np.int32]:
        """How often each of P patients counts: (size, P)."""
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


BlockValues = Mapping[str, Floats]
"""By statistic, its values (K, size) in a block."""


@dataclass(frozen=True)
class ResampleBlocks:
    """The blocks of the jackknife, then those of the resamples."""

    num_patients: int
    size: int
    """Columns of a block."""
    resamples: int
    seed: int

    @property
    def jackknife(self) -> int:
        """Columns of the jackknife: the one that leaves nobody out, and one for each group."""
        return 1 + min(self.num_patients, _MAX_GROUPS)

    def __len__(self) -> int:
        return sum(-(-columns // self.size) for columns in (self.jackknife, self.resamples))

    def __iter__(self) -> Iterator[ResampleBlock]:
        for first in range(0, self.jackknife, self.size):
            yield ResampleBlock(min(self.size, self.jackknife - first), first)
        rng = np.random.Generator(np.random.PCG64(self.seed))
        for start in range(0, self.resamples, self.size):
            block = ResampleBlock(
                min(self.size, self.resamples - start), generator=rng.bit_generator.state
            )
            yield block
            for _ in range(block.size):
                _draw(rng, self.num_patients)


MapBlocks = Callable[
    [Callable[[ResampleBlock], BlockValues], ResampleBlocks], Iterable[BlockValues]
]
"""Applies a function to each block, results in order; `map` does so in this process."""


def resample(
    patient: npt.NDArray[Any],
    statistics: Mapping[str, Statistic],
    *,
    resamples: int,
    seed: int,
    effective_patients: int,
    map_blocks: MapBlocks = map,
) -> dict[str, Resampled]:
    """Each statistic on all samples and on `resamples` draws of the patients, with replacement.

    `patient` (N,) names the patient of each sample; `effective_patients` as in `Resampled`. All
    statistics see the same resamples, so the difference of two is again a statistic. The result
    does not depend on the order of the samples, nor on `map_blocks`. (Field & Welsh 2007:
    bootstrapping clustered data.)
    """
    name, index = np.unique(patient, return_inverse=True)
    if len(index) == 0 or not statistics:
        return {
            key: Resampled(np.full(1, np.nan), np.full((1, 1), np.nan), 0) for key in statistics
        }
    blocks = ResampleBlocks(len(name), max(1, _BLOCK_WEIGHTS // len(index)), resamples, seed)
    parts = list(map_blocks(partial(_compute, index, statistics), blocks))
    first = blocks.jackknife  # column of the resamples
    return {
        key: Resampled(columns[:, 0], columns[:, first:], effective_patients, columns[:, 1:first])
        for key in statistics
        for columns in (np.concatenate([part[key] for part in parts], axis=1),)
    }


def _compute(
    index: npt.NDArray[np.intp], statistics: Mapping[str, Statistic], block: ResampleBlock
) -> BlockValues:
    """The statistics in one block; `index` (N,) numbers the patient of each sample."""
    weights = np.take(block.count(int(index.max()) + 1), index, axis=1).T
    return {key: np.atleast_2d(statistic(weights)) for key, statistic in statistics.items()}


def _draw(rng: np.random.Generator, num_patients: int) -> npt.NDArray[np.int64]:
    return rng.integers(num_patients, size=num_patients)


@dataclass(frozen=True, eq=False)
class StatisticSet:
    """Statistics after resampling, or the reason why there are none."""

    resampled: Mapping[str, Resampled]
    reason: str | None = None

    def with_size(self, effective_patients: int) -> Self:
        """The same with another sample size."""
        sized = {
            key: replace(one, effective_patients=effective_patients)
            for key, one in self.resampled.items()
        }
        return replace(self, resampled=sized)

    def estimate(self, key: str, row: int = 0, reason: str = "undefined here") -> Estimate:
        """The estimate of one statistic; undefined where the set is."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].estimate(row, reason)

    def difference(self, key: str) -> Estimate:
        """The estimate of the first of two stacked statistics minus the second."""
        if self.reason is not None:
            return Estimate.undefined(self.reason)
        return self.resampled[key].derive(first_minus_second).estimate()


def resample_sets(
    patient: npt.NDArray[Any],
    sets: StatisticBuilders,
    *,
    resamples: int,
    seed: int,
    effective_patients: int,
    map_blocks: MapBlocks = map,
) -> dict[str, StatisticSet]:
    """`resample` of the statistics of all sets, in one pass over the same resamples."""
    statistics: dict[str, Mapping[str, Statistic]] = {}
    reasons: dict[str, str] = {}
    for name, build in sets.items():
        try:
            statistics[name] = build()
        except MetricError as error:
            reasons[name] = str(error)
    flat = {f"{name}/{key}": one for name, some in statistics.items() for key, one in some.items()}
    found = resample(
        patient,
        flat,
        resamples=resamples,
        seed=seed,
        effective_patients=effective_patients,
        map_blocks=map_blocks,
    )
    return {
        name: StatisticSet({}, reasons[name])
        if name in reasons
        else StatisticSet({key: found[f"{name}/{key}"] for key in statistics[name]})
        for name in sets
    }


def stack(*statistics: Statistic) -> Statistic:
    """Several statistics (R,) as one (K, R)."""
    return lambda weights: np.stack([statistic(weights) for statistic in statistics])


def in_chunks(statistic: Statistic) -> Statistic:
    """The same statistic, computed for few resamples at a time: that of many misses the processor's
    cache."""

    def chunked(weights: SampleWeights) -> Floats:
        size = max(1, _CACHED_WEIGHTS // len(weights))
        starts = range(0, weights.shape[1], size)
        return np.concatenate([statistic(weights[:, i : i + size]) for i in starts], axis=1)

    return chunked


def computed_once(statistic: Statistic) -> Statistic:
    """The same statistic for several that need it of the same weights, one after the other."""
    last: list[tuple[SampleWeights, Floats]] = []

    def once(weights: SampleWeights) -> Floats:
        if not last or last[0][0] is not weights:
            last[:] = [(weights, statistic(weights))]
        return last[0][1]

    return once


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

    def statistic(weights: SampleWeights) -> Floats:
        drawn = take(weights, rows).astype(np.float64, copy=False)
        sums = np.zeros((len(columns), num_codes, len(drawn)))
        for row, column in zip(sums, columns, strict=True):
            if len(order):
                weighed = drawn if column is None else drawn * column
                row[present] = np.add.reduceat(weighed, starts, axis=1).T
        return sums.reshape(-1, len(drawn))

    return statistic


def as_slice(rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp] | slice:
    """The rows as a slice where they are consecutive, so that indexing copies nothing."""
    follow = len(rows) > 0 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if follow else rows


def take(weights: SampleWeights, rows: npt.NDArray[np.intp] | slice) -> SampleWeights:
    """The weights of some samples, contiguous for each resample: (N, R) to (R, len(rows))."""
    if isinstance(rows, slice):
        return weights.T[:, rows]
    return np.take(weights.T, rows, axis=1, mode="clip")  # "raise" is slower


def divide(numerator: SampleWeights, denominator: SampleWeights) -> Floats:
    """The quotient; NaN where the denominator is 0."""
    missing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    found: Floats = np.divide(numerator, denominator, out=missing, where=denominator != 0)
    return found
