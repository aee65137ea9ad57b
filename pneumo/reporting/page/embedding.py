"""How templates become pages, and drawings and studies parts of a page that stands alone."""

import base64
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pneumo.evaluation.evaluation import Evaluation
from pneumo.reporting.figures import case_pictures, charts, style
from pneumo.reporting.figures.case_pictures import OUTCOME_WORDS, Case, shrink
from pneumo.reporting.figures.charts import History
from pneumo.reporting.page.formatting import Cell, count

THUMBNAIL_PIXELS = 176
PAIR_PIXELS = (256, 192, 144, 112, 80)
"""Heights of a study beside its map, tried from the first until the page is small enough."""


def make_environment() -> Environment:
    """Text is escaped, and what a template names must be there."""
    return Environment(
        loader=PackageLoader("pneumo.reporting.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline(svg: bytes, alt: str) -> dict[str, Any]:
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
        inline(charts.draw_roc(evaluation), f"ROC curve, n = {test.n}; AUROC on test {auroc}"),
        inline(
            charts.draw_precision_recall(evaluation),
            f"Precision-recall curve, n = {test.n}; average precision on test {precision}",
        ),
    ]


def draw_training(history: History, scored_epoch: int) -> list[dict[str, Any]]:
    """Loss and validation by epoch; nothing without a history."""
    if not history:
        return []
    told = f"{len(history)} epochs; epoch {scored_epoch} is scored"
    return [
        inline(charts.draw_loss(history, scored_epoch), f"Loss on train and val over {told}"),
        inline(
            charts.draw_validation(history, scored_epoch),
            f"AUROC, precision and recall on val over {told}",
        ),
    ]


def show_thumbnails(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The studies alone."""
    return [_show(case, style.encode_image(shrink(case, THUMBNAIL_PIXELS).image)) for case in cases]


def show_pairs(cases: Sequence[Case], size: int) -> list[dict[str, Any]]:
    """Each study beside its map, at most `size` pixels high."""
    return [_show(case, _pair(case, size)) for case in cases]


def _pair(case: Case, size: int) -> bytes:
    height = min(size, case.image.shape[0])
    return style.encode_image(case_pictures.compose_case(case, size=height))


def _show(case: Case, picture: bytes) -> dict[str, Any]:
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
        "source": embed(picture),
        "is_right": case.is_right,
        "word": word,
        "why": case.why or "",
        "prediction": case.prediction,
        "probability": f"{case.probability:.2f}",
        "target": case.target,
        "known": known,
        "alt": f"Chest X-ray, {word}: {case.caption}. {known}".rstrip(". "),
    }


def embed(picture: bytes) -> str:
    """A WebP as an address."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()
