"""Metrics of each run of an ensemble alone, and their spread.

For runs that differ in their seed alone it is the spread between seeds, which intervals over
patients do not include.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pneumo.config import EvaluateConfig
from pneumo.evaluation.metrics import auroc, confusion, rates
from pneumo.evaluation.operating_points import DECISION, choose_points
from pneumo.evaluation.predictions import Predictions, find_fault
from pneumo.evaluation.ranking import average_precision

MEASURES = ("auroc", "average_precision", "recall", "specificity")
"""The last two at the decision point of each run's own val."""


@dataclass(frozen=True)
class MemberSpread:
    """The runs of an ensemble, each alone, on test."""

    runs: tuple[str, ...]
    differ_in: tuple[str, ...]
    """Training settings that differ between the runs, such as `seed`."""
    values: Mapping[str, tuple[float, ...]]
    """By metric, in the order of `runs`; a metric that is undefined for a run is left out."""

    @property
    def is_of_seeds(self) -> bool:
        """Whether nothing but the seed differs."""
        return self.differ_in == ("seed",)

    def to_json(self) -> dict[str, Any]:
        """The object `members` of metrics.json."""
        return {
            "runs": list(self.runs),
            "differ_in": list(self.differ_in),
            **{
                name: {
                    "values": list(values),
                    "mean": statistics.mean(values),
                    "standard_deviation": statistics.stdev(values),
                }
                for name, values in self.values.items()
            },
        }


def compare_members(
    members: Mapping[str, Predictions], differ_in: Sequence[str], config: EvaluateConfig
) -> MemberSpread | None:
    """The metrics of each run, by its name; None for fewer than two runs."""
    if len(members) < 2:
        return None
    found = [_measure(rows, config) for rows in members.values()]
    shared = [name for name in MEASURES if all(name in one for one in found)]
    values = {name: tuple(one[name] for one in found) for name in shared}
    return MemberSpread(tuple(members), tuple(differ_in), values)


def _measure(rows: Predictions, config: EvaluateConfig) -> dict[str, float]:
    test = rows.subset("test")
    if find_fault(test) is not None or not 0 < test.target.sum() < len(test):
        return {}
    threshold = choose_points(rows.subset("val"), config)[DECISION].logit
    found = {} if threshold is None else rates(confusion(test.target, test.logit, threshold))
    found["auroc"] = auroc(test.target, test.logit)
    found["average_precision"] = average_precision(test.target, test.logit)
    return found
