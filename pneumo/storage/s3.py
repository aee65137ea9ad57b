"""Requests to an S3 server."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from fsspec.asyn import sync

from pneumo.errors import StorageError
from pneumo.storage.failures import not_s3, s3_error
from pneumo.storage.retries import CHUNK_BYTES, retried
from pneumo.storage.urls import Range

_MAX_PUT_BYTES = 5 * 2**30
_CONDITION_FAILED = frozenset({"PreconditionFailed", "412"})


class ResumableRead:
    """A read from S3 that can be resumed: the bytes so far, and the ETag of the object."""

    def __init__(self, requested: Range) -> None:
        self.requested = requested
        self.received = 0
        """All bytes received, including those of a replaced version."""
        self._clear()

    def _clear(self) -> None:
        self.chunks: list[bytes] = []
        self.held = 0
        """Bytes in `chunks`."""
        self.length = self.requested.length
        self.etag: str | None = None

    def resume(self, fs: Any, path: str) -> None:
        """Request the missing bytes once.

        Raises ContentError when the object is shorter than requested; after any other error the
        next call continues with the bytes so far.
        """
        sync(fs.loop, self._receive, fs, path)

    async def _receive(self, fs: Any, path: str) -> None:
        first = self.requested.start + self.held
        last = "" if self.length is None else self.requested.start + self.length - 1
        bucket, key, _ = fs.split_path(path)
        condition = {"IfMatch": self.etag} if self.etag else {}
        try:
            answer = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last}", **condition
            )
        except OSError as error:
            code, _ = s3_error(error)
            if code in {"InvalidRange", "416"}:
                head = await fs._call_s3("head_object", Bucket=bucket, Key=key)
                self._handle_end(head["ContentLength"])
                return
            if code in _CONDITION_FAILED:
                self._restart()
            raise
        async with answer["Body"] as body:
            self._check(answer, first)
            assert self.length is not None
            # To the end, so that the connection can be reused.
            while chunk := await body.read(CHUNK_BYTES):
                self.chunks.append(chunk)
                self.held += len(chunk)
                self.received += len(chunk)
        if (got := self.held) != self.length:
            if got > self.length:
                self._clear()
            raise ConnectionError(f"{got} bytes arrived of {self.length}")

    def _check(self, answer: Mapping[str, Any], first: int) -> None:
        """Compare the answer's headers with the request.

        The body is complete by Content-Range: Content-Length is sometimes wrong.
        """
        requested = self.requested
        if "ETag" not in answer:
            raise not_s3(requested.name)
        if self.etag is not None and answer["ETag"] != self.etag:
            self._restart()
        shown = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if shown is None:
            if first or requested.length is not None:
                raise StorageError(
                    f"storage: {requested.name}: the server does not answer range requests; use "
                    "another"
                )
            begin, end, total = 0, answer["ContentLength"] - 1, answer["ContentLength"]
        else:
            begin, end, total = (int(number) for number in shown.groups())
        requested.check_size(total)
        self.etag = answer["ETag"]
        if self.length is None:
            self.length = total - requested.start
        if total < requested.start + self.length:
            raise requested.ends_early(total)
        if (begin, end) != (first, requested.start + self.length - 1):
            raise ConnectionError(f"asked from byte {first}, answered bytes {begin} to {end}")

    def _handle_end(self, total: int) -> None:
        """The range starts at the object's end: it is empty, or shorter than requested."""
        if self.requested.length is not None:
            raise self.requested.ends_early(total)
        if total or self.held:
            self._restart()

    def _restart(self) -> NoReturn:
        self._clear()
        raise ConnectionError("replaced while it was read")


def put_object(fs: Any, path: str, data: bytes, **options: Any) -> None:
    """One PUT, never a multipart upload, whose end ignores If-None-Match on some servers. Raises
    ValueError above 5 GiB, S3's limit of a PUT."""
    if len(data) > _MAX_PUT_BYTES:
        raise ValueError(f"{len(data)} bytes are more than the 5 GiB of one PUT")
    bucket, key, _ = fs.split_path(path)
    digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=digest, **options)


def create_object(fs: Any, path: str, data: bytes, writer: str) -> bool:
    """PUT `data` unless the object exists. Returns whether `writer` created it.

    A HEAD goes first, as some servers ignore If-None-Match. `writer` is stored as metadata: a PUT
    that is repeated, because its answer was lost, finds its own object.
    """
    mark = {"Metadata": {"pneumo-writer": writer}}
    bucket, key, _ = fs.split_path(path)

    def is_ours() -> bool:
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
        return bool(head["Metadata"].get("pneumo-writer") == writer)

    try:
        return is_ours()
    except FileNotFoundError:
        pass
    except OSError as error:
        if not _lacks_reason(error):
            raise
    try:
        put_object(fs, path, data, IfNoneMatch="*", **mark)
    except OSError as error:
        code, _ = s3_error(error)
        if code in _CONDITION_FAILED:
            try:
                return is_ours()
            except FileNotFoundError:  # it has been removed since
                return create_object(fs, path, data, writer)
        if code not in {"NotImplemented", "501"}:
            raise
        put_object(fs, path, data, **mark)
    return True


def _lacks_reason(error: OSError) -> bool:
    """Whether the server refused a HEAD: a request with a body in its answer is told why. AWS
    answers 400 to an expired token, 301 from another region."""
    return isinstance(error, PermissionError) or s3_error(error)[0] in {"301", "400"}


def list_keys(url: str, **options: Any) -> list[str]:
    """The keys below `url`, requested in pages of at most 1,000, each retried by itself; with
    `Delimiter="/"` the keys and folders directly below it."""
    keys: list[str] = []
    position: dict[str, str] = {}
    while True:
        page = retried(partial(_list_page, **options, **position), url)
        found = [entry["Key"] for entry in page.get("Contents", ())]
        # Consoles create a key with a final slash for an empty folder.
        keys += [key for key in found if not key.endswith("/")]
        keys += [entry["Prefix"].rstrip("/") for entry in page.get("CommonPrefixes", ())]
        if not page.get("IsTruncated"):
            return keys
        position = {"ContinuationToken": page["NextContinuationToken"]}


def _list_page(fs: Any, path: str, **options: Any) -> Mapping[str, Any]:
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    page: Mapping[str, Any] = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)
    if "Name" not in page:
        raise not_s3(f"s3://{path}")
    return page


def object_exists(fs: Any, path: str) -> bool:
    """Whether `path` is an object, or the prefix of one below it."""
    bucket, key, _ = fs.split_path(path)
    refusal = None
    if key:
        try:
            fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            pass
        except OSError as error:
            if not _lacks_reason(error):
                raise
            refusal = error
        else:
            return True
    # Unlike HEAD, this request has a body in its answer that says why it was refused.
    page = _list_page(fs, path, MaxKeys=1)
    if page.get("Contents"):
        return True
    if refusal is not None:
        raise refusal
    return False
