"""DeLong against its definition, a published package, and simulated patients who recur."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from MLstatkit import Delong_test
from scipy.special import logit
from scipy.stats import norm, t

from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, metrics, ranking
from pneumo.evaluation.delong import CLUSTERED, INDEPENDENT, delong, delong_test, placements
from tests import present
from tests.estimates import contains, width
from tests.examples import examples

pytestmark = pytest.mark.processors


def simulated(num_patients=80, images_per_patient=1, seed=0, cluster=0.0):
    """(patient, target, first, second): a patient's studies share a part of both scores."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), images_per_patient)
    n = len(patient)
    target = (rng.random(n) < 0.4).astype(np.int8)
    own = math.sqrt(cluster) * rng.normal(size=num_patients)[patient]
    scores = [
        np.round(effect * target + own + rng.normal(size=n), 1) for effect in (1.5, 1.2)
    ]  # rounded: ties
    return patient, target, *scores


def test_variance_equals_its_definition_over_all_pairs():
    _, target, score, _ = simulated()
    positive, negative = score[target == 1], score[target == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    expected = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)

    placed = placements(target, score)
    assert placed.auroc == pytest.approx(metrics.auroc(target, score), abs=1e-12)
    assert placed.variance() == pytest.approx(expected, rel=1e-12)
    estimate = delong(target, score)
    assert width(estimate) == pytest.approx(2 * 1.959964 * math.sqrt(expected))


@pytest.mark.parametrize("seed", range(5))
def test_intervals_and_paired_test_equal_a_published_package(seed):
    _, target, first, second = simulated(seed=seed)
    _, p_value, *found = Delong_test(target, first, second)
    intervals, aurocs = found[:2], found[2:4]

    for score, interval, auroc in zip((first, second), intervals, aurocs, strict=True):
        ours = delong(target, score)
        assert ours.value == pytest.approx(auroc, abs=1e-9)
        assert (ours.low, ours.high) == pytest.approx(tuple(interval), abs=1e-9)
    test = delong_test(target, first, second)
    assert test.difference.value == pytest.approx(aurocs[0] - aurocs[1], abs=1e-9)
    assert test.p_value == pytest.approx(p_value, abs=1e-9)


@examples(30)
@given(st.integers(0, 1000))
def test_clustered_is_delongs_where_nobody_recurs(seed):
    patient, target, first, second = simulated(40, seed=seed)
    alone = delong(target, first)
    clustered = delong(target, first, patient)
    rarer = min(int(target.sum()), int((~np.asarray(target, dtype=bool)).sum()))
    placed = placements(target, first)
    assert placements(target, first, patient).variance() == pytest.approx(placed.variance())
    if clustered.high is not None:
        # On the logit's scale, to either side as far.
        margin = t.ppf(0.975, rarer - 1) * math.sqrt(placed.variance())
        auroc = present(alone.value)
        margin /= auroc * (1 - auroc)
        low, high = logit([clustered.low, clustered.high]) - logit(auroc)
        assert (-low, high) == pytest.approx((margin, margin))
    assert (alone.method, clustered.method) == (INDEPENDENT, CLUSTERED)
    tests = [delong_test(target, first, second, *by) for by in ((), (patient,))]
    z = norm.isf(present(tests[0].p_value) / 2)
    assert tests[1].p_value == pytest.approx(2 * t.sf(z, rarer - 1), abs=1e-9)


def test_clustered_is_delongs_doubled_where_every_study_stands_twice():
    _, target, score, _ = simulated(200)
    twice = np.repeat(target, 2), np.repeat(score, 2)
    once = placements(target, score).variance()
    clustered = placements(*twice, np.repeat(np.arange(200), 2)).variance()
    assert clustered == pytest.approx(once, rel=1e-9)
    assert placements(*twice).variance() == pytest.approx(once / 2, rel=0.02)


def test_clustered_agrees_with_the_patient_bootstrap_and_delong_is_too_narrow():
    patient, target, first, second = simulated(300, 5, cluster=0.8)
    statistics = {
        "auroc": ranking.auroc_statistic(target, first),
        "pair": bootstrap.stack(
            ranking.auroc_statistic(target, first), ranking.auroc_statistic(target, second)
        ),
    }
    found = bootstrap.resample(
        patient, statistics, resamples=1000, seed=0, effective_patients=len(np.unique(patient))
    )
    placed = placements(target, first, patient)
    assert math.sqrt(placed.variance()) == pytest.approx(found["auroc"].drawn.std(), rel=0.08)
    gain = placed.minus(placements(target, second))
    assert math.sqrt(gain.variance()) == pytest.approx(
        found["pair"].derive(bootstrap.first_minus_second).drawn.std(), rel=0.08
    )


def test_clustered_covers_the_truth_as_often_as_it_says():
    """200 worlds of 60 patients with 6 studies each, whose target is mostly the patient's."""
    covered = {"patient": 0, "image": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(60), 6)
        target = (rng.random(60) < 0.4)[patient]
        own = math.sqrt(0.7) * rng.normal(size=60)[patient]
        score = 1.5 * target + own + math.sqrt(0.3) * rng.normal(size=360)
        for unit, by in (("patient", (patient,)), ("image", ())):
            found = delong(target, score, *by)
            covered[unit] += contains(found, 0.8555778168267576)  # Phi(1.5 / sqrt 2)
    assert covered["patient"] >= 0.89 * 200
    assert covered["image"] < 0.75 * 200


def test_patients_with_equally_many_studies_count_in_full_and_others_for_less():
    patient, target, score, other = simulated(80)
    everyone_twice = np.tile(patient, 2), np.tile(target, 2), np.tile(score, 2)
    assert placements(*everyone_twice[1:], everyone_twice[0]).effective_patients == (
        placements(target, score, patient).effective_patients
    )
    one_has_most = np.where(patient < 60, 0, patient)
    for found in (
        delong(target, score, one_has_most),
        delong_test(target, score, other, one_has_most).difference,
    ):
        assert (found.low, found.high) == (None, None)
        assert "they tell as much as 1 with equally many studies" in present(found.reason)


def test_undefined_input_is_said():
    assert delong([1, 1], [0.1, 0.2]).reason == "one class only: 2 of 2 are positive"
    perfect = delong([0, 0, 1, 1], [0, 1, 2, 3])
    assert (perfect.value, perfect.low) == (1.0, None)
    assert perfect.reason == "these studies show no variance"
    constant = delong([0, 0, 1, 1], [5, 5, 5, 5])
    assert (constant.value, constant.low) == (0.5, None)
    assert present(delong([0, 1, 1], [1, 2, 0]).reason).startswith("DeLong's variance needs")
    lonely = delong([0, 1, 1, 0], [1, 2, 0, 3], np.array(["a", "b", "b", "c"]))
    assert lonely.reason == "DeLong's variance needs two patients of either class"
    assert "NaN" in present(delong([0, 1], [math.nan, 1]).reason)

    same = delong_test([0, 1, 1, 0], [1, 2, 0, 3], [1, 2, 0, 3])
    assert (same.difference.value, same.difference.low, same.p_value) == (0.0, None, None)
    assert delong_test([0, 1], [1, 2], [math.inf, 1]).difference.value is None
    with pytest.raises(MetricError, match="one class"):
        placements([1, 1], [1, 2])
