"""A decoder's output -> stored values, with the header's bits and sign, or corrected ones."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pneumo.images.elements import Repairs
from pneumo.images.frame_format import FrameFormat

Stored = npt.NDArray[np.uint8 | np.int8 | np.uint16 | np.int16]
Levels = npt.NDArray[np.int32]

_MIN_JUMPS = 4
_MIN_VALUES = 8  # different values on either side of a jump; padding and letters have one or two


def make_values(
    stored: Stored,
    form: FrameFormat,
    repairs: Repairs,
    *,
    may_widen: bool = False,
    is_signed: bool = False,
) -> tuple[Stored, FrameFormat]:
    """The values with the header's bits and sign, and the format. Where with these neighbouring
    pixels of various values jump over most of the range, and with another sign or more bits they do
    not, the latter are used. Of signed values the range is also that of the fewest bits for them.

    `may_widen`: the bits above those stored are no overlays. `is_signed`: in the codestream.
    """
    size = stored.dtype.itemsize
    whole_words = replace(form, bits_stored=8 * size, high_bit=8 * size - 1)
    rows, may_widen = _take_rows(stored), may_widen and not form.signed
    for stated in dict.fromkeys((whole_words, form) if may_widen else (form,)):
        if _is_torn(_drop_unused_bits(rows, stated), stated, form.signed or is_signed):
            repairs.add("pixels:PixelRepresentation")
            other = replace(stated, signed=not form.signed)
            return _drop_unused_bits(_view(stored, other), other), other
    if may_widen and form.high_bit == form.bits_stored - 1 and _is_cut_off(rows, form.bits_stored):
        repairs.add("pixels:BitsStored")
        return stored, whole_words
    values = _drop_unused_bits(stored, form)
    if form.signed or is_signed:
        fewest = _take_fewest_bits(values, form)
        if _is_torn(_take_rows(values), fewest, is_doubtful=True):
            repairs.add("pixels:PixelRepresentation")
            other = replace(fewest, signed=not fewest.signed)
            return _drop_unused_bits(_view(values, other), other), other
    return values, form


def _take_fewest_bits(values: Stored, form: FrameFormat) -> FrameFormat:
    """The format with the fewest bits that hold all values, signed where one is negative: a sign of
    12 bits may be in words of 16."""
    least, greatest = int(values.min()), int(values.max())
    bits = max(greatest, -1 - least).bit_length() + (least < 0)
    return replace(form, bits_stored=bits, high_bit=bits - 1, signed=least < 0)


def _view(stored: Stored, form: FrameFormat) -> Stored:
    """The same bits, with the sign of `form`."""
    return stored.view(f"{'i' if form.signed else 'u'}{stored.dtype.itemsize}")


def _is_torn(rows: Stored, form: FrameFormat, is_doubtful: bool) -> bool:
    """Whether the other sign is right: neighbours have various values at the two ends of the range,
    and far more often than they jump over most of the range with the other sign. `is_doubtful`: the
    header or the codestream says signed."""
    top = 2**form.bits_stored
    near = top // ((16 if form.bits_stored > 8 else 8) if is_doubtful else 64)  # next to an end
    levels = rows.astype(np.int32) + (top // 2 if form.signed else 0)  # 0 is the least
    if near < _MIN_VALUES or levels.min() >= near or levels.max() < top - near:
        return False
    low, high = _take_neighbours(levels)
    torn = (low < near) & (high >= top - near)
    if not _are_various(low[torn], high[torn]):
        return False
    other_low, other_high = _take_neighbours((levels + top // 2) % top)
    return bool(torn.sum() > _MIN_JUMPS * _jump(other_low, other_high, top).sum())


def _is_cut_off(rows: Stored, bits: int) -> bool:
    """Whether the lowest `bits` bits of neighbours of various values jump over most of the range
    mostly where the bits above them change, and the whole words do not."""
    top, words = 2**bits, rows.astype(np.int32)
    if words.max() < top:
        return False
    low, high = _take_neighbours(words % top)
    less, more = _take_neighbours(words)
    jumps = _jump(low, high, top)
    healed = jumps & (more - less != high - low) & (more - less < np.ptp(words) / 8)
    return bool(healed.sum() > 2 / 3 * jumps.sum()) and _are_various(low[healed], high[healed])


def _take_rows(values: Stored) -> Stored:
    """Up to 512 rows."""
    return values[:: -(-len(values) // 512)]


def _take_neighbours(rows: Levels) -> tuple[Levels, Levels]:
    """The lower and the higher of each two neighbours in a row."""
    return np.minimum(rows[:, 1:], rows[:, :-1]), np.maximum(rows[:, 1:], rows[:, :-1])


def _jump(low: Levels, high: Levels, top: int) -> npt.NDArray[np.bool_]:
    """Which neighbours differ by more than 3/4 of the range."""
    return np.asarray(high - low > 0.75 * top)


def _are_various(low: Levels, high: Levels) -> bool:
    return min(len(np.unique(low)), len(np.unique(high))) >= _MIN_VALUES


def _drop_unused_bits(stored: Stored, form: FrameFormat) -> Stored:
    """`stored` without the bits outside [high bit - bits stored + 1, high bit], sign-extended."""
    bits = 8 * stored.dtype.itemsize
    if form.bits_stored >= bits:
        return stored
    # The right shift is arithmetic where the dtype is signed.
    shifted = np.left_shift(stored, bits - 1 - form.high_bit)
    return np.right_shift(shifted, bits - form.bits_stored, out=shifted)
