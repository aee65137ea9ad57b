"""Every metric against a published implementation, and against what must hold for any input."""

import json
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import ray
import scipy.special
import scipy.stats
import sklearn.metrics as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_confusion_matrix,
    binary_f1_score,
    binary_matthews_corrcoef,
    binary_precision,
    binary_recall,
    binary_specificity,
)

from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, estimates, metrics, ranking
from pneumo.evaluation.delong import delong
from pneumo.evaluation.logistic_regression import LogitSample
from pneumo.evaluation.reliability import reliability_statistics
from tests import present
from tests.estimates import contains, patient_bootstrap, width
from tests.examples import examples
from tests.predictions import evaluate_threshold, with_scores

pytestmark = pytest.mark.processors

relaxed = examples(50)


@st.composite
def scored(draw, min_size=2, max_size=60):
    """Targets of both classes and scores of few distinct values, so that ties are common."""
    size = draw(st.integers(min_size, max_size))
    target = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    target[0], target[1] = 0, 1
    levels = draw(st.integers(1, 12))
    score = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    return np.array(target, dtype=np.int8), np.array(score, dtype=np.float64) / levels


def simulated(num_patients=300, images_per_patient=1, seed=0, effect=1.5, cluster=0.0):
    """(patient, target, logit): target and a share of the score are the patient's own."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), images_per_patient)
    target = (rng.random(num_patients) < 0.3)[patient]
    own = rng.normal(size=num_patients)[patient]
    noise = rng.normal(size=len(patient))
    logit = effect * target + math.sqrt(cluster) * own + math.sqrt(1 - cluster) * noise
    return patient, target.astype(np.int8), logit.astype(np.float32)


def value_of(statistic, size):
    return float(statistic(np.ones((size, 1)))[0])


# --- against references ---------------------------------------------------------------------------


@relaxed
@given(scored())
def test_auroc_and_average_precision_equal_scikit_learn_and_torchmetrics(data):
    target, score = data
    tensors = torch.tensor(score), torch.tensor(target, dtype=torch.int64)

    auroc = metrics.auroc(target, score)
    assert auroc == pytest.approx(reference.roc_auc_score(target, score), abs=1e-12)
    assert auroc == pytest.approx(float(binary_auroc(*tensors)), abs=1e-6)
    assert value_of(ranking.auroc_statistic(target, score), len(target)) == auroc

    precision = value_of(ranking.average_precision_statistic(target, score), len(target))
    assert precision == pytest.approx(reference.average_precision_score(target, score), abs=1e-12)
    assert precision == pytest.approx(float(binary_average_precision(*tensors)), abs=1e-6)


@relaxed
@given(scored(), st.sampled_from([0.05, 0.3, 0.55, 0.95]))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_rates_equal_scikit_learn_and_torchmetrics(data, threshold):
    target, probability = data
    called = (probability >= threshold).astype(int)
    counts = metrics.confusion(target, probability, threshold)
    found = metrics.rates(counts)
    tensors = torch.tensor(called), torch.tensor(target, dtype=torch.int64)
    expected: dict[str, tuple[float, Callable[..., torch.Tensor] | None]] = {
        "accuracy": (reference.accuracy_score(target, called), binary_accuracy),
        "precision": (reference.precision_score(target, called), binary_precision),
        "recall": (reference.recall_score(target, called), binary_recall),
        "f1": (reference.f1_score(target, called), binary_f1_score),
        "specificity": (reference.recall_score(1 - target, 1 - called), binary_specificity),
        "mcc": (reference.matthews_corrcoef(target, called), binary_matthews_corrcoef),
        "npv": (reference.precision_score(1 - target, 1 - called), None),
    }

    assert [[counts.tn, counts.fp], [counts.fn, counts.tp]] == (
        binary_confusion_matrix(*tensors).tolist()
    )
    for name, (by_sklearn, by_torchmetrics) in expected.items():
        if math.isnan(found[name]):  # both references call an undefined rate 0
            assert by_sklearn == 0
            continue
        assert found[name] == pytest.approx(by_sklearn, abs=1e-12), name
        if by_torchmetrics is not None:
            assert found[name] == pytest.approx(float(by_torchmetrics(*tensors)), abs=1e-6), name


def test_log_loss_and_brier_equal_scikit_learn():
    _, target, logit = simulated()
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))

    losses = reliability_statistics(LogitSample.of(target, logit), None, 10)["losses"]
    brier, log_loss = losses(np.ones((len(target), 1)))[:, 0]
    assert log_loss == pytest.approx(reference.log_loss(target, probability), abs=1e-12)
    assert brier == pytest.approx(reference.brier_score_loss(target, probability), abs=1e-12)
    alone = value_of(metrics.brier_statistic(target, probability), len(target))
    assert alone == pytest.approx(brier, abs=1e-12)


def test_log_loss_is_finite_where_the_probability_rounds_to_zero():
    losses = reliability_statistics(LogitSample.of([1, 0], [-800.0, 800.0]), None, 10)["losses"]
    assert losses(np.ones((2, 1)))[1, 0] == 800.0


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (3, 7), (7, 7), (811, 1000), (1, 100_000)])
def test_wilson_equals_statsmodels(hits, n):
    low, high = proportion_confint(hits, n, method="wilson")
    assert estimates.wilson(hits / n, n) == pytest.approx((low, high), abs=1e-9)


def test_sums_by_group_equal_numpys():
    rng = np.random.default_rng(0)
    code, value = rng.integers(-1, 4, 50), rng.normal(size=50)
    weights = rng.integers(0, 3, (50, 5)).astype(float)
    found = bootstrap.sums_statistic(code, 4, np.ones(50), value)(weights)
    expected = [
        (weights[code == k] * column[code == k, None]).sum(axis=0)
        for column in (np.ones(50), value)
        for k in range(4)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_wilson_equals_the_published_example():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert estimates.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert estimates.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def highest_sensitivity(target, score):
    """Of scikit-learn's thresholds that clear nine tenths of the negatives."""
    false_alarms, sensitivity, _ = reference.roc_curve(target, score, drop_intermediate=False)
    return sensitivity[false_alarms <= 0.1 + 1e-9].max()


