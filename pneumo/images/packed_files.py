"""Compressed files: the members of zip archives, and gzip."""

import gzip
import io
import lzma
import re
import threading
import zipfile
import zlib
from functools import lru_cache

from pneumo import storage
from pneumo.errors import DicomError, SourceError
from pneumo.images.frame_format import MAX_PIXELS

_MEMBER = re.compile(r"(?<=\.zip)!/", re.IGNORECASE)
"""Separates an archive and its member: `a.zip!/b/c.dcm`."""
_GZIP = b"\x1f\x8b"
MAX_BYTES = 3 * MAX_PIXELS
"""Larger files are not read, packed or not."""


def list_members(archive_url: str) -> list[str]:
    """The URLs of the files in a zip archive, without hidden ones. Raises SourceError."""
    try:
        with _lock:
            names = [name for name in _find(archive_url).namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise SourceError(f"{archive_url}: no zip archive that can be read: {error}") from error
    return [f"{archive_url}!/{name}" for name in sorted(names) if not _is_hidden(name)]


def _is_hidden(member: str) -> bool:
    """Whether a part of the member's path is hidden; `.` and `..` are not."""
    parts = [part for part in member.split("/") if part not in (".", "..")]
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def is_member(url: str) -> bool:
    """Whether `url` is one of `list_members`."""
    return _MEMBER.search(url) is not None


def read_member(url: str) -> bytes:
    """The bytes of an archive's member. Raises DicomError where it, or the archive, is damaged, or
    it is encrypted or too large, FileNotFoundError where it is missing."""
    archive_url, *names = _MEMBER.split(url, maxsplit=1)
    name = "".join(names)
    try:
        with _lock, _find(archive_url).open(name) as member:
            return _bounded(member.read(MAX_BYTES + 1))
    except (KeyError, FileNotFoundError) as error:
        raise FileNotFoundError(name) from error
    except _DAMAGED as error:
        raise DicomError(f"cannot be unpacked: {type(error).__name__}", "undecodable") from error


def unpack(data: bytes) -> bytes:
    """`data`, decompressed where it is a gzip file. Raises DicomError."""
    if not data.startswith(_GZIP):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            return _bounded(file.read(MAX_BYTES + 1))
    except EOFError as error:
        raise DicomError("the gzip file is truncated", "undecodable") from error
    except (OSError, zlib.error) as error:
        raise DicomError("the gzip file is damaged", "undecodable") from error


_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError),  # OSError: of bzip2
    *(EOFError, RuntimeError, NotImplementedError),
)


_lock = threading.Lock()
"""Held while an archive is read, as its members are by several threads."""


def _find(archive_url: str) -> zipfile.ZipFile:
    if not storage.is_local(archive_url):
        return _open(archive_url)
    found = storage.local_path(archive_url).stat()
    return _open(archive_url, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=2)
def _open(archive_url: str, *_version: int) -> zipfile.ZipFile:
    """The archive. The last two stay open: to list all members takes long, and threads that read
    ahead need two."""
    if storage.is_local(archive_url):
        return zipfile.ZipFile(storage.local_path(archive_url))
    return zipfile.ZipFile(storage.open_object(archive_url))


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise DicomError(f"unpacks to more than {MAX_BYTES} bytes", "too_large")
    return data


def is_archive(url: str) -> bool:
    """Whether `url` is, by its name, an archive whose members are read; no folder, pipe or broken
    link."""
    is_named_so = url.lower().endswith(".zip")
    return is_named_so and (not storage.is_local(url) or storage.local_path(url).is_file())
