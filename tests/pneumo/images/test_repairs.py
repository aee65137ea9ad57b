"""Files that bend the standard, of the kinds that bug reports of other projects tell of, give the
right picture, and what was repaired is counted by its element."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from pneumo.errors import DicomError
from pneumo.images.codestreams import find_end, find_syntax, is_complete
from pneumo.images.dicom import GrayImage, decode_gray, read_study_image
from tests.pneumo.images.pictures import parse

pytestmark = pytest.mark.processors

DicomMaker = Callable[..., bytes]
Pixels = npt.NDArray[Any]
ROWS, COLUMNS = 48, 64
SIZE = 64


def smooth(white: int, seed: int = 0) -> Pixels:
    """(48, 64), from 0 to `white`."""
    coarse = np.random.default_rng(seed).uniform(0, 1, (4, 5)).astype(np.float32)
    large = cv2.resize(coarse, (COLUMNS, ROWS), interpolation=cv2.INTER_CUBIC)
    spread = (large - large.min()) / np.ptp(large)
    return np.asarray(np.rint(spread * white), np.uint16 if white > 255 else np.uint8)


def gray(image: GrayImage) -> Pixels:
    """The picture without its letterbox, as whole numbers that can be subtracted."""
    x, y = image.offset
    return image.pixels[y : SIZE - y, x : SIZE - x].astype(int)


def read(data: bytes) -> GrayImage:
    return read_study_image(data, SIZE)


def jpeg(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def with_frame(
    make_dicom: DicomMaker, frame: bytes, syntax: UID, elements: dict[str, Any]
) -> bytes:
    """A file whose header says `elements`, and whose one frame is `frame`."""
    data = {"PixelData": encapsulate([frame]), "Rows": ROWS, "Columns": COLUMNS} | elements
    made = make_dicom(np.zeros((ROWS, COLUMNS), np.uint8), jpeg_quality=90, elements=data)
    uid = pydicom.uid.JPEGBaseline8Bit.encode()
    wanted = syntax.encode()
    wanted += b"\0" * (len(wanted) % 2)
    head = len(uid).to_bytes(2, "little") + uid
    assert made.count(head) == 1
    return made.replace(head, len(wanted).to_bytes(2, "little") + wanted)


def compress(pixels: Pixels, syntax: UID, bits: int) -> bytes:
    """One frame of the pixels, by pydicom's encoders or imagecodecs'."""
    if syntax == JPEGLosslessSV1:
        imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
        return bytes(imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=bits))
    pytest.importorskip("jpeg_ls", reason="needs the extra 'codecs'")
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2", "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.compress(syntax)
    return next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))


# --- the codestream decides -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpeg", "jpeg 2000", "rle"])
@pytest.mark.parametrize("planar", [0, 1])
def test_planes_are_those_of_the_codestream(make_dicom: DicomMaker, kind: str, planar: int) -> None:
    rgb = np.stack([smooth(255, seed) for seed in range(3)], axis=-1)
    syntax = {"jpeg": pydicom.uid.JPEGBaseline8Bit, "jpeg 2000": JPEG2000Lossless}.get(
        kind, RLELossless
    )
    frame = jpeg(rgb, subsampling=0) if kind == "jpeg" else compress(rgb, syntax, 8)
    photometric = {"jpeg": "YBR_FULL_422", "jpeg 2000": "YBR_RCT"}.get(kind, "RGB")
    elements = {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": photometric,
        "PlanarConfiguration": planar,
    }
    image = read(with_frame(make_dicom, frame, syntax, elements))
    assert np.abs(gray(image) - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)).max() <= 4
    counted = "codestream:PlanarConfiguration" in image.warnings
    assert counted == (planar == 1 and kind != "rle")


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless], ids=str)
@pytest.mark.parametrize("header", [(8, 8), (16, 8), (16, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_bits_are_those_of_the_codestream(
    make_dicom: DicomMaker, syntax: UID, header: tuple[int, int], bits: int
) -> None:
    pixels = smooth(2**bits - 1)
    allocated, stored = header
    elements = {"BitsAllocated": allocated, "BitsStored": stored, "HighBit": stored - 1}
    frame = compress(pixels, syntax, bits)
    image = read(with_frame(make_dicom, frame, syntax, elements))
    expected = np.rint(pixels.astype(float) / pixels.max() * 255)
    assert np.abs(gray(image) - expected).max() <= 1
    assert ("codestream:BitsStored" in image.warnings) == (bits > stored)


@pytest.mark.parametrize("header", [(8, 7), (16, 8), (16, 12), (16, 16)], ids=str)
def test_lossy_jpeg_has_8_bits_whatever_the_header_says(
    make_dicom: DicomMaker, header: tuple[int, int]
) -> None:
    pixels = smooth(255)
    elements = {"BitsAllocated": header[0], "BitsStored": header[1], "HighBit": header[1] - 1}
    image = read(with_frame(make_dicom, jpeg(pixels), pydicom.uid.JPEGBaseline8Bit, elements))
    assert np.abs(gray(image) - pixels).max() <= 6
    wrong = "BitsAllocated" if header == (16, 8) else "BitsStored"
    assert f"codestream:{wrong}" in image.warnings


@given(st.integers(1, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_wrong_table_of_offsets_costs_nothing(make_dicom: DicomMaker, offset: int) -> None:
    pixels = smooth(255)
    sound = make_dicom(pixels, jpeg_quality=95)
    table = b"\xfe\xff\x00\xe0\0\0\0\0"
    without = sound.replace(b"\xfe\xff\x00\xe0\x04\0\0\0\0\0\0\0", table)
    wrong = without.replace(table, b"\xfe\xff\x00\xe0\x04\0\0\0" + struct.pack("<I", offset), 1)
    assert wrong != sound
    np.testing.assert_array_equal(read(wrong).pixels, read(sound[132:]).pixels)
    assert read(wrong).warnings == ("codestream:BasicOffsetTable",)


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"\xff\xd9"])
@pytest.mark.parametrize("length", [2, 64, 5000])
@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless], ids=str)
def test_what_follows_the_end_marker_does_no_harm(
    make_dicom: DicomMaker, syntax: UID, length: int, filling: bytes
) -> None:
    pixels = smooth(4095)
    frame = compress(pixels, syntax, 12)
    elements = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
    sound = read(with_frame(make_dicom, frame, syntax, elements))
    longer = frame + filling * (length // len(filling))
    padded = read(with_frame(make_dicom, longer, syntax, elements))
    np.testing.assert_array_equal(padded.pixels, sound.pixels)


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_frame_without_its_end_says_so(make_dicom: DicomMaker, cut: int) -> None:
    pixels = smooth(4095)
    frame = compress(pixels, JPEGLosslessSV1, 12)
    end = find_end(frame)
    assert end is not None
    elements = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
    with pytest.raises(DicomError, match="the JPEG frame is truncated"):
        read(with_frame(make_dicom, frame[: end - cut], JPEGLosslessSV1, elements))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["lossless", "lossless of 8 bits", "lossy of 12 bits"])
def test_data_that_ends_too_early_is_no_picture(
    make_dicom: DicomMaker, kind: str, share: float
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    bits = 8 if "8" in kind else 12
    options = {"lossless": True} if "lossless" in kind else {"level": 98}
    frame = imagecodecs.jpeg8_encode(smooth(2**bits - 1), bitspersample=bits, **options)
    elements = {"BitsAllocated": 8 if bits == 8 else 16, "BitsStored": bits, "HighBit": bits - 1}
    syntax = JPEGLosslessSV1 if "lossless" in kind else pydicom.uid.JPEGExtended12Bit
    read(with_frame(make_dicom, frame, syntax, elements))
    start = frame.index(b"\xff\xda") + 16
    cut = frame[: start + int(share * (len(frame) - start - 2))] + b"\xff\xd9"
    with pytest.raises(DicomError, match="its data ends too early"):
        read(with_frame(make_dicom, cut, syntax, elements))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_jpeg_2000_of_which_zeros_are_the_rest_is_no_picture(
    make_dicom: DicomMaker, share: float
) -> None:
    frame = encode_jpeg_2000(smooth(4095), bitspersample=12)
    elements = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
    sound = read(with_frame(make_dicom, frame, JPEG2000Lossless, elements))
    assert frame.endswith(b"\xff\xd9")
    image = read(with_frame(make_dicom, frame[:-2] + b"\0\0", JPEG2000Lossless, elements))
    np.testing.assert_array_equal(image.pixels, sound.pixels)
    zeros = frame[: int(share * len(frame))].ljust(len(frame), b"\0")
    with pytest.raises(DicomError, match="it ends in zeros"):
        read(with_frame(make_dicom, zeros, JPEG2000Lossless, elements))


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_have_an_end_within_them_or_none(garbage: bytes, cut: int) -> None:
    for frame in (garbage, b"\xff\xd8" + garbage, jpeg(smooth(255))[:cut] + garbage):
        end = find_end(frame)
        assert end is None or frame[end - 2 : end] == b"\xff\xd9"
        assert is_complete(frame) in (True, False)
        find_syntax(frame)


@pytest.mark.parametrize(
    "stated",
    [
        None,
        pydicom.uid.ExplicitVRLittleEndian,
        JPEG2000Lossless,
        RLELossless,
        UID("1.2.826.0.1.3680043.9.1"),
    ],
    ids=str,
)
def test_the_transfer_syntax_is_that_of_the_codestream(
    make_dicom: DicomMaker, stated: UID | None
) -> None:
    pixels = smooth(255)
    sound = make_dicom(pixels, jpeg_quality=95)
    if stated is None:
        uid = b"\x02\0\x10\0UI\x16\0" + pydicom.uid.JPEGBaseline8Bit.encode()
        wrong = sound.replace(uid, b"")
    else:
        wrong = with_frame(make_dicom, jpeg(pixels), stated, {})
    image = read(wrong)
    assert np.abs(gray(image) - pixels).max() <= 6
    assert image.warnings == ("codestream:TransferSyntaxUID",)


def test_a_frame_of_defined_length_under_an_uncompressed_syntax(make_dicom: DicomMaker) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=95)
    place = sound.index(b"\xe0\x7f\x10\0OB\0\0") + 8
    length = struct.pack("<I", len(sound) - place - 4)
    uid, plain = (
        b"UI" + struct.pack("<H", len(name)) + name
        for name in (
            pydicom.uid.JPEGBaseline8Bit.encode(),
            pydicom.uid.ExplicitVRLittleEndian.encode() + b"\0" * 3,
        )
    )
    image = read((sound[:place] + length + sound[place + 4 :]).replace(uid, plain))
    np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)
    assert image.warnings == ("codestream:TransferSyntaxUID",)


@pytest.mark.parametrize(
    ("elements", "stated"),
    [
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, 3072),  # every second byte
        ({"Rows": ROWS // 2}, 3072),  # the upper half
        ({"Rows": ROWS + 1}, 6272),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, 18432),
    ],
    ids=str,
)
def test_pixel_data_of_another_size_than_the_header_says(
    make_dicom: DicomMaker, elements: dict[str, Any], stated: int
) -> None:
    with pytest.raises(DicomError, match=f"6144 bytes of pixels, the header says {stated}"):
        read(make_dicom(smooth(4095), elements=elements))


def test_bytes_after_the_pixels_do_no_harm(make_dicom: DicomMaker) -> None:
    pixels = smooth(255)
    image = read(make_dicom(pixels, elements={"PixelData": pixels.tobytes() + bytes(3000)}))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)


def test_pixels_that_were_unpacked_under_a_compressed_syntax(make_dicom: DicomMaker) -> None:
    pixels = smooth(255)
    plain = make_dicom(pixels)
    uid = pydicom.uid.ExplicitVRLittleEndian.encode() + b"\0"
    rle = RLELossless.encode() + b"\0" * (len(RLELossless) % 2)
    wrong = plain.replace(
        len(uid).to_bytes(2, "little") + uid, len(rle).to_bytes(2, "little") + rle
    )
    np.testing.assert_array_equal(gray(read(wrong)), pixels)


@pytest.mark.parametrize("stated", [pydicom.uid.JPEGExtended12Bit, pydicom.uid.JPEGBaseline8Bit])
@pytest.mark.parametrize("header", [(8, 8), (16, 8), (16, 12), (16, 16)], ids=str)
def test_lossy_jpeg_of_12_bits_whatever_the_header_says(
    make_dicom: DicomMaker, header: tuple[int, int], stated: UID
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    pixels = smooth(4095)
    frame = bytes(imagecodecs.jpeg8_encode(pixels, level=98, bitspersample=12))
    elements = {"BitsAllocated": header[0], "BitsStored": header[1], "HighBit": header[1] - 1}
    image = read(with_frame(make_dicom, frame, stated, elements))
    assert np.abs(gray(image) - np.rint(pixels / 4095 * 255)).max() <= 2


def test_a_lossless_jpeg_under_the_syntax_of_the_usual_one(make_dicom: DicomMaker) -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    pixels = np.repeat(np.repeat(smooth(255), 4, 0), 4, 1)
    frame = imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=8)
    elements = {"PixelData": encapsulate([frame])}
    image = read(make_dicom(pixels, jpeg_quality=90, elements=elements))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("codestream:TransferSyntaxUID",)


def test_pixels_of_the_other_byte_order_in_the_syntax_of_ge(make_dicom: DicomMaker) -> None:
    pixels = smooth(4095)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(pixels)))
    dataset.PixelData = pixels.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.113619.5.2")
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read(buffer.getvalue()).pixels, read(make_dicom(pixels)).pixels)


JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # and a byte: 0 for RGB, 1 for YCbCr


@pytest.mark.parametrize("stated", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize(
    ("is_rgb", "markers"),
    [
        (False, b""),
        (False, JFIF),
        (False, ADOBE + b"\1"),
        (False, JFIF + ADOBE + b"\0"),
        (True, b""),
        (True, ADOBE + b"\0"),
    ],
    ids=["YCbCr", "JFIF", "Adobe YCbCr", "JFIF and Adobe RGB", "R, G, B", "Adobe RGB"],
)
def test_lossy_colours_are_those_of_the_markers(
    make_dicom: DicomMaker, is_rgb: bool, markers: bytes, stated: str
) -> None:
    rgb = np.stack([smooth(255, seed) for seed in range(3)], axis=-1)
    frame = jpeg(rgb, subsampling=0, keep_rgb=is_rgb)
    marked = frame[:2] + markers + frame[frame.index(b"\xff\xdb") :]
    elements = colours(stated)
    image = read(with_frame(make_dicom, marked, pydicom.uid.JPEGBaseline8Bit, elements))
    assert np.abs(gray(image) - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)).max() <= 6
    counted = image.warnings == ("codestream:PhotometricInterpretation",)
    assert counted == (is_rgb != (stated == "RGB"))


def colours(photometric: str) -> dict[str, Any]:
    return {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": photometric,
        "PlanarConfiguration": 0,
    }


def test_a_marker_of_adobe_that_is_too_short() -> None:
    data = pydicom.data.get_testdata_file("SC_rgb_jpeg.dcm", read=False)
    dataset = parse(Path(str(data)).read_bytes())
    expected = cv2.cvtColor(dataset.pixel_array, cv2.COLOR_RGB2GRAY).astype(int)
    assert np.abs(decode_gray(dataset) - expected).max() <= 1


@pytest.mark.parametrize("stated", ["YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("kind", ["RGB", "RGB, high throughput", "YCbCr"])
def test_colours_of_jpeg_2000_are_those_of_its_transform(
    make_dicom: DicomMaker, kind: str, stated: str
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    rgb = np.stack([smooth(255, seed) for seed in range(3)], axis=-1)
    syntax, is_rgb = pydicom.uid.JPEG2000, kind != "YCbCr"
    if "high" in kind:
        syntax, frame = pydicom.uid.HTJ2K, imagecodecs.htj2k_encode(rgb, reversible=True)
    elif is_rgb:
        frame = encode_jpeg_2000(rgb)
    else:
        frame = encode_jpeg_2000(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb), mct=False)
    image = read(with_frame(make_dicom, bytes(frame), syntax, colours(stated)))
    assert np.abs(gray(image) - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)).max() <= 1
    assert image.warnings == (("codestream:PhotometricInterpretation",) if is_rgb else ())


def encode_jpeg_2000(pixels: Pixels, **options: Any) -> bytes:
    """With the sign of the pixels' type, of 16 bits."""
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    options |= {"codecformat": "J2K", "reversible": True, "level": 0}
    return bytes(imagecodecs.jpeg2k_encode(pixels, **options))


