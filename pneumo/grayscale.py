"""Stored values of a frame -> 8-bit gray levels, 0 = black.

The order is PS3.3 C.7.6.3.1.2 and PS3.4 N.2: stored values -> modality LUT or rescale -> VOI LUT,
or else the first window -> presentation (MONOCHROME1 inverted). All of them are folded into one
look-up table over the codes of the stored type. Without a VOI LUT and without a valid window, 8
unsigned bits are shown as they are; anything else spans from its least value, black, to its
greatest, white. Pixel padding is black and takes no part in that span. A colour picture becomes its
luminance.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import ExplicitVRBigEndian
from scipy.special import expit

from pneumo.codecs import FrameFormat, Stored, transfer_syntax
from pneumo.errors import DicomError

Gray = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

_BLOCK_PIXELS = 2**20  # numpy makes 8-byte indices of the pixels that it looks up at once


def render_gray(
    dataset: pydicom.Dataset, form: FrameFormat, stored: Stored, photometric: str
) -> Gray:
    """(H, W) uint8 of the `stored` values, (H, W) or (H, W, 3) in the colour space `photometric`.

    Raises DicomError: photometric, undecodable.
    """
    if photometric == "PALETTE COLOR":
        return _look_up(stored, _palette_table(dataset, stored))
    if form.samples == 1:
        return _look_up(stored, _gray_table(dataset, form, stored))
    return _luminance(stored, photometric, form.bits_stored)


def _look_up(stored: Stored, table: Gray) -> Gray:
    """`table` at each of the `stored` values; it has an entry for every code of their type."""
    codes = _codes(stored)
    if stored.dtype.itemsize == 1:
        return np.asarray(cv2.LUT(codes, table))
    gray, flat = np.empty(codes.shape, np.uint8), codes.reshape(-1)
    for start in range(0, codes.size, _BLOCK_PIXELS):
        block = slice(start, start + _BLOCK_PIXELS)
        gray.reshape(-1)[block] = table[flat[block]]
    return gray


def _codes(stored: Stored) -> npt.NDArray[np.uint8 | np.uint16]:
    """The bit patterns of `stored`, by which tables are indexed."""
    return np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")


def _every_value(stored: Stored) -> Values:
    """The value of each code of the type of `stored`."""
    bits = 8 * stored.dtype.itemsize
    codes = np.arange(2**bits, dtype=f"u{stored.dtype.itemsize}")
    return codes.view(stored.dtype).astype(np.float64)


def _gray_table(dataset: pydicom.Dataset, form: FrameFormat, stored: Stored) -> Gray:
    """Gray level of each code of the type of `stored`."""
    own = _every_value(stored)
    padding = _find_padding(dataset, own, stored.dtype)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        values = _apply_modality(dataset, own)
        shown = _apply_voi(dataset, values)
        if shown is None and form.bits_stored == 8 and not form.signed and (values == own).all():
            shown = values / 255.0
        if shown is None:
            shown = _span(values, _find_used(stored) & ~padding)
    if not np.isfinite(shown).all():
        raise DicomError("the look-up tables give gray levels that are no numbers")
    if form.photometric == "MONOCHROME1":
        shown = 1.0 - shown
    table: Gray = np.rint(np.clip(shown, 0.0, 1.0) * 255.0).astype(np.uint8)
    table[padding] = 0
    return table


def _find_padding(
    dataset: pydicom.Dataset, values: Values, stored_type: np.dtype[Any]
) -> npt.NDArray[np.bool_]:
    """Which stored values are padding: one value, or all up to the range limit (PS3.3 C.7.5.1.1.2
    and C.7.6.3)."""
    limits = [dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")]
    if limits[0] in (None, ""):
        return np.zeros(values.shape, np.bool_)
    # Some writers store a negative value under the unsigned representation, or the other way round;
    # a number that no stored value can be is left over from another picture.
    bits = 8 * stored_type.itemsize
    codes = [
        int(limit) % 2**bits
        for limit in limits
        if limit not in (None, "") and -(2 ** (bits - 1)) <= int(limit) < 2**bits
    ]
    if not codes:
        return np.zeros(values.shape, np.bool_)
    ends = np.array(codes, f"u{stored_type.itemsize}").view(stored_type)
    return np.asarray((values >= ends.min()) & (values <= ends.max()))


def _apply_modality(dataset: pydicom.Dataset, values: Values) -> Values:
    """`values` through the modality LUT, or rescaled (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        return _apply_table(dataset, dataset.ModalityLUTSequence[0], values)[0]
    slope, intercept = (
        read_number(dataset.get("RescaleSlope")),
        read_number(dataset.get("RescaleIntercept")),
    )
    return values * (1.0 if slope is None else slope) + (intercept or 0.0)


def _apply_voi(dataset: pydicom.Dataset, values: Values) -> Values | None:
    """`values` through the VOI LUT or the first window, to [0, 1] (PS3.3 C.11.2); None without, or
    with a window too narrow to be one."""
    if dataset.get("VOILUTSequence"):
        looked_up, bits = _apply_table(dataset, dataset.VOILUTSequence[0], values)
        return np.asarray(looked_up / (2**bits - 1))
    center, width = (
        read_number(dataset.get("WindowCenter")),
        read_number(dataset.get("WindowWidth")),
    )
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if center is None or width is None:
        return None
    if width <= 0 or (width < 1 and function not in ("SIGMOID", "LINEAR_EXACT")):
        return None
    return apply_window(values, center, width, function)


def _apply_table(
    dataset: pydicom.Dataset, item: pydicom.Dataset, values: Values
) -> tuple[Values, int]:
    """`values` through the look-up table of a sequence item, and the bits of its entries.

    The descriptor (PS3.3 C.11.1.1) gives the number of entries (0 is 2^16), the first value mapped,
    bits of an entry. pydicom's own functions take only some of the entry sizes.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count % 2**16 or 2**16
    # Of its 16 bits, the first value has a sign where what is looked up has: some writers, and all
    # who read implicit VR, take the header's pixel representation instead.
    if first >= 2**15 and values.min() < 0:
        first -= 2**16
    elif first < 0 <= values.min():
        first += 2**16
    if not 8 <= bits <= 16:
        raise DicomError(f"a look-up table of {bits} bits, expected 8 to 16")
    data = item.LUTData
    if isinstance(data, bytes):
        order = ">" if transfer_syntax(dataset) == ExplicitVRBigEndian else "<"
        entries = np.frombuffer(data, np.uint8 if len(data) < 2 * count else f"{order}u2")
    else:
        entries = np.array(data, np.int64, ndmin=1) % 2**16
    entries = entries[:count].astype(np.float64)
    if not entries.size:
        raise DicomError("a look-up table without entries")
    places = np.clip(np.rint(values) - first, 0, entries.size - 1)
    return entries[np.nan_to_num(places).astype(np.int64)], bits


def _find_used(stored: Stored) -> npt.NDArray[np.bool_]:
    """Which codes occur in `stored`."""
    codes = _codes(stored).reshape(-1)
    used = np.zeros(256**stored.dtype.itemsize, np.bool_)
    for start in range(0, codes.size, _BLOCK_PIXELS):
        used[codes[start : start + _BLOCK_PIXELS]] = True
    return used


def _span(values: Values, used: npt.NDArray[np.bool_]) -> Values:
    """`values` so that the least of those `used` is 0 and the greatest 1; 0 if there is but one."""
    if not used.any():
        return np.zeros_like(values)
    low, high = float(values[used].min()), float(values[used].max())
    return np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0)


# --- colour to gray levels


def _luminance(stored: Stored, photometric: str, bits: int) -> Gray:
    """Gray of a colour picture (H, W, 3); of YBR it is the first channel."""
    if photometric == "RGB":
        gray = cv2.cvtColor(_codes(stored), cv2.COLOR_RGB2GRAY)
    elif photometric.startswith("YBR_FULL"):
        gray = _codes(stored[..., 0])
    else:
        raise DicomError(f"the decoder left the picture in {photometric}", "photometric")
    levels = np.arange(256**stored.dtype.itemsize) / (2**bits - 1)
    return _look_up(gray, np.rint(np.minimum(levels, 1.0) * 255.0).astype(np.uint8))


def _palette_table(dataset: pydicom.Dataset, stored: Stored) -> Gray:
    """Gray level of each palette entry, of 8 or 16 bits."""
    if any(f"Segmented{c}PaletteColorLookupTableData" in dataset for c in ("Red", "Green", "Blue")):
        # Segments can repeat each other: a small palette could claim any amount of memory.
        raise DicomError("a segmented palette is not supported", "photometric")
    if "RedPaletteColorLookupTableDescriptor" not in dataset:
        raise DicomError("a palette picture without its palette", "photometric")
    codes = _every_value(stored).astype(np.int64)
    rgb = apply_color_lut(np.maximum(codes, 0), dataset)
    # In whole numbers: a level may lie half-way between two grays, and floats summed by another
    # processor's instructions would be rounded the other way.
    thousandths = rgb.astype(np.int64) @ np.array([299, 587, 114])
    white = 255 if rgb.dtype.itemsize == 1 else 65535
    table: Gray = np.rint(thousandths * 255 / (1000 * white)).astype(np.uint8)
    return table


def apply_window(
    values: npt.NDArray[np.float64], center: float, width: float, function: str = "LINEAR"
) -> npt.NDArray[np.float64]:
    """`values` windowed to [0, 1], by the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3.

    `width` is at least 1, and of SIGMOID and LINEAR_EXACT above 0.
    """
    if function == "SIGMOID":
        return np.asarray(expit(4.0 * (values - center) / width))  # never overflows
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def read_number(value: Any) -> float | None:
    """A number, or the first of several; None without one."""
    if isinstance(value, (MultiValue, list)):
        value = value[0] if value else None
    return None if value is None or value == "" else float(value)