REFERENCES = {
    ranking.auroc_statistic: reference.roc_auc_score,
    ranking.average_precision_statistic: reference.average_precision_score,
    metrics.brier_statistic: reference.brier_score_loss,
}


@relaxed
@given(scored(), st.integers(0, 2**32 - 1))
def test_weighted_statistics_equal_repeated_samples(data, seed):
    target, score = data
    times = np.random.default_rng(seed).integers(0, 4, size=len(target))
    drawn = np.repeat(np.arange(len(target)), times)
    weights = times[:, None].astype(np.float64)
    headlines = ranking.headline_statistic(target, score, 0.9)(weights)[:, 0]
    found = [
        *((build(target, score)(weights)[0], expected) for build, expected in REFERENCES.items()),
        *zip(headlines, (*list(REFERENCES.values())[:2], highest_sensitivity), strict=True),
    ]
    if len(set(target[drawn])) < 2:  # AP and Brier are the references' own business then
        return
    for value, expected in found:
        assert value == pytest.approx(expected(target[drawn], score[drawn]), abs=1e-12)


@relaxed
@given(scored(), st.integers(0, 2**32 - 1))
def test_auroc_of_some_samples_is_that_of_them_alone(data, seed):
    target, score = data
    rng = np.random.default_rng(seed)
    rows = rng.random(len(target)) < 0.7
    weights = rng.integers(0, 3, size=(len(target), 4))

    alone = ranking.auroc_statistic(target, score, rows)(weights)
    if len(set(target[rows])) == 2:
        whole = ranking.auroc_statistic(target[rows], score[rows])(weights[rows])
        np.testing.assert_allclose(alone, whole, atol=1e-12)
    else:
        assert np.isnan(alone).all()


@relaxed
@given(scored(), st.lists(st.floats(-0.1, 1.1), max_size=6))
def test_calls_at_thresholds_in_any_order_are_counted(data, chosen):
    target, score = data
    found = metrics.called_statistic(target == 1, score, chosen)(np.ones((len(target), 1)))
    expected = [
        np.count_nonzero((target == value) & (score >= threshold))
        for value in (1, 0)
        for threshold in (-math.inf, *chosen)
    ]
    assert found[:, 0].tolist() == expected


