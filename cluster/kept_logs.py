"""Logs of a run's earlier attempts, where `jobs.terminal.log_keeper` kept them.

Read with the laptop's own credentials, which may not do: then it is said where they are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from pneumo import storage
from pneumo.errors import PneumoError

PATIENCE_S = 20.0
"""How long the storage may take; a person waits for the log."""


@dataclass(frozen=True)
class KeptLog:
    """What one attempt said; `name` is when it began."""

    name: str
    text: str


def read(folder_url: str, patience_s: float = PATIENCE_S) -> list[KeptLog]:
    """The logs below `folder_url`, oldest first. Raises PneumoError when they cannot be had."""
    found: list[KeptLog] = []
    errors: list[Exception] = []

    def collect() -> None:
        try:
            for name in storage.list_names(folder_url):
                text = storage.read_bytes(storage.join(folder_url, name)).decode(errors="replace")
                found.append(KeptLog(name.removesuffix(".log"), text))
        except Exception as error:  # raised again where the caller can see it
            errors.append(error)

    # Storage is tried again for longer than a person waits.
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        raise PneumoError(f"{folder_url}: no answer within {patience_s:g} s")
    if errors:
        raise PneumoError(f"{folder_url}: {errors[0]}") from errors[0]
    return found
