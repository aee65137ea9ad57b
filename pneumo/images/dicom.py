"""DICOM bytes -> an 8-bit gray picture, 0 = black, and the four header values that are kept.

`pixel_decoders` reads the stored values and `gray_levels` makes them gray. The usual file, one
8-bit JPEG-baseline frame without any look-up table, goes a faster way round pydicom
(`fast_dicom`); `decode_gray` is the reference. Where the store's picture is a whole fraction of the
picture at half size, libjpeg decodes at half size, within 3 gray levels of the full decode.
"""

from __future__ import annotations

import io
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import simplejpeg
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from pneumo.errors import DicomError
from pneumo.images.boxes import Box
from pneumo.images.fast_dicom import PlainFile, read_plain
from pneumo.images.gray_levels import Gray, render_gray
from pneumo.images.headers import Header, make_header, read_header
from pneumo.images.letterbox import fit_shape, letterbox
from pneumo.images.pixel_decoders import (
    MAX_PIXELS,
    decode_stored,
    read_format,
    read_jpeg_size,
)

_RADIOGRAPHS = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
}


_SOP_CLASS, _PATIENT_ID, _SEX, _AGE, _VIEW = 0x80016, 0x100020, 0x100040, 0x101010, 0x185101


_PIXEL_SPACING, _IMAGER_SPACING = 0x280030, 0x181164


_SINGLE_TEXTS = {_SOP_CLASS: b"UI", _PATIENT_ID: b"LO", _SEX: b"CS", _AGE: b"AS", _VIEW: b"CS"}
_TEXTS = {**_SINGLE_TEXTS, _PIXEL_SPACING: b"DS", _IMAGER_SPACING: b"DS"}
_MAX_INFLATED_BYTES = 3 * MAX_PIXELS
_MAX_READS = 500_000  # of a header, two an element: about a second
_MAX_ELEMENT_BYTES = 2 * 2**20
_PIXEL_DATA = 0x7FE00010
_PIXELS = {_PIXEL_DATA, 0x7FE00008, 0x7FE00009}
_LOOK_UP_TABLES = {0x00283000, 0x00283010}  # of the modality and of interest


@dataclass(frozen=True)
class GrayImage:
    """A study's picture at the store's size."""

    pixels: Gray
    """(S, S) uint8, 0 = black; the shorter side is padded with 0 on both ends, never stretched."""
    header: Header
    scale: tuple[float, float]
    """(x, y): stored pixels per original pixel; they differ by the rounding of the shorter side."""
    offset: tuple[int, int]
    """(x, y) of the original's upper left corner in `pixels`."""
    rows: int
    """Height of the original image, in pixels."""
    columns: int
    """Its width."""
    identifier: str | None
    """Patient ID (0010,0020), to be compared and forgotten: it is never written anywhere."""

    def place(self, box: Box) -> Box:
        """`box` of the original image in pixels of this one."""
        return Box(
            box.x * self.scale[0] + self.offset[0],
            box.y * self.scale[1] + self.offset[1],
            box.width * self.scale[0],
            box.height * self.scale[1],
        )


def read_study_image(data: bytes, image_size: int) -> GrayImage:
    """The picture in `data` (a DICOM file) at `image_size`, letterboxed.

    Raises DicomError with a reason code: not_dicom, wrong_class (no radiograph), no_pixels,
    multi_frame, too_large, photometric, no_decoder, undecodable.
    """
    plain = read_plain(data, _TEXTS)
    image = None if plain is None else _read_fast(plain, image_size)
    if image is not None:
        return image
    with _only_dicom_errors():
        dataset = _parse(data)
        _check_class(dataset)
        return _make_image(
            decode_gray(dataset),
            image_size,
            shape=(int(dataset.Rows), int(dataset.Columns)),
            header=read_header(dataset),
            identifier=str(dataset.get("PatientID") or "") or None,
        )


def _read_fast(plain: PlainFile, image_size: int) -> GrayImage | None:
    """The usual file; None where pydicom must look at it."""
    texts = plain.texts
    if any("\\" in texts.get(tag, "") for tag in _SINGLE_TEXTS):
        return None
    if texts.get(_SOP_CLASS) and texts[_SOP_CLASS] not in _RADIOGRAPHS:
        return None
    gray = _decode_fast(plain, image_size)
    if gray is None:
        return None
    spacing = texts.get(_PIXEL_SPACING) or texts.get(_IMAGER_SPACING) or ""
    return _make_image(
        gray,
        image_size,
        shape=(plain.form.rows, plain.form.columns),
        header=make_header(
            age=texts.get(_AGE, ""),
            sex=texts.get(_SEX),
            view=texts.get(_VIEW),
            spacing=spacing.split("\\"),
        ),
        identifier=texts.get(_PATIENT_ID) or None,
    )


