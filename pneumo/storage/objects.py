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

import base64
import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import fsspec
from blake3 import blake3 as new_blake3
from fsspec.asyn import sync

from pneumo.errors import AccessError, ContentError, StorageError, UserError

T = TypeVar("T")

ANONYMOUS = "PNEUMO_S3_ANONYMOUS"
"""The environment variable that has S3 requests sent without a signature."""

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
"""How long an object store may be silent before the request counts as failed."""

RETRY_BUDGET_S = 120.0
"""How long a failing read or write is tried again before StorageError; a read that gets on begins
it anew."""

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 15.0
_SILENT_RETRIES_S = 5.0
"""How long a request fails before a line is said about it."""

_CHUNK_BYTES = 2**20
_MOST_BYTES_OF_A_PUT = 5 * 2**30
_MOST_DIGESTS = 4
"""How many readings of an object with a wrong digest, each another, are taken for the network's
doing."""

_PARTIAL_PREFIX = ".partial-"
"""How a local file is named while it is written; what a crash leaves of it is no object."""

_MOST_ATTEMPTS = 5
"""How often a local file is begun whose unfinished copy another job clears away."""

_SHELL_SCHEMES = frozenset({"pipe", "cmd", "sh", "bash", "ssh", "sftp"})

_logger = logging.getLogger(__name__)


# --- URLs -----------------------------------------------------------------------------------------


