"""Objects that are files of this machine: written beside their place, flushed, then renamed."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pneumo.errors import AccessError, StorageError
from pneumo.storage.urls import Range, local_path

T = TypeVar("T")

PARTIAL_PREFIX = ".partial-"
"""How a file is named while it is written; what a crash leaves of it is no object."""

_MOST_ATTEMPTS = 5
"""How often a file is begun whose unfinished copy another job clears away."""

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What mounts without hard links say: FUSE, SMB, exFAT."""


def read_file(wanted: Range) -> bytes:
    """The bytes asked for. Raises FileNotFoundError, AccessError, StorageError, ContentError."""
    path = local_path(wanted.url)
    name = wanted.label or path
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a regular file")  # noqa: TRY301  as of a lost mount
        with path.open("rb") as file:
            file.seek(wanted.start)
            data = file.read(wanted.length)
    except (PermissionError, IsADirectoryError) as error:
        raise AccessError(f"storage: cannot read {name}: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(name)) from error
    except OSError as error:  # a lost mount
        raise StorageError(f"storage: cannot read {name}: {error.strerror}") from error
    if wanted.length is not None and len(data) != wanted.length:
        raise wanted.ends_early(wanted.start + len(data))
    return data


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Put `data` at `path` at once. Raises AccessError, StorageError."""
    _publish(path, data, 0o666, lambda partial: partial.replace(path))


def create_file(path: Path, data: bytes, mode: int) -> bool:
    """Put `data` at `path` unless something is there; whether it was this call that did.

    Where a mount has no hard links, an empty file takes the place first, and is replaced: a reader
    may meet it for a moment. Raises AccessError, StorageError.
    """

    def create(partial: Path) -> bool:
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_link(partial, path)
        return True

    return _publish(path, data, mode, create)


def _create_without_link(partial: Path, path: Path) -> bool:
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


def _publish(path: Path, data: bytes | memoryview, mode: int, publish: Callable[[Path], T]) -> T:
    attempts = 0
    while True:
        attempts += 1
        try:
            with _partial_file(path, data, mode) as partial:
                return publish(partial)
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise AccessError(f"storage: cannot write {path}: {error.strerror}") from error
        except OSError as error:  # a full disk, a lost mount
            # Another job may have taken the file for a dead writer's, or its folder for empty.
            if not isinstance(error, FileNotFoundError) or attempts == _MOST_ATTEMPTS:
                raise StorageError(f"storage: cannot write {path}: {error.strerror}") from error


@contextmanager
def _partial_file(path: Path, data: bytes | memoryview, mode: int) -> Iterator[Path]:
    """A file beside `path` with `data` on the disk, which is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}"
    try:
        # The process's umask applies, as to any file.
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers have left below `folder`, and folders that hold nothing."""
    for below, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name.startswith(PARTIAL_PREFIX):
                Path(below, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else writes there, or has removed it
            Path(below).rmdir()


def file_exists(path: Path) -> bool:
    """Whether `path` is a file, or a folder with something in it. Raises as `list_folder` does."""
    return _is(path.is_file) or any(True for _ in _scan(path))


def list_files(folder: Path) -> Iterator[str]:
    """The paths of all objects below `folder`; no link to a folder is followed.

    Raises AccessError, StorageError.
    """
    for entry in _scan(folder):
        if _is(entry.is_file):
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):
            yield from list_files(Path(entry.path))


def walk_folder(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of everything below `folder` that is no folder, or cannot be entered: a link back
    to a folder `above` is not followed, but told."""
    above = (*above, folder.resolve())
    for entry in _scan(folder):
        if not _is(entry.is_dir):
            yield entry.path
            continue
        inner = Path(entry.path)
        if not os.access(inner, os.R_OK | os.X_OK) or inner.resolve() in above:
            yield entry.path
        else:
            yield from walk_folder(inner, above)


def list_folder(folder: Path) -> Iterator[str]:
    """The names of the files and folders in `folder`. Raises AccessError, StorageError."""
    return (e.name for e in _scan(folder) if _is(e.is_file) or _is(e.is_dir))


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, unfinished files aside; nothing where there is none.

    Asks the disk for nothing but the names: a hundred times as fast as looking at each path.
    """
    try:
        with os.scandir(folder) as entries:
            yield from (e for e in entries if not e.name.startswith(PARTIAL_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise AccessError(f"storage: cannot list {folder}: {error.strerror}") from error
    except OSError as error:  # a lost mount
        raise StorageError(f"storage: cannot list {folder}: {error.strerror}") from error


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False
