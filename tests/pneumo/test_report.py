"""The page stands alone, says the worst first, and is sound HTML."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pneumo.config import Config, EvaluateConfig
from pneumo.evaluate import evaluate
from pneumo.figures import Case
from pneumo.predict import Predictions, sigmoid
from pneumo.report import (
    DataFacts,
    ModelFacts,
    Provenance,
    SplitFacts,
    find_warnings,
    render_report,
    summarise,
)
from pneumo.studies import Box

HISTORY = [{"epoch": 1, "train/loss": 0.9, "val/loss": 0.8, "val/auroc": 0.7}]
DATA = DataFacts(
    digest="d" * 64,
    unit="patient",
    image_size=224,
    splits=[SplitFacts("train", 700, 200, 500), SplitFacts("val", 0, 0, 0)],
    shared_patients=0,
    leaked_by_image=0.7,
    quarantined=0,
)
MODEL = ModelFacts("resnet18", "ImageNet weights", True, False, 3, 224)
PROVENANCE = Provenance(
    "run <1>", "1 May 2026", 0, Config().to_json(), "make evaluate", {"PyTorch": "2"}
)


def evaluation(n=400, target=None, view_is_target=False):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, n).astype(np.int8) if target is None else target
    logit = (2 * target + rng.normal(size=n) - 1).astype(np.float32)
    predictions = Predictions(
        key=np.array([f"k{i}" for i in range(n)]),
        patient=np.array([f"p{i}" for i in range(n)]),
        split=np.where(np.arange(n) % 2, "val", "test"),
        target=target,
        logit=logit,
        probability=sigmoid(logit),
        calibrated_probability=np.full(n, np.nan),
        checkpoint=np.full(n, "best"),
        finding=np.full(n, "Normal"),
        age=np.full(n, 50.0),
        sex=np.full(n, "F"),
        view=np.where(target if view_is_target else rng.random(n) < 0.5, "AP", "PA"),
    )
    return evaluate(predictions, config=EvaluateConfig(bootstrap_resamples=100), seed=0)


def cases(count, size=224):
    rng = np.random.default_rng(1)
    return [
        Case(
            image=rng.integers(0, 256, (size, size)).astype(np.uint8),
            target=i % 2,
            probability=0.3 + 0.4 * ((i // 2) % 2),
            threshold=0.5,
            boxes=[Box(10, 10, 50, 50)] if i % 2 else [],
            cam=rng.random((size, size)).astype(np.float32),
        )
        for i in range(count)
    ]


def render(judged=None, **changes):
    arguments = {
        "data": DATA,
        "model": MODEL,
        "provenance": PROVENANCE,
        "history": HISTORY,
        "grid": cases(4),
        "gallery": {"tp": cases(2), "fn": []},
    }
    return render_report(judged or evaluation(), **{**arguments, **changes})


class Checker(HTMLParser):
    """Collects what a browser would silently forgive."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.images, self.headings, self.faults = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "img":
            self.images.append(attributes)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def test_page_is_sound_and_stands_alone():
    page = render()
    checker = Checker()
    checker.feed(page)

    assert checker.faults == checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(re.findall(r'(?:url\(|href="|labelledby=")#?([^)"]+)', page)) <= set(checker.ids)
    assert len(checker.images) == 6
    assert all(image["alt"] and image["src"].startswith("data:") for image in checker.images)
    assert checker.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(checker.headings, checker.headings[1:], strict=False))
    assert "<script" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.count('role="img"') == 4


def test_page_says_what_it_must():
    page = render()
    for words in (
        "Research use only. Not a diagnostic device.",
        "run &lt;1&gt;",
        "Of a random positive and a random negative study",
        "70 % of the val studies",
        "make evaluate",
        "&#34;bootstrap_resamples&#34;: 2000",
        "None on test at this threshold.",
        "View alone",
        "prefers-color-scheme: dark",
        "@media print",
    ):
        assert words in page
    assert "Read this first" not in page


def test_equal_input_gives_the_same_page():
    assert render() == render()


def test_page_stays_below_three_megabytes_with_large_noisy_pictures():
    every = {outcome: cases(6, size=512) for outcome in ("tp", "fp", "fn", "tn")}
    page = render(grid=cases(16, size=512), gallery=every)
    assert len(page.encode()) < 3_000_000


def test_degenerate_evaluation_is_reported_with_its_reason():
    hollow = evaluation(target=np.zeros(400, dtype=np.int8))
    page = render(hollow, history=[], grid=[], gallery={})
    assert "Read this first" in page
    assert "The model cannot be judged on test: one class only" in page
    assert "No threshold could be chosen: val: one class only" in page
    assert "The run holds no training history." in page


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        ({"unit": "image"}, {}, "split by image, not by patient"),
        ({"shared_patients": 2}, {}, "2 patients are in more than one split"),
        ({"quarantined": 5}, {}, "5 studies could not be used"),
        ({}, {"is_pretrained": False}, "random weights, as asked"),
        (
            {},
            {"is_pretrained": False, "fell_back": True},
            "random weights, because the weights asked for could not be had",
        ),
    ],
)
def test_warnings(data, model, words):
    found = find_warnings(
        evaluation(), dataclasses.replace(DATA, **data), dataclasses.replace(MODEL, **model)
    )
    assert len(found) == 1
    assert words in found[0]


def test_warnings_about_the_numbers():
    assert find_warnings(evaluation(), DATA, MODEL) == []
    (small,) = find_warnings(evaluation(n=60), DATA, MODEL)
    assert "Test is small: 30 studies of 30 patients" in small
    (view,) = find_warnings(evaluation(view_is_target=True), DATA, MODEL)
    assert "not shown to be better than the view" in view


def test_summary_weighs_the_model_against_the_view():
    assert "the model is better by 0." in summarise(evaluation())
    assert "that the model is better is not shown" in summarise(evaluation(view_is_target=True))
