"""Properties of a compressed frame, from its codestream: transfer syntax, size, end.

Where the DICOM header differs the codestream is right, as decoders follow it.
"""

import re
import struct
from typing import NamedTuple

from pydicom import uid
from pydicom.uid import UID

_MAX_TILES = 4096  # of JPEG 2000; each takes kilobytes of memory, even if it is small


class FrameSize(NamedTuple):
    """The size in a codestream."""

    rows: int
    columns: int
    samples: int
    precision: int


def read_jpeg_size(frame: bytes) -> FrameSize | None:
    """The size in the frame header of JPEG (ITU-T T.81 B.2.2) or JPEG-LS (T.87 C.2.2)."""
    position = _find_frame_header(frame)
    if position is None:
        return None
    precision, rows, columns, samples = struct.unpack_from(">BHHB", frame, position + 4)
    return FrameSize(rows, columns, samples, precision)


def _find_frame_header(frame: bytes) -> int | None:
    if frame[:2] != _START_OF_IMAGE:
        return None
    position = 2
    # Bytes before a marker are skipped, as in libjpeg.
    while (position := frame.find(b"\xff", position)) >= 0 and position + 10 <= len(frame):
        marker = frame[position + 1]
        if marker in _FRAME_HEADERS:
            return position
        if marker == 0xDA:  # start of scan, without a frame header before it
            return None
        if marker == 0xFF:
            position += 1
        elif marker in _BARE_MARKERS:
            position += 2
        else:
            position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    return None


_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = {0x00, 0x01, *range(0xD0, 0xDA)}  # without a length
_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_JPEG_2000 = b"\xff\x4f\xff\x51"
_EXTENDED_CAPABILITIES = b"\xff\x50"  # of HTJ2K, right after the size
_JFIF, _ADOBE = re.compile(rb"\xff\xe0..JFIF", re.S), re.compile(rb"\xff\xee(..)Adobe", re.S)
_CODING_STYLE, _START_OF_TILE = b"\xff\x52", b"\xff\x90"  # of JPEG 2000
_SCAN_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")  # without restart markers and stuffing
_SYNTAX_OF_FRAME_HEADER = {
    **dict.fromkeys((0xC0, 0xC2), uid.JPEGBaseline8Bit),
    0xC1: uid.JPEGExtended12Bit,
    0xC3: uid.JPEGLosslessSV1,
    0xF7: uid.JPEGLSNearLossless,
}


def find_syntax(frame: bytes) -> UID | None:
    """The transfer syntax to decode the frame with, from its first bytes; None if unknown."""
    jpeg_2000 = find_jpeg_2000(frame)
    if jpeg_2000 is not None:
        size = int.from_bytes(frame[jpeg_2000 + 4 : jpeg_2000 + 6], "big")
        after = jpeg_2000 + 4 + size
        return uid.HTJ2K if frame[after : after + 2] == _EXTENDED_CAPABILITIES else uid.JPEG2000
    position = _find_frame_header(frame)
    if position is not None:
        return _SYNTAX_OF_FRAME_HEADER.get(frame[position + 1])
    if len(frame) >= 64:
        segments, first = struct.unpack_from("<2I", frame)
        if 1 <= segments <= 15 and first == 64:
            return uid.RLELossless
    return None


def find_jpeg_2000(frame: bytes) -> int | None:
    """Start of the JPEG 2000 codestream, which may be in a JP2 file; None where there is none."""
    if frame.startswith(_START_OF_JPEG_2000):
        return 0
    if frame[4:8] != b"jP  ":
        return None
    position = frame.find(_START_OF_JPEG_2000)
    return None if position < 0 else position


def read_jpeg_2000_size(frame: bytes) -> FrameSize | None:
    """The size in the SIZ marker (ITU-T T.800 A.5.1); None where it is missing or unsupported."""
    if not frame.startswith(_START_OF_JPEG_2000) or len(frame) < 45:
        return None
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", frame, 8)
    (samples,) = struct.unpack_from(">H", frame, 40)
    components = frame[42 : 42 + 3 * samples]
    if any(step != 1 for i, step in enumerate(components) if i % 3) or not components:
        return None  # subsampled
    tiles = -(-right // max(tile_width, 1)) * -(-bottom // max(tile_height, 1))
    if tiles > _MAX_TILES:
        return None
    return FrameSize(bottom - top, right - left, samples, 1 + (components[0] & 0x7F))


def is_signed_jpeg_2000(frame: bytes) -> bool:
    """Whether the samples are signed, by the SIZ marker."""
    return frame.startswith(_START_OF_JPEG_2000) and len(frame) > 42 and frame[42] >= 0x80


def find_end(frame: bytes) -> int | None:
    """Position after the end marker of a JPEG or JPEG-LS codestream; None where it is truncated.

    Searched after the frame header: a thumbnail in an application segment has its own end marker.
    """
    position = _find_frame_header(frame)
    while position is not None:
        if frame[position + 1 : position + 2] == _END_OF_IMAGE[1:]:
            return position + 2
        # A segment, and for a scan the coded data after it, up to the next marker.
        position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        found = _SCAN_MARKER.search(frame, position)
        position = found.start() if found else None
    return None


def is_complete(frame: bytes) -> bool:
    """Whether the codestream has an end marker, so it is not truncated."""
    start = find_jpeg_2000(frame)
    if start is not None:  # within its data FF is never followed by a byte above 8F
        return _END_OF_IMAGE in frame[start + 4 :]
    return find_end(frame) is not None


def is_ycbcr(frame: bytes) -> bool | None:
    """Whether a lossy JPEG of three components is YCbCr, else RGB; None where Adobe's marker is too
    short to say it.

    By libjpeg's rule: JFIF is YCbCr, Adobe's marker says it, components named R, G and B are RGB.
    """
    position = _find_frame_header(frame) or 0
    if _JFIF.search(frame, 0, position):
        return True
    adobe = _ADOBE.search(frame, 0, position)
    if adobe:
        is_whole = int.from_bytes(adobe[1], "big") >= 14
        return frame[adobe.end() + 6 : adobe.end() + 7] != b"\0" if is_whole else None
    return frame[position + 10 : position + 19 : 3] != b"RGB"


def has_colour_transform(frame: bytes) -> bool:
    """Whether the COD marker of a JPEG 2000 says that decoders return RGB (ITU-T T.800 A.6.1)."""
    position = 2
    while (marker := frame[position : position + 2]) not in (_START_OF_TILE, b""):
        if marker == _CODING_STYLE:
            return frame[position + 8 : position + 9] == b"\1"
        position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    return False
