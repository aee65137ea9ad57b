"""Trying again within a budget of time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pneumo.errors import StorageError
from pneumo.storage.connection import open_filesystem
from pneumo.storage.failures import describe, name_kind, permanent_error

T = TypeVar("T")

_logger = logging.getLogger(__name__)

RETRY_BUDGET_S = 120.0
"""How long a failing read or write is tried again before StorageError; a read that gets on begins
it anew."""


_FIRST_PAUSE_S = 0.2


_LONGEST_PAUSE_S = 15.0


_SILENT_RETRIES_S = 5.0
"""How long a request fails before a line is said about it."""


CHUNK_BYTES = 2**20


def retried(
    call: Callable[[Any, str], T],
    url: str,
    budget_s: float = RETRY_BUDGET_S,
    progress: Callable[[], int] = lambda: 0,
    label: str | None = None,
) -> T:
    """Run `call(filesystem, path)`, again with jittered exponential back-off while the trouble
    looks passing.

    `budget_s` counts from the first failure, and anew once `progress`, in bytes, has grown by a
    chunk since. With a `label` neither the URL nor the text of an error, which may quote it, is
    told.
    """
    name, describe = (url, describe) if label is None else (label, name_kind)
    failing_since_s, pause_s, told = None, _FIRST_PAUSE_S, False
    reached = renewed_at = 0
    while True:
        try:
            fs, path = open_filesystem(url)
            return call(fs, path)
        except Exception as error:
            cause = error if label is None else None
            lasting = permanent_error(error, name, describe)
            if lasting is not None:
                raise lasting from cause
            now_s, now_reached = time.monotonic(), progress()
            if now_reached > reached:
                pause_s, reached = _FIRST_PAUSE_S, now_reached
            if failing_since_s is None or reached >= renewed_at + CHUNK_BYTES:
                failing_since_s, renewed_at = now_s, reached
            left_s = budget_s - (now_s - failing_since_s)
            if pause_s > left_s:
                raise StorageError(
                    f"storage: {name}: {describe(error)}; tried again for {budget_s:.0f} s; is the "
                    "server up, and is it the one of AWS_ENDPOINT_URL?"
                ) from cause
            if left_s < budget_s - _SILENT_RETRIES_S and not told:
                _logger.warning(
                    "storage: %s: %s; trying again for %.0f s", name, describe(error), left_s
                )
                told = True
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
