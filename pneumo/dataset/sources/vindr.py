"""VinDr-CXR -> studies: `train.csv` of the readers' boxes, and `train/<image_id>.dicom`.

Three radiologists read each image. Patients are not published: each image counts as a patient.
https://www.kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector, positive_labels
from pneumo.dataset.sources.tables import (
    first_present,
    make_box,
    read_first_line,
    read_numbers,
    read_table,
    read_texts,
)
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

_TABLE = "train.csv"
_COLUMNS = ("image_id", "class_name", "rad_id")
_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_HEALTHY = "No finding"
_FOLDERS = ("train", "train_dicom", "images")


@dataclass(slots=True)
class _Readings:
    """The readings of one image."""

    readers: set[str] = field(default_factory=set)
    positive: set[str] = field(default_factory=set)
    """Readers who drew a positive class."""
    classes: set[str] = field(default_factory=set)
    boxes: list[Box] = field(default_factory=list)


def read_vindr(folder: Folder, layout: Layout) -> Source:
    """The images of the table; positive where more than half of the readers drew "Pneumonia", or a
    class of prepare.positive.

    Raises SourceError for a missing column, and a class that nobody drew.
    """
    name = first_present(folder.files, (_TABLE,))
    assert name is not None, "`recognise` requires it"
    readings = _collect(folder.files[name], set(positive_labels(folder)))
    images = _list_images(folder)
    studies = StudyCollector(folder, layout)
    for image_id, found in readings.items():
        if image_id not in images:
            studies.reject(image_id, "missing", "no such file")
            continue
        target = int(2 * len(found.positive) > len(found.readers))
        other = "Normal" if found.classes == {_HEALTHY} else "Other finding"
        studies.add(
            image_id,
            None,
            images[image_id],
            target,
            positive_labels(folder)[0] if target else other,
            boxes=found.boxes if target else (),
        )
    return studies.finish(
        has_patients=False,
        unlabelled=len(images.keys() - readings.keys()),
        notes=("the majority of its readers decides", "no patients are published"),
    )


def _collect(url: str, positive: set[str]) -> dict[str, _Readings]:
    """The readings by image."""
    table = read_table(url, *_COLUMNS, texts=_COLUMNS, known=(*_COLUMNS, *_CORNERS))
    texts = [read_texts(table, name) for name in _COLUMNS]
    if unknown := positive - set(texts[1]):
        raise SourceError(
            f"{url}: no reader drew {', '.join(sorted(unknown))}; name classes of the table with "
            "--prepare.positive, for instance Consolidation,Infiltration"
        )
    corners = zip(*(read_numbers(table, name, url) for name in _CORNERS), strict=True)
    readings: dict[str, _Readings] = {}
    for image_id, class_name, reader, (x0, y0, x1, y1) in zip(*texts, corners, strict=True):
        found = readings.setdefault(image_id, _Readings())
        found.readers.add(reader)
        found.classes.add(class_name)
        if class_name in positive:
            found.positive.add(reader)
            known = None not in (x0, y0, x1, y1)
            box = make_box((x0, y0, x1 - x0, y1 - y0) if known else ())
            if isinstance(box, Box):
                found.boxes.append(box)
    return readings


def _list_images(folder: Folder) -> dict[str, str]:
    """Image id -> URL."""
    name = first_present(folder.files, _FOLDERS, ("",))
    if name is None:
        raise SourceError(f"{folder.source_url}: no folder {' or '.join(_FOLDERS)} with images")
    url = folder.files[name]
    endings = (".dicom", ".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
    names = [found for found in storage.list_names(url) if found.lower().endswith(endings)]
    return {found.rsplit(".", 1)[0]: storage.join(url, found) for found in names}


def _is_vindr(files: Mapping[str, str]) -> bool:
    name = first_present(files, (_TABLE,))
    return name is not None and {*_COLUMNS} <= {*read_first_line(files[name])}


LAYOUT = Layout(
    name="vindr",
    title="VinDr-CXR",
    name_patterns=(r"train(\.csv|_dicom)?$",),
    missing=f"no {_TABLE} with the columns {', '.join(_COLUMNS)}",
    recognise=_is_vindr,
    read=read_vindr,
    settings=frozenset({"positive"}),
)
