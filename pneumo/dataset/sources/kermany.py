"""Kaggle's chest_xray (Kermany et al. 2018, children) -> studies: folders named after the label.

https://data.mendeley.com/datasets/rscbjbr9sj
"""

import re
from collections.abc import Mapping

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector
from pneumo.errors import SourceError

_SPLITS = ("train", "val", "test")
_CLASSES = {"NORMAL": 0, "PNEUMONIA": 1}
_ENDINGS = (".jpeg", ".jpg", ".png")
_PATIENTS = r"(?:BACTERIA|VIRUS|NORMAL)-(\d+)-\d|(person\d+)_|((?:NORMAL2-)?IM-\d+)-"
"""In the release of Mendeley Data, then in Kaggle's."""
_GUESS = "patients are guessed from file names"


def read_kermany(folder: Folder, layout: Layout) -> Source:
    """The images of `train|val|test/NORMAL|PNEUMONIA`; the patient is the number, `personNNN` or
    `IM-NNNN` of the file name. The same number in two folders is one patient. Patients are unknown
    where fewer than half of the names have one.

    Raises SourceError for an image that is in both classes.
    """
    studies, labels, unknown = StudyCollector(folder, layout), dict[str, int](), 0
    for split in _SPLITS:
        for name, target in _CLASSES.items():
            url = storage.join(folder.url, split, name)
            for image in storage.list_names(url):
                # macOS adds a file `._name.jpeg` for each one on some disks.
                if image.startswith(".") or not image.lower().endswith(_ENDINGS):
                    continue
                if labels.setdefault(image, target) != target:
                    raise SourceError(f"{folder.source_url}: a picture that is in both classes")
                patient = _guess_patient(image)
                unknown += patient is None
                studies.add(
                    f"{split}/{image}",
                    f"kermany/{patient or image}",
                    storage.join(url, image),
                    target,
                    _name_finding(image, target),
                    published=split,
                )
    note = f"{_GUESS}; {unknown} that name none count as a patient each" if unknown else _GUESS
    return studies.finish(has_patients=2 * unknown < len(labels), notes=(note,))


def _guess_patient(image: str) -> str | None:
    match = re.match(_PATIENTS, image)
    return match and match[match.lastindex or 0]


def _name_finding(image: str, target: int) -> str:
    if not target:
        return "Normal"
    words = re.split(r"[_-]", image.lower())
    cause = next((cause for cause in ("bacteria", "virus") if cause in words), None)
    return "Pneumonia" if cause is None else f"Pneumonia ({cause})"


def _is_kermany(files: Mapping[str, str]) -> bool:
    return any(
        not _CLASSES.keys().isdisjoint(storage.list_names(files[split]))
        for split in _SPLITS
        if split in files
    )


LAYOUT = Layout(
    name="kermany",
    title="chest_xray (Kermany)",
    name_patterns=(r"(train|val|test)$", "chest_xray", "(NORMAL|PNEUMONIA)$"),
    missing="no train/NORMAL and train/PNEUMONIA",
    recognise=_is_kermany,
    read=read_kermany,
)
