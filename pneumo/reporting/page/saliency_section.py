"""Where the network looks: maps against the radiologists' boxes, for the template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pneumo.evaluation.map_scores import MAPS, Group, GroupSummary, MapName, SaliencySummary
from pneumo.reporting.page.formatting import Cell, count

NAMES: Mapping[MapName, tuple[str, str]] = {
    "cam": ("The network's maps", "Grad-CAM"),
    "random": ("Random weights", "the same architecture, untrained"),
    "prior": ("Lung prior", "where train's boxes usually are; the same map for every study"),
    "centre": ("Centre", "a Gaussian about the middle"),
    "uniform": ("Uniform", "the same everywhere: what area alone gives"),
}
GROUPS: Mapping[Group, str] = {
    "all": "All positives",
    "true_positives": "Positives that the model finds",
    "false_negatives": "Positives that the model misses",
}
ENOUGH_FOR_PRIOR = 1000
"""Positives of train from which on no fixed map is better than the prior: one that is the same for
every study gains 0.09 of AUPRC over a prior of 10, 0.06 of 40, and none of 1000."""
OFF = "Maps were not scored: evaluate.saliency is off."


def describe_looks(looks: SaliencySummary | None) -> dict[str, Any]:
    """A table a group of positives, and what it means."""
    if looks is None:
        return {"verdict": OFF, "groups": [], "notes": []}
    notes = [f"The maps are those of {looks.checkpoint}."]
    if looks.unscored:
        missing = count(looks.unscored, "positive has", "positives have")
        notes.append(f"{missing} no box to score, or a map that is no number.")
    if not looks.prior_studies:
        notes.append("Train has no boxes: the lung prior is uniform, and no test of anything.")
    return {
        "verdict": judge_looks(looks),
        "notes": notes,
        "groups": [_describe_group(GROUPS[name], found) for name, found in looks.groups.items()],
    }


def _describe_group(title: str, found: GroupSummary) -> dict[str, Any]:
    if found.maps is None or found.area is None:
        return {"title": title, "n": found.n, "reason": found.reason, "rows": []}
    rows = []
    for name in MAPS:
        summary = found.maps[name]
        gain = None if found.gain is None else found.gain.get(name)
        rows.append(
            {
                "name": NAMES[name][0],
                "meaning": NAMES[name][1],
                "is_model": name == "cam",
                "cells": [
                    Cell.of(one, 2)
                    for one in (summary.auprc, summary.pointing, summary.energy, summary.lift)
                ],
                "iou": Cell.of(summary.iou, 2),
                "gain": None if gain is None else Cell.of(gain["auprc"], 2, signed=True),
                "empty": summary.empty,
            }
        )
    return {"title": title, "n": found.n, "area": Cell.of(found.area, 2), "rows": rows}


def judge_looks(looks: SaliencySummary) -> str:
    """Whether the maps agree with the boxes better than a map that knows nothing."""
    found = looks.groups["all"]
    if found.gain is None:
        return f"It cannot be said where the network looks: {found.reason}."
    gain = found.gain["prior"]["auprc"]
    if gain.value is None or gain.low is None or gain.high is None:
        return f"It cannot be said where the network looks: {gain.reason}."
    difference = Cell.of(gain, 2, signed=True)
    if gain.low > 0:
        better = (
            "The network's maps agree with the boxes better than a fixed map of where opacities "
            f"usually lie: AUPRC {difference}. "
        )
        if looks.prior_studies < ENOUGH_FOR_PRIOR:
            made_of = count(looks.prior_studies, "positive", "positives")
            return (
                f"{better}That map is made of {made_of} of train only, so a smoother one that sees "
                "no image could be better as well: whether they point to the opacity of the study "
                "at hand is not shown."
            )
        centre = found.gain["centre"]["auprc"]
        if centre.low is None or centre.low <= 0:
            return (
                f"{better}They are not shown to agree better than the middle of the image: AUPRC "
                f"{Cell.of(centre, 2, signed=True)}."
            )
        return f"{better}They point to the opacity of the study at hand, not merely to the lungs."
    if gain.high < 0:
        return (
            "A fixed map of where opacities usually lie, which looks at no image, agrees with the "
            f"boxes better than the network's maps: AUPRC {difference}. These maps are no evidence "
            "that the network found the opacity; read the pictures below with that in mind."
        )
    return (
        "The network's maps are not shown to agree with the boxes better than a fixed map of where "
        f"opacities usually lie: AUPRC {difference}. They may point to the lungs and no more."
    )
