"""What networks say: one logit a study, the same on any number of ranks and in any batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pneumo.config import DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import Batch, open_loader
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model
from pneumo.network.scoring import (
    Member,
    Scores,
    prepare_input,
    score,
    score_images,
)

StoreMaker = Callable[..., str]


# --- batches --------------------------------------------------------------------------------------


def open_val(store_url: str, rank: int = 0, size: int = 1, batch_size: int = 4) -> list[Batch]:
    store = PreparedStore(store_url, read_manifest(store_url), DataConfig(cache="stream"))
    opened = open_loader(store, "val", world=World(rank, size), device="cpu")
    return list(opened.evaluation(batch_size=batch_size))


@pytest.fixture(scope="module")
def store_url(tiny_store: StoreMaker) -> str:
    return tiny_store(val=53)


@pytest.fixture(scope="module")
def data(store_url: str) -> Batch:
    """The whole val split."""
    [batch] = open_val(store_url, batch_size=53)
    return batch


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("resnet18")
        model(torch.randn(16, 1, 32, 32))  # running statistics, so that logits are of usual size
    return model


def as_dict(scores: Scores) -> dict[str, float]:
    return dict(zip(scores.keys.tolist(), scores.logits.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_any_number_of_ranks_scores_each_study_once_and_the_same(
    model: nn.Module, data: Batch, store_url: str, size: int
) -> None:
    with torch.inference_mode():
        expected = model.eval()(data.images).squeeze(1).numpy()
    assert np.ptp(expected) > 0.01
    parts = [score(model.train(), open_val(store_url, rank, size)) for rank in range(size)]
    assert not model.training
    assert tuple(key for part in parts for key in part.keys) == data.keys
    logits = np.concatenate([part.logits for part in parts])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    targets = np.concatenate([part.targets for part in parts])
    assert targets.dtype == np.int8
    np.testing.assert_array_equal(targets, data.targets.numpy())


def test_the_batch_size_does_not_change_the_scores(model: nn.Module, store_url: str) -> None:
    one, whole = (as_dict(score(model, open_val(store_url, batch_size=size))) for size in (1, 53))
    assert list(one) == list(whole)
    np.testing.assert_allclose(list(one.values()), list(whole.values()), atol=1e-4)


def test_scores_are_float32_whatever_the_caller_trains_in(model: nn.Module, data: Batch) -> None:
    exact = as_dict(score(model, [data]))
    with torch.autocast("cpu", torch.bfloat16):
        assert as_dict(score(model, [data])) == exact


# --- ensembles and views --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    rng = np.random.default_rng(5)
    return list(rng.integers(0, 256, (7, 32, 32), dtype=np.uint8))


def make_member(seed: int, image_size: int = 32) -> Member:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model("resnet18")
        network(torch.randn(16, 1, 32, 32))
    return Member(network.eval(), "resnet18", image_size, 0.4 + seed / 100, 0.2)


def test_one_network_and_one_view_give_its_logit(pictures: list[Any]) -> None:
    member = make_member(1)
    with torch.inference_mode():
        expected = member.network(prepare_input(pictures, member)).squeeze(1).numpy()
    np.testing.assert_array_equal(score_images([member], pictures), expected)


def test_an_ensemble_is_the_mean_of_its_members_each_fed_as_it_was_trained(
    pictures: list[Any],
) -> None:
    members = [make_member(1), make_member(2, image_size=24), make_member(3)]
    alone = np.stack([score_images([member], pictures) for member in members])
    assert np.ptp(alone, axis=0).min() > 1e-3
    found = score_images(members, pictures)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_views_are_averaged_and_depend_on_the_pixels_alone(pictures: list[Any]) -> None:
    member = make_member(1)
    several = score_images([member], pictures, views=4)
    one, two = (score_images([member], pictures, views=n) for n in (1, 2))
    assert np.abs(several - one).min() > 0
    second = 2 * two - one  # the second view's own logit
    assert np.abs(second - one).min() > 0
    np.testing.assert_array_equal(score_images([member], pictures, views=4), several)
    # Whatever stands beside a picture, and wherever it stands.
    backwards = score_images([member], pictures[::-1], views=4)[::-1]
    np.testing.assert_allclose(backwards, several, atol=1e-4)
    alone = [score_images([member], [picture], views=4)[0] for picture in pictures]
    np.testing.assert_allclose(alone, several, atol=1e-4)
