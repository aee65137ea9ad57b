"""How a server is reached."""

from __future__ import annotations

import os
from typing import Any

import fsspec

from pneumo.errors import UserError
from pneumo.storage.urls import is_s3

ANONYMOUS = "PNEUMO_S3_ANONYMOUS"
"""The environment variable that has S3 requests sent without a signature."""


CONNECT_TIMEOUT_S = 5.0


READ_TIMEOUT_S = 20.0
"""How long an object store may be silent before the request counts as failed."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The process's filesystem for `url`, and the path in it.

    fsspec keeps the instance, and makes another after a fork. Listings are not cached: keys that
    another process adds must be seen.
    """
    if not is_s3(url):
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        return fs, path
    fs, path = fsspec.url_to_fs(
        url,
        use_listings_cache=False,
        anon=_is_anonymous(),
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            # Trying again is done here, in one place and within one budget.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Servers older than these checksums refuse them; Content-MD5 they all know.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "max_pool_connections": 32,
        },
    )
    fs.retries = 1
    return fs, path


def _is_anonymous() -> bool:
    value = os.environ.get(ANONYMOUS, "").lower()
    if value not in {"", "0", "false", "1", "true"}:
        raise UserError(f"{ANONYMOUS}={value}: expected 1 or 0")
    return value in {"1", "true"}