# --- what must hold -------------------------------------------------------------------------------


@relaxed
@given(scored(), st.integers(0, 2**32 - 1))
def test_auroc_ignores_order_and_monotone_transforms_and_mirrors_classes(data, seed):
    target, score = data
    auroc = metrics.auroc(target, score)
    order = np.random.default_rng(seed).permutation(len(target))

    assert metrics.auroc(target[order], score[order]) == auroc
    assert metrics.auroc(target, np.exp(3 * score) - 7) == auroc
    assert metrics.auroc(1 - target, score) == pytest.approx(1 - auroc, abs=1e-12)
    assert metrics.auroc(target, -score) == pytest.approx(1 - auroc, abs=1e-12)


def test_auroc_of_large_logits_does_not_saturate():
    target, logit = np.array([0, 1, 0, 1]), np.array([40, 60, 50, 70], dtype=np.float32)
    saturated = torch.sigmoid(torch.tensor(logit)).numpy()

    assert metrics.auroc(target, logit) == 1.0
    assert metrics.auroc(target, saturated) == 0.5  # the trap


@pytest.mark.parametrize(
    ("target", "score", "message"),
    [
        ([1, 1], [0.1, 0.2], "one class only: 2 of 2"),
        ([0, 0], [0.1, 0.2], "one class only: 0 of 2"),
        ([0, 1], [0.1, math.nan], "1 of 2 scores are NaN"),
        ([0, 1], [0.1, math.inf], "NaN or infinite"),
        ([0, 2], [0.1, 0.2], "neither 0 nor 1"),
        ([0, 1], [0.1], "one length"),
        ([], [], "no study"),
    ],
)
def test_auroc_refuses_what_it_cannot_judge(target, score, message):
    with pytest.raises(MetricError, match=message):
        metrics.auroc(target, score)


def test_curves_in_json_are_thin_and_have_no_infinity():
    _, target, logit = simulated(num_patients=5000)
    for points in (metrics.roc_points, metrics.precision_recall_points):
        content = json.loads(json.dumps(points(target, logit).to_json(), allow_nan=False))
        assert {len(column) for column in content.values()} <= set(range(50, 101))
        assert None in content["threshold"]
        assert sorted({content["x"][0], content["x"][-1]}) == [0.0, 1.0]


def test_curves_keep_their_ends_and_their_shape_in_few_points():
    _, target, logit = simulated(num_patients=20_000, effect=0.8)
    curve = metrics.roc_points(target, logit)
    precise = metrics.precision_recall_points(target, logit)

    assert max(len(curve.x), len(precise.x)) <= metrics.MAX_CURVE_POINTS
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(curve.x) >= 0)
    assert np.all(np.diff(curve.y) >= 0)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(metrics.auroc(target, logit), abs=1e-3)
    full_x, full_y, _ = reference.roc_curve(target, logit)
    assert np.abs(np.interp(full_x, curve.x, curve.y) - full_y).max() < 0.005
    assert (precise.x[0], precise.x[-1], precise.y[-1]) == (1, 0, 1)


# --- operating points -----------------------------------------------------------------------------


@relaxed
@given(scored(), st.floats(0.01, 1.0))
def test_sensitivity_threshold_is_the_highest_that_keeps_it(data, wanted):
    target, probability = data
    threshold = metrics.sensitivity_threshold(target, probability, wanted)
    positives = probability[target == 1]

    assert np.mean(positives >= threshold) >= wanted - 1e-9
    assert np.mean(positives > threshold) < wanted


