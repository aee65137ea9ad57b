"""Reading, writing and listing objects by URL.

Writing is atomic: a reader sees the whole object or none. Reading returns the bytes of one version
of the object, or raises an error that names the URL: an interrupted download is resumed by a range
request with the ETag as its condition. Bytes that the network or a disk changed are noticed where
the caller passes the expected digest.

Errors are those of `pneumo.errors` (AccessError, StorageError, ContentError), except that a missing
object raises Python's FileNotFoundError, for the caller to say what was missing.
"""

import hashlib
import io
import re
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3 as new_blake3

from pneumo.errors import ContentError
from pneumo.storage.local_files import (
    PARTIAL_PREFIX,
    create_file,
    file_exists,
    list_files,
    list_folder,
    read_file,
    remove_leftovers,
    replace_file,
    walk_folder,
)
from pneumo.storage.retries import retried
from pneumo.storage.s3 import ResumableRead, create_object, list_keys, object_exists, put_object
from pneumo.storage.urls import Range, is_local, is_s3, join, local_path, root

_BLOCK_BYTES = 4 * 2**20
"""Read at once by `open_object`: a request takes as long as some megabytes."""
_MAX_DIGESTS = 4
"""So many different wrong digests of one object are taken for network faults, and read again."""


def read_bytes(
    url: str,
    *,
    sha256: str | None = None,
    size: int | None = None,
    label: str | None = None,
    max_bytes: int | None = None,
) -> bytes:
    """The whole object at `url`, checked against a digest in hex and a size where given.

    An object of an object store with a wrong digest is read again, as the network may have changed
    a byte. `label` replaces the URL in errors and warnings where it could identify a patient.
    Raises FileNotFoundError, AccessError, StorageError, ContentError for a wrong digest or size, or
    TooLargeError, without reading it, for an object of more than `max_bytes`.
    """
    requested = Range(url, label=label, max_bytes=max_bytes)
    data = _read_checked(requested, hashlib.sha256, sha256)
    if size is not None and len(data) != size:
        raise ContentError(f"storage: {requested.name}: {len(data)} bytes, expected {size}")
    return data


def read_range(url: str, start: int, length: int, *, blake3: str | None = None) -> bytes:
    """Exactly `length` bytes of the object at `url` from byte `start` on, checked against a digest
    where given.

    Raises ContentError when the object is shorter, and as `read_bytes`.
    """
    return _read_checked(Range(url, start, length), new_blake3, blake3)


def open_object(url: str) -> io.BufferedReader:
    """The object of an object store as a file: read by ranges, each as by `read_range`, so that one
    that is larger than the memory can be read in parts. Raises as `read_bytes`."""
    size: int = retried(lambda fs, path: fs.size(path), url)
    return io.BufferedReader(_ObjectFile(url, size))


