"""Each member of an ensemble alone, and whether the seed is all that differs between them."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from pneumo.config import EvaluateConfig
from pneumo.evaluation.member_spread import compare_members
from pneumo.evaluation.predictions import Predictions
from pneumo.reporting.page.performance_section import members_sentence
from tests import present
from tests.pneumo.reporting.page.test_page import render, section
from tests.predictions import judge, make_predictions

CONFIG = EvaluateConfig(bootstrap_resamples=100)


def make_members(count: int) -> dict[str, Predictions]:
    rows = make_predictions(600)
    noise = np.random.default_rng(0).normal(size=(count, len(rows))).astype(np.float32)
    return {f"seed-{k}": replace(rows, logit=rows.logit + noise[k]) for k in range(count)}


def test_the_numbers_are_those_of_each_run_evaluated_alone() -> None:
    members = make_members(3)
    found = present(compare_members(members, ["seed"], CONFIG))
    for k, rows in enumerate(members.values()):
        test = rows.subset("test")
        expected = roc_auc_score(test.target, test.logit)
        assert found.values["auroc"][k] == pytest.approx(expected)
        expected = average_precision_score(test.target, test.logit)
        assert found.values["average_precision"][k] == pytest.approx(expected)
        own = judge(rows)
        called = test.logit >= present(own.points["decision"].logit)
        assert found.values["recall"][k] == pytest.approx(recall_score(test.target, called))
    told = found.to_json()["auroc"]
    assert told["mean"] == pytest.approx(np.mean(told["values"]))
    assert told["standard_deviation"] == pytest.approx(np.std(told["values"], ddof=1))
    assert "between seeds, which" in members_sentence(found)
    shown = section(render(members=found), "good")
    numbers = " ".join(f"{value:.3f}" for value in (told["mean"], told["standard_deviation"]))
    assert f"AUROC {numbers}" in shown


def test_what_is_no_spread_of_seeds_is_not_called_one() -> None:
    members = make_members(2)
    other = present(compare_members(members, ["seed", "train.lr"], CONFIG))
    assert "differ in seed, train.lr, so" in members_sentence(other)
    assert "is not that between seeds" in members_sentence(other)
    same = present(compare_members(members, [], CONFIG))
    assert "one setting and one seed" in members_sentence(same)
    assert compare_members(make_members(1), [], CONFIG) is None


def test_a_run_without_numbers_leaves_its_measures_out() -> None:
    members = make_members(2)
    members["seed-1"] = replace(members["seed-1"], logit=np.full(600, np.nan, np.float32))
    found = present(compare_members(members, ["seed"], CONFIG))
    assert found.values == {}
    assert "Each run alone" not in render(members=found)
