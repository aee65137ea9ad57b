"""A local folder of blocks read before, each named by its BLAKE3. Several processes may share it.

Nothing in it is trusted: a block is compared with its name whenever it is read, and one that was
damaged is forgotten. Nothing depends on it either: where it cannot be written (a full disk), blocks
come from the store.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock

from blake3 import blake3

from pneumo import storage
from pneumo.errors import ConfigError

_BLOCK_NAME = re.compile(r"[0-9a-f]{64}")
_PARTIAL_PREFIX = ".partial-block-"
_PARTIAL_LIFE_S = 3600.0
"""After this time a file that is still partial belongs to a process that died."""

_COUNT_AGAIN_SHARE = 0.01
"""Each process counts the folder anew after it has written this share of the limit, because others
write too; so all together exceed the limit by at most this share each."""

_logger = logging.getLogger(__name__)


class BlockCache:
    """The blocks in a folder, at most `limit_bytes` of them.

    To make room those used longest ago go first, but none that was used since this object was made:
    an epoch reads every block once in another order, and the least recently used of them is as soon
    needed as any. With half of a split in the cache, evicting it would leave 15 % hits instead of
    50 %. When all have been used, new ones are not kept.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """Raises ConfigError when the folder cannot be made or written."""
        self.folder = storage.local_path(folder)
        self.limit_bytes = limit_bytes
        self._opened_at_s = time.time()
        self._lock = Lock()
        self._counted_bytes: int | None = None
        self._written_bytes = 0
        self._has_old_blocks = True
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir: cannot write {self.folder}: {error.strerror}"
            ) from error

    def find(self, digest: str) -> bytes | None:
        """The block with this digest; None where it is not here, or not what its name says."""
        path = self.folder / digest
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if blake3(data).hexdigest() != digest:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another process has just removed it
            _stamp(path)
        return data

    def keep(self, digest: str, data: bytes) -> None:
        """Store a block whose digest the caller has checked, if there is room."""
        try:
            if self._make_room(len(data)):
                self._write(self.folder / digest, data)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _logger.warning("data.cache_dir: %s: %s; not kept", self.folder, error.strerror)

    def _write(self, path: Path, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(
            dir=self.folder, prefix=_PARTIAL_PREFIX, delete=False
        ) as file:
            partial = Path(file.name)
            try:
                # Not flushed to disk: what a crash leaves of it fails its digest.
                file.write(data)
                file.close()
                _stamp(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, wanted_bytes: int) -> bool:
        """Count `wanted_bytes` as written if they fit, after removing old blocks if need be."""
        with self._lock:
            counted = self._counted_bytes
            if counted is None or self._written_bytes > _COUNT_AGAIN_SHARE * self.limit_bytes:
                counted, self._written_bytes = self._shrink_to(self.limit_bytes), 0
            if counted + wanted_bytes > self.limit_bytes and self._has_old_blocks:
                # A twentieth at once, so that not every block counts the folder.
                roomy_bytes = min(self.limit_bytes - wanted_bytes, int(0.95 * self.limit_bytes))
                counted = self._shrink_to(max(roomy_bytes, 0))
            fits = counted + wanted_bytes <= self.limit_bytes
            if fits:
                counted += wanted_bytes
                self._written_bytes += wanted_bytes
            self._counted_bytes = counted
            return fits

    def _shrink_to(self, target_bytes: int) -> int:
        """Remove blocks not used since this object was made, until `target_bytes` are left or none
        is old; the bytes left."""
        found = self._list_blocks()
        old = [block for block in found if block[0] < self._opened_at_s]
        total = sum(size for _, size, _ in found)
        removed = 0
        for _, size, path in sorted(old):
            if total <= target_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
            removed += 1
        self._has_old_blocks = removed < len(old)
        return total

    def _list_blocks(self) -> list[tuple[float, int, Path]]:
        """When each block was last used, in s, its size, and where it is."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if _BLOCK_NAME.fullmatch(entry.name):  # nobody else's files are touched
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
                elif (
                    entry.name.startswith(_PARTIAL_PREFIX)
                    and status.st_mtime < time.time() - _PARTIAL_LIFE_S
                ):
                    Path(entry.path).unlink(missing_ok=True)
        return found


def _stamp(path: Path) -> None:
    """Note the use: by our own clock, since the file system's lags behind it by some ms."""
    now_s = time.time()
    os.utime(path, (now_s, now_s))
