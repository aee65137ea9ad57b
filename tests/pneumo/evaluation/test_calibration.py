"""Fitted on val, mended where it can be, and measured as references measure it."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics as reference
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from pneumo.evaluation import bootstrap
from pneumo.evaluation.bootstrap import StatisticSet
from pneumo.evaluation.calibration import Scaling, calibrate, fit_scaling
from pneumo.evaluation.logistic_regression import (
    LogitSample,
    fit_logistic,
    fit_offset,
    recalibration_statistic,
)
from pneumo.evaluation.predictions import sigmoid
from pneumo.evaluation.reliability import (
    MEASURES,
    bin_by_probability,
    evaluate_reliability,
    reliability_statistics,
)
from tests import present
from tests.examples import examples
from tests.predictions import make_predictions

pytestmark = pytest.mark.processors


def drawn(n=2000, seed=0, slope=1.0, shift=0.0):
    """(target, logit): the truth is sigmoid((logit - shift) / slope)."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1, 1.5, n)
    target = (rng.random(n) < sigmoid(truth)).astype(np.int8)
    return target, slope * truth + shift


def measure(target, logit, scaling=None, num_bins=10, resamples=100, patient=None):
    sample = LogitSample.of(target, logit)
    statistics = {
        **reliability_statistics(sample, scaling, num_bins),
        "fit": recalibration_statistic(sample),
    }
    rows = dataclasses.replace(val(target, logit, patient), logit=np.asarray(logit, dtype=float))
    few = rows.count_rarer_class()
    found = bootstrap.resample(
        rows.patient, statistics, resamples=resamples, seed=0, effective_patients=few
    )
    part = StatisticSet(found)
    return evaluate_reliability(rows, scaling, part, part, num_bins)


def val(target, logit, patient=None):
    rows = make_predictions(len(target))
    patient = np.arange(len(target)) if patient is None else patient
    logit = np.asarray(logit, dtype=np.float32)
    return dataclasses.replace(
        rows,
        target=np.asarray(target, dtype=np.int8),
        logit=logit,
        probability=sigmoid(logit),
        patient=patient.astype(np.str_),
    )


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "slope", "shift"), [(40, 1, 0), (300, 3, 2), (3000, 0.2, -1)])
def test_platt_equals_statsmodels_of_platts_targets(n, slope, shift):
    target, logit = drawn(n, slope=slope, shift=shift)
    positives = target.sum()
    soft = np.where(target == 1, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    model = sm.GLM(soft, sm.add_constant(logit), family=sm.families.Binomial())
    intercept, slope = model.fit(tol=1e-12).params
    ours = fit_scaling("platt", target, logit)
    assert ours == pytest.approx((slope, intercept), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("slope", "shift"), [(1, 0), (4, 0), (0.1, 0), (2, 3)])
def test_temperature_has_the_greatest_likelihood(slope, shift):
    target, logit = drawn(500, slope=slope, shift=shift)
    num_positive = target.sum()
    soft = np.where(
        target == 1, (num_positive + 1) / (num_positive + 2), 1 / (500 - num_positive + 2)
    )

    def loss(log_temperature):
        scaled = logit / np.exp(log_temperature[0])
        return np.mean(np.logaddexp(0, scaled) - soft * scaled)

    best = minimize(loss, [0.0], tol=1e-12)
    found, intercept = fit_scaling("temperature", target, logit)
    assert 1 / found == pytest.approx(np.exp(best.x[0]), rel=1e-4)
    assert intercept == 0


def test_the_known_distortion_is_found():
    target, logit = drawn(200_000, slope=2.5, shift=0.9)
    slope, intercept = fit_scaling("platt", target, logit)
    assert (slope, intercept) == pytest.approx((1 / 2.5, -0.9 / 2.5), abs=0.02)
    target, logit = drawn(200_000, slope=2.5)
    assert fit_scaling("temperature", target, logit)[0] == pytest.approx(1 / 2.5, abs=0.01)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e4]))
