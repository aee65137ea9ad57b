"""The section on subgroups, for the template: a forest plot."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pneumo.evaluation.estimates import Estimate
from pneumo.evaluation.evaluation import Evaluation, SplitEvaluation
from pneumo.evaluation.operating_points import DECISION
from pneumo.evaluation.reliability import Reliability
from pneumo.evaluation.subgroup_gaps import MEASURE_NAMES, WorstSubgroup
from pneumo.evaluation.subgroups import COMPARED, Subgroup
from pneumo.reporting.page.formatting import Cell

TITLES: Mapping[str, str] = {
    "sex": "Sex",
    "age": "Age, years",
    "view": "View",
    "sex_age": "Sex and age",
    "view_sex": "View and sex",
    "negatives": "All positives against these negatives",
    "box_area": "Positives by area of their boxes, in thirds, against all negatives",
}

_MORE = ("precision", "npv", "accuracy", "f1", "mcc")
"""Rates in the second table, before the Brier score."""


def describe_subgroups(evaluation: Evaluation) -> dict[str, Any]:
    """The forest plot of test: an axis, and a row for each subgroup, its bar in percent of the
    axis."""
    test = evaluation.test
    every = test.subgroups.groups
    known = [group for group in every if group.auroc.value is not None]
    start = _start_axis([test.auroc, *(group.auroc for group in every)])
    worst = test.subgroups.worst
    return {
        "start": f"{start:.1f}",
        "overall": _describe_row(test, test.at[DECISION].rates, test.after, start),
        "blocks": [
            {
                "by": by,
                "title": TITLES[by],
                "rows": [
                    {
                        "name": group.name,
                        "is_worst": (by, group.name) == (worst.by, worst.name),
                        **_describe_row(group, group.rates, group, start),
                    }
                    for group in known
                    if group.by == by
                ],
                "not_known": _list_unknown([g for g in some if g.auroc.value is None]),
            }
            for by, some in groupby(every, key=lambda group: group.by)
        ],
        "has_more": any(group.by in COMPARED for group in known),
        "whole": [*COMPARED],
        "worst": worst_subgroup_sentence(worst),
        "is_shown": worst.is_shown,
    }


def _describe_row(
    whole: SplitEvaluation | Subgroup,
    rates: Mapping[str, Estimate],
    calibrated: Reliability | Subgroup,
    start: float,
) -> dict[str, Any]:
    """The row of all studies or of a subgroup; `calibrated` has the measures of the calibrated
    probability."""
    beside = {
        "Sensitivity": Cell.of(rates["recall"], 2),
        "Specificity": Cell.of(rates["specificity"], 2),
        "Average precision": Cell.of(whole.average_precision, 2),
        "Predicted − observed": Cell.of(calibrated.in_the_large, 2, signed=True),
    }
    return {
        "n": whole.n,
        "positives": whole.positives,
        "auroc": whole.auroc,
        "bar": _place(whole.auroc, start),
        "beside": [(name, cell) for name, cell in beside.items() if cell.value],
        "more": [*(rates[key] for key in _MORE), calibrated.brier],
    }


def _list_unknown(groups: Sequence[Subgroup]) -> list[str]:
    """A line for each reason, with its subgroups and their rates that are known."""
    names: dict[str, list[str]] = {}
    for group in groups:
        reason = str(group.auroc.reason)
        if reason.startswith("too small"):
            reason = f"too small, {reason.rsplit(', ')[-1]} of each class"
        rates = {"sensitivity": group.rates["recall"], "specificity": group.rates["specificity"]}
        known = [f"{name} {r.value:.2f}" for name, r in rates.items() if r.value is not None]
        names.setdefault(reason, []).append(
            f"{group.name} ({', '.join([f'n = {group.n}', *known])})"
        )
    return [f"AUROC not known: {', '.join(some)}: {reason}" for reason, some in names.items()]


def worst_subgroup_sentence(worst: WorstSubgroup) -> str:
    """Which subgroup the model serves worst, and in which measure."""
    if not worst.compared:
        return f"Groups cannot be compared: {worst.gap.reason}."
    measures = [MEASURE_NAMES[measure] for measure in worst.measures]
    listed = " or ".join(filter(None, [", ".join(measures[:-1]), measures[-1]]))
    none = f"No group is shown to be served worse in {listed}."
    if worst.name is None or worst.by is None or worst.measure is None:
        return none
    title = TITLES[worst.by].split(",")[0].lower()
    gap = (
        f"{MEASURE_NAMES[worst.measure]} of {title} {worst.name}: {Cell.of(worst.gap, signed=True)}"
    )
    gap += f" from that of all others, the interval widened for {worst.compared} comparisons"
    if worst.is_shown:
        return f"Served worst: {gap}."
    return f"{none} The largest gap is in {gap}."


def _start_axis(estimates: list[Estimate]) -> float:
    """The lower end of the axis: 0.5, or less where an interval is lower."""
    lows = [e.value if e.low is None else e.low for e in estimates if e.value is not None]
    return min(0.5, math.floor(10 * min(lows)) / 10) if lows else 0.5


def _place(estimate: Estimate, start: float) -> dict[str, str] | None:
    if estimate.value is None:
        return None

    def scale(x: float) -> str:
        # With a margin at both ends, for the dots.
        return f"{3 + 94 * (x - start) / (1 - start):.1f}"

    low, high = estimate.low, estimate.high
    return {
        "low": scale(estimate.value if low is None else low),
        "value": scale(estimate.value),
        "high": scale(estimate.value if high is None else high),
    }
