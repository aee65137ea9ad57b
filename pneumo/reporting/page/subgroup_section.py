"""For whom: the forest of subgroups, for the template."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from pneumo.evaluation.bootstrap import Estimate
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.group_gaps import Worst, describe_measures
from pneumo.evaluation.operating_points import DECISION
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
"""Rates of a table of their own, before the Brier score."""


def describe_groups(evaluation: Evaluation) -> dict[str, Any]:
    """The forest of test: an axis, and a row a group with its bar in percent of the axis."""
    test = evaluation.test
    rates = test.at[DECISION].rates
    every = [test.auroc, *(group.auroc for group in test.subgroups.groups)]
    known = [group for group in test.subgroups.groups if group.auroc.value is not None]
    start = _start_axis(every)
    worst = test.subgroups.worst
    return {
        "start": f"{start:.1f}",
        "overall": {
            "cell": Cell.of(test.auroc),
            "bar": _place(test.auroc, start),
            "n": test.n,
            "positives": test.positives,
            "beside": _tell_beside(
                rates["recall"],
                rates["specificity"],
                test.average_precision,
                test.after.in_the_large,
            ),
            "more": [Cell.of(one, 2) for one in (*(rates[key] for key in _MORE), test.after.brier)],
        },
        "blocks": [
            {
                "by": by,
                "title": TITLES[by],
                "rows": [_describe_group(g, start, worst) for g in known if g.by == by],
                "not_known": _tell_not_known([g for g in groups if g.auroc.value is None]),
            }
            for by, some in groupby(test.subgroups.groups, key=lambda group: group.by)
            for groups in (list(some),)
        ],
        "has_more": any(group.by in COMPARED for group in known),
        "whole": [*COMPARED],
        "worst": describe_worst(worst),
        "is_shown": worst.is_shown,
    }


def _tell_not_known(groups: Sequence[Subgroup]) -> list[str]:
    """A line a reason, with the groups that it holds for."""
    names: dict[str, list[str]] = {}
    for group in groups:
        reason = str(group.auroc.reason)
        if reason.startswith("too small"):
            reason = f"too small, {reason.rsplit(', ')[-1]} of either class"
        names.setdefault(reason, []).append(f"{group.name} (n = {group.n})")
    return [f"Not known: {', '.join(some)}: {reason}" for reason, some in names.items()]


def describe_worst(worst: Worst) -> str:
    """Which group the model serves worst, in which measure, in a sentence or two."""
    if not worst.compared:
        return f"Groups cannot be compared: {worst.gap.reason}."
    names = describe_measures()
    measures = [names[measure] for measure in worst.measures]
    listed = " or ".join(filter(None, [", ".join(measures[:-1]), measures[-1]]))
    none = f"No group is shown to be served worse in {listed}."
    if worst.name is None or worst.by is None or worst.measure is None:
        return none
    title = TITLES[worst.by].split(",")[0].lower()
    gap = f"{names[worst.measure]} of {title} {worst.name}: {Cell.of(worst.gap, signed=True)}"
    told = f"{gap} from that of all others, the interval widened for {worst.compared} comparisons"
    if worst.is_shown:
        return f"Served worst: {told}."
    return f"{none} The largest gap is in {told}."


def _start_axis(estimates: list[Estimate]) -> float:
    """Where the axis begins: 0.5, or lower where an interval reaches there."""
    lows = [e.value if e.low is None else e.low for e in estimates if e.value is not None]
    return min(0.5, math.floor(10 * min(lows)) / 10) if lows else 0.5


def _place(estimate: Estimate, start: float) -> dict[str, str] | None:
    if estimate.value is None:
        return None

    def scale(x: float) -> str:
        # A little air at either end, for the dots.
        return f"{3 + 94 * (x - start) / (1 - start):.1f}"

    low, high = estimate.low, estimate.high
    return {
        "low": scale(estimate.value if low is None else low),
        "value": scale(estimate.value),
        "high": scale(estimate.value if high is None else high),
    }


def _describe_group(group: Subgroup, start: float, worst: Worst) -> dict[str, Any]:
    return {
        "name": group.name,
        "n": group.n,
        "positives": group.positives,
        "patients": group.patients,
        "auroc": Cell.of(group.auroc),
        "bar": _place(group.auroc, start),
        "beside": _tell_beside(
            group.rates["recall"],
            group.rates["specificity"],
            group.average_precision,
            group.in_the_large,
        ),
        "more": [Cell.of(one, 2) for one in (*(group.rates[key] for key in _MORE), group.brier)],
        "is_worst": (group.by, group.name) == (worst.by, worst.name),
    }


def _tell_beside(
    sensitivity: Estimate, specificity: Estimate, precision: Estimate, in_the_large: Estimate
) -> list[tuple[str, Cell]]:
    """What stands below a group's AUROC; a number that the group has not by its nature is left
    out."""
    found = {
        "Sensitivity": Cell.of(sensitivity, 2),
        "Specificity": Cell.of(specificity, 2),
        "Average precision": Cell.of(precision, 2),
        "Predicted − observed": Cell.of(in_the_large, 2, signed=True),
    }
    return [(name, cell) for name, cell in found.items() if cell.value]