def test_logistic_regression_equals_scikit_learns_and_statsmodels(seed, scale):
    target, logit = drawn(150, seed=seed)
    logit = logit * scale
    weights = np.random.default_rng(seed).integers(0, 3, (150, 4)).astype(float)
    slope, intercept = fit_logistic(logit, target.astype(float), weights)
    for column in range(4):
        frame = np.repeat(logit / scale, weights[:, column].astype(int))
        label = np.repeat(target, weights[:, column].astype(int))
        expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(frame[:, None], label)
        assert slope[column] * scale == pytest.approx(expected.coef_[0, 0], rel=1e-4)
        assert intercept[column] == pytest.approx(expected.intercept_[0], rel=1e-4, abs=1e-4)
    fit = sm.GLM(target, sm.add_constant(logit / scale), family=sm.families.Binomial()).fit()
    one = fit_logistic(logit, target.astype(float), np.ones((150, 1)))
    assert (one[1][0], one[0][0] * scale) == pytest.approx(tuple(fit.params), rel=1e-6)


def test_separated_classes_are_scaled_but_not_regressed():
    target, logit = np.array([0] * 20 + [1] * 20), np.arange(40.0) - 19.5
    for method in ("platt", "temperature"):
        slope, _ = fit_scaling(method, target, logit)
        assert 0 < slope < 100
    slopes, intercepts = fit_logistic(logit, target.astype(float), np.ones((40, 3)))
    assert np.isposinf(slopes).all()
    assert np.isnan(intercepts).all()
    assert np.isneginf(fit_logistic(-logit, target.astype(float), np.ones((40, 3)))[0]).all()
    assert np.isnan(fit_logistic(np.ones(40), target.astype(float), np.ones((40, 3)))).all()


# --- choosing -------------------------------------------------------------------------------------


def choose_method(n, **options):
    found = calibrate(val(*drawn(n, **options)), min_patients=10, seed=0)
    return present(found.chosen).method


def test_a_shift_is_for_platt_and_a_stretch_for_temperature():
    """As a weight of positives in training does: every logit is its logarithm too high."""
    target, logit = drawn(3000, shift=np.log(5))
    found = calibrate(val(target, logit), min_patients=10, seed=0)
    assert found.chosen == found.platt
    platt, temperature = present(found.platt), present(found.temperature)
    assert platt.intercept == pytest.approx(-np.log(5), abs=0.15)
    assert platt.log_loss < temperature.log_loss < present(found.log_loss_before)

    picks = [choose_method(300, seed=seed, slope=3) for seed in range(20)]
    assert picks.count("temperature") >= 10


def test_a_calibrated_network_is_mostly_left_alone():
    picks = [choose_method(300, seed=seed) for seed in range(40)]
    assert picks.count("none") >= 30
    found = calibrate(val(*drawn(300)), min_patients=10, seed=0)
    np.testing.assert_allclose(found.apply(np.array([-2.0, 1.0])), sigmoid(np.array([-2.0, 1.0])))


def test_probabilities_are_calibrated_on_data_that_was_not_seen():
    found = calibrate(val(*drawn(3000, slope=3, shift=2)), min_patients=10, seed=0)
    target, logit = drawn(3000, seed=1, slope=3, shift=2)
    before, after = measure(target, logit), measure(target, logit, found.chosen)
    assert before.ece.value > 0.1 > 0.03 > after.ece.value
    assert before.slope.value == pytest.approx(1 / 3, abs=0.05)
    assert after.slope.low < 1 < after.slope.high
    assert after.intercept.low < 0 < after.intercept.high
    assert after.in_the_large.low < 0 < after.in_the_large.high
    assert before.in_the_large.low > 0.05
    assert np.all(np.diff(found.apply(np.sort(logit))) >= 0)


def test_folds_keep_patients_together_and_rows_may_come_in_any_order():
    target, logit = drawn(400)
    rows = val(target, logit, np.arange(400) // 4)
    shuffled = rows.take(np.random.default_rng(0).permutation(400))
    one, two = (present(calibrate(r, min_patients=10, seed=3).chosen) for r in (rows, shuffled))
    assert one.method == two.method
    assert one.log_loss == pytest.approx(two.log_loss, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "logit", "reason"),
    [
        (np.zeros(50), np.arange(50.0), "val: one class only"),
        (np.arange(50) < 4, np.arange(50.0), "val: too small: 4 patients with a positive study"),
        (np.arange(50) % 2, np.full(50, np.nan), "val: 50 of 50 scores are NaN"),
        (np.arange(50) < 25, np.arange(50.0) - 25, "val: a higher logit does not mean"),
        (np.arange(50) % 2, np.zeros(50), "val: a higher logit does not mean"),
    ],
)
def test_a_val_that_cannot_calibrate_says_why(target, logit, reason):
    found = calibrate(val(target, logit), min_patients=10, seed=0)
    assert found.chosen is None
    assert present(found.reason).startswith(reason)
    assert np.isnan(found.apply(np.zeros(3))).all()
    content = found.to_json()
    assert content["method"] is None
    assert content["reason"] == found.reason


