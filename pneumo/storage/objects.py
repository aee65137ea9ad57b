"""Reading, writing and listing objects by URL.

Writing is atomic: a reader sees the whole object or none. Reading gives exactly the bytes of one
version of the object, or an error that names the URL: a broken answer is resumed where it ended, by
a range request that holds only while the object's ETag is the same. What the network or a disk
changed is noticed where the caller says which digest it expects.

Errors are those of `pneumo.errors` (AccessError, StorageError, ContentError), except that a missing
object is Python's own FileNotFoundError, for the caller to say what was missing.
"""

import hashlib
import uuid
from collections.abc import Callable
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
from pneumo.storage.urls import Range, is_local, is_s3, join, local_path

_MOST_DIGESTS = 4
"""How many different wrong digests of one object are taken for faults of the network."""


def read_bytes(
    url: str, *, sha256: str | None = None, size: int | None = None, label: str | None = None
) -> bytes:
    """The whole object at `url`, checked against a digest in hex and a size where they are given.

    A wrong digest from an object store is read again, since the network may have changed a byte.
    `label` stands in errors and warnings for a URL that must not be told, as it names a patient.
    Raises FileNotFoundError, AccessError, StorageError, or ContentError for other bytes.
    """
    wanted = Range(url, label=label)
    data = _read_checked(wanted, hashlib.sha256, sha256)
    if size is not None and len(data) != size:
        raise ContentError(f"storage: {wanted.name}: {len(data)} bytes, expected {size}")
    return data


def read_range(url: str, start: int, length: int, *, blake3: str | None = None) -> bytes:
    """Exactly `length` bytes of the object at `url` from byte `start` on, checked against a digest
    where it is given.

    Raises ContentError when the object ends before, and as `read_bytes` does.
    """
    return _read_checked(Range(url, start, length), new_blake3, blake3)


def read_text(url: str) -> str:
    """The whole object at `url`, as UTF-8."""
    return read_bytes(url).decode()


def _read_checked(wanted: Range, hasher: Callable[[bytes], Any], expected: str | None) -> bytes:
    read = read_file if is_local(wanted.url) else _read_object
    found: set[str] = set()
    while True:
        data = read(wanted)
        if expected is None:
            return data
        digest: str = hasher(data).hexdigest()
        if digest == expected:
            return data
        # Twice the same wrong digest is what lies there.
        if is_local(wanted.url) or digest in found or len(found) == _MOST_DIGESTS:
            last = wanted.start + (wanted.length or 0) - 1
            part = "" if wanted.length is None else f", bytes {wanted.start} to {last}"
            raise ContentError(
                f"storage: {wanted.name}{part}: changed or damaged: digest {digest}, expected "
                f"{expected}"
            )
        found.add(digest)


def _read_object(wanted: Range) -> bytes:
    start, length = wanted.start, wanted.length
    if length == 0:
        return b""
    if is_s3(wanted.url):
        reading = ResumableRead(wanted)
        retried(reading.resume, wanted.url, progress=lambda: reading.received, label=wanted.label)
        return b"".join(reading.chunks)
    end = None if length is None else start + length
    data: bytes = retried(
        lambda fs, path: fs.cat_file(path, start=start, end=end), wanted.url, label=wanted.label
    )
    if length is not None and len(data) != length:
        raise wanted.ends_early(start + len(data))
    return data


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Publish `data` at `url` at once, replacing what was there.

    Local: written beside, flushed to disk, renamed. Object store: one PUT, which is atomic there,
    with the MD5 that S3 compares before it stores.
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
    """Publish `data` at `url` only if nothing is there yet; whether it was this call that did.

    Local: with `mode`, less the umask. Object store: one PUT with If-None-Match; of two writers at
    once exactly one gets True. A server that says it does not know the condition (501) is asked
    first and then written to, which two writers at once can both pass.
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
    """Publish `text` at `url` as UTF-8, at once."""
    write_bytes(url, text.encode())


def upload_folder(folder: Path, url: str) -> None:
    """Publish every file below `folder` under `url`, by its relative name."""
    for path in map(Path, sorted(list_files(folder))):
        write_bytes(join(url, path.relative_to(folder).as_posix()), path.read_bytes())


def remove(url: str) -> None:
    """Delete the object at `url`; nothing happens when it is not there."""
    try:
        if is_local(url):
            local_path(url).unlink()
        else:
            retried(lambda fs, path: fs.rm_file(path), url)
    except FileNotFoundError:
        pass


def remove_partials(url: str) -> None:
    """Delete what killed writers have left directly in the folder `url`.

    A writer that is still at it notices, and writes its object anew. Object stores keep nothing of
    a PUT that did not end.
    """
    if is_local(url):
        for path in local_path(url).glob(f"{PARTIAL_PREFIX}*"):
            path.unlink(missing_ok=True)


def remove_below(url: str) -> None:
    """Delete every object below `url`, what killed writers have left there, and the folders that
    this leaves empty."""
    for found in list_urls(url):
        remove(found)
    if is_local(url):
        remove_leftovers(local_path(url))


def exists(url: str) -> bool:
    """Whether an object, or a folder with something in it, lies at `url`."""
    if is_local(url):
        return file_exists(local_path(url))
    if is_s3(url):
        return retried(object_exists, url)
    return bool(retried(lambda fs, path: fs.exists(path), url))


def list_urls(url: str) -> list[str]:
    """The URLs of all objects below `url`, sorted; empty when there are none."""
    if is_local(url):
        return sorted(list_files(local_path(url)))
    if is_s3(url):
        root_url = "/".join(url.split("/", 3)[:3])
        return sorted(f"{root_url}/{key}" for key in list_keys(url))
    scheme = url.split("://", 1)[0]
    return sorted(f"{scheme}://{path}" for path in retried(lambda fs, path: fs.find(path), url))


def list_everything(url: str) -> list[str]:
    """As `list_urls`, and of a local folder also what linked folders hold, and whatever is neither
    file nor folder: links that lead nowhere, pipes, folders that must not be read."""
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
    return sorted(names - {"", ".", ".."})  # of keys such as `a/../b`, which lead elsewhere
