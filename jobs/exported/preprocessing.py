"""A DICOM file -> the input of model.onnx, exactly as pneumo computes it; needs numpy and pydicom.

Refuses files that this short code would not read exactly as pneumo does: palettes, colour, look-up
tables, windows other than linear ones, most compression, other views and body parts.
Research use only, never a diagnostic device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import generate_frames
from pydicom.filereader import read_partial
from pydicom.pixels.utils import pixel_array
from pydicom.tag import BaseTag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

Gray = npt.NDArray[np.uint8]
Rule = dict[str, Any]

_RADIOGRAPHS = {f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("1", "1.1", "1.1.1", "7")}
"""Computed radiography, digital X-ray for presentation and for processing, secondary capture."""
_FRONTAL = {"", "AP", "PA", "ANTERO-POSTERIOR", "POSTERO-ANTERIOR", "FRONTAL"}
_CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "HEART", "STERNUM")
_SHORT_PERIOD = 64
_PIXEL_DATA = 0x7FE00010


class RefusedError(ValueError):
    """The file gets no score; the message says why, with nothing from a patient's header."""


def read_picture(path: str | Path, rule: Rule) -> Gray:
    """The input `pixels` (1, 1, S, S) for the DICOM file at `path`; 0 is black.

    `rule` is what preprocessing.json holds. Raises RefusedError.
    """
    try:
        dataset = _read_dataset(path)
        _check(dataset)
        gray = _render(dataset, _decode(dataset, rule["decoded_at"]))
    except RefusedError:
        raise
    except Exception as error:  # pydicom raises many kinds, whose text may name the patient
        raise RefusedError(f"not a DICOM file that can be read: {type(error).__name__}") from error
    picture = _letterbox(gray, rule["decoded_at"])
    return _resample(picture, rule["image_size"], rule["image_size"])[None, None]


def _read_dataset(path: str | Path) -> pydicom.Dataset:
    """The data set up to its pixel data; pneumo ignores elements after these too."""
    tags = [0]

    def is_after_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        tags.append(tag)
        return tags[-2] == _PIXEL_DATA

    with Path(path).open("rb") as file:
        return read_partial(file, stop_when=is_after_pixels)


def _check(dataset: pydicom.Dataset) -> None:
    view = dataset.get("ViewPosition") or _meaning(dataset, "ViewCodeSequence")
    part = dataset.get("BodyPartExamined") or _meaning(dataset, "AnatomicRegionSequence")
    tables = ("ModalityLUTSequence", "VOILUTSequence")
    needs = {
        "the SOP class is no radiograph": dataset.SOPClassUID in _RADIOGRAPHS,
        "not one frame": int(dataset.get("NumberOfFrames") or 1) == 1,
        "not MONOCHROME1 or MONOCHROME2": dataset.SamplesPerPixel == 1
        and dataset.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2"),
        "the pixels are not the low bits of 8 or 16": dataset.BitsAllocated in (8, 16)
        and 0 < dataset.BitsStored == dataset.HighBit + 1 <= dataset.BitsAllocated
        and dataset.PixelRepresentation in (0, 1),
        "the presentation LUT shape contradicts the photometric interpretation": str(
            dataset.get("PresentationLUTShape") or ""
        ).strip()
        in ("", "INVERSE" if dataset.PhotometricInterpretation == "MONOCHROME1" else "IDENTITY"),
        "a look-up table (modality or VOI)": not any(name in dataset for name in tables),
        "a VOI function that is not LINEAR": (dataset.get("VOILUTFunction") or "LINEAR")
        == "LINEAR",
        "the header does not say a frontal view": _normalise(view) in _FRONTAL,
        "the header says another body part than the chest": not part
        or any(word in _normalise(part) for word in _CHEST),
    }
    for reason, is_met in needs.items():
        if not is_met:
            raise RefusedError(reason)


def _meaning(dataset: pydicom.Dataset, keyword: str) -> Any:
    items = dataset.get(keyword)
    return items[0].get("CodeMeaning") if items else None


def _normalise(text: Any) -> str:
    return " ".join(str(text or "").upper().split())


def _decode(dataset: pydicom.Dataset, size: int) -> npt.NDArray[Any]:
    """The stored values (H, W)."""
    syntax, shape = dataset.file_meta.TransferSyntaxUID, (dataset.Rows, dataset.Columns)
    if syntax == JPEGBaseline8Bit:
        return _decode_jpeg(dataset, size)
    if syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless):
        raise RefusedError("compressed, or big endian: decompress it first (dcmtk, gdcmconv --raw)")
    expected = math.prod(shape) * dataset.BitsAllocated // 8
    if syntax != RLELossless and len(dataset.PixelData) != expected + expected % 2:
        raise RefusedError("the pixel data has not the length that the header says")
    plugin = "pydicom" if syntax == RLELossless else ""  # other plugins may crash the process
    stored = pixel_array(dataset, decoding_plugin=plugin, correct_unused_bits=False)
    unused = 8 * stored.itemsize - dataset.BitsStored
    if (stored << unused >> unused != stored).any():  # overlays, or too few bits in the header
        raise RefusedError("the bits above those stored are not empty")
    return np.ascontiguousarray(stored)


