"""DICOM bytes -> an 8-bit grayscale image, 0 = black, and the four header values that we keep.

The order of the grayscale transformations is PS3.3 C.7.6.3.1.2 and PS3.4 N.2: stored values ->
modality LUT or rescale -> VOI LUT or window -> presentation (MONOCHROME1 inverted). All of them are
folded into one look-up table over the stored values.

The usual case, one 8-bit JPEG-baseline frame without any LUT, takes a faster way: libjpeg decodes
at half scale in the DCT domain, then area resampling does the rest. It differs from the full decode
by 0.3 gray levels on average; `decode_gray` stays the reference.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from scipy.special import expit

from pneumo.errors import DicomError
from pneumo.studies import Box

Gray = npt.NDArray[np.uint8]

JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
OLDEST_PLAUSIBLE_AGE = 120
MAX_PIXELS = 64_000_000
"""A frame that claims more is refused before any memory is taken for it."""


@dataclass(frozen=True)
class Header:
    """What is kept of a header; None where absent or implausible."""

    age: int | None
    """Years, 0 to 120."""
    sex: str | None
    """'M' or 'F'."""
    view: str | None
    """'AP' or 'PA'."""
    spacing_mm: float | None
    """Distance of pixel centres in the original image, rows."""


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

    Raises DicomError with a reason code: not_dicom, no_pixels, multi_frame, too_large, photometric,
    undecodable.
    """
    try:
        return _read(_parse(data), image_size)
    except DicomError:
        raise
    except Exception as error:  # an element that holds no value, or one of another type
        raise DicomError(f"the header does not make sense: {type(error).__name__}") from error


def _read(dataset: pydicom.Dataset, image_size: int) -> GrayImage:
    fast = _decode_reduced(dataset, image_size)
    full = decode_gray(dataset) if fast is None else fast
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    pixels, offset = letterbox(full, image_size)
    height, width = _fitted(full.shape, image_size)
    return GrayImage(pixels, read_header(dataset), (width / columns, height / rows), offset)


def decode_gray(dataset: pydicom.Dataset) -> Gray:
    """The frame at full resolution, (H, W) uint8, 0 = black: the reference way.

    Raises DicomError.
    """
    try:
        stored = pixel_array(dataset, decoding_plugin=_plugin(dataset))
    except Exception as error:  # decoders raise whatever their C libraries make them raise
        raise DicomError(f"pixel data does not decode: {type(error).__name__}") from error
    if stored.ndim == 3 and stored.shape[-1] in (3, 4):
        gray: Gray = cv2.cvtColor(stored[..., :3].astype(np.uint8), cv2.COLOR_RGB2GRAY)
        return gray
    if stored.ndim != 2 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise DicomError(f"frame of shape {stored.shape} is no grayscale", "photometric")
    low, high = int(stored.min()), int(stored.max())
    table = _lookup_table(dataset, low, high)
    return np.asarray(table[stored.astype(np.int64) - low])


def letterbox(image: Gray, size: int) -> tuple[Gray, tuple[int, int]]:
    """`image` (H, W) resampled by area into (size, size), black outside; and its (x, y) corner."""
    height, width = _fitted(image.shape, size)
    method = cv2.INTER_AREA if size < max(image.shape) else cv2.INTER_LINEAR
    small = cv2.resize(image, (width, height), interpolation=method)
    if (height, width) == (size, size):
        return np.ascontiguousarray(small), (0, 0)
    top, left = (size - height) // 2, (size - width) // 2
    canvas = np.zeros((size, size), np.uint8)
    canvas[top : top + height, left : left + width] = small
    return canvas, (left, top)


def _fitted(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """(height, width) of an image of `shape` whose longer side becomes `size`."""
    scale = size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def read_header(dataset: pydicom.Dataset) -> Header:
    """Age (0010,1010), sex (0010,0040), view (0018,5101) and pixel spacing (0028,0030)."""
    sex, view = dataset.get("PatientSex"), dataset.get("ViewPosition")
    return Header(
        age=parse_age(str(dataset.get("PatientAge") or "")),
        sex=sex if sex in ("M", "F") else None,
        view=view if view in ("AP", "PA") else None,
        spacing_mm=_spacing(dataset),
    )


def parse_age(text: str) -> int | None:
    """Years from an AS value (`062Y`, `008M`) or RSNA's bare integer (`62`); None if
    implausible."""
    match = re.fullmatch(r"\s*(\d{1,3})([DWMY]?)\s*", text)
    if match is None:
        return None
    years = int(int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1, "": 1}[match[2]])
    return years if years <= OLDEST_PLAUSIBLE_AGE else None


