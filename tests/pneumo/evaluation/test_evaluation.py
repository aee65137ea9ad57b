"""Decided on val, reported on test, null with a reason where undefined."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from pneumo.config import EvaluateConfig
from pneumo.errors import DataError
from pneumo.evaluation import metrics
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.comparison import compare
from pneumo.evaluation.estimates import as_json
from pneumo.evaluation.evaluation import evaluate
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.evaluation.predictions import check_complete, sigmoid
from tests import CHECKOUT, present
from tests.predictions import make_plain

pytestmark = pytest.mark.processors

CONFIG = EvaluateConfig(bootstrap_resamples=200)
DATASET = {"digest": "d" * 64, "unit": "patient"}


def predictions(num_patients=200, images_per_patient=2, seed=0, effect=2.0):
    """Scores of two equal splits in which AP images are of sicker patients."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), images_per_patient)
    n = len(patient)
    target = (rng.random(num_patients) < 0.3)[patient].astype(np.int8)
    logit = (effect * target + rng.normal(size=n) - 1).astype(np.float32)
    ap = rng.random(n) < np.where(target == 1, 0.7, 0.3)
    return make_plain(
        n,
        patient=np.array([f"p{i}" for i in patient]),
        split=np.where(patient % 2 == 0, "val", "test"),
        target=target,
        logit=logit,
        view=np.where(ap, "AP", "PA"),
    )


def replaced(found, **columns):
    return dataclasses.replace(found, **columns)


def metrics_json(evaluation):
    """What a reader of metrics.json gets; NaN is no JSON and would raise."""
    content = evaluation.to_metrics(run="r", dataset=DATASET, model={"epoch": 3})
    return json.loads(json.dumps(content, allow_nan=False))


def test_thresholds_are_chosen_on_val_and_applied_to_test():
    found = predictions()
    val, test = found.subset("val"), found.subset("test")
    evaluation = evaluate(found, config=CONFIG, seed=0)

    decision, screening = evaluation.points[DECISION], evaluation.points[SCREENING]
    assert decision.logit == metrics.youden_threshold(val.target, val.logit)
    assert screening.logit == metrics.sensitivity_threshold(val.target, val.logit, 0.9)
    assert decision.threshold == sigmoid(np.array(decision.logit))
    assert present(evaluation.val.at[SCREENING].rates["recall"].value) >= 0.9
    expected = metrics.confusion(test.target, test.logit, decision.logit)
    assert evaluation.test.at[DECISION].counts == expected

    other_test = replaced(found, target=np.where(found.split == "test", 0, found.target))
    assert evaluate(other_test, config=CONFIG, seed=0).points == evaluation.points


def test_the_configured_rule_decides():
    config = EvaluateConfig(
        bootstrap_resamples=100, operating_point="sensitivity", sensitivity=0.95
    )
    points = evaluate(predictions(), config=config, seed=0).points
    assert points[DECISION].rule == "sensitivity ≥ 0.95"
    assert points[DECISION].threshold == points[SCREENING].threshold


def test_metrics_json_has_the_documented_form():
    found = predictions()
    evaluation = evaluate(found, config=CONFIG, seed=0, train=Metadata.of(found))
    content = metrics_json(evaluation)

    assert list(content) == [
        "schema_version", "run", "dataset", "model", "operating_points", "calibration",
        "baselines", "val", "test",
    ]  # fmt: skip
    assert content["schema_version"] == 4
    assert content["dataset"] == DATASET
    test = content["test"]
    assert (test["n"], test["patients"]) == (200, 100)
    assert test["positives"] == evaluation.test.positives
    for name in ("auroc", "auroc_delong", "average_precision", "accuracy", "precision", "recall",
                 "specificity", "npv", "f1", "mcc", "log_loss", "brier"):  # fmt: skip
        assert set(test[name]) >= {"value", "low", "high", "method"}, name
        assert test[name]["low"] <= test[name]["value"] <= test[name]["high"], name
    assert sum(test["confusion"].values()) == 200
    assert content["operating_points"]["decision"]["test"]["recall"] == test["recall"]
    assert content["operating_points"]["decision"]["chosen_on"] == "val"
    assert test["view"]["gain"]["value"] == pytest.approx(
        test["view"]["model_auroc"]["value"] - test["view"]["view_only_auroc"]["value"]
    )
    assert set(test["view"]) >= {"auroc_within_AP", "auroc_within_PA", "n"}


