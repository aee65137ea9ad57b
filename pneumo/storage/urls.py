"""What a URL names, and how URLs are put together. No URL is ever handed to a shell."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import fsspec

from pneumo.errors import ContentError, UserError

_SHELL_SCHEMES = frozenset({"pipe", "cmd", "sh", "bash", "ssh", "sftp"})


def is_local(url: str) -> bool:
    """Whether `url` names a path of this machine."""
    return "://" not in url or url.startswith("file://")


def is_s3(url: str) -> bool:
    """Whether `url` names an object of an S3 server."""
    return url.startswith(("s3://", "s3a://"))


def local_path(url: str) -> Path:
    """The path that a local URL names, absolute."""
    if url.startswith("file://"):
        url = unquote(url.removeprefix("file://"))
    return Path(url).expanduser().absolute()


def normalise(url: str) -> str:
    """`url` as the jobs pass it on: absolute when local (workers change directory), no final slash.

    Raises UserError for a scheme that would run a command, behind another one too, or that fsspec
    does not know.
    """
    if "::" in url and not is_local(url):
        raise UserError(f"storage: '{url}': chained URLs are refused; use a path, file:// or s3://")
    scheme = url.split(":", 1)[0] if ":" in url else ""
    if scheme in _SHELL_SCHEMES:
        raise UserError(f"storage: '{scheme}:' URLs are refused; use a path, file:// or s3://")
    if is_local(url):
        return str(local_path(url))
    if scheme not in fsspec.available_protocols():
        raise UserError(f"storage: unknown scheme in '{url}'; use a path, file:// or s3://")
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it.

    Parts come from listings, archives and tables that others wrote, so one that would lead out of
    `url` is a ContentError.
    """
    if any(".." in part.split("/") for part in parts):
        raise ContentError(f"storage: {url}: refused a name below it with '..' in it")
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


@dataclass(frozen=True)
class Range:
    """The bytes of an object from `start` on: `length` of them, or all to its end."""

    url: str
    start: int = 0
    length: int | None = None
    label: str | None = None
    """Stands in errors for a URL that must not be shown."""

    @property
    def name(self) -> str:
        """What errors call the object."""
        return self.label or self.url

    def ends_early(self, end: int) -> ContentError:
        """The error for an object that has only `end` bytes."""
        assert self.length is not None
        return ContentError(
            f"storage: {self.name}: ends at byte {end}; bytes {self.start} to "
            f"{self.start + self.length - 1} were asked for"
        )
