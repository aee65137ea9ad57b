"""Whatever is wrong with the predictions, the page says so in words."""

import dataclasses
import html
import re

import numpy as np
import pytest

from pneumo.config import EvaluateConfig
from pneumo.evaluation.comparison import ComparedRuns, compare
from pneumo.evaluation.estimates import Estimate
from pneumo.evaluation.map_scores import (
    BASELINES,
    MAPS,
    MEASURES,
    Group,
    GroupSummary,
    MapSummary,
    SaliencySummary,
)
from pneumo.evaluation.predictions import sigmoid
from pneumo.reporting.figures import charts
from pneumo.reporting.figures.case_pictures import Pictures
from pneumo.reporting.figures.style import show_threshold
from pneumo.reporting.page.formatting import Cell, fine_percent, percent, percent_range
from pneumo.reporting.page.saliency_section import saliency_sentence
from tests.pneumo.reporting.page.test_page import cases, render, section
from tests.predictions import judge, make_plain

NOTHING = Pictures([], {}, {}, [])


def predictions(n=240):
    return make_plain(n, sex=np.where(np.arange(n) < 6, "M", "F"))


def damage(kind, split):
    found = predictions()
    rows = found.split == split
    if kind == "one class":
        return dataclasses.replace(found, target=np.where(rows, 0, found.target).astype(np.int8))
    if kind == "nan":
        bad = np.where(rows & (np.arange(len(rows)) < 9), np.nan, found.logit).astype(np.float32)
        return dataclasses.replace(found, logit=bad, probability=sigmoid(bad))
    if kind == "empty":
        return found.take(~rows)
    if kind == "too small":
        return found.take(~rows | (np.cumsum(rows) <= 8))
    assert kind == "without boxes"
    area = np.where(rows, np.nan, found.box_area_fraction)
    return dataclasses.replace(found, box_area_fraction=area)


def test_one_score_for_all_separates_nothing():
    found = predictions()
    same = np.full(len(found), 0.25, np.float32)
    judged = judge(dataclasses.replace(found, logit=same, probability=sigmoid(same)))
    text = visible(render(judged, pictures=NOTHING))
    assert "gives all studies of test the same score" in text
    assert "% of cases" not in text


def visible(page):
    """The page's words, without its style, configuration and drawings."""
    page = re.sub(r"<(style|pre|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", page)).split())


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("one class", "one class only"),
        ("nan", "scores are NaN or infinite"),
        ("empty", "no study"),
        ("too small", "too small"),
        ("without boxes", "no positive has a box"),
    ],
)
def test_bad_predictions_are_reported_with_their_reason(kind, words, split):
    judged = judge(damage(kind, split))
    text = visible(render(judged, pictures=NOTHING))
    if kind != "without boxes" or split == "test":
        assert words in text
    assert not re.search(r"\b(None(?! on test| is in)|nan|inf|n/a)\b", text)
    if kind in ("nan", "empty", "one class") and split == "val":
        assert "No threshold could be chosen" in text
        assert "no calibration" in text


def test_a_fault_of_test_is_not_blamed_on_val():
    judged = judge(damage("nan", "test"))
    why = "5 of 120 scores are NaN or infinite"
    page = render(judged, pictures=Pictures.none(why))
    for name in ("saliency", "errors", "grid"):
        assert why in section(page, name)
        assert "threshold" not in section(page, name)
    assert f"test: {why}" in section(page, "data")
    assert "each exactly once" not in section(page, "data")
    assert "no threshold" not in charts.draw_confusion(judged).decode()


def test_studies_that_are_scored_twice_are_not_said_to_be_scored_once():
    found = predictions()
    twice = np.append(np.arange(len(found)), 0)  # one of test
    text = section(render(judge(found.take(twice))), "data")
    assert "121 test studies; test: 1 studies are scored more than once" in text
    assert "each exactly once" in section(render(), "data")


def test_a_target_near_a_standard_one_hides_no_point():
    config = EvaluateConfig(
        bootstrap_resamples=100, operating_point="sensitivity", sensitivity=0.904
    )
    text = section(render(judge(predictions(), config=config)), "points")
    rows = ("0.904 decision, screening", "0.90 ", "0.95 ")
    assert all(f"sensitivity ≥ {row}" in text for row in rows)


def test_a_group_of_three_is_said_to_be_too_small():
    text = section(render(judge(predictions())), "whom")
    assert "not known: M (n = 3), unknown" not in text
    assert "AUROC not known: M (n = 3): too small, 10 are needed of each class" in text


def test_what_is_known_of_a_group_without_an_auroc_is_said():
    found = predictions()
    view = np.where(found.target == 1, "PA", "AP")  # no negative of PA, no positive of AP
    text = section(render(judge(dataclasses.replace(found, view=view))), "whom")
    assert re.search(r"AUROC not known: AP \(n = \d+, specificity 0\.\d\d\)", text)
    assert re.search(r"PA \(n = \d+, sensitivity 0\.\d\d\)", text)


