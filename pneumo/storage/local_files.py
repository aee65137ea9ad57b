"""Objects that are files of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pneumo.errors import AccessError, StorageError
from pneumo.storage.failures import ends_early
from pneumo.storage.urls import local_path

T = TypeVar("T")

PARTIAL_PREFIX = ".partial-"
"""How a local file is named while it is written; what a crash leaves of it is no object."""


_MOST_ATTEMPTS = 5
"""How often a local file is begun whose unfinished copy another job clears away."""


def read_file(url: str, start: int, length: int | None, label: str | None) -> bytes:
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
        raise ends_early(label or url, start, length, start + len(data))
    return data


def publish_file(
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


def link(partial: Path, path: Path) -> bool:
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
    """`link` without links: a reader may meet the empty file for a moment."""
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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PARTIAL_PREFIX, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):  # a mount whose files have no modes
                Path(file.name).chmod(mode)
            yield Path(file.name)
        finally:
            Path(file.name).unlink(missing_ok=True)


def is_object(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(PARTIAL_PREFIX)


def walk(folder: Path) -> Iterator[str]:
    """The paths of all objects below a folder of this machine; no link to a folder is followed."""
    for entry in scan(folder):
        if is_kind(entry.is_file):
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))


def scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder of this machine, unfinished files aside; nothing where there is none.

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


def is_kind(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except OSError:  # a link that leads to itself
        return False
