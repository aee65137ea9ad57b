"""The page stands alone, says the worst first, and is sound HTML."""

import dataclasses
import html
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest

from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.manifest import Duplicates
from pneumo.dataset.quality import Intensity, Quality, Shift, SplitQuality
from pneumo.dataset.splits import SPLITS, Interval, LeakageAudit
from pneumo.evaluation.predictions import sigmoid
from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES
from pneumo.images.boxes import Box
from pneumo.reporting.figures.case_pictures import Case, Pictures
from pneumo.reporting.page.data_section import describe_duplicates
from pneumo.reporting.page.page import describe_report, render_report
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts, Provenance
from pneumo.reporting.page.summary import find_warnings, is_shown_to_rank, summarise
from tests.predictions import judge, make_plain

HISTORY = [{"epoch": 1, "train/loss": 0.9, "val/loss": 0.8, "val/auroc": 0.7}]
AUDIT = LeakageAudit(
    unit="patient",
    salt=17,
    list_digest=None,
    unlisted=0,
    studies={"train": 700, "val": 200, "test": 200},
    positives={"train": 200, "val": 50, "test": 50},
    patients={"train": 500, "val": 150, "test": 150},
    prevalence={
        name: Interval(value=value, low=0.21, high=0.33)
        for name, value in (("train", 0.286), ("val", 0.25), ("test", 0.25))
    },
    shard_prevalence=dict.fromkeys(SPLITS, (0.241, 0.302)),
    shared_patients=0,
    leaked_by_image=0.7,
)
NO_DUPLICATES = Duplicates(pictures=0, studies=0, across_patients=0, across_splits=0)


def split_quality(studies, positives, ages=True):
    return SplitQuality(
        studies=studies,
        patients=studies,
        counts={
            "label": {"positive": positives, "negative": studies - positives},
            "finding": {"Lung Opacity": positives, "Normal": studies - positives},
            "view": {"AP": studies - 7, "PA": 4, "unknown": 3},
            "sex": {"F": studies, "M": 0, "unknown": 0},
            "age": {"40–59": studies if ages else 0, "unknown": 0 if ages else studies},
            "spacing": {"0.143 mm": studies - 11, "unknown": 11},
        },
        ages=(0,) * 8 + ((studies if ages else 0),),
        age_median=44.0 if ages else None,
        spacing_quartiles=(0.143, 0.143, 0.143),
        intensity=Intensity((10, *range(254), 30)),
    )


QUALITY = Quality(
    splits={
        "train": split_quality(700, 200),
        "val": split_quality(200, 50),
        "test": split_quality(200, 50),
    },
    shifts=(),
    duplicates=NO_DUPLICATES,
    quarantined={},
    contradictions={},
)
CONTACT = tuple(
    ContactSheet(finding, 300, (np.full((32, 32), 99, np.uint8),) * 5, ("AP",) * 3 + ("PA",) * 2)
    for finding in ("Lung Opacity", "Normal")
)
DATA = DataFacts("d" * 64, 224, 3, AUDIT, QUALITY, CONTACT)
LEAKING = Duplicates(pictures=6, studies=13, across_patients=2, across_splits=1)


def with_audit(**changes):
    return dataclasses.replace(DATA, audit=AUDIT.model_copy(update=changes))


def with_quality(**changes):
    return dataclasses.replace(DATA, quality=dataclasses.replace(QUALITY, **changes))


MODEL = ModelFacts(
    "resnet18", "ImageNet weights", True, False, 3, 224, "The best on val.", 0.49, 0.24
)
PROVENANCE = Provenance(
    run="run <1>",
    created="1 May 2026",
    seed=0,
    recipe="bootstrap_resamples = 2000\n",
    command="make evaluate",
    citation="pneumo 0.1.0, run 1",
    facts={"PyTorch": "2"},
)


def evaluation(n=400, target=None, view_is_target=False):
    rows = make_plain(n, **({} if target is None else {"target": target}))
    if view_is_target:
        rows = dataclasses.replace(rows, view=np.where(rows.target, "AP", "PA"))
    return judge(rows)


@cache
def usual_evaluation():
    """Made once: each takes half a second."""
    return evaluation()


