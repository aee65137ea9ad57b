"""Studies whose score is no number have no outcome: nothing is shown or counted of them."""

from dataclasses import replace

import numpy as np
import pytest

from jobs.evaluation.ray_scoring import ExplainedStudy, ScoredStore, Scoring
from jobs.evaluation.result_files import describe_errors
from jobs.evaluation.shown_studies import call_studies, choose_pictures, make_case
from pneumo.config import Config, EvaluateConfig
from pneumo.dataset.study_table import StudyRow
from pneumo.evaluation.evaluation import evaluate
from tests.pneumo.reporting.page.test_degenerate import damage, predictions

UNUSED = ScoredStore(Scoring(()), "no store is opened")


def judged(kind, split):
    return evaluate(damage(kind, split), config=EvaluateConfig(bootstrap_resamples=100), seed=0)


@pytest.mark.parametrize(
    ("kind", "split", "words"),
    [
        ("nan", "test", "5 of 120 scores are NaN or infinite"),
        ("nan", "val", "no threshold: val: "),
        ("empty", "test", "no study"),
    ],
)
def test_no_picture_and_no_error_is_counted_without_a_call(kind, split, words):
    found = judged(kind, split)
    decision = found.decide("test")
    assert decision.threshold is None
    pictures = choose_pictures(UNUSED, found.predictions, {}, decision, Config())
    assert (pictures.grid, pictures.gallery, pictures.errors) == ([], {}, {})
    assert words in str(pictures.reason)
    assert describe_errors(pictures) == {
        "errors_by_finding": None,
        "errors_by_finding_reason": pictures.reason,
    }


def test_saliency_is_told_why_a_study_is_not_called():
    found = judged("nan", "test")
    rows = found.predictions
    keys = rows.key[rows.target == 1]
    assert call_studies(rows, keys, found.decide("test")) == "5 of 120 scores are NaN or infinite"
    in_val = rows.subset("val")
    called = call_studies(rows, in_val.key, found.decide("val"))
    assert isinstance(called, np.ndarray)
    threshold = found.points["decision"].threshold
    np.testing.assert_array_equal(called, in_val.probability >= threshold)


def test_studies_are_called_by_their_key():
    rows = predictions()
    found = evaluate(rows, config=EvaluateConfig(bootstrap_resamples=100), seed=0)
    shuffled = replace(found, predictions=rows.take(np.random.default_rng(1).permutation(240)))
    decision = found.decide("test")
    called = call_studies(shuffled.predictions, rows.key, decision)
    np.testing.assert_array_equal(called, rows.probability >= decision.threshold)


def test_a_map_that_is_no_number_is_not_shown():
    rows = predictions()
    decision = evaluate(rows, config=EvaluateConfig(bootstrap_resamples=100), seed=0).decide("test")
    study = StudyRow("a" * 20, "p", "test", 1, "Lung Opacity", (), 61, "F", "AP", None, "", "")
    pixels, cam = np.zeros((8, 8), np.uint8), np.full((8, 8), np.nan, np.float32)
    for each, is_shown in ((cam, False), (np.zeros_like(cam), True)):
        case = make_case(study, ExplainedStudy(pixels, each), rows.take(np.array([0])), decision)
        assert (case.cam is not None) == is_shown
