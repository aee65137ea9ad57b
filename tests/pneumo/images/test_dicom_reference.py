"""Our gray levels and those of an independent decoder, DCMTK, over real and made files.

DCMTK is told to do what we document: the VOI LUT, else the first window, else the span of the
values if they have more than 8 bits. It cuts off where we round, so up to 1 level is its way.
What DCMTK does not read (JPEG 2000, pixel padding) is compared with the same picture uncompressed.
"""

import io
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from pneumo.errors import DicomError
from pneumo.images.dicom import decode_gray, read_study_image
from pneumo.images.frame_format import read_format
from pneumo.images.pixel_decoders import decode_stored

pytestmark = pytest.mark.processors

DicomMaker = Callable[..., bytes]
Pixels = npt.NDArray[Any]

FOLDER = Path(pydicom.__file__).parent / "data" / "test_files"
JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)

# Why a file with pixels among pydicom's own is not compared.
REFUSED = {  # by us: the reason
    "JPEG2000-embedded-sequence-delimiter.dcm": "undecodable",  # its frame is broken
    "MR_truncated.dcm": "undecodable",
    "badVR.dcm": "undecodable",  # a number of frames that is no number
    "meta_missing_tsyntax.dcm": "no_pixels",  # an empty element
    "nested_priv_SQ.dcm": "no_pixels",
    "SC_rgb_rle_16bit_2frame.dcm": "multi_frame",
    "SC_rgb_rle_2frame.dcm": "multi_frame",
    "SC_rgb_rle_32bit_2frame.dcm": "multi_frame",
    "examples_ybr_color.dcm": "multi_frame",
    "rtdose.dcm": "multi_frame",
    "rtdose_expb.dcm": "multi_frame",
    "rtdose_rle.dcm": "multi_frame",
    "SC_rgb_rle_32bit.dcm": "photometric",
    "liver_1frame.dcm": "photometric",  # 1 bit
    "liver_expb_1frame.dcm": "photometric",
    "rtdose_1frame.dcm": "photometric",  # 32 bits
    "rtdose_expb_1frame.dcm": "photometric",
    "rtdose_rle_1frame.dcm": "photometric",
}
UNREAD = {  # by DCMTK: why
    "693_J2KI.dcm": "JPEG 2000",
    "GDCMJ2K_TextGBR.dcm": "JPEG 2000",
    "J2K_pixelrep_mismatch.dcm": "JPEG 2000",
    "JPEG2000.dcm": "JPEG 2000",
    "MR_small_jp2klossless.dcm": "JPEG 2000",
    "SC_rgb_gdcm_KY.dcm": "JPEG 2000",
    "examples_jpeg2k.dcm": "JPEG 2000",
    "SC_rgb_jpeg.dcm": "its last element is cut off",
}


BLANK = ("dicomdirtests/77654033/CT2/17166", "dicomdirtests/77654033/CT2/17196")
"""DCMTK shows these white, by a window below all values, which is left out here."""


def read(source: Path | bytes) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of files that bend the standard
        data = source if isinstance(source, bytes) else source.read_bytes()
        return pydicom.dcmread(io.BytesIO(data), force=True)


def pictures() -> list[str]:
    """pydicom's own files that hold pixels, by path in its folder."""
    files = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in ("", ".dcm")]
    return [
        str(path.relative_to(FOLDER))
        for path in files
        if path.is_file() and "PixelData" in read(path)
    ]


PICTURES = pictures()
COMPARED = [name for name in PICTURES if name not in REFUSED and name not in UNREAD]


def dcmtk(path: Path, dataset: Dataset, folder: Path) -> Pixels:
    """DCMTK's picture of the file at `path`, (H, W) of 8 bits."""
    tool = "dcml2pnm" if dataset.file_meta.get("TransferSyntaxUID") in JPEG_LS else "dcmj2pnm"
    if shutil.which(tool) is None:
        pytest.skip(f"needs DCMTK's {tool}, which is not on the PATH")
    if dataset.get("VOILUTSequence"):
        options = ["+Wl", "1"]
    elif dataset.get("WindowWidth") and not str(path).endswith(BLANK):
        options = ["+Wi", "1"]
        options += ["+Wfs"] if dataset.get("VOILUTFunction") == "SIGMOID" else []
    elif dataset.SamplesPerPixel == 1 and (dataset.BitsStored > 8 or dataset.PixelRepresentation):
        options = ["+Wm"]
    else:
        options = []
    out = folder / "out.pnm"
    subprocess.run([tool, "-q", "-O", *options, path, out], check=True, capture_output=True)
    pixels = np.asarray(Image.open(out))
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def test_every_picture_is_compared_or_named() -> None:
    assert len(COMPARED) >= 65
    assert set(REFUSED) | set(UNREAD) <= set(PICTURES)


