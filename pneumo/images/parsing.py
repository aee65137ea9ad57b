"""DICOM bytes -> a pydicom data set, with limits: a small file may inflate to, or claim, a lot."""

import io
import zlib
from collections.abc import Callable

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from pneumo.errors import DicomError
from pneumo.images.elements import Repairs
from pneumo.images.fast_dicom import LONG_LENGTHS, SHORT_LENGTHS
from pneumo.images.file_repair import is_icon_before, repair_file
from pneumo.images.frame_format import MAX_PIXELS

_MAX_INFLATED_BYTES = 3 * MAX_PIXELS
_MAX_READS = 500_000  # of a header, two per element: about a second
_MAX_ELEMENT_BYTES = 2 * 2**20
_IMAGE_GROUP, _PIXEL_DATA = 0x0028, 0x7FE00010
_PIXELS = {_PIXEL_DATA, 0x7FE00008, 0x7FE00009}
_LOOK_UP_TABLES = {0x00283000, 0x00283010}  # of the modality and of interest


def parse(data: bytes, repairs: Repairs) -> pydicom.Dataset:
    """The data set up to its pixel data. A file in which pydicom finds no pixel data, or an icon's,
    or an element of the image without a valid VR, is repaired where possible.

    Raises DicomError: not_dicom, too_large.
    """
    if not data:
        raise DicomError("the file is empty", "not_dicom")
    lacks_prefix = data[128:132] != b"DICM"
    if lacks_prefix and not _starts_like_a_dataset(data):
        raise DicomError("not a DICOM file", "not_dicom")
    if _DEFLATED in data:
        data = _inflate(data)
    dataset = _try_parse(data)
    if isinstance(dataset, Exception) or _is_damaged(dataset):
        repaired = repair_file(data, repairs)
        if repaired is not None:
            dataset = _try_parse(repaired)
    if isinstance(dataset, Exception):
        raise DicomError(
            f"the header does not parse: {type(dataset).__name__}", "not_dicom"
        ) from dataset
    if lacks_prefix and "SOPClassUID" not in dataset and "PixelData" not in dataset:
        raise DicomError("not a DICOM file", "not_dicom")
    _drop_large(dataset)
    return dataset


def _is_damaged(dataset: pydicom.Dataset) -> bool:
    """Whether there is no pixel data, or it or an element of group 0028 has no valid VR."""
    vrs = {int(tag): (element.VR or "").encode() for tag, element in dataset.items()}
    if _PIXEL_DATA not in vrs:
        return True
    is_implicit = dataset.original_encoding[0]
    if not is_implicit and vrs[_PIXEL_DATA] not in LONG_LENGTHS:
        return True
    group = {vr for tag, vr in vrs.items() if tag >> 16 == _IMAGE_GROUP}
    return not group <= {b"", *LONG_LENGTHS, *SHORT_LENGTHS}


def _try_parse(data: bytes) -> pydicom.Dataset | Exception:
    """The data set, without the pixel data of an icon."""
    reads = _BoundedReads(data)
    try:
        dataset = read_partial(reads, stop_when=_after_pixels(), force=True)
        if "PixelData" in dataset and is_icon_before(data, reads.tell()):
            del dataset["PixelData"]
    except Exception as error:
        if reads.left < 0:  # within a sequence pydicom raises an error of its own instead
            raise DicomError(
                f"the header takes more than {_MAX_READS} reads", "too_large"
            ) from error
        return error
    return dataset


def _drop_large(dataset: pydicom.Dataset) -> None:
    """Remove large elements other than pixels, which pydicom could take minutes to parse. Raises
    DicomError(too_large) for a look-up table."""
    for tag, element in list(dataset.items()):
        raw = isinstance(element, RawDataElement)
        if not raw or tag in _PIXELS or len(element.value or b"") <= _MAX_ELEMENT_BYTES:
            continue
        if tag in _LOOK_UP_TABLES:
            raise DicomError(f"a look-up table of {len(element.value or b'')} bytes", "too_large")
        del dataset[tag]


class _BoundedReads(io.BytesIO):
    """A file in memory that fails after 500,000 reads, to bound parsing: a small file may inflate
    to millions of elements of eight bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("too many reads")
        return super().read(size)


def _after_pixels() -> Callable[[BaseTag, str | None, int], bool]:
    """For pydicom's `stop_when`: stop after the pixel data."""
    seen = False

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal seen
        if seen:
            return True
        seen = tag == _PIXEL_DATA
        return False

    return stop


def _starts_like_a_dataset(data: bytes) -> bool:
    """Whether the first element is of group 0002 or 0008 and within `data`, as in old files without
    preamble and prefix."""
    if data[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    return explicit or int.from_bytes(data[4:8], "little") <= len(data) - 8


def _inflate(data: bytes) -> bytes:
    """`data` with its deflated data set (PS3.5 A.5) inflated, and marked as not deflated.

    pydicom would inflate without a limit, possibly a thousandfold. The transfer syntax is replaced
    by the uncompressed one, padded to the same length.
    """
    stream = io.BytesIO(data)
    stream.seek(132 if data[128:132] == b"DICM" else 0)
    try:
        meta = read_dataset(
            stream,
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, vr, length: tag >> 16 != 2,
        )
        start, deflated = len(data), False
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            start, deflated = stream.tell(), True
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        body = decompressor.decompress(data[start:], _MAX_INFLATED_BYTES) if deflated else b""
    except Exception as error:
        raise DicomError(
            f"the data set does not inflate: {type(error).__name__}", "not_dicom"
        ) from error
    if decompressor.unconsumed_tail:
        raise DicomError(f"inflates to more than {_MAX_INFLATED_BYTES} bytes", "too_large")
    return data[:start].replace(_DEFLATED, _NOT_DEFLATED) + body


_DEFLATED = DeflatedExplicitVRLittleEndian.encode()
_NOT_DEFLATED = ExplicitVRLittleEndian.encode().ljust(len(_DEFLATED), b"\0")
