"""Predictions: one row a study on any number of ranks; probabilities that keep their rank."""

import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit

from pneumo.dataset.study_table import StudyRow
from pneumo.errors import DataError
from pneumo.evaluation.predictions import (
    SCORING,
    Predictions,
    cover_boxes,
    join_predictions,
    sigmoid,
)
from pneumo.images.boxes import Box
from pneumo.network.scoring import (
    Scores,
)

pytestmark = pytest.mark.processors

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


def score_as(table: list[StudyRow], logits: Any) -> Scores:
    """The rows, scored, with the targets that they have."""
    return Scores(
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
    logit: npt.NDArray[Any] = np.array([-30, -20, 0, 20, 30], dtype=dtype)
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
            Scores(np.array(["a", "b"]), np.zeros(2, np.float32), np.zeros(2, np.int8)),
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
    joined = Scores.join(parts)
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
