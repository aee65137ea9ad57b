"""Every group is judged as if it were alone, and the worst is not just the smallest."""

import dataclasses
import json
import math

import numpy as np
import pytest
import sklearn.metrics as reference
from sklearn.metrics import average_precision_score, roc_auc_score

from pneumo.evaluation import bootstrap
from pneumo.evaluation.bootstrap import Resampled
from pneumo.evaluation.predictions import sigmoid
from pneumo.evaluation.subgroup_definitions import divide_studies
from pneumo.evaluation.subgroup_gaps import Gap, find_worst_subgroup
from pneumo.evaluation.subgroups import evaluate_subgroups, subgroup_statistics
from pneumo.reporting.page.subgroup_section import worst_subgroup_sentence
from tests import present
from tests.predictions import make_predictions

pytestmark = pytest.mark.processors

THRESHOLD = 0.3
LOGIT = math.log(THRESHOLD / (1 - THRESHOLD))


def draw(n=1500, **columns):
    rows = make_predictions(n, images_per_patient=2)
    return dataclasses.replace(rows, **{"calibrated_probability": rows.probability, **columns})


def judge(rows, threshold=LOGIT, resamples=200, min_patients=10):
    sets = subgroup_statistics(rows, threshold, min_patients)
    few = rows.count_rarer_class()
    found = bootstrap.resample_sets(
        rows.patient, sets, resamples=resamples, seed=0, effective_patients=few
    )
    return evaluate_subgroups(rows, threshold, found, min_patients)


def by_name(found):
    return {(group.by, group.name): group for group in found.groups}


def test_groups_equal_scikit_learn_on_their_studies():
    rows = draw()
    positive = rows.target == 1
    groups = by_name(judge(rows))
    low, high = np.quantile(rows.box_area_fraction[positive], [1 / 3, 2 / 3])
    area = np.nan_to_num(rows.box_area_fraction)
    expected = {
        ("sex", "F"): rows.sex == "F",
        ("age", "40–59"): (rows.age >= 40) & (rows.age < 60),
        ("view", "AP"): rows.view == "AP",
        ("negatives", "Normal"): positive | (rows.finding == "Normal"),
        ("box_area", "smallest"): ~positive | (area <= low),
        ("box_area", "largest"): ~positive | (area > high),
    }
    for key, mask in expected.items():
        group, part = groups[key], rows.take(mask)
        called = part.probability >= THRESHOLD
        assert (group.n, group.positives) == (len(part), part.target.sum()), key
        assert group.patients == len(set(part.patient))
        assert group.auroc.value == pytest.approx(roc_auc_score(part.target, part.logit))
        assert group.average_precision.value == pytest.approx(
            average_precision_score(part.target, part.logit)
        )
        shares = {"recall": called[part.target == 1], "specificity": ~called[part.target == 0]}
        for name, found in shares.items():
            rate = group.rates[name]
            if key[0] in ("sex", "age", "view") or rate.reason is None:
                assert rate.value == pytest.approx(found.mean()), key
        if key[0] in ("sex", "age", "view"):
            assert_headlines(group, part, called)
        for one in (group.auroc, group.average_precision):
            assert one.low < one.value < one.high
    female = rows.take(rows.sex == "F")
    assert groups["sex", "F"].in_the_large.value == pytest.approx(
        female.probability.mean() - female.target.mean()
    )
    rest = rows.take(rows.view != "AP")
    assert groups["view", "AP"].gaps["auroc"].value == pytest.approx(
        groups["view", "AP"].auroc.value - roc_auc_score(rest.target, rest.logit)
    )


def assert_headlines(group, part, called):
    expected = {
        "accuracy": reference.accuracy_score(part.target, called),
        "precision": reference.precision_score(part.target, called),
        "npv": reference.precision_score(1 - part.target, ~called),
        "f1": reference.f1_score(part.target, called),
        "mcc": reference.matthews_corrcoef(part.target, called),
    }
    assert {name: group.rates[name].value for name in expected} == pytest.approx(expected)
    brier = reference.brier_score_loss(part.target, part.calibrated_probability)
    assert group.brier.value == pytest.approx(brier)
    for one in (*group.rates.values(), group.brier):
        assert one.low < one.value < one.high


def test_a_group_that_is_all_found_still_has_an_interval():
    group = by_name(judge(draw(), threshold=-math.inf))["sex", "F"]
    sensitivity, specificity = group.rates["recall"], group.rates["specificity"]
    assert (sensitivity.value, sensitivity.high) == (1.0, 1.0)
    assert 0.9 < sensitivity.low < 1
    assert specificity.value == 0
    assert specificity.method == "Wilson over patients"
    assert group.rates["npv"].reason == "no study is called negative"


