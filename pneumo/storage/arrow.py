"""The filesystem for libraries that take pyarrow's, as Ray does."""

from pyarrow.fs import FSSpecHandler, PyFileSystem

from pneumo.storage.connection import open_filesystem
from pneumo.storage.urls import is_s3


def open_for_ray(url: str) -> tuple[str, PyFileSystem | None]:
    """`storage_path` and `storage_filesystem` of Ray's RunConfig.

    Ray's own client of S3 knows no proxy, no AWS_CA_BUNDLE and no endpoint of a profile.
    """
    if not is_s3(url):
        return url, None
    # Not by `retries.py`, so the client retries.
    fs, path = open_filesystem(url, retries={"total_max_attempts": 10, "mode": "standard"})
    return path, PyFileSystem(_Objects(fs))


class _Objects(FSSpecHandler):  # type: ignore[misc]  # pyarrow is untyped
    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing, as S3 has no folders: s3fs would look for the bucket, and make it."""
