"""The pixel data of one DICOM frame -> its stored values, by the decoder of its transfer syntax.

The decoder is always chosen explicitly, so that a file gives the same image whatever is installed.
A frame is checked before it is passed to a decoder in C or C++: they allocate whatever the
codestream claims, and some crash. So its size must be the header's, and expansion is limited. In
all else (bits, planes, syntax, length) the codestream is followed where the header differs.
"""

import importlib.util
import io
import itertools
import struct
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pydicom
import simplejpeg
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from pneumo.errors import DicomError
from pneumo.images.codestreams import (
    find_end,
    find_jpeg_2000,
    find_syntax,
    has_colour_transform,
    is_complete,
    is_signed_jpeg_2000,
    is_ycbcr,
    read_jpeg_2000_size,
    read_jpeg_size,
)
from pneumo.images.elements import Repairs
from pneumo.images.frame_format import FrameFormat
from pneumo.images.stored_values import Stored, make_values

_LONGEST_RUN = 128
_FEW_ZEROS = 16  # that may end the data of a sound frame which lacks its end marker
_ADOBE_RGB = b"\xff\xee\0\x0eAdobe" + bytes(7)  # the marker for RGB
_MORE_BYTES = b"\0" + bytes(range(1, 128))  # various, and none is a marker

_GE_BIG_ENDIAN = UID("1.2.840.113619.5.2")
"""GE's private syntax: implicit VR, little endian, with big endian pixels."""
_LOSSLESS_JPEG = {uid.JPEGLossless, uid.JPEGLosslessSV1}
_NEW_SYNTAXES = {  # pydicom 3.0 has no names for them
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}

