"""The pixel data of one DICOM frame -> its stored values, by the decoder of its transfer syntax.

A decoder is always named, so that the same file gives the same picture whatever is installed.
What a frame claims is checked before a decoder in C or C++ sees it: they take memory for whatever
the codestream says, and some crash. So its size must be the header's, and expansion is bounded.
"""

from __future__ import annotations

import importlib.util
import itertools
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
import simplejpeg
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from pneumo.errors import DicomError

Stored = npt.NDArray[np.uint8 | np.int8 | np.uint16 | np.int16]

MAX_PIXELS = 64_000_000
"""A frame that claims more is refused before any memory is taken for it."""

_LONGEST_RUN = 128
_MAX_TILES = 4096  # of JPEG 2000; each takes kilobytes, whatever its size in pixels

_NATIVE = {
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
}
_JPEG = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1}
_JPEG_LS = {JPEGLSLossless, JPEGLSNearLossless}
_JPEG_2000 = {JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K}

_IMAGECODECS = "imagecodecs"
_PLUGINS: dict[str, tuple[str, ...]] = {
    # pydicom's names of its plugins, the preferred one first.
    JPEGBaseline8Bit: ("pillow",),
    JPEGExtended12Bit: ("pillow",),
    # Not gdcm: it ends the process on some damaged frames. pydicom has no plugin for imagecodecs.
    JPEGLossless: (_IMAGECODECS,),
    JPEGLosslessSV1: (_IMAGECODECS,),
    JPEGLSLossless: ("pyjpegls",),
    JPEGLSNearLossless: ("pyjpegls",),
    JPEG2000Lossless: ("pylibjpeg", "pillow"),
    JPEG2000: ("pylibjpeg", "pillow"),
    HTJ2KLossless: ("pylibjpeg",),
    HTJ2KLosslessRPCL: ("pylibjpeg",),
    HTJ2K: ("pylibjpeg",),
    RLELossless: ("pylibjpeg", "pydicom"),
}
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PHOTOMETRICS = {1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"), 3: _COLOURS}


@dataclass(frozen=True)
class FrameFormat:
    """What a header states about its one frame (PS3.3 C.7.6.3), checked."""

    rows: int
    columns: int
    samples: int
    """1, or 3 of a colour picture."""
    photometric: str
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """8 to `bits_allocated`."""
    high_bit: int
    signed: bool
    planar: int


class FrameSize(NamedTuple):
    """What a codestream says that it holds."""

    rows: int
    columns: int
    samples: int
    precision: int


def read_format(dataset: pydicom.Dataset) -> FrameFormat:
    """What the header says about the frame.

    Raises DicomError: no_pixels, multi_frame, too_large, photometric, undecodable.
    """
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise DicomError("floating-point pixels, expected 8 to 16 bits", "photometric")
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise DicomError("no pixel data (is the file truncated?)", "no_pixels")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise DicomError(f"{frames} frames, expected one", "multi_frame")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows < 1 or columns < 1:
        raise DicomError(f"claims {rows} x {columns} pixels", "no_pixels")
    if rows * columns > MAX_PIXELS:
        raise DicomError(f"claims {rows} x {columns} pixels", "too_large")
    samples = _integer(dataset, "SamplesPerPixel", 1)
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if photometric not in _PHOTOMETRICS.get(samples, ()):
        known = photometric if photometric in sum(_PHOTOMETRICS.values(), ()) else "unknown"
        raise DicomError(
            f"{samples} samples a pixel, photometric interpretation {known}", "photometric"
        )
    allocated = _integer(dataset, "BitsAllocated", 0)
    stored = _integer(dataset, "BitsStored", allocated)
    if allocated not in (8, 16) or not 8 <= stored <= allocated:
        raise DicomError(
            f"{stored} bits stored in {allocated}, expected 8 to 16 bits", "photometric"
        )
    high_bit = _integer(dataset, "HighBit", stored - 1)
    representation = _integer(dataset, "PixelRepresentation", 0)
    planar = _integer(dataset, "PlanarConfiguration", 0)
    if (
        not stored - 1 <= high_bit < allocated
        or representation not in (0, 1)
        or planar not in (0, 1)
    ):
        raise DicomError(
            f"high bit {high_bit} of {allocated}, pixel representation {representation}, "
            f"planar configuration {planar}"
        )
    signed = representation == 1
    return FrameFormat(
        rows, columns, samples, photometric, allocated, stored, high_bit, signed, planar
    )


def _integer(dataset: pydicom.Dataset, keyword: str, absent: int) -> int:
    value = dataset.get(keyword)
    return absent if value is None or value == "" else int(value)


def transfer_syntax(dataset: pydicom.Dataset) -> UID:
    """The transfer syntax; without file meta information, the one by which the file was parsed."""
    stated = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if stated:
        return UID(str(stated))
    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian


def choose_plugin(syntax: str, installed: Collection[str], *, stated: str | None = None) -> str:
    """pydicom's name of the plugin that decodes `syntax`, of those `installed`.

    `stated` is the file's own syntax, where another one's decoder reads it.
    Raises DicomError(no_decoder), which says what to install.
    """
    wanted = _PLUGINS.get(syntax, ())
    for plugin in wanted:
        if plugin in installed:
            return plugin
    remedy = "pip install 'pneumo[codecs]'" if wanted else "this transfer syntax is not supported"
    raise DicomError(f"no decoder for {_name(stated or syntax)}: {remedy}", "no_decoder")


def _installed(syntax: str) -> Collection[str]:
    plugins = get_decoder(syntax).available_plugins if syntax in _PLUGINS else ()
    return (*plugins, _IMAGECODECS) if importlib.util.find_spec(_IMAGECODECS) else plugins


def _name(syntax: str) -> str:
    """A transfer syntax for a message; a text that is no registered UID is not repeated."""
    name = UID(syntax).name
    return "an unknown transfer syntax" if name == syntax else f"{name} ({syntax})"


def decode_stored(dataset: pydicom.Dataset, form: FrameFormat) -> tuple[Stored, str]:
    """The frame's stored values, (H, W) or (H, W, 3); and the colour space that they are in.

    Unused high bits, which may hold overlays, are gone; signed values have their sign.
    Raises DicomError: no_decoder, photometric, undecodable.
    """
    syntax, element = transfer_syntax(dataset), dataset["PixelData"]
    plugin, frame = "", b""
    if syntax not in _NATIVE:
        plugin = choose_plugin(syntax, _installed(syntax))
        frame = read_frame(dataset, form)
        if syntax == JPEGExtended12Bit and _precision(frame) > 8:  # no plugin of pydicom's has them
            plugin = choose_plugin(JPEGLossless, _installed(syntax), stated=syntax)
        if plugin == "pydicom":
            check_runs(frame, form)
        if plugin == "pillow" and syntax in _JPEG:
            check_scan(frame)
    elif element.is_undefined_length:
        raise DicomError("encapsulated pixel data in an uncompressed transfer syntax")
    # Whether samples are the header's bit fields; in a JPEG codestream they are numbers.
    raw_bits = (
        syntax in _NATIVE
        or syntax == RLELossless
        or (syntax in _JPEG_LS and _precision(frame) > form.bits_stored)
    )
    try:
        if plugin == _IMAGECODECS:
            return _decode_jpeg(frame, form), form.photometric
        # Encapsulated anew: the decoder gets the very bytes that were checked.
        source = encapsulate([frame], has_bot=False) if frame else element.value
        stored, properties = get_decoder(syntax).as_array(
            source,
            index=0,
            raw=True,
            decoding_plugin=plugin,
            **_decoder_options(form, raw_bits=raw_bits, vr=str(element.VR)),
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise DicomError(f"pixel data does not decode: {type(error).__name__}") from error
    if stored.dtype.itemsize > 2:
        raise DicomError("the codestream has more than 16 bits a sample", "photometric")
    if raw_bits:
        stored = _drop_unused_bits(stored, form, form.high_bit)
    # Big endian data has a dtype of its own, which neither OpenCV nor a view understands.
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return native, str(properties["photometric_interpretation"])


def _decode_jpeg(frame: bytes, form: FrameFormat) -> Stored:
    """A lossless JPEG, or one of 12 bits, by libjpeg-turbo."""
    import imagecodecs  # of the extra `codecs`

    if _END_OF_IMAGE not in frame[-16:]:
        raise DicomError("the JPEG frame is cut off")  # libjpeg-turbo would fill it up with gray
    space = "RGB" if form.samples == 3 else None  # equal colour spaces: samples stay as they are
    samples = imagecodecs.jpeg8_decode(frame, colorspace=space, outcolorspace=space)
    if samples.dtype.itemsize * 8 > form.bits_allocated:
        raise DicomError(f"the codestream has more than {form.bits_allocated} bits a sample")
    unsigned = samples.astype(f"u{form.bits_allocated // 8}", copy=False)
    stored = unsigned.view(f"i{form.bits_allocated // 8}") if form.signed else unsigned
    # A writer that encodes the header's bit fields as they are says so by their precision.
    raw_bits = _precision(frame) > form.bits_stored
    return _drop_unused_bits(stored, form, form.high_bit if raw_bits else form.bits_stored - 1)


def _precision(frame: bytes) -> int:
    size = read_jpeg_size(frame)
    return 0 if size is None else size.precision


def _decoder_options(form: FrameFormat, *, raw_bits: bool, vr: str) -> dict[str, Any]:
    return {
        "rows": form.rows,
        "columns": form.columns,
        "number_of_frames": 1,
        "samples_per_pixel": form.samples,
        "photometric_interpretation": form.photometric,
        "bits_allocated": form.bits_allocated,
        "bits_stored": form.bits_stored,
        "pixel_representation": int(form.signed),
        "planar_configuration": form.planar,
        "pixel_keyword": "PixelData",
        "pixel_vr": vr,
        "allow_excess_frames": False,
        # pydicom takes the lowest bits, whatever the high bit says; see `_drop_unused_bits`.
        "correct_unused_bits": not raw_bits,
        "view_only": True,
    }


def _drop_unused_bits(stored: Stored, form: FrameFormat, high_bit: int) -> Stored:
    """`stored` without the bits outside [high bit - bits stored + 1, high bit], sign-extended."""
    if form.bits_stored == form.bits_allocated:
        return stored
    # The shift back is arithmetic where the type is signed.
    shifted = np.left_shift(stored, form.bits_allocated - 1 - high_bit)
    return np.right_shift(shifted, form.bits_allocated - form.bits_stored, out=shifted)


def read_frame(dataset: pydicom.Dataset, form: FrameFormat) -> bytes:
    """The frame's codestream, which claims what the header says.

    Raises DicomError(undecodable).
    """
    try:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    except Exception as error:  # no items, items beyond the end, offsets into nowhere
        raise DicomError(f"pixel data is not encapsulated: {type(error).__name__}") from error
    syntax = transfer_syntax(dataset)
    if syntax in _JPEG_2000:
        # From here on only the codestream: some writers wrap it in the boxes of a JP2 file.
        frame = frame[max(frame.find(_START_OF_JPEG_2000), 0) :]
        size = _read_jpeg2000_size(frame)
    elif syntax in _JPEG or syntax in _JPEG_LS:
        size = read_jpeg_size(frame)
    else:
        return frame  # RLE says nothing of its size
    if size is None:
        raise DicomError("the frame is no codestream of its transfer syntax")
    if (size.rows, size.columns, size.samples) != (form.rows, form.columns, form.samples):
        raise DicomError(
            f"the codestream holds {size.rows} x {size.columns} x {size.samples} samples, the "
            f"header says {form.rows} x {form.columns} x {form.samples}"
        )
    return frame


def read_jpeg_size(frame: bytes) -> FrameSize | None:
    """What the frame header of JPEG (ITU-T T.81 B.2.2) or JPEG-LS (T.87 C.2.2) says."""
    if frame[:2] != b"\xff\xd8":
        return None
    place = 2
    # What stands before a marker is skipped, as libjpeg does.
    while (place := frame.find(b"\xff", place)) >= 0 and place + 10 <= len(frame):
        marker = frame[place + 1]
        if marker in _FRAME_HEADERS:
            precision, rows, columns, samples = struct.unpack_from(">BHHB", frame, place + 4)
            return FrameSize(rows, columns, samples, precision)
        if marker == 0xDA:  # the scan starts, and no frame header came before
            return None
        if marker == 0xFF:
            place += 1
        elif marker in _BARE_MARKERS:
            place += 2
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None


_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = {0x00, 0x01, *range(0xD0, 0xDA)}  # no length follows
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_JPEG_2000 = b"\xff\x4f\xff\x51"


def _read_jpeg2000_size(frame: bytes) -> FrameSize | None:
    """What the SIZ marker (ITU-T T.800 A.5.1) says; None too where it cannot be one picture."""
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


def check_scan(frame: bytes) -> None:
    """Raise DicomError where libjpeg calls the entropy-coded data of a JPEG frame corrupt.

    It only warns of that, and Pillow does not pass it on, though most of the picture may be wrong.
    """
    try:
        # At an eighth of the size, which reads every code too.
        simplejpeg.decode_jpeg(frame, "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        if str(error).startswith("Corrupt JPEG data"):
            raise DicomError(f"the JPEG frame is damaged: {error}") from error


def check_runs(frame: bytes, form: FrameFormat) -> None:
    """Raise DicomError where a run-length segment (PS3.5 annex G) expands beyond the picture.

    Two bytes become up to 128, and pydicom's own decoder collects them all before it counts.
    """
    num_segments = min(int.from_bytes(frame[:4], "little"), 15)
    if len(frame) < 64:
        raise DicomError("the frame is no codestream of its transfer syntax")
    offsets = [*struct.unpack_from(f"<{num_segments}I", frame, 4), len(frame)]
    limit = form.rows * form.columns + 2 * _LONGEST_RUN  # some writers pad the last run
    for place, end in itertools.pairwise(offsets):
        expanded = 0
        while place < min(end, len(frame)):
            control = frame[place]
            expanded += control + 1 if control < 128 else 257 - control if control > 128 else 0
            place += control + 2 if control < 128 else 2 if control > 128 else 1
            if expanded > limit:
                raise DicomError("a run-length segment expands beyond the picture")
