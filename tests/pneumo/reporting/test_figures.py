"""Pictures come out whole, equal for equal input, and say what they show."""

import io
import re
import xml.etree.ElementTree as ElementTree
from functools import cache

import numpy as np
import pytest
from PIL import Image

from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.manifest import Duplicates
from pneumo.dataset.quality import Intensity, Quality, SplitQuality
from pneumo.evaluation.estimates import Estimate
from pneumo.images.boxes import Box
from pneumo.reporting.figures import case_pictures, charts, data_charts, style
from pneumo.reporting.figures.case_pictures import Case
from tests.predictions import judge, make_plain

HISTORY: list[dict[str, float | None]] = [
    {"epoch": 1, "train/loss": 0.9, "val/loss": 0.8, "val/auroc": 0.7, "val/precision": None},
    {"epoch": 2, "train/loss": 0.6, "val/loss": 0.7, "val/auroc": 0.8, "val/precision": 0.5},
]


@cache
def usual_evaluation():
    return evaluation()


def evaluation(seed=0, target=None):
    return judge(make_plain(120, seed=seed, **({} if target is None else {"target": target})))


def case(target=1, probability=0.87, size=64, with_cam=True):
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    cam = np.zeros((size, size), dtype=np.float32)
    cam[size // 2 :, size // 2 :] = 1
    image = np.tile(ramp, (size, 1))
    called = probability >= 0.5
    return Case(
        image, target, probability, 0.5, called, [Box(8, 16, 20, 24)], cam if with_cam else None
    )


def split_quality(studies, unknown=0, histogram=(5,) * 256, ages=(0, 3, 8, 4)):
    known = studies - unknown
    return SplitQuality(
        studies=studies,
        patients=studies,
        counts={
            "finding": {"Lung Opacity": 9, "Normal": studies - 9},
            "view": {"AP": known, "PA": 0, "unknown": unknown},
            "sex": {"F": 4, "M": studies - 4, "unknown": 0},
        },
        ages=ages,
        age_median=None,
        spacing_quartiles=None,
        intensity=Intensity(tuple(histogram)),
    )


def quality(**options):
    return Quality(
        splits={
            name: split_quality(n, **options)
            for name, n in (("train", 40), ("val", 12), ("test", 12))
        },
        shifts=(),
        duplicates=Duplicates(pictures=0, studies=0, across_patients=0, across_splits=0),
        quarantined={},
        contradictions={},
    )


def contact(count, size=64):
    pictures = tuple(np.full((size, size), 10 * (i + 1), np.uint8) for i in range(count))
    return ContactSheet("Normal", 30, pictures, ("AP",) * count)


def texts(svg):
    return " ".join("".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.text)


def test_case_names_its_outcome():
    assert [
        (case(target, probability).outcome, case(target, probability).is_right)
        for target, probability in [(1, 0.5), (0, 0.5), (1, 0.49), (0, 0.49)]
    ] == [("tp", True), ("fp", False), ("fn", False), ("tn", True)]
    assert case().caption == "Pred: 1  p=0.87  Label: 1"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.draw_metrics(usual_evaluation(), HISTORY),
        lambda: charts.draw_roc(usual_evaluation()),
        lambda: charts.draw_confusion(usual_evaluation()),
        lambda: charts.draw_loss(HISTORY),
        lambda: case_pictures.draw_prediction_grid([case(), case(0)], title="2 of 9"),
        lambda: case_pictures.draw_gradcam_example([case(), case(0)], title="n = 2"),
        lambda: case_pictures.draw_case(case()),
        lambda: data_charts.draw_quality(quality()),
        lambda: data_charts.draw_ages(quality()),
        lambda: data_charts.draw_intensity(quality()),
        lambda: data_charts.draw_contact_sheet(contact(20, 128)),
    ],
)
def test_equal_input_gives_equal_bytes(draw):
    first = draw()
    assert first == draw()
    assert len(first) > 1000


def test_svg_carries_title_n_interval_and_no_date():
    svg = charts.draw_roc(usual_evaluation())
    words = texts(svg)
    assert "AUROC (95 % interval)" in words
    assert re.search(r"test 0\.\d{3} \(0\.\d{3}–\d\.\d{3}\), n = 60", words)
    assert "sensitivity" in words
    assert b"dc:date" not in svg

    words = texts(charts.draw_confusion(usual_evaluation()))
    assert "test n = 60" in words
    assert "Decision: Youden's index" in words
    assert "Screening: sensitivity ≥ 0.90" in words


def test_the_scored_epoch_is_marked_in_all_of_the_history():
    told = texts(charts.draw_validation(HISTORY, 1))
    assert "Validation, 2 epochs" in told
    assert "epoch 1, scored" in told
    assert "Loss, 2 epochs" in texts(charts.draw_loss(HISTORY, 1))
    assert "scored" not in texts(charts.draw_loss(HISTORY))
    assert "scored" not in texts(charts.draw_loss([], 1))


