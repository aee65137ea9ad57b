"""Files of pictures one after the other: their bytes and pictures, or why there are none."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from pneumo import storage
from pneumo.errors import AccessError, DicomError, StorageError
from pneumo.images.dicom import GrayImage, read_study_image
from pneumo.images.input_checks import check_image, check_pixels
from pneumo.images.packed_files import MEMBER, read_member, unpack
from pneumo.images.pictures import is_picture, read_picture

_READS_AT_ONCE = 8
"""Files of a bucket that are read ahead: an answer takes as long as decoding ten."""


@dataclass(frozen=True)
class UnusableFile:
    """Why there is no picture; nothing here names a patient."""

    reason: str
    """missing, unreadable, or a code of `pneumo.errors.DicomError`."""
    message: str


def read_pictures(urls: Sequence[str], image_size: int) -> Iterator[GrayImage | UnusableFile]:
    """The pictures of files as a store holds them, in the order of `urls`.

    Raises AccessError and StorageError for a bucket that is away: that says nothing about a file.
    """
    for data in read_files([(url, None) for url in urls]):
        yield data if isinstance(data, UnusableFile) else decode_file(data, image_size)


def decode_file(data: bytes, image_size: int) -> GrayImage | UnusableFile:
    """The picture in a DICOM, PNG, JPEG or TIFF file as a store of `image_size` holds it, checked
    by `input_checks`."""
    try:
        data = unpack(data)
        if is_picture(data):
            image = read_picture(data, image_size)
            return replace(image, warnings=check_pixels(image))
        image = read_study_image(data, image_size)
        return replace(image, warnings=(*image.warnings, *check_image(image)))
    except DicomError as error:
        return UnusableFile(error.reason, str(error))


def read_files(files: Sequence[tuple[str, str | None]]) -> Iterator[bytes | UnusableFile]:
    """What each of the files holds, in their order, given as (url, what errors call it); from a
    bucket some are read while one is in use."""
    if all(storage.is_local(url) for url, _ in files):
        for url, label in files:
            yield read_file(url, label)
        return
    coming = deque[Future[bytes | UnusableFile]]()
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="pneumo-read") as pool:
        try:
            for url, label in files:
                coming.append(pool.submit(read_file, url, label))
                if len(coming) > _READS_AT_ONCE:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_file(url: str, label: str | None) -> bytes | UnusableFile:
    """What the file holds; `label` is what errors call it. Raises as `read_pictures`."""
    try:
        return read_member(url) if MEMBER in url else storage.read_bytes(url, label=label)
    except DicomError as error:
        return UnusableFile(error.reason, str(error))
    except FileNotFoundError:
        return UnusableFile("missing", "no such file")
    except (AccessError, StorageError) as error:
        if not storage.is_local(url):
            raise
        return UnusableFile("unreadable", type(error.__cause__).__name__)
