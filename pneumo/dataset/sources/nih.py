"""NIH ChestX-ray14 -> studies: `Data_Entry_2017*.csv` and `images*/**.png`.

Its patient numbers are those of RSNA's mapping, so under one secret a patient has one key in both.
https://nihcc.app.box.com/v/ChestXray-NIHCC
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import pyarrow as pa

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector, find_positive
from pneumo.dataset.sources.tables import (
    make_box,
    read_numbers,
    read_table,
    read_texts,
    read_unpacked,
)
from pneumo.errors import SourceError
from pneumo.images.boxes import Box
from pneumo.images.headers import Header, make_header

_TABLE = r"Data_Entry_2017.*\.csv(\.gz|\.zip)?$"
_BOXES = "BBox_List_2017.csv"
_LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
_IMAGE, _LABELS, _PATIENT = "Image Index", "Finding Labels", "Patient ID"
_HEALTHY = "No Finding"
_BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")
_STORED_WIDTH = 1024
"""Of the published PNG files; the table's spacing is that of the larger originals."""


def read_nih(folder: Folder, layout: Layout) -> Source:
    """The studies of the table: positive are those with "Pneumonia", or a label that
    prepare.positive names, among their labels.

    Raises SourceError for a table or column that is missing, two tables, a label that nobody has.
    """
    (url,) = _find_tables(folder.files) or [""]
    table = read_table(url, _IMAGE, _LABELS, _PATIENT, texts=(_PATIENT,), known=_KNOWN)
    positive = set(find_positive(folder))
    labels = [set(text.split("|")) for text in read_texts(table, _LABELS)]
    if unknown := positive - set().union(*labels):
        raise SourceError(f"{url}: no image is labelled {', '.join(sorted(unknown))}")
    images, boxes, splits = _list_images(folder), _read_boxes(folder, positive), _read_lists(folder)
    studies, seen = StudyCollector(folder, layout), Counter[str]()
    names, patients = read_texts(table, _IMAGE), read_texts(table, _PATIENT)
    for name, own, patient, header in zip(
        names, labels, patients, _read_headers(table), strict=True
    ):
        seen[name] += 1
        if seen[name] > 1 or not patient.isdigit():
            raise SourceError(f"{url}: row {sum(seen.values()) + 1}: an image twice, or no patient")
        if name not in images:
            studies.reject(name, "missing", "no such file")
            continue
        found = sorted(positive & own)
        other = "Normal" if own == {_HEALTHY} else "Other finding"
        studies.add(
            name,
            patient.zfill(8),
            images[name],
            int(bool(found)),
            found[0] if found else other,
            boxes=boxes.get(name, ()) if found else (),
            header=header,
            published=splits.get(name),
        )
    return studies.finish(unlabelled=len(images.keys() - seen.keys()))


def _find_tables(files: Mapping[str, str]) -> list[str]:
    return [url for name, url in files.items() if re.match(_TABLE, name)]


def _list_images(folder: Folder) -> dict[str, str]:
    """Name -> URL of the pictures, `images_001/images/…png` or less deep."""
    found: dict[str, str] = {}
    for name, url in folder.files.items():
        if name.startswith("images"):
            for image in storage.list_everything(url):
                if image.endswith(".png"):
                    found[image.rsplit("/", 1)[-1]] = image
    if not found:
        raise SourceError(f"{folder.source_url}: no images*/ with .png files in it; unpack them")
    return found


def _read_headers(table: pa.Table) -> Iterator[Header]:
    """Of each row; the sex is called Gender in the older table."""

    def find(*starts: str) -> str:
        return next((name for name in table.column_names if name.startswith(starts)), "")

    rows = zip(
        read_texts(table, "Patient Age"),
        read_texts(table, find("Patient Sex", "Patient Gender")),
        read_texts(table, "View Position"),
        read_numbers(table, find("OriginalImagePixelSpacing[x"), "table of images"),
        read_numbers(table, find("OriginalImage[Width"), "table of images"),
        strict=True,
    )
    for age, sex, view, mm, pixels in rows:
        stored = () if mm is None or pixels is None else (mm * pixels / _STORED_WIDTH,)
        yield make_header(age=age, sex=sex, view=view, spacing=stored)


def _read_boxes(folder: Folder, positive: set[str]) -> dict[str, list[Box]]:
    """By image, the boxes of the positive labels; in pixels of the 1024-pixel pictures."""
    url = folder.files.get(_BOXES)
    if url is None:
        return {}
    table = read_table(url, _IMAGE, "Finding Label", *_BOX_COLUMNS, known=_KNOWN)
    corners = zip(*(read_numbers(table, name, url) for name in _BOX_COLUMNS), strict=True)
    boxes: dict[str, list[Box]] = {}
    names, labels = read_texts(table, _IMAGE), read_texts(table, "Finding Label")
    for name, label, corner in zip(names, labels, corners, strict=True):
        box = make_box(corner)
        if label in positive and isinstance(box, Box):
            boxes.setdefault(name, []).append(box)
    return boxes


def _read_lists(folder: Folder) -> dict[str, str]:
    """Image -> train_val or test, of the official split, where both lists are there."""
    urls = {split: folder.files.get(name) for split, name in _LISTS.items()}
    return {
        name: split
        for split, url in urls.items()
        if url is not None and None not in urls.values()
        for name in read_unpacked(url).decode("ascii", "replace").split()
    }


_KNOWN = (_IMAGE, _LABELS, _PATIENT, "Finding Label", "Patient Age", "View Position")
LAYOUT = Layout(
    name="nih",
    title="NIH ChestX-ray14",
    traces=(r"images(_\d+)?$", "BBox_List", r"(train_val|test)_list", "Data_Entry"),
    lacking="no table Data_Entry_2017*.csv",
    recognise=lambda files: len(_find_tables(files)) == 1,
    read=read_nih,
    settings=frozenset({"positive"}),
)