def is_local(url: str) -> bool:
    """Whether `url` names a path of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path that a local URL names, absolute."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def normalise(url: str) -> str:
    """`url` as the jobs pass it on: absolute when local (workers change directory), no final slash.

    Raises UserError for a scheme that would run a command, or that fsspec does not know.
    """
    scheme = url.split(":", 1)[0] if ":" in url else ""
    if scheme in _SHELL_SCHEMES:
        raise UserError(f"storage: '{scheme}:' URLs are refused; use a path, file:// or s3://")
    if is_local(url):
        return str(local_path(url))
    if scheme not in fsspec.available_protocols():
        raise UserError(f"storage: unknown scheme in '{url}'; use a path, file:// or s3://")
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


# --- reading --------------------------------------------------------------------------------------


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
    read = _read_file if is_local(url) else _read_object
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


def _read_file(url: str, start: int, length: int | None, label: str | None) -> bytes:
    path = local_path(url)
    name = label or path
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a regular file")  # noqa: TRY301  as of a lost mount
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except (PermissionError, IsADirectoryError) as error:
        raise AccessError(f"storage: cannot read {name}: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(name)) from error
    except OSError as error:  # a lost mount
        raise StorageError(f"storage: cannot read {name}: {error.strerror}") from error
    if length is not None and len(data) != length:
        raise _ends_early(label or url, start, length, start + len(data))
    return data


def _read_object(url: str, start: int, length: int | None, label: str | None) -> bytes:
    if length == 0:
        return b""
    if not _is_s3(url):
        end = None if length is None else start + length
        data: bytes = _retried(
            lambda fs, path: fs.cat_file(path, start=start, end=end), url, label=label
        )
        if length is not None and len(data) != length:
            raise _ends_early(label or url, start, length, start + len(data))
        return data
    reading = _Reading(label or url, start, length)
    _retried(reading.go_on, url, progress=lambda: reading.received, label=label)
    return b"".join(reading.chunks)


def _ends_early(name: str, start: int, length: int, end: int) -> ContentError:
    return ContentError(
        f"storage: {name}: ends at byte {end}; bytes {start} to {start + length - 1} were asked for"
    )


class _Reading:
    """A read from S3 under way: what has arrived so far, and of which version of the object."""

    def __init__(self, name: str, start: int, length: int | None) -> None:
        """`name` is what errors call the object."""
        self.name, self.start, self.asked = name, start, length
        self.received = 0
        """All bytes that came, those of a version since replaced too."""
        self._begin()

    def _begin(self) -> None:
        self.chunks: list[bytes] = []
        self.held = 0
        """Bytes in `chunks`."""
        self.length = self.asked
        self.version: str | None = None

    def go_on(self, fs: Any, path: str) -> None:
        """Ask once for what is missing, and take it."""
        sync(fs.loop, self._receive, fs, path)

    async def _receive(self, fs: Any, path: str) -> None:
        first = self.start + self.held
        last = "" if self.length is None else self.start + self.length - 1
        bucket, key, _ = fs.split_path(path)
        condition = {"IfMatch": self.version} if self.version else {}
        try:
            answer = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last}", **condition
            )
        except OSError as error:
            code, _ = _s3_error(error)
            if code in {"InvalidRange", "416"}:
                await self._end_at(await fs._call_s3("head_object", Bucket=bucket, Key=key))
                return
            if code in {"PreconditionFailed", "412"}:
                self._begin_again()
            raise
        async with answer["Body"] as body:
            self._check(answer, first)
            assert self.length is not None
            # To the very end, so that the connection can be used again.
            while chunk := await body.read(_CHUNK_BYTES):
                self.chunks.append(chunk)
                self.held += len(chunk)
                self.received += len(chunk)
        if (got := self.held) != self.length:
            if got > self.length:
                self._begin()
            raise ConnectionError(f"{got} bytes arrived of {self.length}")

    def _check(self, answer: Mapping[str, Any], first: int) -> None:
        """Compare the answer's head with what was asked.

        When the body is whole is known from Content-Range: Content-Length is the connection's, and
        wrong at times.
        """
        if "ETag" not in answer:
            raise _not_s3(self.name)
        if self.version is not None and answer["ETag"] != self.version:
            self._begin_again()
        shown = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if shown is None:
            if first or self.asked is not None:
                raise StorageError(
                    f"storage: {self.name}: the server does not answer range requests; use another"
                )
            begin, end, total = 0, answer["ContentLength"] - 1, answer["ContentLength"]
        else:
            begin, end, total = (int(number) for number in shown.groups())
        self.version = answer["ETag"]
        if self.length is None:
            self.length = total - self.start
        if total < self.start + self.length:
            raise _ends_early(self.name, self.start, self.length, total)
        if (begin, end) != (first, self.start + self.length - 1):
            raise ConnectionError(f"asked from byte {first}, answered bytes {begin} to {end}")

    async def _end_at(self, head: Mapping[str, Any]) -> None:
        """Beyond the object's end: an empty object, or one that is shorter than asked for."""
        total = head["ContentLength"]
        if self.asked is not None:
            raise _ends_early(self.name, self.start, self.asked, total)
        if total or self.held:
            self._begin_again()

    def _begin_again(self) -> NoReturn:
        self._begin()
        raise ConnectionError("replaced while it was read")


# --- writing --------------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes | memoryview) -> None:
    """Publish `data` at `url` at once, replacing what was there.

    Local: written beside, flushed to disk, renamed. Object store: one PUT, which is atomic there,
    with the MD5 that S3 compares before it stores.
    """
    if is_local(url):
        _publish_file(local_path(url), data, lambda partial, path: partial.replace(path))
        return
    body = bytes(data)  # botocore takes no memoryview
    if _is_s3(url):
        _retried(lambda fs, path: _put(fs, path, body), url)
    else:
        _retried(lambda fs, path: fs.pipe_file(path, body), url)


def create_bytes(url: str, data: bytes, *, mode: int = 0o644) -> bool:
    """Publish `data` at `url` only if nothing is there yet; whether it was this call that did.

    Local: written beside, and linked into place, with `mode`; where a mount has no hard links, an
    empty file takes the place first, and is replaced. Object store: one PUT with If-None-Match; of
    two writers at once exactly one gets True. A server that says it does not know the condition
    (501) is asked first and then written to, which two writers at once can both pass.
    """
    if is_local(url):
        return _publish_file(local_path(url), data, _link, mode)
    if _is_s3(url):
        writer = uuid.uuid4().hex
        return _retried(lambda fs, path: _create_object(fs, path, data, writer), url)

    def create(fs: Any, path: str) -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    return _retried(create, url)


