"""Repairing files in which pydicom finds no pixel data, or an image element without a valid VR.

Elements without a valid VR get that of the standard; others that do not parse are left out. Pixel
data without an end delimiter gets one where its end is certain: by the size in the header, or by
the end marker of the codestream. Little endian only.
PS3.5 7.1 and A.4.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from pneumo.images.codestreams import is_complete
from pneumo.images.elements import Repairs
from pneumo.images.fast_dicom import (
    END_OF_ITEMS,
    ITEM,
    LONG_LENGTHS,
    SHORT_LENGTHS,
    TRANSFER_SYNTAX,
    UNDEFINED,
)

_PIXEL_DATA = 0x7FE00010
_SAMPLES, _ROWS, _COLUMNS, _BITS = 0x00280002, 0x00280010, 0x00280011, 0x00280100
_ICON = 0x00880200
_END_OF_ITEM = 0xFFFEE00D
_DELIMITER = struct.pack("<HHI", END_OF_ITEMS >> 16, END_OF_ITEMS & 0xFFFF, 0)
_VR = re.compile(b"|".join(sorted(LONG_LENGTHS | SHORT_LENGTHS)))
_IMAGE_GROUP_OR_PIXELS = re.compile(rb"\x28\x00[\x02\x04\x08\x10]\x00|\xe0\x7f\x10\x00")
_MAX_STEPS = 200_000  # limit of elements and items read: less than a second
_STEPS_TO_SEARCH = 5_000  # all data once
_IN_A_ROW = 3  # so many valid elements in a row are taken as no coincidence


@dataclass(frozen=True)
class _Element:
    tag: int
    vr: bytes
    start: int
    """Position of its value."""
    length: int


class _StepLimitReached(Exception):  # noqa: N818  ends a search, no error
    pass


@dataclass
class _Reader:
    """Reads elements of `data`, up to a limit of `steps`."""

    data: bytes
    is_implicit: bool = False
    steps: int = _MAX_STEPS
    numbers: dict[int, int] = field(default_factory=dict)
    """Values of the elements so far that are one number of 16 bits, by tag."""

    def element(self, position: int) -> _Element | None:
        """The element whose header is at `position`; None where it is invalid."""
        self.steps -= 1
        if self.steps < 0:
            raise _StepLimitReached
        if position + 8 > len(self.data):
            return None
        group, number, vr, length = struct.unpack_from("<HH2sH", self.data, position)
        tag = group << 16 | number
        if self.is_implicit or group == 0xFFFE:
            return _Element(
                tag, b"", position + 8, struct.unpack_from("<I", self.data, position + 4)[0]
            )
        if vr not in LONG_LENGTHS and (vr not in SHORT_LENGTHS or tag == _PIXEL_DATA):
            vr = _find_vr(tag)
        if vr in SHORT_LENGTHS:
            return _Element(tag, vr, position + 8, length)
        if vr not in LONG_LENGTHS or position + 12 > len(self.data):
            return None
        return _Element(
            tag, vr, position + 12, struct.unpack_from("<I", self.data, position + 8)[0]
        )

    def end(self, element: _Element, depth: int = 0) -> int | None:
        """Position after the element; None where it is beyond the data, or items are invalid."""
        if element.length != UNDEFINED:
            end = element.start + element.length
            return end if end <= len(self.data) else None
        position: int | None = element.start
        while position is not None and depth < 8:
            item = self.element(position)
            if item is None or item.tag not in (ITEM, END_OF_ITEMS):
                return None
            if item.tag == END_OF_ITEMS:
                return item.start
            position = (
                self.end(item, depth) if item.length != UNDEFINED else self._end_of(item, depth)
            )
        return None

    def _end_of(self, item: _Element, depth: int) -> int | None:
        """Position after an item of undefined length."""
        position: int | None = item.start
        while position is not None:
            inner = self.element(position)
            if inner is None:
                return None
            if inner.tag == _END_OF_ITEM:
                return inner.start
            position = self.end(inner, depth + 1)
        return None

    def follows(self, position: int, last: int) -> bool:
        """Whether valid elements in ascending order start at `position`: _IN_A_ROW of them, or
        fewer up to the pixel data."""
        for _ in range(_IN_A_ROW):
            element = self.element(position)
            if element is None or not last < element.tag <= _PIXEL_DATA:
                return False
            if element.tag == _PIXEL_DATA:
                return self.pixels(position) is not None
            end = self.end(element)
            if end is None:
                return False
            position, last = end, element.tag
        return True

    def may_follow(self, position: int, last: int) -> bool:
        """Whether the tag at `position` may follow tag `last`; the rest is not checked."""
        return last < _read_tag(self.data, position) <= _PIXEL_DATA

    def candidates(self, position: int) -> Iterator[int]:
        """Positions where the next element may start."""
        pattern, before = (_IMAGE_GROUP_OR_PIXELS, 0) if self.is_implicit else (_VR, 4)
        for found in pattern.finditer(self.data, position + before):
            yield found.start() - before

    def pixels(self, position: int) -> tuple[bytes, bool] | None:
        """The element of the pixel data with its end, and whether it was repaired. None where
        pixels are missing, or are those of an icon."""
        element = self.element(position)
        if element is None or element.tag != _PIXEL_DATA or _ROWS not in self.numbers:
            return None
        head = self.data[position : element.start]
        has_vr = self.is_implicit or head[4:6] == element.vr
        item = self.element(element.start) if element.length == UNDEFINED else None
        if item is not None and item.tag == ITEM:
            return self._fragments(element, head)
        samples, bits = self.numbers.get(_SAMPLES, 1), self.numbers.get(_BITS, 0)
        size = self.numbers.get(_ROWS, 0) * self.numbers.get(_COLUMNS, 0) * samples * bits // 8
        size += size % 2
        is_sound = element.length in (size, size - 1)
        taken = element.length if is_sound else size
        end = element.start + taken
        rest = min(element.length, len(self.data) - element.start)
        if not size or end > len(self.data) or self._is_icon_before(end):
            return None
        if not is_sound and not (has_vr and size <= rest < 2 * size):
            return None
        pixels = struct.pack("<I", taken) + self.data[element.start : end]
        return head[:4] + element.vr + head[6:-4] + pixels, not (is_sound and has_vr)

    def _fragments(self, element: _Element, head: bytes) -> tuple[bytes, bool] | None:
        has_vr = self.is_implicit or head[4:6] in (b"OB", b"OW")
        if not self.is_implicit:  # with another VR pydicom would parse the items
            head = head[:4] + b"OB" + head[6:]
        position, fragments = element.start, list[bytes]()
        while (item := self.element(position)) is not None and item.tag == ITEM:
            fragments.append(self.data[item.start : item.start + item.length])
            position = item.start + item.length
        frame = b"".join(fragments[1:])
        is_sound = item is not None and item.tag == END_OF_ITEMS
        is_cut = position > len(self.data)
        is_run_length = RLELossless.encode() in self.data[:1024] and not is_cut
        if not frame or not (is_sound or is_complete(frame) or is_run_length):
            return None
        if self._is_icon_before(position):
            return None
        items = b"".join(
            struct.pack("<HHI", ITEM >> 16, ITEM & 0xFFFF, len(part)) + part for part in fragments
        )
        return head + items + _DELIMITER, is_cut or not (is_sound and has_vr)

    def _is_icon_before(self, end: int) -> bool:
        self.steps -= _STEPS_TO_SEARCH
        return is_icon_before(self.data, end)


def is_icon_before(data: bytes, end: int) -> bool:
    """Whether pixel data that ends there is an icon's: an item, or elements of the image, and later
    its pixel data follow."""
    tag = _read_tag(data, end)
    is_more = _ICON < tag <= _PIXEL_DATA or tag >> 16 == ITEM >> 16
    return is_more and data.find(struct.pack("<HH", 0x7FE0, 0x0010), end) >= 0


def repair_file(data: bytes, repairs: Repairs) -> bytes | None:
    """`data` with readable pixel data; None where it cannot be repaired."""
    try:
        return _repair(_Reader(data), repairs, _Reader.may_follow) or _repair(
            _Reader(data), repairs, _Reader.follows
        )
    except _StepLimitReached:
        return None


def _repair(
    reader: _Reader, repairs: Repairs, is_next: Callable[[_Reader, int, int], bool]
) -> bytes | None:
    """As `repair_file`; an element's length is correct where `is_next` accepts what follows."""
    data = reader.data
    position, syntax = _skip_meta(reader)
    if syntax == ExplicitVRBigEndian.encode():
        return None
    vr = data[position + 4 : position + 6]
    reader.is_implicit = (
        syntax == ImplicitVRLittleEndian.encode() or vr not in LONG_LENGTHS | SHORT_LENGTHS
    )
    kept, last, own_repairs = [data[:position]], 0, Repairs()
    while True:
        element = reader.element(position)
        if element is not None and element.tag == _PIXEL_DATA:
            found = reader.pixels(position)
            if found is not None:
                repairs |= own_repairs | ({"parsed:PixelData"} if found[1] else set())
                return b"".join([*kept, found[0]])
        end = None
        if element is not None and last < element.tag < _PIXEL_DATA:
            end = reader.end(element)
        if element is not None and end is not None and is_next(reader, end, element.tag):
            kept.append(data[position:end])
            if element.vr != data[position + 4 : position + 6] and not reader.is_implicit:
                kept[-1] = data[position : position + 4] + element.vr + data[position + 6 : end]
                own_repairs.add(f"parsed:{_name(data, position, last)}")
            if element.length == 2:
                reader.numbers[element.tag] = int.from_bytes(data[end - 2 : end], "little")
            position, last = end, element.tag
            continue
        own_repairs.add(f"parsed:{_name(data, position, last)}")
        following = (p for p in reader.candidates(position + 1) if reader.follows(p, last))
        position = next(following, len(data))
        if position == len(data):
            return None