def _decode_jpeg(dataset: pydicom.Dataset, size: int) -> npt.NDArray[Any]:
    try:
        import simplejpeg
    except ImportError:
        raise RefusedError("JPEG-compressed: pip install simplejpeg, or decompress it") from None
    shape = (dataset.Rows, dataset.Columns)
    if all(side % (2 * fitted) == 0 for side, fitted in zip(shape, _fit(shape, size), strict=True)):
        raise RefusedError("a JPEG that pneumo decodes at half size; decompress it first")
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    if simplejpeg.decode_jpeg_header(frame)[:3] != (*shape, "Gray") or (
        (dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation) != (8, 8, 0)
    ):
        raise RefusedError("the JPEG frame is not what the header says")
    return np.asarray(simplejpeg.decode_jpeg(frame, "GRAY")[..., 0])


def _render(dataset: pydicom.Dataset, stored: npt.NDArray[Any]) -> Gray:
    """Gray levels (H, W): rescaled, by window or range of the values; MONOCHROME1 inverted."""
    code, bits = f"u{stored.itemsize}", 8 * stored.itemsize
    _check_sign(stored.astype(np.int64), dataset.BitsStored, dataset.PixelRepresentation)
    own = np.arange(2**bits, dtype=code).view(stored.dtype)
    ends = [_number(dataset, f"PixelPadding{name}") for name in ("Value", "RangeLimit")]
    # Some writers confuse signed and unsigned; a number outside the stored type is ignored.
    codes = [int(e) % 2**bits for e in ends if e is not None and -(2**bits) / 2 <= e < 2**bits]
    padding = np.zeros(own.shape, np.bool_)
    if ends[0] is not None and codes:
        limits = np.array(codes, code).view(stored.dtype)
        padding = (own >= limits.min()) & (own <= limits.max())
    counts = np.bincount(stored.view(code).ravel(), minlength=2**bits)
    padded = counts[padding]
    if padded.sum() >= 0.998 * stored.size and np.count_nonzero(padded) > 1:
        padding[:] = False  # else almost all pixels would be padding
    counts = counts * ~padding
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    values = own * np.float64(1 if slope is None else slope) + np.float64(intercept or 0)
    if slope == 0 or counts.sum() == 0:
        raise RefusedError("a rescale slope of 0, or nothing but padding")
    center, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if center is not None or width is not None:
        if center is None or width is None or width <= 1:
            raise RefusedError("a window without a centre, or not wider than 1")
        shown = np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)
        at_an_end = [counts[shown < 0.5 / 255].sum(), counts[shown > 1 - 0.5 / 255].sum()]
        is_dark = shown[counts > 0].max() < 0.125
        least = -(2**dataset.BitsStored) // 2 if dataset.PixelRepresentation else 0
        possible = (own >= least) & (own < least + 2**dataset.BitsStored)
        is_far_wider = np.ptp(shown[possible]) < 0.125
        if max(at_an_end) >= 0.998 * counts.sum() or is_dark or is_far_wider:
            raise RefusedError("the window hides the picture")
    elif dataset.BitsStored <= 8 and not dataset.PixelRepresentation and (values == own).all():
        shown = np.clip(values / (2**dataset.BitsStored - 1), 0.0, 1.0)
    else:
        shown = _span(values, counts)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - shown
    table = np.where(padding, 0, np.rint(shown * 255.0)).astype(np.uint8)
    return np.asarray(table[stored.view(code)])


def _check_sign(values: npt.NDArray[np.int64], bits: int, signed: int) -> None:
    """Raises RefusedError where neighbours have various values at both ends of the range, in signed
    files also of the range that the values take: the sign may be another one, which pneumo may use.
    """
    least, greatest = int(values.min()), int(values.max())
    fewest = max(greatest, -1 - least).bit_length() + (least < 0)
    for count, is_signed in [(2**bits, signed), (2**fewest, least < 0)][: 1 + signed]:
        levels, near = values + is_signed * count // 2, count // (8 if signed else 64)
        low, high = np.sort([levels[:, 1:], levels[:, :-1]], axis=0)
        at_both_ends = (low < near) & (high >= count - near)
        if min(len(np.unique(side[at_both_ends])) for side in (low, high)) >= 8:
            reason = "the values may be signed where the header says unsigned, or conversely"
            raise RefusedError(reason)