class _ObjectFile(io.RawIOBase):
    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position = url, size, 0
        # Several, as threads that read ahead do not keep the order of the file.
        self.read_block = lru_cache(maxsize=4)(self._read_block)

    def _read_block(self, start: int) -> bytes:
        return read_range(self.url, start, min(_BLOCK_BYTES, self.size - start))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.size:
            return 0
        begin = self.position % _BLOCK_BYTES
        part = self.read_block(self.position - begin)[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def read_text(url: str) -> str:
    """The whole object at `url`, as UTF-8."""
    return read_bytes(url).decode()


def find_text(url: str) -> str | None:
    """The whole object at `url`, as UTF-8; None where there is none."""
    try:
        return read_text(url)
    except FileNotFoundError:
        return None


def _read_checked(requested: Range, hasher: Callable[[bytes], Any], expected: str | None) -> bytes:
    read = read_file if is_local(requested.url) else _read_object
    found: set[str] = set()
    while True:
        data = read(requested)
        if expected is None:
            return data
        digest: str = hasher(data).hexdigest()
        if digest == expected:
            return data
        # The same wrong digest twice: the stored object has it.
        if is_local(requested.url) or digest in found or len(found) == _MAX_DIGESTS:
            last = requested.start + (requested.length or 0) - 1
            part = "" if requested.length is None else f", bytes {requested.start} to {last}"
            raise ContentError(
                f"storage: {requested.name}{part}: changed or damaged: digest {digest}, expected "
                f"{expected}"
            )
        found.add(digest)


def _read_object(requested: Range) -> bytes:
    url, start, length = requested.url, requested.start, requested.length
    if length == 0:
        return b""
    if is_s3(url):
        reading = ResumableRead(requested)
        retried(reading.resume, url, progress=lambda: reading.received, label=requested.label)
        return b"".join(reading.chunks)
    end = None if length is None else start + length

    def read(fs: Any, path: str) -> bytes:
        if requested.max_bytes is not None:
            requested.check_size(fs.size(path))
        found: bytes = fs.cat_file(path, start=start, end=end)
        return found

    data = retried(read, url, label=requested.label)
    if length is not None and len(data) != length:
        raise requested.ends_early(start + len(data))
    return data


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Write `data` to `url` atomically, replacing an existing object.

    Local: written to a temporary file, flushed to disk, renamed. Object store: one PUT, which is
    atomic, with an MD5 that S3 compares before it stores.
    """
    if is_local(url):
        replace_file(local_path(url), data)
        return
    body = bytes(data)  # botocore takes no memoryview
    if is_s3(url):
        retried(lambda fs, path: put_object(fs, path, body), url)
    else:
        retried(lambda fs, path: fs.pipe_file(path, body), url)


def create_bytes(url: str, data: bytes, *, mode: int = 0o666) -> bool:
    """Write `data` to `url` unless it exists. Returns whether this call created it.

    Local: with `mode`, less the umask. Object store: a HEAD, then a PUT with If-None-Match; of two
    concurrent writers exactly one gets True. Where the server ignores the condition, or does not
    implement it (501), both may.
    """
    if is_local(url):
        return create_file(local_path(url), data, mode)
    if is_s3(url):
        writer = uuid.uuid4().hex
        return retried(lambda fs, path: create_object(fs, path, data, writer), url)

    def create(fs: Any, path: str) -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    return retried(create, url)


def write_text(url: str, text: str) -> None:
    """Write `text` to `url` as UTF-8, atomically."""
    write_bytes(url, text.encode())


def upload_folder(folder: Path, url: str) -> None:
    """Write every file below `folder` to `url`, under its relative name."""
    for path in map(Path, sorted(list_files(folder))):
        write_bytes(join(url, path.relative_to(folder).as_posix()), path.read_bytes())


def remove(url: str) -> None:
    """Delete the object at `url`, if it exists."""
    try:
        if is_local(url):
            local_path(url).unlink()
        else:
            retried(lambda fs, path: fs.rm_file(path), url)
    except FileNotFoundError:
        pass


def remove_partials(url: str) -> None:
    """Delete temporary files of killed writers directly in the folder `url`.

    A writer that is still running notices, and writes its object again. Object stores keep nothing
    of an interrupted PUT.
    """
    if is_local(url):
        for path in local_path(url).glob(f"{PARTIAL_PREFIX}*"):
            path.unlink(missing_ok=True)


def remove_below(url: str, only: str = ".*") -> None:
    """Delete every object below `url` whose name below it matches the regular expression `only`,
    temporary files of killed writers, and empty folders."""
    folder = str(local_path(url)) if is_local(url) else url.rstrip("/")
    for found in list_urls(url):
        if re.fullmatch(only, found.removeprefix(f"{folder}/"), re.DOTALL):
            remove(found)
    if is_local(url):
        remove_leftovers(local_path(url))


def exists(url: str) -> bool:
    """Whether `url` is an object or a folder that is not empty."""
    if is_local(url):
        return file_exists(local_path(url))
    if is_s3(url):
        return retried(object_exists, url)
    return bool(retried(lambda fs, path: fs.exists(path), url))


def list_urls(url: str) -> list[str]:
    """The URLs of all objects below `url`, sorted; empty where there are none."""
    if is_local(url):
        return sorted(list_files(local_path(url)))
    if is_s3(url):
        return sorted(f"{root(url)}/{key}" for key in list_keys(url))

    def find(fs: Any, path: str) -> list[str]:
        # Without the host of a URL such as hdfs://host/folder.
        return [found.removeprefix(path).lstrip("/") for found in fs.find(path) if found != path]

    return sorted(f"{url.rstrip('/')}/{name}" for name in retried(find, url))


def list_everything(url: str) -> list[str]:
    """As `list_urls`; for a local folder also what is in linked folders, and what is not a readable
    file or folder: broken links, pipes, folders without permission."""
    return sorted(walk_folder(local_path(url))) if is_local(url) else list_urls(url)


def list_names(url: str) -> list[str]:
    """The names of the files and folders directly below `url`, sorted; empty when there are
    none."""
    if is_local(url):
        return sorted(list_folder(local_path(url)))
    if is_s3(url):
        found = list_keys(url, Delimiter="/")
    else:
        try:
            found = retried(lambda fs, path: fs.ls(path, detail=False), url)
        except FileNotFoundError:
            return []
    names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
    return sorted(names - {"", ".", ".."})  # a key such as `a/../b` would lead elsewhere
