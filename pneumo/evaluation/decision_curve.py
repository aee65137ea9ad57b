"""Decision curve: is treating by the model better than treating all, or none?

Who treats from a probability t on accepts (1 - t) / t false positives for one true positive. The
net benefit is the number of true positives minus that of the false ones, weighted by t / (1 - t)
(Vickers & Elkin 2006). The curve is descriptive and not tested at each threshold (Vickers et al.
2023). Where hardly a positive lies on one side of a threshold, resamples cannot give an interval.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pneumo.evaluation.bootstrap import SampleWeights, Statistic, StatisticSet, divide
from pneumo.evaluation.estimates import MIN_FOR_INTERVAL, Estimate, Floats
from pneumo.evaluation.metrics import called_statistic, check_scores
from pneumo.evaluation.predictions import Predictions

THRESHOLDS: tuple[float, ...] = tuple(k / 100 for k in range(1, 51))


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at each of THRESHOLDS, in true positives per study; treating nobody has 0."""

    model: tuple[Estimate, ...]
    treat_all: tuple[float, ...]
    gain: tuple[float, ...]
    """The model minus the better of treating all and none."""
    is_supported: tuple[bool, ...]
    """Whether MIN_FOR_INTERVAL patients have a positive below the threshold, and as many above
    it."""
    reason: str | None = None
    """Why there is no curve."""

    @classmethod
    def undefined(cls, reason: str) -> Self:
        """No curve, with the reason."""
        return cls((), (), (), (), reason)

    def to_json(self) -> dict[str, Any]:
        """A list for each quantity, as long as `threshold`; without a curve null and the reason."""
        if self.reason is not None:
            return {"threshold": None, "reason": self.reason}
        return {
            "threshold": list(THRESHOLDS),
            "treat_all": list(self.treat_all),
            **{
                f"model{suffix}": [getattr(one, end) for one in self.model]
                for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
            "gain": list(self.gain),
            "supported": list(self.is_supported),
            "method": "patient bootstrap, each threshold by itself",
        }


def net_benefit_statistic(rows: Predictions) -> Statistic:
    """Net benefit of the model and of treating all: (2 * len(THRESHOLDS), R).

    Uses `rows.calibrated_probability`. Raises MetricError for no study or a NaN.
    """
    positive, probability = check_scores(
        rows.target, rows.calibrated_probability, both_classes=False
    )
    threshold = np.array(THRESHOLDS)
    odds = (threshold / (1 - threshold))[:, None]
    called = called_statistic(positive, probability, THRESHOLDS)

    def statistic(weights: SampleWeights) -> Floats:
        hits, alarms = np.split(called(weights), 2)
        table = np.concatenate([hits[1:] - odds * alarms[1:], hits[0] - odds * alarms[0]])
        return divide(table, hits[0] + alarms[0])

    return statistic


def summarise_net_benefit(rows: Predictions, part: StatisticSet) -> DecisionCurve:
    """The curve of `rows`; `part` has their `net_benefit_statistic` as `curve`."""
    if part.reason is not None:
        return DecisionCurve.undefined(part.reason)
    found, num = part.resampled["curve"], len(THRESHOLDS)
    positive = rows.target == 1
    risk = rows.calibrated_probability[positive]
    name, patient = np.unique(rows.patient[positive], return_inverse=True)
    lowest, highest = np.full(len(name), np.inf), np.full(len(name), -np.inf)
    np.minimum.at(lowest, patient, risk)
    np.maximum.at(highest, patient, risk)
    supported = tuple(
        min(int((lowest < t).sum()), int((highest >= t).sum())) >= MIN_FOR_INTERVAL
        for t in THRESHOLDS
    )
    why = f"fewer than {MIN_FOR_INTERVAL} patients with a positive on a side of the threshold"
    model = [found.estimate(k) for k in range(num)]
    return DecisionCurve(
        model=tuple(
            one if known else replace(one, low=None, high=None, reason=why)
            for one, known in zip(model, supported, strict=True)
        ),
        treat_all=tuple(found.value[num:].tolist()),
        gain=tuple((found.value[:num] - np.maximum(found.value[num:], 0)).tolist()),
        is_supported=supported,
    )
