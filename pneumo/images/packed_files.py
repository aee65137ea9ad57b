"""Files within files: the members of a zip archive, and what gzip has packed."""

import io
import zipfile
import zlib
from functools import lru_cache

from pneumo import storage
from pneumo.errors import DicomError, SourceError
from pneumo.images.frame_format import MAX_PIXELS

MEMBER = ".zip!/"
"""Stands between an archive and its member: `a.zip!/b/c.dcm`."""
_GZIP = b"\x1f\x8b"
_MAX_BYTES = 3 * MAX_PIXELS


def list_members(archive_url: str) -> list[str]:
    """The URLs of the files in a zip archive, hidden ones left out. Raises SourceError."""
    try:
        with _open(archive_url) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise SourceError(f"{archive_url}: no zip archive that can be read: {error}") from error
    return [f"{archive_url}!/{name}" for name in sorted(names) if not _is_hidden(name)]


def _is_hidden(member: str) -> bool:
    """Whether a member is one that people do not see; `..` leads somewhere, and hides nothing."""
    parts = [part for part in member.split("/") if part not in (".", "..")]
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def read_member(url: str) -> bytes:
    """What a member of an archive holds. Raises DicomError where it is damaged, encrypted or too
    large, FileNotFoundError where there is none."""
    archive_url, _, name = url.partition(MEMBER)
    try:
        with _open(f"{archive_url}.zip") as archive, archive.open(name) as member:
            return _bounded(member.read(_MAX_BYTES + 1))
    except KeyError as error:
        raise FileNotFoundError(name) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DicomError(f"cannot be unpacked: {type(error).__name__}", "undecodable") from error


def unpack(data: bytes) -> bytes:
    """`data`, inflated where it begins as a gzip file. Raises DicomError."""
    if not data.startswith(_GZIP):
        return data
    try:
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
        found = _bounded(inflater.decompress(data, _MAX_BYTES + 1))
    except zlib.error as error:
        raise DicomError("the gzip file is damaged", "undecodable") from error
    if not inflater.eof:
        raise DicomError("the gzip file is cut short", "undecodable")
    return found


def _open(archive_url: str) -> zipfile.ZipFile:
    if storage.is_local(archive_url):
        return zipfile.ZipFile(storage.local_path(archive_url))
    return zipfile.ZipFile(io.BytesIO(_read_archive(archive_url)))


@lru_cache(maxsize=1)
def _read_archive(archive_url: str) -> bytes:
    """One archive of a bucket, kept, since its members are read one after the other."""
    return storage.read_bytes(archive_url)


def _bounded(data: bytes) -> bytes:
    if len(data) > _MAX_BYTES:
        raise DicomError(f"unpacks to more than {_MAX_BYTES} bytes", "too_large")
    return data


def is_archive(path: str) -> bool:
    """Whether a file is one of those whose members are listed instead, by its name."""
    return path.endswith(".zip")