def test_every_key_of_metrics_json_is_documented():
    text = (CHECKOUT / "docs" / "metrics.md").read_text()
    found = predictions()
    content = metrics_json(evaluate(found, config=CONFIG, seed=0, train=Metadata.of(found)))
    same = compare(found.subset("val"), found.subset("val"), resamples=100, seed=0)
    content["comparison"] = as_json(same)

    def keys(tree):
        if isinstance(tree, list):
            return {key for branch in tree for key in keys(branch)}
        return set(tree) | keys(list(tree.values())) if isinstance(tree, dict) else set()

    missing = [key for key in keys(content) if not re.search(rf"\b{re.escape(key)}\b", text)]
    assert not missing


def test_the_order_of_the_rows_does_not_matter():
    found = predictions()
    shuffled = found.take(np.random.default_rng(1).permutation(len(found)))
    once = metrics_json(evaluate(found, config=CONFIG, seed=0))
    again = metrics_json(evaluate(shuffled, config=CONFIG, seed=0))

    def leaves(tree):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [x for v in branches for x in (leaves(v) if isinstance(v, dict | list) else [v])]

    for left, right in zip(leaves(once), leaves(again), strict=True):
        assert left == (
            pytest.approx(right, rel=1e-9, abs=1e-12) if isinstance(right, float) else right
        )


def test_view_baseline_uses_only_studies_of_known_view():
    found = predictions()
    view = found.view.copy()
    view[:40] = ""
    train = Metadata.of(found)
    baseline = evaluate(replaced(found, view=view), config=CONFIG, seed=0, train=train).val.view
    assert baseline.n == 180
    assert present(baseline.alone_auroc.value) > 0.6
    assert present(baseline.gain.value) > 0

    unknown = evaluate(
        replaced(found, view=np.full(len(view), "")), config=CONFIG, seed=0, train=train
    ).test.view
    assert (unknown.n, unknown.model_auroc.value) == (0, None)
    assert unknown.within["AP"].reason == "no study"


def cleared(column, rows, count):
    """`column` with nothing in the first `count` of `rows`."""
    column = column.copy()
    column[np.flatnonzero(rows)[:count]] = ""
    return column


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("one class", "one class only"),
        ("nan", "scores are NaN"),
        ("infinite", "scores are NaN"),
        ("twice", "2 studies are scored more than once"),
        ("nameless", "3 studies have no key and 0 no patient"),
        ("homeless", "0 studies have no key and 2 no patient"),
        ("empty", "no study"),
        ("tiny", "too few patients"),
    ],
)
def test_degenerate_splits_are_null_with_a_reason(split, damage, reason):
    found = predictions()
    rows = found.split == split
    if damage == "one class":
        found = replaced(found, target=np.where(rows, 0, found.target))
    elif damage == "nan":
        logit = np.where(rows, np.nan, found.logit).astype(np.float32)
        found = replaced(found, logit=logit, probability=np.where(rows, np.nan, found.probability))
    elif damage == "infinite":
        logit = found.logit.copy()
        logit[np.flatnonzero(rows)[3]] = np.inf
        found = replaced(found, logit=logit, probability=sigmoid(logit))
    elif damage == "twice":
        found = found.take(np.append(np.arange(len(found)), np.flatnonzero(rows)[:2]))
    elif damage == "nameless":
        found = replaced(found, key=cleared(found.key, rows, 3))
    elif damage == "homeless":
        found = replaced(found, patient=cleared(found.patient, rows, 2))
    elif damage == "empty":
        found = found.take(~rows)
    else:
        target = np.where(rows, 0, found.target)
        target[np.flatnonzero(rows)[:2]] = 1
        found = replaced(found, target=target)

    train = Metadata.of(predictions())
    content = metrics_json(evaluate(found, config=CONFIG, seed=0, train=train))
    assert reason in content[split]["auroc"]["reason"]
    assert content[split]["auroc"]["low"] is None
    if damage != "tiny":
        assert content[split]["auroc"]["value"] is None
        told = content[split]["view"]["model_auroc"]["reason"]
        assert ("too small" if damage == "one class" else reason) in told
    if damage != "tiny" and split == "val":
        point = content["operating_points"]["decision"]
        assert point["threshold"] is None
        assert reason in point["reason"]
        assert content["test"]["confusion"] is None
        assert content["test"]["auroc"]["value"] is not None
        assert content["test"]["accuracy"]["reason"].startswith("no threshold: val:")
        assert content["calibration"]["method"] is None
        assert reason in content["calibration"]["reason"]
        assert reason in content["test"]["calibration"]["after"]["ece"]["reason"]
        assert reason in content["test"]["decision_curve"]["reason"]
        assert content["test"]["calibration"]["before"]["brier"]["value"] is not None
    if damage not in ("tiny", "one class"):
        assert reason in content[split]["fault"]
        assert_nothing_is_claimed(content[split])


