"""One way to read and write bytes by URL: a local path, `file://`, `s3://`, or what fsspec speaks.

Writing is atomic: a reader sees the whole object or none. Errors are those of `pneumo.errors`,
except that a missing object is Python's own FileNotFoundError, for the caller to say what was
missing. Credentials and endpoints follow the AWS conventions (profiles, AWS_ENDPOINT_URL, IRSA);
nothing is configured here, and no URL is ever handed to a shell.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pneumo.errors import AccessError, StorageError, UserError

T = TypeVar("T")

RETRY_BUDGET_S = 120.0
"""How long a failing read or write is tried again before StorageError."""

_PARTIAL_PREFIX = ".partial-"
"""How a local file is named while it is written; what a crash leaves of it is no object."""

_SHELL_SCHEMES = frozenset({"pipe", "cmd", "sh", "bash", "ssh", "sftp"})


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


def read_bytes(url: str) -> bytes:
    """The whole object at `url`. Raises FileNotFoundError, AccessError or StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    data: bytes = _retried(lambda fs, path: fs.cat_file(path), url)
    return data


def read_text(url: str) -> str:
    """The whole object at `url`, as UTF-8."""
    return read_bytes(url).decode()


def write_bytes(url: str, data: bytes) -> None:
    """Publish `data` at `url` at once, replacing what was there.

    Local: written beside, flushed to disk, renamed. Object store: one PUT, which is atomic there.
    """
    if not is_local(url):
        _retried(lambda fs, path: fs.pipe_file(path, data), url)
        return
    path = local_path(url)
    try:
        _replace(path, data)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise AccessError(f"storage: cannot write {path}: {error.strerror}") from error
    except OSError as error:  # a full disk, a lost mount
        raise StorageError(f"storage: cannot write {path}: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PARTIAL_PREFIX, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def write_text(url: str, text: str) -> None:
    """Publish `text` at `url` as UTF-8, at once."""
    write_bytes(url, text.encode())


def exists(url: str) -> bool:
    """Whether an object, or a folder with something in it, lies at `url`."""
    if is_local(url):
        return local_path(url).exists()
    return bool(_retried(lambda fs, path: fs.exists(path), url))


def list_urls(url: str) -> list[str]:
    """The URLs of all objects below `url`, sorted; empty when there are none."""
    if is_local(url):
        root = local_path(url)
        return sorted(str(path) for path in root.rglob("*") if _is_object(path))
    scheme = url.split("://", 1)[0]
    found = _retried(lambda fs, path: fs.find(path), url)
    return sorted(f"{scheme}://{path}" for path in found)


def list_names(url: str) -> list[str]:
    """The names of the files and folders directly below `url`, sorted; empty when there are
    none."""
    if is_local(url):
        folder = local_path(url)
        paths = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in paths if path.is_dir() or _is_object(path))
    try:
        found = _retried(lambda fs, path: fs.ls(path, detail=False), url)
    except FileNotFoundError:
        return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)


def remove(url: str) -> None:
    """Delete the object at `url`; nothing happens when it is not there."""
    try:
        if is_local(url):
            local_path(url).unlink()
        else:
            _retried(lambda fs, path: fs.rm_file(path), url)
    except FileNotFoundError:
        pass


def upload_folder(folder: Path, url: str) -> None:
    """Publish every file below `folder` under `url`, by its relative name."""
    for path in sorted(folder.rglob("*")):
        if _is_object(path):
            write_bytes(join(url, path.relative_to(folder).as_posix()), path.read_bytes())


def _is_object(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(_PARTIAL_PREFIX)


def _retried(call: Callable[[Any, str], T], url: str, budget_s: float = RETRY_BUDGET_S) -> T:
    """Run `call(filesystem, path)`, again with jittered back-off while the trouble looks
    passing."""
    deadline_s = time.monotonic() + budget_s
    pause_s = 0.2
    while True:
        try:
            # Listings are not cached: keys that another process adds must be seen. fsspec keeps the
            # instance, and makes another after a fork.
            fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
            return call(fs, path)
        except FileNotFoundError as error:
            if _code(error.__cause__) == "NoSuchBucket":
                raise AccessError(f"storage: no such bucket: {url}; create it first") from error
            raise
        except PermissionError as error:
            raise AccessError(f"storage: access to {url} refused: {_first_line(error)}") from error
        except Exception as error:
            if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
                raise AccessError(
                    f"storage: no credentials for {url}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY"
                ) from error
            if time.monotonic() + pause_s > deadline_s or isinstance(
                error, (TypeError, ValueError)
            ):
                raise StorageError(f"storage: {url}: {_first_line(error)}") from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 15.0)


def _code(error: BaseException | None) -> str | None:
    """The S3 error code of a botocore ClientError; a message may quote a key that looks like
    one."""
    response = getattr(error, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
