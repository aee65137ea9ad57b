"""For whom: the forest of subgroups, for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from pneumo.evaluation.bootstrap import Estimate
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.operating_points import DECISION
from pneumo.evaluation.subgroups import COMPARED, By, Subgroup, Worst
from pneumo.reporting.page.formatting import Cell

TITLES: Mapping[By, str] = {
    "sex": "Sex",
    "age": "Age, years",
    "view": "View",
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
                "rows": [_describe_group(group, start, worst) for group in groups],
            }
            for by, groups in groupby(test.subgroups.groups, key=lambda group: group.by)
        ],
        "whole": [*COMPARED],
        "worst": describe_worst(worst),
        "is_shown": worst.is_shown,
        "judged": worst.compared,
    }


def describe_worst(worst: Worst) -> str:
    """Which group the model serves worst, in a sentence."""
    if worst.name is None or worst.by is None or worst.gap.value is None:
        return f"The worst group cannot be named: {worst.gap.reason}."
    gap = Cell.of(worst.gap, signed=True)
    name = f"{TITLES[worst.by].split(',')[0].lower()} {worst.name}"
    if worst.is_shown:
        return (
            f"Worst is {name}: its AUROC differs from that of the rest by {gap}, more than chance "
            f"and a look at {worst.compared} groups explain."
        )
    return (
        f"No group is shown to be served worse. The candidate is {name}, whose AUROC differs from "
        f"that of the rest by {gap}; chance and a look at {worst.compared} groups can explain it."
    )


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
        "In the large": Cell.of(in_the_large, 2, signed=True),
    }
    return [(name, cell) for name, cell in found.items() if cell.value]