@pytest.mark.parametrize("logit", [9.0, -9.0])
def test_the_gap_to_a_group_without_variation_allows_for_what_was_not_seen(logit):
    """All positives of F found, or none: its rate is not known exactly, nor is the gap."""
    rows = draw(800, sex=np.where(np.arange(800) % 10, "M", "F"))
    is_same = (rows.sex == "F") & (rows.target == 1)
    rows = dataclasses.replace(rows, logit=np.where(is_same, logit, rows.logit))
    groups = by_name(judge(rows, threshold=0.0))
    rate = groups["sex", "F"].rates["recall"]
    own, rest = (groups["sex", name].gaps["sensitivity"] for name in "FM")
    assert rate.value == float(logit > 0)
    assert own.low < own.value - (rate.value - rate.low)
    assert own.high > own.value + (rate.high - rate.value)
    assert (own.low, own.high) == pytest.approx((-rest.high, -rest.low))


def test_what_two_groups_share_is_told_once():
    groups = by_name(judge(draw()))
    normal, small = groups["negatives", "Normal"], groups["box_area", "smallest"]
    assert normal.rates["recall"].reason == "the positives are those of the whole split"
    assert normal.rates["specificity"].value is not None
    assert small.rates["specificity"].reason == "the negatives are those of the whole split"
    assert small.rates["recall"].value is not None
    for group in (normal, small):
        mixed = [group.rates[name] for name in ("precision", "npv", "accuracy", "f1", "mcc")]
        for one in (*mixed, group.brier, group.in_the_large):
            assert one.reason.endswith("are those of the whole split")


def test_groups_of_one_kind_hold_every_study():
    rows = draw(view=np.where(np.arange(1500) % 7, "PA", ""), sex=np.full(1500, ""))
    for by in ("sex", "age", "view"):
        members = [m for m in divide_studies(rows, 10) if m.by == by]
        assert np.sum([m.own for m in members], axis=0).tolist() == [1] * 1500
        for one in members:
            assert not (one.own & one.rest).any()
    assert {m.name for m in divide_studies(rows, 10) if m.by == "sex"} == {"F", "M", "unknown"}
    assert {m.name for m in divide_studies(draw(), 10) if m.by == "view"} == {"AP", "PA"}


def test_a_group_of_three_patients_is_not_judged():
    rows = draw()
    view = np.where(np.arange(1500) < 6, "AP", "PA")  # 3 patients of 2 studies
    found = judge(dataclasses.replace(rows, view=view))
    small, rest = (by_name(found)["view", name] for name in ("AP", "PA"))
    assert (small.n, small.patients) == (6, 3)
    assert small.auroc.value is None
    assert "too small" in small.auroc.reason
    assert "10 are needed" in small.rates["recall"].reason
    assert rest.auroc.value is not None
    assert rest.gaps["auroc"].reason.startswith("the rest is too small")
    assert found.worst.by != "view"


def test_nothing_is_invented_without_boxes_ages_or_threshold():
    nothing = np.full(1500, np.nan)
    rows = draw(box_area_fraction=nothing, age=nothing, calibrated_probability=nothing)
    found = judge(rows, threshold=None)
    groups = by_name(found)
    assert found.box_area_cuts is None
    for name in ("smallest", "middle", "largest"):
        group = groups["box_area", name]
        assert group.positives == 0
        for one in (group.auroc, group.rates["recall"], group.gaps["auroc"]):
            assert one.reason == "no positive has a box"
    assert groups["age", "40–59"].n == 0
    assert groups["age", "40–59"].auroc.value is None
    assert groups["age", "unknown"].n == 1500
    female = groups["sex", "F"]
    assert female.auroc.value is not None
    for one in female.rates.values():
        assert one.reason == "no threshold was chosen on val"
    assert female.brier.reason == "no calibration"
    assert female.in_the_large.reason == "no calibration"
    json.dumps(found.to_json(), allow_nan=False)


def test_a_split_of_one_class_has_no_worst_group():
    found = judge(draw(target=np.zeros(1500, dtype=np.int8)))
    assert found.worst.measures == ("specificity",)
    assert by_name(found)["sex", "F"].auroc.value is None
    assert by_name(found)["sex", "F"].rates["specificity"].value is not None


