"""Reading the folders and tables of a source; errors never quote a cell."""

import contextlib
import csv
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
from pyarrow.types import is_binary, is_floating, is_integer, is_null, is_string

from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

PACKINGS = ("", ".gz", ".zip")
LINE = "(line)"
"""A column of every table: the line on which a row starts, in an editor."""
_MAX_BYTES = 128 * 2**20
_MAX_LINE = 100_000


def list_folder(folder_url: str) -> dict[str, str]:
    """Name -> URL of the files and folders directly in a folder; empty for a file."""
    return {name: storage.join(folder_url, name) for name in storage.list_names(folder_url)}


def first_present(
    files: Mapping[str, str], names: Sequence[str], packings: Sequence[str] = PACKINGS
) -> str | None:
    """The first of `names` that is in `files`, uncompressed or compressed."""
    return next((f"{n}{p}" for n in names for p in packings if f"{n}{p}" in files), None)


def read_unpacked(url: str) -> bytes:
    """The file's content, decompressed where its name ends in .gz or .zip. Raises SourceError."""
    data = storage.read_bytes(url)
    try:
        if url.endswith(".gz"):
            with gzip.open(io.BytesIO(data)) as file:
                return _read_bounded(file, url)
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # Without the files that macOS adds.
                names = [n for n in archive.namelist() if not n.endswith("/")]
                names = [n for n in names if not re.search(r"(^|/)(\.|__MACOSX/)", n)]
                if len(names) != 1:
                    raise SourceError(f"{url}: {len(names)} files in it, expected only the table")
                with archive.open(names[0]) as file:
                    return _read_bounded(file, url)
    except gzip.BadGzipFile as error:  # its text quotes the file
        raise SourceError(f"{url}: not a gzip file, though its name ends in .gz") from error
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise SourceError(f"{url}: not a readable archive of one file: {error}") from error
    return data


def _read_bounded(file: IO[bytes] | gzip.GzipFile, url: str) -> bytes:
    """A decompressed table. Raises SourceError where it is much larger than any table."""
    data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise SourceError(
            f"{url}: unpacks to more than {_MAX_BYTES // 2**20} MiB, too large for a table"
        )
    return data


def read_table(
    url: str, *required: str, texts: Sequence[str] = (), known: Sequence[str]
) -> pa.Table:
    """The CSV at `url`, the columns `texts` as strings, and the column LINE. The `known` names are
    found in any case; spaces around a name or a cell are left out.

    Raises SourceError, which never quotes a cell; of the first line, which may be no header, it
    quotes only names in `known`.
    """
    table, names = _parse_csv(url, texts, known)
    _check_names(names, required, known, url)
    if not len(table):
        raise SourceError(f"{url}: no rows")
    empty = pc.and_kleene(*(_is_empty(table[name]) for name in (required * 2)[:2]))
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise SourceError(f"{url}: row {table[LINE][row]} is empty; delete it")
    return table