def test_the_json_says_all_that_prediction_needs():
    content = calibrate(val(*drawn(800, slope=2)), min_patients=10, seed=0).to_json()
    assert set(content) >= {"method", "slope", "intercept", "chosen_on", "rule", "fitted"}
    fitted = content["fitted"]
    assert content["slope"] == fitted[content["method"]]["slope"]
    assert fitted["temperature"]["temperature"] == 1 / fitted["temperature"]["slope"]


def test_intercept_at_slope_1_equals_statsmodels_offset_model():
    target, logit = drawn(400, slope=2, shift=1)
    weights = np.stack([np.ones(400), np.random.default_rng(0).poisson(1, 400)], axis=1)
    found = fit_offset(logit, target.astype(float), weights.astype(float))
    for column, intercept in zip(weights.T, found, strict=True):
        model = sm.GLM(
            target, np.ones(400), family=sm.families.Binomial(), offset=logit, freq_weights=column
        )
        assert intercept == pytest.approx(model.fit().params[0], abs=1e-7)
    measured = measure(target, logit)
    assert measured.intercept_at_slope_1.value == pytest.approx(found[0])
    # Too high by 1 on average, and too extreme: the joint fit mends both at once, differently.
    assert measured.intercept_at_slope_1.high < 0
    assert measured.intercept.value != pytest.approx(found[0], abs=0.05)


def test_offset_of_drawn_studies_of_one_class_is_not_invented():
    logit, target = np.linspace(-3, 3, 20), (np.arange(20) > 9).astype(float)
    weights = np.stack([np.ones(20), target, 1 - target], axis=1)
    found = fit_offset(logit, target, weights)
    assert np.isnan(found).tolist() == [False, True, True]
    assert np.isnan(fit_offset(logit, np.zeros(20), weights)).all()
    far = fit_offset(logit + 500, target, weights[:, :1])
    assert far[0] == pytest.approx(found[0] - 500)


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [2, 10, 15])
def test_calibration_error_equals_its_definition(num_bins):
    target, logit = drawn(1003, slope=2)
    probability = sigmoid(logit)
    parts = np.array_split(np.argsort(probability), num_bins)
    expected = sum(
        len(part) * abs(target[part].mean() - probability[part].mean()) for part in parts
    ) / len(target)
    found = measure(target, logit, num_bins=num_bins)
    assert found.ece.value == pytest.approx(expected, abs=0.003)
    assert found.ece.low is found.ece.high is None
    assert sum(part.n for part in found.curve) == 1003
    assert max(part.n for part in found.curve) - min(part.n for part in found.curve) <= 1


@pytest.mark.parametrize("num_bins", [5, 10, 20])
@pytest.mark.parametrize("n", [1000, 1007])
def test_curve_and_error_equal_scikit_learns(n, num_bins):
    target, logit = drawn(n, slope=2, shift=1)
    found = measure(target, logit, num_bins=num_bins)
    observed, predicted = calibration_curve(
        target, sigmoid(logit), n_bins=num_bins, strategy="quantile"
    )
    # Of 1007 studies the two cut differently: ours have equal numbers, scikit-learn's interpolate.
    close = 1e-12 if n == 1000 else 0.03
    assert [part.predicted for part in found.curve] == pytest.approx(predicted, abs=close)
    assert [part.observed.value for part in found.curve] == pytest.approx(observed, abs=close)
    shares = np.array([part.n for part in found.curve]) / n
    expected = shares @ np.abs(observed - predicted)
    assert found.ece.value == pytest.approx(expected, abs=1e-12 if n == 1000 else 0.003)