@pytest.mark.parametrize("header_signed", [0, 1])
@pytest.mark.parametrize("signed", [False, True])
def test_the_sign_is_that_of_a_smooth_picture(
    make_dicom: DicomMaker, signed: bool, header_signed: int
) -> None:
    pixels = smooth(65535)
    stored = (pixels.astype(np.int32) - 32768).astype(np.int16) if signed else pixels
    elements = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15}
    elements["PixelRepresentation"] = header_signed
    image = read(with_frame(make_dicom, encode_jpeg_2000(stored), JPEG2000Lossless, elements))
    assert np.abs(gray(image) - np.rint(pixels / 257)).max() <= 1
    assert ("pixels:PixelRepresentation" in image.warnings) == (signed != bool(header_signed))


def test_signed_values_in_an_unsigned_codestream_keep_the_sign_of_the_header() -> None:
    data = pydicom.data.get_testdata_file("J2K_pixelrep_mismatch.dcm", read=False)
    dataset = pydicom.dcmread(str(data))
    assert dataset.PixelRepresentation == 1
    values = dataset.pixel_array.astype(int)
    assert values.min() < 0
    for element in ("WindowCenter", "WindowWidth"):
        del dataset[element]
    expected = np.rint((values - values.min()) / np.ptp(values) * 255)
    assert np.abs(decode_gray(dataset).astype(int) - expected).max() <= 1