def test_the_group_that_is_truly_worse_is_named():
    rows = draw(3000)
    rng = np.random.default_rng(1)
    confused = np.where(rows.view == "AP", rng.normal(size=3000) - 1, rows.logit)
    rows = dataclasses.replace(rows, logit=confused.astype(np.float32))
    worst = judge(rows, threshold=None).worst
    assert (worst.by, worst.name, worst.measure) == ("view", "AP", "auroc")
    assert worst.is_shown
    assert worst.gap.high < 0
    assert "Bonferroni" in worst.gap.method


def test_noise_is_seldom_called_worse():
    """As many groups as there are, none worse: at most 5 % of the time one is shown."""
    shown = 0
    for seed in range(40):
        rows = make_predictions(500, seed=seed)
        view = np.random.default_rng(seed).choice(["AP", "PA"], 500)
        rows = dataclasses.replace(rows, view=view, calibrated_probability=rows.probability)
        shown += judge(rows, resamples=100).worst.is_shown
    assert shown <= 5


def make_gap(name, value, sd, measure="auroc", patients=40):
    rng = np.random.default_rng(0)
    pair = np.array([0.8 + value, 0.8])
    drawn = pair[:, None] + np.stack([rng.normal(0, sd, 500), np.zeros(500)])
    return Gap("sex", name, measure, Resampled(pair, drawn, patients), (patients, patients))


def test_the_worst_is_not_just_the_smallest():
    worst = find_worst_subgroup(
        [make_gap("F", -0.3, 0.5), make_gap("M", -0.2, 0.01, patients=4000)], 10
    )
    assert (worst.name, worst.is_shown, worst.compared) == ("M", True, 2)
    assert find_worst_subgroup([make_gap("F", 0.1, 0.2)], 10).is_shown is False
    assert "10 patients with" in present(find_worst_subgroup([], 10).gap.reason)


def test_a_group_without_an_error_does_not_make_the_others_worse():
    """Its resamples never vary: 12 of 12 found, beside 80 of 100, is no news."""
    group, rest = np.ones((1, 500)), np.random.default_rng(0).normal(0.8, 0.04, (1, 500))
    pair = Resampled(np.array([0.8, 1.0]), np.concatenate([rest, group]), 12)
    gaps = [Gap("sex", "M", "sensitivity", pair, (100, 12)), *(make_gap("F", 0.1, 0.1),) * 9]
    assert not find_worst_subgroup(gaps, 10).is_shown


def make_miscalibrated(own, rest):
    """A subgroup and the others, whose mean predicted - observed risk is known to 0.004 or so."""
    pair = np.array([own, rest])
    drawn = pair[:, None] + np.random.default_rng(0).normal(0, 0.004, (2, 500))
    return Gap("sex", "F", "in_the_large", Resampled(pair, drawn, 400), (400, 400))


@pytest.mark.parametrize(
    ("own", "rest", "gap"),
    [
        (-0.05, 0.05, None),
        (0.052, -0.05, None),
        (0.08, -0.02, 0.06),
        (-0.08, -0.02, 0.06),
        (0.02, 0.08, None),
    ],
)
def test_who_is_as_far_from_right_in_the_other_direction_is_not_served_worse(own, rest, gap):
    worst = find_worst_subgroup([make_miscalibrated(own, rest)], 10)
    assert worst.is_shown == (gap is not None)
    assert worst_subgroup_sentence(worst).startswith("Served worst") == worst.is_shown
    if gap is not None:
        assert worst.gap.value == pytest.approx(gap)
        assert 0 < present(worst.gap.low) < gap < present(worst.gap.high)


def test_women_whose_scores_are_lower_are_served_worse_though_ranked_alike():
    rows = make_predictions(3000, effect=2.5)
    view = np.random.default_rng(0).choice(["AP", "PA"], 3000)
    rows = dataclasses.replace(rows, view=view)
    logit = rows.logit - np.where(rows.sex == "F", 2.0, 0.0).astype(np.float32)
    rows = dataclasses.replace(rows, logit=logit, calibrated_probability=sigmoid(logit))
    found = judge(rows, threshold=-0.5)
    worst, women = found.worst, by_name(found)["sex", "F"]
    assert abs(women.gaps["auroc"].value) < 0.05
    assert women.gaps["sensitivity"].high < -0.3
    assert (worst.name.split(",")[0], worst.is_shown) == ("F", True)
    assert worst.measure in ("sensitivity", "in_the_large")


def test_properties_are_crossed_where_both_classes_are_in_both():
    found = judge(draw(3000))
    crossed = [group for group in found.groups if group.by in ("sex_age", "view_sex")]
    assert ("view_sex", "AP, F") in by_name(found)
    assert all(group.auroc.value is not None for group in crossed)
    assert not [g for g in judge(draw(60)).groups if g.by == "sex_age"]
