"""`studies.csv` beside images of any format -> studies: the layout for your own data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PureWindowsPath

import pyarrow as pa

from pneumo import storage
from pneumo.dataset.source import Source
from pneumo.dataset.sources.layout import Folder, Layout, StudyCollector
from pneumo.dataset.sources.tables import (
    LINE,
    first_present,
    make_box,
    read_numbers,
    read_table,
    read_texts,
)
from pneumo.errors import DicomError, SourceError
from pneumo.images.boxes import Box
from pneumo.images.headers import NO_ACQUISITION, make_header
from pneumo.images.input_checks import check_header

TABLE = "studies.csv"
_REQUIRED = ("file", "patient", "target")
_TEXTS = (*_REQUIRED, "study", "view", "age", "sex", "finding", "split")
_NO_PATIENT = ("", "nan", "none", "null", "<na>")
"""What pandas and others write for a missing value; these rows are not one patient's."""
_MAX_FINDINGS, _MAX_FINDING_LENGTH = 100, 64
_FINDINGS = {1: "Pneumonia", 0: "No pneumonia"}


@dataclass(slots=True)
class _Row:
    """The rows of one file, merged."""

    number: int
    """Line of the first row in the table; the header is line 1."""
    cells: tuple[str, ...]
    boxes: list[Box] = field(default_factory=list)


def read_own_table(folder: Folder, layout: Layout) -> Source:
    """The studies of `studies.csv`, with columns file, patient, target; optional ones are study,
    view, age, sex, finding, split, and x, y, width, height with a row per box.

    Raises SourceError for a file that is missing, outside the folder or in two rows, a target other
    than 0 and 1, an invalid split, and a box on a negative.
    """
    name = first_present(folder.files, (TABLE,))
    assert name is not None, "`recognise` requires it"
    url = folder.files[name]
    table = read_table(url, *_REQUIRED, texts=_TEXTS, known=(*_TEXTS, *Box._fields))
    rows = _collect_rows(table, url)
    _check_files(rows, folder, url)
    studies = StudyCollector(folder, layout)
    numbers: dict[str, int] = {}
    left_out, findings = Counter[str](), set[str]()
    for file, row in rows.items():
        patient, target, study, view, age, sex, finding, split = row.cells
        if not _is_frontal(view):
            left_out["views that are not frontal"] += 1
            continue
        if (other := numbers.setdefault(study or file, row.number)) != row.number:
            raise SourceError(f"{url}: rows {other} and {row.number} give one study two files")
        label = int(target)
        findings.add(finding)
        header = make_header(age=age, sex=sex, view=view)
        studies.add(
            study or file,
            patient,
            storage.join(folder.url, file),
            label,
            finding or _FINDINGS[label],
            boxes=row.boxes,
            header=header,
            published=split or None,
        )
    if len(findings) > _MAX_FINDINGS or max(map(len, findings), default=0) > _MAX_FINDING_LENGTH:
        raise SourceError(
            f"{url}: column finding: got {len(findings)} different texts of up to "
            f"{max(map(len, findings))} characters, expected categories: at most {_MAX_FINDINGS} "
            f"of at most {_MAX_FINDING_LENGTH}; a finding stands in reports and at W&B"
        )
    return studies.finish(left_out=left_out)


def _is_frontal(view: str) -> bool:
    """False where `view` names another view; one that is not known is taken as frontal."""
    try:
        check_header(replace(NO_ACQUISITION, view=view.upper()))
    except DicomError:
        return False
    return True


def _collect_rows(table: pa.Table, url: str) -> dict[str, _Row]:
    """The merged rows by file, in the table's order."""
    columns = [read_texts(table, name) for name in _TEXTS]
    # Where a cell of the column is empty, pandas writes `1.0` for 1.
    columns[2] = [target.removesuffix(".0") for target in columns[2]]
    corners = [read_numbers(table, name, url) for name in Box._fields]
    rows: dict[str, _Row] = {}
    parts = (zip(*columns, strict=True), zip(*corners, strict=True))
    for number, cells, corner in zip(table[LINE].to_pylist(), *parts, strict=True):
        file = _check_cells(cells, f"{url}: row {number}")
        box = make_box(corner)
        row = rows.setdefault(file, _Row(number, cells[1:]))
        if row.number != number and (row.cells != cells[1:] or box is None or not row.boxes):
            raise SourceError(f"{url}: rows {row.number} and {number} name one file")
        if isinstance(box, str):
            raise SourceError(f"{url}: row {number}: {box}")
        if box is not None:
            if row.cells[1] != "1":
                raise SourceError(f"{url}: row {number}: target 0 with a box")
            if box not in row.boxes:
                row.boxes.append(box)
    return rows


def _check_cells(cells: tuple[str, ...], where: str) -> str:
    """The file of a row. Raises SourceError for an invalid cell."""
    file, patient, target, split = *cells[:3], cells[-1]
    if not file or patient.casefold() in _NO_PATIENT:
        raise SourceError(f"{where}: no {'patient' if file else 'file'}")
    if target not in ("0", "1"):
        raise SourceError(f"{where}: a target that is neither 0 nor 1")
    if split not in ("", "train", "val", "test"):
        raise SourceError(f"{where}: a split that is none of train, val and test")
    path = PureWindowsPath(file)  # the parts may be separated by \ or /
    if path.anchor or ".." in path.parts or "://" in file:
        raise SourceError(f"{where}: a file outside the folder; give its path relative to {TABLE}")
    return path.as_posix()


def _check_files(rows: Mapping[str, _Row], folder: Folder, url: str) -> None:
    prefix = f"{folder.url.rstrip('/')}/"
    there = {found.removeprefix(prefix) for found in storage.list_everything(folder.url)}
    missing = [row.number for file, row in rows.items() if file not in there]
    if missing:
        raise SourceError(
            f"{url}: {len(missing)} of {len(rows)} files are missing, the first in row "
            f"{missing[0]}; give paths relative to {TABLE}"
        )


LAYOUT = Layout(
    name="own-table",
    title=f"own table ({TABLE})",
    name_patterns=(),
    missing=f"no {TABLE}",
    recognise=lambda files: first_present(files, (TABLE,)) is not None,
    read=read_own_table,
)
