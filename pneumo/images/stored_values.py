"""A decoder's output -> stored values, with the header's bits and sign, or corrected ones."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pneumo.images.elements import Repairs
from pneumo.images.frame_format import FrameFormat

Stored = npt.NDArray[np.uint8 | np.int8 | np.uint16 | np.int16]

_MIN_JUMPS = 4
_MIN_NEGATIVE = 8  # different values just below zero; letters in white have one or two
_NEAR_ZERO = 1024
_MAX_WORD = 2**16 - 1


def make_values(
    stored: Stored,
    form: FrameFormat,
    repairs: Repairs,
    *,
    may_widen: bool = False,
    is_signed: bool = False,
) -> tuple[Stored, FrameFormat]:
    """The values with the header's bits and sign, and the format. Where with these neighbouring
    pixels jump over most of the range, and with another sign or more bits they do not, the latter
    are used; unsigned words that are signed numbers around zero become signed.

    `may_widen`: the bits above those stored are no overlays. `is_signed`: in the codestream.
    """
    bits = 8 * stored.dtype.itemsize
    if may_widen and _is_around_zero(stored):
        repairs.add("pixels:PixelRepresentation")
        return stored.view(np.int16), replace(form, signed=True, bits_stored=16, high_bit=15)
    read, others = _drop_unused_bits(stored, form), dict[str, FrameFormat]()
    if form.signed or is_signed:
        others["PixelRepresentation"] = replace(form, signed=not form.signed)
    elif may_widen and form.high_bit == form.bits_stored - 1 < bits - 1:
        others["BitsStored"] = replace(form, bits_stored=bits, high_bit=bits - 1)
    for keyword, other in others.items():
        words = stored.view(f"{'i' if other.signed else 'u'}{stored.dtype.itemsize}")
        values = _drop_unused_bits(words, other)
        jumps = _count_jumps(read, form.bits_stored)
        if jumps >= _MIN_JUMPS and jumps > _MIN_JUMPS * _count_jumps(values, other.bits_stored):
            repairs.add(f"pixels:{keyword}")
            return values, other
    return read, form


def _is_around_zero(stored: Stored) -> bool:
    """Whether unsigned words of 16 bits are numbers above and below zero: they leave out more than
    half of the range, and where they cross zero, neighbours have various values at its two ends."""
    if stored.dtype != np.uint16 or stored.max() <= _MAX_WORD - _NEAR_ZERO:
        return False
    rows = _take_rows(stored)
    codes = np.flatnonzero(np.bincount(rows.reshape(-1), minlength=2**16))
    if np.diff(codes).max(initial=0) <= _MAX_WORD // 2:
        return False
    low, high = np.minimum(rows[:, 1:], rows[:, :-1]), np.maximum(rows[:, 1:], rows[:, :-1])
    crossing = high[(low < _NEAR_ZERO) & (high > _MAX_WORD - _NEAR_ZERO)]
    return len(np.unique(crossing)) >= _MIN_NEGATIVE


def _take_rows(values: Stored) -> Stored:
    """Up to 512 rows."""
    return values[:: -(-len(values) // 512)]


def _count_jumps(values: Stored, bits: int) -> int:
    """Number of neighbours in up to 512 rows that differ by more than 3/4 of the range."""
    rows = _take_rows(values).astype(np.int32)
    return int((np.abs(np.diff(rows, axis=1)) > 0.75 * 2**bits).sum())


def _drop_unused_bits(stored: Stored, form: FrameFormat) -> Stored:
    """`stored` without the bits outside [high bit - bits stored + 1, high bit], sign-extended."""
    bits = 8 * stored.dtype.itemsize
    if form.bits_stored >= bits:
        return stored
    # The right shift is arithmetic where the dtype is signed.
    shifted = np.left_shift(stored, bits - 1 - form.high_bit)
    return np.right_shift(shifted, bits - form.bits_stored, out=shifted)
