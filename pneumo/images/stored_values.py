"""Words that a decoder gives -> stored values, by the header's bits and sign or against them."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pneumo.images.elements import Repairs
from pneumo.images.frame_format import FrameFormat

Stored = npt.NDArray[np.uint8 | np.int8 | np.uint16 | np.int16]

_MOST_JUMPS = 4


def make_values(
    stored: Stored,
    form: FrameFormat,
    repairs: Repairs,
    *,
    may_widen: bool = False,
    is_signed: bool = False,
) -> tuple[Stored, FrameFormat]:
    """The values as the header's bits and sign make them; or, where these make neighbours differ by
    the whole range and others do not, as the others make them.

    `may_widen`: the bits above those stored are no overlays. `is_signed`: the codestream says so.
    """
    bits = 8 * stored.dtype.itemsize
    read, others = _drop_unused_bits(stored, form), dict[str, FrameFormat]()
    if form.signed or is_signed:
        others["PixelRepresentation"] = replace(form, signed=not form.signed)
    elif may_widen and form.high_bit == form.bits_stored - 1 < bits - 1:
        others["BitsStored"] = replace(form, bits_stored=bits, high_bit=bits - 1)
    for keyword, other in others.items():
        words = stored.view(f"{'i' if other.signed else 'u'}{stored.dtype.itemsize}")
        values = _drop_unused_bits(words, other)
        jumps = _count_jumps(read, form.bits_stored)
        if jumps >= _MOST_JUMPS and jumps > _MOST_JUMPS * _count_jumps(values, other.bits_stored):
            repairs.add(f"pixels:{keyword}")
            return values, other
    return read, form


def _count_jumps(values: Stored, bits: int) -> int:
    """How many neighbours in up to 512 of the rows differ by more than 3/4 of the range."""
    rows = values[:: -(-len(values) // 512)].astype(np.int32)
    return int((np.abs(np.diff(rows, axis=1)) > 0.75 * 2**bits).sum())


def _drop_unused_bits(stored: Stored, form: FrameFormat) -> Stored:
    """`stored` without the bits outside [high bit - bits stored + 1, high bit], sign-extended."""
    bits = 8 * stored.dtype.itemsize
    if form.bits_stored >= bits:
        return stored
    # The shift back is arithmetic where the type is signed.
    shifted = np.left_shift(stored, bits - 1 - form.high_bit)
    return np.right_shift(shifted, bits - form.bits_stored, out=shifted)
