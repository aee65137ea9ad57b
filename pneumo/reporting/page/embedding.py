"""Templates, and figures and images embedded in the page, so that it needs no other file."""

import base64
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pneumo.evaluation.evaluation import Evaluation
from pneumo.reporting.figures import charts, style
from pneumo.reporting.figures.case_pictures import OUTCOME_WORDS, Case, compose_picture, shrink
from pneumo.reporting.figures.charts import History
from pneumo.reporting.page.formatting import (
    Cell,
    count,
    decimal,
    fine_percent,
    p_value,
    percent,
    percent_range,
)

THUMBNAIL_PIXELS = 176
PAIR_PIXELS = (256, 192, 144, 112, 80)
"""Heights of a study beside its map, tried from the first until the page is small enough."""


def make_environment() -> Environment:
    """Escapes text, and fails for a name that the template is not given. Its filters write numbers
    as `formatting` does."""
    environment = Environment(
        loader=PackageLoader("pneumo.reporting.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": Cell.of,
        "decimal": decimal,
        "fine_percent": fine_percent,
        "mean": statistics.mean,
        "number": "{:,}".format,
        "p_value": p_value,
        "percent": percent,
        "percent_range": percent_range,
        "standard_deviation": statistics.stdev,
        "threshold": style.show_threshold,
    }
    return environment


def inline_svg(svg: bytes, alt: str) -> dict[str, Any]:
    """The figure as part of the page, with the page's size and colors and a text for screen
    readers."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text
    )  # several figures use names like axes_1
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)
    assert view_box is not None
    escaped = Markup.escape(alt)
    rest = rest.replace(style.INK, "var(--ink)").replace(style.RULE, "var(--rule)")
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box[0]} role="img" aria-label="{escaped}"'
    )
    return {"svg": Markup(f"{opening}>{rest}"), "alt": alt}


def draw_curves(evaluation: Evaluation) -> list[dict[str, Any]]:
    """ROC and precision-recall."""
    test = evaluation.test
    auroc, precision = Cell.of(test.auroc), Cell.of(test.average_precision)
    return [
        inline_svg(charts.draw_roc(evaluation), f"ROC curve, n = {test.n}; AUROC on test {auroc}"),
        inline_svg(
            charts.draw_precision_recall(evaluation),
            f"Precision-recall curve, n = {test.n}; average precision on test {precision}",
        ),
    ]


def draw_training(history: History, scored_epoch: int) -> list[dict[str, Any]]:
    """Loss and validation by epoch; nothing without a history."""
    if not history:
        return []
    epochs = f"{len(history)} epochs; epoch {scored_epoch} is scored"
    return [
        inline_svg(charts.draw_loss(history, scored_epoch), f"Loss on train and val over {epochs}"),
        inline_svg(
            charts.draw_validation(history, scored_epoch),
            f"AUROC, precision and recall on val over {epochs}",
        ),
    ]


def show_thumbnails(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The studies without maps."""
    return [_show(case, shrink(case, THUMBNAIL_PIXELS).image) for case in cases]


def show_pairs(cases: Sequence[Case], size: int) -> list[dict[str, Any]]:
    """Each study beside its map, at most `size` pixels high."""
    return [
        _show(
            case,
            compose_picture(case.image, case.cam, case.boxes, size=min(size, len(case.image))),
        )
        for case in cases
    ]


def _show(case: Case, picture: npt.NDArray[np.uint8]) -> dict[str, Any]:
    word = OUTCOME_WORDS[case.outcome]
    age = f"{case.age_band.replace('-', '–')} years" if case.age_band else ""
    boxes = count(len(case.boxes), "box", "boxes") if case.boxes else ""
    is_empty = case.cam is not None and not case.cam.any()
    known = ", ".join(
        fact
        for fact in (case.finding, case.view, age, boxes, "empty map" if is_empty else "")
        if fact
    )
    return {
        "case": case,
        "source": to_data_uri(style.encode_image(picture)),
        "word": word,
        "known": known,
        "alt": f"Chest X-ray, {word}: {case.caption}. {known}".rstrip(". "),
    }


def to_data_uri(picture: bytes) -> str:
    """A WebP image as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()