def test_lossy_jpeg_has_no_sign(make_dicom: DicomMaker) -> None:
    pixels = smooth(255)
    elements = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1}
    image = read(with_frame(make_dicom, jpeg(pixels), pydicom.uid.JPEGBaseline8Bit, elements))
    assert np.abs(gray(image) - pixels).max() <= 6
    assert "pixels:PixelRepresentation" in image.warnings


@pytest.mark.parametrize("signed", [False, True])
def test_values_beyond_the_bits_that_the_header_says_do_not_wrap(
    make_dicom: DicomMaker, signed: bool
) -> None:
    pixels = smooth(65535)
    elements = {"PixelRepresentation": 1} if signed else {"BitsStored": 12, "HighBit": 11}
    image = read(make_dicom(pixels, elements=elements))
    assert np.abs(gray(image) - np.rint(pixels / 257)).max() <= 1
    assert image.warnings == (f"pixels:{'PixelRepresentation' if signed else 'BitsStored'}",)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("offset", [1000, 2000])
def test_signed_words_under_an_unsigned_header(
    make_dicom: DicomMaker, bits: int, offset: int
) -> None:
    pixels = smooth(4095)
    signed = pixels.astype(np.int16) - np.int16(offset)
    elements = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": 0}
    image = read(make_dicom(signed, elements=elements))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("pixels:PixelRepresentation",)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", [None, JPEGLosslessSV1, RLELossless])
