"""Grad-CAM is the library's, the fast path is equal to it, and the scores mean what they say."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pneumo.errors import MetricError
from pneumo.explain import (
    OUTCOMES,
    box_mask,
    choose_gallery,
    class_activation,
    gradcam,
    score_against_boxes,
)
from pneumo.model import build_model
from pneumo.studies import Box


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = build_model("resnet18")
    network(torch.randn(8, 1, 64, 64))  # running statistics that are not the defaults
    return network


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 1, 96, 128, generator=torch.Generator().manual_seed(1))


def test_class_activation_equals_gradcam(model, images):
    library, fast = gradcam(model, images), class_activation(model, images)
    assert library.shape == fast.shape == (5, 96, 128)
    assert library.dtype == fast.dtype == np.float32
    assert np.abs(library - fast).max() < 1e-5
    assert library.min() >= 0
    assert library.max() <= 1
    assert library.max(axis=(1, 2)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("explain", [gradcam, class_activation])
def test_maps_leave_the_model_as_it_was_and_ignore_what_surrounds_them(model, images, explain):
    expected = explain(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = explain(model, images)

    assert model.training
    assert np.array_equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("explain", [gradcam, class_activation])
def test_a_map_without_evidence_is_zero(model, images, explain):
    weight = model.fc.weight.detach().clone()
    with torch.no_grad():
        model.fc.weight.copy_(-weight.abs())
    try:
        assert explain(model, images).max() == 0
    finally:
        with torch.no_grad():
            model.fc.weight.copy_(weight)


def test_maps_do_not_depend_on_their_neighbours(model, images):
    together = gradcam(model, images)
    alone = np.concatenate([gradcam(model, image[None]) for image in images])
    assert np.abs(together - alone).max() < 1e-4


def test_no_result_is_an_error(images):
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer4 = nn.Sequential(nn.Conv2d(1, 2, 3))

        def forward(self, x):
            raise IndexError("no logit")

    with pytest.raises(MetricError, match="no map"):
        gradcam(Headless(), images)


def test_box_score():
    cam = np.zeros((10, 20))
    cam[2:4, 5:9] = 1.0
    cam[8, 8] = 2.0
    exact = score_against_boxes(cam, [Box(5, 2, 4, 2)])
    assert exact.energy == pytest.approx(0.8)
    assert exact.area == pytest.approx(8 / 200)
    assert exact.lift == pytest.approx(20)
    assert not exact.is_hit  # the single maximum lies elsewhere
    assert score_against_boxes(cam, [Box(8, 8, 1, 1)]).is_hit

    uniform = score_against_boxes(np.ones((10, 20)), [Box(0, 0, 10, 10), Box(5, 0, 10, 10)])
    assert uniform.area == pytest.approx(0.75)  # an overlap counts once
    assert uniform.lift == pytest.approx(1)

    empty = score_against_boxes(np.zeros((10, 20)), [Box(0, 0, 10, 10)])
    assert not empty.is_hit
    assert math.isnan(empty.energy)
    with pytest.raises(MetricError, match="no box"):
        score_against_boxes(cam, [])


def test_box_mask_takes_pixels_whose_centre_is_inside():
    assert box_mask((4, 4), [Box(0.6, 0.4, 2.0, 1.0)]).tolist() == [
        [False, True, True, False],
        [False, False, False, False],
        [False, False, False, False],
        [False, False, False, False],
    ]


def test_gallery_holds_the_most_certain_and_a_draw():
    rng = np.random.default_rng(0)
    target, probability = rng.integers(0, 2, 400), rng.random(400)
    chosen = choose_gallery(target, probability, 0.4, per_outcome=5, seed=7)

    assert tuple(chosen) == OUTCOMES
    for outcome, rows in chosen.items():
        assert len(set(rows.tolist())) == 5
        assert (target[rows] == (outcome in ("tp", "fn"))).all()
        assert ((probability[rows] >= 0.4) == (outcome in ("tp", "fp"))).all()
    false_positives = probability[(target == 0) & (probability >= 0.4)]
    assert probability[chosen["fp"][:3]].tolist() == sorted(false_positives)[::-1][:3]
    false_negatives = probability[(target == 1) & (probability < 0.4)]
    assert probability[chosen["fn"][:3]].tolist() == sorted(false_negatives)[:3]

    again = choose_gallery(target, probability, 0.4, per_outcome=5, seed=7)
    other = choose_gallery(target, probability, 0.4, per_outcome=5, seed=8)
    assert all(np.array_equal(chosen[o], again[o]) for o in OUTCOMES)
    assert any(not np.array_equal(chosen[o], other[o]) for o in OUTCOMES)


def test_gallery_of_a_perfect_model_has_no_errors():
    chosen = choose_gallery(np.array([0, 1]), np.array([0.1, 0.9]), 0.5, per_outcome=6, seed=0)
    assert {outcome: rows.tolist() for outcome, rows in chosen.items()} == {
        "tp": [1],
        "fp": [],
        "fn": [],
        "tn": [0],
    }