def _make_image(
    gray: Gray,
    image_size: int,
    *,
    shape: tuple[int, int],
    header: Header,
    identifier: str | None,
) -> GrayImage:
    """The picture of `gray`, which may be smaller than the original's `shape`."""
    pixels, offset = letterbox(gray, image_size)
    height, width = fit_shape(shape, image_size)
    return GrayImage(
        pixels=pixels,
        header=header,
        scale=(width / shape[1], height / shape[0]),
        offset=offset,
        rows=shape[0],
        columns=shape[1],
        identifier=identifier,
    )


@contextmanager
def _only_dicom_errors() -> Iterator[None]:
    """In it every error is a DicomError, and pydicom warns of no value, which could be a
    patient's."""
    try:
        # A bare `62` is no valid Age String, and pydicom says so for every file.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except DicomError:
        raise
    except Exception as error:  # an element that holds no value, or one of another type
        raise DicomError(f"the header does not make sense: {type(error).__name__}") from error


def decode_gray(dataset: pydicom.Dataset) -> Gray:
    """The frame at full resolution, (H, W) uint8, 0 = black, of any SOP class: the reference.

    Raises DicomError: no_pixels, multi_frame, too_large, photometric, no_decoder, undecodable.
    """
    with _only_dicom_errors():
        form = read_format(dataset)
        return render_gray(dataset, form, *decode_stored(dataset, form))


def _parse(data: bytes) -> pydicom.Dataset:
    if not data:
        raise DicomError("the file is empty", "not_dicom")
    bare = data[128:132] != b"DICM"
    if bare and not _starts_like_a_dataset(data):
        raise DicomError("not a DICOM file", "not_dicom")
    if _DEFLATED in data:
        data = _inflate(data)
    reads = _BoundedReads(data)
    try:
        dataset = read_partial(reads, stop_when=_after_pixels(), force=True)
    except Exception as error:
        if reads.left < 0:  # within a sequence pydicom replaces the error by one of its own
            raise DicomError(
                f"the header takes more than {_MAX_READS} reads", "too_large"
            ) from error
        raise DicomError(
            f"the header does not parse: {type(error).__name__}", "not_dicom"
        ) from error
    if bare and "SOPClassUID" not in dataset and "PixelData" not in dataset:
        raise DicomError("not a DICOM file", "not_dicom")
    _drop_large(dataset)
    return dataset


def _drop_large(dataset: pydicom.Dataset) -> None:
    """Remove large elements that are no pixels: to parse them could take pydicom minutes."""
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
    """Whether the first element is of group 0002 or 0008 and lies within `data`, as in old files,
    which have neither preamble nor prefix."""
    if data[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    return explicit or int.from_bytes(data[4:8], "little") <= len(data) - 8


def _inflate(data: bytes) -> bytes:
    """`data` with its deflated data set (PS3.5 A.5) inflated, and marked as not deflated.

    pydicom would inflate without a limit, and a thousandfold is possible. So its transfer syntax is
    replaced by the uncompressed one, of the same length.
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


def _check_class(dataset: pydicom.Dataset) -> None:
    stated = str(dataset.get("SOPClassUID") or "")
    if stated and stated not in _RADIOGRAPHS:
        name = UID(stated).name
        # A text that is no registered UID is not repeated: it could be anything.
        known = f" ({name})" if name != stated else ""
        raise DicomError(f"the SOP class{known} is no radiograph", "wrong_class")


def _decode_fast(plain: PlainFile, image_size: int) -> Gray | None:
    """The JPEG frame by libjpeg-turbo, at half size where that will do; overwritten by the next
    call. None where it does not hold what the header says."""
    form = plain.form
    if read_jpeg_size(plain.frame) != (form.rows, form.columns, 1, 8):
        return None
    shrunk = 2 if _halves_well((form.rows, form.columns), image_size) else 1
    rows, columns = form.rows // shrunk, form.columns // shrunk
    try:
        pixels = simplejpeg.decode_jpeg(
            plain.frame,
            "GRAY",
            min_height=rows,
            min_width=columns,
            buffer=_BUFFER.take(form.rows * form.columns),
        )
    except ValueError:  # damaged, or merely odd: the reference tells which
        return None
    if pixels.shape != (rows, columns, 1):
        return None
    gray: Gray = pixels[..., 0]
    return cv2.bitwise_not(gray, dst=gray) if form.photometric == "MONOCHROME1" else gray


class _Buffer(threading.local):
    """A thread's memory for the decoded frame, kept: fresh pages would cost a third of the
    decoding."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """At least `size` bytes, valid until the next call in this thread."""
        if self.memory.size < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


_BUFFER = _Buffer()


def _halves_well(shape: tuple[int, int], image_size: int) -> bool:
    """Whether each output covers whole pixels of the picture at half size; else an edge inside a
    pixel is wrong by up to 40 gray levels."""
    sides = zip(shape, fit_shape(shape, image_size), strict=True)
    return all(side % (2 * fitted) == 0 for side, fitted in sides)
