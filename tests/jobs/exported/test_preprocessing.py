"""What stands in an export reads a DICOM file to the very pixels of pneumo, or refuses it."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from jobs.exported.preprocessing import RefusedError, read_picture
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import decode_file
from tests.conftest import draw_chest, encode_dicom

WINDOW = {"WindowCenter": [600, 100], "WindowWidth": [900, 50]}


def read(path: Path, data: bytes, decoded_at: int, image_size: int | None = None) -> Any:
    path.write_bytes(data)
    return read_picture(path, {"decoded_at": decoded_at, "image_size": image_size or decoded_at})


def draw_values(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> Any:
    """A chest with noise, in about the ten lowest bits of `dtype`."""
    chest = cv2.resize(draw_chest(64), shape[::-1], interpolation=cv2.INTER_LINEAR)
    values = chest.astype(np.float64) + rng.normal(0, 5, shape)
    low, factor = {"u1": (0, 1.0), "u2": (0, 4.0), "i2": (-300, 4.0)}[dtype]
    return np.clip(values * factor + low, low, 255 * factor + low).astype(dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["u1", "u2", "i2"]),
    sides=st.tuples(st.integers(90, 400), st.integers(90, 400)),
    size=st.sampled_from([32, 48, 64, 80]),
    smaller=st.booleans(),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "PhotometricInterpretation": st.just("MONOCHROME1"),
            "RescaleSlope": st.sampled_from([1, 0.5, 2.25]),
            "RescaleIntercept": st.sampled_from([0, -1024, 3.5]),
            "PixelPaddingValue": st.sampled_from([0, 40, 1023]),
            "PixelPaddingRangeLimit": st.sampled_from([0, 70, 2000]),
            "ViewPosition": st.sampled_from(["AP", "PA", ""]),
            "BodyPartExamined": st.sampled_from(["CHEST", "chest  ap", ""]),
        },
    ),
    window=st.sampled_from([None, WINDOW, {"WindowCenter": 128, "WindowWidth": 2}]),
    syntax=st.sampled_from([None, ImplicitVRLittleEndian, RLELossless]),
)
@example(
    seed=1,
    dtype="u2",
    sides=(90, 92),
    size=32,
    smaller=False,
    changes={"PixelPaddingRangeLimit": 2000},  # all of the picture
    window=None,
    syntax=None,
)
def test_pixels_are_pneumos_own(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    dtype: str,
    sides: tuple[int, int],
    size: int,
    smaller: bool,
    changes: dict[str, Any],
    window: dict[str, Any] | None,
    syntax: UID | None,
) -> None:
    rng = np.random.default_rng(seed)
    pixels = draw_values(rng, sides, dtype)
    if seed % 3 == 0:  # hot pixels, which the span leaves out
        pixels[0, :2] = np.iinfo(dtype).max
    if seed % 5 == 0:  # letters, which it leaves out too
        pixels[5 : 5 + sides[0] // 10, 5 : 5 + sides[1] // 10] = np.iinfo(dtype).max
    path = tmp_path_factory.mktemp("dicom") / "a.dcm"
    data = encode_dicom(pixels, elements={"PixelPaddingValue": 7} | changes | (window or {}))
    if syntax is not None:
        data = recode(data, path, syntax)
    judged = decode_file(data, size)
    try:
        found = read(path, data, size, size - 11 if smaller else size)
    except RefusedError:
        # Refused is what pneumo refuses too, or would show by another window than the first.
        assert not isinstance(judged, GrayImage) or window is not None
        return
    assert isinstance(judged, GrayImage)
    expected = judged.pixels
    if smaller:
        expected = cv2.resize(expected, (size - 11, size - 11), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(found[0, 0], expected)


def recode(data: bytes, path: Path, syntax: UID) -> bytes:
    """The same file in another transfer syntax without loss."""
    path.write_bytes(data)
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(path)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    return path.read_bytes()


def test_a_jpeg_is_read_exactly_or_not_at_all(tmp_path: Path) -> None:
    pixels = draw_values(np.random.default_rng(1), (300, 280), "u1")
    data = encode_dicom(pixels, jpeg_quality=90)
    judged = decode_file(data, 64)
    assert isinstance(judged, GrayImage)
    np.testing.assert_array_equal(read(tmp_path / "a", data, 64)[0, 0], judged.pixels)
    whole = encode_dicom(draw_values(np.random.default_rng(1), (256, 256), "u1"), jpeg_quality=90)
    with pytest.raises(RefusedError, match="half size"):
        read(tmp_path / "a", whole, 64)


LUT = pydicom.Dataset()
LUT.LUTDescriptor, LUT.LUTData = [256, 0, 8], bytes(range(256))
LATERAL = pydicom.Dataset()
LATERAL.CodeMeaning = "left lateral"


def test_signed_values_under_an_unsigned_header_are_refused(tmp_path: Path) -> None:
    values = draw_values(np.random.default_rng(2), (100, 100), "u2") - np.uint16(400)  # wraps
    judged = decode_file(encode_dicom(values), 64)
    assert isinstance(judged, GrayImage)
    assert "pixels:PixelRepresentation" in judged.warnings
    with pytest.raises(RefusedError, match="may be signed"):
        read(tmp_path / "a", encode_dicom(values), 64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not MONOCHROME1"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "no radiograph"),
        ({"VOILUTSequence": [LUT]}, "look-up table"),
        ({"ModalityLUTSequence": [LUT]}, "look-up table"),
        ({"VOILUTFunction": "SIGMOID", **WINDOW}, "not LINEAR"),
        ({"WindowCenter": 1e6, "WindowWidth": 10}, "hides the picture"),
        ({"WindowCenter": 100}, "without a centre"),
        ({"WindowCenter": 100, "WindowWidth": 0.5}, "not wider than 1"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope of 0"),
        ({"ViewPosition": "LL"}, "frontal view"),
        ({"ViewPosition": "", "ViewCodeSequence": [LATERAL]}, "frontal view"),
        ({"BodyPartExamined": "KNEE"}, "another body part"),
        ({"HighBit": 6, "BitsStored": 6}, "low bits"),
        ({"NumberOfFrames": 2}, "not one frame"),
        ({"PresentationLUTShape": "INVERSE"}, "contradicts"),
        ({"Rows": 90}, "the length that the header says"),
        ({"Rows": None}, "not a DICOM file that can be read"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    pixels = draw_values(np.random.default_rng(2), (100, 100), "u1")
    assert read(tmp_path / "a", encode_dicom(pixels), 64).shape == (1, 1, 64, 64)
    with pytest.raises(RefusedError, match=reason):
        read(tmp_path / "a", encode_dicom(pixels, elements=changes), 64)


def test_other_files_are_refused(tmp_path: Path) -> None:
    chest = draw_chest(100)
    with pytest.raises(RefusedError, match="smaller than the model's input"):
        read(tmp_path / "a", encode_dicom(draw_chest(60)), 64)
    with pytest.raises(RefusedError, match="blank"):
        read(tmp_path / "a", encode_dicom(np.full((100, 100), 90, np.uint8)), 64)
    with pytest.raises(RefusedError, match="decompress it first"):
        read(
            tmp_path / "a",
            recode(encode_dicom(chest), tmp_path / "b", DeflatedExplicitVRLittleEndian),
            64,
        )
    for data in (b"", b"no picture", encode_dicom(chest)[:700]):
        with pytest.raises(RefusedError, match=r"not a DICOM file|the length"):
            read(tmp_path / "a", data, 64)
    with pytest.raises(RefusedError, match="FileNotFoundError"):
        read_picture(tmp_path / "none", {"decoded_at": 64, "image_size": 64})
