"""Parsing and joining URLs. No URL is ever passed to a shell."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import fsspec

from pneumo.errors import ContentError, TooLargeError, UserError

_SHELL_SCHEMES = frozenset({"pipe", "cmd", "sh", "bash", "ssh", "sftp"})


def is_local(url: str) -> bool:
    """Whether `url` is a local path."""
    return "://" not in url or url.startswith("file://")


def is_s3(url: str) -> bool:
    """Whether `url` is an object of an S3 server."""
    return url.startswith(("s3://", "s3a://"))


def local_path(url: str) -> Path:
    """The absolute path of a local URL."""
    if url.startswith("file://"):
        url = unquote(url.removeprefix("file://"))
    path = Path(url)
    with contextlib.suppress(RuntimeError):  # `~name`, where nobody is called so: a file's name
        path = path.expanduser()
    return path.absolute()


def normalise(url: str) -> str:
    """`url` absolute where local, as workers run in other folders, and without a final slash.

    Raises UserError for chained URLs, for a scheme that runs a command or that fsspec does not
    know, and for one without its slashes or its bucket.
    """
    if "::" in url and not is_local(url):
        raise UserError(f"storage: '{url}': chained URLs are refused; use a path, file:// or s3://")
    scheme = url.split(":", 1)[0] if ":" in url else ""
    if scheme in _SHELL_SCHEMES:
        raise UserError(f"storage: '{scheme}:' URLs are refused; use a path, file:// or s3://")
    is_known = scheme in fsspec.available_protocols()
    if is_local(url):
        if is_known and url.startswith(f"{scheme}:/") and not url.startswith("file:///"):
            raise UserError(
                f"storage: '{url}': too few slashes; write s3://bucket/… or file:///folder/…"
            )
        return str(local_path(url))
    if not is_known:
        raise UserError(f"storage: unknown scheme in '{url}'; use a path, file:// or s3://")
    if url.rstrip("/").endswith(":"):
        raise UserError(f"storage: '{url}': names no bucket")
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended.

    Parts come from listings, archives and tables of others: one with `..`, which could lead out of
    `url`, raises ContentError.
    """
    if any(".." in part.split("/") for part in parts):
        raise ContentError(f"storage: {url}: refused a name below it with '..' in it")
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def root(url: str) -> str:
    """The scheme and bucket of `url`."""
    return "/".join(url.split("/", 3)[:3])


def last_part(url: str) -> str:
    """The last part of `url`: the name of a run or a store."""
    return normalise(url).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Range:
    """A range of an object's bytes: `length` from `start` on, or up to its end."""

    url: str
    start: int = 0
    length: int | None = None
    label: str | None = None
    """Replaces the URL in errors where it must not be shown."""
    max_bytes: int | None = None
    """A larger object is not read."""

    @property
    def name(self) -> str:
        """The object's name in errors."""
        return self.label or self.url

    def check_size(self, total: int | None) -> None:
        """Raises TooLargeError for an object of `total` bytes, more than `max_bytes`."""
        if total is not None and self.max_bytes is not None and total > self.max_bytes:
            raise TooLargeError(f"storage: {self.name}: {total} bytes, over {self.max_bytes}")

    def ends_early(self, end: int) -> ContentError:
        """The error for an object of only `end` bytes."""
        assert self.length is not None
        return ContentError(
            f"storage: {self.name}: ends at byte {end}; bytes {self.start} to "
            f"{self.start + self.length - 1} were asked for"
        )
