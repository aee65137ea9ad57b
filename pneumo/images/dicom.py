"""DICOM bytes -> an 8-bit gray image, 0 = black, and the four header values that are kept.

`pixel_decoders` reads the stored values, and `gray_levels` converts them to gray levels. The usual
file, one 8-bit JPEG-baseline frame without any look-up table, is read without pydicom, which is
faster (`fast_dicom`); `decode_gray` is the reference. Where the size of the store's image divides
half the original size, libjpeg decodes at half size, within 3 gray levels of the full decode.
"""

import itertools
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import simplejpeg
from pydicom import uid
from pydicom.tag import Tag
from pydicom.uid import UID

from pneumo.errors import DicomError
from pneumo.images.boxes import Box
from pneumo.images.codestreams import find_syntax, read_jpeg_size
from pneumo.images.elements import Repairs, read_numbers
from pneumo.images.fast_dicom import BaselineFile, read_baseline
from pneumo.images.frame_format import read_format
from pneumo.images.gray_levels import CONTRADICTING_SHAPES, Gray, render_gray
from pneumo.images.headers import (
    NO_ACQUISITION,
    NO_HEADER,
    Acquisition,
    Header,
    make_acquisition,
    read_from,
    read_header,
)
from pneumo.images.letterbox import fit_shape, letterbox
from pneumo.images.parsing import parse
from pneumo.images.pixel_decoders import decode_stored

_RADIOGRAPHS = {
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
}


_SINGLE_TEXTS = {
    "SOPClassUID": b"UI",
    "PatientID": b"LO",
    "PatientAge": b"AS",
    **dict.fromkeys(("PatientSex", "ViewPosition", "BodyPartExamined", "Modality"), b"CS"),
    **dict.fromkeys(("PresentationIntentType", "Laterality", "ImageLaterality"), b"CS"),
    "PresentationLUTShape": b"CS",
}
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing")
_TEXTS = {
    int(Tag(keyword)): (keyword, vr)
    for keyword, vr in {**_SINGLE_TEXTS, **dict.fromkeys(_SPACINGS, b"DS")}.items()
}


@dataclass(frozen=True)
class GrayImage:
    """A study's image at the store's size."""

    pixels: Gray
    """(S, S) uint8, 0 = black; the shorter side is padded with 0 at both ends, never stretched."""
    header: Header
    scale: tuple[float, float]
    """(x, y): stored pixels per original pixel; they differ by the rounding of the shorter side."""
    offset: tuple[int, int]
    """(x, y) of the original's upper left corner in `pixels`."""
    rows: int
    """Height of the original image, in pixels."""
    columns: int
    """Width of the original image, in pixels."""
    identifier: str | None
    """Patient ID (0010,0020), compared with the tables, and never written anywhere."""
    acquisition: Acquisition = NO_ACQUISITION
    """For `input_checks`; not kept."""
    warnings: tuple[str, ...] = ()
    """Codes of repairs, see `elements.Repairs`, and of doubts, see `input_checks`; sorted."""

    def to_stored(self, box: Box) -> Box:
        """A box in pixels of the original image, in pixels of this one."""
        return Box(
            box.x * self.scale[0] + self.offset[0],
            box.y * self.scale[1] + self.offset[1],
            box.width * self.scale[0],
            box.height * self.scale[1],
        )


def read_study_image(data: bytes, image_size: int) -> GrayImage:
    """The image in `data` (a DICOM file) at `image_size`, letterboxed.

    Raises DicomError with a reason code: not_dicom, wrong_class (no radiograph), no_pixels,
    multi_frame, too_large, photometric, no_decoder, undecodable.
    """
    file = read_baseline(data, _TEXTS)
    image = None if file is None else _read_fast(file, image_size)
    if image is not None:
        return image
    repairs = Repairs()
    with _only_dicom_errors():
        dataset = parse(data, repairs)
        _check_class(dataset)
        gray, get = _decode_gray(dataset, repairs), read_from(dataset, repairs)
        spacing = _take_first(read_numbers(dataset, name, repairs) for name in _SPACINGS)
        aspect = read_numbers(dataset, "PixelAspectRatio", repairs)
        if not (_is_square(spacing) and _is_square(aspect)):
            repairs.add("doubtful:aspect")
        return make_image(
            gray,
            image_size,
            shape=gray.shape,
            header=read_header(get, spacing),
            identifier=str(get("PatientID") or "") or None,
            acquisition=make_acquisition(get),
            repairs=repairs,
        )


def _take_first(spacings: Iterable[Sequence[float]]) -> Sequence[float]:
    """The first of `spacings` that starts with a length, as some writers fill one with zeros."""
    return next((sides for sides in spacings if sides and sides[0] > 0), ())


def _is_square(sides: Sequence[float]) -> bool:
    """Whether the first two `sides` of a pixel, where they are stated, differ by at most 1 %."""
    return len(sides) < 2 or math.isclose(sides[0], sides[1], rel_tol=0.01)


