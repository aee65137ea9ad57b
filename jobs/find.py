"""Find the file of a study by its key, as in a quarantine list, predictions, a report or W&B.

    python -m jobs.find --source DIR KEY…
    python -m jobs.find --source DIR --table predictions.parquet

Needs the source and its secret. Prints a line per study: key, tab, file. File names identify
patients: never put them into a store, run or mail. Exits 1 when a key belongs to no file.
"""

import argparse
import io
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from jobs.terminal.entry_point import run_main
from pneumo import storage
from pneumo.command_line import Parser
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.study_keys import derive_key, find_hash_key
from pneumo.errors import DataError, SourceError


def find(argv: Sequence[str]) -> None:
    """Print the files of the keys. Raises SourceError; DataError when a key belongs to no file."""
    parser = Parser(
        prog="python -m jobs.find",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, metavar="URL", help="the folder of the source")
    parser.add_argument("--table", metavar="FILE", help=".csv, .jsonl or .parquet with keys")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("keys", nargs="*", metavar="KEY")
    options = parser.parse_args(argv)
    if not options.keys and not options.table:
        parser.error("give keys, or a --table that has them")
    keys = [*options.keys, *(read_keys(storage.normalise(options.table)) if options.table else ())]
    found = find_urls(storage.normalise(options.source), set(keys), os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are no UTF-8, as they are
    for key in dict.fromkeys(keys):
        if key in found:
            print(f"{key}\t{found[key]}")
    if lost := [key for key in dict.fromkeys(keys) if key not in found]:
        raise DataError(
            f"find: {len(lost)} of {len(set(keys))} keys belong to no file of this source with "
            f"this secret: {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}"
        )


def read_keys(table_url: str) -> list[str]:
    """The column `key` of a table. Raises SourceError."""
    try:
        content = storage.read_bytes(table_url)
        if not content and table_url.endswith(".jsonl"):  # as of a store without bad files
            return []
        data = io.BytesIO(content)
        if table_url.endswith(".parquet"):
            table = pq.read_table(data)
        elif table_url.endswith(".jsonl"):
            table = pajson.read_json(data)
        else:
            convert = pacsv.ConvertOptions(column_types={"key": pa.string()})
            table = pacsv.read_csv(data, convert_options=convert)
        return [str(key) for key in table["key"].to_pylist()]
    except (FileNotFoundError, KeyError, pa.ArrowInvalid) as error:
        raise SourceError(f"{table_url}: no table with a column key") from error


def find_urls(source_url: str, keys: Collection[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The files of those keys that have one. Raises SourceError without source or secret."""
    if not storage.list_names(source_url):
        raise SourceError(f"{source_url}: no such folder, or nothing in it")
    hash_key = find_hash_key(source_url, environ)
    try:
        studies = read_source(source_url, environ).studies
    except SourceError:  # damaged tables: file names suffice
        studies = ()
    found = {study.key: study.url for study in studies if study.key in keys}
    if len(found) < len(set(keys)):  # studies with contradictions, and images without a label
        for url in storage.list_everything(source_url):
            # What layouts name an image by: a part of its path's end, with its ending or without.
            parts = PurePosixPath(url).parts[-5:]
            ends = ["/".join(parts[i:]) for i in range(len(parts))]
            for name in (PurePosixPath(url).stem, *ends):
                key = derive_key(hash_key, "study", name)
                if key in keys:
                    found.setdefault(key, url)
    return found


main = partial(run_main, "find", find)

if __name__ == "__main__":
    sys.exit(main())
