"""The first screen of the report: what the numbers mean, and warnings."""

from dataclasses import dataclass

import numpy as np

from pneumo.evaluation.baselines import ViewBaseline
from pneumo.evaluation.estimates import Estimate
from pneumo.evaluation.evaluation import Evaluation, SplitEvaluation
from pneumo.evaluation.map_scores import SaliencySummary
from pneumo.evaluation.operating_points import DECISION
from pneumo.reporting.figures.style import show_threshold
from pneumo.reporting.page.formatting import Cell, count, percent
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts
from pneumo.reporting.page.saliency_section import OFF, saliency_sentence
from pneumo.reporting.page.subgroup_section import worst_subgroup_sentence

FEW_PATIENTS = 50
"""With fewer patients of a class in test the intervals are too wide to compare models."""


def summarise(evaluation: Evaluation) -> str:
    """What the numbers mean, in two or three sentences."""
    test = evaluation.test
    if test.auroc.value is None:
        return f"The model cannot be evaluated on test: {test.auroc.reason}."
    if np.ptp(evaluation.predictions.subset("test").logit) == 0:
        return "The model gives all studies of test the same score: it separates nothing."
    words = [
        f"Of a random positive and a random negative study, the model scores the positive higher "
        f"in {percent(test.auroc.value)} of cases{_in_percent(test.auroc)}."
    ]
    rates = test.at[DECISION].rates
    recall, specificity = rates["recall"], rates["specificity"]
    if recall.value is not None and specificity.value is not None:
        words.append(
            f"At the threshold chosen on val it finds {percent(recall.value)} of the positives "
            f"and clears {percent(specificity.value)} of the negatives."
        )
    if view := view_sentence(test.view):
        words.append(view)
    return " ".join(words)


def view_sentence(view: ViewBaseline) -> str:
    """The model compared with the view alone; '' where that is unknown."""
    gain = view.gain_delong.difference
    if gain.value is None or view.alone_auroc.value is None:
        return ""
    alone = f"Knowing only AP or PA gives an AUROC of {view.alone_auroc.value:.2f}"
    if gain.low is None:
        return f"{alone}."
    difference = Cell.of(gain, 2, signed=True)
    if gain.low > 0:
        return f"{alone}; the model's is higher by {difference}."
    if gain.high is not None and gain.high < 0:
        return f"{alone}; the model's is lower: the difference is {difference}."
    return f"{alone}; the model's is not shown to be higher: the difference is {difference}."


def _in_percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" (95 % interval {percent(estimate.low)} to {percent(estimate.high)})"


def count_patients(test: SplitEvaluation) -> str:
    """`21 patients`."""
    return "unknown patients" if test.patients is None else count(test.patients, "patient")


def find_warnings(evaluation: Evaluation, data: DataFacts, model: ModelFacts) -> list[str]:
    """What makes the numbers doubtful; most severe first."""
    warnings = [*_warn_of_split(evaluation.test, data), *_warn_of_ranking(evaluation)]
    if not model.is_pretrained:
        wish = "as the configured ones were not available" if model.fell_back else "as configured"
        warnings.append(
            f"The model started from random weights, {wish}. Expect less than from ImageNet's."
        )
    gain = evaluation.test.view.gain_delong.difference
    if gain.low is not None and gain.low <= 0:
        warnings.append("The model is not shown to be better than the view (AP or PA) alone.")
    if quarantined := sum(data.quality.quarantined.values()):
        warnings.append(
            f"In no split: {count(quarantined, 'study', 'studies')} that could not be used; "
            "the store's quarantine.jsonl says why."
        )
    return warnings


def _warn_of_split(test: SplitEvaluation, data: DataFacts) -> list[str]:
    """Faults of the split, which make the numbers too good or the intervals too narrow."""
    warnings, audit = [], data.audit
    if audit.unit != "patient":
        leaked = audit.leaked_by_image
        fraction = "" if leaked is None else f" ({percent(leaked)} of val)"
        warnings.append(
            f"The data was split by {audit.unit}, not by patient: test may hold patients of the "
            f"training data{fraction}. The numbers are too good."
        )
        if test.patients is None:
            warnings.append(
                "Which studies are of one patient is unknown: each counts as a patient, so all "
                "intervals are too narrow."
            )
    elif audit.shared_patients:
        warnings.append(f"{audit.shared_patients} patients are in more than one split.")
    if shared := data.quality.duplicates.across_splits:
        warnings.append(
            f"{count(shared, 'picture is', 'pictures are')} in more than one split, pixel by "
            "pixel: the model is evaluated on what it was trained or chosen on, and its numbers "
            "are too good."
        )
    return warnings