def test_averaged_weights_are_shown_where_they_are_scored_with():
    history = [{**epoch, "val/ema_auroc": 0.9, "val/ema_loss": 0.5} for epoch in HISTORY]
    assert "AUROC, averaged weights" in texts(charts.draw_validation(history))
    assert "val, averaged weights" in texts(charts.draw_loss(history))
    assert "averaged" not in texts(charts.draw_validation(HISTORY))


def test_metrics_picture_is_readable_in_size():
    image = Image.open(io.BytesIO(charts.draw_metrics(usual_evaluation(), HISTORY)))
    assert image.format == "PNG"
    assert min(image.size) > 800


def test_degenerate_input_is_drawn_with_its_reason():
    hollow = evaluation(target=np.zeros(120, dtype=np.int8))
    assert charts.draw_metrics(hollow, [])
    told = " ".join(texts(charts.draw_confusion(hollow)).split())
    assert "no threshold: val: one class only: 0 of 60" in told
    assert "no training history" in texts(charts.draw_loss([]))
    assert charts.draw_validation([{"epoch": 1, "val/auroc": None}])
    assert case_pictures.draw_prediction_grid([], title="none")
    assert case_pictures.draw_gradcam_example([], title="none")


def test_a_figure_of_no_study_says_why():
    for draw in (case_pictures.draw_prediction_grid, case_pictures.draw_gradcam_example):
        blank, told = (
            np.asarray(Image.open(io.BytesIO(draw([], title="t", reason=why))).convert("L"))
            for why in (" ", "5 of 60 scores are NaN or infinite")
        )
        assert (told != blank).sum() > 200


def test_grid_is_green_where_right_and_red_where_wrong():
    picture = case_pictures.draw_prediction_grid([case(1), case(0)], title="2 of 2")
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    middle = pixels.shape[1] // 2

    def share(half, color):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        return (np.abs(half - wanted).sum(axis=2) < 12).mean()

    left, right = pixels[:, :middle], pixels[:, middle:]
    assert share(left, case_pictures.RIGHT) > 0.01 > share(left, case_pictures.WRONG)
    assert share(right, case_pictures.WRONG) > 0.01 > share(right, case_pictures.RIGHT)


def test_composed_case_keeps_the_image_draws_the_boxes_and_warms_the_evidence():
    given = case()
    shown = case_pictures.compose_picture(given.image, given.cam, given.boxes, size=64)
    assert shown.shape[0] == 64
    assert shown.shape[1] == 64 + 2 + 64
    study, overlay = shown[:, :64].astype(int), shown[:, 66:].astype(int)
    assert tuple(study[16, 12]) == tuple(overlay[16, 12]) == case_pictures.BOX
    assert (study[4] == study[4, :, :1]).all()  # gray
    assert np.abs(study[4] - overlay[4]).max() == 0  # no evidence, no tint
    assert (overlay[60, 40:, 0] > overlay[60, 40:, 2]).all()  # warm

    alone = case_pictures.compose_picture(given.image, None, given.boxes, size=128)
    assert alone.shape == (128, 128, 3)
    assert tuple(alone[32, 24]) == case_pictures.BOX  # boxes scale with the picture


def test_estimates_in_words():
    assert style.describe_estimate(Estimate(0.9134, 0.854, 0.962, "m")) == "0.913 (0.854–0.962)"
    assert style.describe_estimate(Estimate(0.9134, None, None, "m", "r"), 2) == "0.91"
    assert style.describe_estimate(Estimate.undefined("r")) == "n/a"


def test_drawings_of_the_data_say_how_many_studies_they_show():
    words = texts(data_charts.draw_ages(quality()))
    assert "train, n = 15" in words  # of known age
    assert "% of studies of known age" in words
    assert "0 and 255 left out" in texts(data_charts.draw_intensity(quality()))


def test_drawings_of_the_data_say_what_is_missing():
    hollow = quality(ages=(0,) * 13, histogram=(0,) * 256, unknown=2)
    assert "no age is known" in texts(data_charts.draw_ages(hollow))
    assert "no pictures" in texts(data_charts.draw_intensity(hollow))
    assert data_charts.draw_quality(hollow) != data_charts.draw_quality(quality())


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 3, 2), (12, 3, 4)]
)
@pytest.mark.parametrize("size", [64, 224])
def test_contact_sheet_holds_every_picture_and_nothing_else(count, columns, rows, size):
    sheet = Image.open(io.BytesIO(data_charts.draw_contact_sheet(contact(count, size))))
    side = min(size, data_charts.CONTACT_PIXELS)
    step = side + 4
    assert sheet.size == (columns * step - 4, rows * step - 4)
    pixels = np.asarray(sheet.convert("RGBA")).astype(int)
    for i in range(count):
        row, column = divmod(i, 3)
        cell = pixels[row * step : row * step + side, column * step : column * step + side]
        assert np.abs(cell[..., :3] - 10 * (i + 1)).max() < 8  # no letter stands on it
        assert (cell[..., 3] == 255).all()
    if count > 1:
        assert (pixels[:side, side : side + 4, 3] == 0).all()


def test_contact_sheet_of_a_finding_that_was_not_drawn_is_blank():
    assert np.asarray(Image.open(io.BytesIO(data_charts.draw_contact_sheet(contact(0))))).max() == 0