def _number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """The element's first value; None where there is none."""
    value = dataset.get(keyword)
    if value is None or value == "" or value == []:
        return None
    number = float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value)
    if not abs(number) < 1e99:
        raise RefusedError("a number in the header is not finite, or immense")
    return number


def _span(values: npt.NDArray[np.float64], counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Scale values from 0 to 1: from the least to the greatest value of a pixel. Outliers are left
    out: 0.1 % at each end (hot pixels) that take up half of that range, or up to 3 % beyond a gap
    (burnt-in letters)."""
    order = np.argsort(values, kind="stable")
    order = order[counts[order] > 0]
    ordered, reached = values[order], np.cumsum(counts[order]) / counts.sum()
    low, high = ordered[[0, -1]]
    inner_low, inner_high = ordered[np.searchsorted(reached, (0.001, 1 - 0.001))]
    gaps = np.diff(ordered, append=high)
    widest = int(gaps.argmax())
    if 0 < inner_high - inner_low < (high - low) / 2:
        low, high = inner_low, inner_high
    elif gaps[widest] > (high - low) / 2 and reached[widest] >= 1 - 0.03 and widest > 0:
        high = ordered[widest]
    elif gaps[widest] > (high - low) / 2 and reached[widest] <= 0.03:
        low = ordered[widest + 1]
    return np.asarray(np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0))


def _fit(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """(height, width) of a picture of `shape` whose longer side becomes `size`."""
    scale = size / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _letterbox(gray: Gray, size: int) -> Gray:
    """`gray` resampled by area to fit (size, size), padded with black. Raises RefusedError."""
    height, width = _fit(gray.shape, size)
    if height > gray.shape[0] or width > gray.shape[1]:
        raise RefusedError("the picture is smaller than the model's input")
    periods = [n // math.gcd(n, m) for n, m in zip(gray.shape, (height, width), strict=True)]
    is_whole = gray.shape[0] % height == 0 and gray.shape[1] % width == 0
    if is_whole or max(periods) > _SHORT_PERIOD:
        small = _resample(gray, height, width)
    else:  # exact, as all terms are integers
        by_row, by_column = _overlaps(gray.shape[0], height), _overlaps(gray.shape[1], width)
        small = np.rint(by_row @ gray @ by_column.T / gray.size).astype(np.uint8)
    low, high = np.quantile(small, [0.001, 0.999], method="inverted_cdf").astype(int)
    if high - low <= 3:
        raise RefusedError("the picture is blank")
    canvas = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = small
    return canvas


def _overlaps(inputs: int, outputs: int) -> npt.NDArray[np.float64]:
    """(outputs, inputs): how much of each input each output covers, in 1/`outputs` of an input."""
    first, second = np.arange(outputs)[:, None] * inputs, np.arange(inputs) * outputs
    overlap = np.minimum(first + inputs, second + outputs) - np.maximum(first, second)
    return np.asarray(np.maximum(overlap, 0), np.float64)


def _resample(gray: Gray, height: int, width: int) -> Gray:
    """`gray` resampled to (height, width), bit for bit as by OpenCV's INTER_AREA."""
    rows, columns = gray.shape
    if rows % height == 0 and columns % width == 0:
        down, across = rows // height, columns // width
        sums = gray.reshape(height, down, width, across).sum((1, 3), dtype=np.int64)
        if down == across == 2:
            return np.asarray((sums + 2) >> 2, np.uint8)
        means = sums.astype(np.float32) * np.float32(1 / (down * across))
        return np.asarray(np.rint(means), np.uint8)
    narrow = _average_rows(gray.T.astype(np.float32), width).T
    return np.rint(_average_rows(narrow, height)).astype(np.uint8)


def _average_rows(values: npt.NDArray[np.float32], outputs: int) -> npt.NDArray[np.float32]:
    """The mean of the rows that each output covers, summed one after the other in float32."""
    inputs, scale = len(values), len(values) / outputs
    start = np.arange(outputs) * scale
    end, cell = start + scale, np.minimum(scale, inputs - start)
    total = np.zeros((outputs, values.shape[1]), np.float32)
    for offset in range(int(scale) + 2):
        row = np.floor(start) + offset
        covered = np.clip(np.minimum(row + 1, end) - np.maximum(row, start), 0, 1)
        weight = np.where((covered > 1e-3) & (row < inputs), covered / cell, 0).astype(np.float32)
        total += weight[:, None] * values[np.minimum(row, inputs - 1).astype(int)]
    return total
