"""The section on saliency maps, for the template: their agreement with the radiologists' boxes."""

from collections.abc import Mapping
from typing import Any

from pneumo.evaluation.map_scores import MEASURES, Group, MapName, SaliencySummary
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
"""With this many positives in train no fixed map is better than the prior. The best fixed map has
0.09 more AUPRC than a prior of 10 positives, 0.06 more than one of 40, and no more than one of
1000."""
OFF = "Maps were not scored: evaluate.saliency is off."


def describe_saliency(saliency: SaliencySummary | None) -> dict[str, Any]:
    """The groups of positives with the titles of their tables, and what they show."""
    if saliency is None:
        return {"verdict": OFF, "groups": [], "notes": []}
    notes = [f"The maps are those of {saliency.checkpoint}."]
    if saliency.unscored:
        missing = count(saliency.unscored, "positive has", "positives have")
        notes.append(f"{missing} no box to score, or a map with a NaN.")
    return {
        "verdict": saliency_sentence(saliency),
        "notes": notes,
        "groups": [(GROUPS[name], found) for name, found in saliency.groups.items()],
        "names": NAMES,
        "measures": MEASURES,
    }


def saliency_sentence(saliency: SaliencySummary) -> str:
    """Whether the maps agree with the boxes better than the baselines."""
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
            f"where opacities usually lie ({difference}). They may point to the lungs only."
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