def write_text(url: str, text: str) -> None:
    """Publish `text` at `url` as UTF-8, at once."""
    write_bytes(url, text.encode())


def remove_partials(url: str) -> None:
    """Delete what killed writers have left directly in the folder `url`.

    A writer that is still at it notices, and writes its object anew. Object stores keep nothing of
    a PUT that did not end.
    """
    if is_local(url):
        for path in local_path(url).glob(f"{_PARTIAL_PREFIX}*"):
            path.unlink(missing_ok=True)


def remove_below(url: str) -> None:
    """Delete every object below `url`, what killed writers have left there, and the folders that
    this leaves empty."""
    for found in list_urls(url):
        remove(found)
    if is_local(url):
        for folder, _, names in os.walk(local_path(url), topdown=False):
            for name in names:
                if name.startswith(_PARTIAL_PREFIX):
                    Path(folder, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else writes there, or has removed it
                Path(folder).rmdir()


def upload_folder(folder: Path, url: str) -> None:
    """Publish every file below `folder` under `url`, by its relative name."""
    for path in sorted(folder.rglob("*")):
        if _is_object(path):
            write_bytes(join(url, path.relative_to(folder).as_posix()), path.read_bytes())


def remove(url: str) -> None:
    """Delete the object at `url`; nothing happens when it is not there."""
    try:
        if is_local(url):
            local_path(url).unlink()
        else:
            _retried(lambda fs, path: fs.rm_file(path), url)
    except FileNotFoundError:
        pass


def _publish_file(
    path: Path, data: bytes | memoryview, publish: Callable[[Path, Path], T], mode: int = 0o644
) -> T:
    attempts = 0
    while True:
        attempts += 1
        try:
            with _partial_file(path, data, mode) as partial:
                return publish(partial, path)
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise AccessError(f"storage: cannot write {path}: {error.strerror}") from error
        except OSError as error:  # a full disk, a lost mount
            # Another job may have taken the file for a dead writer's, or its folder for empty.
            if not isinstance(error, FileNotFoundError) or attempts == _MOST_ATTEMPTS:
                raise StorageError(f"storage: cannot write {path}: {error.strerror}") from error


def _link(partial: Path, path: Path) -> bool:
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _reserve(partial, path)
    return True


_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What mounts without hard links say: FUSE, SMB, exFAT."""


def _reserve(partial: Path, path: Path) -> bool:
    """`_link` without links: a reader may meet the empty file for a moment."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    try:
        partial.replace(path)
    except OSError:
        path.unlink()
        raise
    return True


@contextmanager
def _partial_file(path: Path, data: bytes | memoryview, mode: int) -> Iterator[Path]:
    """A file beside `path` with `data` on the disk, which is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PARTIAL_PREFIX, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):  # a mount whose files have no modes
                Path(file.name).chmod(mode)
            yield Path(file.name)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _is_object(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(_PARTIAL_PREFIX)


def _put(fs: Any, path: str, data: bytes, **options: Any) -> None:
    # Never in parts: the end of a multipart upload ignores If-None-Match on some servers.
    if len(data) > _MOST_BYTES_OF_A_PUT:
        raise ValueError(f"{len(data)} bytes are more than the 5 GiB of one PUT")
    bucket, key, _ = fs.split_path(path)
    digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=digest, **options)


def _create_object(fs: Any, path: str, data: bytes, writer: str) -> bool:
    """`writer` is kept with the object: a PUT whose answer was lost, and which is therefore sent
    again, finds its own object."""
    mark = {"Metadata": {"pneumo-writer": writer}}
    bucket, key, _ = fs.split_path(path)

    def is_ours() -> bool:
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
        return bool(head["Metadata"].get("pneumo-writer") == writer)

    try:
        _put(fs, path, data, IfNoneMatch="*", **mark)
    except OSError as error:
        code, _ = _s3_error(error)
        if code in {"PreconditionFailed", "412"}:
            return is_ours()
        if code not in {"NotImplemented", "501"}:
            raise
    else:
        return True
    try:
        return is_ours()
    except FileNotFoundError:
        _put(fs, path, data, **mark)
        return True


# --- listing --------------------------------------------------------------------------------------


def exists(url: str) -> bool:
    """Whether an object, or a folder with something in it, lies at `url`."""
    if is_local(url):
        path = local_path(url)
        return _is_kind(path.is_file) or next(_scan(path), None) is not None
    find = _exists_on_s3 if _is_s3(url) else lambda fs, path: bool(fs.exists(path))
    return _retried(lambda fs, path: find(fs, path), url)


def list_urls(url: str) -> list[str]:
    """The URLs of all objects below `url`, sorted; empty when there are none."""
    if is_local(url):
        return sorted(_walk(local_path(url)))
    if not _is_s3(url):
        scheme = url.split("://", 1)[0]
        return sorted(
            f"{scheme}://{path}" for path in _retried(lambda fs, path: fs.find(path), url)
        )
    root_url = "/".join(url.split("/", 3)[:3])
    keys = (found["Key"] for page in _list_pages(url) for found in page.get("Contents", ()))
    # A key with a final slash is how consoles draw an empty folder.
    return sorted(f"{root_url}/{key}" for key in keys if not key.endswith("/"))


def list_names(url: str) -> list[str]:
    """The names of the files and folders directly below `url`, sorted; empty when there are
    none."""
    if is_local(url):
        entries = _scan(local_path(url))
        return sorted(e.name for e in entries if _is_kind(e.is_file) or _is_kind(e.is_dir))
    if _is_s3(url):
        found = []
        for page in _list_pages(url, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            found += [key for key in keys if not key.endswith("/")]
            found += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
    else:
        try:
            found = _retried(lambda fs, path: fs.ls(path, detail=False), url)
        except FileNotFoundError:
            return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)


def _walk(folder: Path) -> Iterator[str]:
    """The paths of all objects below a folder of this machine; no link to a folder is followed."""
    for entry in _scan(folder):
        if _is_kind(entry.is_file):
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder of this machine, unfinished files aside; nothing where there is none.

    Asks the disk for nothing but the names: a hundred times as fast as looking at each path.
    """
    try:
        with os.scandir(folder) as entries:
            yield from (e for e in entries if not e.name.startswith(_PARTIAL_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise AccessError(f"storage: cannot list {folder}: {error.strerror}") from error
    except OSError as error:  # a lost mount
        raise StorageError(f"storage: cannot list {folder}: {error.strerror}") from error


def _is_kind(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except OSError:  # a link that leads to itself
        return False


def _list_pages(url: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    """The answers to one listing below `url`, each of at most 1,000 keys and tried again by
    itself."""
    position: dict[str, str] = {}
    while True:
        page = _retried(partial(_list_page, **options, **position), url)
        yield page
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


def _list_page(fs: Any, path: str, **options: Any) -> Mapping[str, Any]:
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    page: Mapping[str, Any] = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)
    if "Name" not in page:
        raise _not_s3(f"s3://{path}")
    return page


def _exists_on_s3(fs: Any, path: str) -> bool:
    bucket, key, _ = fs.split_path(path)
    refusal = None
    if key:
        try:
            fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            pass
        except PermissionError as error:
            refusal = error
        else:
            return True
    # The answer to HEAD has no body that would say why; the answer to this one has.
    page = _list_page(fs, path, MaxKeys=1)
    if page.get("Contents"):
        return True
    if refusal is not None:
        raise refusal
    return False


# --- an object store's troubles -------------------------------------------------------------------


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _open_filesystem(url: str) -> tuple[Any, str]:
    """The process's filesystem for `url`, and the path in it.

    fsspec keeps the instance, and makes another after a fork. Listings are not cached: keys that
    another process adds must be seen.
    """
    if not _is_s3(url):
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        return fs, path
    fs, path = fsspec.url_to_fs(
        url,
        use_listings_cache=False,
        anon=_is_anonymous(),
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            # Trying again is done here, in one place and within one budget.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Servers older than these checksums refuse them; Content-MD5 they all know.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "max_pool_connections": 32,
        },
    )
    fs.retries = 1
    return fs, path


def _is_anonymous() -> bool:
    value = os.environ.get(ANONYMOUS, "").lower()
    if value not in {"", "0", "false", "1", "true"}:
        raise UserError(f"{ANONYMOUS}={value}: expected 1 or 0")
    return value in {"1", "true"}


def _retried(
    call: Callable[[Any, str], T],
    url: str,
    budget_s: float = RETRY_BUDGET_S,
    progress: Callable[[], int] = lambda: 0,
    label: str | None = None,
) -> T:
    """Run `call(filesystem, path)`, again with jittered exponential back-off while the trouble
    looks passing.

    `budget_s` counts from the first failure, and anew once `progress`, in bytes, has grown by a
    chunk since. With a `label` neither the URL nor the text of an error, which may quote it, is
    told.
    """
    name, describe = (url, _describe) if label is None else (label, _name_kind)
    failing_since_s, pause_s, told = None, _FIRST_PAUSE_S, False
    reached = renewed_at = 0
    while True:
        try:
            fs, path = _open_filesystem(url)
            return call(fs, path)
        except Exception as error:
            cause = error if label is None else None
            lasting = _lasting(error, name, describe)
            if lasting is not None:
                raise lasting from cause
            now_s, now_reached = time.monotonic(), progress()
            if now_reached > reached:
                pause_s, reached = _FIRST_PAUSE_S, now_reached
            if failing_since_s is None or reached >= renewed_at + _CHUNK_BYTES:
                failing_since_s, renewed_at = now_s, reached
            left_s = budget_s - (now_s - failing_since_s)
            if pause_s > left_s:
                raise StorageError(
                    f"storage: {name}: {describe(error)}; tried again for {budget_s:.0f} s; is the "
                    "server up, and is it the one of AWS_ENDPOINT_URL?"
                ) from cause
            if left_s < budget_s - _SILENT_RETRIES_S and not told:
                _logger.warning(
                    "storage: %s: %s; trying again for %.0f s", name, describe(error), left_s
                )
                told = True
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


_REFUSALS: Mapping[str, tuple[str, str]] = {
    "NoSuchBucket": ("no such bucket", "create it first, or mend its name"),
    "InvalidBucketName": ("not a bucket's name", "mend it"),
    "AccessDenied": (
        "no right to do this",
        "the key needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there",
    ),
    "InvalidAccessKeyId": (
        "unknown access key",
        "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and that AWS_ENDPOINT_URL names the server that "
        "issued it",
    ),
    "SignatureDoesNotMatch": (
        "wrong secret key",
        "check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    ),
    "RequestTimeTooSkewed": (
        "this machine's clock differs too much from the server's",
        "set it right, by NTP for instance",
    ),
    "ExpiredToken": ("the session token has expired", "sign in again"),
    "TokenRefreshRequired": ("the session token has expired", "sign in again"),
    "InvalidToken": ("invalid session token", "sign in again, or unset AWS_SESSION_TOKEN"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION to it"),
    "AuthorizationHeaderMalformed": ("wrong region", "set AWS_DEFAULT_REGION to the bucket's"),
}
"""S3 error code -> what is wrong, what to do."""

_PASSING_CODES = frozenset(
    {
        *("SlowDown", "Throttling", "TooManyRequests", "429", "RequestTimeout", "408"),
        *("OperationAborted", "ConditionalRequestConflict", "409", "PreconditionFailed", "412"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
    }
)
"""Errors of kind 4xx that another try may not meet: overload, and what the network did to us."""

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_MISTAKES = (
    *(TypeError, ValueError, LookupError, AttributeError, NameError, AssertionError),
    *(ArithmeticError, NotImplementedError),
)
"""Of a program, ours or a library's: no waiting mends them."""
_BAD_SETUP = frozenset(
    {"ProfileNotFound", "ConfigParseError", "InvalidRegionError", "ParamValidationError"}
)


def _describe(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name_kind(error: BaseException) -> str:
    return type(error).__name__


def _lasting(
    error: Exception, name: str, describe: Callable[[BaseException], str] = _describe
) -> Exception | None:
    """What to raise for an error that no waiting mends; None for passing trouble.

    `name` and `describe` say what is told of the object and of the error.
    """
    if isinstance(error, (StorageError, UserError)):
        return error
    if isinstance(error, ImportError):  # fsspec's, which says what to install
        return UserError(f"storage: {name}: {_describe(error)}, on every node of the cluster")
    code, operation = _s3_error(error)
    if code is not None:
        return _lasting_s3(error, code, operation or "", name, describe)
    kind = type(error).__name__
    if kind in _NO_CREDENTIALS:
        return AccessError(
            f"storage: no credentials for {name}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or {ANONYMOUS}=1 for a public bucket"
        )
    said = describe(error)
    if kind in _BAD_SETUP:
        return AccessError(f"storage: {name}: {said}")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return AccessError(
            f"storage: {name}: {said}; AWS_ENDPOINT_URL is to be http(s)://host:port"
        )
    if any(sign in str(error) for sign in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")):
        return AccessError(
            f"storage: {name}: {said}; check http or https in AWS_ENDPOINT_URL, or set "
            "AWS_CA_BUNDLE"
        )
    if isinstance(error, FileNotFoundError):
        return _no_such_object(name)
    if isinstance(error, PermissionError):
        return AccessError(f"storage: access to {name} refused: {said}")
    if isinstance(error, _MISTAKES):
        return StorageError(f"storage: {name}: {kind}: {said}")
    return None


def _lasting_s3(
    error: Exception,
    code: str,
    operation: str,
    name: str,
    describe: Callable[[BaseException], str],
) -> Exception | None:
    """`_lasting` for what an S3 server, or something else that speaks HTTP, answered."""
    if operation.startswith("AssumeRole"):
        return AccessError(
            f"storage: no credentials for {name}: the role of AWS_ROLE_ARN was refused: {code}"
        )
    if code in _REFUSALS:
        what, remedy = _REFUSALS[code]
        return AccessError(f"storage: {what}: {name}; {remedy}")
    if code in _PASSING_CODES:
        return None
    if code.isdecimal():
        # The answer had no body with S3's own code. To HEAD that is usual.
        if int(code) >= 500 and code != "501":
            return None
        if not operation.startswith("Head"):
            return _not_s3(name, f"HTTP {code}")
    if isinstance(error, FileNotFoundError):
        return _no_such_object(name)
    if isinstance(error, PermissionError):
        return AccessError(f"storage: access to {name} refused: {code}")
    status = _s3_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if 400 <= status < 500 or status == 501:
        return StorageError(f"storage: {name}: the server refuses: {code}: {describe(error)}")
    return None


def _no_such_object(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such object", name)


def _not_s3(name: str, answered: str = "") -> AccessError:
    return AccessError(
        f"storage: {name}: something answered, but not as an S3 server does"
        f"{f' ({answered})' if answered else ''}; check AWS_ENDPOINT_URL"
    )


def _s3_error(error: BaseException) -> tuple[str | None, str | None]:
    """The code and the operation of botocore's ClientError; a message may quote a key that looks
    like a code. s3fs hides it behind an error of Python's."""
    response = _s3_response(error)
    source = error if getattr(error, "response", None) else error.__cause__
    return response.get("Error", {}).get("Code"), getattr(source, "operation_name", None)


def _s3_response(error: BaseException) -> Mapping[str, Any]:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}
