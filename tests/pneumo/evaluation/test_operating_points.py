"""Chosen on val or not at all; judged by Wilson, by patients, and at other prevalences."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo.config import EvaluateConfig
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.operating_points import (
    DECISION,
    PREVALENCES,
    SCREENING,
    OperatingPoint,
    choose_points,
    evaluate_points,
    predictive_values,
)
from tests import present
from tests.estimates import width
from tests.predictions import evaluate_threshold, make_predictions, with_scores

pytestmark = pytest.mark.processors

CONFIG = EvaluateConfig()


def test_every_rule_keeps_on_val_what_it_says():
    val = make_predictions(600, images_per_patient=2)
    points = choose_points(val, CONFIG)
    assert list(points) == [
        "decision", "screening", "youden", "sensitivity_90", "sensitivity_95", "specificity_90",
    ]  # fmt: skip
    assert points[DECISION].threshold == points["youden"].threshold
    assert points[SCREENING].threshold == points["sensitivity_90"].threshold
    for name, key, wanted in (
        ("sensitivity_90", "recall", 0.90),
        ("sensitivity_95", "recall", 0.95),
        ("specificity_90", "specificity", 0.90),
    ):
        threshold = present(points[name].threshold)
        counts = metrics.confusion(val.target, val.probability, threshold)
        assert wanted <= metrics.rates(counts)[key] < wanted + 0.02, name


def test_a_target_is_told_in_full():
    val = make_predictions(600)
    for target, words in ((0.9, "0.90"), (0.904, "0.904"), (0.9000001, "0.9000001"), (1.0, "1.00")):
        config = EvaluateConfig(operating_point="sensitivity", sensitivity=target)
        assert choose_points(val, config)[DECISION].rule == f"sensitivity ≥ {words}"


@pytest.mark.parametrize(
    ("positives", "missing"),
    [
        (3, {"decision", "screening", "youden", "sensitivity_90", "sensitivity_95"}),
        (12, {"sensitivity_95"}),
        (20, set()),
        (597, {"decision", "youden", "specificity_90"}),
    ],
)
def test_a_val_too_small_for_a_rule_gives_no_threshold(positives, missing):
    val = make_predictions(600)
    val = dataclasses.replace(val, target=(np.arange(600) < positives).astype(np.int8))
    points = choose_points(val, CONFIG)
    assert {name for name, point in points.items() if point.threshold is None} == missing
    for name in missing:
        assert "val: too small: " in present(points[name].reason)
        assert "are needed" in present(points[name].reason)


def test_it_is_patients_that_must_be_enough():
    val = make_predictions(600)
    one_patient = dataclasses.replace(val, patient=np.where(val.target == 1, "p", val.patient))
    point = choose_points(one_patient, CONFIG)["youden"]
    assert point.reason == "val: too small: 1 patients with a positive study, 10 are needed"


shares = st.floats(0.01, 0.99)


@given(shares, shares, shares)
def test_predictive_values_equal_counting_a_population(sensitivity, specificity, prevalence):
    ppv, npv = predictive_values(np.array([sensitivity]), np.array([specificity]), prevalence)
    tp, fn = prevalence * sensitivity, prevalence * (1 - sensitivity)
    tn, fp = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
    assert ppv[0] == pytest.approx(tp / (tp + fp))
    assert npv[0] == pytest.approx(tn / (tn + fn))


def test_predictive_values_at_the_splits_own_prevalence_are_its_precision_and_npv():
    rows = make_predictions(400)
    found = evaluate_threshold(rows, 0.3)
    own = [
        predictive_values(
            np.array([found.rates["recall"].value]), np.array([found.rates["specificity"].value]),
            rows.target.mean(),
        )
    ]  # fmt: skip
    assert own[0][0][0] == pytest.approx(found.rates["precision"].value)
    assert own[0][1][0] == pytest.approx(found.rates["npv"].value)

    assert [values.prevalence for values in found.at_prevalence] == list(PREVALENCES)
    values = [present(v.ppv.value) for v in found.at_prevalence]
    assert values == sorted(values)
    for one in found.at_prevalence:
        for estimate in (one.ppv, one.npv):
            assert present(estimate.low) < present(estimate.value) < present(estimate.high)


def test_predictive_values_of_a_perfect_split_still_have_an_interval():
    found = evaluate_threshold(with_scores([0] * 30 + [1] * 20, np.arange(50) / 50), 0.6)
    ppv = found.at_prevalence[0].ppv
    assert (ppv.value, ppv.high) == (1.0, 1.0)
    assert 0.1 < present(ppv.low) < 0.9
    assert ppv.method.startswith("at the ends")


def test_a_sensitivity_of_1_is_not_taken_as_known_in_what_is_computed_of_it():
    called = np.arange(600) % 5 < 2  # specificity 0.60
    rows = with_scores([1] * 15 + [0] * 600, np.r_[np.full(15, 0.9), np.where(called, 0.8, 0.1)])
    found = evaluate_threshold(rows, 0.5, resamples=500)
    recall, specificity = (found.rates[key] for key in ("recall", "specificity"))
    assert (recall.value, recall.method) == (1.0, "Wilson over patients")
    low, own = present(recall.low), present(specificity.value)  # about 0.80, 0.60

    balanced = found.rates["balanced_accuracy"]
    assert balanced.method == "Newcombe, of both intervals"
    assert present(balanced.low) < (low + own) / 2
    assert present(balanced.high) == pytest.approx((1 + present(specificity.high)) / 2)
    assert present(found.rates["lr_positive"].low) < low / (1 - own)
    negative = found.rates["lr_negative"]
    assert (negative.value, negative.low) == (0.0, 0.0)
    assert present(negative.high) > (1 - low) / own
    at_10 = found.at_prevalence[1]
    expected = predictive_values(np.array([low]), np.array([own]), 0.10)
    for estimate, bound in zip((at_10.ppv, at_10.npv), expected, strict=True):
        assert present(estimate.low) < bound[0]


def test_a_proportion_has_the_sample_size_of_its_own_denominator():
    score = np.where(np.arange(1000) % 5, 0.1, 0.8)
    for positives in (3, 5):  # too few for an interval; few
        rows = with_scores(
            [1] * positives + [0] * 1000, np.r_[np.linspace(0.3, 0.9, positives), score]
        )
        found = evaluate_threshold(rows, 0.5, resamples=500)
        assert width(found.rates["specificity"]) == pytest.approx(0.05, abs=0.007)
        assert (found.rates["recall"].low is None) == (positives < 5)


def test_wilson_stands_beside_the_bootstrap_and_is_narrower_where_patients_recur():
    rows = make_predictions(600, images_per_patient=6)
    alike = dataclasses.replace(
        rows, logit=np.repeat(rows.logit[::6], 6), target=np.repeat(rows.target[::6], 6)
    )
    found = evaluate_threshold(alike, 0.3, resamples=500)
    for key in ("accuracy", "recall", "specificity", "precision", "npv"):
        by_image, by_patient = found.wilson[key], found.rates[key]
        assert by_image.value == by_patient.value
        assert by_image.method == "Wilson, images taken as independent"
        assert width(by_patient) > 1.5 * width(by_image), key


def test_patients_of_whom_one_has_most_studies_are_few():
    rows = make_predictions(600)
    one_has_most = dataclasses.replace(rows, patient=np.where(np.arange(600) < 500, "p", rows.key))
    found = evaluate_threshold(one_has_most, 0.3, resamples=200)
    for rate in found.rates.values():
        assert rate.value is not None
        assert (rate.low, rate.high) == (None, None)
        assert "they tell as much as 1 " in present(rate.reason)
    assert one_has_most.count_patients(one_has_most.target == 1) > 15


def test_nothing_is_said_without_a_threshold_or_a_class():
    rows = make_predictions(100)
    points = {"p": OperatingPoint("p", "", None, "val: because")}
    nothing = evaluate_points(rows, points, bootstrap.StatisticSet({}))["p"]
    assert nothing.counts is None
    assert nothing.rates["recall"].reason == "no threshold: val: because"
    assert nothing.at_prevalence[0].ppv.reason == "no threshold: val: because"

    no_positive = evaluate_threshold(with_scores([0, 0, 0], [0.1, 0.2, 0.9]), 0.5)
    assert no_positive.wilson["recall"].reason == "no study is positive"
    assert no_positive.at_prevalence[0].npv.value is None
    assert no_positive.at_prevalence[0].npv.reason == "no study is positive"
    assert json.dumps(no_positive.to_json(), allow_nan=False)
