"""Two models on the same studies, in whatever order; other studies are refused."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pneumo.errors import DataError
from pneumo.evaluation import bootstrap, ranking
from pneumo.evaluation.comparison import compare
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.predictions import sigmoid
from tests import present
from tests.estimates import width
from tests.predictions import make_plain, make_predictions

pytestmark = pytest.mark.processors


def two_models(n=1000, noise=1.0):
    first = make_predictions(n, images_per_patient=2)
    first = dataclasses.replace(first, calibrated_probability=first.probability)
    rng = np.random.default_rng(7)
    logit = (first.logit + noise * rng.normal(size=n)).astype(np.float32)
    second = dataclasses.replace(
        first, logit=logit, probability=sigmoid(logit), calibrated_probability=sigmoid(logit)
    )
    return first, second


def test_difference_equals_scikit_learn_in_any_order_of_the_rows():
    first, second = two_models()
    shuffled = second.take(np.random.default_rng(0).permutation(1000))
    found = compare(first, shuffled, resamples=300, seed=0)
    aurocs = [roc_auc_score(rows.target, rows.logit) for rows in (first, second)]
    precisions = [average_precision_score(rows.target, rows.logit) for rows in (first, second)]
    assert (found.n, found.patients) == (1000, 500)
    assert found.auroc.first.value == pytest.approx(aurocs[0])
    assert found.auroc.second.value == pytest.approx(aurocs[1])
    assert found.auroc.difference.value == pytest.approx(aurocs[0] - aurocs[1])
    assert found.average_precision.difference.value == pytest.approx(precisions[0] - precisions[1])
    assert present(found.brier.difference.value) < 0
    for test in (found.auroc_delong, found.auroc_delong_clustered):
        assert test.difference.value == pytest.approx(aurocs[0] - aurocs[1])
        assert present(test.p_value) < 0.001
        assert test.difference.low == pytest.approx(found.auroc.difference.low, abs=0.012)
    assert json.dumps(as_json(found), allow_nan=False)
    assert compare(first, second, resamples=300, seed=0) == found

    turned = compare(second, first, resamples=300, seed=0)
    assert turned.auroc.difference.value == pytest.approx(aurocs[1] - aurocs[0])


def test_pairing_makes_the_interval_narrow():
    first, second = two_models(noise=0.1)
    found = compare(first, second, resamples=300, seed=0).auroc
    assert width(found.difference) < width(found.first) / 3


def test_a_model_beside_itself_differs_by_nothing():
    first, _ = two_models()
    found = compare(first, first, resamples=100, seed=0)
    assert found.auroc.difference.value == 0
    assert found.auroc.difference.low is None
    assert found.auroc_delong.p_value is None


def test_equal_models_are_seldom_called_different():
    small = 0
    for seed in range(60):
        rows = make_predictions(300, seed=seed)
        rng = np.random.default_rng(seed)
        one, two = (
            dataclasses.replace(rows, logit=(rows.logit + rng.normal(size=300)).astype(np.float32))
            for _ in range(2)
        )
        found = compare(one, two, resamples=100, seed=0)
        small += present(found.auroc_delong_clustered.p_value) < 0.05
    assert small <= 8


@pytest.mark.parametrize("positives", [2, 4, 5, 8, 20])
def test_intervals_depend_on_the_patients_of_the_rarer_class(positives):
    rows = make_plain(100, target=np.arange(100) < positives)
    rng = np.random.default_rng(1)
    other = dataclasses.replace(rows, logit=rng.normal(size=100).astype(np.float32))
    found = compare(rows, other, resamples=400, seed=0).auroc
    rule = bootstrap.resample(
        rows.patient,
        {"auroc": ranking.auroc_statistic(rows.target, rows.logit)},
        resamples=400,
        seed=0,
        effective_patients=positives,
    )
    assert found.first == rule["auroc"].estimate()
    assert (found.difference.low is None) == (positives < 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.take(np.arange(3, 1000)), "3 studies are scored by the first alone"),
        (lambda rows: rows.take(np.append(np.arange(1000), 0)), "the second scores 1 studies more"),
        (lambda rows: dataclasses.replace(rows, target=1 - rows.target), "differ in their target"),
        (
            lambda rows: dataclasses.replace(rows, patient=rows.key),
            "1000 studies differ in their patient",
        ),
    ],
)
def test_other_studies_are_refused(change, message):
    first, second = two_models()
    with pytest.raises(DataError, match=message):
        compare(first, change(second), resamples=100, seed=0)


def test_what_cannot_be_compared_says_why():
    first, second = two_models()
    diverged = dataclasses.replace(second, logit=np.full(1000, np.nan, dtype=np.float32))
    found = compare(first, diverged, resamples=100, seed=0)
    assert "1000 of 1000 scores are NaN" in present(found.auroc.difference.reason)
    assert "NaN" in present(found.auroc_delong.difference.reason)
    one_class = [dataclasses.replace(r, target=np.zeros(1000, np.int8)) for r in (first, second)]
    found = compare(*one_class, resamples=100, seed=0)
    assert "one class only" in present(found.auroc.first.reason)
    assert found.brier.difference.value is not None
