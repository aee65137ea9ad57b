"""Local files: written under a temporary name in the same folder, flushed, then renamed."""

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
"""Prefix of a file's name while it is written; what a crash leaves is not listed as an object."""

_MAX_ATTEMPTS = 5
"""How often to write a file whose temporary copy another job removes."""

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors of filesystems without hard links: FUSE, SMB, exFAT."""


def read_file(requested: Range) -> bytes:
    """The requested bytes. Raises FileNotFoundError, AccessError, StorageError, ContentError."""
    path = local_path(requested.url)
    name = requested.label or path
    try:
        found = path.stat()
        mode = found.st_mode
        requested.check_size(found.st_size)
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a pipe would block
            raise OSError(errno.EINVAL, "not a regular file")  # noqa: TRY301  as of a lost mount
        with path.open("rb") as file:
            file.seek(requested.start)
            data = file.read(requested.length)
    except (PermissionError, IsADirectoryError) as error:
        raise AccessError(f"storage: cannot read {name}: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(name)) from error
    except OSError as error:  # a lost mount
        raise StorageError(f"storage: cannot read {name}: {error.strerror}") from error
    if requested.length is not None and len(data) != requested.length:
        raise requested.ends_early(requested.start + len(data))
    return data


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically. Raises AccessError, StorageError."""
    _publish(path, data, 0o666, lambda partial: partial.replace(path))


def create_file(path: Path, data: bytes, mode: int) -> bool:
    """Write `data` to `path` unless it exists. Returns whether this call created it.

    On a filesystem without hard links an empty file is created first, then replaced: a reader may
    see it empty for a moment. Raises AccessError, StorageError.
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
            # Another job may have removed the temporary file as a leftover, or its empty folder.
            if not isinstance(error, FileNotFoundError) or attempts == _MAX_ATTEMPTS:
                raise StorageError(f"storage: cannot write {path}: {error.strerror}") from error


@contextmanager
def _partial_file(path: Path, data: bytes | memoryview, mode: int) -> Iterator[Path]:
    """A temporary file in the folder of `path` with `data`, flushed to disk; removed on exit."""
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
    """Delete temporary files of killed writers below `folder`, and empty folders."""
    for below, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name.startswith(PARTIAL_PREFIX):
                Path(below, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another job writes there, or has removed it
            Path(below).rmdir()


def file_exists(path: Path) -> bool:
    """Whether `path` is a file or a folder that is not empty. Raises as `list_folder`."""
    return _is(path.is_file) or any(True for _ in _scan(path))


def list_files(folder: Path) -> Iterator[str]:
    """The paths of all files below `folder`; links to folders are not followed.

    Raises AccessError, StorageError.
    """
    for entry in _scan(folder):
        if _is(entry.is_file):
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):
            yield from list_files(Path(entry.path))


def walk_folder(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """The paths of all that is no folder below `folder`, through links too; and of folders that
    cannot be entered or link back to one of `above`."""
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
    """The entries of a folder without temporary files; none where the folder is missing.

    Reads only the directory: a hundred times as fast as a stat of each path.
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
    except OSError:  # a link to itself
        return False
