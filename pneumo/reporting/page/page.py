"""The page: every section's facts in one template."""

from collections.abc import Mapping, Sequence
from typing import Any

from pneumo.evaluation.comparison import ComparedRuns
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.evaluation.metrics import Confusion
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES, FindingErrors, Outcome
from pneumo.reporting.figures import charts
from pneumo.reporting.figures.case_pictures import OUTCOME_WORDS, Case, Pictures
from pneumo.reporting.figures.charts import History
from pneumo.reporting.page import performance_section
from pneumo.reporting.page.data_section import describe_data, describe_quality
from pneumo.reporting.page.embedding import (
    PAIR_PIXELS,
    draw_curves,
    draw_training,
    inline,
    make_environment,
    show_pairs,
    show_thumbnails,
)
from pneumo.reporting.page.formatting import Cell
from pneumo.reporting.page.model_card import CLAIM, NOT_ANSWERED, describe_card
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts, Provenance
from pneumo.reporting.page.saliency_section import describe_saliency
from pneumo.reporting.page.subgroup_section import describe_groups
from pneumo.reporting.page.summary import answer, find_warnings, summarise

MAX_PAGE_BYTES = 3_000_000
"""Of report.html: what a mail or a phone takes."""


CONTENTS: tuple[tuple[str, str], ...] = (
    ("summary", "Summary"),
    ("good", "How good, how sure?"),
    ("whom", "For whom?"),
    ("points", "At what threshold?"),
    ("calibration", "Can the probability be believed?"),
    ("worth", "Is it worth acting on?"),
    ("baselines", "Against what baseline?"),
    ("comparison", "Beside another run"),
    ("saliency", "Do the maps match the radiologists' boxes?"),
    ("errors", "Errors"),
    ("grid", "Predictions"),
    ("training", "Training"),
    ("data", "Data and leakage audit"),
    ("quality", "Data quality"),
    ("card", "Model card"),
    ("claim", "CLAIM 2024"),
    ("again", "Do it again"),
)
"""The sections of the page and their headings."""


def render_report(
    evaluation: Evaluation,
    *,
    data: DataFacts,
    model: ModelFacts,
    provenance: Provenance,
    history: History,
    pictures: Pictures,
    saliency: SaliencySummary | None = None,
    compared: ComparedRuns | None = None,
    members: MemberSpread | None = None,
) -> str:
    """The page. `pictures` and `saliency` are of test; None: maps were not scored.

    Studies beside their maps are as large as MAX_PAGE_BYTES allows; a page of very many is larger
    than that all the same.
    """
    facts = dict(
        evaluation=evaluation,
        phantoms=data.phantoms,
        contents=[part for part in CONTENTS if part[0] != "comparison" or compared is not None],
        is_calibrated=evaluation.calibration.chosen is not None,
        data=describe_data(data),
        quality=describe_quality(data),
        model=model,
        provenance=provenance,
        warnings=find_warnings(evaluation, data, model),
        sentence=summarise(evaluation),
        answers=answer(evaluation, saliency),
        groups=describe_groups(evaluation),
        saliency=describe_saliency(saliency),
        members=performance_section.describe_members(members),
        comparison=performance_section.describe_comparison(compared),
        training=draw_training(history, model.epoch),
        patients_known=evaluation.test.patients is not None,
        claim=CLAIM,
        not_claimed=NOT_ANSWERED,
        test_n=charts.describe_n(evaluation.test).capitalize(),
        card=describe_card(data, model),
        **_describe_performance(evaluation),
    )
    counts = evaluation.test.at[DECISION].counts
    template = make_environment().get_template("page.html.j2")
    page = ""
    for size in PAIR_PIXELS:
        page = template.render(facts, **_describe_pictures(pictures, counts, size))
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _describe_performance(evaluation: Evaluation) -> dict[str, Any]:
    test = evaluation.test
    slope = Cell.of(test.before.slope, 2)
    return {
        "rows": performance_section.headline_rows(evaluation),
        "delong": Cell.of(test.auroc_delong),
        "delong_clustered": Cell.of(test.auroc_delong_clustered),
        "curves": draw_curves(evaluation),
        "matrices": [
            performance_section.describe_point(evaluation, n) for n in (DECISION, SCREENING)
        ],
        "points": performance_section.describe_points(evaluation),
        "prevalences": performance_section.describe_prevalences(evaluation),
        "calibration": performance_section.describe_calibration(evaluation),
        "reliability": inline(
            charts.draw_reliability(evaluation),
            f"Calibration on test: fraction of positives over predicted probability, n = {test.n}; "
            f"slope before calibration {slope}",
        ),
        "decision": performance_section.describe_decision(evaluation),
        "decision_curve": inline(
            charts.draw_decision_curve(evaluation),
            f"Decision curve on test, n = {test.n}: net benefit in true positives a study, over "
            "the threshold",
        ),
        "baselines": performance_section.describe_baselines(evaluation),
        "view_rows": performance_section.view_rows(evaluation),
    }


def _describe_pictures(pictures: Pictures, counts: Confusion | None, size: int) -> dict[str, Any]:
    def describe(outcome: Outcome, shown: Mapping[Outcome, Sequence[Case]]) -> dict[str, Any]:
        title = f"{OUTCOME_WORDS[outcome]}s".capitalize()
        return {"title": title, "cases": show_pairs(shown.get(outcome, []), size)}

    def describe_errors(outcome: Outcome) -> dict[str, Any]:
        shown, total = len(pictures.errors.get(outcome, [])), vars(counts)[outcome] if counts else 0
        title = f"{OUTCOME_WORDS[outcome]}s"
        title = (
            f"All {shown} {title}" if shown and shown == total else f"The most confident {title}"
        )
        return describe(outcome, pictures.errors) | {"title": title}

    return {
        "not_shown": pictures.reason,
        "grid": show_thumbnails(pictures.grid),
        "gallery": [describe(outcome, pictures.gallery) for outcome in OUTCOMES],
        "errors": [describe_errors(outcome) for outcome in ERRORS],
        "by_finding": [_describe_finding(found) for found in pictures.by_finding],
    }


def _describe_finding(found: FindingErrors) -> dict[str, Any]:
    return {
        "finding": found.finding,
        "n": found.n,
        "called": found.called_positive,
        "errors": found.errors,
        "rate": Cell.of(found.error_rate, 2),
        "wilson": Cell.of(found.wilson, 2),
    }