def _skip_meta(reader: _Reader) -> tuple[int, bytes]:
    """Start of the data set, and the transfer syntax in the file meta information."""
    position, syntax = (132 if reader.data[128:132] == b"DICM" else 0), b""
    while reader.data[position : position + 2] == b"\x02\x00":
        element = reader.element(position)
        end = None if element is None else reader.end(element)
        if element is None or end is None:
            break
        if element.tag == TRANSFER_SYNTAX:
            syntax = reader.data[element.start : end].rstrip(b"\0 ")
        position = end
    return position, syntax


def _read_tag(data: bytes, position: int) -> int:
    group, number = struct.unpack("<HH", data[position : position + 4].ljust(4, b"\0"))
    return int(group) << 16 | int(number)


def _find_vr(tag: int) -> bytes:
    """The VR of an element of the standard, pixel data or one whose length has 16 bits; empty for
    others."""
    vr = dictionary_VR(tag)[:2].encode() if dictionary_has_tag(tag) else b""  # of two the first
    return vr if vr in SHORT_LENGTHS or tag == _PIXEL_DATA else b""


def _name(data: bytes, position: int, last: int) -> str:
    """The keyword of the element that does not parse; of the previous one where its tag is
    unknown."""
    tag = _read_tag(data, position)
    if tag >> 16 & 1 and last < tag < _PIXEL_DATA:
        return "private"
    return keyword_for_tag(tag) or keyword_for_tag(last) or "unknown"
