"""The model card, and the items of the CLAIM 2024 checklist that the page answers."""

from collections import Counter

from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts

CLAIM: tuple[tuple[int, str, str, str], ...] = (
    (1, "AI methodology and its category named", "card", "Model card"),
    (3, "Intended use", "card", "Model card"),
    (7, "Data sources", "card", "Model card"),
    (8, "Inclusion and exclusion", "data", "Data and leakage audit"),
    (9, "Preprocessing", "card", "Model card"),
    (10, "Selection of subsets", "data", "Data and leakage audit"),
    (11, "De-identification", "card", "Model card"),
    (12, "Missing data", "quality", "Data quality"),
    (14, "Reference standard", "card", "Model card"),
    (19, "How studies were assigned to partitions", "data", "Data and leakage audit"),
    (20, "Level at which partitions are disjoint", "data", "Data and leakage audit"),
    (22, "Model described", "card", "Model card"),
    (23, "Software and its versions", "again", "How to reproduce"),
    (24, "Where the parameters started", "card", "Model card"),
    (25, "Training", "training", "Training"),
    (26, "How the final model was chosen", "card", "Model card"),
    (27, "Ensembling", "card", "Model card"),
    (28, "Metrics of performance", "good", "How good, how sure?"),
    (29, "Uncertainty and significance", "good", "How good, how sure?"),
    (30, "Robustness: subgroups", "whom", "For which patients?"),
    (31, "Explainability, and its test", "saliency", "Do the maps match the radiologists' boxes?"),
    (32, "Evaluation on internal data", "good", "How good, how sure?"),
    (35, "Studies included and excluded", "data", "Data and leakage audit"),
    (36, "Demographics of each partition", "quality", "Data quality"),
    (37, "Performance with uncertainty", "summary", "Summary"),
    (38, "Diagnostic performance and its precision", "points", "At what threshold?"),
    (39, "Failure analysis", "errors", "Errors"),
    (40, "Limitations", "card", "Model card"),
)
"""Number, item, anchor and heading of the section that answers it (Tejani 2024)."""
NOT_ANSWERED = "2, 4–6, 13, 15–18, 21, 33, 34 and 41–44"
"""Among them external data (33), variability of readers (18) and sample size (21)."""


def preprocessing_sentences(data: DataFacts, model: ModelFacts) -> str:
    """How a file becomes the network's input."""
    words = (
        "Each DICOM file is decoded to gray levels (modality and VOI transforms applied, "
        "MONOCHROME1 inverted, 8 bits, 0 is black), letterboxed to a square and resampled by area "
        f"to {data.image_size} × {data.image_size} px. "
    )
    if model.image_size != data.image_size:
        words += f"The network sees it resampled to {model.image_size} × {model.image_size} px. "
    return words + (
        f"Gray levels from 0 to 1 are standardised by train's mean {model.mean:.3f} and standard "
        f"deviation {model.std:.3f}."
    )


def limits_sentences(data: DataFacts) -> str:
    """The limitations, which depend on the studies of the store."""
    ages, findings = (_count(data, what) for what in ("age", "finding"))
    young = ages.get("under 18", 0)
    old = sum(number for band, number in ages.items() if band not in ("under 18", "unknown"))
    who = {
        (True, True): "adults and children together",
        (True, False): "children alone",
        (False, True): "adults alone",
    }.get((young > 0, old > 0), "of unknown age")
    if unknown := ages.get("unknown", 0):
        who += "" if young + old == 0 else f", age unknown in {unknown:,} of {sum(ages.values()):,}"
    healthy, ill = (findings.get(name, 0) for name in ("Normal", "No Lung Opacity / Not Normal"))
    negatives = ""
    if healthy and ill:
        negatives = "The negatives are healthy as well as otherwise ill. "
    return (
        f"One source of images, {who}. {negatives}No external data. Performance elsewhere, on "
        "other scanners or at another prevalence is unknown."
    )


def _count(data: DataFacts, what: str) -> Counter[str]:
    """Studies of all splits by the value of a property."""
    return sum((Counter(s.counts[what]) for s in data.quality.splits.values()), Counter())