def test_signed_values_of_the_full_range_under_an_unsigned_header(
    make_dicom: DicomMaker, syntax: UID | None, bits: int
) -> None:
    pixels = smooth(2**bits - 1)
    half = 2 ** (bits - 1)
    words = np.where(pixels >= half, pixels - half, pixels + half).astype(np.uint16)
    elements = {"BitsAllocated": 16, "BitsStored": bits, "HighBit": bits - 1}
    if syntax is None:
        image = read(make_dicom(words, elements=elements))
    else:
        image = read(with_frame(make_dicom, compress(words, syntax, bits), syntax, elements))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("pixels:PixelRepresentation",)


@pytest.mark.parametrize("bits", [13, 14, 16])
@pytest.mark.parametrize("syntax", [None, JPEGLosslessSV1, JPEGLSLossless, RLELossless])
def test_a_sign_of_12_bits_in_a_header_of_more(
    make_dicom: DicomMaker, syntax: UID | None, bits: int
) -> None:
    pixels = smooth(4095)
    words = (pixels + np.uint16(2048)) % np.uint16(4096)
    elements = {"BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": 1}
    if syntax is None:
        image = read(make_dicom(words, elements=elements))
    else:
        frame = compress(words, syntax, 12 if syntax == JPEGLosslessSV1 else 16)
        image = read(with_frame(make_dicom, frame, syntax, elements | {"BitsAllocated": 16}))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("pixels:PixelRepresentation",)


@pytest.mark.parametrize("bits", [13, 14, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_a_jpeg_2000_of_12_bits_and_another_sign_than_the_header(
    make_dicom: DicomMaker, signed: bool, bits: int
) -> None:
    pixels = smooth(4095)
    stored = pixels.astype(np.int16) - np.int16(2048) if signed else pixels
    frame = encode_jpeg_2000(stored, bitspersample=12)
    elements = {"BitsAllocated": 16, "BitsStored": bits, "HighBit": bits - 1}
    elements["PixelRepresentation"] = int(not signed)
    image = read(with_frame(make_dicom, frame, JPEG2000Lossless, elements))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("pixels:PixelRepresentation",)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("padding", ["least", "zero"])
def test_few_values_of_a_signed_header_keep_the_sign(
    make_dicom: DicomMaker, bits: int, padding: str
) -> None:
    half = 2 ** (bits - 1)
    values = tissue(half - 1)
    values[:, :16] = -half if padding == "least" else 0
    window = {"WindowCenter": half // 2, "WindowWidth": half}
    image = read(make_dicom(values.astype(np.int16), elements=window))
    expected = np.clip((values - half / 2 + 0.5) / (half - 1) + 0.5, 0, 1) * 255
    assert np.abs(gray(image) - np.rint(expected)).max() <= 1
    assert image.warnings == ()
    whole = read(make_dicom(smooth(2**bits - 1).astype(np.int16)))
    assert whole.warnings == ()


def test_bright_values_beside_dark_ones_are_no_negative_values(make_dicom: DicomMaker) -> None:
    lettered = smooth(4095)
    lettered[:4, :20:2], lettered[:4, 1:20:2] = 65535, 65534
    assert read(make_dicom(lettered)).warnings == ("left_out:outliers",)
    collimated = 65535 - smooth(20_000)
    collimated[:, :16] = smooth(60)[:, :16]
    image = read(make_dicom(collimated))
    assert image.warnings == ()
    assert gray(image)[:, :16].max() <= 1


def tissue(white: int) -> Pixels:
    """Noisy values from 3/4 of `white` to `white`: most neighbours of a darker pixel jump."""
    noise = np.random.default_rng(1).uniform(0, white / 8, (ROWS, COLUMNS))
    return np.asarray(smooth(white).astype(float) / 8 + noise + 0.75 * white, np.int32)


@pytest.mark.parametrize("syntax", [None, JPEGLosslessSV1, JPEG2000Lossless, RLELossless])
@pytest.mark.parametrize("share", [1, 0.98])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_padding_beside_bright_tissue_keeps_the_sign(
    make_dicom: DicomMaker, bits: int, share: float, syntax: UID | None
) -> None:
    half = 2 ** (bits - 1)
    padding = int(-half * share)
    values = tissue(half - 1)
    values[:, :16] = padding
    letters = values.copy()
    letters[4:8, 2:14:2] = half - 1
    for shown in (values, letters):
        elements = {
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": 1,
            "WindowCenter": half // 2,
            "WindowWidth": half,
        }
        dtype = np.int8 if bits == 8 else np.int16
        if syntax is None or bits == 8:
            data = make_dicom(shown.astype(dtype), elements=elements)
        else:
            words = (shown % 2**bits).astype(np.uint16)
            frame = compress(words, syntax, bits)
            elements |= {"BitsAllocated": 16}
            data = with_frame(make_dicom, frame, syntax, elements)
        image = read(data)
        expected = np.clip((shown - half / 2 + 0.5) / (half - 1) + 0.5, 0, 1) * 255
        assert np.abs(gray(image) - np.rint(expected)).max() <= 1
        assert image.warnings == ()


def test_black_beside_noisy_white_keeps_the_sign(make_dicom: DicomMaker) -> None:
    values = 4095 - np.random.default_rng(1).integers(0, 60, (ROWS, COLUMNS)).astype(np.uint16)
    values[:, ::5] = 0
    image = read(make_dicom(values, elements={"BitsStored": 12, "HighBit": 11}))
    assert image.warnings == ()


@pytest.mark.parametrize("above", ["nothing", "noise", "a field", "stripes"])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_hard_edges_keep_the_bits_of_the_header(
    make_dicom: DicomMaker, bits: int, above: str
) -> None:
    white, rng = 2**bits - 1, np.random.default_rng(1)
    values = smooth(white).astype(np.uint16) // 2
    values[:, :8] = rng.integers(0, max(white // 50, 9), (ROWS, 8))
    values[10:20:2, :8] = rng.integers(white - white // 30, white + 1, (5, 8))
    values[30:40, 40:60:2] = white
    values[30:40, 41:60:2] = 0
    places = np.indices(values.shape)
    bits_above = {
        "nothing": np.zeros_like(values),
        "noise": rng.integers(0, 2 ** (16 - bits), values.shape),
        "a field": (places[0] > 20) << (15 - bits),
        "stripes": places[1] // 4 % 2,
    }[above].astype(np.uint16)
    elements = {"BitsStored": bits, "HighBit": bits - 1}
    image = read(make_dicom(values | bits_above << bits, elements=elements))
    assert image.warnings == ()
    if bits == 8:
        alone = read(make_dicom(values.astype(np.uint8)))
    else:
        alone = read(
            make_dicom(values, elements={"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits})
        )
    assert np.abs(gray(image) - gray(alone)).max() <= 1


def test_real_pictures_as_sound_files_of_12_bits_keep_bits_and_sign(
    make_dicom: DicomMaker, shared_data: Path
) -> None:
    for path in sorted((shared_data / "rsna-mini" / "stage_2_train_images").glob("*.dcm"))[:20]:
        values = decode_gray(pydicom.dcmread(path))[::2, ::2].astype(np.int16) * 16
        padded = values // 2
        padded[:, :40] = -2048
        for stored in (values.astype(np.uint16), padded):
            data = make_dicom(stored, elements={"BitsStored": 12, "HighBit": 11})
            assert not [code for code in read(data).warnings if code.startswith("pixels:")]


@pytest.mark.parametrize("bits", [8, 9, 10, 11])
def test_values_of_12_bits_beyond_those_of_the_header(make_dicom: DicomMaker, bits: int) -> None:
    image = read(make_dicom(smooth(4095), elements={"BitsStored": bits, "HighBit": bits - 1}))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(smooth(4095))).pixels)
    assert image.warnings == ("pixels:BitsStored",)


@pytest.mark.parametrize(
    "syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless], ids=str
)
def test_overlays_in_the_high_bits_of_a_codestream(make_dicom: DicomMaker, syntax: UID) -> None:
    pixels = smooth(4095)
    written = pixels.copy()
    written[10:14, 10:40] |= 0x1000
    elements = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
    data = with_frame(make_dicom, compress(written, syntax, 16), syntax, elements)
    place = data.index(b"\xe0\x7f\x10\0OB")
    image = read(data[:place] + b"\0\x60\x02\x01US\x02\0\x0c\0" + data[place:])
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels, elements=elements)).pixels)
    assert image.warnings == ()


@pytest.mark.parametrize("overlays", [False, True])
def test_overlays_in_the_high_bits_are_no_values(make_dicom: DicomMaker, overlays: bool) -> None:
    pixels = smooth(4095)
    written = pixels.copy()
    written[10:14, 10:40] |= 0x8000
    elements: dict[str, Any] = {"BitsStored": 12, "HighBit": 11}
    data = make_dicom(written, elements=elements)
    if overlays:
        place = data.index(b"\xe0\x7f\x10\0OW")
        data = data[:place] + b"\0\x60\x02\x01US\x02\0\x0f\0" + data[place:]
    image = read(data)
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels, elements=elements)).pixels)
    assert image.warnings == ()


