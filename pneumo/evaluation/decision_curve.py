"""Decision curve: is acting on the model worth more than treating all, or none?

A reader who acts at a probability of t thinks (1 - t) / t false alarms as bad as one miss; the net
benefit counts true positives less false ones at that rate of exchange (Vickers & Elkin 2006). The
curve describes; it is not tested at each threshold (Vickers et al. 2023), and where hardly a
positive lies on one side of a threshold resamples never see a miss, so nothing is said there.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pneumo.evaluation.bootstrap import (
    MIN_INDEPENDENT,
    Estimate,
    Floats,
    Resampled,
    Statistic,
    Weights,
)
from pneumo.evaluation.metrics import called_statistic, check_scores
from pneumo.evaluation.predictions import Predictions

THRESHOLDS: tuple[float, ...] = tuple(k / 100 for k in range(1, 51))


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit, in true positives a study, at each of THRESHOLDS; treating nobody has 0."""

    model: tuple[Estimate, ...]
    treat_all: tuple[float, ...]
    gain: tuple[float, ...]
    """The model less the better of treating all and none."""
    is_supported: tuple[bool, ...]
    """Whether MIN_INDEPENDENT patients have a positive below the threshold, and as many above."""
    reason: str | None = None
    """Why there is none."""

    @classmethod
    def undefined(cls, reason: str) -> Self:
        """There is none, and why."""
        return cls((), (), (), (), reason)

    def to_json(self) -> dict[str, Any]:
        """Columns: one list a quantity, as long as `threshold`; null with a reason without one."""
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

    Of `rows.calibrated_probability`. Raises MetricError for no study or a NaN.
    """
    positive, probability = check_scores(
        rows.target, rows.calibrated_probability, both_classes=False
    )
    threshold = np.array(THRESHOLDS)
    odds = (threshold / (1 - threshold))[:, None]
    called = called_statistic(positive, probability, THRESHOLDS)

    def statistic(weights: Weights) -> Floats:
        hits, alarms = np.split(called(weights), 2)
        table = np.concatenate([hits[1:] - odds * alarms[1:], hits[0] - odds * alarms[0]])
        found: Floats = table / (hits[0] + alarms[0])
        return found

    return statistic


def summarise_net_benefit(found: Resampled, rows: Predictions) -> DecisionCurve:
    """The curve of what `net_benefit_statistic` resampled of `rows`."""
    num = len(THRESHOLDS)
    positive = rows.target == 1
    risk = rows.calibrated_probability[positive]
    name, patient = np.unique(rows.patient[positive], return_inverse=True)
    lowest, highest = np.full(len(name), np.inf), np.full(len(name), -np.inf)
    np.minimum.at(lowest, patient, risk)
    np.maximum.at(highest, patient, risk)
    supported = tuple(
        min(int((lowest < t).sum()), int((highest >= t).sum())) >= MIN_INDEPENDENT
        for t in THRESHOLDS
    )
    why = f"fewer than {MIN_INDEPENDENT} patients with a positive on a side of the threshold"
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
