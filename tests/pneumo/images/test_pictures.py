"""PNG, JPEG and TIFF become gray as they are seen; what cannot be shown without guessing is
refused."""

import gzip
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from pneumo.errors import DicomError
from pneumo.images.boxes import Box
from pneumo.images.dicom_files import UnusableFile, decode_file
from pneumo.images.pictures import decode_picture, is_picture, read_picture

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
DEEP = (RNG.integers(0, 4096, (40, 56)) + 300).astype(np.uint16)


def encode(pixels: npt.NDArray[Any], kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def spanned(deep: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
    low, high = int(deep.min()), int(deep.max())
    return (deep.astype(float) - low) / (high - low) * 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_8_bits_is_as_it_is(kind: str) -> None:
    assert (decode_picture(encode(GRAY, kind)) == GRAY).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_span_from_the_least_to_the_greatest(kind: str) -> None:
    gray = decode_picture(encode(DEEP, kind))
    assert (gray.min(), gray.max()) == (0, 255)
    np.testing.assert_allclose(gray, spanned(DEEP), atol=0.51)


def test_a_tiff_whose_least_value_is_white_is_inverted() -> None:
    deep = decode_picture(encode(DEEP, "TIFF", tiffinfo={262: 0}))
    np.testing.assert_allclose(deep, 255 - spanned(DEEP), atol=0.51)
    # Pillow inverts 8 bits when it writes them so.
    assert (decode_picture(encode(GRAY, "TIFF", tiffinfo={262: 0})) == GRAY).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_colour_becomes_its_luminance(kind: str) -> None:
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    wanted = COLOUR @ np.array([0.299, 0.587, 0.114])
    gray = decode_picture(encode(COLOUR, kind, **options))
    np.testing.assert_allclose(gray, wanted, atol=3 if kind == "JPEG" else 1)


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_palettes_bits_and_opaque_alpha_are_looked_through(kind: str, mode: str) -> None:
    wanted = np.asarray(Image.fromarray(GRAY).convert(mode).convert("L"))
    gray = decode_picture(encode(GRAY, kind, mode))
    np.testing.assert_allclose(gray.astype(int), wanted, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_heeded(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {"exif": exif, "quality": 100} if kind == "JPEG" else {"exif": exif}
    if kind == "TIFF":
        options = {"tiffinfo": {274: orientation}}
    data = encode(GRAY, kind, **options)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_allclose(decode_picture(data).astype(int), np.asarray(wanted), atol=2)


def test_a_cameras_jpeg_with_a_preview_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    preview = Image.fromarray(255 - GRAY)
    Image.fromarray(GRAY).save(buffer, "MPO", save_all=True, append_images=[preview], quality=100)
    assert np.abs(decode_picture(buffer.getvalue()).astype(int) - GRAY).max() <= 2


@pytest.mark.parametrize("pixels", [GRAY, COLOUR], ids=["gray", "colour"])
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_a_damaged_tiff_is_not_shown_in_part(
    compression: str | None, pixels: npt.NDArray[Any]
) -> None:
    data = encode(pixels, "TIFF", compression=compression)
    middle = len(data) // 2
    changed = data[:middle] + bytes(50) + data[middle + 50 :]
    with pytest.raises(DicomError) as caught:
        decode_picture(changed if compression else data[:-100])
    assert caught.value.reason == "undecodable"


def test_a_tiff_of_deep_colours_in_planes_is_refused() -> None:
    data = cv2.imencode(".tiff", np.dstack([DEEP] * 3))[1].tobytes()
    together, separate = (struct.pack("<HHII", 284, 3, 1, planes) for planes in (1, 2))
    assert data.count(together) == 1
    with pytest.raises(DicomError, match="separate planes"):
        decode_picture(data.replace(together, separate))


def test_a_box_goes_where_the_picture_goes() -> None:
    image = read_picture(encode(GRAY, "PNG"), 28)
    assert image.pixels.shape == (28, 28)
    assert (image.rows, image.columns) == (40, 56)
    assert image.to_stored(Box(0, 0, 56, 40)) == Box(0, 4, 28, 20)


def test_what_would_be_a_guess_is_refused() -> None:
    see_through = np.dstack([COLOUR, GRAY])
    two = io.BytesIO()
    page = Image.fromarray(GRAY)
    page.save(two, "TIFF", save_all=True, append_images=[page])
    real = Image.fromarray(GRAY.astype(np.float32))
    floats = io.BytesIO()
    real.save(floats, "TIFF")
    see_through_gray = np.dstack([GRAY, 255 - GRAY])
    for data, reason in (
        (encode(see_through, "PNG"), "photometric"),
        (encode(see_through, "TIFF"), "photometric"),
        (encode(see_through_gray, "PNG"), "photometric"),
        (encode(see_through_gray, "TIFF"), "photometric"),
        (encode(COLOUR, "JPEG", "CMYK"), "photometric"),
        (floats.getvalue(), "photometric"),
        (two.getvalue(), "multi_frame"),
        (encode(GRAY, "PNG")[:-600], "undecodable"),
        (encode(GRAY, "JPEG")[:100], "undecodable"),
        (b"\x89PNG\r\n\x1a\nno more", "undecodable"),
    ):
        with pytest.raises(DicomError) as caught:
            decode_picture(data)
        assert caught.value.reason == reason


def encode_gray_png(depth: int, value: int, transparent: int) -> bytes:
    """A PNG of 8 x 8 pixels of one `value` of `depth` bits, which has a transparent value."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    row = int(f"{value:0{depth}b}" * 8, 2).to_bytes(depth, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">H", transparent))
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * 8))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_gray_png_with_a_transparent_value_is_refused_where_pixels_have_it(depth: int) -> None:
    white = 2**depth - 1
    opaque = decode_picture(encode_gray_png(depth, white, transparent=0))
    assert (opaque == (0 if depth == 16 else 255)).all()  # 16 bits have no range here
    with pytest.raises(DicomError, match="transparent") as caught:
        decode_picture(encode_gray_png(depth, white, transparent=white))
    assert caught.value.reason == "photometric"


def test_a_header_that_claims_too_much_is_refused_before_decoding() -> None:
    huge = encode(np.zeros((1, 1), np.uint8), "PNG")
    size = (60_000).to_bytes(4, "big")
    with pytest.raises(DicomError) as caught:
        decode_picture(huge[:16] + size + size + huge[24:])
    assert caught.value.reason in ("too_large", "undecodable")


def test_a_file_is_told_by_its_first_bytes(make_dicom: Any) -> None:
    assert not is_picture(make_dicom(GRAY))
    as_tiff_too = b"II*\0" + make_dicom(GRAY)[4:]
    for data in (make_dicom(GRAY), as_tiff_too, encode(GRAY, "PNG")):
        image = decode_file(data, 56)
        assert not isinstance(image, UnusableFile)
        assert (image.pixels[8:48] == GRAY).all()


def test_a_gzip_file_in_several_parts_is_read_whole() -> None:
    data = encode(GRAY, "PNG")
    parts = gzip.compress(data[:500]) + gzip.compress(data[500:])
    image = decode_file(parts, 56)
    assert not isinstance(image, UnusableFile)
    np.testing.assert_array_equal(image.pixels[8:48], GRAY)