_IMAGECODECS = "imagecodecs"
_PLUGINS: dict[str, tuple[str, ...]] = {
    # pydicom's names of its plugins, in order of preference.
    uid.JPEGBaseline8Bit: ("pillow",),  # but without pydicom, see `_decode_lossy_jpeg`
    uid.JPEGExtended12Bit: ("pillow",),
    # Not gdcm: it crashes on some damaged frames. pydicom has no plugin for imagecodecs.
    uid.JPEGLossless: (_IMAGECODECS,),
    uid.JPEGLosslessSV1: (_IMAGECODECS,),
    uid.JPEGLSLossless: ("pyjpegls",),
    uid.JPEGLSNearLossless: ("pyjpegls",),
    uid.JPEG2000Lossless: ("pylibjpeg", "pillow"),
    uid.JPEG2000: ("pylibjpeg", "pillow"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
    uid.RLELossless: ("pylibjpeg", "pydicom"),
}


def transfer_syntax(dataset: pydicom.Dataset) -> UID:
    """The transfer syntax; without file meta information, the one with which it was parsed."""
    stated = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if stated:
        return UID(str(stated))
    implicit, little = dataset.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRBigEndian if little is False else uid.ExplicitVRLittleEndian


def choose_plugin(syntax: str, installed: Collection[str], *, stated: str | None = None) -> str:
    """pydicom's name of the `installed` plugin to decode `syntax` with.

    `stated` is the file's syntax for the error, where it is decoded as another one.
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
    """A transfer syntax for a message; a text that is no registered UID is not quoted."""
    name = _NEW_SYNTAXES.get(syntax, UID(syntax).name)
    return "an unknown transfer syntax" if name == syntax else f"{name} ({syntax})"


def decode_stored(
    dataset: pydicom.Dataset, form: FrameFormat, repairs: Repairs
) -> tuple[Stored, FrameFormat]:
    """The frame's stored values, (H, W) or (H, W, 3), and their format: the header's `form`,
    corrected where the codestream differs.

    Unused high bits, which may contain overlays, are removed; signed values are sign-extended.
    Raises DicomError: no_decoder, multi_frame, photometric, undecodable.
    """
    stated, element = transfer_syntax(dataset), dataset["PixelData"]
    size = _uncompressed_size(form)
    may_widen = not any(tag >> 24 == 0x60 for tag in dataset.keys())  # noqa: SIM118  no overlays
    if _is_encapsulated(element, stated, size):
        frame = read_frame(dataset, repairs)
        return _decode_encapsulated(frame, stated, form, repairs, may_widen=may_widen)
    whole = form.rows * form.columns * 3 * form.bits_allocated // 8
    if form.photometric == "YBR_FULL_422" and len(element.value or b"") in (whole, whole + 1):
        # Decompressed, with the header of the compressed file.
        repairs.add("codestream:PhotometricInterpretation")
        form = replace(form, photometric="YBR_FULL")
    elif form.photometric in ("YBR_ICT", "YBR_RCT"):  # only JPEG 2000 has these
        repairs.add("codestream:PhotometricInterpretation")
        form = replace(form, photometric="RGB")
    elif form.photometric == "YBR_FULL_422" and form.planar:  # it has no planes
        repairs.add("left_out:PlanarConfiguration")
        form = replace(form, planar=0)
    if not size <= len(element.value or b"") < max(2 * size, 3):  # one pixel is filled up to two
        raise DicomError(f"{len(element.value or b'')} bytes of pixels, the header says {size}")
    syntax = stated
    if stated not in uid.UncompressedTransferSyntaxes:
        repairs.add("codestream:TransferSyntaxUID")
        syntax = uid.ExplicitVRBigEndian if stated == _GE_BIG_ENDIAN else uid.ExplicitVRLittleEndian
    vr = "OB" if element.VR == "OB" else "OW"
    stored, _ = _run_decoder(element.value, syntax, form, "", vr=vr)
    return make_values(stored, form, repairs, may_widen=may_widen)


def _uncompressed_size(form: FrameFormat) -> int:
    """Bytes of the uncompressed frame; YBR_FULL_422 has half of the colours (PS3.3 C.7.6.3.1.2)."""
    samples = 2 if form.photometric == "YBR_FULL_422" else form.samples
    return form.rows * form.columns * samples * form.bits_allocated // 8


def _is_encapsulated(element: pydicom.DataElement, stated: UID, size: int) -> bool:
    """Whether the pixels are in items: by how they start and whether they have exactly the `size`
    of uncompressed pixels; by the header where this does not decide."""
    value = element.value or b""
    is_item, has_size = value[:4] == b"\xfe\xff\x00\xe0", len(value) in (size, size + size % 2)
    if is_item != has_size:
        return is_item
    return element.is_undefined_length or stated not in uid.UncompressedTransferSyntaxes


def _decode_encapsulated(
    frame: bytes, stated: UID, form: FrameFormat, repairs: Repairs, *, may_widen: bool
) -> tuple[Stored, FrameFormat]:
    """As `decode_stored`, for a frame's codestream. `may_widen`: bits above those stored are no
    overlays."""
    syntax = _find_syntax(frame, stated, repairs)
    plugin = choose_plugin(syntax, _installed(syntax))
    frame = _check_frame(frame, syntax, form)
    if plugin == "pydicom":
        check_runs(frame, form)
    elif plugin == "pillow" and syntax in uid.JPEGTransferSyntaxes:
        if _read_precision(frame, syntax) > 8:  # no plugin of pydicom decodes 12 bits
            plugin = choose_plugin(uid.JPEGLossless, _installed(syntax), stated=syntax)
        else:
            check_scan(frame)
    form = _follow_codestream(frame, syntax, form, repairs)
    return _decode_frame(frame, syntax, form, plugin, repairs, may_widen=may_widen)


def _find_syntax(frame: bytes, stated: UID, repairs: Repairs) -> UID:
    """The transfer syntax to decode with: the stated one, unless the codestream has another."""
    found = find_syntax(frame)
    if found is None and stated in uid.UncompressedTransferSyntaxes:
        raise DicomError("encapsulated pixel data in an uncompressed transfer syntax")
    if found is None or _PLUGINS.get(found) == _PLUGINS.get(stated):
        return stated
    if stated in _LOSSLESS_JPEG and found in uid.JPEGTransferSyntaxes:
        return stated  # its decoder supports these too
    repairs.add("codestream:TransferSyntaxUID")
    return found


def _follow_codestream(
    frame: bytes, syntax: UID, form: FrameFormat, repairs: Repairs
) -> FrameFormat:
    """`form` with the bits, planes and colours of the codestream."""
    if syntax == uid.RLELossless:
        return form  # which does not contain them
    changes: dict[str, Any] = {}
    if form.planar and form.samples > 1:
        repairs.add("codestream:PlanarConfiguration")
        changes["planar"] = 0  # decoders return colour by pixel
    bits = _read_precision(frame, syntax)
    is_lossy = syntax in uid.JPEGTransferSyntaxes and find_syntax(frame) not in _LOSSLESS_JPEG
    if bits > form.bits_allocated or (is_lossy and bits != form.bits_stored):
        repairs.add("codestream:BitsStored")
        changes |= {"bits_stored": bits, "high_bit": bits - 1}
        changes["bits_allocated"] = 8 if bits <= 8 else 16
    elif is_lossy and bits <= 8 < form.bits_allocated:
        repairs.add("codestream:BitsAllocated")
        changes["bits_allocated"] = 8
    photometric = form.photometric
    if is_lossy and form.samples == 3 and is_ycbcr(frame) is (photometric == "RGB"):
        photometric = "YBR_FULL" if photometric == "RGB" else "RGB"
    elif syntax in uid.JPEG2000TransferSyntaxes and photometric.startswith("YBR_FULL"):
        photometric = "RGB" if has_colour_transform(frame) else photometric
    if photometric != form.photometric:
        repairs.add("codestream:PhotometricInterpretation")
    return replace(form, **changes, photometric=photometric)


def _decode_frame(
    frame: bytes,
    syntax: UID,
    form: FrameFormat,
    plugin: str,
    repairs: Repairs,
    *,
    may_widen: bool,
) -> tuple[Stored, FrameFormat]:
    if plugin == _IMAGECODECS:
        stored = _decode_jpeg(frame, form)
    elif syntax in uid.JPEGTransferSyntaxes:
        stored = _decode_lossy_jpeg(frame, form)
    else:
        # Encapsulated again, so that the decoder gets exactly the checked bytes.
        source = encapsulate([frame], has_bot=False)
        stored, photometric = _run_decoder(source, syntax, form, plugin, vr="OB")
        form = replace(form, photometric=photometric)
    bits = _read_precision(frame, syntax)
    is_beyond = bits > form.bits_stored and not form.signed and stored.max() >> form.bits_stored
    if may_widen and is_beyond and form.high_bit == form.bits_stored - 1:
        # Not a bit field of a word, as some writers encode it, but too few bits in the header.
        repairs.add("codestream:BitsStored")
        form = replace(form, bits_stored=bits, high_bit=bits - 1)
    # The precision tells whether a writer has encoded whole words with the header's bit field.
    is_bit_field = syntax == uid.RLELossless or (
        bits > form.bits_stored and syntax not in uid.JPEG2000TransferSyntaxes
    )
    low = form if is_bit_field else replace(form, high_bit=form.bits_stored - 1)
    return make_values(stored, low, repairs, is_signed=is_signed_jpeg_2000(frame))


def _run_decoder(
    source: bytes, syntax: UID, form: FrameFormat, plugin: str, *, vr: str
) -> tuple[Stored, str]:
    """The output of pydicom's decoder, and its colour space."""
    options: dict[str, Any] = {
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
        # pydicom takes the lowest bits, whatever the high bit says; see `stored_values`.
        "correct_unused_bits": False,
        "view_only": True,
    }
    try:
        stored, properties = get_decoder(syntax).as_array(
            source, index=0, raw=True, decoding_plugin=plugin, **options
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust does not derive from Exception
        raise DicomError(f"pixel data does not decode: {type(error).__name__}") from error
    if stored.dtype.itemsize > 2:
        raise DicomError("the codestream has more than 16 bits a sample", "photometric")
    # Big endian data has a dtype that neither OpenCV nor a view supports.
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return native, str(properties["photometric_interpretation"])


def _decode_lossy_jpeg(frame: bytes, form: FrameFormat) -> Stored:
    """Decode a lossy JPEG of 8 bits, without a conversion of colours.

    pydicom's plugin converts YCbCr to RGB where the frame has Adobe's marker.
    """
    is_rgb = form.photometric == "RGB"
    try:
        marked = frame[:2] + _ADOBE_RGB + frame[2:] if is_rgb else frame
        image = Image.open(io.BytesIO(marked), formats=("JPEG",))
        if not is_rgb:
            image.draft("YCbCr", None)
        samples = np.asarray(image)
    except Exception as error:
        raise DicomError(f"pixel data does not decode: {type(error).__name__}") from error
    return samples.view(np.int8) if form.signed else samples


def _decode_jpeg(frame: bytes, form: FrameFormat) -> Stored:
    """Decode a lossless JPEG, or one of 12 bits, with libjpeg-turbo."""
    import imagecodecs  # in the extra `codecs`

    end = find_end(frame)
    if end is None:
        raise DicomError("the JPEG frame is truncated")  # libjpeg-turbo would pad it with gray
    space = "RGB" if form.samples == 3 else None  # equal spaces: no conversion
    longer = frame[: end - 2] + _MORE_BYTES + frame[end - 2 : end]
    try:
        samples, other = (
            imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace=space)
            for data in (frame[:end], longer)
        )
    except Exception as error:
        raise DicomError(f"pixel data does not decode: {type(error).__name__}") from error
    if (samples != other).any():  # imagecodecs hides libjpeg's warning of data that ends too early
        raise DicomError("the JPEG frame is damaged: its data ends too early")
    unsigned = samples.astype(f"u{form.bits_allocated // 8}", copy=False)
    return unsigned.view(f"i{form.bits_allocated // 8}") if form.signed else unsigned


def _read_precision(frame: bytes, syntax: UID) -> int:
    size = (
        read_jpeg_2000_size(frame)
        if syntax in uid.JPEG2000TransferSyntaxes
        else read_jpeg_size(frame)
    )
    return 0 if size is None else size.precision


def read_frame(dataset: pydicom.Dataset, repairs: Repairs) -> bytes:
    """The codestream of the single frame: all fragments, or those of the first frame in a valid
    table of offsets.

    Raises DicomError(undecodable).
    """
    try:
        fragments = list(generate_fragments(dataset.PixelData))
    except Exception as error:  # no items, items beyond the end
        raise DicomError(f"pixel data is not encapsulated: {type(error).__name__}") from error
    is_table_missing = find_syntax(b"".join(fragments[:1])) is not None
    table = b"" if is_table_missing or not fragments else fragments.pop(0)
    offsets = np.frombuffer(table[: len(table) // 4 * 4], "<u4").tolist()
    starts = [0, *itertools.accumulate(8 + len(fragment) for fragment in fragments)]
    is_valid = not is_table_missing and offsets[:1] in ([], [0]) and set(offsets) <= set(starts)
    if is_valid and len(offsets) > 1:
        first = b"".join(fragments[: starts.index(offsets[1])])
        if is_complete(first) or find_syntax(first) == uid.RLELossless:
            return first
        is_valid = False  # it lists the fragments of one frame
    if not is_valid:
        repairs.add("codestream:BasicOffsetTable")
    return b"".join(fragments)


def _check_frame(frame: bytes, syntax: UID, form: FrameFormat) -> bytes:
    """The frame from the start of its codestream, which must have the header's size, and data in
    place of the zeros that an interrupted copy leaves.

    Raises DicomError(undecodable).
    """
    if syntax in uid.JPEG2000TransferSyntaxes:
        frame = frame[find_jpeg_2000(frame) or 0 :]
        size = read_jpeg_2000_size(frame)
        if frame.endswith(bytes(_FEW_ZEROS + 1)) and not is_complete(frame):
            raise DicomError("the JPEG 2000 frame is truncated: it ends in zeros")
    elif syntax in uid.JPEGTransferSyntaxes or syntax in uid.JPEGLSTransferSyntaxes:
        size = read_jpeg_size(frame)
    else:
        return frame  # RLE does not contain its size
    if size is None:
        raise DicomError("the frame is no codestream of its transfer syntax")
    if (size.rows, size.columns, size.samples) != (form.rows, form.columns, form.samples):
        raise DicomError(
            f"the codestream holds {size.rows} x {size.columns} x {size.samples} samples, the "
            f"header says {form.rows} x {form.columns} x {form.samples}"
        )
    return frame


def check_scan(frame: bytes) -> None:
    """Raises DicomError where libjpeg warns of corrupt entropy-coded data in a JPEG frame.

    Pillow ignores that warning, though most of the image may be wrong.
    """
    try:
        # At 1/8 of the size, which decodes all codes as well.
        simplejpeg.decode_jpeg(frame, "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        if str(error).startswith("Corrupt JPEG data"):
            raise DicomError(f"the JPEG frame is damaged: {error}") from error


def check_runs(frame: bytes, form: FrameFormat) -> None:
    """Raises DicomError where a run-length segment (PS3.5 annex G) is larger than the image.

    Two bytes expand to up to 128, and pydicom's decoder checks the size only afterwards.
    """
    num_segments = min(int.from_bytes(frame[:4], "little"), 15)
    if len(frame) < 64:
        raise DicomError("the frame is no codestream of its transfer syntax")
    offsets = [*struct.unpack_from(f"<{num_segments}I", frame, 4), len(frame)]
    limit = form.rows * form.columns + 2 * _LONGEST_RUN  # some writers pad the last run
    for position, end in itertools.pairwise(offsets):
        expanded = 0
        while position < min(end, len(frame)):
            control = frame[position]
            expanded += control + 1 if control < 128 else 257 - control if control > 128 else 0
            position += control + 2 if control < 128 else 2 if control > 128 else 1
            if expanded > limit:
                raise DicomError("a run-length segment expands beyond the picture")
