"""Bytes by URL: a local path, `file://`, `s3://`, or another scheme of fsspec."""

from pneumo.storage.connection import ANONYMOUS, READ_TIMEOUT_S
from pneumo.storage.objects import (
    create_bytes,
    exists,
    find_text,
    list_everything,
    list_names,
    list_urls,
    open_object,
    read_bytes,
    read_range,
    read_text,
    remove,
    remove_below,
    remove_partials,
    upload_folder,
    write_bytes,
    write_text,
)
from pneumo.storage.urls import is_local, join, last_part, local_path, normalise, root

__all__ = [
    "ANONYMOUS",
    "READ_TIMEOUT_S",
    "create_bytes",
    "exists",
    "find_text",
    "is_local",
    "join",
    "last_part",
    "list_everything",
    "list_names",
    "list_urls",
    "local_path",
    "normalise",
    "open_object",
    "read_bytes",
    "read_range",
    "read_text",
    "remove",
    "remove_below",
    "remove_partials",
    "root",
    "upload_folder",
    "write_bytes",
    "write_text",
]
