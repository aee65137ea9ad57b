"""Which files a prediction is of: a folder or bucket, a file, a zip archive, a DICOMDIR, a list."""

import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

import pydicom

from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.packed_files import is_archive, list_members

STANDARD_INPUT = "-"
_INDEX = "DICOMDIR"


def find_source(source: str) -> tuple[str, list[str] | None]:
    """The URL of the folder, and the paths of the files below it; None: all that are there.

    Raises SourceError for a list without a file, or a DICOMDIR that cannot be read.
    """
    if source == STANDARD_INPUT:
        return _place_list([line.strip() for line in sys.stdin if line.strip()])
    source_url = storage.normalise(source)
    folder_url, _, name = source_url.rpartition("/")
    if name == _INDEX:
        return folder_url, _read_index(source_url)
    if is_archive(name) or (
        storage.is_local(source_url) and storage.local_path(source_url).is_file()
    ):
        return folder_url, [name]
    return source_url, None


def expand(source_url: str, files: Iterable[str]) -> list[str]:
    """The paths, with the members of an archive in place of it, and without the index of a
    medium. Raises SourceError."""
    prefix = f"{source_url.rstrip('/')}/"
    found: list[str] = []
    for path in files:
        if is_archive(path):
            members = list_members(storage.join(source_url, path))
            found += [url.removeprefix(prefix) for url in members]
        elif path.rsplit("/", 1)[-1] != _INDEX:
            found.append(path)
    return found


def _place_list(lines: list[str]) -> tuple[str, list[str]]:
    if not lines:
        raise SourceError("--source -: no file is named on standard input, one a line")
    urls = [storage.normalise(line) for line in lines]
    if len({storage.is_local(url) for url in urls}) > 1:
        raise SourceError("--source -: files of this machine and of a bucket; give one kind")
    columns = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    folder = "/".join(column[0] for column in takewhile(lambda c: len({*c}) == 1, columns))
    prefix = f"{folder.rstrip('/')}/"
    return folder, list(dict.fromkeys(url.removeprefix(prefix) for url in urls))


def _read_index(index_url: str) -> list[str]:
    """The files that the records of a DICOMDIR name (PS3.10 8.6), in its order."""
    try:
        dataset = pydicom.dcmread(Path(storage.local_path(index_url)))
        names = [
            record.ReferencedFileID
            for record in dataset.DirectoryRecordSequence
            if "ReferencedFileID" in record and record.DirectoryRecordType == "IMAGE"
        ]
    except Exception as error:  # pydicom raises many kinds
        raise SourceError(f"{index_url}: no DICOMDIR: {type(error).__name__}") from error
    paths = [name if isinstance(name, str) else "/".join(name) for name in names]
    if not paths or any(".." in path.split("/") or path.startswith("/") for path in paths):
        raise SourceError(f"{index_url}: names no image, or one outside its folder")
    return paths
