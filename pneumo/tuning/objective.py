"""The objective of a trial: one number on val, higher is better, with its standard error.

An estimate keeps the influence of each study on the number. So the standard error is clustered by
patient, and two trials on the same studies are compared in pairs. `auroc`: placement values (DeLong
1988, by patient as in Obuchowski 1997). `sensitivity`: at the lowest threshold with at least the
wanted specificity on val; the error of the threshold is included. `log_loss` (negative, in nats):
after Platt scaling in 5-fold cross-validation by patient, as a positive-class weight shifts every
logit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pneumo.config import TuneConfig
from pneumo.errors import MetricError
from pneumo.evaluation.calibration import cross_validated_losses
from pneumo.evaluation.delong import placements
from pneumo.evaluation.estimates import Floats
from pneumo.evaluation.metrics import check_scores

Objective = Literal["auroc", "sensitivity", "log_loss"]


@dataclass(frozen=True, eq=False)
class ObjectiveEstimate:
    """The objective on val."""

    value: float
    """Higher is better."""
    influence: Floats
    """(N,): influence of each study on the value; sums to 0."""
    patient: npt.NDArray[Any]
    """(N,): the patient of each study."""

    @property
    def standard_error(self) -> float:
        """Standard error of the value, clustered by patient."""
        return _clustered_error(self.influence, self.patient)

    def error_of_difference(self, other: Self) -> float:
        """Standard error of the difference to another estimate on the same studies."""
        return _clustered_error(self.influence - other.influence, self.patient)


def estimate_objective(
    target: npt.ArrayLike, logit: npt.ArrayLike, patient: npt.NDArray[Any], config: TuneConfig
) -> ObjectiveEstimate:
    """The objective that `config` names, from targets, logits and patients (N,) of val.

    Raises MetricError where it is undefined: one class only, a NaN.
    """
    positive, score = check_scores(target, logit)
    by_name: dict[Objective, Callable[[], tuple[float, Floats]]] = {
        "auroc": lambda: _estimate_auroc(positive, score),
        "sensitivity": lambda: _estimate_sensitivity(positive, score, config.specificity),
        "log_loss": lambda: _estimate_log_loss(positive, score, patient),
    }
    value, influence = by_name[config.objective]()
    return ObjectiveEstimate(value, influence, np.asarray(patient))


def chance_level(config: TuneConfig, prevalence: float) -> float:
    """The objective where all studies have the same score; the value of a failed trial."""
    if config.objective == "auroc":
        return 0.5
    if config.objective == "sensitivity":
        return 1 - config.specificity
    return prevalence * math.log(prevalence) + (1 - prevalence) * math.log(1 - prevalence)


def smooth(values: Sequence[float], epochs: int) -> float:
    """The mean of the last `epochs` values, or of all where there are fewer."""
    last = values[-epochs:]
    return sum(last) / len(last)


def name_objective(config: TuneConfig) -> str:
    """The objective's name, for figures."""
    names: dict[Objective, str] = {
        "auroc": "AUROC on val",
        "sensitivity": f"sensitivity on val at specificity {config.specificity:g}",
        "log_loss": "−log loss on val, calibrated",
    }
    return names[config.objective]


def describe_objective(config: TuneConfig) -> str:
    """The objective's name, and over how many epochs it is averaged."""
    name, over = name_objective(config), config.smoothing_epochs
    return name if over == 1 else f"{name}, mean of the last {over} epochs"


def _estimate_auroc(positive: npt.NDArray[np.bool_], score: Floats) -> tuple[float, Floats]:
    placed = placements(positive, score)
    sizes = np.where(positive, positive.sum(), (~positive).sum())
    return placed.auroc, (placed.value - placed.auroc) / sizes


def _estimate_sensitivity(
    positive: npt.NDArray[np.bool_], score: Floats, specificity: float
) -> tuple[float, Floats]:
    negatives = np.sort(score[~positive])
    # The lowest threshold with at least the wanted specificity.
    num_below = math.ceil(specificity * len(negatives) - 1e-9)
    threshold = negatives[num_below - 1]
    hits = score > threshold
    value = float(hits[positive].mean())
    # One more negative above the threshold raises it, along the ROC's slope (Pepe 2003, 5.2.3).
    half = min(len(negatives) ** (-1 / 3), specificity, 1 - specificity) / 2
    low, high = np.quantile(negatives, [specificity - half, specificity + half])
    slope = float(((score > low) & (score <= high))[positive].mean()) / (2 * half) if half else 0.0
    of_negative = -slope * (hits - hits[~positive].mean()) / len(negatives)
    return value, np.where(positive, (hits - value) / positive.sum(), of_negative)


def _estimate_log_loss(
    positive: npt.NDArray[np.bool_], score: Floats, patient: npt.NDArray[Any]
) -> tuple[float, Floats]:
    losses = cross_validated_losses("platt", positive, score, patient, seed=0)
    value = -float(losses.mean())
    return value, (-losses - value) / len(losses)


def _clustered_error(influence: Floats, patient: npt.NDArray[Any]) -> float:
    name, index = np.unique(patient, return_inverse=True)
    if len(name) < 2:
        raise MetricError("a standard error needs two patients")
    sums = np.bincount(index, influence, minlength=len(name))
    return float(np.sqrt(len(name) / (len(name) - 1) * (sums**2).sum()))
