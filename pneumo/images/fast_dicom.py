"""A fast reader of the usual file: explicit VR, little endian, one JPEG frame of 8 gray bits.

pydicom takes as long for such a header as libjpeg for a third of the image. For any other file, and
in any doubt, the result is None and pydicom is used; tests compare both, with damaged files too.
PS3.5 7.1.2 and A.4.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.uid import JPEGBaseline8Bit

from pneumo.images.frame_format import MAX_PIXELS, FrameFormat

LONG_LENGTHS = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT"}
SHORT_LENGTHS = {
    *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN"),
    *(b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
}
UNDEFINED = 0xFFFFFFFF
_MOST_ELEMENTS = 4_000  # a usual header has some fifty
ITEM, END_OF_ITEMS = 0xFFFEE000, 0xFFFEE0DD

TRANSFER_SYNTAX = 0x00020010
_SAMPLES, _PHOTOMETRIC, _FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _PIXEL_DATA = 0x00280010, 0x00280011, 0x7FE00010
_EIGHT_UNSIGNED_BITS = {0x00280100: 8, 0x00280101: 8, 0x00280102: 7, 0x00280103: 0}
_UNUSUAL = {
    *(0x00280034, 0x00280120, 0x00281050, 0x00281051),  # aspect, padding, window
    *(0x00281052, 0x00281053, 0x00283000, 0x00283010),  # rescale, modality and VOI tables
    *(0x00082218, 0x00540220),  # sequences with body part and view
}
"""With one of these, gray levels are not the stored values, or sequences must be read."""


@dataclass(frozen=True)
class BaselineFile:
    """The parts of a usual file, not decoded."""

    form: FrameFormat
    frame: bytes
    """The JPEG codestream; not compared with `form`."""
    texts: Mapping[str, str]
    """Values of the requested text elements by keyword, the same as pydicom's."""


def read_baseline(data: bytes, wanted: Mapping[int, tuple[str, bytes]]) -> BaselineFile | None:
    """The parts of `data`, or None where pydicom must read it.

    `wanted` are the tags of the texts to return, each with its keyword and the VR that it must
    have.
    """
    found = _scan(data)
    if found is None:
        return None
    elements, position = found
    form = _read_form(elements)
    frame = _read_only_fragment(data, position)
    if form is None or frame is None:
        return None
    texts = {}
    for tag, (keyword, vr) in wanted.items():
        if tag in elements:
            stated, value = elements[tag]
            if stated != vr or not value.isascii() or b"\x1b" in value:
                return None  # a character set matters
            texts[keyword] = value.decode("ascii").rstrip("\0 ")
    return BaselineFile(form, frame, texts)


def _scan(data: bytes) -> tuple[dict[int, tuple[bytes, bytes]], int] | None:
    """VR and value of each element by tag, and the position of the pixel data's items; None where
    tags are not in ascending order or the file is not the usual one."""
    if data[128:132] != b"DICM":
        return None
    elements: dict[int, tuple[bytes, bytes]] = {}
    position, last, end = 132, 0, len(data)
    while position + 12 <= end and len(elements) < _MOST_ELEMENTS:
        group, number, vr, length = struct.unpack_from("<HH2sH", data, position)
        tag = group << 16 | number
        position += 8
        if vr in LONG_LENGTHS:
            (length,) = struct.unpack_from("<I", data, position)
            position += 4
        elif vr not in SHORT_LENGTHS:
            return None
        if tag <= last:
            return None
        if length == UNDEFINED:
            return (elements, position) if (tag, vr) == (_PIXEL_DATA, b"OB") else None
        elements[tag] = vr, data[position : position + length]
        position, last = position + length, tag
    return None


def _read_form(elements: Mapping[int, tuple[bytes, bytes]]) -> FrameFormat | None:
    def number(tag: int) -> int | None:
        vr, value = elements.get(tag, (b"", b""))
        return int.from_bytes(value, "little") if vr == b"US" and len(value) == 2 else None

    def text(tag: int) -> bytes:
        return elements.get(tag, (b"", b""))[1].rstrip(b"\0 ")

    rows, columns, photometric = number(_ROWS), number(_COLUMNS), text(_PHOTOMETRIC)
    usual = (
        text(TRANSFER_SYNTAX) == JPEGBaseline8Bit.encode()
        and number(_SAMPLES) == 1
        and photometric in (b"MONOCHROME1", b"MONOCHROME2")
        and text(_FRAMES) in (b"", b"1")
        and all(number(tag) == value for tag, value in _EIGHT_UNSIGNED_BITS.items())
        and not _UNUSUAL & elements.keys()
    )
    if not usual or not rows or not columns or rows * columns > MAX_PIXELS:
        return None
    return FrameFormat(rows, columns, 1, photometric.decode(), 8, 8, 7, False, 0)


def _read_only_fragment(data: bytes, position: int) -> bytes | None:
    """The pixel data's fragment, if there are exactly the offset table and one fragment."""
    fragments = []
    for _ in range(2):
        if position + 8 > len(data):
            return None
        group, number, length = struct.unpack_from("<HHI", data, position)
        fragments.append(data[position + 8 : position + 8 + length])
        if group << 16 | number != ITEM or len(fragments[-1]) != length:
            return None
        position += 8 + length
    group, number, length = struct.unpack_from("<HHI", data.ljust(position + 8, b"\0"), position)
    is_offset_0 = fragments[0] in (b"", bytes(4))  # the table of offsets
    return fragments[1] if is_offset_0 and group << 16 | number == END_OF_ITEMS else None
