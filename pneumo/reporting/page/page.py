"""The report page: the facts of all sections, and the template."""

from collections.abc import Mapping, Sequence
from typing import Any

from pneumo.evaluation.comparison import ComparedRuns
from pneumo.evaluation.decision_curve import THRESHOLDS
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.evaluation.metrics import Confusion
from pneumo.evaluation.operating_points import DECISION
from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES, Outcome
from pneumo.reporting.figures import charts
from pneumo.reporting.figures.case_pictures import OUTCOME_WORDS, Case, Pictures
from pneumo.reporting.figures.charts import History
from pneumo.reporting.page import (
    data_section,
    embedding,
    model_card,
    performance_section,
    saliency_section,
    subgroup_section,
    summary,
)
from pneumo.reporting.page.formatting import Cell
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts, Provenance

MAX_PAGE_BYTES = 3_000_000
"""Size of report.html, so that it can be sent by mail and opened on a phone."""


CONTENTS: tuple[tuple[str, str], ...] = (
    ("summary", "Summary"),
    ("good", "How good, how sure?"),
    ("whom", "For which patients?"),
    ("points", "At what threshold?"),
    ("calibration", "Can the probability be believed?"),
    ("worth", "Is it worth acting on?"),
    ("baselines", "Against what baseline?"),
    ("comparison", "Comparison with another run"),
    ("saliency", "Do the maps match the radiologists' boxes?"),
    ("errors", "Errors"),
    ("grid", "Predictions"),
    ("training", "Training"),
    ("data", "Data and leakage audit"),
    ("quality", "Data quality"),
    ("card", "Model card"),
    ("claim", "CLAIM 2024"),
    ("again", "How to reproduce"),
)
"""The sections of the page and their headings."""


def describe_report(
    evaluation: Evaluation,
    *,
    data: DataFacts,
    model: ModelFacts,
    provenance: Provenance,
    history: History,
    saliency: SaliencySummary | None = None,
    compared: ComparedRuns | None = None,
    members: MemberSpread | None = None,
) -> dict[str, Any]:
    """All of the page but the studies that it shows, with every chart drawn: for `render_report`.

    `saliency` is of test; None without scored maps.
    """
    return dict(
        evaluation=evaluation,
        phantoms=data.phantoms,
        contents=[part for part in CONTENTS if part[0] != "comparison" or compared is not None],
        data=data,
        audit=data_section.describe_audit(data),
        exclusions=data_section.list_exclusions(data),
        quality=data.quality,
        properties=data_section.PROPERTIES,
        duplicates=data_section.describe_duplicates(
            data.quality.duplicates, has_patients=data.audit.has_patients
        ),
        quality_charts=data_section.draw_quality_charts(data.quality),
        contact=data_section.show_contact_sheets(data),
        model=model,
        provenance=provenance,
        warnings=summary.find_warnings(evaluation, data, model),
        sentence=summary.summarise(evaluation),
        answers=summary.answer_questions(evaluation, saliency),
        groups=subgroup_section.describe_subgroups(evaluation),
        saliency=saliency_section.describe_saliency(saliency),
        members=members if members is not None and members.values else None,
        members_sentence=performance_section.members_sentence,
        compared=compared,
        comparison_sentence=performance_section.comparison_sentence,
        training=embedding.draw_training(history, model.epoch),
        claim=model_card.CLAIM,
        labels=model_card.describe_labels(data),
        preprocessing=model_card.preprocessing_sentences(data, model),
        limits=model_card.limits_sentences(data),
        **_describe_performance(evaluation),
    )


def render_report(facts: Mapping[str, Any], pictures: Pictures) -> str:
    """The page of `describe_report`, with `pictures` of test.

    They are as large as MAX_PAGE_BYTES allows. A page of very many pictures is larger, even with
    the smallest.
    """
    template = embedding.make_environment().get_template("page.html.j2")
    counts = facts["test"].at[DECISION].counts
    page = ""
    for size in embedding.PAIR_PIXELS:
        page = template.render(facts, **_describe_pictures(pictures, counts, size))
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _describe_performance(evaluation: Evaluation) -> dict[str, Any]:
    test = evaluation.test
    slope = Cell.of(test.before.slope, 2)
    return {
        "test": test,
        "test_n": charts.describe_n(test).capitalize(),
        "patients_known": test.patients is not None,
        "unit": "patients" if test.patients is not None else "images",
        "is_calibrated": evaluation.calibration.chosen is not None,
        "rows": performance_section.headline_rows(evaluation),
        "metric_names": performance_section.METRIC_NAMES,
        "curves": embedding.draw_curves(evaluation),
        "points": performance_section.list_points(evaluation),
        "calibration": performance_section.calibration_sentence(evaluation.calibration),
        "reliability_rows": performance_section.RELIABILITY_ROWS,
        "reliability": embedding.inline_svg(
            charts.draw_reliability(evaluation),
            f"Calibration on test: fraction of positives over predicted probability, n = {test.n}; "
            f"slope before calibration {slope}",
        ),
        "decision": performance_section.decision_curve_sentence(test.decision_curve),
        "thresholds": THRESHOLDS,
        "shown_thresholds": performance_section.SHOWN_THRESHOLDS,
        "decision_curve": embedding.inline_svg(
            charts.draw_decision_curve(evaluation),
            f"Decision curve on test, n = {test.n}: net benefit in true positives a study, over "
            "the threshold",
        ),
        "view_rows": performance_section.view_rows(evaluation),
        "compared_names": performance_section.COMPARED_NAMES,
    }


def _describe_pictures(pictures: Pictures, counts: Confusion | None, size: int) -> dict[str, Any]:
    def describe(outcome: Outcome, shown: Mapping[Outcome, Sequence[Case]]) -> dict[str, Any]:
        title = f"{OUTCOME_WORDS[outcome]}s".capitalize()
        return {"title": title, "cases": embedding.show_pairs(shown.get(outcome, []), size)}

    def describe_errors(outcome: Outcome) -> dict[str, Any]:
        shown, total = len(pictures.errors.get(outcome, [])), vars(counts)[outcome] if counts else 0
        title = f"{OUTCOME_WORDS[outcome]}s"
        title = (
            f"All {shown} {title}" if shown and shown == total else f"The most confident {title}"
        )
        return describe(outcome, pictures.errors) | {"title": title}

    return {
        "not_shown": pictures.reason,
        "grid": embedding.show_thumbnails(pictures.grid),
        "gallery": [describe(outcome, pictures.gallery) for outcome in OUTCOMES],
        "errors": [describe_errors(outcome) for outcome in ERRORS],
        "by_finding": pictures.by_finding,
    }