def _warn_of_ranking(evaluation: Evaluation) -> list[str]:
    """What test cannot show: too few patients, no interval, or no better than chance."""
    test, point, warnings = evaluation.test, evaluation.points[DECISION], []
    if test.auroc.value is None:
        warnings.append(f"Test cannot be evaluated: {test.auroc.reason}.")
    elif test.auroc.low is None:
        found = Cell.of(test.auroc)
        warnings.append(
            f"The AUROC of {found.value} has no interval ({found.reason}), so how sure it is, is "
            "not known."
        )
    elif not is_shown_to_rank(test.auroc):
        warnings.append(
            f"The model is not shown to rank better than chance: AUROC {Cell.of(test.auroc)}."
        )
    if point.threshold is None:
        warnings.append(f"No threshold could be chosen: {point.reason}.")
    smaller = min(test.patients_by_class)
    if smaller < FEW_PATIENTS:
        who = "patients" if test.patients is not None else "studies"
        warnings.append(
            f"Test is small: {smaller} {who} in the rarer class, {test.n} studies of "
            f"{count_patients(test)} altogether. The intervals are wide; do not rank models by "
            "these numbers."
        )
    return warnings


def is_shown_to_rank(auroc: Estimate) -> bool:
    """Whether the interval of the AUROC is above 0.5."""
    return auroc.low is not None and auroc.low > 0.5


@dataclass(frozen=True)
class Answer:
    """A row of the summary."""

    question: str
    section: str
    """Anchor of the section with the details."""
    short: str
    """A number or two; '' where there is none."""
    text: str


def answer_questions(evaluation: Evaluation, saliency: SaliencySummary | None) -> list[Answer]:
    """The main questions and answers, in the order of the page."""
    return [
        _answer_good(evaluation),
        _answer_sure(evaluation),
        _answer_whom(evaluation),
        _answer_threshold(evaluation),
        _answer_baseline(evaluation),
        _answer_saliency(saliency),
    ]


def _answer_good(evaluation: Evaluation) -> Answer:
    test = evaluation.test
    found = Cell.of(test.auroc)
    words = found.reason
    if found.value:
        precision = Cell.of(test.average_precision, 2)
        chance = f"{test.prevalence:.2f} would be chance"
        words = f"AUROC; 0.5 would be chance. Average precision {precision}; {chance}."
    return Answer("How good?", "good", found.value, words)


def _answer_sure(evaluation: Evaluation) -> Answer:
    test = evaluation.test
    counts = (
        f"{count(test.n, 'study', 'studies')} of {count_patients(test)}, "
        f"{test.positives:,} positive."
    )
    found = Cell.of(test.auroc)
    return Answer(
        "How sure?",
        "good",
        found.interval,
        f"95 % interval of the AUROC; {counts}" if found.interval else f"{found.reason}; {counts}",
    )


def _answer_whom(evaluation: Evaluation) -> Answer:
    worst = evaluation.test.subgroups.worst
    short = Cell.of(worst.gap, 2, signed=True).value if worst.is_shown else "none shown"
    if not worst.compared:
        short = ""
    return Answer("For which patients?", "whom", short, worst_subgroup_sentence(worst))


def _answer_threshold(evaluation: Evaluation) -> Answer:
    point, at = evaluation.points[DECISION], evaluation.test.at[DECISION]
    if point.threshold is None:
        return Answer(
            "At what threshold?", "points", "", f"No threshold could be chosen: {point.reason}."
        )
    recall, specificity = Cell.of(at.rates["recall"], 2), Cell.of(at.rates["specificity"], 2)
    risk = evaluation.calibrate(point.logit)
    calibrated = "" if risk is None else f"A calibrated risk of {show_threshold(risk)}. "
    return Answer(
        "At what threshold?",
        "points",
        f"p ≥ {show_threshold(point.threshold)}",
        f"{calibrated}Chosen on val ({point.rule}). On test sensitivity {recall}, specificity "
        f"{specificity}.",
    )


def _answer_baseline(evaluation: Evaluation) -> Answer:
    view, metadata = evaluation.test.view, evaluation.test.metadata
    gain = Cell.of(view.gain_delong.difference, 2, signed=True)
    others = Cell.of(metadata.gain_delong.difference, 2, signed=True)
    words = f"{view_sentence(view) or f'Beside the view alone: {gain}.'} "
    words += f"Over view, sex, age and pixel spacing together: {others}."
    return Answer("Against what baseline?", "baselines", gain.value, words)


def _answer_saliency(saliency: SaliencySummary | None) -> Answer:
    short = ""
    if saliency is not None and saliency.groups["all"].gain is not None:
        short = Cell.of(saliency.groups["all"].gain["prior"]["auprc"], 2, signed=True).value
    words = OFF if saliency is None else saliency_sentence(saliency)
    return Answer("Do the maps match the radiologists' boxes?", "saliency", short, words)