def _parse_csv(url: str, texts: Sequence[str], known: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """The table, and the names of its columns, as `known` spells them."""
    data = read_unpacked(url)
    spellings = {name.casefold(): name for name in known}

    def spell(name: str) -> str:
        return spellings.get(name.strip().casefold(), name)

    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{url}: not a readable CSV: written as UTF-16; save it as UTF-8")
    invalid: list[Any] = []

    def keep(row: Any) -> str:
        invalid.append(row)
        return "error"

    try:
        table = pacsv.read_csv(
            io.BytesIO(data),
            # With threads row numbers are unknown.
            read_options=pacsv.ReadOptions(use_threads=False),
            parse_options=pacsv.ParseOptions(invalid_row_handler=keep, newlines_in_values=True),
            # As strings, an id of digits keeps its leading zeros.
            convert_options=pacsv.ConvertOptions(
                column_types={n: pa.string() for n in _read_names(data) if spell(n) in texts},
                strings_can_be_null=False,
            ),
        )
        names = [spell(name) for name in table.column_names]
        # pyarrow reads as bytes what is no UTF-8.
        if any(is_binary(table[i].type) and name in known for i, name in enumerate(names)):
            raise ValueError  # noqa: TRY301  as in a column of `texts`
    except ValueError:  # its message, and that of its cause, quotes the row
        fault = "empty, cut off, or no UTF-8"
        if invalid:
            row = invalid[0]
            line = _find_lines(data, row.number)[-1]
            fault = f"row {line} has {row.actual_columns} cells, not {row.expected_columns}"
        raise SourceError(f"{url}: not a readable CSV: {fault}") from None
    columns = [*map(_trim, table.columns), pa.array(_find_lines(data, 1 + len(table))[1:])]
    return pa.table(columns, names=[*names, LINE]), names


def _find_lines(data: bytes, count: int) -> Sequence[int]:
    """The lines on which the first `count` rows start, the header's first. Lines without text are
    no rows, and line breaks within quotes start none."""
    if len(data.rstrip(b"\r\n").splitlines()) == count:
        return range(1, 1 + count)
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "replace"), newline=""))
    lines, line = list[int](), 1
    with contextlib.suppress(csv.Error):  # of an immense cell
        for cells in reader:
            if cells:
                lines.append(line)
            line = reader.line_num + 1
    return lines[:count] if len(lines) >= count else range(1, 1 + count)


def _trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(column) if is_string(column.type) else column


def _read_names(data: bytes) -> list[str]:
    """The names in the first line that is not empty."""
    first = re.search(rb"[^\r\n]+", data)
    line = "" if first is None else first[0][:_MAX_LINE].decode("utf-8-sig", "replace")
    return next(csv.reader([line]), [])


def _check_names(
    names: Sequence[str], required: Sequence[str], known: Sequence[str], url: str
) -> None:
    """Raises SourceError where a required column is missing or a known one is there twice."""
    if missing := [name for name in required if name not in names]:
        found = [name for name in names if name in known]
        raise SourceError(
            f"{url}: no column {', '.join(missing)}; its first line names {len(names)}, known "
            f"among them: {', '.join(found) or 'none'}"
            + ("; separate them by commas" if len(names) == 1 else "")
        )
    if twice := sorted({name for name in names if names.count(name) > 1 and name in known}):
        raise SourceError(f"{url}: its first line names {', '.join(twice)} more than once")


def _is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
    return pc.equal(pc.coalesce(texts, ""), "")


def read_first_line(url: str) -> list[str]:
    """The names in the first line of the CSV at `url`, in small letters."""
    return [name.strip().casefold() for name in _read_names(read_unpacked(url))]


def read_numbers(table: pa.Table, name: str, what: str) -> list[float | None]:
    """A column of numbers, None where a cell is empty; all None where the column is missing.

    Raises SourceError, with `what` as the table's name.
    """
    if name not in table.column_names:
        return [None] * len(table)
    column = table[name]
    kind = column.type
    if not any(is_kind(kind) for is_kind in (is_null, is_integer, is_floating)):
        raise SourceError(f"{what}: column {name} has values that are not numbers")
    found: list[float | None] = column.to_pylist()
    return found


def read_texts(table: pa.Table, name: str) -> list[str]:
    """A column of strings, '' where a cell is empty or the column is missing."""
    if name not in table.column_names:
        return [""] * len(table)
    found: list[str] = table[name].cast(pa.string()).fill_null("").to_pylist()
    return found


def make_box(corner: Sequence[float | None]) -> Box | str | None:
    """The box of four cells; None where all are empty, a message where they are no box.

    The messages are part of `Source.digest`: after a change, existing stores would not match."""
    given = [value for value in corner if value is not None]
    if not given:
        return None
    box = Box(*map(float, given)) if len(given) == len(corner) else None
    if box is None or not all(map(math.isfinite, box)):
        return "a box that lacks a side"
    if box.width <= 0 or box.height <= 0:
        return "a box of no size"
    return box
