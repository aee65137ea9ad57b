"""One way to read and write bytes by URL: a local path, `file://`, `s3://`, or what fsspec speaks.

Writing is atomic: a reader sees the whole object or none. Reading gives exactly the bytes of one
version of the object or an error that names the URL: a broken answer is resumed where it ended, by
a range request that holds only while the object's ETag is the same. What the network or a disk
changed is noticed where the caller says which SHA-256 it expects.

Errors are those of `pneumo.errors`, except that a missing object is Python's own FileNotFoundError,
for the caller to say what was missing. Credentials and endpoints follow the AWS conventions
(profiles, AWS_ENDPOINT_URL, IRSA); PNEUMO_S3_ANONYMOUS=1 sends requests unsigned, for public
buckets. No URL is ever handed to a shell.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3 as new_blake3

from pneumo.errors import ContentError
from pneumo.storage.failures import ends_early
from pneumo.storage.local_files import (
    PARTIAL_PREFIX,
    is_kind,
    is_object,
    link,
    publish_file,
    read_file,
    scan,
    walk,
)
from pneumo.storage.retries import retried
from pneumo.storage.s3 import ResumableRead, create_object, list_pages, object_exists, put
from pneumo.storage.urls import is_local, is_s3, join, local_path

_MOST_DIGESTS = 4
"""How many readings of an object with a wrong digest, each another, are taken for the network's
doing."""


def read_bytes(
    url: str, *, sha256: str | None = None, size: int | None = None, label: str | None = None
) -> bytes:
    """The whole object at `url`, checked against a digest in hex and a size where they are given.

    A wrong digest from an object store is read again, since the network may have changed a byte.
    `label` stands in errors and warnings for a URL that must not be told, as it names a patient.
    Raises FileNotFoundError, AccessError, StorageError, or ContentError for other bytes.
    """
    return _read_expected(url, 0, None, hashlib.sha256, sha256, size, label)


def read_range(url: str, start: int, length: int, *, blake3: str | None = None) -> bytes:
    """Exactly `length` bytes of the object at `url` from byte `start` on, checked against a digest
    where it is given.

    Raises ContentError when the object ends before, and as `read_bytes` does.
    """
    return _read_expected(url, start, length, new_blake3, blake3, length)


def read_text(url: str) -> str:
    """The whole object at `url`, as UTF-8."""
    return read_bytes(url).decode()


def _read_expected(
    url: str,
    start: int,
    length: int | None,
    hasher: Callable[[bytes], Any],
    expected: str | None,
    size: int | None,
    label: str | None = None,
) -> bytes:
    read = read_file if is_local(url) else _read_object
    name = label or url
    found: set[str] = set()
    while True:
        data = read(url, start, length, label)
        if size is not None and len(data) != size:
            raise ContentError(f"storage: {name}: {len(data)} bytes, expected {size}")
        if expected is None:
            return data
        digest = hasher(data).hexdigest()
        if digest == expected:
            return data
        # The same wrong digest twice is what lies there.
        if is_local(url) or digest in found or len(found) == _MOST_DIGESTS:
            part = "" if length is None else f", bytes {start} to {start + length - 1}"
            raise ContentError(
                f"storage: {name}{part}: changed or damaged: digest {digest}, expected {expected}"
            )
        found.add(digest)


def _read_object(url: str, start: int, length: int | None, label: str | None) -> bytes:
    if length == 0:
        return b""
    if not is_s3(url):
        end = None if length is None else start + length
        data: bytes = retried(
            lambda fs, path: fs.cat_file(path, start=start, end=end), url, label=label
        )
        if length is not None and len(data) != length:
            raise ends_early(label or url, start, length, start + len(data))
        return data
    reading = ResumableRead(label or url, start, length)
    retried(reading.go_on, url, progress=lambda: reading.received, label=label)
    return b"".join(reading.chunks)


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Publish `data` at `url` at once, replacing what was there.

    Local: written beside, flushed to disk, renamed. Object store: one PUT, which is atomic there,
    with the MD5 that S3 compares before it stores.
    """
    if is_local(url):
        publish_file(local_path(url), data, lambda partial, path: partial.replace(path))
        return
    body = bytes(data)  # botocore takes no memoryview
    if is_s3(url):
        retried(lambda fs, path: put(fs, path, body), url)
    else:
        retried(lambda fs, path: fs.pipe_file(path, body), url)


def create_bytes(url: str, data: bytes, *, mode: int = 0o644) -> bool:
    """Publish `data` at `url` only if nothing is there yet; whether it was this call that did.

    Local: written beside, and linked into place, with `mode`; where a mount has no hard links, an
    empty file takes the place first, and is replaced. Object store: one PUT with If-None-Match; of
    two writers at once exactly one gets True. A server that says it does not know the condition
    (501) is asked first and then written to, which two writers at once can both pass.
    """
    if is_local(url):
        return publish_file(local_path(url), data, link, mode)
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
        for folder, _, names in os.walk(local_path(url), topdown=False):
            for name in names:
                if name.startswith(PARTIAL_PREFIX):
                    Path(folder, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else writes there, or has removed it
                Path(folder).rmdir()


def upload_folder(folder: Path, url: str) -> None:
    """Publish every file below `folder` under `url`, by its relative name."""
    for path in sorted(folder.rglob("*")):
        if is_object(path):
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


def exists(url: str) -> bool:
    """Whether an object, or a folder with something in it, lies at `url`."""
    if is_local(url):
        path = local_path(url)
        return is_kind(path.is_file) or next(scan(path), None) is not None
    find = object_exists if is_s3(url) else lambda fs, path: bool(fs.exists(path))
    return retried(lambda fs, path: find(fs, path), url)


def list_urls(url: str) -> list[str]:
    """The URLs of all objects below `url`, sorted; empty when there are none."""
    if is_local(url):
        return sorted(walk(local_path(url)))
    if not is_s3(url):
        scheme = url.split("://", 1)[0]
        return sorted(f"{scheme}://{path}" for path in retried(lambda fs, path: fs.find(path), url))
    root_url = "/".join(url.split("/", 3)[:3])
    keys = (found["Key"] for page in list_pages(url) for found in page.get("Contents", ()))
    # A key with a final slash is how consoles draw an empty folder.
    return sorted(f"{root_url}/{key}" for key in keys if not key.endswith("/"))


def list_names(url: str) -> list[str]:
    """The names of the files and folders directly below `url`, sorted; empty when there are
    none."""
    if is_local(url):
        entries = scan(local_path(url))
        return sorted(e.name for e in entries if is_kind(e.is_file) or is_kind(e.is_dir))
    if is_s3(url):
        found = []
        for page in list_pages(url, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            found += [key for key in keys if not key.endswith("/")]
            found += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    else:
        try:
            found = retried(lambda fs, path: fs.ls(path, detail=False), url)
        except FileNotFoundError:
            return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)
