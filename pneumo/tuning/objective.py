"""What a trial of a search is judged by: one number of val, higher is better, and how sure it is.

An estimate keeps what each study adds to the number (its influence), so that the standard error is
one of patients, and so that two trials, judged on the same studies, are compared in pairs: what is
hard for both cancels out. `auroc`: placements (DeLong 1988, by patient as in Obuchowski 1997).
`sensitivity`: at the lowest threshold that keeps the specificity on val, whose own error counts.
`log_loss` (negative, in nats): after Platt's calibration under 5-fold cross-validation by patient,
since a weight of positives shifts every logit and the loss would count that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pneumo.config import TuneConfig
from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import Floats
from pneumo.evaluation.calibration import cross_validated_losses
from pneumo.evaluation.delong import placements
from pneumo.evaluation.metrics import check_scores

Objective = Literal["auroc", "sensitivity", "log_loss"]


@dataclass(frozen=True, eq=False)
class ObjectiveEstimate:
    """The objective on val."""

    value: float
    """Higher is better."""
    influence: Floats
    """(N,): how much each study moves the value; sums to 0."""
    patient: npt.NDArray[Any]
    """(N,): whose study it is."""

    @property
    def standard_error(self) -> float:
        """Of the value, with patients as the independent unit."""
        return _clustered_error(self.influence, self.patient)

    def error_of_difference(self, other: Self) -> float:
        """The standard error of the difference to another estimate of the same studies."""
        return _clustered_error(self.influence - other.influence, self.patient)


def estimate_objective(
    target: npt.ArrayLike, logit: npt.ArrayLike, patient: npt.NDArray[Any], config: TuneConfig
) -> ObjectiveEstimate:
    """The objective of `config` from targets, logits and patients (N,) of val.

    Raises MetricError where it is not defined: one class only, a NaN.
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
    """The objective where every study has the same score; what a failed trial counts."""
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
    """What the number is, for figures."""
    names: dict[Objective, str] = {
        "auroc": "AUROC on val",
        "sensitivity": f"sensitivity on val at specificity {config.specificity:g}",
        "log_loss": "−log loss on val, calibrated",
    }
    return names[config.objective]


def describe_objective(config: TuneConfig) -> str:
    """The same, and over how many epochs."""
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
    # The lowest threshold above which no more negatives are called than allowed.
    kept = math.ceil(specificity * len(negatives) - 1e-9)
    threshold = negatives[kept - 1]
    hits = score > threshold
    value = float(hits[positive].mean())
    # A negative more above the threshold moves it up, along the ROC's slope (Pepe 2003, 5.2.3).
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