def as_items(*parts: bytes) -> bytes:
    """Encapsulated items, the table of offsets first."""
    items = (struct.pack("<HHI", 0xFFFE, 0xE000, len(part)) + part for part in parts)
    return b"".join(items) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


@pytest.mark.parametrize("table", ["both fragments", "the second", "odd", "left out"])
def test_a_frame_in_two_fragments_whatever_the_table_says(
    make_dicom: DicomMaker, table: str
) -> None:
    frame = jpeg(smooth(255))
    frame += b"\0" * (len(frame) % 2)
    half = len(frame) // 4 * 2
    offsets = {
        "both fragments": [struct.pack("<2I", 0, 8 + half)],
        "the second": [struct.pack("<I", 8 + half)],
        "odd": [b"\0\0\0\0\7\7"],
        "left out": [],
    }[table]
    data = as_items(*offsets, frame[:half], frame[half:])
    wrong = with_frame(make_dicom, frame, pydicom.uid.JPEGBaseline8Bit, {"PixelData": data})
    image = read(wrong)
    assert np.abs(gray(image) - smooth(255)).max() <= 6
    assert image.warnings == (() if table == "odd" else ("codestream:BasicOffsetTable",))


def test_a_second_frame_that_the_header_does_not_count_is_no_part(make_dicom: DicomMaker) -> None:
    first, second = jpeg(smooth(255)), jpeg(smooth(255, seed=1))
    first += b"\0" * (len(first) % 2)
    second += b"\0" * (len(second) % 2)
    data = as_items(struct.pack("<2I", 0, 8 + len(first)), first, second)
    two = with_frame(make_dicom, first, pydicom.uid.JPEGBaseline8Bit, {"PixelData": data})
    image = read(two)
    assert np.abs(gray(image) - smooth(255)).max() <= 6
    assert image.warnings == ()


# --- impossible values ----------------------------------------------------------------------------


@pytest.mark.parametrize("white", [255, 4095])
def test_a_slope_of_zero_is_none(make_dicom: DicomMaker, white: int) -> None:
    pixels = smooth(white)
    rescale = {"RescaleSlope": "0", "RescaleIntercept": "-1024"}
    image = read(make_dicom(pixels, elements=rescale))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("left_out:RescaleSlope",)


def lut(entries: Pixels, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), 0, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = entries.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return Sequence([item])


@given(st.integers(200, 65535), st.integers(8, 16))
@settings(max_examples=60, deadline=None)
def test_a_table_of_any_height_gives_a_picture(
    make_dicom: DicomMaker, greatest: int, bits: int
) -> None:
    pixels = smooth(4095)
    entries = np.rint(np.linspace(0, greatest, 4096))
    elements = {"BitsStored": 12, "HighBit": 11, "VOILUTSequence": lut(entries, bits)}
    image = read(make_dicom(pixels, elements=elements))
    white = 2**bits - 1
    is_odd = not white / 4 < greatest <= white
    expected = np.rint(entries[pixels] / (greatest if is_odd else white) * 255)
    assert np.abs(gray(image) - expected).max() <= 1
    assert image.warnings == (("rescaled:VOILUTSequence",) if is_odd else ())


