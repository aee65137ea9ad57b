"""The pixel format in a DICOM header (PS3.3 C.7.6.3), validated."""

from dataclasses import dataclass

import pydicom

from pneumo.errors import DicomError
from pneumo.images.elements import Repairs, first_text, read_integer, read_numbers, read_optional

MAX_PIXELS = 64_000_000
"""Larger frames are refused before memory is allocated."""

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PHOTOMETRICS = {1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"), 3: _COLOURS}


@dataclass(frozen=True)
class FrameFormat:
    """The pixel format of a header's single frame."""

    rows: int
    columns: int
    samples: int
    """1, or 3 for colour."""
    photometric: str
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """1 to `bits_allocated`."""
    high_bit: int
    signed: bool
    planar: int


def read_format(dataset: pydicom.Dataset, repairs: Repairs) -> FrameFormat:
    """The pixel format in the header.

    Raises DicomError: no_pixels, multi_frame, too_large, photometric, undecodable.
    """
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise DicomError("floating-point pixels, expected 1 to 16 bits", "photometric")
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise DicomError("no pixel data (is the file truncated?)", "no_pixels")
    frames = read_integer(dataset, "NumberOfFrames", 1, repairs) or 1
    if frames != 1:
        raise DicomError(f"{frames} frames, expected one", "multi_frame")
    rows = read_integer(dataset, "Rows", 0, repairs)
    columns = read_integer(dataset, "Columns", 0, repairs)
    if rows < 1 or columns < 1:
        raise DicomError(f"claims {rows} x {columns} pixels", "no_pixels")
    if rows * columns > MAX_PIXELS:
        raise DicomError(f"claims {rows} x {columns} pixels", "too_large")
    samples = read_integer(dataset, "SamplesPerPixel", 1, repairs)
    photometric = _read_photometric(dataset, samples, repairs)
    allocated = read_integer(dataset, "BitsAllocated", 0, repairs)
    stored = read_integer(dataset, "BitsStored", allocated, repairs)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise DicomError(
            f"{stored} bits stored in {allocated}, expected 1 to 16 bits in 8 or 16", "photometric"
        )
    representation = read_integer(dataset, "PixelRepresentation", 0, repairs)
    if representation not in (0, 1):
        raise DicomError(f"pixel representation {representation}, expected 0 or 1")
    high_bit = _read_or_leave_out(
        dataset, "HighBit", stored - 1, range(stored - 1, allocated), repairs
    )
    planar = _read_or_leave_out(dataset, "PlanarConfiguration", 0, range(2), repairs)
    signed = representation == 1
    return FrameFormat(
        rows, columns, samples, photometric, allocated, stored, high_bit, signed, planar
    )


def _read_photometric(dataset: pydicom.Dataset, samples: int, repairs: Repairs) -> str:
    value = read_optional(dataset, "PhotometricInterpretation", repairs)
    known = {name.replace(" ", ""): name for names in _PHOTOMETRICS.values() for name in names}
    photometric = known.get("".join(first_text(value).upper().split()), "unknown")
    if photometric not in _PHOTOMETRICS.get(samples, ()):
        raise DicomError(
            f"{samples} samples a pixel, photometric interpretation {photometric}", "photometric"
        )
    if photometric != value:
        repairs.add("spelling:PhotometricInterpretation")
    return photometric


def _read_or_leave_out(
    dataset: pydicom.Dataset, keyword: str, absent: int, allowed: range, repairs: Repairs
) -> int:
    """A number of the header; `absent` where it is missing or not in `allowed`."""
    numbers = read_numbers(dataset, keyword, repairs)
    if not numbers:
        return absent
    if numbers[0] not in allowed:
        repairs.add(f"left_out:{keyword}")
        return absent
    return int(numbers[0])
