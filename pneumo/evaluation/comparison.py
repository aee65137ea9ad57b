"""Two models on the same studies: which is better, and with what certainty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pneumo.errors import DataError, MetricError
from pneumo.evaluation import bootstrap, metrics, ranking
from pneumo.evaluation.bootstrap import MapBlocks, Statistic, StatisticBuilders, StatisticSet
from pneumo.evaluation.delong import PairedTest, delong_test
from pneumo.evaluation.estimates import Estimate, as_json
from pneumo.evaluation.predictions import Predictions

COMPARED = ("auroc", "average_precision", "brier")


@dataclass(frozen=True)
class Difference:
    """A metric of both models, and first minus second over the same resamples."""

    first: Estimate
    second: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """Two models on one split."""

    n: int
    positives: int
    patients: int
    auroc: Difference
    average_precision: Difference
    brier: Difference
    """Of the calibrated probabilities; lower is better."""
    auroc_delong: PairedTest
    """Images taken as independent."""
    auroc_delong_clustered: PairedTest
    """Patients taken as independent."""


@dataclass(frozen=True)
class ComparedRuns:
    """Two runs, by split."""

    first: str
    """Name of the run that is evaluated."""
    second: str
    splits: Mapping[str, Comparison]

    def to_json(self) -> dict[str, Any]:
        """The object `comparison` of metrics.json."""
        return {
            "first": self.first,
            "second": self.second,
            **as_json(self.splits),
        }


def compare(
    first: Predictions,
    second: Predictions,
    *,
    resamples: int,
    seed: int,
    map_blocks: MapBlocks = map,
) -> Comparison:
    """The first model minus the second, on the same studies of one split, in any order.

    Raises DataError where the studies differ, or a study's target or patient does. What can't be
    computed is None with a reason. `map_blocks` computes the resamples.
    """
    first, second = align(first, second)
    sets: StatisticBuilders = {
        "auroc": lambda: _pair(ranking.auroc_statistic, first, second, "logit"),
        "average_precision": lambda: _pair(
            ranking.average_precision_statistic, first, second, "logit"
        ),
        "brier": lambda: _pair_calibrated(first, second),
    }
    found = bootstrap.resample_sets(
        first.patient,
        sets,
        resamples=resamples,
        seed=seed,
        effective_patients=first.count_rarer_class(),
        map_blocks=map_blocks,
    )
    scores = first.target, first.logit, second.logit
    return Comparison(
        n=len(first),
        positives=int(first.target.sum()),
        patients=len(np.unique(first.patient)),
        **{name: _difference(found[name]) for name in COMPARED},
        auroc_delong=delong_test(*scores),
        auroc_delong_clustered=delong_test(*scores, first.patient),
    )


def align(first: Predictions, second: Predictions) -> tuple[Predictions, Predictions]:
    """Both sorted by key. Raises DataError where they are not of the same studies."""
    for name, rows in (("first", first), ("second", second)):
        twice = len(rows) - len(np.unique(rows.key))
        if twice:
            raise DataError(f"comparison: the {name} scores {twice} studies more than once")
    only = (
        len(np.setdiff1d(first.key, second.key)),
        len(np.setdiff1d(second.key, first.key)),
    )
    if any(only):
        raise DataError(
            f"comparison: {only[0]} studies are scored by the first alone and {only[1]} by the "
            "second alone; evaluate both runs on one store"
        )
    first, second = (rows.take(np.argsort(rows.key, kind="stable")) for rows in (first, second))
    for column in ("target", "patient", "split"):
        differing = int((getattr(first, column) != getattr(second, column)).sum())
        if differing:
            raise DataError(
                f"comparison: {differing} studies differ in their {column}; evaluate both runs on "
                "one store"
            )
    return first, second


def _pair_calibrated(first: Predictions, second: Predictions) -> dict[str, Statistic]:
    if any(np.isnan(rows.calibrated_probability).all() for rows in (first, second)):
        raise MetricError("a run is not calibrated, see its calibration")
    return _pair(metrics.brier_statistic, first, second, "calibrated_probability")


def _pair(
    build: Callable[[Any, Any], Statistic], first: Predictions, second: Predictions, column: str
) -> dict[str, Statistic]:
    both = (build(rows.target, getattr(rows, column)) for rows in (first, second))
    return {"pair": bootstrap.stack(*both)}


def _difference(part: StatisticSet) -> Difference:
    return Difference(part.estimate("pair", 0), part.estimate("pair", 1), part.difference("pair"))
