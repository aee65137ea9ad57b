"""Child processes that have loaded a package."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def find_users(package: str) -> set[int]:
    """The ids of child processes that have mapped a shared library of the package."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(f"/site-packages/{package}/" in file.path for file in process.memory_maps()):
                found.add(process.pid)
    return found


@contextmanager
def new_users(package: str) -> Iterator[set[int]]:
    """The child processes that load it during the block, but for very short ones."""
    before, found, ended = find_users(package), set[int](), threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            found.update(find_users(package) - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
