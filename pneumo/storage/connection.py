"""Connections to servers: fsspec's filesystems, with time limits.

Credentials and endpoints follow the AWS conventions (profiles, AWS_ENDPOINT_URL, IRSA).
"""

import os
from typing import Any

import fsspec

from pneumo.errors import UserError
from pneumo.storage.urls import is_s3, root

ANONYMOUS = "PNEUMO_S3_ANONYMOUS"
"""Environment variable: 1 sends S3 requests unsigned, for public buckets."""

READ_TIMEOUT_S = 20.0
"""A request fails after this time without a byte from the object store."""

_S3_OPTIONS = {
    "connect_timeout": 5.0,
    "read_timeout": READ_TIMEOUT_S,
    # Retries are made in `retries.py` alone, within one time budget.
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    # Older servers refuse these checksums; all support Content-MD5.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "max_pool_connections": 32,
}


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The process's filesystem for `url`, and the path in it; with `options` of botocore for S3.

    fsspec caches the instance, and creates another after a fork. Listings are not cached, as other
    processes add keys. Raises UserError for an invalid PNEUMO_S3_ANONYMOUS.
    """
    # Of the root alone: in a key `::` would be taken for a chain of filesystems.
    root_url = root(url)
    key = url.removeprefix(root_url).removeprefix("/").rstrip("/")
    if not is_s3(url):
        fs, root_path = fsspec.url_to_fs(root_url, use_listings_cache=False)
        return fs, f"{root_path.rstrip('/')}/{key}" if key else root_path
    value = os.environ.get(ANONYMOUS, "").lower()
    if value not in {"", "0", "false", "1", "true"}:
        raise UserError(f"{ANONYMOUS}={value}: expected 1 or 0")
    fs, root_path = fsspec.url_to_fs(
        root_url,
        use_listings_cache=False,
        anon=value in {"1", "true"},
        config_kwargs=_S3_OPTIONS | options,
    )
    fs.retries = 1
    return fs, f"{root_path}/{key}" if key else root_path