@pytest.mark.parametrize("name", COMPARED)
def test_real_files_are_those_of_dcmtk(name: str, tmp_path: Path) -> None:
    dataset = read(FOLDER / name)
    expected = dcmtk(FOLDER / name, dataset, tmp_path)
    difference = np.abs(decode_gray(dataset).astype(int) - expected)
    assert difference.mean() < 1


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_is_refused_has_its_reason(name: str, reason: str) -> None:
    with pytest.raises(DicomError) as caught:
        decode_gray(read(FOLDER / name))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm"),
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_rle.dcm"),
    ],
)
def test_the_same_picture_in_another_transfer_syntax(compressed: str, plain: str) -> None:
    difference = decode_gray(read(FOLDER / compressed)).astype(int) - decode_gray(
        read(FOLDER / plain)
    )
    assert np.abs(difference).mean() < 0.5


@pytest.mark.parametrize("name", [name for name, why in UNREAD.items() if why == "JPEG 2000"])
def test_jpeg_2000_by_either_of_two_decoders_is_the_same(name: str) -> None:
    pytest.importorskip("gdcm", reason="needs the extra 'dev'")
    dataset = read(FOLDER / name)
    expected = pixel_array(dataset, decoding_plugin="gdcm", raw=True)
    stored, _ = decode_stored(dataset, read_format(dataset, set()), set())
    assert np.ptp(stored) > 200
    np.testing.assert_array_equal(stored, expected)
    if dataset.SamplesPerPixel == 3:  # windows are compared with DCMTK's elsewhere
        gray = cv2.cvtColor(expected, cv2.COLOR_RGB2GRAY).astype(int)
        assert np.abs(decode_gray(dataset) - gray).max() <= 1


# --- made files -----------------------------------------------------------------------------------

SMOOTH = np.add.outer(np.arange(48) * 40, np.arange(64) * 30)  # 0 to 3770