def test_the_smooth_curve_is_near_the_truth_and_the_histogram_holds_everybody():
    target, logit = drawn(20_000, slope=2, shift=1)
    found = measure(target, logit, resamples=2)
    smooth = found.smooth
    truth = sigmoid((np.log(smooth.predicted) - np.log1p(-np.array(smooth.predicted)) - 1) / 2)
    assert smooth.observed == pytest.approx(truth, abs=0.03)
    assert sum(found.histogram.positives) == target.sum()
    assert sum(found.histogram.negatives) == (target == 0).sum()


@pytest.mark.parametrize("logit", [np.zeros(200), np.full(200, 60.0)])
def test_probabilities_that_do_not_vary_have_no_smooth_curve(logit):
    found = measure(drawn(200)[0], logit)
    assert found.smooth is None
    assert sum(found.histogram.positives) > 0


def test_saturated_and_separated_probabilities_have_a_smooth_curve():
    target, logit = drawn(400)
    for values in (logit + 60, np.where(target == 1, 5.0, -5.0) + logit / 10):
        smooth = measure(target, values).smooth
        assert np.isfinite(smooth.observed).all()
        assert 0 <= min(smooth.observed) <= max(smooth.observed) <= 1


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=1, max_size=40))
def test_bins_hold_everybody_once_and_never_part_ties(values):
    probability = np.array(values)
    bins = bin_by_probability(probability, 10)
    assert set(bins) == set(range(bins.max() + 1))
    for value in set(values):
        assert len(set(bins[probability == value])) == 1


def test_brier_and_its_parts():
    target, logit = drawn(1000, slope=2)
    found = measure(target, logit)
    assert found.brier.value == pytest.approx(reference.brier_score_loss(target, sigmoid(logit)))
    assert found.log_loss.value == pytest.approx(reference.log_loss(target, sigmoid(logit)))
    parts = found.brier_decomposition
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within_bins"]
    assert total == pytest.approx(found.brier.value, abs=1e-12)
    assert parts["uncertainty"] == pytest.approx(target.mean() * (1 - target.mean()))

    # Of few distinct probabilities the bins are those, and nothing is left over.
    few = np.random.default_rng(0).choice([-2.0, 0.0, 1.0], 500)
    label = (np.random.default_rng(1).random(500) < sigmoid(few)).astype(int)
    assert measure(label, few).brier_decomposition["within_bins"] == pytest.approx(0, abs=1e-12)


def test_slope_after_scaling_needs_no_second_fit():
    target, logit = drawn(500, slope=2, shift=1)
    scaling = Scaling("platt", 0.7, -0.3, 0.0)
    found = measure(target, logit, scaling)
    again = measure(target, 0.7 * logit - 0.3)
    for name in MEASURES:
        one, two = getattr(found, name), getattr(again, name)
        for end in ("value", "low", "high"):
            assert getattr(one, end) == pytest.approx(getattr(two, end)), name


def test_intervals_cover_the_truth():
    covered = {"slope": 0, "intercept": 0}
    for seed in range(60):
        target, logit = drawn(300, seed=seed)
        found = measure(target, logit, resamples=200)
        covered["slope"] += found.slope.low <= 1 <= found.slope.high
        covered["intercept"] += found.intercept.low <= 0 <= found.intercept.high
    assert min(covered.values()) >= 50


def test_separated_classes_have_no_slope_and_say_so():
    found = measure(np.array([0] * 20 + [1] * 20), np.arange(40.0) - 19.5)
    assert found.slope.value is None
    assert "separate" in found.slope.reason
    assert found.brier.value is not None


@pytest.mark.parametrize("shift", [-6.0, 0.0, 6.0])
def test_a_model_that_ranks_the_wrong_way_is_not_calibrated(shift):
    """A temperature could be fitted where all logits are of one sign: it says nothing of order."""
    rng = np.random.default_rng(3)
    target = (rng.uniform(size=300) < 0.3).astype(np.int8)
    logit = (-1.5 * target + rng.normal(size=300) + shift).astype(np.float32)
    found = calibrate(val(target, logit), min_patients=1, seed=0)
    assert found.chosen is found.temperature is found.platt is None
    assert found.reason is not None


