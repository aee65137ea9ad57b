"""The numbers of the page: the rows of its tables, and what they show in sentences."""

from pneumo.evaluation.calibration import Calibration
from pneumo.evaluation.comparison import ComparedRuns
from pneumo.evaluation.decision_curve import THRESHOLDS, DecisionCurve
from pneumo.evaluation.estimates import MIN_FOR_INTERVAL, Estimate
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.member_spread import MemberSpread
from pneumo.evaluation.operating_points import DECISION, SCREENING, STANDARD, OperatingPoint
from pneumo.reporting.page.formatting import Cell, decimal, p_value

_RANKING_ROWS = (
    ("AUROC", "chance that a positive scores above a negative; 0.5 is a coin", "auroc"),
    ("Average precision", "mean precision over the positives", "average_precision"),
    (
        "Sensitivity at a specificity of 0.90",
        "read off the split's own ROC curve, whatever the threshold",
        "sensitivity_at_specificity_90",
    ),
)
_RATE_ROWS = (
    ("Accuracy", "fraction of studies called right", "accuracy"),
    ("Precision (PPV)", "fraction of positive calls that are right", "precision"),
    ("Recall (sensitivity)", "fraction of positives found", "recall"),
    ("Specificity", "fraction of negatives cleared", "specificity"),
    ("NPV", "fraction of negative calls that are right", "npv"),
    ("F1", "harmonic mean of precision and recall", "f1"),
    ("MCC", "correlation of call and label; 0 is a guess, 1 is right throughout", "mcc"),
    ("Balanced accuracy", "mean of sensitivity and specificity", "balanced_accuracy"),
    ("Likelihood ratio +", "sensitivity / (1 − specificity)", "lr_positive"),
    ("Likelihood ratio −", "(1 − sensitivity) / specificity", "lr_negative"),
)
RELIABILITY_ROWS = (
    ("Brier score", "mean squared error of the probability; lower is better", "brier", False),
    ("Log loss", "surprise in nats; lower is better", "log_loss", False),
    ("Calibration error", "mean distance of predicted and observed over the bins", "ece", False),
    ("Slope", "1 is right; below 1 the probabilities are too extreme", "slope", False),
    ("Calibration intercept", "of the same fit as the slope; 0 is right", "intercept", True),
    (
        "Calibration intercept at slope 1",
        "log odds; 0 is right, below 0 the probabilities are too high",
        "intercept_at_slope_1",
        True,
    ),
    ("Mean predicted − observed risk", "0 is right, above 0 too high", "in_the_large", True),
)
"""Name, meaning, field of `Reliability`, and whether it is shown with its sign."""
COMPARED_NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "brier": "Brier score, calibrated (lower is better)",
}
METRIC_NAMES = {key: name for name, _, key in (*_RANKING_ROWS, *_RATE_ROWS)}
SHOWN_THRESHOLDS = (0.05, 0.10, 0.20, 0.30, 0.40, 0.50)


EstimateRow = tuple[str, str, Estimate, Estimate]
"""Name and meaning of a metric, and its estimates on test and val."""


def headline_rows(evaluation: Evaluation) -> list[EstimateRow]:
    """Ranking metrics, which need no threshold, then those at the decision point."""
    val, test = evaluation.val, evaluation.test
    return [
        *((name, why, getattr(test, key), getattr(val, key)) for name, why, key in _RANKING_ROWS),
        *(
            (name, why, test.at[DECISION].rates[key], val.at[DECISION].rates[key])
            for name, why, key in _RATE_ROWS
        ),
    ]


def view_rows(evaluation: Evaluation) -> list[EstimateRow]:
    """The model's AUROC within each view."""
    val, test = evaluation.val.view.within, evaluation.test.view.within
    return [
        (f"Model within {view}", "the view is of no help here", test[view], val[view])
        for view in ("AP", "PA")
    ]


def members_sentence(members: MemberSpread) -> str:
    """What the spread of the runs shows."""
    number = len(members.runs)
    if members.is_of_seeds:
        return (
            f"The {number} runs differ in their seed alone. Their standard deviation is that "
            "between seeds, which the intervals above do not hold."
        )
    if not members.differ_in:
        return f"The {number} runs have one setting and one seed, so they show no spread of seeds."
    return (
        f"The {number} runs differ in {', '.join(members.differ_in)}, so their standard deviation "
        "is not that between seeds."
    )


def list_points(evaluation: Evaluation) -> list[tuple[OperatingPoint, list[str]]]:
    """Every operating point, with its uses: decision, screening, or none.

    A configured point that has the rule of a standard point is listed once.
    """
    points: dict[str, tuple[OperatingPoint, list[str]]] = {}
    for name in (DECISION, SCREENING, *STANDARD):
        point = evaluation.points[name]
        _, uses = points.setdefault(point.rule, (point, []))
        if name in (DECISION, SCREENING):
            uses.append(name)
    return list(points.values())


def calibration_sentence(calibration: Calibration) -> str:
    """Which scaling is used, and why."""
    chosen = calibration.chosen
    if chosen is None:
        return f"No calibration could be fitted: {calibration.reason}."
    if chosen.method == "none":
        return (
            "The probabilities are the network's own: neither temperature nor Platt's scaling had "
            "a cross-validated log loss on val that was lower by more than one standard error."
        )
    how = f"temperature scaling (T = {1 / chosen.slope:.2f})"
    if chosen.method == "platt":
        how = (
            f"Platt's scaling (slope {decimal(chosen.slope, 2)}, intercept "
            f"{decimal(chosen.intercept, 2, signed=True)})"
        )
    return (
        f"Fitted on val: {how}, the simplest of none, temperature and Platt's whose log loss, "
        "cross-validated there, was within one standard error of the lowest. It moves no study "
        "across a threshold and changes no ranking."
    )


def decision_curve_sentence(curve: DecisionCurve) -> str:
    """What the curve shows for these studies."""
    if curve.reason is not None:
        return f"There is no decision curve: {curve.reason}."
    known = [k for k in range(len(THRESHOLDS)) if curve.is_supported[k]]
    if not known:
        return (
            f"Too few cases for a decision curve: at no threshold do {MIN_FOR_INTERVAL} patients "
            "with a positive study lie on each side."
        )
    better = sum(curve.gain[k] > 0 for k in known)
    best = max(known, key=lambda k: curve.gain[k])
    return (
        f"From {THRESHOLDS[known[0]]:.2f} to {THRESHOLDS[known[-1]]:.2f}, where at least "
        f"{MIN_FOR_INTERVAL} patients with a positive study lie on each side of the threshold, "
        f"the model's curve is above both others at {better} of {len(known)} thresholds; the "
        f"greatest difference is {decimal(curve.gain[best], signed=True)}, at "
        f"{THRESHOLDS[best]:.2f}. This describes the studies of test and tests nothing."
    )


def comparison_sentence(compared: ComparedRuns) -> str:
    """Which run ranks better on test, in a sentence."""
    found = compared.splits["test"].auroc_delong_clustered
    gain = found.difference
    if gain.value is None:
        return f"The runs cannot be compared on test: {gain.reason}."
    numbers = f"{Cell.of(gain, signed=True)}; DeLong by patient: {p_value(found.p_value)}"
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return f"Neither run is shown to rank better: the difference in AUROC is {numbers}."
    better = compared.first if gain.low > 0 else compared.second
    return f"{better} ranks better: the difference in AUROC is {numbers}."
