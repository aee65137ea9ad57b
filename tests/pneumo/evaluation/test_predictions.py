"""Predictions: one row a study on any number of ranks; probabilities that keep their rank."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit
from torch import nn

from pneumo.config import DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import DataError
from pneumo.evaluation.predictions import (
    SCORING,
    VIEWS,
    Logits,
    Member,
    Predictions,
    Scores,
    cover_boxes,
    join_predictions,
    prepare_input,
    score,
    score_pictures,
    sigmoid,
)
from pneumo.images.boxes import Box
from pneumo.loading import loader
from pneumo.loading.loader import Batch
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model

SIDE = 64
StoreMaker = Callable[..., str]

text = st.text("0123456789abcdef", max_size=5)
pixel = st.integers(0, SIDE // 2)
boxes = st.builds(Box, pixel, pixel, pixel, pixel)
rows = st.builds(
    StudyRow,
    key=st.text("0123456789abcdef", min_size=20, max_size=20),
    patient=text,
    split=st.sampled_from(["train", "val", "test"]),
    target=st.integers(0, 1),
    finding=st.sampled_from(["Lung Opacity", "Normal"]),
    boxes=st.lists(boxes, max_size=3).map(tuple),
    age=st.none() | st.integers(0, 120),
    sex=st.none() | st.sampled_from(["M", "F"]),
    view=st.none() | st.sampled_from(["AP", "PA"]),
    spacing_mm=st.none() | st.sampled_from([0.139, 0.143]),
)
tables = st.lists(rows, max_size=6, unique_by=lambda row: row.key)


def score_as(table: list[StudyRow], logits: Any) -> Logits:
    """The rows, scored, with the targets that they have."""
    return Logits(
        np.array([row.key for row in table], dtype=np.str_),
        logits,
        np.array([row.target for row in table], dtype=np.int8),
    )


def join(table: list[StudyRow], seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 20, len(table)).astype(np.float32)
    scored = score_as(table[::-1], logits)
    studies = {row.key: row for row in table}
    return join_predictions(scored, studies, checkpoint="epoch-0003.pt", image_size=SIDE)


def assert_equal(one: Predictions, two: Predictions) -> None:
    for field in dataclasses.fields(Predictions):
        a, b = getattr(one, field.name), getattr(two, field.name)
        np.testing.assert_array_equal(a, b, err_msg=field.name)
        assert a.dtype.kind == b.dtype.kind, field.name


# --- probabilities --------------------------------------------------------------------------------


@given(arrays(np.float64, st.integers(0, 20), elements=st.floats(-800, 800)))
def test_sigmoid_equals_scipys(logit: Any) -> None:
    np.testing.assert_allclose(sigmoid(logit), expit(logit), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_sigmoid_is_computed_in_float64(dtype: type) -> None:
    logit = np.array([-30, -20, 0, 20, 30], dtype=dtype)
    probability = sigmoid(logit)
    assert probability.dtype == np.float64
    assert len(np.unique(probability)) == 5, "float32 would make 1 of the last two"
    np.testing.assert_allclose(probability, expit(logit.astype(np.float64)), rtol=1e-12)


def test_extreme_logits_do_not_overflow() -> None:
    logit = np.array([-np.inf, -1e308, -800, 800, 1e308, np.inf, np.nan])
    np.testing.assert_array_equal(sigmoid(logit), [0, 0, 0, 1, 1, 1, np.nan])


# --- the table ------------------------------------------------------------------------------------


@given(tables, st.integers(0, 2**16))
def test_predictions_round_trip(table: list[StudyRow], seed: int) -> None:
    predictions = join(table, seed)
    assert_equal(Predictions.from_parquet(predictions.to_parquet()), predictions)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Predictions)])
def test_columns_of_different_lengths_are_refused(name: str) -> None:
    row = StudyRow("a" * 20, "p", "val", 1, "Lung Opacity", (), 3, "F", "AP", None, "d", "e")
    predictions = join([row, dataclasses.replace(row, key="b" * 20)])
    with pytest.raises(ValueError, match=rf"columns of different lengths: .*'{name}': 1"):
        dataclasses.replace(predictions, **{name: getattr(predictions, name)[:1]})


@given(tables)
def test_joining_keeps_every_study_and_what_is_known_of_it(table: list[StudyRow]) -> None:
    predictions = join(table)
    assert len(predictions) == len(table)
    order = sorted(table, key=lambda row: (row.split, row.key))
    assert predictions.key.tolist() == [row.key for row in order]
    assert predictions.target.tolist() == [row.target for row in order]
    for i, row in enumerate(order):
        assert predictions.sex[i] == (row.sex or "")
        assert predictions.view[i] == (row.view or "")
        assert np.isnan(predictions.age[i]) if row.age is None else predictions.age[i] == row.age
        spacing = np.nan if row.spacing_mm is None else row.spacing_mm
        np.testing.assert_array_equal(predictions.spacing_mm[i], spacing)
        assert np.isnan(predictions.box_area_fraction[i]) == (not row.boxes)
    np.testing.assert_array_equal(predictions.probability, sigmoid(predictions.logit))
    assert np.isnan(predictions.calibrated_probability).all()
    assert set(predictions.checkpoint.tolist()) <= {"epoch-0003.pt"}


@given(st.lists(boxes, max_size=4))
def test_boxes_cover_what_they_cover_on_a_raster(some: list[Box]) -> None:
    raster = np.zeros((2 * SIDE, 2 * SIDE), dtype=bool)
    for x, y, width, height in some:
        raster[int(y) : int(y + height), int(x) : int(x + width)] = True
    assert cover_boxes(some) == raster.sum()


def test_box_area_is_a_share_of_the_stored_image() -> None:
    boxes = (Box(0, 0, SIDE, SIDE / 2),)
    half = StudyRow("a" * 20, "p", "val", 1, "Lung Opacity", boxes, 3, "F", "AP", 0.1, "", "")
    assert join([half]).box_area_fraction.tolist() == [0.5]


@given(tables)
def test_splits_are_subsets(table: list[StudyRow]) -> None:
    predictions = join(table)
    parts = [predictions.subset(name) for name in ("test", "train", "val")]
    assert [key for part in parts for key in part.key] == predictions.key.tolist()
    for part, name in zip(parts, ("test", "train", "val"), strict=True):
        assert set(part.split.tolist()) <= {name}


def test_a_scored_study_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 scored studies are not in studies\.parquet"):
        join_predictions(
            Logits(np.array(["a", "b"]), np.zeros(2, np.float32), np.zeros(2, np.int8)),
            {},
            checkpoint="c",
            image_size=SIDE,
        )


def test_a_study_that_is_scored_twice_is_refused() -> None:
    row = StudyRow("a" * 20, "p", "val", 1, "Lung Opacity", (), 3, "F", "AP", None, "d", "e")
    twice = score_as([row, row], np.zeros(2, np.float32))
    with pytest.raises(DataError, match="1 studies are scored more than once"):
        join_predictions(twice, {row.key: row}, checkpoint="c", image_size=SIDE)


@pytest.mark.parametrize("target", [0, 1])
def test_a_target_that_is_another_in_the_shard_is_refused(target: int) -> None:
    row = StudyRow("a" * 20, "p", "val", target, "Lung Opacity", (), 3, "F", "AP", None, "d", "e")
    also = dataclasses.replace(row, key="b" * 20)
    scored = score_as([row, also], np.zeros(2, np.float32))
    studies = {row.key: row, also.key: dataclasses.replace(also, target=1 - target)}
    with pytest.raises(DataError, match="1 of 2 scored studies have another target in their shard"):
        join_predictions(scored, studies, checkpoint="c", image_size=SIDE)


@given(tables, st.integers(0, 2**16))
def test_logits_stay_with_their_studies(table: list[StudyRow], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=len(table)).astype(np.float32)
    keys = [row.key for row in table]
    parts = [score_as(table[i::3], logits[i::3]) for i in range(3)]
    joined = Logits.join(parts)
    assert dict(zip(joined.keys, joined.logits, strict=True)) == dict(
        zip(keys, logits, strict=True)
    )
    predictions = join_predictions(
        joined, {row.key: row for row in table}, checkpoint="c", image_size=SIDE
    )
    expected = dict(zip(keys, logits, strict=True))
    assert predictions.logit.tolist() == [expected[key] for key in predictions.key]


def test_how_the_logits_were_made_stands_in_the_file() -> None:
    row = StudyRow("a" * 20, "p", "val", 1, "Lung Opacity", (), 3, "F", "AP", None, "d", "e")
    written = join([row]).to_parquet({"views": 4})
    metadata = pq.read_schema(io.BytesIO(written)).metadata
    assert json.loads(metadata[SCORING.encode()]) == {"views": 4}
    assert_equal(Predictions.from_parquet(written), join([row]))


# --- scoring --------------------------------------------------------------------------------------


def open_val(store_url: str, rank: int = 0, size: int = 1, batch_size: int = 4) -> list[Batch]:
    opened = loader.open_loader(
        store_url,
        read_manifest(store_url),
        "val",
        DataConfig(cache="stream"),
        image_size=32,
        mean=0.4,
        std=0.2,
        world=World(rank, size),
        device="cpu",
    )
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
    return dict(zip(scores.keys, scores.logits.tolist(), strict=True))


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
    np.testing.assert_array_equal(score_pictures([member], pictures), expected)


def test_an_ensemble_is_the_mean_of_its_members_each_fed_as_it_was_trained(
    pictures: list[Any],
) -> None:
    members = [make_member(1), make_member(2, image_size=24), make_member(3)]
    alone = np.stack([score_pictures([member], pictures) for member in members])
    assert np.ptp(alone, axis=0).min() > 1e-3
    found = score_pictures(members, pictures)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_views_are_averaged_and_depend_on_the_pixels_alone(pictures: list[Any]) -> None:
    assert not VIEWS.flip
    member = make_member(1)
    several = score_pictures([member], pictures, views=4)
    one, two = (score_pictures([member], pictures, views=n) for n in (1, 2))
    assert np.abs(several - one).min() > 0
    second = 2 * two - one  # the second view's own logit
    assert np.abs(second - one).min() > 0
    np.testing.assert_array_equal(score_pictures([member], pictures, views=4), several)
    # Whatever stands beside a picture, and wherever it stands.
    backwards = score_pictures([member], pictures[::-1], views=4)[::-1]
    np.testing.assert_allclose(backwards, several, atol=1e-5)
    alone = [score_pictures([member], [picture], views=4)[0] for picture in pictures]
    np.testing.assert_allclose(alone, several, atol=1e-5)
