"""Net benefit is what Vickers & Elkin define, at every threshold."""

import dataclasses

import numpy as np
import pytest

from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap
from pneumo.evaluation.decision_curve import (
    THRESHOLDS,
    DecisionCurve,
    net_benefit_statistic,
    summarise_net_benefit,
)
from pneumo.reporting.page.performance_section import decision_curve_sentence
from tests.predictions import make_predictions

pytestmark = pytest.mark.processors


def draw(n=500, **columns):
    rows = make_predictions(n)
    return dataclasses.replace(rows, **{"calibrated_probability": rows.probability, **columns})


def judge(rows, resamples=200):
    statistic = {"curve": net_benefit_statistic(rows)}
    few = rows.count_rarer_class()
    found = bootstrap.resample(
        rows.patient, statistic, resamples=resamples, seed=0, effective_patients=few
    )
    return summarise_net_benefit(rows, bootstrap.StatisticSet(found))


def test_a_single_study_has_a_curve_without_intervals() -> None:
    curve = judge(draw(1, target=np.ones(1, np.int8), calibrated_probability=np.array([0.3])))
    assert [(one.value, one.low) for one in curve.model[28:31]] == [(1, None), (1, None), (0, None)]


@pytest.mark.parametrize("ties", [False, True])
def test_net_benefit_equals_its_definition(ties):
    rows = draw()
    if ties:  # many exactly at a threshold
        rows = draw(calibrated_probability=np.round(rows.probability, 1))
    curve = judge(rows)
    prevalence = rows.target.mean()
    assert (THRESHOLDS[0], THRESHOLDS[-1], len(THRESHOLDS)) == (0.01, 0.5, 50)
    for k, t in enumerate(THRESHOLDS):
        called = rows.calibrated_probability >= t
        tp, fp = (called & (rows.target == 1)).mean(), (called & (rows.target == 0)).mean()
        assert curve.model[k].value == pytest.approx(tp - fp * t / (1 - t), abs=1e-12)
        treat_all = prevalence - (1 - prevalence) * t / (1 - t)
        assert curve.treat_all[k] == pytest.approx(treat_all, abs=1e-12)
        gain = curve.model[k].value - max(treat_all, 0)
        assert curve.gain[k] == pytest.approx(gain, abs=1e-12)
        if curve.model[k].low is not None:
            assert curve.model[k].low <= curve.model[k].value <= curve.model[k].high


def test_a_good_model_is_worth_more_than_treating_all_or_none():
    curve = judge(draw(2000))
    assert curve.gain[19] > 0.05
    useless = judge(draw(2000, calibrated_probability=np.full(2000, 0.225)))
    assert max(useless.gain) <= 1e-12


def test_json_has_columns_of_one_length_or_a_reason():
    content = judge(draw()).to_json()
    columns = [value for value in content.values() if isinstance(value, list)]
    assert len(columns) == 7
    assert {len(column) for column in columns} == {50}
    assert DecisionCurve.undefined("because").to_json() == {"threshold": None, "reason": "because"}


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(MetricError, match="NaN"):
        net_benefit_statistic(make_predictions(20))


def test_nothing_is_said_where_no_positive_lies_below_the_threshold():
    """The resamples would never see a miss there, and call a benefit of 0 certain."""
    curve = judge(draw(114))
    assert not curve.is_supported[0]
    assert curve.model[0].low is None
    assert "on a side of the threshold" in curve.model[0].reason
    told = decision_curve_sentence(curve)
    assert "tests nothing" in told
    assert "worth more" not in told
    alone = judge(draw(20, target=np.zeros(20, dtype=np.int8)))
    assert decision_curve_sentence(alone).startswith("Too few cases")
