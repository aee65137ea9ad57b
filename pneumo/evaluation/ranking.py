"""Metrics of the order of weighted samples' scores: AUROC, average precision, sensitivity at a
specificity.

A pair of a positive and a negative is concordant when the positive has the higher score; of a tie,
half a pair is. The AUROC is the fraction of concordant pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.bootstrap import SampleWeights, Statistic, as_slice, divide, take
from pneumo.evaluation.estimates import Floats
from pneumo.evaluation.metrics import check_scores

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Some of N samples, sorted by class and by ascending score."""

    positives: Indices | slice
    """Their indices among the N samples: (P,)."""
    negatives: Indices | slice
    """Likewise: (Q,)."""
    num_below: Indices
    """Number of negatives with a lower score than each positive: (P,)."""
    tied: Indices
    """Which positives have the score of a negative: (T,)."""
    num_up_to_tied: Indices
    """Number of negatives with the score of each tied positive, or a lower one: (T,)."""
    num_positives_below: Indices | slice
    """Number of positives with a lower score than each positive: (P,)."""

    @classmethod
    def of(
        cls,
        positive: npt.NDArray[np.bool_],
        score: Floats,
        mask: npt.NDArray[np.bool_] | None = None,
    ) -> Self:
        """Rank the samples of `mask`, or all samples. All arrays are (N,)."""
        order = np.argsort(score, kind="stable")
        order = order if mask is None else order[mask[order]]
        positives, negatives = order[positive[order]], order[~positive[order]]
        high, low = score[positives], score[negatives]
        below, up_to = np.searchsorted(low, high), np.searchsorted(low, high, side="right")
        tied = np.flatnonzero(up_to > below)
        return cls(
            positives=as_slice(positives),
            negatives=as_slice(negatives),
            num_below=below,
            tied=tied,
            num_up_to_tied=up_to[tied],
            num_positives_below=as_slice(np.searchsorted(high, high)),
        )

    def weigh(
        self, weights: SampleWeights, negative_sums: SampleWeights | None = None
    ) -> WeightedRanking:
        """The ranking with weights (N, R) of the N samples.

        `negative_sums`: `WeightedRanking.negative_sums`, where another ranking of the same
        negatives has them already.
        """
        if negative_sums is None:
            negative_sums = _cumulate(take(weights, self.negatives))
        return WeightedRanking(self, take(weights, self.positives), negative_sums)


@dataclass(frozen=True, eq=False)
class WeightedRanking:
    """A ranking whose samples count as often as R resamples drew them."""

    ranking: Ranking
    counts: SampleWeights
    """Weights of the positives: (R, P)."""
    negative_sums: SampleWeights
    """Total weight of the k negatives with the lowest scores, k from 0 to Q: (R, Q + 1)."""

    @cached_property
    def positive_weights(self) -> Floats:
        """`counts` in float64: (R, P)."""
        return self.counts.astype(np.float64)

    @cached_property
    def positive_sums(self) -> SampleWeights:
        """Total weight of the k positives with the lowest scores, k from 0 to P: (R, P + 1)."""
        return _cumulate(self.counts)

    @cached_property
    def negatives_below(self) -> SampleWeights:
        """Weight of the negatives with a lower score than each positive: (R, P)."""
        return np.take(self.negative_sums, self.ranking.num_below, axis=1, mode="clip")

    @property
    def concordant(self) -> Floats:
        """Weight of the negatives that each positive makes a concordant pair with: (R, P)."""
        tied, found = self.ranking.tied, self.negatives_below.astype(np.float64)
        if not len(tied):
            return found
        up_to = np.take(self.negative_sums, self.ranking.num_up_to_tied, axis=1)
        found[:, tied] = (found[:, tied] + up_to) / 2
        return found

    @cached_property
    def concordant_pairs(self) -> Floats:
        """Weight of all concordant pairs: (R,)."""
        found: Floats = np.vecdot(self.positive_weights, self.concordant)
        return found

    @property
    def auroc(self) -> Floats:
        """(R,); NaN where a class has no weight."""
        pairs = self.positive_weights.sum(axis=1) * self.negative_sums[:, -1]
        return divide(self.concordant_pairs, pairs)

    @property
    def average_precision(self) -> Floats:
        """(R,); NaN where the positives have no weight."""
        # Samples of equal score are called positive together.
        lower = take(self.positive_sums[:, :-1].T, self.ranking.num_positives_below)
        hits = self.positive_sums[:, -1:] - lower
        calls = self.negative_sums[:, -1:] - self.negatives_below
        calls += hits
        np.maximum(calls, 1, out=calls)  # 0 of no call is 0
        weights = self.positive_weights
        return divide(np.vecdot(weights, hits / calls), self.positive_sums[:, -1])


def auroc_statistic(
    target: npt.ArrayLike, score: npt.ArrayLike, mask: npt.NDArray[np.bool_] | None = None
) -> Statistic:
    """`metrics.auroc` of weighted samples, of all or of those in `mask`, all (N,); NaN where a
    resample has one class only."""
    ranking = Ranking.of(*check_scores(target, score), mask)
    return lambda weights: ranking.weigh(weights).auroc


def average_precision_statistic(target: npt.ArrayLike, score: npt.ArrayLike) -> Statistic:
    """Mean precision over the positives, scikit-learn's step-wise sum; NaN without a positive."""
    ranking = Ranking.of(*check_scores(target, score))
    return lambda weights: ranking.weigh(weights).average_precision


def average_precision(target: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Mean precision over the positives, 0 to 1, as scikit-learn's `average_precision_score`; NaN
    without a positive."""
    statistic = average_precision_statistic(target, score)
    return float(statistic(np.ones((np.size(target), 1)))[0])


def headline_statistic(
    target: npt.ArrayLike, score: npt.ArrayLike, specificity: float
) -> Statistic:
    """AUROC, average precision and the sensitivity at a specificity: (3, R)."""
    positive, score64 = check_scores(target, score)
    ranking = Ranking.of(positive, score64)
    high, low = score64[ranking.positives], score64[ranking.negatives]

    def statistic(weights: SampleWeights) -> Floats:
        weighted = ranking.weigh(weights)
        sensitivity = _find_sensitivity(weighted, high, low, specificity)
        return np.stack([weighted.auroc, weighted.average_precision, sensitivity])

    return statistic


def _find_sensitivity(
    weighted: WeightedRanking, high: Floats, low: Floats, specificity: float
) -> Floats:
    """The highest sensitivity (R,) of the thresholds whose specificity is at least `specificity`
    (0, 1]; each resample has a threshold of its own. NaN in one without a positive. `high` and
    `low` are the sorted scores of the positives and of the negatives."""
    sums, missed = weighted.negative_sums, weighted.positive_sums
    needed = specificity * sums[:, -1] - 1e-9
    last = [np.searchsorted(*pair) - 1 for pair in zip(sums, needed, strict=True)]
    num_missed = np.searchsorted(high, low[np.maximum(last, 0)], side="right")
    all_positives = missed[:, -1]
    return divide(all_positives - missed[np.arange(len(missed)), num_missed], all_positives)


def _cumulate(weights: SampleWeights) -> SampleWeights:
    """Column k holds the sum of the first k columns: (R, N) to (R, N + 1)."""
    sums = np.empty((len(weights), weights.shape[1] + 1), dtype=weights.dtype)
    sums[:, 0] = 0
    import torch  # numpy's takes twice as long; who resamples nothing has no need of it

    given, out = torch.from_numpy(weights), torch.from_numpy(sums[:, 1:])
    torch.cumsum(given, dim=1, dtype=given.dtype, out=out)
    return sums
