"""What W&B would get of an evaluation, without W&B."""

import base64
import dataclasses
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from jobs.evaluation import wandb_results
from jobs.evaluation.evaluated_run import Subject
from jobs.evaluation.ray_scoring import Scored, Scoring, Weights
from jobs.evaluation.result_files import Judged
from jobs.evaluation.shown_studies import describe_age
from pneumo.config import Config, EvaluateConfig
from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.manifest import read_manifest
from pneumo.evaluation.evaluation import evaluate
from pneumo.evaluation.predictions import Predictions
from pneumo.images.boxes import Box
from pneumo.reporting.figures.case_pictures import Case, Pictures
from pneumo.reporting.tracking import (
    Gallery,
    LineChart,
    MemoryTracker,
    Picture,
    PictureTable,
    Table,
)
from pneumo.training.checkpoints import Checkpoint, CheckpointEntry
from tests.pneumo.reporting.page.test_degenerate import damage, predictions
from tests.pneumo.reporting.page.test_page import DATA


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


PICTURES = Pictures(
    [case()],
    {"tp": [case()], "fn": []},
    {"fp": [case(0)]},
    [],
    sample=[dataclasses.replace(case(), view="AP", drawn_of=17)],
)


def judged():
    return evaluate(predictions(), config=EvaluateConfig(bootstrap_resamples=100), seed=0)


def test_numbers_and_charts():
    tracker, found = MemoryTracker(), judged()
    wandb_results.log_evaluation(tracker, found, None)
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
    wandb_results.log_evaluation(tracker, found, None)
    assert "eval/subgroups" in tracker.media
    assert not [value for value in tracker.summary.values() if value != value]


def test_pictures_are_no_larger_than_asked_and_carry_their_overlays():
    tracker, found = MemoryTracker(), judged()
    wandb_results.log_pictures(tracker, PICTURES.shrink(112), found)
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
    wandb_results.log_pictures(tracker, Pictures.none("no study"), judged())
    assert tracker.summary == {"eval/not_shown": "no study"}
    assert tracker.media == {}


def test_a_map_that_is_no_number_is_not_laid_over_the_picture():
    cam = np.full((112, 112), np.nan, dtype=np.float32)
    assert wandb_results.show_case(dataclasses.replace(case(), cam=cam)).mask is None


def test_the_table_has_thumbnails_and_names_nobody():
    table = wandb_results.tabulate_cases(PICTURES)
    assert isinstance(table, PictureTable)
    assert not {"key", "patient", "age"} & set(table.columns)
    ((picture, *rest),) = table.rows
    assert isinstance(picture, Picture)
    assert rest[:3] == ["tp", 1, 0.9]
    assert rest[-1] == 17


@pytest.fixture
def subject(tiny_store):
    """A run of the smallest network on a store of noise."""
    url = tiny_store()
    manifest = read_manifest(url)
    checkpoint = Checkpoint(
        model={},
        optimizer={},
        epoch=1,
        config=Config(),
        manifest_digest=manifest.digest,
        image_size=manifest.image_size,
        mean=0.5,
        std=0.25,
        history=(),
        initialisation="random",
        code_version="test",
    )
    weights = tuple(
        Weights(
            f"runs/{run}",
            CheckpointEntry(name=f"epoch-000{n}.pt", epoch=n, val_auroc=0.5, sha256=f"{n}" * 64),
        )
        for n, run in enumerate(("a b", "c"), start=1)
    )
    return Subject("runs/a b", url, manifest, checkpoint, Scored(Scoring(weights), url), history=())


def send(subject, folder, data=DATA):
    """Everything that a tracker is given of an evaluation with pictures of 224 pixels."""
    found, tracker = judged(), MemoryTracker()
    (folder / "figures").mkdir()
    (folder / "figures" / "data_quality.png").write_bytes(b"a drawing")
    (folder / "metrics.json").write_text("{}")
    wandb_results.send_evaluation(
        tracker, subject, Judged(data, found, PICTURES, {}, None), folder, Config()
    )
    return tracker


def test_no_study_is_shown_larger_than_192_pixels_anywhere(subject, tmp_path):
    sheet = ContactSheet("Normal", 9, (np.full((224, 224), 99, np.uint8),) * 4, ("AP",) * 4)
    data = dataclasses.replace(DATA, contact=[sheet])
    tracker = send(subject, tmp_path, data=data)
    page = tracker.media["eval/report"].html
    (report,) = [a.files["report.html"] for _, a in tracker.artifacts if a.type == "evaluation"]
    assert report == page.encode()
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(found))).size
        for found in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    ]
    assert len(sizes) == 4
    # Two rows of a contact sheet with a gap of 4; the others are one study high.
    *one_study, sheet_height = sorted(height for _, height in sizes)
    assert max(one_study) <= 192
    assert sheet_height <= 2 * 192 + 4
    for key in ("eval/gallery/tp", "eval/errors/fp"):
        (picture,) = tracker.media[key].pictures
        assert Image.open(io.BytesIO(picture.data)).height == 192
        assert picture.mask is None or picture.mask.classes.shape == (192, 192)
    ((picture, *_),) = tracker.media["eval/predictions"].rows
    assert Image.open(io.BytesIO(picture.data)).height <= 192
    (sheet_sent,) = tracker.media["data/contact"].pictures
    assert Image.open(io.BytesIO(sheet_sent.data)).height == 2 * 192 + 4


def test_lineage_names_each_store_and_run_and_moves_no_alias_of_an_input(subject, tmp_path):
    tracker = send(subject, tmp_path)
    digest = subject.manifest.digest
    assert [(role, a.name, list(a.aliases)) for role, a in tracker.artifacts] == [
        ("input", f"dataset-{digest[:12]}", []),
        ("input", "model-a-b", []),
        ("input", "model-c", []),
        ("output", "evaluation-a-b", []),
    ]
    models = [a.metadata for _, a in tracker.artifacts if a.type == "model"]
    assert [m["checkpoint"] for m in models] == ["epoch-0001.pt", "epoch-0002.pt"]
    assert {m["dataset"] for m in models} == {digest}


def test_ages_above_89_are_one_group(subject, tmp_path):
    old = predictions()
    old = dataclasses.replace(old, age=np.where(np.arange(len(old)) % 2, 97.0, np.nan))
    capped = wandb_results.cap_ages(old).age
    assert np.isnan(capped[::2]).all()
    assert set(capped[1::2]) == {90.0}
    assert [describe_age(age) for age in (89, 90, 104, math.nan, 7)] == [
        "80-89", "90+", "90+", "", "0-9",
    ]  # fmt: skip
    (sent,) = [
        a.files["predictions.parquet"]
        for _, a in send(subject, tmp_path).artifacts
        if a.type == "evaluation"
    ]
    assert np.nanmax(Predictions.from_parquet(sent).age) <= 90
