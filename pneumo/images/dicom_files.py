"""Reading image files of any supported format: their bytes and images, or why they are unusable."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from pneumo import storage
from pneumo.errors import AccessError, DeniedError, DicomError, StorageError, TooLargeError
from pneumo.images.dicom import GrayImage, read_study_image
from pneumo.images.input_checks import check_image, check_pixels
from pneumo.images.packed_files import MAX_BYTES, is_archive, is_member, read_member, unpack
from pneumo.images.pictures import is_picture, read_picture

_READS_AT_ONCE = 8
"""Files of a bucket to read ahead: a request takes as long as decoding ten."""


@dataclass(frozen=True)
class UnusableFile:
    """Why a file is unusable; contains nothing that identifies a patient."""

    reason: str
    """missing, unreadable, or a code of `pneumo.errors.DicomError`."""
    message: str


def read_pictures(urls: Sequence[str], image_size: int) -> Iterator[GrayImage | UnusableFile]:
    """The images of files as in a store of `image_size`, in the order of `urls`.

    Raises AccessError and StorageError for an unavailable bucket, which is no fault of a file.
    """
    labels = [f"a file of {storage.root(url)}" for url in urls]  # its name may be a patient's
    for data in read_files(list(zip(urls, labels, strict=True))):
        yield data if isinstance(data, UnusableFile) else decode_file(data, image_size)


def decode_file(data: bytes, image_size: int) -> GrayImage | UnusableFile:
    """The image of a DICOM, PNG, JPEG or TIFF file as in a store of `image_size`, checked by
    `input_checks`."""
    try:
        data = unpack(data)
        if is_picture(data):
            image = read_picture(data, image_size)
            return replace(image, warnings=check_pixels(image))
        image = read_study_image(data, image_size)
        warnings = dict.fromkeys((*image.warnings, *check_image(image)))
        return replace(image, warnings=tuple(warnings))
    except DicomError as error:
        return UnusableFile(error.reason, str(error))


def read_files(files: Sequence[tuple[str, str]]) -> Iterator[bytes | UnusableFile]:
    """The bytes of each file, in order, given as (url, name in errors); files of a bucket are
    prefetched."""
    if all(storage.is_local(url) for url, _ in files):
        for url, label in files:
            yield read_file(url, label)
        return
    pending = deque[Future[bytes | UnusableFile]]()
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="pneumo-read") as pool:
        try:
            for url, label in files:
                pending.append(pool.submit(read_file, url, label))
                if len(pending) > _READS_AT_ONCE:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_file(url: str, label: str) -> bytes | UnusableFile:
    """The file's bytes; `label` is its name in errors. Raises as `read_pictures`."""
    try:
        if is_member(url) or is_archive(url):  # one that is listed itself is damaged
            return read_member(url)
        return storage.read_bytes(url, label=label, max_bytes=MAX_BYTES)
    except DicomError as error:
        return UnusableFile(error.reason, str(error))
    except FileNotFoundError:
        return UnusableFile("missing", "no such file")
    except TooLargeError:
        return UnusableFile("too_large", f"has more than {MAX_BYTES} bytes")
    except (AccessError, StorageError) as error:
        if storage.is_local(url):
            return UnusableFile("unreadable", type(error.__cause__).__name__)
        # An archived object, or one with rights of its own, where the bucket itself answers.
        if isinstance(error, DeniedError) and storage.exists(url.rpartition("/")[0]):
            return UnusableFile("unreadable", str(error))
        raise
