"""What is asked of an S3 server."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from fsspec.asyn import sync

from pneumo.errors import StorageError
from pneumo.storage.failures import ends_early, not_s3, s3_error
from pneumo.storage.retries import CHUNK_BYTES, retried

_MOST_BYTES_OF_A_PUT = 5 * 2**30


class ResumableRead:
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
            code, _ = s3_error(error)
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

        When the body is whole is known from Content-Range: Content-Length is the connection's, and
        wrong at times.
        """
        if "ETag" not in answer:
            raise not_s3(self.name)
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
            raise ends_early(self.name, self.start, self.length, total)
        if (begin, end) != (first, self.start + self.length - 1):
            raise ConnectionError(f"asked from byte {first}, answered bytes {begin} to {end}")

    async def _end_at(self, head: Mapping[str, Any]) -> None:
        """Beyond the object's end: an empty object, or one that is shorter than asked for."""
        total = head["ContentLength"]
        if self.asked is not None:
            raise ends_early(self.name, self.start, self.asked, total)
        if total or self.held:
            self._begin_again()

    def _begin_again(self) -> NoReturn:
        self._begin()
        raise ConnectionError("replaced while it was read")


def put(fs: Any, path: str, data: bytes, **options: Any) -> None:
    # Never in parts: the end of a multipart upload ignores If-None-Match on some servers.
    if len(data) > _MOST_BYTES_OF_A_PUT:
        raise ValueError(f"{len(data)} bytes are more than the 5 GiB of one PUT")
    bucket, key, _ = fs.split_path(path)
    digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=digest, **options)


def create_object(fs: Any, path: str, data: bytes, writer: str) -> bool:
    """`writer` is kept with the object: a PUT whose answer was lost, and which is therefore sent
    again, finds its own object."""
    mark = {"Metadata": {"pneumo-writer": writer}}
    bucket, key, _ = fs.split_path(path)

    def is_ours() -> bool:
        head = fs.call_s3("head_object", Bucket=bucket, Key=key)
        return bool(head["Metadata"].get("pneumo-writer") == writer)

    try:
        put(fs, path, data, IfNoneMatch="*", **mark)
    except OSError as error:
        code, _ = s3_error(error)
        if code in {"PreconditionFailed", "412"}:
            return is_ours()
        if code not in {"NotImplemented", "501"}:
            raise
    else:
        return True
    try:
        return is_ours()
    except FileNotFoundError:
        put(fs, path, data, **mark)
        return True


def list_pages(url: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    """The answers to one listing below `url`, each of at most 1,000 keys and tried again by
    itself."""
    position: dict[str, str] = {}
    while True:
        page = retried(partial(_list_page, **options, **position), url)
        yield page
        if not page.get("IsTruncated"):
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


def _list_page(fs: Any, path: str, **options: Any) -> Mapping[str, Any]:
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    page: Mapping[str, Any] = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)
    if "Name" not in page:
        raise not_s3(f"s3://{path}")
    return page


def object_exists(fs: Any, path: str) -> bool:
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
