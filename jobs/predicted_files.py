"""The files to predict: of a folder or bucket, a file, a zip archive, a DICOMDIR, or a list."""

import io
import os
import sys
from collections.abc import Sequence
from itertools import takewhile

import pydicom

from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.packed_files import is_archive, list_members

OVERLAYS = "overlays"
"""The folder below the output for pictures; `predict` removes those of an earlier one."""
STANDARD_INPUT = "-"
_INDEX = "DICOMDIR"


def find_files(source: str, output_url: str) -> tuple[str, list[str]]:
    """The URL of a folder, and the paths of the files below it that the source stands for: of a
    folder all files but hidden ones and the output. Links to folders are followed; special files
    are listed too, and so get a row.

    Raises SourceError when there is none, or one would be removed as an overlay.
    """
    source_url, files = find_source(source)
    own = _find_real(output_url)
    if files is None:
        if _find_real(source_url) == own:
            raise SourceError(f"{source_url}: is also --output; give another folder for that")
        prefix = f"{source_url.rstrip('/')}/"
        below = [url for url in storage.list_everything(source_url) if url.startswith(prefix)]
        files = [url.removeprefix(prefix) for url in below]
        if not _find_real(source_url).startswith(own):  # else it is a folder of the output
            files = _leave_out(source_url, files, own)
        files = [p for p in files if not any(part.startswith(".") for part in p.split("/"))]
        if not below and not storage.is_local(source_url) and storage.exists(source_url):
            source_url, _, name = source_url.rpartition("/")  # one object of a bucket
            files = [name]
    if len(_leave_out(source_url, files, f"{own}{OVERLAYS}/")) < len(files):
        raise SourceError(
            f"{source_url}: has files in {OVERLAYS}/ of --output, which are replaced; give another "
            "--output"
        )
    found = expand(source_url, files)
    if not found:
        raise SourceError(f"{source_url}: no file in it; give a folder of pictures")
    return source_url, found


def _leave_out(source_url: str, files: list[str], real_folder: str) -> list[str]:
    """The files that are not below a folder, which `_find_real` has found."""
    folders = [path.rpartition("/")[0] for path in files]
    prefix = f"{source_url.rstrip('/')}/"
    is_in = {one: _find_real(prefix + one).startswith(real_folder) for one in {*folders}}
    return [path for path, folder in zip(files, folders, strict=True) if not is_in[folder]]


def _find_real(url: str) -> str:
    """A folder with a final slash; of local ones the place that links and `..` lead to."""
    if storage.is_local(url):
        url = os.path.realpath(storage.local_path(url))
    return f"{url.rstrip('/')}/"


def find_source(source: str) -> tuple[str, list[str] | None]:
    """The URL of the folder, and the paths of the files below it; None: all files in it.

    Raises SourceError for an empty list, or a DICOMDIR that cannot be read.
    """
    if source == STANDARD_INPUT:
        # A name may be no UTF-8; `find -print0` separates names by zeros.
        text = os.fsdecode(sys.stdin.buffer.read())
        names = text.split("\0") if "\0" in text else map(str.strip, text.split("\n"))
        return _split_list([name for name in names if name.strip()])
    source_url = storage.normalise(source)
    folder_url, _, name = source_url.rpartition("/")
    if name.upper() == _INDEX:
        return folder_url, _read_index(source_url)
    if is_archive(source_url) or (
        storage.is_local(source_url) and storage.local_path(source_url).is_file()
    ):
        return folder_url, [name]
    return source_url, None


def expand(source_url: str, files: Sequence[str]) -> list[str]:
    """The paths, with each archive replaced by its members, and without a DICOMDIR. A damaged
    archive stays, as it gets a row; alone it raises SourceError."""
    prefix = f"{source_url.rstrip('/')}/"
    found: list[str] = []
    for path in files:
        if is_archive(prefix + path):
            try:
                found += [url.removeprefix(prefix) for url in list_members(prefix + path)]
            except SourceError:
                if len(files) == 1:
                    raise
                found.append(path)
        elif path.rsplit("/", 1)[-1].upper() != _INDEX:
            found.append(path)
    return found


def _split_list(lines: list[str]) -> tuple[str, list[str]]:
    """The common folder of the files, and their paths below it, each once."""
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
    data = storage.read_bytes(index_url)
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        names = [
            record.ReferencedFileID
            for record in dataset.DirectoryRecordSequence
            if "ReferencedFileID" in record and record.DirectoryRecordType == "IMAGE"
        ]
    except Exception as error:  # pydicom raises many kinds
        raise SourceError(f"{index_url}: no DICOMDIR: {type(error).__name__}") from error
    paths = [name if isinstance(name, str) else "/".join(name) for name in names]
    if index_url.endswith(_INDEX.lower()):  # Linux shows all names of a CD in small letters
        paths = [path.lower() for path in paths]
    if not paths or any(".." in path.split("/") or path.startswith("/") for path in paths):
        raise SourceError(f"{index_url}: names no image, or one outside its folder")
    return paths
