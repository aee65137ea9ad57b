"""A file of a source that cannot be read is a row, whatever its name, size or state."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import boto3
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from pneumo import storage
from pneumo.errors import AccessError, DeniedError, TooLargeError
from pneumo.images.dicom_files import UnusableFile, read_pictures
from pneumo.images.packed_files import MAX_BYTES
from pneumo.storage.failures import permanent_error
from tests.pneumo.storage.conftest import BUCKET, answer

PATIENT = "DOE^JOHN^19600101.png"


def encode_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def read(*urls: str) -> list[UnusableFile | None]:
    """For each file None, or why it is unusable."""
    images = read_pictures(urls, 32)
    return [image if isinstance(image, UnusableFile) else None for image in images]


class Ward(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory; what has the patient's name is refused, as listing may be."""

    protocol = "ward"
    can_list: ClassVar[bool] = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("ward://")))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        if PATIENT in path:
            raise PermissionError("Access Denied")
        data: bytes = super().cat_file(path, **kwargs)
        return data

    def size(self, path: str) -> int:
        return MAX_BYTES + 1 if path.endswith(".iso") else int(super().size(path))

    def exists(self, path: str, **kwargs: Any) -> bool:
        if not self.can_list:
            raise PermissionError("Access Denied")
        return bool(super().exists(path, **kwargs))


fsspec.register_implementation("ward", Ward)


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[str]:
    yield f"ward://{tmp_path}"
    Ward.can_list = True


def test_an_archived_object_is_a_row(bucket_url: str) -> None:
    png, client = encode_png(), boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key=f"q/{PATIENT}", Body=png, StorageClass="GLACIER")
    storage.write_bytes(f"{bucket_url}/q/b.png", png)
    archived, other = read(f"{bucket_url}/q/{PATIENT}", f"{bucket_url}/q/b.png")
    assert other is None
    assert archived is not None
    assert archived.reason == "unreadable"
    assert "InvalidObjectState" in archived.message
    assert "DOE" not in archived.message


def test_a_refused_object_is_a_row_where_listing_works(ward: str) -> None:
    urls = f"{ward}/{PATIENT}", f"{ward}/b.png"
    for url in urls:
        storage.write_bytes(url, encode_png())
    refused, other = read(*urls)
    assert other is None
    assert refused is not None
    assert (refused.reason, "DOE" in refused.message) == ("unreadable", False)
    Ward.can_list = False
    with pytest.raises(AccessError) as error:
        read(*urls)
    assert "DOE" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("AccessDenied", DeniedError),
        ("InvalidObjectState", DeniedError),
        ("ExpiredToken", AccessError),
        ("InvalidAccessKeyId", AccessError),
    ],
)
def test_what_is_wrong_with_the_key_is_no_fault_of_an_object(
    code: str, kind: type[Exception]
) -> None:
    assert type(permanent_error(answer(code, 403), "s3://b/k")) is kind


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png())
    (tmp_path / "disk.iso").touch()
    os.truncate(tmp_path / "disk.iso", 20 * 2**30)
    huge, other = read(str(tmp_path / "disk.iso"), str(tmp_path / "a.png"))
    assert other is None
    assert huge is not None
    assert huge.reason == "too_large"


def test_a_huge_object_is_not_read(root_url: str, ward: str) -> None:
    storage.write_bytes(f"{root_url}/a", bytes(9))
    assert storage.read_bytes(f"{root_url}/a", max_bytes=9) == bytes(9)
    with pytest.raises(TooLargeError, match="9 bytes, over 8"):
        storage.read_bytes(f"{root_url}/a", max_bytes=8)
    storage.write_bytes(f"{ward}/disk.iso", b"")  # it claims to be large
    (huge,) = read(f"{ward}/disk.iso")
    assert huge is not None
    assert huge.reason == "too_large"


@pytest.mark.parametrize("name", ["a::b.png", "p/a::b.png", "s3::c/d.png", "::"])
def test_a_key_with_colons_is_a_key(root_url: str, name: str) -> None:
    url = f"{root_url}/{name}"
    storage.write_bytes(url, encode_png())
    assert read(url) == [None]
    if not root_url.startswith("file:"):
        assert url in storage.list_urls(root_url)
    storage.remove(url)
    assert not storage.exists(url)
