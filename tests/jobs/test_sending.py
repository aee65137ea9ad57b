"""What W&B would get of an evaluation, without W&B."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jobs import sending
from pneumo.config import Config, EvaluateConfig, override
from pneumo.evaluate import evaluate
from pneumo.figures import Case, Pictures
from pneumo.studies import Box
from pneumo.tracking import Gallery, LineChart, MemoryTracker, Picture, PictureTable, Table
from tests.pneumo.test_report_degenerate import damage, predictions


def case(target=1, probability=0.9):
    rng = np.random.default_rng(0)
    return Case(
        image=rng.integers(0, 256, (224, 224)).astype(np.uint8),
        target=target,
        probability=probability,
        threshold=0.5,
        boxes=[Box(56, 28, 112, 56)] if target else [],
        cam=np.linspace(0, 1, 112, dtype=np.float32)[None].repeat(112, axis=0),
        finding="Lung Opacity" if target else "Normal",
        why="most certain",
    )


PICTURES = Pictures([case()], {"tp": [case()], "fn": []}, {"fp": [case(0)]}, [])


def judged():
    return evaluate(predictions(), config=EvaluateConfig(bootstrap_resamples=100), seed=0)


def test_numbers_and_charts():
    tracker, found = MemoryTracker(), judged()
    sending.log_evaluation(tracker, found, None)
    assert tracker.summary["eval/test/auroc"] == found.test.auroc.value
    assert tracker.summary["eval/test/recall_low"] == found.test.at["decision"].rates["recall"].low
    for name in ("roc", "precision_recall", "reliability", "decision_curve"):
        chart = tracker.media[f"eval/{name}"]
        assert isinstance(chart, LineChart)
        assert len(chart.rows()) > 5
    groups = tracker.media["eval/subgroups"]
    assert isinstance(groups, Table)
    assert len(groups.rows) == len(found.test.subgroups.groups)


@pytest.mark.parametrize("kind", ["nan", "empty", "one class", "too small"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_bad_predictions_are_sent_without_what_they_do_not_give(kind, split):
    found = evaluate(damage(kind, split), config=EvaluateConfig(bootstrap_resamples=100), seed=0)
    tracker = MemoryTracker()
    sending.log_evaluation(tracker, found, None)
    assert "eval/subgroups" in tracker.media
    assert not [value for value in tracker.summary.values() if value != value]


def test_pictures_are_no_larger_than_asked_and_carry_their_overlays():
    tracker, found = MemoryTracker(), judged()
    config = override(Config(), {"tracking.image_pixels": 112})
    sending.log_pictures(tracker, PICTURES, found, config)
    gallery = tracker.media["eval/gallery/tp"]
    assert isinstance(gallery, Gallery)
    (picture,) = gallery.pictures
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.size == (112, 112)
    assert list(picture.boxes) == [(28, 14, 56, 28)]
    assert picture.mask is not None
    assert picture.mask.classes.shape == (112, 112)
    assert np.unique(picture.mask.classes).tolist() == [0, 1, 2, 3]
    assert "eval/gallery/fn" not in tracker.media
    assert "eval/errors/fp" in tracker.media


def test_why_no_study_is_shown_is_sent():
    tracker = MemoryTracker()
    sending.log_pictures(tracker, Pictures.none("no study"), judged(), Config())
    assert tracker.summary == {"eval/not_shown": "no study"}
    assert tracker.media == {}


def test_a_map_that_is_no_number_is_not_laid_over_the_picture():
    cam = np.full((112, 112), np.nan, dtype=np.float32)
    assert sending.show_case(dataclasses.replace(case(), cam=cam)).mask is None


def test_the_table_has_thumbnails_and_names_nobody():
    table = sending.tabulate_cases(PICTURES, 192)
    assert isinstance(table, PictureTable)
    assert not {"key", "patient", "age"} & set(table.columns)
    ((picture, *rest),) = table.rows
    assert isinstance(picture, Picture)
    assert rest[:3] == ["tp", 1, 0.9]
