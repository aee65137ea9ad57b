"""Recognising the layout of a source, and reading its studies."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

from pneumo.config import PrepareConfig
from pneumo.dataset.source import Source
from pneumo.dataset.sources import chexpert, kermany, nih, own_table, rsna, vindr
from pneumo.dataset.sources.layout import Folder, Layout
from pneumo.dataset.sources.rsna import read_rsna_table
from pneumo.dataset.sources.tables import LINE, list_folder
from pneumo.dataset.study_keys import derive_key, read_hash_key
from pneumo.errors import SourceError

_RECOGNISED = (
    rsna.LAYOUT,
    own_table.LAYOUT,
    nih.LAYOUT,
    chexpert.LAYOUT,
    vindr.LAYOUT,
    kermany.LAYOUT,
)
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (*_RECOGNISED, rsna.WITHOUT_CLASSES)
}
_EXAMPLE = """file,patient,target
images/0001.png,p1,0
images/0002.png,p1,1
images/0003.png,p2,0
images/0004.png,p3,1"""


def read_source(
    source_url: str,
    environ: Mapping[str, str] | None = None,
    *,
    settings: PrepareConfig | None = None,
    named_split: str | None = None,
) -> Source:
    """Read the tables of a source, in its folder or, as in some downloads, in the one folder in it.

    `settings` give the layout (auto: by the files that are there) and its policies; `named_split`
    is one of NAMED_SPLITS. Raises SourceError for a folder of no layout or of two, a missing table
    or column, and an invalid value.
    """
    settings = settings or PrepareConfig()
    files: Mapping[str, str] = list_folder(source_url)
    if not files:
        raise SourceError(f"{source_url}: no such folder, or it is empty; {_EXPECTED}")
    layout, files, url = _find_layout(source_url, files, settings.layout)
    for name in ("positive", "uncertain"):
        is_set = getattr(settings, name) != type(settings).model_fields[name].default
        if is_set and name not in layout.settings:
            raise SourceError(f"prepare.{name} has no effect on the layout {layout.title}")
    environ = os.environ if environ is None else environ
    folder = Folder(source_url, url, files, environ, settings, named_split)
    return layout.read(folder, layout)


def _find_layout(
    source_url: str, files: Mapping[str, str], name: str
) -> tuple[Layout, Mapping[str, str], str]:
    """The layout, the files in its folder, and the folder's URL; `name` is prepare.layout."""
    layouts = _RECOGNISED if name == "auto" else (LAYOUTS[name],)
    found = [layout for layout in layouts if layout.recognise(files)]
    url = source_url
    if not found:
        folders = {
            folder_url: inner
            for file, folder_url in files.items()
            if not file.startswith(".") and (inner := list_folder(folder_url))
        }
        inside = [(u, i) for u, i in folders.items() if any(one.recognise(i) for one in layouts)]
        if len(inside) > 1:
            raise SourceError(
                f"{source_url}: {len(inside)} of its folders have a data set; give one as --source"
            )
        if inside:
            url, inner = inside[0]
            found = [layout for layout in layouts if layout.recognise(inner)]
            files = {**files, **inner}
    if len(found) > 1:
        titles = " and ".join(layout.title for layout in found)
        names = " or ".join(layout.name for layout in found)
        raise SourceError(
            f"{source_url}: has the files of two layouts, {titles}; set --prepare.layout {names}"
        )
    if found:
        return found[0], files, url
    if name != "auto":
        raise SourceError(f"{source_url}: {LAYOUTS[name].missing}")
    raise SourceError(_describe_unknown(source_url, files))


_EXPECTED = f"expected one of the layouts: {', '.join(one.title for one in _RECOGNISED)}"


_TABLES, _IMAGES = (".csv", ".json", ".txt"), (".dcm", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_ENDINGS = (*_TABLES, *_IMAGES, ".gz", ".zip")
"""Others may be parts of a name."""


def _describe_unknown(source_url: str, files: Mapping[str, str]) -> str:
    """The error's text: what was found, without file names, which could identify a patient, and
    what is expected."""
    kinds = Counter(
        ending if (ending := PurePosixPath(name).suffix.lower()) in _ENDINGS else "other"
        for name in files
    )
    found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
    scores = {
        layout: sum(any(re.match(p, name) for p in layout.name_patterns) for name in files)
        for layout in _RECOGNISED
    }
    nearest = max(scores, key=lambda layout: scores[layout])
    hint = f"nearest is {nearest.title}: {nearest.missing}" if scores[nearest] else _EXPECTED
    return (
        f"{source_url}: of no supported layout; found {found}; {hint}. Or add a studies.csv "
        f"beside the images, such as\n{_EXAMPLE}"
    )


def read_split_list(
    list_url: str, source_url: str, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The splits in a CSV by study key or hashed patient.

    Columns: `patientId` (image ids) or `patient` (NIH numbers), and `split`. Raises SourceError.
    """
    environ = os.environ if environ is None else environ
    table = read_rsna_table(list_url, "split")
    column = next((name for name in ("patientId", "patient") if name in table.column_names), None)
    if column is None:
        raise SourceError(f"{list_url}: no column patientId or patient")
    hash_key = read_hash_key(source_url, environ)
    kind = "study" if column == "patientId" else "patient"
    listed: dict[str, str] = {}
    columns = [table[name].to_pylist() for name in (LINE, column, "split")]
    for row, value, split in zip(*columns, strict=True):
        identifier = str(value)
        if split not in ("train", "val", "test"):
            # The value is not quoted: with columns in another order it would be an id.
            raise SourceError(f"{list_url}: row {row}: a split that is none of train, val and test")
        if listed.setdefault(derive_key(hash_key, kind, identifier), split) != split:
            raise SourceError(f"{list_url}: lists a patient or study in two splits")
    return listed
