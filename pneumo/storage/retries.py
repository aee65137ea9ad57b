"""Retries of requests to a server, within a time budget, while the failure looks transient."""

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pneumo.errors import StorageError
from pneumo.storage.connection import open_filesystem
from pneumo.storage.failures import first_line, has_no_credentials, permanent_error
from pneumo.storage.urls import root

T = TypeVar("T")

RETRY_BUDGET_S = 120.0
"""How long a failing request is retried before StorageError."""

CHUNK_BYTES = 2**20
"""Bytes of a read after which its budget starts again."""

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 15.0
_SILENT_RETRIES_S = 5.0
"""A warning is logged after so long a time of retries."""

_answered = set[str]()
"""Buckets that this process has had an answer of, so that it has had credentials for them."""

_logger = logging.getLogger(__name__)


def retried(
    call: Callable[[Any, str], T],
    url: str,
    budget_s: float = RETRY_BUDGET_S,
    progress: Callable[[], int] = lambda: 0,
    label: str | None = None,
) -> T:
    """The result of `call(filesystem, path)`, retried with jittered exponential back-off.

    `budget_s` counts from the first failure, and again from 0 when `progress`, in bytes, has grown
    by CHUNK_BYTES. `label` replaces the URL in messages, which then do not quote the error's text
    either, as it may contain the URL. Raises the errors of `permanent_error`, and StorageError when
    the budget is spent.
    """
    name = label or url
    failing_since_s, pause_s, is_warned, reached, renewed_at = None, _FIRST_PAUSE_S, False, 0, 0
    while True:
        try:
            fs, path = open_filesystem(url)
            result = call(fs, path)
        except Exception as error:
            text = first_line(error) if label is None else type(error).__name__
            cause = error if label is None else None
            has_lost_credentials = has_no_credentials(error) and root(url) in _answered
            permanent = None if has_lost_credentials else permanent_error(error, name, text)
            if permanent is not None:
                raise permanent from cause
            now_s, now_reached = time.monotonic(), progress()
            if now_reached > reached:
                pause_s, reached = _FIRST_PAUSE_S, now_reached
            if failing_since_s is None or reached >= renewed_at + CHUNK_BYTES:
                failing_since_s, renewed_at = now_s, reached
            left_s = budget_s - (now_s - failing_since_s)
            if pause_s > left_s:
                raise StorageError(
                    f"storage: {name}: {text}; tried again for {budget_s:.0f} s; is the server up, "
                    "and is it the one of AWS_ENDPOINT_URL?"
                ) from cause
            if left_s < budget_s - _SILENT_RETRIES_S and not is_warned:
                _logger.warning("storage: %s: %s; trying again for %.0f s", name, text, left_s)
                is_warned = True
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        else:
            _answered.add(root(url))
            return result
