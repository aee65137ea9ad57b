"""Stored values of a frame -> 8-bit gray levels, 0 = black.

The order is PS3.3 C.7.6.3.1.2 and PS3.4 N.2: stored values -> modality LUT or rescale -> VOI LUT,
or else the first window -> presentation (MONOCHROME1 inverted), all in one look-up table.
PresentationLUTShape must repeat the photometric interpretation (PS3.3 C.8.11.3.1). One that
contradicts it wins, as the last step of the order, as in dcmtk and dcm4che; this is recorded.
Without VOI LUT and valid window, values of up to 8 unsigned bits are unchanged; others are scaled
from the minimum (black) to the maximum (white), except for a few outliers. Padding is black and
excluded from minimum and maximum. A colour image is converted to luminance.

Elements that would hide the image (slope 0, a window outside all values or far wider, a table that
uses a fraction of its bits) are ignored or corrected, and recorded in `repairs`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian
from scipy.special import expit

from pneumo.errors import DicomError
from pneumo.images.elements import Repairs, first_text, read_each, read_numbers, read_optional
from pneumo.images.frame_format import FrameFormat
from pneumo.images.pixel_decoders import transfer_syntax
from pneumo.images.stored_values import Stored

Gray = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CONTRADICTING_SHAPES = {"MONOCHROME1": "IDENTITY", "MONOCHROME2": "INVERSE"}
"""Values of PresentationLUTShape, by photometric interpretation."""
_MOST_TABLES = 20
_BLOCK_PIXELS = 2**20  # pixels to look up at once: numpy converts them to indices of 8 bytes


def render_gray(
    dataset: pydicom.Dataset, form: FrameFormat, stored: Stored, repairs: Repairs
) -> Gray:
    """The gray image (H, W) uint8 of `stored` values (H, W) or (H, W, 3) in format `form`.

    Raises DicomError: photometric, undecodable.
    """
    if form.photometric == "PALETTE COLOR":
        return _look_up(stored, _palette_table(dataset, stored, repairs))
    if form.samples == 1:
        return _look_up(stored, _gray_table(dataset, form, stored, repairs))
    return _luminance(stored, form.photometric, form.bits_stored)


def _look_up(stored: Stored, table: Gray) -> Gray:
    """`table` at each of the `stored` values; it has an entry for each code of their dtype."""
    codes = _codes(stored)
    if stored.dtype.itemsize == 1:
        return np.asarray(cv2.LUT(codes, table))
    gray, flat = np.empty(codes.shape, np.uint8), codes.reshape(-1)
    for start in range(0, codes.size, _BLOCK_PIXELS):
        block = slice(start, start + _BLOCK_PIXELS)
        gray.reshape(-1)[block] = table[flat[block]]
    return gray


def _codes(stored: Stored) -> npt.NDArray[np.uint8 | np.uint16]:
    """The bit patterns of `stored`, unsigned: the indices of tables."""
    return np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}")


def _every_value(stored: Stored) -> Values:
    """The value of each code of the dtype of `stored`."""
    bits = 8 * stored.dtype.itemsize
    codes = np.arange(2**bits, dtype=f"u{stored.dtype.itemsize}")
    return codes.view(stored.dtype).astype(np.float64)


def _gray_table(
    dataset: pydicom.Dataset, form: FrameFormat, stored: Stored, repairs: Repairs
) -> Gray:
    """Gray level of each code of the dtype of `stored`."""
    inputs = _every_value(stored)
    padding = _find_padding(dataset, inputs, stored, repairs)
    with np.errstate(all="ignore"):  # values that are not finite are refused below
        values = _apply_modality(dataset, inputs, repairs)
        is_8_bit = form.bits_stored <= 8 and not form.signed and bool((values == inputs).all())
        counts = None
        if not is_8_bit or "VOILUTSequence" in dataset or "WindowCenter" in dataset:
            counts = np.where(padding, 0, _count_codes(stored))
        low = -(2 ** (form.bits_stored - 1)) if form.signed else 0
        possible = (inputs >= low) & (inputs < low + 2**form.bits_stored)
        levels = None if counts is None else _apply_voi(dataset, values, counts, possible, repairs)
        if levels is None and is_8_bit:
            levels = values / (2**form.bits_stored - 1)
        if levels is None:
            assert counts is not None
            levels = _stretch(values, counts, repairs)
    if not np.isfinite(levels).all():
        raise DicomError("the look-up tables give gray levels that are not finite")
    is_inverted = form.photometric == "MONOCHROME1"
    shape = first_text(read_optional(dataset, "PresentationLUTShape", repairs))
    if shape == CONTRADICTING_SHAPES[form.photometric]:
        repairs.add("left_out:PhotometricInterpretation")
        is_inverted = not is_inverted
    if is_inverted:
        levels = 1.0 - levels
    table: Gray = np.rint(np.clip(levels, 0.0, 1.0) * 255.0).astype(np.uint8)
    table[padding] = 0
    return table


def _find_padding(
    dataset: pydicom.Dataset, values: Values, stored: Stored, repairs: Repairs
) -> npt.NDArray[np.bool_]:
    """Mask of the stored values that are padding: one value, or a range up to the limit (PS3.3
    C.7.5.1.1.2 and C.7.6.3); a range is ignored where it covers almost all pixels."""
    # Some writers mix up signed and unsigned; a number outside the range of both is ignored.
    bits = 8 * stored.dtype.itemsize
    codes: list[int] = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        limits = read_numbers(dataset, keyword, repairs)
        if not limits and not codes:
            break
        if len(limits) > 1:
            repairs.add(f"left_out:{keyword}")
        if limits and -(2 ** (bits - 1)) <= limits[0] < 2**bits:
            codes.append(int(limits[0]) % 2**bits)
    if not codes:
        return np.zeros(values.shape, np.bool_)
    ends = np.array(codes, f"u{stored.dtype.itemsize}").view(stored.dtype)
    padding = np.asarray((values >= ends.min()) & (values <= ends.max()))
    padded = _count_codes(stored)[padding]
    if padded.sum() >= _ALMOST_ALL * stored.size and np.count_nonzero(padded) > 1:
        repairs.add("left_out:PixelPaddingValue")
        padding[:] = False
    return padding


def _apply_modality(dataset: pydicom.Dataset, values: Values, repairs: Repairs) -> Values:
    """`values` after the modality LUT or the rescale (PS3.3 C.11.1); unchanged where these would
    make all values equal."""
    table = next(_read_items(dataset, "ModalityLUTSequence", repairs), None)
    if table is not None:
        if np.ptp(table.entries) > 0:
            return table.apply(values)
        repairs.add("left_out:ModalityLUTSequence")
    slope = read_numbers(dataset, "RescaleSlope", repairs) or [1.0]
    intercept = read_numbers(dataset, "RescaleIntercept", repairs) or [0.0]
    rescaled = values * slope[0] + intercept[0]
    if slope[0] == 0 or not np.isfinite(rescaled).all():
        repairs.add("left_out:RescaleSlope")
        return values
    return rescaled


def _apply_voi(
    dataset: pydicom.Dataset,
    values: Values,
    counts: Counts,
    possible: npt.NDArray[np.bool_],
    repairs: Repairs,
) -> Values | None:
    """`values` after the first usable VOI LUT, or else window, in [0, 1] (PS3.3 C.11.2); None where
    there is none. `counts` are the pixels of each of the `values`, and the header's bits make some
    of them `possible`."""
    for table in _read_items(dataset, "VOILUTSequence", repairs):
        levels = table.apply(values) / table.find_white(repairs)
        if _has_contrast(levels, values, counts):
            return np.asarray(levels)
        repairs.add("left_out:VOILUTSequence")
    centers = read_each(dataset, "WindowCenter", repairs)
    widths = read_each(dataset, "WindowWidth", repairs)
    function = first_text(read_optional(dataset, "VOILUTFunction", repairs)).upper() or "LINEAR"
    for center, width in zip(centers, widths, strict=False):
        # LINEAR is for whole numbers. With a width below 1 it is read as LINEAR_EXACT, where the
        # values are that fine.
        is_exact = width < 1 and function not in ("SIGMOID", "LINEAR_EXACT")
        num_inside = np.count_nonzero(counts[np.abs(values - center) < width / 2])
        if not width > 0 or (is_exact and num_inside < _FEW_VALUES):
            repairs.add("left_out:WindowWidth")
            continue
        levels = apply_window(values, center, width, "LINEAR_EXACT" if is_exact else function)
        is_far_wider = not np.ptp(levels[possible]) >= _FEW_LEVELS  # also of a centre that is NaN
        if not is_far_wider and _has_contrast(levels, values, counts):
            if is_exact:
                repairs.add("left_out:VOILUTFunction")
            return levels
        repairs.add("left_out:WindowCenter")
    return None


def _has_contrast(levels: Values, values: Values, counts: Counts) -> bool:
    """Whether less than 99.8 % of the pixels become black, less than 99.8 % white, and some take a
    level above the lowest eighth; True where all pixels have the same value."""
    used = counts > 0
    if not used.any() or np.ptp(values[used]) == 0:
        return True
    limit = _ALMOST_ALL * counts.sum()
    black, white = counts[levels < _HALF_LEVEL].sum(), counts[levels > 1 - _HALF_LEVEL].sum()
    return bool(max(black, white) < limit and levels[used].max() >= _FEW_LEVELS)


_ALMOST_ALL = 0.998
_HALF_LEVEL = 0.5 / 255
_FEW_VALUES = 16  # in a window narrower than 1: whole numbers have one
_FEW_LEVELS = 0.125  # a window for 12 bits, kept beside a frame of 8, uses 16 of 256 levels


@dataclass(frozen=True)
class _Table:
    """A look-up table (PS3.3 C.11.1.1)."""

    first: int
    """The input of the first entry."""
    bits: int
    """Bits of an entry in the descriptor."""
    entries: Values

    def apply(self, values: Values) -> Values:
        """The entry of each of the `values`; the nearest entry for values outside the table."""
        # The 16 bits of the first value are signed where the inputs are; some writers, and readers
        # of implicit VR, use the header's pixel representation instead.
        first = self.first
        if first >= 2**15 and values.min() < 0:
            first -= 2**16
        elif first < 0 <= values.min():
            first += 2**16
        indices = np.clip(np.rint(values) - first, 0, self.entries.size - 1)
        return np.asarray(self.entries[np.nan_to_num(indices).astype(np.int64)])

    def find_white(self, repairs: Repairs) -> float:
        """The entry of a VOI LUT for white: the maximum of the descriptor's bits; the maximum of
        the table where it is larger, or at most a quarter of that."""
        white, maximum = 2.0**self.bits - 1, float(self.entries.max())
        if white / 4 < maximum <= white or maximum == 0:
            return white
        repairs.add("rescaled:VOILUTSequence")
        return maximum


def _read_items(dataset: pydicom.Dataset, keyword: str, repairs: Repairs) -> Iterator[_Table]:
    """The valid tables in the first items of a sequence."""
    items = read_optional(dataset, keyword, repairs) or Sequence()
    for item in items[:_MOST_TABLES] if isinstance(items, Sequence) else [items]:
        try:
            table = _read_table(dataset, item, "LUT", repairs)
        except Exception:  # no data, no descriptor, invalid items: pydicom raises many kinds
            repairs.add(f"left_out:{keyword}")
        else:
            yield table


def _read_table(dataset: pydicom.Dataset, item: Any, name: str, repairs: Repairs) -> _Table:
    """The table of the elements `name`Descriptor and `name`Data in `item`. Raises ValueError and
    other errors where they are invalid."""
    count, first, bits = (int(number) for number in item[f"{name}Descriptor"].value)
    data = item[f"{name}Data"].value
    count = count % 2**16 or 2**16
    if not 8 <= bits <= 16:
        raise ValueError(f"a look-up table of {bits} bits")
    if isinstance(data, bytes):
        order = ">" if transfer_syntax(dataset) == ExplicitVRBigEndian else "<"
        in_bytes = len(data) in (count, count + 1)
        entries = np.frombuffer(data, np.uint8 if in_bytes else f"{order}u2")
    else:
        entries = np.array(data, np.int64, ndmin=1) % 2**16
    if np.unique(entries[count:]).size > 1:  # not padding: the count is wrong
        repairs.add(f"left_out:{name}Descriptor")
        count = entries.size
    entries = entries[:count].astype(np.float64)
    if not entries.size:
        raise ValueError("a look-up table without entries")
    return _Table(first, bits, entries)


def _count_codes(stored: Stored) -> Counts:
    """Number of pixels of each code."""
    codes = _codes(stored).reshape(-1)
    counts = np.zeros(256**stored.dtype.itemsize, np.int64)
    for start in range(0, codes.size, _BLOCK_PIXELS):
        counts += np.bincount(codes[start : start + _BLOCK_PIXELS], minlength=counts.size)
    return counts


def _stretch(values: Values, counts: Counts, repairs: Repairs) -> Values:
    """`values` scaled so that the minimum of the pixels is 0 and the maximum 1; 0 where they are
    equal.

    Outliers are clipped: hot pixels, where 0.1 % of the pixels at either end take up half of the
    range; and letters, where 3 % of the pixels lie beyond a gap of half of the range.
    """
    used = counts > 0
    if not used.any():
        return np.zeros_like(values)
    order = np.argsort(values, kind="stable")
    order = order[used[order]]
    ordered, reached = values[order], np.cumsum(counts[order]) / counts.sum()
    low, high = ends = ordered[[0, -1]].tolist()
    inner_low, inner_high = ordered[np.searchsorted(reached, (_HOT, 1 - _HOT))].tolist()
    gaps = np.diff(ordered, append=high)
    widest = int(gaps.argmax())
    if 0 < inner_high - inner_low < (high - low) / 2:
        low, high = inner_low, inner_high
    elif gaps[widest] > (high - low) / 2 and reached[widest] >= 1 - _LETTERS and widest > 0:
        high = float(ordered[widest])
    elif gaps[widest] > (high - low) / 2 and reached[widest] <= _LETTERS:
        low = float(ordered[widest + 1])
    if [low, high] != ends:
        repairs.add("left_out:outliers")
    return np.asarray(np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0))


_HOT, _LETTERS = 0.001, 0.03


def _luminance(stored: Stored, photometric: str, bits: int) -> Gray:
    """Luminance of a colour image (H, W, 3); the first channel of YBR."""
    if photometric == "RGB":
        gray = cv2.cvtColor(_codes(stored), cv2.COLOR_RGB2GRAY)
    elif photometric.startswith("YBR_FULL"):
        gray = _codes(stored[..., 0])
    else:
        raise DicomError(f"the decoder left the picture in {photometric}", "photometric")
    levels = np.arange(256**stored.dtype.itemsize) / (2**bits - 1)
    return _look_up(gray, np.rint(np.minimum(levels, 1.0) * 255.0).astype(np.uint8))


def _palette_table(dataset: pydicom.Dataset, stored: Stored, repairs: Repairs) -> Gray:
    """Gray level of each entry of a palette of 8 or 16 bits."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if any(f"Segmented{name}Data" in dataset for name in names):
        # Segments can repeat each other: a small palette could need any amount of memory.
        raise DicomError("a segmented palette is not supported", "photometric")
    if any(f"{name}{part}" not in dataset for name in names for part in ("Descriptor", "Data")):
        raise DicomError("a palette picture without its palette", "photometric")
    try:
        tables = [_read_table(dataset, dataset, name, repairs) for name in names]
    except Exception as error:
        raise DicomError("an invalid palette", "photometric") from error
    codes = np.maximum(_every_value(stored), 0)
    rgb = np.stack([table.apply(codes) for table in tables], axis=-1).astype(np.int64)
    stated = 2 ** tables[0].bits - 1
    # Entries of 8 or 12 bits may be in words of 16 bits, as their high or their low bits.
    maximum = max(table.entries.max() for table in tables)
    white = next(white for white in (255, 4095, 65535) if maximum <= white)
    if white != stated:
        repairs.add("rescaled:RedPaletteColorLookupTableDescriptor")
    # In integers: a level may be half-way between two grays, and float sums of another processor
    # could be rounded the other way.
    thousandths = rgb @ np.array([299, 587, 114])
    gray: Gray = np.rint(thousandths * 255 / (1000 * white)).astype(np.uint8)
    return gray


def apply_window(
    values: npt.NDArray[np.float64], center: float, width: float, function: str
) -> npt.NDArray[np.float64]:
    """`values` windowed to [0, 1], by the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3.

    `width` must be at least 1, or above 0 for SIGMOID and LINEAR_EXACT.
    """
    if function == "SIGMOID":
        return np.asarray(expit(4.0 * (values - center) / width))  # never overflows
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if width <= 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)
