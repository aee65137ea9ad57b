"""Folders and tables of a source: what lies in them, and errors that quote no cell."""

import gzip
import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from pyarrow.types import is_floating, is_integer, is_null

from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

PACKINGS = ("", ".gz", ".zip")
FIRST_ROW = 2
"""The number of the first row below the header, as an editor counts lines."""
_MOST_BYTES = 128 * 2**20


def list_folder(folder_url: str) -> dict[str, str]:
    """Name -> URL of what lies directly in the folder; empty for a file."""
    return {name: storage.join(folder_url, name) for name in storage.list_names(folder_url)}


def first_present(
    files: Mapping[str, str], names: Sequence[str], packings: Sequence[str] = PACKINGS
) -> str | None:
    """The first of `names`, in their order, that is among `files`, bare or packed."""
    return next((f"{n}{p}" for n in names for p in packings if f"{n}{p}" in files), None)


def read_unpacked(url: str) -> bytes:
    """What the file holds, unpacked where its name ends in .gz or .zip. Raises SourceError."""
    data = storage.read_bytes(url)
    try:
        if url.endswith(".gz"):
            with gzip.open(io.BytesIO(data)) as file:
                return _read_bounded(file, url)
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # macOS adds files of its own.
                names = [n for n in archive.namelist() if not n.endswith("/")]
                names = [n for n in names if not re.search(r"(^|/)(\.|__MACOSX/)", n)]
                if len(names) != 1:
                    raise SourceError(f"{url}: {len(names)} files, expected the table alone")
                with archive.open(names[0]) as file:
                    return _read_bounded(file, url)
    except gzip.BadGzipFile as error:  # its text quotes the file
        raise SourceError(f"{url}: no gzip file, though its name ends so") from error
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise SourceError(f"{url}: not a readable archive of one file: {error}") from error
    return data


def _read_bounded(file: IO[bytes] | gzip.GzipFile, url: str) -> bytes:
    """What a packed table holds. Raises SourceError where that is far more than any table."""
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise SourceError(f"{url}: unpacks to more than {_MOST_BYTES // 2**20} MiB: no such table")
    return data


def read_table(
    url: str, *required: str, texts: Sequence[str] = (), known: Sequence[str]
) -> pa.Table:
    """The CSV at `url`, the columns `texts` as they stand. No error quotes a cell, nor a first line
    that may be no header: of its names only those in `known` are quoted. Raises SourceError."""
    table, names = _parse_csv(url, texts)
    _check_names(names, required, known, url)
    if not len(table):
        raise SourceError(f"{url}: no rows")
    empty = pc.and_kleene(*(_is_empty(table[name]) for name in (required * 2)[:2]))
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise SourceError(f"{url}: row {row + FIRST_ROW} is empty; delete it")
    return table


def _parse_csv(url: str, texts: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """The table, and the names of its columns."""
    data = read_unpacked(url)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{url}: not a readable CSV: written as UTF-16; save it as UTF-8")
    wrong: list[Any] = []

    def keep(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        table = pacsv.read_csv(
            io.BytesIO(data),
            # Threads would not know a row's number.
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(invalid_row_handler=keep),
            # An id of digits alone must keep its leading zeros.
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(texts, pa.string()), strings_can_be_null=False
            ),
        )
        names: list[str] = table.column_names
    except ValueError:  # its text, and that of its cause, quotes the row
        what = "empty, cut off, or no UTF-8"
        if wrong:
            row = wrong[0]
            what = f"row {row.number} has {row.actual_columns} cells, not {row.expected_columns}"
        raise SourceError(f"{url}: not a readable CSV: {what}") from None
    return table, names


def _check_names(
    names: Sequence[str], required: Sequence[str], known: Sequence[str], url: str
) -> None:
    """Raise SourceError where a required column is missing, or a known one there twice."""
    if missing := [name for name in required if name not in names]:
        found = [name for name in names if name in known]
        raise SourceError(
            f"{url}: no column {', '.join(missing)}; its first line names {len(names)}, of those "
            f"that are known here: {', '.join(found) or 'none'}"
            + ("; commas are to stand between them" if len(names) == 1 else "")
        )
    if twice := sorted({name for name in names if names.count(name) > 1 and name in known}):
        raise SourceError(f"{url}: its first line names {', '.join(twice)} more than once")


def _is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
    return pc.equal(pc.coalesce(texts, ""), "")


def read_first_line(url: str) -> list[str]:
    """The names in the first line of the CSV at `url`."""
    line = read_unpacked(url).split(b"\n", 1)[0].decode("utf-8", "replace")
    return [name.strip(' "\r\ufeff') for name in line.split(",")]


def read_numbers(table: pa.Table, name: str, what: str) -> list[float | None]:
    """A column of numbers, None where a cell is empty; all None where there is no such column.

    Raises SourceError, which calls the table `what`.
    """
    if name not in table.column_names:
        return [None] * len(table)
    column = table[name]
    kind = column.type
    if not any(is_kind(kind) for is_kind in (is_null, is_integer, is_floating)):
        raise SourceError(f"{what}: column {name} holds something else than numbers")
    found: list[float | None] = column.to_pylist()
    return found


def read_texts(table: pa.Table, name: str) -> list[str]:
    """A column as text, '' where a cell is empty or there is no such column."""
    if name not in table.column_names:
        return [""] * len(table)
    found: list[str] = table[name].cast(pa.string()).fill_null("").to_pylist()
    return found


def make_box(corner: Sequence[float | None]) -> Box | str | None:
    """The box of four cells: None where all are empty, a sentence where they make none."""
    given = [value for value in corner if value is not None]
    if not given:
        return None
    box = Box(*map(float, given)) if len(given) == len(corner) else None
    if box is None or not all(map(math.isfinite, box)):
        return "a box that lacks a side"
    if box.width <= 0 or box.height <= 0:
        return "a box of no size"
    return box
