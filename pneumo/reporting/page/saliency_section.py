"""Where the network looks: maps against the radiologists' boxes, for the template."""

from collections.abc import Mapping
from typing import Any

from pneumo.evaluation.map_scores import (
    MAPS,
    MEASURES,
    Group,
    GroupSummary,
    MapName,
    SaliencySummary,
)
from pneumo.reporting.page.formatting import Cell, count

NAMES: Mapping[MapName, tuple[str, str]] = {
    "cam": ("The network's maps", "Grad-CAM"),
    "prior": ("Lung prior", "where train's boxes usually are; the same map for every study"),
    "random": ("Random weights", "the same architecture, untrained"),
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


def describe_saliency(saliency: SaliencySummary | None) -> dict[str, Any]:
    """The rows of the table by group of positives, and what they mean."""
    if saliency is None:
        return {"verdict": OFF, "groups": [], "notes": []}
    notes = [f"The maps are those of {saliency.checkpoint}."]
    if saliency.unscored:
        missing = count(saliency.unscored, "positive has", "positives have")
        notes.append(f"{missing} no box to score, or a map that is no number.")
    if not saliency.prior_studies:
        notes.append(
            "Train has no boxes: the lung prior is the same everywhere, and no test of anything."
        )
    return {
        "verdict": tell_saliency(saliency),
        "notes": notes,
        "groups": [_describe_group(GROUPS[name], found) for name, found in saliency.groups.items()],
    }


def _describe_group(title: str, found: GroupSummary) -> dict[str, Any]:
    if found.maps is None or found.gain is None:
        return {"title": title, "n": found.n, "reason": found.reason, "rows": []}
    rows = []
    for name in MAPS:
        summary, gain = found.maps[name], found.gain.get(name)
        rows.append(
            {
                "name": NAMES[name][0],
                "meaning": NAMES[name][1],
                "is_model": name == "cam",
                "cells": [Cell.of(getattr(summary, measure), 2) for measure in MEASURES],
                "gain": None if gain is None else Cell.of(gain["auprc"], 2, signed=True),
                "empty": summary.empty,
            }
        )
    return {"title": title, "n": found.n, "reason": None, "rows": rows}


def tell_saliency(saliency: SaliencySummary) -> str:
    """Whether the maps agree with the boxes better than maps that know less."""
    found = saliency.groups["all"]
    if found.gain is None:
        return f"It cannot be said where the network looks: {found.reason}."
    gain, random = found.gain["prior"]["auprc"], found.gain["random"]["auprc"]
    if gain.value is None or gain.low is None or gain.high is None:
        return f"It cannot be said where the network looks: {gain.reason}."
    difference = f"difference in AUPRC, network minus fixed map: {Cell.of(gain, 2, signed=True)}"
    if gain.high < 0:
        return (
            "A fixed map of where opacities usually lie, which looks at no image, agrees with the "
            f"boxes better than the network's maps ({difference}). These maps are no evidence "
            "that the network found the opacity; read the pictures below with that in mind."
        )
    if gain.low <= 0:
        return (
            "The network's maps are not shown to agree with the boxes better than a fixed map of "
            f"where opacities usually lie ({difference}). They may point to the lungs and no more."
        )
    better = (
        "The network's maps agree with the boxes better than a fixed map of where opacities "
        f"usually lie ({difference}). "
    )
    if random.low is None or random.low <= 0:
        return (
            f"{better}They are not shown to agree better than the maps of a network with random "
            f"weights: difference in AUPRC {Cell.of(random, 2, signed=True)}."
        )
    if saliency.prior_studies < ENOUGH_FOR_PRIOR:
        made_of = count(saliency.prior_studies, "positive", "positives")
        return (
            f"{better}That map is made of {made_of} of train only, so a smoother one that sees "
            "no image could be better as well: whether they point to the opacity of the study "
            "at hand is not shown."
        )
    return f"{better}They point to the opacity of the study at hand, not merely to the lungs."
