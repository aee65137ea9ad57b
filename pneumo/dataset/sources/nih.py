"""NIH ChestX-ray14 -> studies: `Data_Entry_2017*.csv` and `images*/**.png`.

Patient numbers are those of RSNA's mapping, so with one secret a patient has the same key in both.
https://nihcc.app.box.com/v/ChestXray-NIHCC
"""

import re
from collections.abc import Iterator, Mapping, Set

import pyarrow as pa

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector, positive_labels
from pneumo.dataset.sources.tables import (
    LINE,
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
_BOX_LABELS = {"Infiltrate": "Infiltration"}
"""Labels of the table of boxes that the other table spells differently."""
_STORED_SIDE = 1024
"""Width and height of the published PNG files, in pixels; the table's spacing is of the larger
originals, which need not be square."""


def read_nih(folder: Folder, layout: Layout) -> Source:
    """The studies of the table; positive are those with the label "Pneumonia", or one of
    prepare.positive.

    Raises SourceError for a missing table or column, two tables, and a label that no study has.
    """
    (url,) = _find_tables(folder.files) or [""]
    table = read_table(url, _IMAGE, _LABELS, _PATIENT, texts=(_PATIENT,), known=_KNOWN)
    positive = set(positive_labels(folder))
    labels = [set(map(str.strip, text.split("|"))) for text in read_texts(table, _LABELS)]
    if unknown := positive - set().union(*labels):
        raise SourceError(f"{url}: no image is labelled {', '.join(sorted(unknown))}")
    images, boxes = _list_images(folder), _read_boxes(folder, positive)
    studies, seen = StudyCollector(folder, layout), set[str]()
    names, patients = read_texts(table, _IMAGE), read_texts(table, _PATIENT)
    splits = _read_lists(folder, set(names))
    rows = zip(table[LINE].to_pylist(), names, labels, patients, _read_headers(table), strict=True)
    for row, name, own, patient, header in rows:
        if name in seen or not patient.isdigit():
            raise SourceError(f"{url}: row {row}: a duplicate image, or no patient")
        seen.add(name)
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
    return studies.finish(unlabelled=len(images.keys() - seen))


def _find_tables(files: Mapping[str, str]) -> list[str]:
    return [url for name, url in files.items() if re.match(_TABLE, name)]


def _list_images(folder: Folder) -> dict[str, str]:
    """Name -> URL of the images, `images_001/images/…png` or less deep. Raises SourceError for no
    image, or two of one name."""
    found: dict[str, str] = {}
    for name, url in folder.files.items():
        if name.startswith("images"):
            for image in storage.list_everything(url):
                if not image.endswith(".png"):
                    continue
                if found.setdefault(image.rsplit("/", 1)[-1], image) != image:
                    raise SourceError(
                        f"{folder.source_url}: images*/ have two files of one name, as copies of "
                        "another size do; leave one of the folders there"
                    )
    if not found:
        raise SourceError(f"{folder.source_url}: no images*/ with .png files in it; unpack them")
    return found


def _read_headers(table: pa.Table) -> Iterator[Header]:
    """The header of each row; the older table has Gender for Sex."""

    def find(*starts: str) -> str:
        return next((name for name in table.column_names if name.startswith(starts)), "")

    what = "table of images"
    rows = zip(
        read_texts(table, "Patient Age"),
        read_texts(table, find("Patient Sex", "Patient Gender")),
        read_texts(table, "View Position"),
        read_numbers(table, find("y]") or find("OriginalImagePixelSpacing[x"), what),
        read_numbers(table, find("Height]") or find("OriginalImage[Width"), what),
        strict=True,
    )
    for age, sex, view, mm, pixels in rows:
        stored = () if mm is None or pixels is None else (mm * pixels / _STORED_SIDE,)
        yield make_header(age=age, sex=sex, view=view, spacing=stored)


def _read_boxes(folder: Folder, positive: set[str]) -> dict[str, list[Box]]:
    """The boxes of the positive labels by image, in pixels of the 1024-pixel images."""
    url = folder.files.get(_BOXES)
    if url is None:
        return {}
    table = read_table(url, _IMAGE, "Finding Label", *_BOX_COLUMNS, known=_KNOWN)
    corners = zip(*(read_numbers(table, name, url) for name in _BOX_COLUMNS), strict=True)
    boxes: dict[str, list[Box]] = {}
    names, labels = read_texts(table, _IMAGE), read_texts(table, "Finding Label")
    for name, label, corner in zip(names, labels, corners, strict=True):
        box = make_box(corner)
        label = _BOX_LABELS.get(label, label)
        if label in positive and isinstance(box, Box):
            boxes.setdefault(name, []).append(box)
    return boxes


def _read_lists(folder: Folder, images: Set[str]) -> dict[str, str]:
    """Image -> train_val or test in the official split; empty where one of its lists is missing.

    Raises SourceError where the lists have none of the table's `images`, or one image twice."""
    if not {*_LISTS.values()} <= folder.files.keys():
        return {}
    splits: dict[str, str] = {}
    for split, name in _LISTS.items():
        lines = read_unpacked(folder.files[name]).decode("utf-8-sig", "replace").split()
        if both := splits.keys() & lines:
            raise SourceError(f"{folder.source_url}: {len(both)} images are in both lists")
        splits |= dict.fromkeys(lines, split)
    if images.isdisjoint(splits):
        names = " and ".join(_LISTS.values())
        raise SourceError(f"{folder.source_url}: {names} have no image of the table")
    return splits


_KNOWN = (_IMAGE, _LABELS, _PATIENT, "Finding Label", "Patient Age", "View Position")
LAYOUT = Layout(
    name="nih",
    title="NIH ChestX-ray14",
    name_patterns=(r"images(_\d+)?$", "BBox_List", r"(train_val|test)_list", "Data_Entry"),
    missing="no table Data_Entry_2017*.csv",
    recognise=lambda files: len(_find_tables(files)) == 1,
    read=read_nih,
    settings=frozenset({"positive"}),
)
