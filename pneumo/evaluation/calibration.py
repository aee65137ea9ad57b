"""Calibration: the probabilities are corrected on val.

Temperature scaling (Guo 2017) and Platt scaling (1999) are fitted on val by maximum likelihood and
used where they improve the log loss. A positive-class weight in training shifts every logit by the
logarithm of the weight; only Platt's intercept can correct that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.estimates import Floats, as_json
from pneumo.evaluation.metrics import check_scores
from pneumo.evaluation.operating_points import check_enough
from pneumo.evaluation.predictions import Predictions, sigmoid

Method = Literal["none", "temperature", "platt"]
"""In the order of the number of parameters."""

FOLDS = 5
RULE = (
    "the simplest of none, temperature and Platt whose log loss on val, under "
    f"{FOLDS}-fold cross-validation by patient, is within one standard error of the lowest"
)

NOT_RANKED = "a higher logit does not mean a higher risk, so scaling can't correct it"


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
        """The fields by name without the method, and `temperature` for temperature scaling."""
        numbers = as_json(self, leave_out={"method"})
        if self.method == "temperature":
            numbers["temperature"] = 1 / self.slope
        return dict(numbers)


@dataclass(frozen=True)
class Calibration:
    """Both scalings as fitted on val, and the one that is used."""

    chosen: Scaling | None
    """None where no calibration can be fitted; of method "none" where scaling is no better."""
    temperature: Scaling | None
    """None where its slope is not above 0."""
    platt: Scaling | None
    """None where its slope is not above 0."""
    log_loss_before: float | None
    """On val in nats, of the unscaled logits."""
    reason: str | None = None
    """Why there is no calibration."""

    def apply(self, logit: npt.NDArray[Any]) -> Floats:
        """The calibrated probabilities (N,); NaN where there is no calibration."""
        if self.chosen is None:
            return np.full(len(logit), np.nan)
        return self.chosen.apply(logit)

    def to_json(self) -> dict[str, Any]:
        """The fields of the chosen scaling, both fitted scalings, and the rule."""
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

    None is used where `val` has fewer than `min_patients` patients of a class, or an unusable
    score. Nor where the slope of Platt scaling is not above 0, which would reverse the order of the
    scores; a temperature does not show that where all logits have the same sign.
    """
    try:
        positive, logit = check_scores(val.target, val.logit)
        check_enough(val, "youden", min_patients)
    except MetricError as error:
        return Calibration(None, None, None, None, f"val: {error}")
    losses = {"none": _log_losses(positive, logit)}
    before = float(np.mean(losses["none"]))
    fitted: dict[str, Scaling] = {"none": Scaling("none", 1.0, 0.0, before)}
    for method in ("temperature", "platt"):
        slope, intercept = fit_scaling(method, positive, logit)
        if slope > 0:
            losses[method] = cross_validated_losses(method, positive, logit, val.patient, seed=seed)
            fitted[method] = Scaling(method, slope, intercept, float(np.mean(losses[method])))
    if "platt" not in fitted:
        return Calibration(None, None, None, before, f"val: {NOT_RANKED}")
    chosen = fitted[_choose_simplest(losses, val.patient)]
    return Calibration(chosen, fitted.get("temperature"), fitted["platt"], before)


def _choose_simplest(losses: Mapping[str, Floats], patient: npt.NDArray[Any]) -> str:
    """The first method whose mean loss exceeds the lowest by at most one standard error of the
    difference, clustered by patient."""
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    _, index = np.unique(patient, return_inverse=True)

    def is_close(loss: Floats) -> bool:
        excess = loss - best
        by_patient = np.bincount(index, excess - excess.mean())
        return bool(excess.mean() <= math.sqrt(float((by_patient**2).sum())) / len(excess))

    return next(method for method, loss in losses.items() if is_close(loss))


def fit_scaling(method: Method, target: npt.ArrayLike, logit: npt.ArrayLike) -> tuple[float, float]:
    """Slope and intercept of maximum likelihood; the intercept of a temperature is 0.

    The targets are Platt's: (P + 1) / (P + 2) and 1 / (Q + 2) for P positives and Q negatives, as
    if there were one more study of each class. The fit is then finite where the logits separate the
    classes; with many studies it makes no difference. Raises MetricError.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    positive, logit64 = check_scores(target, logit)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    soft = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    reach = float(np.abs(logit64).max())
    if np.ptp(logit64) == 0 or reach == 0:
        return 0.0, 0.0  # logits without information
    # A study with a soft target is one study of each class, with weights.
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
    """The log loss in nats of each study (N,), scaled by a fit on the patients of the other folds.

    Raises MetricError for one class only, a NaN or an infinity.
    """
    positive, logit64 = check_scores(target, logit)
    name, index = np.unique(patient, return_inverse=True)
    folds = np.random.default_rng(seed).permutation(len(name))[index] % FOLDS
    scaled = np.empty(len(logit64))
    for fold in range(FOLDS):
        held_out = folds == fold
        try:
            slope, intercept = fit_scaling(method, positive[~held_out], logit64[~held_out])
        except MetricError:  # a fold of one class only
            slope, intercept = 1.0, 0.0
        scaled[held_out] = slope * logit64[held_out] + intercept
    return _log_losses(positive, scaled)


def _log_losses(positive: npt.NDArray[np.bool_], logit: Floats) -> Floats:
    return np.logaddexp(0, np.where(positive, -logit, logit))
