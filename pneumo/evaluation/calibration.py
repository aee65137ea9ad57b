"""Calibration: how far a probability can be trusted, and how it is corrected on val.

Temperature scaling (Guo 2017) and Platt's scaling (1999) are fitted on val by maximum likelihood
and used where they are better than nothing; test only reports. A weight of positives in training
shifts every logit by its logarithm, which only Platt's intercept can take back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import Floats, as_json
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.operating_points import check_enough
from pneumo.evaluation.predictions import Predictions, sigmoid

Method = Literal["none", "temperature", "platt"]
"""From the simplest to the one with most numbers."""

FOLDS = 5
RULE = (
    "the simplest of none, temperature and Platt whose log loss on val, under "
    f"{FOLDS}-fold cross-validation by patient, is within one standard error of the lowest"
)


@dataclass(frozen=True)
class Scaling:
    """Calibrated probability = sigmoid(slope * logit + intercept); a temperature is 1 / slope."""

    method: Method
    slope: float
    intercept: float
    log_loss: float
    """On val in nats, cross-validated by patient."""

    def apply(self, logit: npt.ArrayLike) -> Floats:
        """The calibrated probabilities of logits of any shape."""
        return sigmoid(self.slope * np.asarray(logit, dtype=np.float64) + self.intercept)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `temperature` too where it is one."""
        numbers = as_json(self, leave_out={"method"})
        if self.method == "temperature":
            numbers["temperature"] = 1 / self.slope
        return dict(numbers)


@dataclass(frozen=True)
class Calibration:
    """Both scalings as fitted on val, and which one is used."""

    chosen: Scaling | None
    """None where val can't be calibrated on; of method "none" where that is as good as scaling."""
    temperature: Scaling | None
    """As fitted; None where its slope is not above 0, as `platt`."""
    platt: Scaling | None
    log_loss_before: float | None
    """On val in nats, of the logits as they are."""
    reason: str | None = None
    """Why there is none."""

    def apply(self, logit: npt.NDArray[Any]) -> Floats:
        """The calibrated probabilities (N,); NaN where there is no calibration."""
        if self.chosen is None:
            return np.full(len(logit), np.nan)
        return self.chosen.apply(logit)

    def to_json(self) -> dict[str, Any]:
        """The chosen one flat, both as they were fitted, and the rule."""
        chosen = self.chosen
        return {
            "method": None if chosen is None else chosen.method,
            **({} if chosen is None else chosen.to_json()),
            "chosen_on": "val",
            "rule": RULE,
            "log_loss_before": self.log_loss_before,
            "fitted": {
                "temperature": as_json(self.temperature),
                "platt": as_json(self.platt),
            },
            **({} if self.reason is None else {"reason": self.reason}),
        }


def calibrate(val: Predictions, *, min_patients: int, seed: int) -> Calibration:
    """Both scalings fitted on `val`, and the one that RULE chooses.

    There is none where `val` has fewer than `min_patients` patients of a class, or can't be ranked.
    Where the free one, Platt's, would turn the order round (slope not above 0), neither is used: a
    temperature cannot turn the order of logits round that are all of one sign.
    """
    try:
        positive, logit = check_scores(val.target, val.logit)
        check_enough(val, "youden", min_patients)
    except MetricError as error:
        return Calibration(None, None, None, None, f"val: {error}")
    folds = _draw_folds(val.patient, seed)
    losses = {"none": _log_losses(positive, logit)}
    before = float(np.mean(losses["none"]))
    fitted: dict[str, Scaling] = {"none": Scaling("none", 1.0, 0.0, before)}
    for method in ("temperature", "platt"):
        slope, intercept = fit_scaling(method, positive, logit)
        if slope > 0:
            scaled = _scale_by_others(method, positive, logit, folds)
            losses[method] = _log_losses(positive, scaled)
            fitted[method] = Scaling(method, slope, intercept, float(np.mean(losses[method])))
    if "platt" not in fitted:
        reason = "val: a higher logit does not mean a higher risk, so scaling can't correct it"
        return Calibration(None, None, None, before, reason)
    chosen = fitted[_choose_simplest(losses, val.patient)]
    return Calibration(chosen, fitted.get("temperature"), fitted["platt"], before)


def _choose_simplest(losses: Mapping[str, Floats], patient: npt.NDArray[Any]) -> str:
    """The first whose mean loss is above the lowest by no more than the standard error of that
    difference, whose studies are alike within a patient."""
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    _, index = np.unique(patient, return_inverse=True)

    def is_close(loss: Floats) -> bool:
        excess = loss - best
        by_patient = np.bincount(index, excess - excess.mean())
        return bool(excess.mean() <= math.sqrt(float((by_patient**2).sum())) / len(excess))

    return next(method for method, loss in losses.items() if is_close(loss))


def fit_scaling(method: Method, target: npt.ArrayLike, logit: npt.ArrayLike) -> tuple[float, float]:
    """Slope and intercept of the greatest likelihood; the intercept of a temperature is 0.

    The targets are Platt's, (P + 1) / (P + 2) and 1 / (Q + 2) of P positives and Q negatives: as if
    one more study of each class had been seen. That keeps the fit finite where the logits
    separate the classes, and does not matter where there are many. Raises MetricError.
    """
    from sklearn.linear_model import LogisticRegression  # a second; who only applies has no need

    positive, logit64 = check_scores(target, logit)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    soft = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    reach = float(np.abs(logit64).max())
    if np.ptp(logit64) == 0 or reach == 0:
        return 0.0, 0.0  # logits without information
    # A soft target is a study of either class, each with a weight.
    model = LogisticRegression(
        C=np.inf, fit_intercept=method == "platt", solver="newton-cholesky", tol=1e-10
    )
    both = np.concatenate([logit64, logit64])[:, None] / reach
    classes = np.repeat([1, 0], len(logit64))
    model.fit(both, classes, sample_weight=np.concatenate([soft, 1 - soft]))
    slope = float(model.coef_[0, 0]) / reach
    if method == "temperature":
        return max(slope, 0.0), 0.0  # 0: a higher logit means a lower risk
    return slope, float(model.intercept_[0])


def cross_validated_losses(
    method: Method,
    target: npt.ArrayLike,
    logit: npt.ArrayLike,
    patient: npt.NDArray[Any],
    *,
    seed: int,
) -> Floats:
    """The log loss in nats of each study (N,), scaled by a fit on the other folds' patients.

    Raises MetricError for one class only, a NaN or an infinity.
    """
    positive, logit64 = check_scores(target, logit)
    scaled = _scale_by_others(method, positive, logit64, _draw_folds(patient, seed))
    return _log_losses(positive, scaled)


def _scale_by_others(
    method: Method, positive: npt.NDArray[np.bool_], logit: Floats, folds: npt.NDArray[np.intp]
) -> Floats:
    scaled = np.empty(len(logit))
    for fold in range(FOLDS):
        held_out = folds == fold
        try:
            slope, intercept = fit_scaling(method, positive[~held_out], logit[~held_out])
        except MetricError:  # a fold of one class only
            slope, intercept = 1.0, 0.0
        scaled[held_out] = slope * logit[held_out] + intercept
    return scaled


def _draw_folds(patient: npt.NDArray[Any], seed: int) -> npt.NDArray[np.intp]:
    """The fold of each study, 0 to FOLDS - 1; a patient's studies share one. (N,)"""
    name, index = np.unique(patient, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(name))
    return np.asarray(order[index] % FOLDS)


def _log_losses(positive: npt.NDArray[np.bool_], logit: Floats) -> Floats:
    return np.logaddexp(0, np.where(positive, -logit, logit))