def test_few_distinct_probabilities_have_bins_of_their_own():
    """50 zeros and 950 ones once shared a bin, whose error was 0 for 0.1."""
    probability = np.repeat([0.0, 1.0], [50, 950])
    assert np.bincount(bin_by_probability(probability, 10)).tolist() == [50, 950]
    target = np.repeat([1, 0, 1], [50, 50, 900])
    found = measure(target, np.repeat([-40.0, 40.0], [50, 950]))
    assert found.ece.value == pytest.approx(0.1)


def test_an_upper_end_that_resamples_leave_open_is_open():
    target = np.array([0] * 20 + [1] * 20)
    logit = np.where(np.arange(40) % 19 == 3, -1, 1) * (np.arange(40.0) - 19.5)
    found = measure(target, logit, resamples=400).slope
    assert found.low < found.value
    assert found.high is None
    assert "without a bound" in found.reason


def test_logits_that_are_all_the_same_are_not_said_to_separate_the_classes():
    found = measure(np.arange(40) % 2, np.full(40, 0.3))
    assert found.slope.reason == "the logits are all the same"


def test_a_bin_without_a_positive_has_an_interval():
    target, logit = np.repeat([0, 1], [100, 100]), np.linspace(-5, 5, 200)
    lowest = measure(target, logit).curve[0].observed
    assert (lowest.value, lowest.low) == (0, 0)
    assert 0.05 < lowest.high < 0.3


def test_the_calibration_error_of_a_calibrated_model_is_told():
    found = [measure(*drawn(300, seed=seed)) for seed in range(30)]
    mean = np.mean([one.ece.value for one in found])
    assert np.mean([one.ece_if_calibrated for one in found]) == pytest.approx(mean, rel=0.2)


def test_probabilities_that_are_too_high_do_not_make_a_patients_studies_alike():
    target, logit = drawn(1200, shift=2.0)
    apart, together = (measure(target, logit, patient=np.arange(1200) // size) for size in (1, 30))
    assert together.ece_if_calibrated == pytest.approx(apart.ece_if_calibrated, rel=0.1)


@examples(10)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3.0), st.floats(-2.0, 2.0))
def test_fits_of_many_studies_are_those_of_each_study(seed, slope, shift):
    rng = np.random.default_rng(seed)
    logit = np.round(rng.normal(size=6000) * 3, rng.integers(1, 9))
    target = (rng.random(6000) < sigmoid(slope * logit + shift)).astype(np.int8)
    weights = rng.poisson(1, size=(6000, 3))

    scaling = Scaling("platt", 1.5, -0.5, 0.0)
    sample = LogitSample.of(target, logit, scaling.slope)
    fit = recalibration_statistic(sample)(weights)
    exact_slope, exact_intercept = fit_logistic(logit, target.astype(float), weights)
    np.testing.assert_allclose(fit, [exact_intercept, exact_slope], rtol=1e-8, atol=1e-8)
    for one, scaled in ((None, logit), (scaling, 1.5 * logit - 0.5)):
        found = reliability_statistics(sample, one, 10)
        exact = fit_offset(scaled, target.astype(float), weights)
        np.testing.assert_allclose(found["offset"](weights), exact, rtol=1e-8, atol=1e-8)
        probability = sigmoid(scaled)
        losses = [
            [loss(target, probability, sample_weight=drawn) for drawn in weights.T]
            for loss in (reference.brier_score_loss, reference.log_loss)
        ]
        np.testing.assert_allclose(found["losses"](weights), losses, rtol=1e-8)


def test_many_studies_whose_classes_hardly_overlap_are_fitted_as_each_study_is():
    logit = np.linspace(-5, 5, 6000)
    target = (logit > 0).astype(np.int8)
    target[2999:3001] = target[3000], target[2999]
    weights = np.ones((6000, 2))
    weights[2999:3001, 1] = 0  # separated

    intercept, slope = recalibration_statistic(LogitSample.of(target, logit))(weights)
    exact_slope, exact_intercept = fit_logistic(logit, target.astype(float), weights)
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-6)
    np.testing.assert_allclose(intercept, exact_intercept, rtol=1e-6, atol=1e-6)
    assert np.isposinf(slope[1])
