"""What is resampled of every subgroup, and of the studies that it is compared with.

Both AUROCs come from the ranking of all studies, and every sum from sums of cells, as there are
many subgroups and many resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.bootstrap import SampleWeights, Statistic, divide, in_chunks, sums_statistic
from pneumo.evaluation.estimates import Floats
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.operating_points import code_outcomes
from pneumo.evaluation.predictions import Predictions
from pneumo.evaluation.ranking import Ranking, WeightedRanking
from pneumo.evaluation.subgroup_definitions import SHARED, SubgroupMembers

AUROC, REST_AUROC, AVERAGE_PRECISION = 0, 1, 2
SUMS, REST_SUMS = slice(3, 9), slice(9, 15)
"""tp, fp, fn, tn, sum of probabilities and of their squared errors."""
NUM_ROWS = 15
"""Rows of one subgroup in what `subgroups_statistic` gives."""


def subgroups_statistic(
    rows: Predictions, groups: Sequence[SubgroupMembers], threshold: float | None
) -> Statistic:
    """AUROC of each subgroup and of its rest, average precision, sums of both, one subgroup after
    the other: (groups * NUM_ROWS, R). `threshold` is on the logit."""
    cells = _Cells.of(rows, groups, threshold)
    rankings = _Rankings.of(rows, groups, cells)

    def statistic(weights: SampleWeights) -> Floats:
        sums, total = cells.sum_up(weights)
        ranked = rankings.measure(weights, sums, total)
        table = np.concatenate([ranked, sums, total - sums], axis=1)
        return table.reshape(-1, weights.shape[1])

    return in_chunks(statistic)


@dataclass(frozen=True, eq=False)
class _Cells:
    """Studies that are in the same subgroups and have the same outcome make a cell, so that a sum
    over a subgroup is a sum over its cells."""

    cell: npt.NDArray[np.intp]
    """Of each study: (N,)."""
    members: Floats
    """1 where a cell is in a subgroup: (groups, cells)."""
    outcome: npt.NDArray[np.int64]
    """Which of tp, fp, fn, tn a cell is, 0 to 3: (cells,)."""
    sums: Statistic
    """SampleWeights, probabilities and squared errors by cell."""

    @classmethod
    def of(
        cls, rows: Predictions, groups: Sequence[SubgroupMembers], threshold: float | None
    ) -> Self:
        code = code_outcomes(rows, threshold)
        for bit, group in enumerate(groups):
            code += group.own.astype(np.int64) << (bit + 2)
        names, cell = np.unique(code, return_inverse=True)
        members = (names >> (np.arange(len(groups))[:, None] + 2)) & 1
        calibrated = np.nan_to_num(rows.calibrated_probability)
        values = None, calibrated, (calibrated - rows.target) ** 2
        sums = sums_statistic(cell, len(names), *values)
        return cls(cell, members.astype(np.float64), names & 3, sums)

    def sum_up(self, weights: SampleWeights) -> tuple[Floats, Floats]:
        """The six sums of each subgroup (groups, 6, R), and those of all studies (6, R)."""
        counts, probability, squared = self.sums(weights).reshape(3, -1, weights.shape[1])
        of_outcome = [counts * (self.outcome == code)[:, None] for code in range(4)]
        values = np.stack([*of_outcome, probability, squared])
        return np.moveaxis(self.members @ values, 0, 1), values.sum(axis=1)

    def sum_by_cell(self, ranking: Ranking) -> Statistic:
        """Sums of weights of the ranking's positives (P, R), in its order, by cell: (cells, R)."""
        cell = self.cell[ranking.positives]
        return sums_statistic(cell, len(self.outcome), None)


@dataclass(frozen=True, eq=False)
class _Rankings:
    """The rankings of all studies and of each subgroup."""

    groups: Sequence[SubgroupMembers]
    members: Floats
    """As in `_Cells`."""
    everybody: Ranking
    reversed: Ranking
    """Of all studies, with negated scores and exchanged classes: negatives are its positives."""
    sum_positives: Statistic
    """Values of the positives by cell: see `_Cells.sum_by_cell`."""
    sum_negatives: Statistic
    of_groups: list[Ranking]
    has_all_negatives: list[bool]

    @classmethod
    def of(cls, rows: Predictions, groups: Sequence[SubgroupMembers], cells: _Cells) -> Self:
        positive, logit = check_scores(rows.target, rows.logit, both_classes=False)
        everybody, reversed_ = Ranking.of(positive, logit), Ranking.of(~positive, -logit)
        return cls(
            groups,
            cells.members,
            everybody,
            reversed_,
            sum_positives=cells.sum_by_cell(everybody),
            sum_negatives=cells.sum_by_cell(reversed_),
            of_groups=[Ranking.of(positive, logit, group.own) for group in groups],
            has_all_negatives=[bool(group.own[~positive].all()) for group in groups],
        )

    def measure(self, weights: SampleWeights, sums: Floats, total: Floats) -> Floats:
        """AUROC, AUROC of the rest and average precision: (groups, 3, R). `sums` and `total` as by
        `_Cells.sum_up`."""
        everybody = self.everybody.weigh(weights)
        weighted = (
            ranking.weigh(weights, everybody.negative_sums if has_all else None)
            for ranking, has_all in zip(self.of_groups, self.has_all_negatives, strict=True)
        )
        ranked = np.array([(one.concordant_pairs, one.average_precision) for one in weighted])
        pairs, precision = ranked[:, 0], ranked[:, 1]
        positives, negatives = sums[:, 0] + sums[:, 2], sums[:, 1] + sums[:, 3]
        all_positives, all_negatives = total[0] + total[2], total[1] + total[3]
        rest = divide(
            self._count_rest_pairs(weights, everybody, pairs),
            (all_positives - positives) * (all_negatives - negatives),
        )
        # Where all share a class, the rest is the other subgroups, each with that class.
        shared = (negatives, all_positives), (positives, all_negatives)
        for by, (own, of_all) in zip(SHARED, shared, strict=True):
            here = np.flatnonzero([group.by == by for group in self.groups])
            other_pairs, num_others = (one[here].sum(axis=0) - one[here] for one in (pairs, own))
            rest[here] = divide(other_pairs, num_others * of_all)
        return np.stack([divide(pairs, positives * negatives), rest, precision], axis=1)

    def _count_rest_pairs(
        self, weights: SampleWeights, everybody: WeightedRanking, pairs: Floats
    ) -> Floats:
        """Weight of the concordant pairs of each subgroup's rest: (groups, R).

        The rest is not ranked anew. Its pairs are those of all studies, less those with a positive
        of the subgroup, less those with a negative of it, plus `pairs`, which have both.
        """
        by_cell = self.sum_positives((everybody.positive_weights * everybody.concordant).T)
        negatives = self.reversed.weigh(weights)
        by_cell += self.sum_negatives((negatives.positive_weights * negatives.concordant).T)
        found: Floats = by_cell.sum(axis=0) / 2 - self.members @ by_cell + pairs
        return found
