"""Evaluation -> report.html: one self-contained page, no network, no JavaScript.

The page is for a reader who has a minute (summary, warnings) as for one who has an hour (audit,
model card, how to reproduce it). It holds thumbnails and numbers, and nothing that names a patient.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
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
from pneumo.quality import ContactSheet, Quality, SplitQuality
from pneumo.shards import Duplicates
from pneumo.splits import LeakageAudit

FEW_POSITIVES = 50
"""Below this many positives or negatives in test the intervals are too wide to compare models."""
THUMBNAIL_PIXELS = 176
GALLERY_PIXELS = 256


@dataclass(frozen=True)
class DataFacts:
    """What the report says of the data."""

    digest: str
    """Of the manifest."""
    image_size: int
    """Height and width of the stored images, in pixels."""
    seed: int
    """Of the preparation."""
    audit: LeakageAudit
    quality: Quality
    contact: Sequence[ContactSheet]
    """Pictures of train by finding; may be empty."""

    @property
    def has_patients(self) -> bool:
        """Whether it is known which studies are of one patient."""
        return self.audit.leaked_by_image is not None


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
        data=_describe_data(data),
        quality=_describe_quality(data),
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
    audit, quality = data.audit, data.quality
    if audit.unit != "patient":
        leaked = audit.leaked_by_image
        share = "" if leaked is None else f" ({_percent(leaked)} of val)"
        warnings.append(
            f"The data was split by {audit.unit}, not by patient: patients of the training data "
            f"may be judged again{share}. The numbers are too good."
        )
    elif audit.shared_patients:
        warnings.append(f"{audit.shared_patients} patients are in more than one split.")
    if quality.duplicates.across_splits:
        pictures = _count(quality.duplicates.across_splits, "picture is", "pictures are")
        warnings.append(
            f"{pictures} in more than one split, pixel by pixel: the model is judged on what it "
            "was trained or chosen on, and its numbers are too good."
        )
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
    if quality.quarantined:
        studies = _count(sum(quality.quarantined.values()), "study is", "studies are")
        warnings.append(
            f"{studies} in no split, as no picture could be had; the store's quarantine.jsonl says "
            "why."
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


# --- the data ------------------------------------------------------------------------------------


def _describe_data(data: DataFacts) -> dict[str, Any]:
    """The audit for the template: the table of splits and the facts below it."""
    audit, quality = data.audit, data.quality
    leaked = "unknown: no mapping from images to patients"
    if audit.leaked_by_image is not None:
        leaked = f"{_percent(audit.leaked_by_image)} of the val studies"
    verb = "leaks" if audit.unit == "image" else "would have leaked"
    return {
        "digest": data.digest,
        "image_size": data.image_size,
        "unit": audit.unit,
        "splits": [_describe_split(name, data) for name in quality.splits],
        "facts": {
            "Who goes where": describe_rule(audit, data.seed),
            "Patients in more than one split": f"{audit.shared_patients:,}"
            if data.has_patients
            else "unknown",
            f"A split by image {verb}": leaked,
            "Quarantined": _list_reasons(quality.quarantined, "none"),
            "Tables and headers disagree": _list_reasons(quality.contradictions, "on no study"),
        },
    }


def _describe_split(name: str, data: DataFacts) -> dict[str, str]:
    split, audit = data.quality.splits[name], data.audit
    interval, shards = audit.prevalence.get(name), audit.shard_prevalence.get(name)
    return {
        "name": name,
        "patients": f"{split.patients:,}" if data.has_patients else "unknown",
        "studies": f"{split.studies:,}",
        "positives": f"{split.positives:,}",
        "prevalence": "" if interval is None else _fine_percent(interval.value),
        "interval": "" if interval is None else f"({_range(interval.low, interval.high)})",
        "shards": "" if shards is None else _range(*shards),
    }


def describe_rule(audit: LeakageAudit, seed: int) -> str:
    """Who decided which split a study is in, in words."""
    if audit.list_digest is None:
        return f"a hash of the {audit.unit} by seed {seed}, salt {audit.salt}"
    words = f"a list, SHA-256 {audit.list_digest}"
    if audit.unlisted:
        studies = _count(audit.unlisted, "study", "studies")
        return f"{words}; it does not name {studies}, which are in no split"
    return f"{words}; it names every study"


def describe_duplicates(duplicates: Duplicates, *, has_patients: bool) -> str:
    """How many pictures occur twice, and what that does to the numbers."""
    if not duplicates.pictures:
        return "No two studies have the same stored picture."
    words = [
        f"{duplicates.studies:,} studies share {_count(duplicates.pictures, 'picture')}, pixel by "
        "pixel."
    ]
    if duplicates.across_patients and has_patients:
        words.append(
            f"{_count(duplicates.across_patients, 'of them is', 'of them are')} with more than one "
            "patient: one patient under two numbers, or a file under the wrong name. Keeping "
            "patients in one split does not keep these apart."
        )
    if duplicates.across_splits:
        words.append(
            f"{_count(duplicates.across_splits, 'is', 'are')} in more than one split: each leaks, "
            "and the numbers of val and test are too good. Leave one of each out of the source."
        )
    else:
        words.append(
            "None is in more than one split, so no number of val or test is touched; within a "
            "split such a study counts as often as it occurs."
        )
    return " ".join(words)


_GROUPS = {
    "label": "Label",
    "finding": "Finding",
    "view": "View",
    "sex": "Sex",
    "age": "Age, years",
    "spacing": "Pixel spacing",
}


def _describe_quality(data: DataFacts) -> dict[str, Any]:
    """The section on data quality for the template."""
    quality = data.quality
    splits = list(quality.splits.values())
    groups: list[dict[str, Any]] = [
        {
            "name": title,
            "rows": [
                (value, [_share_cell(s.counts[what][value], s.studies) for s in splits])
                for value in splits[0].counts[what]
            ],
        }
        for what, title in _GROUPS.items()
    ]
    ages = [_number(split.age_median, "{:g}".format) for split in splits]
    by_title = {group["name"]: group["rows"] for group in groups}
    by_title["Age, years"].append(("median of the known", ages))
    spacings = [_describe_spacing(split) for split in splits]
    by_title["Pixel spacing"].append(("median, quartiles, mm", spacings))
    gray = [split.intensity for split in splits]
    groups.append(
        {
            "name": "Gray level",
            "rows": [
                ("mean, 0 to 1", [_number(part.mean, "{:.3f}".format) for part in gray]),
                ("pure black", [_number(part.black, _fine_percent) for part in gray]),
                ("pure white", [_number(part.white, _fine_percent) for part in gray]),
            ],
        }
    )
    return {
        "splits": [(name, f"{split.studies:,}") for name, split in quality.splits.items()],
        "groups": groups,
        "shifts": [str(shift) for shift in quality.shifts if not shift.is_by_chance],
        "chances": [str(shift) for shift in quality.shifts if shift.is_by_chance],
        "duplicates": describe_duplicates(quality.duplicates, has_patients=data.has_patients),
        "drawings": _draw_quality(quality),
        "contact": [
            {"source": _embed(figures.draw_contact_sheet(sheet)), "caption": sheet.caption}
            for sheet in data.contact
        ],
    }


def _share_cell(number: int, total: int) -> tuple[str, str]:
    return f"{number:,}", _fine_percent(number / total) if total else ""


def _describe_spacing(split: SplitQuality) -> tuple[str, str]:
    if split.spacing_quartiles is None:
        return "unknown", ""
    low, median, high = split.spacing_quartiles
    return f"{median:.3f}", f"{low:.3f}–{high:.3f}"


def _number(value: float | None, show: Callable[[float], str]) -> tuple[str, str]:
    return "unknown" if value is None else show(value), ""


def _list_reasons(reasons: Mapping[str, int], none: str) -> str:
    """`5 studies: not dicom 3, missing 2`, the most frequent first."""
    if not reasons:
        return none
    told = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{reason.replace('_', ' ')} {number:,}" for reason, number in told)
    return f"{_count(sum(reasons.values()), 'study', 'studies')}: {listed}"


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {_fine_percent(high)}"


def _fine_percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


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


def _draw_quality(quality: Quality) -> list[dict[str, Any]]:
    medians, means = [], []
    for name, split in quality.splits.items():
        medians.append(f"{name} {_number(split.age_median, '{:g}'.format)[0]}")
        means.append(f"{name} {_number(split.intensity.mean, '{:.3f}'.format)[0]}")
    ages = f"Age by split; median {', '.join(medians)}"
    levels = f"Gray levels by split; mean {', '.join(means)}"
    return [
        _inline(figures.draw_ages(quality), ages),
        _inline(figures.draw_intensity(quality), levels),
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
        "source": _embed(picture),
        "is_right": case.is_right,
        "word": word,
        "prediction": case.prediction,
        "probability": f"{case.probability:.2f}",
        "target": case.target,
        "boxes": len(case.boxes),
        "alt": f"Chest X-ray, {word}: {case.caption}, boxes: {len(case.boxes)}",
    }


def _embed(picture: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def _thumbnail(case: Case) -> bytes:
    scaled = Image.fromarray(case.image)
    scaled.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    return figures.encode_image(np.asarray(scaled))


def _pair(case: Case) -> bytes:
    size = min(GALLERY_PIXELS, case.image.shape[0])
    return figures.encode_image(figures.compose_case(case, size=size))
