"""Evaluation -> report.html: one self-contained page, no network, no JavaScript.

The page is for a reader who has a minute (summary, warnings) as for one who has an hour (audit,
model card, how to reproduce it). It holds thumbnails and numbers, and nothing that names a patient.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pneumo import figures
from pneumo.evaluate import DECISION, SCREENING, Evaluation
from pneumo.explain import OUTCOMES, Outcome
from pneumo.figures import OUTCOME_WORDS, Case, History
from pneumo.metrics import Estimate

FEW_POSITIVES = 50
"""Below this many positives or negatives in test the intervals are too wide to compare models."""
THUMBNAIL_PIXELS = 176
GALLERY_PIXELS = 256


@dataclass(frozen=True)
class SplitFacts:
    """What the manifest knows of a split."""

    name: str
    studies: int
    positives: int
    patients: int


@dataclass(frozen=True)
class DataFacts:
    """What the report says of the data."""

    digest: str
    """Of the manifest."""
    unit: str
    """What the split keeps whole: 'patient' or 'image'."""
    image_size: int
    """Height and width of the stored images, in pixels."""
    splits: Sequence[SplitFacts]
    shared_patients: int
    """Patients in more than one split."""
    leaked_by_image: float | None
    """Share of val studies whose patient a split by image puts into train too; None: unknown."""
    quarantined: int
    """Studies that could not be used."""


@dataclass(frozen=True)
class ModelFacts:
    """What the report says of the model."""

    backbone: str
    initialisation: str
    """One sentence: where the weights started."""
    is_pretrained: bool
    fell_back: bool
    """Whether other weights had been asked for."""
    epoch: int
    """Of the checkpoint, counted from 1."""
    image_size: int
    """Height and width of the input, in pixels."""


@dataclass(frozen=True)
class Provenance:
    """What it takes to do it again."""

    run: str
    """The run's name."""
    created: str
    """When, as the reader shall see it."""
    seed: int
    config_json: str
    command: str
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions, code revision and digests by name."""


@dataclass(frozen=True)
class Row:
    """A line of the headline table."""

    name: str
    meaning: str
    val: str
    test: str
    reason: str


def render_report(
    evaluation: Evaluation,
    *,
    data: DataFacts,
    model: ModelFacts,
    provenance: Provenance,
    history: History,
    grid: Sequence[Case],
    gallery: Mapping[Outcome, Sequence[Case]],
) -> str:
    """The page. `grid` and `gallery` show studies of test at the decision point."""
    environment = Environment(
        loader=PackageLoader("pneumo", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        data=data,
        model=model,
        provenance=provenance,
        warnings=find_warnings(evaluation, data, model),
        sentence=summarise(evaluation),
        rows=headline_rows(evaluation),
        view_rows=view_rows(evaluation),
        points=[_describe_point(evaluation, name) for name in (DECISION, SCREENING)],
        curves=_draw_curves(evaluation),
        training=_draw_training(history),
        grid=[_show(case, _thumbnail(case)) for case in grid],
        gallery=[
            {
                "word": OUTCOME_WORDS[outcome],
                "cases": [_show(case, _pair(case)) for case in gallery.get(outcome, ())],
            }
            for outcome in OUTCOMES
        ],
        describe=figures.describe_estimate,
        test_n=figures.describe_n(evaluation.test).capitalize(),
    )


# --- words ---------------------------------------------------------------------------------------


def summarise(evaluation: Evaluation) -> str:
    """What the numbers mean, in two or three sentences."""
    test = evaluation.test
    if test.auroc.value is None:
        return f"The model cannot be judged on test: {test.auroc.reason}."
    words = [
        f"Of a random positive and a random negative study, the model scores the positive higher "
        f"in {_percent(test.auroc.value)} of cases{_in_percent(test.auroc)}."
    ]
    rates = test.at[DECISION].rates
    recall, specificity = rates["recall"], rates["specificity"]
    if recall.value is not None and specificity.value is not None:
        words.append(
            f"At the threshold chosen on val it finds {_percent(recall.value)} of the positives "
            f"and clears {_percent(specificity.value)} of the negatives."
        )
    view = test.view
    if view.gain.value is not None and view.view_only.value is not None:
        alone = f"The view (AP or PA) alone reaches {view.view_only.value:.2f}"
        if view.gain.low is None:
            words.append(f"{alone}.")
        elif view.gain.low > 0:
            words.append(
                f"{alone}; the model is better by {figures.describe_estimate(view.gain, 2)}."
            )
        else:
            words.append(
                f"{alone}; that the model is better is not shown: the difference is "
                f"{figures.describe_estimate(view.gain, 2)}."
            )
    return " ".join(words)


def _in_percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" (95 % interval {_percent(estimate.low)} to {_percent(estimate.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def find_warnings(evaluation: Evaluation, data: DataFacts, model: ModelFacts) -> list[str]:
    """What the reader must know before believing a number; most severe first."""
    test = evaluation.test
    warnings = []
    if data.unit != "patient":
        share = (
            "" if data.leaked_by_image is None else f" ({_percent(data.leaked_by_image)} of val)"
        )
        warnings.append(
            f"The data was split by {data.unit}, not by patient: patients of the training data "
            f"may be judged again{share}. The numbers are too good."
        )
    elif data.shared_patients:
        warnings.append(f"{data.shared_patients} patients are in more than one split.")
    if test.auroc.value is None:
        warnings.append(f"Test cannot be judged: {test.auroc.reason}.")
    point = evaluation.points[DECISION]
    if point.threshold is None:
        warnings.append(f"No threshold could be chosen: {point.reason}.")
    smaller = min(test.positives, test.n - test.positives)
    if smaller < FEW_POSITIVES:
        warnings.append(
            f"Test is small: {test.n} studies of {test.patients} patients, {test.positives} "
            "positive. The intervals are wide; do not rank models by these numbers."
        )
    if not model.is_pretrained:
        wish = "because the weights asked for could not be had" if model.fell_back else "as asked"
        warnings.append(
            f"The model started from random weights, {wish}. Expect less than from ImageNet's."
        )
    gain = test.view.gain
    if gain.low is not None and gain.low <= 0:
        warnings.append("The model is not shown to be better than the view (AP or PA) alone.")
    if data.quarantined:
        warnings.append(
            f"{data.quarantined} studies could not be used and are in no split; "
            "the store's quarantine.jsonl says why."
        )
    return warnings


_RANKING_ROWS = (
    ("AUROC", "chance that a positive scores above a negative; 0.5 is a coin", "auroc"),
    ("Average precision", "mean precision over the positives", "average_precision"),
    ("Brier score", "mean squared error of the probability; lower is better", "brier"),
    ("Log loss", "surprise in nats; lower is better", "log_loss"),
)
_RATE_ROWS = (
    ("Accuracy", "share of studies called right", "accuracy"),
    ("Precision (PPV)", "share of positive calls that are right", "precision"),
    ("Recall (sensitivity)", "share of positives found", "recall"),
    ("Specificity", "share of negatives cleared", "specificity"),
    ("F1", "harmonic mean of precision and recall", "f1"),
)


def headline_rows(evaluation: Evaluation) -> list[Row]:
    """The table of the summary: ranking first, then the decision point."""
    val, test = evaluation.val, evaluation.test
    rows = [
        _row(name, meaning, getattr(val, key), getattr(test, key))
        for name, meaning, key in _RANKING_ROWS
    ]
    at_point = [
        _row(name, meaning, val.at[DECISION].rates[key], test.at[DECISION].rates[key])
        for name, meaning, key in _RATE_ROWS
    ]
    return [*rows[:1], *at_point, *rows[1:]]


def view_rows(evaluation: Evaluation) -> list[Row]:
    """The model beside the view."""
    val, test = evaluation.val.view, evaluation.test.view
    return [
        _row("Model", "AUROC where the view is known", val.model, test.model),
        _row("View alone", "AP counts as positive, no pixel is looked at", val.view_only,
             test.view_only),
        _row("Difference", "model − view alone", val.gain, test.gain),
        _row("Model within AP", "the view is of no help here", val.within["AP"],
             test.within["AP"]),
        _row("Model within PA", "the view is of no help here", val.within["PA"],
             test.within["PA"]),
    ]  # fmt: skip


def _row(name: str, meaning: str, val: Estimate, test: Estimate) -> Row:
    return Row(
        name,
        meaning,
        figures.describe_estimate(val),
        figures.describe_estimate(test),
        test.reason or "",
    )


def _describe_point(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """An operating point for the template: words, the table and its row shares."""
    point, at_test = evaluation.points[name], evaluation.test.at[name]
    described: dict[str, Any] = {
        "name": name.capitalize(),
        "rule": point.rule,
        "threshold": point.threshold,
        "reason": at_test.rates["accuracy"].reason,
        "cells": None,
        "rates": [
            _row(label, meaning, evaluation.val.at[name].rates[key], at_test.rates[key])
            for label, meaning, key in (*_RATE_ROWS[1:4], ("NPV", "negatives", "npv"))
        ],
    }
    if at_test.counts is not None:
        table = figures.confusion_table(at_test.counts)
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        described["cells"] = [
            [(int(table[i, j]), float(share[i, j])) for j in (0, 1)] for i in (0, 1)
        ]
    return described


# --- pictures ------------------------------------------------------------------------------------


def _draw_curves(evaluation: Evaluation) -> list[dict[str, Any]]:
    test = evaluation.test
    auroc = figures.describe_estimate(test.auroc)
    precision = figures.describe_estimate(test.average_precision)
    return [
        _inline(figures.draw_roc(evaluation), f"ROC curve; AUROC on test {auroc}"),
        _inline(
            figures.draw_precision_recall(evaluation),
            f"Precision-recall curve; average precision on test {precision}",
        ),
    ]


def _draw_training(history: History) -> list[dict[str, Any]]:
    if not history:
        return []
    n = len(history)
    return [
        _inline(figures.draw_loss(history), f"Loss on train and val over {n} epochs"),
        _inline(
            figures.draw_validation(history), f"AUROC, precision and recall on val, {n} epochs"
        ),
    ]


def _inline(svg: bytes, alt: str) -> dict[str, Any]:
    """The drawing as part of the page: scales with it, takes its ink, can be read aloud."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text
    )  # several drawings share names like axes_1
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)
    assert view_box is not None
    escaped = Markup.escape(alt)
    rest = rest.replace(figures.INK, "var(--ink)").replace(figures.RULE, "var(--rule)")
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box[0]} role="img" aria-label="{escaped}"'
    )
    return {"svg": Markup(f"{opening}>{rest}"), "alt": alt}


def _show(case: Case, picture: bytes) -> dict[str, Any]:
    word = OUTCOME_WORDS[case.outcome]
    return {
        "source": "data:image/webp;base64," + base64.b64encode(picture).decode(),
        "is_right": case.is_right,
        "word": word,
        "prediction": case.prediction,
        "probability": f"{case.probability:.2f}",
        "target": case.target,
        "boxes": len(case.boxes),
        "alt": f"Chest X-ray, {word}: {case.caption}, boxes: {len(case.boxes)}",
    }


def _thumbnail(case: Case) -> bytes:
    scaled = Image.fromarray(case.image)
    scaled.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    return figures.encode_image(np.asarray(scaled))


def _pair(case: Case) -> bytes:
    size = min(GALLERY_PIXELS, case.image.shape[0])
    return figures.encode_image(figures.compose_case(case, size=size))
