"""The right studies are shown, and the errors are counted by finding."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pneumo.evaluation.shown_studies import (
    OUTCOMES,
    choose_errors,
    choose_gallery,
    count_errors,
    sample_studies,
)
from tests.estimates import width


def test_gallery_holds_the_most_and_the_least_certain_and_a_draw():
    rng = np.random.default_rng(0)
    target, probability = rng.integers(0, 2, 400), rng.random(400)
    chosen = choose_gallery(target, probability, 0.4, per_outcome=7, seed=7)

    assert tuple(chosen) == OUTCOMES
    for outcome, choices in chosen.items():
        rows = np.array([choice.row for choice in choices])
        assert len(set(rows.tolist())) == 7
        assert (target[rows] == (outcome in ("tp", "fn"))).all()
        assert ((probability[rows] >= 0.4) == (outcome in ("tp", "fp"))).all()
        assert [c.why for c in choices].count("most certain") == 3
        assert [c.why for c in choices].count("least certain") == 2
        members = np.flatnonzero(
            (target == (outcome in ("tp", "fn")))
            & ((probability >= 0.4) == (outcome in ("tp", "fp")))
        )
        distance = np.sort(np.abs(probability[members] - 0.4))
        shown = np.abs(probability[rows] - 0.4)
        assert shown[:3].tolist() == distance[::-1][:3].tolist()
        assert shown[3:5].tolist() == distance[:2].tolist()

    again = choose_gallery(target, probability, 0.4, per_outcome=7, seed=7)
    other = choose_gallery(target, probability, 0.4, per_outcome=7, seed=8)
    assert chosen == again
    assert any(chosen[o] != other[o] for o in OUTCOMES)


@given(
    arrays(np.int8, st.shared(st.integers(0, 12), key="n"), elements=st.integers(0, 1)),
    arrays(np.float64, st.shared(st.integers(0, 12), key="n"), elements=st.floats(0, 1)),
    st.integers(1, 6),
)
def test_gallery_shows_no_study_twice_and_as_many_as_there_are(target, probability, per_outcome):
    chosen = choose_gallery(target, probability, 0.5, per_outcome=per_outcome, seed=0)
    rows = [choice.row for choices in chosen.values() for choice in choices]
    assert len(set(rows)) == len(rows)
    called = probability >= 0.5
    assert len(chosen["tp"]) == min(per_outcome, int((target & called).sum()))
    assert len(chosen["fp"]) == min(per_outcome, int(((target == 0) & called).sum()))


def test_gallery_of_a_perfect_model_has_no_errors():
    chosen = choose_gallery(np.array([0, 1]), np.array([0.1, 0.9]), 0.5, per_outcome=6, seed=0)
    assert {outcome: [c.row for c in choices] for outcome, choices in chosen.items()} == {
        "tp": [1],
        "fp": [],
        "fn": [],
        "tn": [0],
    }


def test_errors_are_the_most_confident_ones():
    target = np.array([0, 0, 0, 1, 1, 1, 0])
    probability = np.array([0.9, 0.6, 0.1, 0.2, 0.05, 0.8, 0.95])
    chosen = choose_errors(target, probability, 0.5, count=2)
    assert {outcome: [c.row for c in choices] for outcome, choices in chosen.items()} == {
        "fp": [6, 0],
        "fn": [4, 3],
    }


def test_a_sample_holds_so_many_of_each_outcome_and_view():
    rng = np.random.default_rng(0)
    target, view = rng.integers(0, 2, 400), rng.choice(["AP", "PA", ""], 400, p=[0.5, 0.48, 0.02])
    probability = rng.random(400)
    sample = sample_studies(target, probability, 0.5, view=view, per_stratum=4, seed=3)
    assert len({draw.row for draw in sample}) == len(sample)
    outcomes = {(1, True): "tp", (0, True): "fp", (1, False): "fn", (0, False): "tn"}
    strata = Counter(
        (outcomes[t, p >= 0.5], v) for t, p, v in zip(target, probability, view, strict=True)
    )
    found: Counter[tuple[str, str]] = Counter()
    for draw in sample:
        key = outcomes[target[draw.row], probability[draw.row] >= 0.5], view[draw.row]
        assert draw.stratum_size == strata[key]
        found[key] += 1
    assert found == {key: min(4, n) for key, n in strata.items()}
    assert sample_studies(target, probability, 0.5, view=view, per_stratum=4, seed=3) == sample
    assert sample_studies(target, probability, 0.5, view=view, per_stratum=4, seed=4) != sample
    more = sample_studies(target, probability, 0.5, view=view, per_stratum=5, seed=3)
    assert {draw.row for draw in sample} <= {draw.row for draw in more}


def test_errors_are_counted_by_finding():
    finding = np.array(["Normal", "Opacity", "Normal", "Opacity", "Other"])
    target, probability = np.array([0, 1, 0, 1, 0]), np.array([0.9, 0.2, 0.1, 0.8, 0.3])
    patient = np.array(list("abcde"))
    found = count_errors(finding, target, probability, 0.5, patient=patient, resamples=200, seed=0)
    assert [(one.finding, one.n, one.called_positive, one.errors) for one in found] == [
        ("Normal", 2, 1, 1),
        ("Opacity", 2, 1, 1),
        ("Other", 1, 0, 0),
    ]
    wilson = found[0].to_json()["wilson"]
    assert wilson["low"] < wilson["value"] == 0.5 < wilson["high"]
    assert found[2].error_rate.method == "Wilson over patients"


def test_the_share_of_errors_knows_that_images_of_a_patient_are_alike():
    rng = np.random.default_rng(0)
    wrong = np.repeat(rng.random(100) < 0.3, 8)  # a patient's eight images are called alike
    found, *_ = count_errors(
        np.full(800, "Normal"),
        np.zeros(800),
        wrong.astype(float),
        0.5,
        patient=np.repeat(np.arange(100), 8).astype(np.str_),
        resamples=500,
        seed=0,
    )
    assert found.error_rate.value == found.wilson.value == wrong.mean()
    assert width(found.error_rate) == pytest.approx(8**0.5 * width(found.wilson), rel=0.15)


@pytest.mark.parametrize("few", [2, 4, 5, 12])
def test_the_interval_of_a_finding_is_that_of_its_own_patients(few):
    finding = np.where(np.arange(300) < few, "Rare", "Normal")
    called = np.arange(300) % 2
    patient = np.arange(300).astype(np.str_)
    *_, rare = count_errors(
        finding, np.zeros(300), called, 0.5, patient=patient, resamples=400, seed=0
    )
    if few < 5:
        assert rare.error_rate.low is rare.error_rate.high is None
    else:
        assert width(rare.error_rate) > width(rare.wilson)