def test_another_run_stands_beside():
    found = judge(predictions()).predictions
    worse = dataclasses.replace(
        found, logit=-found.logit, calibrated_probability=1 - found.calibrated_probability
    )
    splits = {
        name: compare(found.subset(name), worse.subset(name), resamples=100, seed=0)
        for name in ("val", "test")
    }
    judged = judge(found)
    page = render(judged, compared=ComparedRuns("new", "old", splits))
    text = section(page, "comparison")
    assert text.startswith(
        "Comparison with another run new ranks better: the difference in AUROC is +0."
    )
    assert "DeLong by patient: p < 0.001" in text
    assert 'id="comparison"' not in render(judged)


def saliency(low, high, prior_studies=3000, **gains):
    """`gains` by baseline are others than `low` to `high`."""
    one = Estimate(0.3, 0.2, 0.4, "m")
    gain = Estimate((low + high) / 2, low, high, "m")
    whole = GroupSummary(
        20,
        None,
        dict.fromkeys(MAPS, MapSummary(one, one, one, 0)),
        {name: dict.fromkeys(MEASURES, gains.get(name, gain)) for name in BASELINES},
    )
    few = GroupSummary(3, "3 studies with boxes, fewer than 5")
    groups: dict[Group, GroupSummary] = {
        "all": whole,
        "true_positives": whole,
        "false_negatives": few,
    }
    return SaliencySummary(20, 0, "best", prior_studies, groups)


def test_better_than_a_prior_of_few_studies_is_not_yet_at_hand():
    assert "to the opacity of the study at hand, not merely" in saliency_sentence(
        saliency(0.1, 0.2)
    )
    few = saliency_sentence(saliency(0.1, 0.2, prior_studies=40))
    assert "made of 40 positives of train only" in few
    assert "is not shown" in few
    no_better = saliency(0.1, 0.2, random=Estimate(0.0, -0.1, 0.1, "m"))
    assert "better than the maps of a network with random weights" in saliency_sentence(no_better)


def test_without_a_mapping_nothing_is_said_of_patients():
    known = judge(predictions())
    unknown = judge(predictions(), has_patients=False)
    assert known.test.to_json()["patients"] > 0
    assert unknown.test.to_json()["patients"] is None
    text = section(render(unknown), "good")
    assert "Intervals resample images, whose patients are unknown, and are too narrow" in text
    assert "of unknown patients" in text
    assert "clustered by patient" not in text
    assert "over patients" not in visible(render(unknown))
    assert "over images" in visible(render(unknown))
    assert "Intervals resample patients, not images" in section(render(known), "good")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.2, "better than a fixed map"),
        (-0.2, -0.1, "A fixed map of where opacities usually lie, which looks at no image"),
        (-0.1, 0.1, "not shown to agree"),
    ],
)
def test_the_maps_are_judged_against_the_lung_prior(low, high, words):
    found = saliency(low, high)
    assert words in saliency_sentence(found)
    text = section(render(saliency=found), "saliency")
    assert words in text
    assert "Lung prior" in text
    assert "not known: 3 studies with boxes, fewer than 5" in text


def test_errors_say_what_is_known_of_the_study():
    wrong = [
        dataclasses.replace(case, finding="Normal", view="AP", age_band="60-69", why="most certain")
        for case in cases(2)
    ]
    text = section(render(pictures=Pictures([], {}, {"fp": wrong, "fn": []}, [])), "errors")
    assert "most certain Normal, AP, 60–69 years" in text
    assert "empty map" not in text
    blank = dataclasses.replace(wrong[0], cam=np.zeros((8, 8), np.float32))
    page = render(pictures=Pictures([], {}, {"fp": [blank]}, []))
    assert "60–69 years, empty map" in section(page, "errors")
    assert "The most confident false negatives None on test at this threshold." in text


def test_numbers_in_words():
    assert str(Cell.of(Estimate(0.5, 0.25, 0.75, "m"), 2)) == "0.50 (0.25–0.75)"
    assert str(Cell.of(Estimate.undefined("no study"))) == "not known (no study)"
    assert Cell.of(Estimate(-0.0001, -0.1, 0.2, "m"), 2, signed=True) == Cell(
        "0.00", "−0.10 to +0.20"
    )
    assert [show_threshold(x) for x in (0.4123, 0.99964, 1.0)] == ["0.412", "0.9996", "1.000"]


@pytest.mark.parametrize("show", [percent, fine_percent, lambda x: percent_range(x, x)])
def test_only_all_and_nothing_read_as_all_and_nothing(show):
    for whole in (1, 3, 201, 300, 20_000, 10_000_000):
        for part in {0, 1, whole // 2, whole - 1, whole}:
            numbers = [float(number) for number in re.findall(r"[\d.]+", show(part / whole))]
            for number in numbers:
                assert (number == 0, number == 100) == (part == 0, part == whole)
    assert percent(299 / 300) == "99.7\N{NO-BREAK SPACE}%"
    assert percent(0.004) == "0.4\N{NO-BREAK SPACE}%"
    assert percent(sum([0.1] * 10)) == "100\N{NO-BREAK SPACE}%"  # less than 1 by rounding
    assert percent(0.914) == "91\N{NO-BREAK SPACE}%"
    assert percent_range(0.21, 0.9999) == "21.0 to 99.99\N{NO-BREAK SPACE}%"