@pytest.mark.parametrize(("bits", "in_words"), [(8, False), (8, True), (16, True)])
@pytest.mark.parametrize("entries", [255, 256])
def test_a_palette_of_8_bits_in_whatever_words(
    make_dicom: DicomMaker, bits: int, in_words: bool, entries: int
) -> None:
    pixels = smooth(254)
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    rgb = np.random.default_rng(1).integers(0, 256, (3, entries))
    for name, channel in zip(("Red", "Green", "Blue"), rgb, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [entries, 0, bits]
        data = channel.astype("<u2" if in_words else np.uint8).tobytes()
        elements[f"{name}PaletteColorLookupTableData"] = data + b"\0" * (len(data) % 2)
    expected = ([0.299, 0.587, 0.114] @ rgb)[pixels]
    assert np.abs(gray(read(make_dicom(pixels, elements=elements))) - expected).max() <= 1


def test_a_table_of_fewer_entries_than_it_says_goes_on_with_its_last(
    make_dicom: DicomMaker,
) -> None:
    pixels = smooth(4095)
    items = lut(np.arange(3000) + 1095, 12)
    items[0].LUTDescriptor = [4096, 0, 12]
    image = read(make_dicom(pixels, elements={"VOILUTSequence": items}))
    expected = np.rint(np.clip(pixels + 1095.0, 0, 4094) / 4095 * 255)
    assert np.abs(gray(image) - expected).max() <= 1


def test_a_palette_of_12_bits_in_words(make_dicom: DicomMaker) -> None:
    pixels = smooth(255)
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        data = (np.arange(256) * 16).astype("<u2").tobytes()
        elements[f"{name}PaletteColorLookupTableData"] = data
    assert np.abs(gray(read(make_dicom(pixels, elements=elements))) - pixels).max() <= 1


@pytest.mark.parametrize(
    "elements",
    [
        {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095},
        {"RescaleSlope": "1e308", "RescaleIntercept": "1e308"},
        {"ModalityLUTSequence": lut(np.full(4096, 7), 16)},
    ],
    ids=str,
)
def test_what_would_make_all_pixels_one_is_left_out(
    make_dicom: DicomMaker, elements: dict[str, Any]
) -> None:
    pixels = smooth(4095)
    image = read(make_dicom(pixels, elements=elements))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == (f"left_out:{next(iter(elements))}",)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("level", [0, 65535])
def test_letters_far_from_all_else_do_not_take_the_contrast(
    make_dicom: DicomMaker, level: int, photometric: str
) -> None:
    pixels = smooth(4095) + np.uint16(30_000)
    lettered = pixels.copy()
    lettered[:4, :20] = level  # 2.6 % of the pixels
    elements = {"PhotometricInterpretation": photometric}
    image = read(make_dicom(lettered, elements=elements))
    plain = read(make_dicom(pixels, elements=elements))
    assert np.abs(gray(image) - gray(plain))[lettered != level].max() <= 3
    assert image.warnings == ("left_out:outliers",)


@given(st.floats(1, 5000), st.sampled_from([-1, 1]), st.sampled_from(["LINEAR", "SIGMOID"]))
@settings(max_examples=40, deadline=None)
def test_a_window_that_leaves_nothing_to_see_is_left_out(
    make_dicom: DicomMaker, width: float, side: int, function: str
) -> None:
    pixels = smooth(4095)
    center = 2048 + side * (3000 + 3 * width)
    window = {"WindowCenter": f"{center:.6g}", "WindowWidth": f"{width:.6g}"}
    image = read(make_dicom(pixels, elements=window | {"VOILUTFunction": function}))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == ("left_out:WindowCenter",)


@pytest.mark.parametrize(
    ("white", "center", "width"),
    [
        *((255, 128, 4096), (255, 2048, 4096), (255, 32768, 65536)),
        *((4095, 32768, 65536), (4095, 2048, 65536), (4095, 0, 65536), (4095, 2048, "1e30")),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_for_values_of_more_bits_is_left_out(
    make_dicom: DicomMaker, white: int, center: int, width: int | str, photometric: str
) -> None:
    bits = white.bit_length()
    elements = {"PhotometricInterpretation": photometric, "BitsStored": bits, "HighBit": bits - 1}
    pixels = smooth(white)
    expected = read(make_dicom(pixels, elements=elements)).pixels
    elements |= {"WindowCenter": str(center), "WindowWidth": str(width)}
    image = read(make_dicom(pixels, elements=elements))
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.warnings == ("left_out:WindowCenter",)


def test_a_sound_window_of_a_faint_picture_is_kept(make_dicom: DicomMaker) -> None:
    faint = smooth(255).astype(np.uint16) + np.uint16(2000)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    image = read(make_dicom(faint, elements={"BitsStored": 12, "HighBit": 11} | window))
    assert (gray(image).min(), gray(image).max()) == (125, 140)
    assert image.warnings == ()


@pytest.mark.parametrize(
    ("center", "width", "left_out"),
    [
        ("60000", "10", {"WindowCenter"}),
        ("1000", "0", {"WindowWidth"}),
        ("1000", "-1500", {"WindowWidth"}),
        ("nan", "1500", {"WindowCenter"}),
        ("1000", " ", {"WindowWidth"}),
        (" ", " ", {"WindowCenter", "WindowWidth"}),
    ],
)
def test_the_first_window_that_shows_something_is_taken(
    make_dicom: DicomMaker, center: str, width: str, left_out: set[str]
) -> None:
    pixels = smooth(4095)
    one = {"WindowCenter": "1200", "WindowWidth": "1600"}
    expected = read(make_dicom(pixels, elements=one)).pixels
    several = {"WindowCenter": [center, "1200"], "WindowWidth": [width, "1600"]}
    image = read(make_dicom(pixels, elements=several))
    np.testing.assert_array_equal(image.pixels, expected)
    assert set(image.warnings) == {f"left_out:{element}" for element in left_out}


@pytest.mark.parametrize("is_fine", [True, False])
def test_a_window_narrower_than_one_is_for_finer_values(
    make_dicom: DicomMaker, is_fine: bool
) -> None:
    pixels = smooth(4095)
    elements = {"WindowCenter": "0.018", "WindowWidth": "0.026"}
    if is_fine:
        elements["RescaleSlope"] = "0.00001"
    image = read(make_dicom(pixels, elements=elements))
    exact = np.clip((pixels - 1800.0) / 2600 + 0.5, 0, 1) * 255
    expected = exact if is_fine else gray(read(make_dicom(pixels)))
    assert np.abs(gray(image) - expected).max() <= 1
    assert image.warnings == (f"left_out:{'VOILUTFunction' if is_fine else 'WindowWidth'}",)


@pytest.mark.parametrize("first", [Dataset(), lut(np.full(4096, 7), 12)[0]], ids=["empty", "flat"])
def test_the_first_table_that_shows_something_is_taken(
    make_dicom: DicomMaker, first: Dataset
) -> None:
    pixels = smooth(4095)
    good = lut(np.arange(4096)[::-1], 12)
    expected = read(make_dicom(pixels, elements={"VOILUTSequence": good}))
    several = Sequence([first, good[0], lut(np.arange(4096), 12)[0]])
    image = read(make_dicom(pixels, elements={"VOILUTSequence": several}))
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert "left_out:VOILUTSequence" in image.warnings


@given(st.integers(1, 3), st.integers(10_000, 65_535), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_hot_pixels_do_not_darken_the_rest(
    make_dicom: DicomMaker, number: int, level: int, seed: int
) -> None:
    pixels = smooth(4095)
    hot = pixels.copy()
    hot.reshape(-1)[np.random.default_rng(seed).choice(hot.size, number, replace=False)] = level
    image = read(make_dicom(hot))
    cold = hot != level
    found, expected = gray(image), gray(read(make_dicom(pixels)))
    assert np.abs(found - expected)[cold].max() <= 3
    assert image.warnings == ("left_out:outliers",)


# --- nonsense in optional elements ----------------------------------------------------------------


@pytest.mark.parametrize("element", ["WindowCenter", "WindowWidth", "RescaleSlope"])
@pytest.mark.parametrize("text", ["NaN", "inf", "abc", "[]", "1e999", "--5", "12 34"])
def test_nonsense_in_a_number_is_left_out(make_dicom: DicomMaker, element: str, text: str) -> None:
    pixels = smooth(4095)
    elements = {"WindowCenter": "2048", "WindowWidth": "4096"} if "Window" in element else {}
    data = make_dicom(pixels, elements=elements | {element: "77777777"})
    wrong = data.replace(b"77777777", text.encode().ljust(8))
    image = read(wrong)
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == (f"left_out:{element}",)


@pytest.mark.parametrize("text", ["2048,5", "[2048.5]"])
def test_a_number_in_another_spelling_is_read(make_dicom: DicomMaker, text: str) -> None:
    pixels = smooth(4095)
    window = {"WindowCenter": "2048.500", "WindowWidth": "2000"}
    sound = make_dicom(pixels, elements=window)
    image = read(sound.replace(b"2048.500", text.encode().ljust(8)))
    np.testing.assert_array_equal(image.pixels, read(sound).pixels)
    assert image.warnings == ("spelling:WindowCenter",)


def test_the_numbers_before_one_that_is_none_count(make_dicom: DicomMaker) -> None:
    pixels = smooth(4095)
    window = {"WindowCenter": "2048.500", "WindowWidth": "2000"}
    sound = make_dicom(pixels, elements=window)
    image = read(sound.replace(b"2048.500", b"2048.5\\ "))
    np.testing.assert_array_equal(image.pixels, read(sound).pixels)
    assert image.warnings == ("left_out:WindowCenter",)


@pytest.mark.parametrize(
    ("vr", "value"), [(b"US", b"\0\0\0\0"), (b"OW", b"\0\0"), (b"DS", b"0 "), (b"LO", b"zero")]
)
def test_padding_of_another_kind(make_dicom: DicomMaker, vr: bytes, value: bytes) -> None:
    pixels = smooth(4095)
    data = make_dicom(pixels, elements={"PixelPaddingValue": 0})
    element = b"\x28\0\x20\x01US\x02\0\0\0"
    assert element in data
    length = len(value).to_bytes(2, "little")
    head = vr + (b"\0\0" + length + b"\0\0" if vr == b"OW" else length)
    image = read(data.replace(element, element[:4] + head + value))
    if vr == b"LO":
        assert image.warnings == ("left_out:PixelPaddingValue",)
    else:
        np.testing.assert_array_equal(image.pixels, read(data).pixels)


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("missing", ["LUTData", "LUTDescriptor"])
def test_a_table_without_a_part_is_left_out(
    make_dicom: DicomMaker, sequence: str, missing: str
) -> None:
    pixels = smooth(4095)
    items = lut(np.arange(4096)[::-1], 12)
    del items[0][missing]
    image = read(make_dicom(pixels, elements={sequence: items}))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(pixels)).pixels)
    assert image.warnings == (f"left_out:{sequence}",)


@pytest.mark.parametrize("stated", ["monochrome1", "MONOCHROME 1", ["MONOCHROME1"] * 2], ids=str)
def test_the_photometric_interpretation_in_another_spelling(
    make_dicom: DicomMaker, stated: object
) -> None:
    pixels = smooth(255)
    image = read(make_dicom(pixels, elements={"PhotometricInterpretation": stated}))
    np.testing.assert_array_equal(gray(image), 255 - pixels.astype(int))
    assert image.warnings == ("spelling:PhotometricInterpretation",)


@pytest.mark.parametrize("text", [b"Mary^Ann", b"Mary\\1  ", b"1.5     "])
def test_what_is_refused_names_tag_and_kind_and_no_value(
    make_dicom: DicomMaker, text: bytes
) -> None:
    data = make_dicom(smooth(255), elements={"NumberOfFrames": "11111111"})
    with pytest.raises(DicomError) as caught:
        read(data.replace(b"11111111", text))
    assert str(caught.value).startswith("NumberOfFrames (0028,0008) is ")
    assert "Mary" not in str(caught.value)


@pytest.mark.parametrize("text", [b"1,0     ", b"1\\1     "])
def test_a_number_of_frames_that_means_one(make_dicom: DicomMaker, text: bytes) -> None:
    data = make_dicom(smooth(255), elements={"NumberOfFrames": "11111111"})
    image = read(data.replace(b"11111111", text))
    np.testing.assert_array_equal(image.pixels, read(make_dicom(smooth(255))).pixels)
    assert image.warnings == (f"{'spelling' if b',' in text else 'left_out'}:NumberOfFrames",)


@pytest.mark.parametrize(
    "keyword",
    ["Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"],
)
@pytest.mark.parametrize("in_bytes", [True, False])
def test_a_required_number_of_two_values_or_of_another_kind(
    make_dicom: DicomMaker, keyword: str, in_bytes: bool
) -> None:
    data = make_dicom(smooth(4095))
    tag = int(pydicom.datadict.tag_for_keyword(keyword) or 0)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    start = data.index(head + b"US\2\0")
    value = data[start + 8 : start + 10]
    other = b"OW\0\0\2\0\0\0" + value if in_bytes else b"US\4\0" + value + b"\7\0"
    image = read(data[: start + 4] + other + data[start + 10 :])
    np.testing.assert_array_equal(image.pixels, read(data).pixels)
    assert image.warnings == (f"{'spelling' if in_bytes else 'left_out'}:{keyword}",)


# --- what does not parse --------------------------------------------------------------------------


def private(vr: bytes, value: bytes, group: int = 9, *, long: bool = False) -> bytes:
    length = struct.pack("<HI" if long else "<H", *((0, len(value)) if long else (len(value),)))
    return struct.pack("<HH", group, 0x1010) + vr + length + value


@pytest.mark.parametrize("vr", [b"  ", b"\0\0", b"??", b"zz"])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("where", ["before", "after", "both"])
@pytest.mark.parametrize("quality", [None, 95])
def test_private_elements_of_no_type(
    make_dicom: DicomMaker, vr: bytes, long: bool, where: str, quality: int | None
) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=quality)
    odd, wrong = private(vr, b"abcdef", long=long), sound
    if where != "after":
        place = sound.index(b"\x10\0\x10\0PN")
        wrong = wrong[:place] + odd + wrong[place:]
    if where != "before":
        place = wrong.index(b"\xe0\x7f\x10\0O")
        wrong = wrong[:place] + private(vr, b"abcdef", 0x29, long=long) + wrong[place:]
    image = read(wrong)
    expected = read(sound[132:])  # by pydicom, as its neighbour
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert (image.rows, image.header) == (expected.rows, expected.header)
    assert set(image.warnings) <= {"parsed:private"}


@pytest.mark.parametrize("vr", [b"  ", b"\0\0", b"??", b"us", b"OX"])
@pytest.mark.parametrize("quality", [None, 95])
def test_elements_of_the_standard_without_their_type_are_read(
    make_dicom: DicomMaker, vr: bytes, quality: int | None
) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=quality)
    for tag, own in ((b"\x28\0\x04\0", b"CS"), (b"\x28\0\x10\0", b"US")):
        assert sound.count(tag + own) == 1
        image = read(sound.replace(tag + own, tag + vr))
        np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)
        assert image.warnings in (
            ("parsed:PhotometricInterpretation",),
            ("parsed:Rows",),
        )


