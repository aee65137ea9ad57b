"""The scores of maps against boxes: brute force, scikit-learn, and maps that look nowhere."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from pneumo.errors import MetricError
from pneumo.evaluation.map_scores import (
    BASELINES,
    MAPS,
    MEASURES,
    NO_PRIOR,
    BoxScores,
    box_mask,
    prior_map,
    scale_boxes,
    score_map,
    summarise_saliency,
)
from pneumo.images.boxes import Box
from pneumo.reporting.page.saliency_section import saliency_sentence

pytestmark = pytest.mark.processors

SIZE = 12
boxes_on_map = st.lists(
    st.builds(Box, *[st.floats(-2, 9) for _ in range(2)], *[st.floats(0.5, 8) for _ in range(2)]),
    min_size=1,
    max_size=3,
).filter(lambda boxes: bool(box_mask((SIZE, SIZE), boxes).any()))
# Few levels, so that there are ties.
maps = arrays(np.float32, (SIZE, SIZE), elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1]))


def measure(values: Any, boxes: list[Box]) -> dict[Any, float]:
    return dict(zip(MEASURES, score_map(values, boxes).tolist(), strict=True))


# --- one map --------------------------------------------------------------------------------------


@given(maps, boxes_on_map)
def test_measures_are_those_of_brute_force_and_scikit_learn(values: Any, boxes: list[Box]) -> None:
    found = measure(values, boxes)
    mask = box_mask(values.shape, boxes)
    assert found["auprc"] == pytest.approx(average_precision_score(mask.ravel(), values.ravel()))
    if values.max() == 0:
        assert np.isnan(found["energy"])
        assert found["pointing"] == 0
        return
    assert found["energy"] == pytest.approx(values[mask].sum() / values.sum())
    assert found["pointing"] == pytest.approx(mask[values == values.max()].mean())


@given(maps, boxes_on_map, st.sampled_from([0.125, 4.0]))
def test_no_measure_depends_on_the_scale(values: Any, boxes: list[Box], factor: float) -> None:
    one, two = measure(values, boxes), measure(values * np.float32(factor), boxes)
    assert one == pytest.approx(two, nan_ok=True)


@given(boxes_on_map)
def test_a_uniform_map_gets_the_area_and_a_perfect_one_everything(boxes: list[Box]) -> None:
    mask = box_mask((SIZE, SIZE), boxes)
    uniform = measure(np.ones((SIZE, SIZE)), boxes)
    assert uniform == pytest.approx(dict.fromkeys(MEASURES, mask.mean()))
    assert measure(mask.astype(np.float32), boxes) == pytest.approx(dict.fromkeys(MEASURES, 1))


@pytest.mark.parametrize("boxes", [[], [Box(50, 50, 4, 4)], [Box(1.6, 1.6, 0.3, 0.3)]])
def test_boxes_that_cover_no_pixel_cannot_be_scored(boxes: list[Box]) -> None:
    with pytest.raises(MetricError, match="no box covers a pixel of the map"):
        score_map(np.ones((SIZE, SIZE)), boxes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_a_map_that_is_no_evidence_is_refused(bad: float) -> None:
    values = np.ones((SIZE, SIZE))
    values[3, 4] = bad
    with pytest.raises(MetricError, match="a negative value, a NaN or an infinity"):
        score_map(values, [Box(0, 0, 4, 4)])


# --- boxes and baselines --------------------------------------------------------------------------


def test_boxes_follow_the_size_of_the_input() -> None:
    boxes = (Box(20, 40, 60, 80),)
    (small,) = scale_boxes(boxes, stored_size=224, image_size=56)
    assert small == Box(5, 10, 15, 20)
    assert box_mask((56, 56), [small]).mean() == pytest.approx(box_mask((224, 224), boxes).mean())


def test_box_mask_takes_pixels_whose_centre_is_inside() -> None:
    assert box_mask((4, 4), [Box(0.6, 0.4, 2.0, 1.0)]).tolist() == [
        [False, True, True, False],
        [False, False, False, False],
        [False, False, False, False],
        [False, False, False, False],
    ]


def test_the_prior_is_the_mean_of_the_masks() -> None:
    boxes = [[Box(0, 0, 4, 4)], [Box(2, 2, 4, 4), Box(8, 8, 2, 2)]]
    expected = np.mean([box_mask((SIZE, SIZE), of_study) for of_study in boxes], axis=0)
    np.testing.assert_allclose(prior_map(boxes, SIZE), expected)
    np.testing.assert_array_equal(prior_map([], SIZE), np.ones((SIZE, SIZE)))


# --- a split --------------------------------------------------------------------------------------


def draw_scores(count: int, seed: int = 0) -> BoxScores:
    """Maps that look at the boxes, and random ones that do not."""
    rng = np.random.default_rng(seed)
    prior = rng.random((32, 32))
    values = []
    for _ in range(count):
        box = Box(*rng.uniform(0, 20, 2), *rng.uniform(4, 11, 2))
        cam = rng.random((32, 32)) + 2 * box_mask((32, 32), [box])
        values.append([score_map(one, [box]) for one in (cam, prior, rng.random((32, 32)))])
    keys = np.array([f"{i:04d}" for i in range(count)])
    return BoxScores(keys, np.array(values).reshape(-1, len(MAPS), len(MEASURES)))


def summarise(scores: BoxScores, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "patient": np.array([f"p{i // 2}" for i in range(len(scores))], dtype=np.str_),
        "is_called": np.arange(len(scores)) % 4 > 0,
        "positives": len(scores),
        "checkpoint": "run/epoch-0001.pt",
        "prior_studies": 40,
        "resamples": 200,
        "seed": 0,
    }
    return summarise_saliency(scores, **{**settings, **options})


def test_a_map_that_looks_at_the_boxes_beats_every_baseline() -> None:
    scores = draw_scores(40)
    found = summarise(scores)
    every = found.groups["all"]
    assert every.n == 40
    assert found.groups["true_positives"].n == 30
    assert found.groups["false_negatives"].n == 10
    for name in MEASURES:
        value = getattr(every.maps["cam"], name).value
        assert value == pytest.approx(scores.column("cam", name).mean())
        for baseline in BASELINES:
            gain = every.gain[baseline][name]
            other = getattr(every.maps[baseline], name).value
            assert gain.value == pytest.approx(value - other)
            assert gain.value > 0
            assert gain.low is None or gain.low > 0  # None: the same in every resample


def test_the_groups_are_their_own_studies() -> None:
    scores, called = draw_scores(24), np.arange(24) % 3 == 0
    missed = summarise(scores, is_called=called).groups["false_negatives"]
    expected = scores.column("cam", "auprc")[~called].mean()
    assert missed.maps["cam"].auprc.value == pytest.approx(expected)


def test_what_cannot_be_had_is_null_with_a_reason() -> None:
    none = summarise(draw_scores(0), positives=7).to_json()
    assert none["unscored"] == 7
    assert none["prior_studies"] == 40
    assert none["all"] == {"n": 0, "maps": None, "reason": "no such study with boxes"}
    few = summarise(draw_scores(4)).to_json()
    assert few["all"]["reason"] == "4 studies with boxes, fewer than 5"
    undecided = summarise(draw_scores(9), is_called="no threshold: val: no study").to_json()
    assert undecided["all"]["maps"] is not None
    assert undecided["true_positives"]["reason"] == "no threshold: val: no study"


def test_without_boxes_in_train_nothing_is_compared_with_the_prior() -> None:
    found = summarise(draw_scores(20), prior_studies=0)
    for group in found.groups.values():
        of_prior = [getattr(group.maps["prior"], name) for name in MEASURES]
        of_prior += group.gain["prior"].values()
        assert {(e.value, e.low, e.high, e.reason) for e in of_prior} == {
            (None, None, None, NO_PRIOR)
        }
        assert group.maps["cam"].auprc.value > group.maps["random"].auprc.value
        assert group.gain["random"]["auprc"].value > 0
    assert saliency_sentence(found) == (
        "It cannot be said where the network looks: train has no boxes, so there is no fixed map "
        "to compare with."
    )


def test_empty_maps_are_counted_and_take_no_part_in_the_energy() -> None:
    scores = draw_scores(10)
    values = scores.values.copy()
    values[:3, 0] = score_map(np.zeros((32, 32), np.float32), [Box(4, 4, 9, 9)])
    found = summarise(BoxScores(scores.keys, values)).groups["all"].maps["cam"]
    assert found.empty == 3
    assert found.energy.value == pytest.approx(scores.column("cam", "energy")[3:].mean())


def test_the_interval_of_the_energy_goes_by_patients_whose_map_is_not_empty() -> None:
    scores = draw_scores(30)
    values = scores.values.copy()
    values[6:, :, MEASURES.index("energy")] = np.nan  # 3 patients are left, too few
    every = summarise(BoxScores(scores.keys, values)).groups["all"]
    for energy in (every.maps["cam"].energy, every.gain["random"]["energy"]):
        assert energy.low is None
        assert "too few patients" in energy.reason
    assert every.maps["random"].auprc.low is not None


def test_a_pointing_game_won_or_lost_in_every_study_has_an_interval() -> None:
    scores = draw_scores(40)  # of 20 patients
    values = scores.values.copy()
    values[:, :, MEASURES.index("pointing")] = 1.0, 0.0, 0.0
    every = summarise(BoxScores(scores.keys, values)).groups["all"]
    won, lost = every.maps["cam"].pointing, every.maps["prior"].pointing
    assert (won.value, won.method, lost.method) == (1.0, *["Wilson over patients"] * 2)
    assert (won.low, lost.high) == pytest.approx((0.839, 0.161), abs=0.001)
    gain = every.gain["prior"]["pointing"]
    assert (gain.value, gain.method) == (1.0, "Newcombe, of both intervals")
    assert gain.low == pytest.approx(1 - 0.161 * 2**0.5, abs=0.002)


def test_parts_join_to_the_same_whole_in_any_order() -> None:
    scores = draw_scores(9)
    parts = [BoxScores(scores.keys[i::3], scores.values[i::3]) for i in (2, 0, 1)]
    joined = BoxScores.join(parts)
    assert joined.keys.tolist() == scores.keys.tolist()
    np.testing.assert_array_equal(joined.values, scores.values)
    assert len(BoxScores.join([])) == 0