def cases(count, size=224):
    rng = np.random.default_rng(1)
    return [
        Case(
            image=rng.integers(0, 256, (size, size)).astype(np.uint8),
            target=i % 2,
            probability=0.3 + 0.4 * ((i // 2) % 2),
            threshold=0.5,
            is_called=bool((i // 2) % 2),
            boxes=[Box(10, 10, 50, 50)] if i % 2 else [],
            cam=rng.random((size, size)).astype(np.float32),
        )
        for i in range(count)
    ]


@cache
def usual_page():
    return render()


def render(judged=None, **changes):
    arguments = {
        "data": DATA,
        "model": MODEL,
        "provenance": PROVENANCE,
        "history": HISTORY,
    }
    pictures = changes.pop("pictures", None)
    if pictures is None:
        pictures = Pictures(cases(4), {"tp": cases(2), "fn": []}, {}, [])
    facts = describe_report(judged or usual_evaluation(), **{**arguments, **changes})
    return render_report(facts, pictures)


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
    page = usual_page()
    checker = Checker()
    checker.feed(page)

    assert checker.faults == checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(re.findall(r'(?:url\(|href="|labelledby=")#?([^)":]+)(?=[)"])', page)) <= set(
        checker.ids
    )
    assert len(checker.images) == 8
    assert all(image["alt"] and image["src"].startswith("data:") for image in checker.images)
    assert checker.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(checker.headings, checker.headings[1:], strict=False))
    assert "<script" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.count('role="img"') == 8


def test_page_says_what_it_must():
    page = usual_page()
    for words in (
        "Research use only. Not a diagnostic device.",
        "run &lt;1&gt;",
        "Of a random positive and a random negative study",
        "70\N{NO-BREAK SPACE}% of the val studies",
        "make evaluate",
        "bootstrap_resamples = 2000",
        "None on test at this threshold.",
        "Knowing only AP or PA",
        "To cite: pneumo 0.1.0, run 1.",
        "prefers-color-scheme: dark",
        "@media print",
    ):
        assert words in page
    assert "Read this first" not in page


def test_contents_name_every_section_and_links_are_called_as_their_headings():
    page = usual_page()
    headings = dict(re.findall(r'<h2 id="(\w+)">(.*?)</h2>', page))
    headings = {name: html.unescape(title) for name, title in headings.items()}
    (contents,) = re.findall("<nav.*?</nav>", page, re.DOTALL)
    links = re.findall(r'href="#(\w+)">(.*?)</a>', contents)
    assert {name: html.unescape(title) for name, title in links} == headings
    for name, title in re.findall(r'href="#(\w+)">(.*?)</a>', section_html(page, "claim")):
        assert html.unescape(title) == headings[name]


def test_a_page_of_phantoms_says_so_first():
    page = render(data=dataclasses.replace(DATA, phantoms=True))
    assert page.index("Drawn phantoms, no radiographs") < page.index("<main>")
    assert "Drawn phantoms" not in usual_page()


def test_equal_input_gives_the_same_page():
    assert render() == render()


def test_page_stays_below_three_megabytes_with_large_noisy_pictures():
    every = {outcome: cases(6, size=512) for outcome in OUTCOMES}
    errors = {outcome: cases(12, size=512) for outcome in ERRORS}
    page = render(pictures=Pictures(cases(16, size=512), every, errors, []))
    assert len(page.encode()) < 3_000_000


def test_the_card_is_true_of_the_store():
    text = section(usual_page(), "card")
    assert "adults alone" in text
    assert "otherwise ill" not in text  # no study of the kind
    assert "resampled by area to 224 × 224 px" in text
    assert "mean 0.490 and standard deviation 0.240" in text
    splits = {
        name: dataclasses.replace(
            split,
            counts={
                **split.counts,
                "age": {"under 18": 3, "40–59": 9},
                "finding": {"Normal": 5, "No Lung Opacity / Not Normal": 7},
            },
        )
        for name, split in QUALITY.splits.items()
    }
    model = dataclasses.replace(MODEL, image_size=128)
    text = section(render(data=with_quality(splits=splits), model=model), "card")
    assert "adults and children together. The negatives are healthy as well as" in text
    assert "The network sees it resampled to 128 × 128 px" in text


def test_every_answer_to_claim_is_where_it_is_said_to_be():
    page = usual_page()
    text = section(page, "claim")
    assert "9 Preprocessing Model card" in text
    assert "12 Missing data Data quality" in text
    assert "'unknown' is a subgroup" in section(page, "quality")


def test_degenerate_evaluation_is_reported_with_its_reason():
    hollow = evaluation(target=np.zeros(400, dtype=np.int8))
    page = render(hollow, history=[], pictures=Pictures([], {}, {}, []))
    assert "Read this first" in page
    assert "The model cannot be evaluated on test: one class only" in page
    assert "No threshold could be chosen: val: one class only" in page
    assert "The run holds no training history." in page


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (with_audit(unit="image"), MODEL, "split by image, not by patient"),
        (with_audit(shared_patients=2), MODEL, "2 patients are in more than one split"),
        (
            with_quality(quarantined={"missing": 4, "no_pixels": 1}),
            MODEL,
            "In no split: 5 studies that could not be used",
        ),
        (with_quality(duplicates=LEAKING), MODEL, "1 picture is in more than one split"),
        (DATA, dataclasses.replace(MODEL, is_pretrained=False), "random weights, as configured"),
        (
            DATA,
            dataclasses.replace(MODEL, is_pretrained=False, fell_back=True),
            "random weights, as the configured ones were not available",
        ),
    ],
)
def test_warnings(data, model, words):
    (found,) = find_warnings(usual_evaluation(), data, model)
    assert words in found


def test_warnings_about_the_numbers():
    assert find_warnings(usual_evaluation(), DATA, MODEL) == []
    (small,) = find_warnings(evaluation(n=60), DATA, MODEL)
    assert "30 studies of 30 patients altogether" in small
    (view,) = find_warnings(evaluation(view_is_target=True), DATA, MODEL)
    assert "not shown to be better than the view" in view


@pytest.mark.parametrize("n", [16, 400])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_ranking_without_interval_is_neither_shown_nor_chance(n, sign):
    rows = make_plain(n)
    logit = (sign * 3.0 * (2.0 * rows.target - 1)).astype(np.float32)
    judged = judge(dataclasses.replace(rows, logit=logit, probability=sigmoid(logit)))
    assert judged.test.auroc.low is None
    warnings = " ".join(find_warnings(judged, DATA, MODEL))
    assert f"The AUROC of {max(sign, 0):.3f} has no interval (" in warnings
    assert str(judged.test.auroc.reason) in warnings
    assert "chance" not in warnings
    assert not is_shown_to_rank(judged.test.auroc)


def test_summary_weighs_the_model_against_the_view():
    assert "the model's is higher by +0." in summarise(usual_evaluation())
    assert "the model's is lower: the difference is −0." in summarise(
        evaluation(view_is_target=True)
    )


def section_html(page, name):
    found = re.search(f'<section aria-labelledby="{name}">(.*?)</section>', page, re.DOTALL)
    assert found
    return found[1]


def section(page, name):
    """What a reader sees of one section, tags and needless blanks left out."""
    text = html.unescape(re.sub("<[^>]+>", " ", section_html(page, name)))
    return " ".join(text.split())


def test_audit_says_who_went_where_and_what_is_in_no_split():
    text = section(usual_page(), "data")
    for words in (
        "train 700 700 200 28.6 % (21.0 to 33.0 %) 24.1 to 30.2 %",
        "a hash of the patient by seed 3, salt 17",
        "A split by image would have leaked 70 % of the val studies",
        "Quarantined none",
        "Tables and headers disagree on no study",
    ):
        assert words in text

    listed = with_audit(salt=None, list_digest="ab" * 32, unlisted=12, leaked_by_image=None)
    listed = dataclasses.replace(
        listed,
        quality=dataclasses.replace(
            QUALITY,
            quarantined={"missing": 1, "no_pixels": 2_000},
            contradictions={"sex": 1},
        ),
    )
    text = section(render(data=listed), "data")
    for words in (
        f"a list, SHA-256 {'ab' * 32}; it does not name 12 studies, which are in no split",
        "would have leaked unknown: no mapping from images to patients",
        "2,001 studies: no pixels 2,000, missing 1",
        "Tables and headers disagree 1 study: sex 1",
    ):
        assert words in text
    assert "salt" not in text


def test_the_flow_shows_every_exclusion_and_adds_up():
    text = section(usual_page(), "data")
    assert "Labelled studies of the source 1,100 → In no split 0 → train 700" in text
    data = dataclasses.replace(
        with_audit(unlisted=12),
        quality=dataclasses.replace(QUALITY, quarantined={"missing": 4, "contradiction": 1}),
        left_out={"lateral views": 2_000, "of uncertain label": 0},
    )
    text = section(render(data=data), "data")
    assert (
        "Labelled studies of the source 3,117 → Left out: lateral views 2,000 → Not on the list of "
        "the split 12 → Could not be used (quarantined) 5 → train 700 val 200 test 200"
    ) in text
    (warning,) = find_warnings(usual_evaluation(), data, MODEL)
    assert warning.startswith("In no split: 5 studies that could not be used;")
    joined = dataclasses.replace(DATA, sources=("a", "b"), left_out={"pictures": 3})
    assert "studies of the joined stores 1,103 → Left out: pic" in section(
        render(data=joined), "data"
    )


def test_quality_section_holds_every_part():
    text = section(usual_page(), "quality")
    for words in (
        "differ from train by no more than 0.1 standard deviations",
        "No two studies have the same stored picture.",
        "train n = 700 val n = 200 test n = 200",
        "Label positive 200 28.6 % 50 25.0 % 50 25.0 %",
        "Finding Lung Opacity 200",
        "View AP 693 99.0 % 193 96.5 % 193 96.5 % PA 4 0.6 % 4 2.0 % 4 2.0 % unknown 3 0.4 %",
        "Sex F 700 100.0 %",
        "40–59 700 100.0 %",
        "median of the known 44 44 44",
        "0.143 mm 689 98.4 %",
        "median, quartiles, mm 0.143 0.143–0.143 0.143",
        "mean, 0 to 1 0.66",
        "pure black 0.03 %",
        "pure white 0.1 %",
        "Age by split; median train 44, val 44, test 44.",
        "Gray levels by split; mean train 0.66",
        "Lung Opacity: 5 of 300 studies of train, 3 AP, 2 PA.",
    ):
        assert words in text
    order = [found[1] for found in re.finditer('<h2 id="([a-z]+)"', usual_page())]
    assert order.index("quality") == order.index("data") + 1


def test_quality_section_is_honest_about_what_is_unknown():
    hollow = split_quality(200, 50, ages=False)
    hollow = dataclasses.replace(
        hollow, spacing_quartiles=None, intensity=Intensity((0,) * 256), studies=0, patients=0
    )
    data = with_quality(splits=dict.fromkeys(SPLITS, hollow))
    text = section(render(data=dataclasses.replace(data, contact=())), "quality")
    assert "median of the known unknown unknown unknown" in text
    assert "quartiles, mm unknown unknown unknown" in text
    assert "mean, 0 to 1 unknown unknown unknown" in text
    assert "no age is known" in text
    assert "no pictures" in text
    assert "Contact sheets" not in text
    assert "nan" not in text


def test_shifts_are_told_with_their_numbers_and_those_of_chance_apart():
    shift = Shift("Mean age", "years", "test", 46.9, 50.2, 0.204, 0.15)
    chance = Shift("AP among known views", "%", "val", 0.5, 0.44, -0.12, 0.15)
    text = section(render(data=with_quality(shifts=(shift, chance))), "quality")
    told = (
        "Mean age: 46.9 years in train, 50.2 years in test (standardised difference +0.20, chance "
        "explains ±0.15)"
    )
    assert "no more than" not in text
    assert text.index("Yes, by more") < text.index(told) < text.index("that chance explains: 1")
    assert "AP among known views: 50.0 % in train, 44.0 % in val" in text

    text = section(render(data=with_quality(shifts=(chance,))), "quality")
    assert "by no more than chance explains for this number of patients" in text
    assert "Yes, by" not in text


def test_duplicates_are_told_with_what_they_do():
    leaking = describe_duplicates(LEAKING, has_patients=True)
    assert "13 studies share 6 pictures, pixel by pixel." in leaking
    assert "2 of them are with more than one patient" in leaking
    assert "1 is in more than one split: each leaks" in leaking
    assert leaking in section(render(data=with_quality(duplicates=LEAKING)), "quality")
    assert "patient" not in describe_duplicates(LEAKING, has_patients=False)

    once = Duplicates(pictures=1, studies=2, across_patients=0, across_splits=0)
    within = describe_duplicates(once, has_patients=True)
    assert "2 studies share 1 picture" in within
    assert "patient" not in within
    assert "None is in more than one split" in within


def test_patients_are_unknown_without_the_mapping():
    unknown = with_audit(unit="image", patients=None, leaked_by_image=None)
    text = section(render(data=unknown), "data")
    assert "train unknown 700" in text
    assert "Patients in more than one split unknown" in text
    assert "A split by image leaks unknown: no mapping" in text


def test_page_of_a_leaking_store_says_so_first():
    page = render(data=with_quality(duplicates=LEAKING))
    assert page.index("1 picture is in more than one split") < page.index('id="summary"')
    assert "is in more than one split" not in usual_page()
