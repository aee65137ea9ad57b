"""A decoder's output -> stored values, with the header's bits and sign, or corrected ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo.images.elements import Repairs
from pneumo.images.frame_format import FrameFormat

Stored = npt.NDArray[np.uint8 | np.int8 | np.uint16 | np.int16]

_MIN_JUMPS = 4
_MIN_NEGATIVE = 8  # different values just below zero; letters in white have one or two
_NEAR_ZERO = 64  # this part of the range is next to zero


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
    are used.

    `may_widen`: the bits above those stored are no overlays. `is_signed`: in the codestream.
    """
    bits = 8 * stored.dtype.itemsize
    whole_words = replace(form, bits_stored=bits, high_bit=bits - 1)
    if not form.signed:
        for unsigned in dict.fromkeys((whole_words, form) if may_widen else (form,)):
            rows = _drop_unused_bits(_take_rows(stored), unsigned)
            if _is_around_zero(rows, unsigned.bits_stored):
                repairs.add("pixels:PixelRepresentation")
                signed = replace(unsigned, signed=True)
                return _drop_unused_bits(stored.view(f"i{stored.dtype.itemsize}"), signed), signed
    read, others = _drop_unused_bits(stored, form), dict[str, FrameFormat]()
    if form.signed or is_signed:
        others["PixelRepresentation"] = replace(form, signed=not form.signed)
    elif may_widen and form.high_bit == form.bits_stored - 1 < bits - 1:
        others["BitsStored"] = whole_words
    for keyword, other in others.items():
        words = stored.view(f"{'i' if other.signed else 'u'}{stored.dtype.itemsize}")
        values = _drop_unused_bits(words, other)
        jumps = _count_jumps(read, form.bits_stored)
        if jumps >= _MIN_JUMPS and jumps > _MIN_JUMPS * _count_jumps(values, other.bits_stored):
            repairs.add(f"pixels:{keyword}")
            return values, other
    return read, form


def _is_around_zero(rows: Stored, bits: int) -> bool:
    """Whether unsigned numbers of `bits` bits are numbers above and below zero: where they cross
    zero, neighbours have various values at the two ends of the range, and far more often than
    neighbours jump over most of the range as signed numbers."""
    top = 2**bits
    near_zero = top // _NEAR_ZERO
    if near_zero < _MIN_NEGATIVE or rows.max() < top - near_zero:
        return False
    low, high = np.minimum(rows[:, 1:], rows[:, :-1]), np.maximum(rows[:, 1:], rows[:, :-1])
    crossing = high[(low < near_zero) & (high >= top - near_zero)]
    if len(np.unique(crossing)) < _MIN_NEGATIVE:
        return False
    from_lowest = (rows.astype(np.int32) + top // 2) % top  # as signed numbers
    return len(crossing) > _MIN_JUMPS * _count_jumps(from_lowest, bits)


def _take_rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Up to 512 rows."""
    return values[:: -(-len(values) // 512)]


def _count_jumps(values: npt.NDArray[Any], bits: int) -> int:
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