@relaxed
@given(scored(), st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_specificity_threshold_is_the_lowest_that_keeps_it(data, wanted):
    target, probability = data
    threshold = metrics.specificity_threshold(target, probability, wanted)
    negatives = probability[target == 0]

    assert np.mean(negatives < threshold) >= wanted - 1e-9
    lower = probability[probability < threshold]
    assert all(np.mean(negatives < other) < wanted for other in np.unique(lower))


@relaxed
@given(scored())
def test_youden_threshold_is_not_beaten_by_any_other(data):
    target, probability = data

    def youden(threshold):
        found = metrics.rates(metrics.confusion(target, probability, threshold))
        return found["recall"] + found["specificity"]

    threshold = metrics.youden_threshold(target, probability)
    assert threshold in probability
    assert youden(threshold) >= max(youden(other) for other in probability) - 1e-12

    def exact(threshold):
        called = probability >= threshold
        right, wrong = (int((called & (target == value)).sum()) for value in (1, 0))
        return Fraction(right, int(target.sum())) - Fraction(wrong, int((target == 0).sum()))

    best = max(map(exact, probability))
    assert threshold == max(other for other in probability if exact(other) == best)


# --- intervals ------------------------------------------------------------------------------------


@examples(30)
@given(scored(min_size=12), st.integers(0, 1000))
def test_bootstrap_interval_contains_the_value_or_gives_a_reason(data, seed):
    target, score = data
    patient = np.arange(len(target)) // 2
    estimates = {
        **patient_bootstrap(
            patient, {"auroc": ranking.auroc_statistic(target, score)}, resamples=100, seed=seed
        ),
        **evaluate_threshold(with_scores(target, score, patient), 0.5, seed=seed).rates,
    }
    for name, found in estimates.items():
        if found.value is None or found.low is None or found.high is None:
            assert found.reason, name
        else:
            assert contains(found, found.value), name


@pytest.mark.parametrize("false_positives", [0, 1, 2, 3, 5, 40])
def test_a_likelihood_ratio_that_is_infinite_in_some_resamples_has_no_upper_bound(false_positives):
    """Of 2 false positives of 200, 13 % of the resamples have none, of 3 4.9 %, less than BCa cuts
    off; reference: Simel et al. 1991."""
    error = math.sqrt(1 / 180 - 1 / 200 + 1 / max(false_positives, 1) - 1 / 200)
    target = np.repeat([0, 1], 200)
    called = np.where(target == 1, np.arange(400) % 10 > 0, np.arange(400) < false_positives)
    for rows, name in (
        (with_scores(target, called), "lr_positive"),
        (with_scores(target, ~called), "lr_negative"),
    ):
        found = evaluate_threshold(rows, 0.5, resamples=2000).rates[name]
        if false_positives == 0:
            assert found.value is found.low is None
            assert "no negative is called" in present(found.reason)
            continue
        assert found.value == pytest.approx(0.9 / (false_positives / 200))
        assert present(found.low) < present(found.value)
        assert (found.high is None) == (false_positives < 3)
        if found.high is not None:
            assert found.high > 0.98 * present(found.value) * math.exp(1.96 * error)


def test_patient_bootstrap_is_wider_than_image_bootstrap_and_covers():
    """30 worlds of 80 patients with 6 alike images: 95 % of the intervals should hold the truth."""
    truth = 0.8555778168267576  # Phi(1.5 / sqrt 2)
    covered = {"patient": 0, "image": 0}
    for seed in range(30):
        patient, target, logit = simulated(80, 6, seed=seed, cluster=0.8)
        statistic = {"auroc": ranking.auroc_statistic(target, logit)}
        widths = {}
        for unit, groups in {"patient": patient, "image": np.arange(len(patient))}.items():
            found = patient_bootstrap(groups, statistic, resamples=300, seed=1)["auroc"]
            covered[unit] += contains(found, truth)
            widths[unit] = width(found)
        assert widths["patient"] > 1.3 * widths["image"]
    assert covered["patient"] >= 25
    assert covered["image"] < covered["patient"]


def test_the_interval_of_a_skewed_statistic_is_scipys():
    """Of so many that Student's t is the normal."""
    values = np.random.default_rng(0).exponential(size=600) ** 2
    statistic = {"mean": lambda weights: values @ weights / weights.sum(axis=0)}
    found = patient_bootstrap(np.arange(600), statistic, resamples=4000, seed=0)["mean"]
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(1)
    )
    spread = expected.standard_error
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.12 * spread)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.12 * spread)
    low, value, high = present(found.low), present(found.value), present(found.high)
    assert high - value > 1.15 * (value - low)


