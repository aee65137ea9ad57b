"""What a trial is judged by: the number beside a reference, its error beside resampling."""

import math

import numpy as np
import pytest
from scipy.special import logit as logit_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GroupKFold, cross_val_predict

from pneumo.config import Config, TuneConfig
from pneumo.config_layers import override
from pneumo.errors import MetricError
from pneumo.evaluation.delong import delong, delong_test
from pneumo.evaluation.estimates import Z_95, count_equal_patients, t_quantile
from pneumo.tuning.objective import (
    Objective,
    chance_level,
    describe_objective,
    estimate_objective,
    name_objective,
    smooth,
)

pytestmark = pytest.mark.processors

OBJECTIVES: tuple[Objective, ...] = ("auroc", "sensitivity", "log_loss")


def config_of(objective: str, **more: object) -> TuneConfig:
    changes = {"objective": objective, **more}
    return override(Config(), {f"tune.{name}": value for name, value in changes.items()}).tune


def draw(
    seed: int, patients: int = 300, shift: float = 1.2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, logits and patients; studies of one patient are alike."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    own = rng.normal(0, 0.7, patients)[patient]
    target = (rng.random(len(patient)) < 0.3).astype(np.int8)
    return target, own + shift * target + rng.normal(0, 0.7, len(patient)) - 1, patient.astype(str)


def test_auroc_and_its_error_are_delongs_by_patient() -> None:
    target, logit, patient = draw(0)
    found = estimate_objective(target, logit, patient, config_of("auroc"))
    assert found.value == pytest.approx(roc_auc_score(target, logit))
    reference = delong(target, logit, patient)
    assert reference.high is not None
    assert reference.value is not None
    slope = reference.value * (1 - reference.value)  # its interval is made on the logit's scale
    expected = float(logit_of(reference.high) - logit_of(reference.value)) * slope / Z_95
    # Obuchowski corrects each class for its own number of patients, we the whole for all.
    assert found.standard_error == pytest.approx(expected, rel=0.01)
    assert found.influence.sum() == pytest.approx(0, abs=1e-12)


def test_error_of_a_difference_is_that_of_the_paired_test() -> None:
    target, first, patient = draw(1)
    second = first + np.random.default_rng(5).normal(0, 0.5, len(first))
    config = config_of("auroc")
    one, other = (
        estimate_objective(target, first, patient, config),
        estimate_objective(target, second, patient, config),
    )
    reference = delong_test(target, first, second, patient).difference
    assert reference.high is not None
    assert reference.value is not None
    size = min(count_equal_patients(patient[target == one]) for one in (0, 1))
    expected = (reference.high - reference.value) / t_quantile(size)
    assert one.error_of_difference(other) == pytest.approx(expected, rel=0.01)
    # In pairs a difference is surer than either value alone.
    assert one.error_of_difference(other) < one.standard_error


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95])
def test_sensitivity_is_the_roc_curves(specificity: float) -> None:
    target, logit, patient = draw(2)
    found = estimate_objective(
        target, logit, patient, config_of("sensitivity", specificity=specificity)
    )
    false_positive_rate, sensitivity, _ = roc_curve(target, logit, drop_intermediate=False)
    assert found.value == pytest.approx(
        sensitivity[false_positive_rate <= 1 - specificity + 1e-9].max()
    )


def test_sensitivity_with_ties_keeps_the_specificity() -> None:
    target = np.array([0, 0, 0, 0, 1, 1])
    logit = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    patient = np.arange(6).astype(str)
    found = estimate_objective(target, logit, patient, config_of("sensitivity", specificity=0.5))
    assert found.value == 0.5  # at 1.0 or above three of four negatives would be called


def test_log_loss_does_not_see_a_shift_that_pos_weight_makes() -> None:
    target, logit, patient = draw(3)
    config = config_of("log_loss")
    plain, shifted = (
        estimate_objective(target, logit + s, patient, config).value for s in (0.0, math.log(5))
    )
    assert shifted == pytest.approx(plain, abs=1e-3)


def test_log_loss_is_near_a_cross_validated_logistic_regression() -> None:
    target, logit, patient = draw(4, patients=800)
    found = estimate_objective(target, logit, patient, config_of("log_loss"))
    probability = cross_val_predict(
        LogisticRegression(C=1e6),
        logit[:, None],
        target,
        groups=patient,
        cv=GroupKFold(5),
        method="predict_proba",
    )[:, 1]
    reference = np.mean(np.where(target, np.log(probability), np.log1p(-probability)))
    assert found.value == pytest.approx(reference, abs=2e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_error_is_what_new_patients_would_show(objective: Objective) -> None:
    config = config_of(objective)
    drawn = [estimate_objective(*draw(seed), config) for seed in range(60)]
    spread = np.std([one.value for one in drawn], ddof=1)
    told = np.mean([one.standard_error for one in drawn])
    assert 0.8 < told / spread < 1.25


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_better_model_is_judged_better(objective: Objective) -> None:
    config = config_of(objective)
    values = [estimate_objective(*draw(7, shift=shift), config).value for shift in (0.2, 1.0, 2.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_that_says_one_thing_chance_level(objective: Objective) -> None:
    config = config_of(objective)
    target, _, patient = draw(8)
    found = estimate_objective(
        target, np.random.default_rng(0).normal(size=len(target)), patient, config
    )
    assert found.value == pytest.approx(chance_level(config, float(target.mean())), abs=0.06)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fault", ["one class", "nan"])
def test_what_cannot_be_judged_is_an_error(objective: Objective, fault: str) -> None:
    target, logit, patient = draw(9)
    if fault == "nan":
        logit[3] = np.nan
    else:
        target[:] = 0
    with pytest.raises(MetricError):
        estimate_objective(target, logit, patient, config_of(objective))


def test_smoothing_takes_the_last_epochs() -> None:
    assert smooth([0.5, 0.9, 0.7], 2) == pytest.approx(0.8)
    assert smooth([0.5], 3) == 0.5


def test_objectives_have_names_that_a_reader_understands() -> None:
    config = config_of("sensitivity", specificity=0.8, epochs=3)
    assert name_objective(config) == "sensitivity on val at specificity 0.8"
    assert describe_objective(config_of("auroc")) == "AUROC on val, mean of the last 2 epochs"
