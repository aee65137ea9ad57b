"""Stored values become the gray levels that the standard says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from pneumo.images.dicom import decode_gray, read_study_image
from pneumo.images.gray_levels import apply_window
from tests.pneumo.images.pictures import RAMP, DicomMaker, Pixels, parse, phantom

pytestmark = pytest.mark.processors


def test_eight_bits_without_any_table_stay_as_they_are(make_dicom: DicomMaker) -> None:
    np.testing.assert_array_equal(decode_gray(parse(make_dicom(RAMP))), RAMP)


@pytest.mark.parametrize("quality", [None, 95])
@pytest.mark.parametrize("size", [40, 256])
def test_monochrome1_is_the_inverse(make_dicom: DicomMaker, quality: int | None, size: int) -> None:
    pixels = phantom(size)
    plain = read_study_image(make_dicom(pixels, jpeg_quality=quality), 40).pixels
    inverse = {"PhotometricInterpretation": "MONOCHROME1"}
    inverted = make_dicom(pixels, jpeg_quality=quality, elements=inverse)
    difference = read_study_image(inverted, 40).pixels.astype(int) - (255 - plain.astype(int))
    assert np.abs(difference).max() <= 1


windows = st.tuples(st.floats(-100, 4200), st.floats(1.5, 5000))


@given(windows, st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]), st.integers(0, 2**16))
def test_windows_follow_the_formulas_of_the_standard(
    window: tuple[float, float], function: str, seed: int
) -> None:
    center, width = window
    x = np.random.default_rng(seed).uniform(-200, 4300, 50)
    expected = []
    for value in x:  # PS3.3 C.11.2.1.2.1, C.11.2.1.3.1, C.11.2.1.3.2 with ymin 0 and ymax 1
        if function == "SIGMOID":
            # 1 / (1 + exp(-4 (x - c) / w)), written so that nothing overflows
            expected.append(0.5 + 0.5 * np.tanh(2 * (value - center) / width))
        elif function == "LINEAR_EXACT":
            if value <= center - width / 2:
                expected.append(0.0)
            elif value > center + width / 2:
                expected.append(1.0)
            else:
                expected.append((value - center) / width + 0.5)
        elif value <= center - 0.5 - (width - 1) / 2:
            expected.append(0.0)
        elif value > center - 0.5 + (width - 1) / 2:
            expected.append(1.0)
        else:
            expected.append((value - (center - 0.5)) / (width - 1) + 0.5)
    np.testing.assert_allclose(apply_window(x, center, width, function), expected, atol=1e-12)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_windowed_sixteen_bits_equal_pydicoms_own_windowing(
    make_dicom: DicomMaker, function: str | None, photometric: str, signed: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 40))
    stored = (pixels - 2048).astype(np.int16) if signed else pixels.astype(np.uint16)
    elements = {
        "BitsStored": 12,
        "HighBit": 11,
        "RescaleSlope": 2.0,
        "RescaleIntercept": 1000.0 if signed else -3000.0,
        "WindowCenter": [900.0, 5.0],
        "WindowWidth": [3000.0, 7.0],
        "PhotometricInterpretation": photometric,
    } | ({"VOILUTFunction": function} if function else {})
    dataset = parse(make_dicom(stored, elements=elements))
    reference = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    # pydicom's output range is that of the rescaled values.
    low, high = (np.array([-2048, 2047]) if signed else np.array([0, 4095])) * 2.0 + (
        1000.0 if signed else -3000.0
    )
    expected = np.rint(255 * (reference - low) / (high - low))
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(decode_gray(dataset).astype(int) - expected).max() <= 1


def test_sixteen_bits_without_a_window_span_all_gray_levels(make_dicom: DicomMaker) -> None:
    stored = np.linspace(300, 3100, 400).astype(np.uint16).reshape(20, 20)
    gray = decode_gray(parse(make_dicom(stored)))
    expected = np.rint(255 * (stored - 300.0) / 2800)
    np.testing.assert_array_equal(gray, expected)


def test_a_constant_sixteen_bit_image_is_black(make_dicom: DicomMaker) -> None:
    assert not decode_gray(parse(make_dicom(np.full((20, 20), 700, np.uint16)))).any()


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (2.0, 0.0), (0.01, 5.0)])
def test_rescaled_eight_bits_keep_their_contrast(
    make_dicom: DicomMaker, slope: float, intercept: float
) -> None:
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    np.testing.assert_array_equal(decode_gray(parse(make_dicom(RAMP, elements=elements))), RAMP)


def test_an_identity_rescale_changes_nothing(make_dicom: DicomMaker) -> None:
    elements = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}
    dark = RAMP // 4
    np.testing.assert_array_equal(decode_gray(parse(make_dicom(dark, elements=elements))), dark)


def test_a_voi_table_is_followed(make_dicom: DicomMaker) -> None:
    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    values = np.random.default_rng(0).integers(0, 2**16, 256).astype(np.uint16)
    table.LUTData = values.tobytes()
    table["LUTData"].VR = "OW"
    data = make_dicom(RAMP, elements={"VOILUTSequence": Sequence([table])})
    expected = np.rint(values[RAMP] / 65535 * 255)
    np.testing.assert_array_equal(decode_gray(parse(data)), expected)


@pytest.mark.parametrize("padding", [0, 65535, None])
def test_a_table_is_as_long_as_its_entries_without_padding(
    make_dicom: DicomMaker, padding: int | None
) -> None:
    values = np.arange(256, dtype=np.uint16) * np.uint16(257)
    if padding is not None:
        values[100:] = padding
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [100, 0, 16], values.tobytes()
    table["LUTData"].VR = "OW"
    image = read_study_image(make_dicom(RAMP, elements={"VOILUTSequence": Sequence([table])}), 16)
    expected = RAMP if padding is None else np.minimum(RAMP, 99)
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.warnings == (("left_out:LUTDescriptor",) if padding is None else ())


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1000, "WindowWidth": 2000}], ids=str)
@pytest.mark.parametrize("limit", [None, 65535])
def test_padding_is_black_and_does_not_count(
    make_dicom: DicomMaker, photometric: str, window: dict[str, Any], limit: int | None
) -> None:
    stored = np.linspace(300, 1700, 400).astype(np.uint16).reshape(20, 20)
    elements: dict[str, Any] = {"PhotometricInterpretation": photometric} | window
    expected = decode_gray(parse(make_dicom(stored, elements=elements)))
    padded = np.vstack([stored, np.full((2, 20), 60_000, np.uint16)])
    if limit is not None:
        padded[-1] = 65_000
        elements["PixelPaddingRangeLimit"] = limit
    elements["PixelPaddingValue"] = 60_000
    gray = decode_gray(parse(make_dicom(padded, elements=elements)))
    np.testing.assert_array_equal(gray[:-2], expected)
    assert not gray[-2:].any()


def padded_with(data: bytes, padding: int) -> Pixels:
    """The gray levels of `data` with this padding value, signed or not."""
    dataset, kind = parse(data), "SS" if padding < 0 else "US"
    dataset[0x00280120] = DataElement(0x00280120, kind, padding)
    return decode_gray(dataset)


@pytest.mark.parametrize("padding", [-2000, -129, 256, 1000, 65_000])
def test_padding_that_no_stored_value_can_be_is_none(make_dicom: DicomMaker, padding: int) -> None:
    np.testing.assert_array_equal(padded_with(make_dicom(RAMP), padding), RAMP)


@pytest.mark.parametrize(("padding", "black"), [(-1, 255), (255, 255), (-128, 128)])
def test_padding_of_the_other_sign_is_the_same_bits(
    make_dicom: DicomMaker, padding: int, black: int
) -> None:
    gray = padded_with(make_dicom(RAMP), padding)
    np.testing.assert_array_equal(gray, np.where(black == RAMP, 0, RAMP))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("width", [0, -4000])
@pytest.mark.parametrize("jpeg_quality", [None, 90])
def test_a_window_too_narrow_to_be_one_is_none(
    make_dicom: DicomMaker, width: int, function: str | None, jpeg_quality: int | None
) -> None:
    window: dict[str, int | str] = {"WindowCenter": 100, "WindowWidth": width}
    if function:
        window["VOILUTFunction"] = function
    pixels = phantom(64)
    expected = read_study_image(make_dicom(pixels, jpeg_quality=jpeg_quality), 32)
    found = read_study_image(make_dicom(pixels, jpeg_quality=jpeg_quality, elements=window), 32)
    # Of a JPEG, the expected one was decoded at half scale.
    assert np.abs(found.pixels.astype(int) - expected.pixels).max() <= (3 if jpeg_quality else 0)
    if jpeg_quality is None:
        deep = (pixels.astype(np.uint16) * 9) + 7
        spanned = decode_gray(parse(make_dicom(deep)))
        shown = decode_gray(parse(make_dicom(deep, elements=window)))
        np.testing.assert_array_equal(shown, spanned)


def test_eight_bits_with_padding_are_black_there(make_dicom: DicomMaker) -> None:
    elements = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 0}
    gray = decode_gray(parse(make_dicom(RAMP, elements=elements)))
    np.testing.assert_array_equal(gray, np.where(RAMP == 0, 0, 255 - RAMP))
    jpeg = make_dicom(np.zeros((128, 128), np.uint8), jpeg_quality=95, elements=elements)
    assert not read_study_image(jpeg, 64).pixels.any()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "high_bit"), [(12, 11), (12, 15), (12, 13), (16, 15), (9, 8)])
def test_unused_bits_are_dropped_and_signs_extended(
    make_dicom: DicomMaker, signed: bool, bits: int, high_bit: int
) -> None:
    rng = np.random.default_rng(bits)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (30, 30)) + (
        0 if signed else 2 ** (bits - 1)
    )
    shift = high_bit + 1 - bits
    mask = ((1 << bits) - 1) << shift
    noise = rng.integers(0, 2**16, values.shape) & ~mask
    stored = (((values << shift) & mask) | noise).astype(np.uint16)
    elements = {"BitsStored": bits, "HighBit": high_bit, "PixelRepresentation": int(signed)}
    low, high = values.min(), values.max()
    expected = np.rint(255 * (values - low) / (high - low))
    np.testing.assert_array_equal(
        decode_gray(parse(make_dicom(stored, elements=elements))), expected
    )


@pytest.mark.parametrize("entry_bits", [8, 10, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_modality_table_is_followed(
    make_dicom: DicomMaker, entry_bits: int, packed: bool
) -> None:
    values = np.random.default_rng(0).integers(0, 2**entry_bits, 200)
    table = Dataset()
    table.LUTDescriptor = [200, 20, entry_bits]
    in_bytes = packed and entry_bits == 8
    table.LUTData = values.astype(np.uint8 if in_bytes else np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    data = make_dicom(RAMP, elements={"ModalityLUTSequence": Sequence([table])})
    mapped = values[np.clip(RAMP.astype(int) - 20, 0, 199)]
    low, high = mapped.min(), mapped.max()
    expected = np.rint(255 * (mapped - low) / (high - low))
    np.testing.assert_array_equal(decode_gray(parse(data)), expected)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE"])
def test_the_presentation_shape_wins_over_the_photometric_interpretation(
    make_dicom: DicomMaker, shape: str, photometric: str
) -> None:
    elements = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    plain = read_study_image(make_dicom(phantom(64), jpeg_quality=90), 64).pixels
    image = read_study_image(make_dicom(phantom(64), jpeg_quality=90, elements=elements), 64)
    np.testing.assert_array_equal(image.pixels, 255 - plain if shape == "INVERSE" else plain)
    is_contradiction = (photometric == "MONOCHROME1") == (shape == "IDENTITY")
    assert image.warnings == ("left_out:PhotometricInterpretation",) * is_contradiction
    twice = elements | {"PresentationLUTShape": [shape, shape]}
    again = read_study_image(make_dicom(phantom(64), jpeg_quality=90, elements=twice), 64)
    np.testing.assert_array_equal(again.pixels, image.pixels)
