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
from tests.examples import examples

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


def draw_edges(values: Any, kind: str, bits: int, shift: int) -> Any:
    """Words of `values` with what writers do: padding, letters, another sign, bits above."""
    top = 2**bits
    words = values.astype(np.int64) * max(top // 256, 1) % top
    if kind == "padding":
        words[:, :16] = top // 2  # the least signed number
    elif kind == "letters":
        words[8:16, 8:40:2], words[8:16, 9:40:2] = top - 1, 0
    elif kind == "turned over":
        words = (words + shift * top // 16) % top
    elif kind == "above":
        words |= (np.indices(values.shape)[1] // 8 % 2) << min(bits, 15)
    return words


@examples(250)
@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0, 2]),
    kind=st.sampled_from(["none", "padding", "letters", "turned over", "above"]),
    bits=st.sampled_from([8, 9, 12, 16]),
    shift=st.integers(0, 15),
    stated=st.sampled_from([None, None, 4, 8, 9, 10, 11, 12, 16]),
    signed=st.integers(0, 1),
    allocated=st.sampled_from([8, 16, 16]),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "HighBit": st.sampled_from([7, 11, 15]),
            "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "monochrome2"]),
            "PresentationLUTShape": st.sampled_from(
                ["IDENTITY", "INVERSE", " INVERSE", " IDENTITY ", "inverse", "OTHER", ""]
            )
            | st.sampled_from([["INVERSE", "IDENTITY"], ["IDENTITY", "INVERSE"]]),
            "ViewPosition": st.sampled_from(["PA", "ap ", "LL", ["PA", "LL"]]),
            "BodyPartExamined": st.sampled_from(["CHEST", "KNEE", ["KNEE", "CHEST"], "RIB"]),
            "RescaleSlope": st.sampled_from([1, -1, 2.5, 1e-300, 1e307]),
            "RescaleIntercept": st.sampled_from([0, -1024, 1e300]),
            "PixelPaddingValue": st.sampled_from([0, -2048, -32768, 4095]),
            "WindowCenter": st.sampled_from([0, 1024, 2048, 1e300, [40, 90], ["", 1024]]),
            "WindowWidth": st.sampled_from([0.5, 1, 2048, 65536, 1e300, [2048, 40], ["", 2048]]),
            "VOILUTFunction": st.sampled_from(["LINEAR", " LINEAR", "SIGMOID", "OTHER"]),
        },
    ),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of values that are none
def test_any_header_is_read_as_pneumo_does_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    noise: int,
    kind: str,
    bits: int,
    shift: int,
    stated: int | None,
    signed: int,
    allocated: int,
    changes: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    chest = cv2.resize(draw_chest(16), (72, 64), interpolation=cv2.INTER_CUBIC)
    values = np.clip(chest + rng.normal(0, noise, chest.shape), 0, 255)
    words = draw_edges(values, kind, bits, shift) % 2**allocated
    shown = min(stated or bits, allocated)
    elements = {"BitsStored": shown, "HighBit": shown - 1, "PixelRepresentation": signed, **changes}
    if not signed and "PixelPaddingValue" in changes:
        elements["PixelPaddingValue"] %= 2**16
    data = encode_dicom(words.astype(f"u{allocated // 8}"), elements=elements)
    check_agreement(data, tmp_path_factory.mktemp("dicom") / "a.dcm")


def check_agreement(data: bytes, path: Path) -> None:
    """The same picture as pneumo's, or none."""
    judged = decode_file(data, 48)
    try:
        found = read(path, data, 48)
    except RefusedError:
        return
    assert isinstance(judged, GrayImage)
    np.testing.assert_array_equal(found[0, 0], judged.pixels)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_sound_signed_files_are_read(tmp_path: Path, bits: int, padded: bool) -> None:
    values = draw_edges(draw_chest(64), "none", bits - 1, 0)
    if padded:
        values[:, :16] = -(2 ** (bits - 1))
    data = encode_dicom(values.astype(np.int16), elements={"BitsStored": bits, "HighBit": bits - 1})
    assert read(tmp_path / "a", data, 48).shape == (1, 1, 48, 48)
    check_agreement(data, tmp_path / "a")


@pytest.mark.parametrize("center", [2048, 1024])
def test_a_faint_picture_under_a_window_for_its_bits_is_read(tmp_path: Path, center: int) -> None:
    values = draw_values(np.random.default_rng(3), (64, 64), "u2").astype(np.float64)
    faint = (1500 + 400 * (values - values.min()) / np.ptp(values)).astype(np.uint16)
    window = {"WindowCenter": center, "WindowWidth": 4096}
    data = encode_dicom(faint, elements={"BitsStored": 12, "HighBit": 11, **window})
    assert read(tmp_path / "a", data, 48).shape == (1, 1, 48, 48)
    check_agreement(data, tmp_path / "a")


@pytest.mark.parametrize("shape", ["INVERSE", " INVERSE", ["INVERSE", "IDENTITY"], "OTHER"])
def test_a_shape_that_may_turn_gray_levels_over_is_refused(tmp_path: Path, shape: Any) -> None:
    data = encode_dicom(draw_chest(64), elements={"PresentationLUTShape": shape})
    with pytest.raises(RefusedError, match="presentation LUT shape"):
        read(tmp_path / "a", data, 48)


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


def test_elements_after_the_pixels_are_not_read(tmp_path: Path) -> None:
    sound = encode_dicom(draw_values(np.random.default_rng(1), (100, 100), "u2"))
    windowed = encode_dicom(np.zeros((100, 100), np.uint16), elements=WINDOW)
    window = windowed[windowed.index(b"\x28\0\x50\x10") : windowed.index(b"\xe0\x7f\x10\0")]
    expected = read(tmp_path / "a", sound, 64)
    np.testing.assert_array_equal(read(tmp_path / "a", sound + window, 64), expected)
    check_agreement(sound + window, tmp_path / "a")


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


@pytest.mark.parametrize("bits", [12, 16])
def test_a_sign_that_pneumo_corrects_is_refused(tmp_path: Path, bits: int) -> None:
    values = draw_values(np.random.default_rng(2), (100, 100), "u2") - np.uint16(400)  # wraps
    if bits == 12:  # in signed words of 16
        values = (values % 4096).astype(np.int16)
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
        ({"WindowCenter": 128, "WindowWidth": 4096}, "hides the picture"),
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
        ({"Rows": [100, 100]}, "not a DICOM file that can be read"),
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
