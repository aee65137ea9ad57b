"""What is asked of an S3 server."""

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

_MOST_BYTES_OF_A_PUT = 5 * 2**30
_CONDITION_FAILED = frozenset({"PreconditionFailed", "412"})


class ResumableRead:
    """A read from S3 under way: what has arrived so far, and of which version of the object."""

    def __init__(self, wanted: Range) -> None:
        self.wanted = wanted
        self.received = 0
        """All bytes that came, those of a version since replaced too."""
        self._begin()

    def _begin(self) -> None:
        self.chunks: list[bytes] = []
        self.held = 0
        """Bytes in `chunks`."""
        self.length = self.wanted.length
        self.etag: str | None = None

    def resume(self, fs: Any, path: str) -> None:
        """Ask once for what is missing, and take it.

        Raises ContentError when the object ends before; any other error leaves what has come, for
        the next call to go on from.
        """
        sync(fs.loop, self._receive, fs, path)

    async def _receive(self, fs: Any, path: str) -> None:
        first = self.wanted.start + self.held
        last = "" if self.length is None else self.wanted.start + self.length - 1
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
                self._end_at(head["ContentLength"])
                return
            if code in _CONDITION_FAILED:
                self._restart()
            raise
        async with answer["Body"] as body:
            self._check(answer, first)
            assert self.length is not None
            # To the very end, so that the connection can be used again.
            while chunk := await body.read(CHUNK_BYTES):
                self.chunks.append(chunk)
                self.held += len(chunk)
                self.received += len(chunk)
        if (got := self.held) != self.length:
            if got > self.length:
                self._begin()
            raise ConnectionError(f"{got} bytes arrived of {self.length}")

    def _check(self, answer: Mapping[str, Any], first: int) -> None:
        """Compare the answer's head with what was asked.

        Content-Range says when the body is whole: Content-Length is the connection's, and wrong at
        times.
        """
        wanted = self.wanted
        if "ETag" not in answer:
            raise not_s3(wanted.name)
        if self.etag is not None and answer["ETag"] != self.etag:
            self._restart()
        shown = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if shown is None:
            if first or wanted.length is not None:
                raise StorageError(
                    f"storage: {wanted.name}: the server does not answer range requests; use "
                    "another"
                )
            begin, end, total = 0, answer["ContentLength"] - 1, answer["ContentLength"]
        else:
            begin, end, total = (int(number) for number in shown.groups())
        self.etag = answer["ETag"]
        if self.length is None:
            self.length = total - wanted.start
        if total < wanted.start + self.length:
            raise wanted.ends_early(total)
        if (begin, end) != (first, wanted.start + self.length - 1):
            raise ConnectionError(f"asked from byte {first}, answered bytes {begin} to {end}")

    def _end_at(self, total: int) -> None:
        """Beyond the object's end: an empty object, or one that is shorter than asked for."""
        if self.wanted.length is not None:
            raise self.wanted.ends_early(total)
        if total or self.held:
            self._restart()

    def _restart(self) -> NoReturn:
        self._begin()
        raise ConnectionError("replaced while it was read")


def put_object(fs: Any, path: str, data: bytes, **options: Any) -> None:
    """One PUT, never in parts: the end of a multipart upload ignores If-None-Match on some
    servers. Raises ValueError above the 5 GiB that S3 takes so."""
    if len(data) > _MOST_BYTES_OF_A_PUT:
        raise ValueError(f"{len(data)} bytes are more than the 5 GiB of one PUT")
    bucket, key, _ = fs.split_path(path)
    digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=digest, **options)


def create_object(fs: Any, path: str, data: bytes, writer: str) -> bool:
    """PUT `data` unless an object is there; whether it was this writer that did.

    `writer` is kept with the object: a PUT whose answer was lost, and which is therefore sent
    again, finds its own object.
    """
    mark = {"Metadata": {"pneumo-writer": writer}}
    bucket, key, _ = fs.split_path(path)

    def is_ours() -> bool:
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
        return bool(head["Metadata"].get("pneumo-writer") == writer)

    try:
        put_object(fs, path, data, IfNoneMatch="*", **mark)
    except OSError as error:
        code, _ = s3_error(error)
        if code in _CONDITION_FAILED:
            return is_ours()
        if code not in {"NotImplemented", "501"}:
            raise
    else:
        return True
    try:
        return is_ours()
    except FileNotFoundError:
        put_object(fs, path, data, **mark)
        return True


def list_keys(url: str, **options: Any) -> list[str]:
    """The keys below `url`, asked for in pages of at most 1,000, each tried again by itself; with
    `Delimiter="/"` those directly below it, and the folders."""
    keys: list[str] = []
    position: dict[str, str] = {}
    while True:
        page = retried(partial(_list_page, **options, **position), url)
        found = [entry["Key"] for entry in page.get("Contents", ())]
        # A key with a final slash is how consoles draw an empty folder.
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
    """Whether an object, or one below it, is at `path`."""
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