_NUMBER = re.compile(r" *[-+]?\d{1,9}(\.\d{0,9})? *")


def _read_fast(file: BaselineFile, image_size: int) -> GrayImage | None:
    """The image of a usual file; None where pydicom must read it."""
    texts = file.texts
    if any("\\" in texts.get(keyword, "") for keyword in _SINGLE_TEXTS):
        return None
    if texts.get("SOPClassUID") and texts["SOPClassUID"] not in _RADIOGRAPHS:
        return None
    shape = texts.get("PresentationLUTShape", "").strip()
    if shape == CONTRADICTING_SHAPES[file.form.photometric]:
        return None
    gray = _decode_fast(file, image_size)
    if gray is None:
        return None
    stated = [texts[name].split("\\") for name in _SPACINGS if texts.get(name)]
    if not all(_NUMBER.fullmatch(number) for number in itertools.chain(*stated)):
        return None
    spacing = _take_first(list(map(float, numbers)) for numbers in stated)
    return make_image(
        gray,
        image_size,
        shape=(file.form.rows, file.form.columns),
        header=read_header(texts.get, spacing),
        identifier=texts.get("PatientID") or None,
        acquisition=make_acquisition(texts.get),
        repairs=() if _is_square(spacing) else ("doubtful:aspect",),
    )


def make_image(
    gray: Gray,
    image_size: int,
    *,
    shape: tuple[int, int],
    header: Header = NO_HEADER,
    identifier: str | None = None,
    acquisition: Acquisition = NO_ACQUISITION,
    repairs: Iterable[str] = (),
) -> GrayImage:
    """The image of `gray`, which may be smaller than the original's `shape` (rows, columns)."""
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
        acquisition=acquisition,
        warnings=tuple(sorted(repairs)),
    )


@contextmanager
def _only_dicom_errors() -> Iterator[None]:
    """Inside the context every error becomes a DicomError; pydicom's warnings, which quote values,
    are suppressed."""
    try:
        # `62`, as in RSNA, is no valid Age String: pydicom would warn for every file.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except DicomError:
        raise
    except Exception as error:  # an element without a value, or with one of another type
        raise DicomError(f"the header is invalid: {type(error).__name__}") from error


def decode_gray(dataset: pydicom.Dataset) -> Gray:
    """The frame at full resolution, (H, W) uint8, 0 = black, of any SOP class; the reference.

    Raises DicomError: no_pixels, multi_frame, too_large, photometric, no_decoder, undecodable.
    """
    with _only_dicom_errors():
        return _decode_gray(dataset, set())


def _decode_gray(dataset: pydicom.Dataset, repairs: Repairs) -> Gray:
    stored, form = decode_stored(dataset, read_format(dataset, repairs), repairs)
    return render_gray(dataset, form, stored, repairs)


def _check_class(dataset: pydicom.Dataset) -> None:
    # A DICOMDIR, the index of a disc, has its class only in the file meta information.
    meta = getattr(dataset, "file_meta", {})
    stated = str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if stated and stated not in _RADIOGRAPHS:
        name = UID(stated).name
        # A text that is no registered UID is not quoted: it could identify a patient.
        known = f" ({name})" if name != stated else ""
        raise DicomError(f"the SOP class{known} is no radiograph", "wrong_class")


def _decode_fast(file: BaselineFile, image_size: int) -> Gray | None:
    """The JPEG frame decoded by libjpeg-turbo, at half size where possible. None where it differs
    from the header. The result is valid until the next call in this thread."""
    form = file.form
    if read_jpeg_size(file.frame) != (form.rows, form.columns, 1, 8):
        return None
    if find_syntax(file.frame) == uid.JPEGLosslessSV1:
        return None  # of which simplejpeg does not know the size
    shrunk = 2 if _can_halve((form.rows, form.columns), image_size) else 1
    rows, columns = form.rows // shrunk, form.columns // shrunk
    try:
        pixels = simplejpeg.decode_jpeg(
            file.frame,
            "GRAY",
            min_height=rows,
            min_width=columns,
            buffer=_BUFFER.take(form.rows * form.columns),
        )
    except ValueError:  # damaged or unusual: left to the reference path
        return None
    if pixels.shape != (rows, columns, 1):
        return None
    gray: Gray = pixels[..., 0]
    return cv2.bitwise_not(gray, dst=gray) if form.photometric == "MONOCHROME1" else gray


class _Buffer(threading.local):
    """A buffer that each thread reuses: allocating pages would add a third to the decoding time."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """At least `size` bytes, valid until the next call in this thread."""
        if self.memory.size < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


_BUFFER = _Buffer()


def _can_halve(shape: tuple[int, int], image_size: int) -> bool:
    """Whether each output pixel covers whole pixels of the image at half size; otherwise an edge
    within a pixel would be wrong by up to 40 gray levels."""
    sides = zip(shape, fit_shape(shape, image_size), strict=True)
    return all(side % (2 * fitted) == 0 for side, fitted in sides)