def assert_nothing_is_claimed(tree):
    """That every estimate below `tree` is null and says why."""
    for branch in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(branch, dict) and "method" in branch and "value" in branch:
            assert (branch["value"], branch["low"], branch["high"]) == (None, None, None)
            assert branch["reason"]
        elif isinstance(branch, dict | list):
            assert_nothing_is_claimed(branch)


def test_every_estimate_has_a_value_or_a_reason():
    """Of a good split and of small ones: whatever is null says why."""

    def check(tree):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(branch, dict) and "value" in branch:
                if None in (branch["value"], branch["low"], branch["high"]):
                    assert branch["reason"]
                else:
                    assert branch["low"] <= branch["value"] <= branch["high"]
            elif isinstance(branch, dict | list):
                check(branch)

    for num_patients in (200, 30, 8, 2):
        check(metrics_json(evaluate(predictions(num_patients), config=CONFIG, seed=0)))


def test_calibration_is_fitted_on_val_alone():
    found = predictions()
    one = evaluate(found, config=CONFIG, seed=0)
    other = evaluate(
        replaced(found, target=np.where(found.split == "test", 0, found.target)),
        config=CONFIG, seed=0,
    )  # fmt: skip
    assert one.calibration == other.calibration
    np.testing.assert_array_equal(
        one.predictions.calibrated_probability, one.calibration.apply(found.logit)
    )
    assert one.test.after.log_loss.value is not None
    assert present(one.calibration.chosen).method != "none"
    assert one.test.after.brier.value != one.test.before.brier.value
    assert one.test.before.brier == one.test.brier


def test_metadata_of_train_stands_beside_the_model():
    found = predictions()
    train = Metadata.of(predictions(seed=1))
    content = metrics_json(evaluate(found, config=CONFIG, seed=0, train=train))
    assert content["baselines"]["metadata"]["n"] == 400
    assert content["test"]["metadata"]["alone_auroc"]["value"] > 0.6
    assert content["test"]["metadata"]["gain"]["low"] > 0
    without = metrics_json(evaluate(found, config=CONFIG, seed=0))
    assert without["baselines"]["metadata"]["reason"] == "no metadata of train"
    assert without["test"]["metadata"]["gain"]["reason"] == "no metadata of train"


def test_one_class_on_test_still_counts_what_can_be_counted():
    found = predictions()
    found = replaced(found, target=np.where(found.split == "test", 0, found.target))
    test = metrics_json(evaluate(found, config=CONFIG, seed=0))["test"]
    assert test["positives"] == 0
    assert test["specificity"]["value"] is not None
    assert test["recall"] == {
        "value": None, "low": None, "high": None,
        "method": "patient bootstrap", "reason": "no study is positive",
    }  # fmt: skip


def test_a_missing_study_and_one_of_another_split_are_refused():
    found = predictions()
    check_complete(found, {"val": 200, "test": 200})

    with pytest.raises(DataError, match="test: 199 scored, 200 in the manifest"):
        check_complete(found.take(np.arange(len(found) - 1)), {"val": 200, "test": 200})
    with pytest.raises(DataError, match="200 of a split that was not asked for"):
        check_complete(found, {"val": 200})


def test_prevalence_of_an_empty_split_is_nan():
    found = predictions()
    empty = evaluate(found.take(found.split == "val"), config=CONFIG, seed=0).test
    assert math.isnan(empty.prevalence)
    assert empty.n == 0


def test_thresholds_hold_where_probabilities_saturate():
    """Above a logit of 36.7 every probability is 1: the threshold is none of theirs."""
    found = predictions()
    plain = evaluate(found, config=CONFIG, seed=0)
    logit = (found.logit + 60).astype(np.float32)
    far = evaluate(replaced(found, logit=logit, probability=sigmoid(logit)), config=CONFIG, seed=0)
    for name, point in far.points.items():
        assert present(point.threshold) <= 1
        assert far.test.at[name].counts == plain.test.at[name].counts


def test_one_class_has_the_same_brier_score_everywhere():
    found = predictions()
    found = replaced(found, target=np.where(found.split == "test", 0, found.target))
    test = metrics_json(evaluate(found, config=CONFIG, seed=0))["test"]
    assert test["brier"]["value"] == test["calibration"]["before"]["brier"]["value"]
    assert test["calibration"]["before"]["slope"]["reason"].startswith("one class only")