@pytest.mark.parametrize("ending", [b"", b"\0" * 8, b"\0" * 500])
def test_a_whole_frame_without_the_delimiter(make_dicom: DicomMaker, ending: bytes) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=95)
    delimiter = b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert sound.endswith(delimiter)
    image = read(sound[: -len(delimiter)] + ending)
    np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)
    assert image.warnings == ("parsed:PixelData",)


@given(st.integers(1, 1200))
@settings(max_examples=60, deadline=None)
def test_a_frame_that_is_cut_is_never_mended(make_dicom: DicomMaker, cut: int) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=95)
    with pytest.raises(DicomError):
        read(sound[: -8 - 2 - cut])


@pytest.mark.parametrize("ending", [b"", struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)])
def test_uncompressed_pixels_of_undefined_length(make_dicom: DicomMaker, ending: bytes) -> None:
    sound = make_dicom(smooth(4095))
    place = sound.index(b"\xe0\x7f\x10\0OW\0\0") + 8
    image = read(sound[:place] + b"\xff" * 4 + sound[place + 4 :] + ending)
    np.testing.assert_array_equal(image.pixels, read(sound).pixels)


def test_a_frame_of_unknown_vr(make_dicom: DicomMaker) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=95)
    image = read(sound.replace(b"\xe0\x7f\x10\0OB", b"\xe0\x7f\x10\0UN"))
    np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)
    assert image.warnings == ("parsed:PixelData",)