def test_a_last_bit_of_rounding_moves_no_interval():
    """Draws that equal the value but for rounding, as another processor rounds."""
    values, noise = np.repeat([0.0, 1.0], 10), np.random.default_rng(3)

    def exact(weights):
        return values @ weights / weights.sum(axis=0)

    def rounded(weights):
        drawn = exact(weights)
        return drawn * (1 + noise.choice([-1, 0, 1], size=drawn.shape) * 2e-16)

    both = {"exact": exact, "rounded": rounded}
    found = patient_bootstrap(np.arange(20), both, resamples=500, seed=0)
    assert found["rounded"].low == pytest.approx(found["exact"].low, rel=1e-9)
    assert found["rounded"].high == pytest.approx(found["exact"].high, rel=1e-9)


def test_image_bootstrap_agrees_with_delong():
    _, target, logit = simulated(num_patients=1500)
    statistic = {"auroc": ranking.auroc_statistic(target, logit)}
    found = patient_bootstrap(np.arange(1500), statistic, resamples=1000, seed=0)["auroc"]
    analytic = delong(target, logit)

    assert found.low == pytest.approx(analytic.low, abs=0.004)
    assert found.high == pytest.approx(analytic.high, abs=0.004)


def test_bootstrap_is_the_same_for_the_same_seed_and_any_order_of_the_samples():
    patient, target, logit = simulated(100, 3)
    order = np.random.default_rng(5).permutation(len(patient))

    def interval(rows):
        statistic = {"auroc": ranking.auroc_statistic(target[rows], logit[rows])}
        return patient_bootstrap(patient[rows], statistic, resamples=200, seed=3)["auroc"]

    assert interval(np.arange(len(patient))) == interval(order)


@examples(15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_resamples_are_the_same_wherever_and_in_whatever_order_they_are_computed(seed, workers):
    patient, target, logit = simulated(3000, 2, seed=seed % 7)
    statistics = {
        "ranks": ranking.headline_statistic(target, logit, 0.9),
        "brier": metrics.brier_statistic(target, scipy.special.expit(logit)),
    }

    def elsewhere(function, blocks):
        """Each worker gets every so manieth block and a copy of the work; the last begins."""
        todo = list(enumerate(blocks))
        found: dict[int, object] = {}
        for worker in reversed(range(workers)):
            work = ray.cloudpickle.loads(ray.cloudpickle.dumps(function))
            found |= {number: work(block) for number, block in todo[worker::workers]}
        return [found[number] for number in range(len(todo))]

    alone, spread = (
        bootstrap.resample(
            patient,
            statistics,
            resamples=400,
            seed=seed,
            effective_patients=3000,
            map_blocks=map_blocks,
        )
        for map_blocks in (map, elsewhere)
    )
    for name, one in alone.items():
        for part in ("value", "drawn", "jackknife"):
            np.testing.assert_array_equal(getattr(one, part), getattr(spread[name], part))
    rng = np.random.default_rng(seed)
    picked = rng.integers(3000, size=3000)
    rows = (picked[:, None] * 2 + np.arange(2)).ravel()
    first = reference.roc_auc_score(target[rows], logit[rows])
    assert alone["ranks"].drawn[0, 0] == pytest.approx(first, abs=1e-12)


def test_estimates_say_why_they_are_empty():
    perfect = {"auroc": ranking.auroc_statistic([0] * 20 + [1] * 20, np.arange(40.0))}
    found = patient_bootstrap(np.arange(40), perfect, resamples=100, seed=0)["auroc"]
    assert (found.value, found.low, found.high) == (1.0, None, None)
    assert found.reason == "the same in nearly every resample"

    lonely = {"auroc": ranking.auroc_statistic([1] + [0] * 20, np.arange(21.0))}
    found = patient_bootstrap(np.arange(21), lonely, resamples=100, seed=0)["auroc"]
    assert found.value == 0.0
    assert present(found.reason).startswith("too few patients: undefined in")

    none_called = evaluate_threshold(with_scores([0, 1, 0], [0.1, 0.2, 0.3]), 0.9).rates
    assert none_called["precision"].to_json() == {
        "value": None,
        "low": None,
        "high": None,
        "method": "patient bootstrap",
        "reason": "no study is called positive",
    }
    assert none_called["recall"].method == "Wilson over patients"
    assert "reason" not in none_called["recall"].to_json()
