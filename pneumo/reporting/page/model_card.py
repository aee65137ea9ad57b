"""The model card, and the items of the CLAIM 2024 checklist that the page answers."""

from collections import Counter
from collections.abc import Mapping

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
"""External data (33) is answered where `insert_external` puts its sections."""
_PNEUMONIA = "pneumonia, or of the labels that prepare.positive names instead"
_MINED = "a program mined them from the radiologists' reports"
_OF_RSNA = (
    "an opacity that suggests pneumonia (Target of the RSNA Pneumonia Detection Challenge)",
    "Label, finding and boxes are those of the source's tables, in the layout of the RSNA "
    "challenge. In the challenge's own data they are radiologists' reading of the image alone, "
    "without the clinical picture, a second view or a follow-up.",
)
LABELS: Mapping[str, tuple[str, str]] = {
    "rsna": _OF_RSNA,
    "rsna-without-classes": _OF_RSNA,
    "nih": (
        _PNEUMONIA,
        "Labels and boxes are those of the source's tables, in the layout of NIH ChestX-ray14. In "
        f"its own data {_MINED}; the boxes, of few images, are a radiologist's.",
    ),
    "chexpert": (
        _PNEUMONIA,
        "Labels are those of the source's tables, in the layout of CheXpert. In its own data "
        f"{_MINED}, but those of valid.csv are radiologists' reading of the images.",
    ),
    "vindr": (
        _PNEUMONIA,
        "A study is positive where most of its readers say so, in the layout of VinDr-CXR; boxes "
        "are those of every reader. In its own data three radiologists read each image.",
    ),
    "kermany": (
        "pneumonia",
        "The label is the name of the image's folder, in the layout of Kermany's chest_xray. In "
        "its own data, of children, physicians read the images.",
    ),
    "own-table": (
        "target 1 of the source's studies.csv",
        "Label, finding and boxes are those of the source's studies.csv, which does not say who "
        "read the images and how.",
    ),
    "joined": (
        "what each of the joined stores counts as positive",
        "Label, finding and boxes are those of the joined stores; how they were read may differ.",
    ),
}
"""What the label means, and whose it is, by the layout of the source."""


def describe_labels(data: DataFacts) -> tuple[str, str]:
    """What the label means, and whose it is."""
    task, reference = LABELS[data.layout]
    if data.phantoms:
        drawn = "Those of phantoms come from the program that drew them."
        return "pneumonia", f"{reference} {drawn}" if data.sources else drawn
    return task, reference


def preprocessing_sentences(data: DataFacts, model: ModelFacts) -> str:
    """How a file becomes the network's input."""
    words = (
        "Each file is decoded to gray levels (of DICOM, modality and VOI transforms are applied "
        "and MONOCHROME1 is inverted; 8 bits, 0 is black), letterboxed to a square and resampled "
        f"by area to {data.image_size} × {data.image_size} px. "
    )
    if model.image_size != data.image_size:
        words += f"The network sees it resampled to {model.image_size} × {model.image_size} px. "
    return words + (
        f"Gray levels from 0 to 1 are standardised by train's mean {model.mean:.3f} and standard "
        f"deviation {model.std:.3f}."
    )


def limits_sentences(data: DataFacts) -> str:
    """The limitations, as far as they depend on the studies of the store."""
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
    source = "One source of images"
    if data.sources:
        source = f"{len(data.sources)} stores of images ({', '.join(data.sources)})"
    return f"{source}, {who}. {negatives}".strip()


def _count(data: DataFacts, what: str) -> Counter[str]:
    """Studies of all splits by the value of a property."""
    return sum((Counter(s.counts[what]) for s in data.quality.splits.values()), Counter())