def with_icon(make_dicom: DicomMaker, quality: int | None, **elements: str) -> bytes:
    icon = Dataset()
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.Rows = icon.Columns = 32
    icon.BitsAllocated = icon.BitsStored = 8
    icon.HighBit, icon.PixelRepresentation = 7, 0
    icon.PixelData = smooth(255)[:32, :32].tobytes()
    icon["PixelData"].VR = "OB"
    made = {"IconImageSequence": Sequence([icon])} | elements
    return make_dicom(smooth(255), jpeg_quality=quality, elements=made)


@given(st.integers(-400, 400).filter(bool), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_icon_of_a_wrong_length(make_dicom: DicomMaker, missing: int, packed: bool) -> None:
    sound = with_icon(make_dicom, 95 if packed else None)
    place = sound.index(b"\x88\0\0\x02SQ\0\0") + 8
    lengths = struct.unpack_from("<I4xI", sound, place)
    assert lengths[0] == lengths[1] + 8
    wrong = bytearray(sound)
    for offset, length in zip((0, 8), lengths, strict=True):
        struct.pack_into("<I", wrong, place + offset, length - missing)
    image = read(bytes(wrong))
    np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)


@pytest.mark.parametrize("tag", [b"\x20\0\0\x40LT", b"\x32\0\x60\x10LO"])
@pytest.mark.parametrize("quality", [None, 95])
def test_an_icon_is_never_the_picture(
    make_dicom: DicomMaker, quality: int | None, tag: bytes
) -> None:
    texts = {"ImageComments": "a comment", "RequestedProcedureDescription": "chest"}
    sound = with_icon(make_dicom, quality, **texts)
    expected, place, right = read(sound[132:]), sound.index(tag) + 6, 0
    length = int.from_bytes(sound[place : place + 2], "little")
    for wrong in range(length + 2, length + 400, 2):
        try:
            image = read(sound[:place] + wrong.to_bytes(2, "little") + sound[place + 2 :])
        except DicomError:
            continue
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        right += 1
    assert right > 90


@pytest.mark.parametrize("vr", [b"ow", b"??", b"  ", b"OX", b"US"])
@pytest.mark.parametrize("quality", [None, 95])
def test_pixel_data_of_an_invalid_type(
    make_dicom: DicomMaker, quality: int | None, vr: bytes
) -> None:
    sound = make_dicom(smooth(255), jpeg_quality=quality)
    place = sound.index(b"\xe0\x7f\x10\0O") + 4
    image = read(sound[:place] + vr + sound[place + 2 :])
    np.testing.assert_array_equal(image.pixels, read(sound[132:]).pixels)
    assert image.warnings == ("parsed:PixelData",)


def test_implicit_pixel_data_in_an_explicit_file(make_dicom: DicomMaker) -> None:
    sound = make_dicom(smooth(255))
    place = sound.index(b"\xe0\x7f\x10\0O") + 4
    image = read(sound[:place] + sound[place + 4 :])
    np.testing.assert_array_equal(image.pixels, read(sound).pixels)


def test_a_dicomdir_is_no_radiograph(make_dicom: DicomMaker) -> None:
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(smooth(255))))
    dataset.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    for keyword in ("PixelData", "SOPClassUID"):
        del dataset[keyword]
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(DicomError) as caught:
        read(buffer.getvalue())
    assert caught.value.reason == "wrong_class"