def _parse(data: bytes) -> pydicom.Dataset:
    if not data:
        raise DicomError("the file is empty", "not_dicom")
    try:
        # A bare `62` is no valid Age String, and pydicom says so for every file.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data))
            dataset.decode()
    except InvalidDicomError as error:
        raise DicomError("not a DICOM file", "not_dicom") from error
    except Exception as error:
        raise DicomError(
            f"the header does not parse: {type(error).__name__}", "not_dicom"
        ) from error
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise DicomError("no pixel data (is the file truncated?)", "no_pixels")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise DicomError(f"{dataset.NumberOfFrames} frames, expected one", "multi_frame")
    if not 0 < int(dataset.Rows) * int(dataset.Columns) <= MAX_PIXELS:
        raise DicomError(f"claims {dataset.Rows} x {dataset.Columns} pixels", "too_large")
    return dataset


def _plugin(dataset: pydicom.Dataset) -> str:
    """The decoder to use; named, because an installed gdcm would otherwise take over, slower."""
    return "pillow" if dataset.file_meta.TransferSyntaxUID == JPEG_BASELINE else ""


def _decode_reduced(dataset: pydicom.Dataset, image_size: int) -> Gray | None:
    """The frame at half size by libjpeg's scaled DCT; None where the reference way must be
    taken."""
    plain = (
        dataset.file_meta.get("TransferSyntaxUID") == JPEG_BASELINE
        and dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
        and dataset.get("BitsStored") == 8
        and min(int(dataset.Rows), int(dataset.Columns)) >= 2 * image_size
        and not any(name in dataset for name in _LUT_KEYWORDS)
    )
    if not plain:
        return None
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    pixels = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_2)
    expected = (-(-int(dataset.Rows) // 2), -(-int(dataset.Columns) // 2))
    if pixels is None or pixels.shape != expected:
        raise DicomError("the JPEG frame does not decode to the size that the header states")
    return np.asarray(
        255 - pixels if dataset.PhotometricInterpretation == "MONOCHROME1" else pixels
    )


_LUT_KEYWORDS = (
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "PixelPaddingValue",
    "PresentationLUTShape",
)


def _lookup_table(dataset: pydicom.Dataset, low: int, high: int) -> Gray:
    """Gray level of each stored value from `low` to `high`."""
    if high - low > 2**16:
        raise DicomError(
            f"stored values span {high - low}, expected at most 16 bits", "photometric"
        )
    stored = np.arange(low, high + 1)
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        shown = np.asarray(apply_voi(values.astype(np.int64), dataset), np.float64) / (2**bits - 1)
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        shown = apply_window(
            values,
            _first(dataset.WindowCenter),
            _first(dataset.WindowWidth),
            str(dataset.get("VOILUTFunction") or "LINEAR"),
        )
    elif (
        dataset.get("BitsStored", 8) == 8
        and not int(dataset.get("PixelRepresentation") or 0)
        and np.array_equal(values, stored)
    ):
        shown = values / 255.0
    else:
        shown = (values - values.min()) / max(float(np.ptp(values)), 1.0)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = 1.0 - shown
    table: Gray = np.rint(np.clip(shown, 0.0, 1.0) * 255.0).astype(np.uint8)
    return table


def apply_window(
    values: npt.NDArray[np.float64], center: float, width: float, function: str = "LINEAR"
) -> npt.NDArray[np.float64]:
    """`values` windowed to [0, 1], by the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return np.asarray(expit(4.0 * (values - center) / max(width, 1e-6)))  # never overflows
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / max(width, 1e-6) + 0.5, 0.0, 1.0)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _first(value: object) -> float:
    return float(value[0] if isinstance(value, (MultiValue, list)) else value)  # type: ignore[arg-type]


def _spacing(dataset: pydicom.Dataset) -> float | None:
    value = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    try:
        spacing = _first(value)
    except (TypeError, ValueError, IndexError):
        return None
    return spacing if 0 < spacing < 10 else None