def table(values: Pixels, first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item["LUTDescriptor"].VR = "US" if first >= 0 else "SS"
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return [item]


UNSIGNED_12 = {"BitsStored": 12, "HighBit": 11}
BELOW_ZERO = {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "US"}
CURVE = np.sqrt(np.arange(4096) / 4095)
MADE: dict[str, tuple[Pixels, Mapping[str, Any]]] = {
    "signed 12 in 16": ((SMOOTH - 2000).astype(np.int16), {"BitsStored": 12, "HighBit": 11}),
    "signed, windowed": (
        (SMOOTH - 2000).astype(np.int16),
        UNSIGNED_12 | {"WindowCenter": -300.0, "WindowWidth": 1500.0},
    ),
    "MONOCHROME1, 16 bits": (
        (SMOOTH * 17).astype(np.uint16),
        {"PhotometricInterpretation": "MONOCHROME1"},
    ),
    "several windows": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | {"WindowCenter": [900.0, 5.0], "WindowWidth": [1200.0, 9.0]},
    ),
    "sigmoid": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | {"WindowCenter": 1800, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
    ),
    "rescaled and windowed": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12
        | {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US"}
        | {"WindowCenter": 2500, "WindowWidth": 4000},
    ),
    "VOI LUT": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | {"VOILUTSequence": table(CURVE * 4095, 0, 12)},
    ),
    "VOI LUT below zero": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | BELOW_ZERO | {"VOILUTSequence": table(CURVE * 65535, -1024, 16)},
    ),
    "VOI LUT below zero, said without a sign": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | BELOW_ZERO | {"VOILUTSequence": table(CURVE * 65535, 2**16 - 1024, 16)},
    ),
    "a window of no width": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | {"WindowCenter": 0, "WindowWidth": 0},
    ),
    "VOI LUT before a window": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12
        | {"VOILUTSequence": table(CURVE[::2] * 65535, 500, 16)}
        | {"WindowCenter": 10, "WindowWidth": 20},
    ),
    "modality LUT": (
        SMOOTH.astype(np.uint16),
        UNSIGNED_12 | {"ModalityLUTSequence": table(CURVE * 65535, 0, 16)},
    ),
    "overlay in the high bits": (
        (SMOOTH + 4096 * (np.indices(SMOOTH.shape).sum(0) % 7)).astype(np.uint16),
        UNSIGNED_12,
    ),
    "high bits used": ((SMOOTH * 16 + 5).astype(np.uint16), {"BitsStored": 12, "HighBit": 15}),
    "8 signed bits": ((SMOOTH // 15 - 128).astype(np.int8), {}),
}


@pytest.mark.parametrize("name", MADE)
def test_made_files_are_those_of_dcmtk(name: str, make_dicom: DicomMaker, tmp_path: Path) -> None:
    pixels, elements = MADE[name]
    path = tmp_path / "made.dcm"
    path.write_bytes(make_dicom(pixels, elements=elements))
    dataset = read(path)
    gray = decode_gray(dataset)
    assert gray.std() > 20
    difference = np.abs(gray.astype(int) - dcmtk(path, dataset, tmp_path))
    assert difference.mean() < 1
    assert difference.max() <= 2


def transcode(data: bytes, syntax: UID) -> bytes:
    """`data`, uncompressed, in another transfer syntax."""
    dataset = read(data)
    if syntax.is_compressed and syntax.is_encapsulated:
        dataset.compress(syntax)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=syntax.is_implicit_VR, little_endian=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "syntax",
    [
        DeflatedExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.keyword,
)
def test_a_lossless_transfer_syntax_changes_nothing(
    make_dicom: DicomMaker, name: str, syntax: UID
) -> None:
    pixels, elements = MADE[name]
    if syntax.is_encapsulated:
        pytest.importorskip("jpeg_ls", reason="needs the extra 'codecs'")
        if name in ("overlay in the high bits", "high bits used") and syntax != RLELossless:
            pytest.skip("a codestream has no unused bits")
    plain = make_dicom(pixels, elements=elements)
    expected = read_study_image(plain, 40)
    image = read_study_image(transcode(plain, syntax), 40)
    np.testing.assert_array_equal(image.pixels, expected.pixels)


@pytest.mark.parametrize(
    "options", [["+e1"], ["+el", "+sv", "6"], ["+ee"]], ids=["lossless SV1", "lossless", "12 bits"]
)
@pytest.mark.parametrize("name", ["several windows", "signed 12 in 16", "sigmoid"])
def test_jpeg_of_more_than_8_bits(
    make_dicom: DicomMaker, name: str, options: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    if shutil.which("dcmcjpeg") is None:
        pytest.skip("needs DCMTK's dcmcjpeg, which is not on the PATH")
    pixels, elements = MADE[name]
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    plain.write_bytes(make_dicom(pixels, elements=elements))
    extended = options == ["+ee"]
    if extended and pixels.dtype.kind == "i":
        pytest.skip("dcmcjpeg writes signed values without loss only")
    subprocess.run(["dcmcjpeg", "-q", *options, plain, packed], check=True)
    difference = decode_gray(read(packed)).astype(int) - decode_gray(read(plain))
    assert np.abs(difference).max() <= (8 if extended else 0)  # of the loss


@pytest.mark.parametrize("tool", ["dcmcjpeg", "dcmcjpls"])
def test_a_codestream_of_the_headers_bit_fields(
    make_dicom: DicomMaker, tool: str, tmp_path: Path
) -> None:
    """DCMTK's encoders put whole words in, with the unused low bits of a high bit of 15."""
    pytest.importorskip("imagecodecs", reason="needs the extra 'codecs'")
    if shutil.which(tool) is None:
        pytest.skip(f"needs DCMTK's {tool}, which is not on the PATH")
    pixels, elements = MADE["high bits used"]
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    plain.write_bytes(make_dicom(pixels, elements=elements))
    subprocess.run([tool, plain, packed], check=True, capture_output=True)
    gray = decode_gray(read(packed))
    np.testing.assert_array_equal(gray, decode_gray(read(plain)))
    assert np.abs(gray.astype(int) - dcmtk(packed, read(packed), tmp_path)).max() <= 2
