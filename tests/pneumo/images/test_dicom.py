"""DICOM bytes become the picture that the standard says, or an error with a reason code."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pydicom
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pneumo.errors import DicomError, DicomReason
from pneumo.images.boxes import Box
from pneumo.images.dicom import decode_gray, read_study_image
from pneumo.images.frame_format import MAX_PIXELS, FrameFormat
from pneumo.images.headers import parse_age
from pneumo.images.letterbox import letterbox
from pneumo.images.pixel_decoders import check_runs, choose_plugin
from tests.examples import examples
from tests.pneumo.images.pictures import RAMP, DicomMaker, Pixels, outcome, parse, phantom
from tests.waiting import count_calls

pytestmark = pytest.mark.processors

REASONS = set(get_args(DicomReason))
IDENTIFIER = "5e1f5e1f-0000-4000-8000-000000000000"


def refused(data: bytes, image_size: int = 32) -> DicomError:
    with pytest.raises(DicomError) as caught:
        read_study_image(data, image_size)
    return caught.value


def check_outcome(data: bytes) -> None:
    """Reading `data` gives a picture, or an error with a reason code and no identifier."""
    refusal = image = None
    try:
        image = read_study_image(data, 32)
    except DicomError as error:
        refusal = error
    if image is None:
        assert refusal is not None
        assert refusal.reason in REASONS
        assert IDENTIFIER not in str(refusal)
    else:
        assert image.pixels.shape == (32, 32)
        assert image.pixels.dtype == np.uint8


# --- header ---------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.sampled_from(["", "Y"]), st.booleans())
def test_ages_in_years_up_to_120(years: int, unit: str, padded: bool) -> None:
    text = f"{years:03d}{unit}" if padded else f"{years}{unit}"
    assert parse_age(text) == parse_age(f" {text} ") == (years if years <= 120 else None)


@given(st.integers(0, 999), st.sampled_from([("D", 365.25), ("W", 52.18), ("M", 12)]))
def test_ages_in_other_units_are_whole_years(number: int, unit: tuple[str, float]) -> None:
    assert parse_age(f"{number:03d}{unit[0]}") == int(number / unit[1])


@given(st.text(st.sampled_from("0123456789YMWDy. -+x"), max_size=6))
def test_any_text_is_an_age_between_0_and_120_or_none(text: str) -> None:
    age = parse_age(text)
    assert age is None or 0 <= age <= 120


@pytest.mark.parametrize("text", ["62.0", "62.5", "62.99", "62y", "062y"])
def test_the_age_of_a_table(text: str) -> None:
    assert parse_age(text) == 62


@pytest.mark.parametrize("text", ["", "Y", "-5", "6.", "1000", "62 years", "121", "155"])
def test_what_is_no_plausible_age_is_none(text: str) -> None:
    assert parse_age(text) is None


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, (62, "F", "PA", 0.143)),
        ({"PatientAge": "062Y", "ViewPosition": "AP"}, (62, "F", "AP", 0.143)),
        ({"PatientSex": "Male", "ViewPosition": "ap "}, (62, "M", "AP", 0.143)),
        ({"PatientAge": "155", "PatientSex": "O", "ViewPosition": "LL"}, (None, None, None, 0.143)),
        ({"PatientAge": "", "PatientSex": "", "ViewPosition": ""}, (None, None, None, 0.143)),
        ({"PatientAge": None, "PatientSex": None, "PixelSpacing": None}, (None, None, "PA", None)),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.2]}, (62, "F", "PA", 0.2)),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.2]}, (62, "F", "PA", 0.2)),
        ({"PixelSpacing": [0.0, 0.0]}, (62, "F", "PA", None)),
        ({"PixelSpacing": ""}, (62, "F", "PA", None)),
    ],
)
def test_headers_with_quirks(
    make_dicom: DicomMaker, elements: dict[str, Any], expected: tuple[object, ...]
) -> None:
    header = read_study_image(make_dicom(RAMP, elements=elements), 32).header
    assert (header.age, header.sex, header.view, header.spacing_mm) == expected


# --- geometry -------------------------------------------------------------------------------------


def test_letters_that_are_burnt_in_stay_within_the_contract(make_dicom: DicomMaker) -> None:
    pixels = phantom(1024)
    cv2.putText(pixels, "L PORTABLE", (37, 91), cv2.FONT_HERSHEY_SIMPLEX, 2.3, 255, 5)
    data = make_dicom(pixels, jpeg_quality=95)
    full = decode_gray(parse(data))
    for size in (32, 64, 96, 128, 224, 256, 384, 512):
        expected = cv2.resize(full, (size, size), interpolation=cv2.INTER_AREA)
        difference = np.abs(read_study_image(data, size).pixels.astype(int) - expected)
        assert difference.mean() <= 0.4
        assert difference.max() <= 3


def test_an_exif_orientation_is_no_dicom(make_dicom: DicomMaker) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    frame = io.BytesIO()
    Image.fromarray(phantom(128)).save(frame, "JPEG", quality=95, exif=exif)
    elements = {"PixelData": encapsulate([frame.getvalue()])}
    turned = make_dicom(phantom(128), jpeg_quality=95, elements=elements)
    expected = read_study_image(make_dicom(phantom(128), jpeg_quality=95), 64).pixels
    np.testing.assert_array_equal(read_study_image(turned, 64).pixels, expected)


@examples(60)
@given(st.data(), st.integers(64, 400), st.integers(64, 400), st.booleans())
def test_a_painted_rectangle_lands_where_its_box_is_placed(
    make_dicom: DicomMaker, data: st.DataObject, rows: int, columns: int, jpeg: bool
) -> None:
    size = 64
    width = data.draw(st.integers(columns // 4, columns // 2), "width")
    height = data.draw(st.integers(rows // 4, rows // 2), "height")
    x = data.draw(st.integers(0, columns - width), "x")
    y = data.draw(st.integers(0, rows - height), "y")
    pixels = np.zeros((rows, columns), np.uint8)
    pixels[y : y + height, x : x + width] = 255
    file = make_dicom(pixels, jpeg_quality=100 if jpeg else None)
    image = read_study_image(file, size)
    box = image.to_stored(Box(x, y, width, height))
    seen = np.argwhere(image.pixels >= 128)
    low, high = seen.min(axis=0), seen.max(axis=0) + 1
    # An edge within a pixel belongs to the pixel that it covers at least half.
    assert np.abs(low - (box.y, box.x)).max() <= 1.01
    assert np.abs(high - (box.y + box.height, box.x + box.width)).max() <= 1.01


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "image_size"), [(1024, 224), (1024, 96), (512, 224)])
def test_the_fast_way_equals_the_reference(
    make_dicom: DicomMaker, seed: int, size: int, image_size: int
) -> None:
    data = make_dicom(phantom(size, seed), jpeg_quality=90)
    fast = read_study_image(data, image_size).pixels.astype(int)
    reference, _ = letterbox(decode_gray(parse(data)), image_size)
    assert np.abs(fast - reference).mean() <= 0.4
    assert np.abs(fast - reference).max() <= 3


def test_the_fast_way_is_left_when_the_header_asks_for_more(make_dicom: DicomMaker) -> None:
    pixels = phantom(256)
    elements = {"WindowCenter": 128.0, "WindowWidth": 64.0}
    data = make_dicom(pixels, jpeg_quality=95, elements=elements)
    reference, _ = letterbox(decode_gray(parse(data)), 64)
    np.testing.assert_array_equal(read_study_image(data, 64).pixels, reference)
    assert read_study_image(make_dicom(pixels, jpeg_quality=95), 64).pixels.std() < reference.std()


def test_colour_becomes_luminance(make_dicom: DicomMaker) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    elements = {
        "Rows": 40,
        "Columns": 50,
        "NumberOfFrames": None,
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": "RGB",
    }
    gray = decode_gray(parse(make_dicom(rgb, elements=elements)))
    assert np.abs(gray - rgb @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_colour_of_8_or_16_bits_by_pixel_or_by_plane(
    make_dicom: DicomMaker, planar: int, kind: type
) -> None:
    white = np.iinfo(kind).max
    rgb: Pixels = np.random.default_rng(0).integers(0, white + 1, (40, 50, 3)).astype(kind)
    stored = np.moveaxis(rgb, -1, 0) if planar else rgb
    elements = colour_elements("RGB") | {"PlanarConfiguration": planar}
    gray = decode_gray(parse(make_dicom(np.ascontiguousarray(stored), elements=elements)))
    assert np.abs(gray - rgb @ [0.299, 0.587, 0.114] * (255 / white)).max() <= 1


def test_of_ybr_the_first_channel_is_gray(make_dicom: DicomMaker) -> None:
    ybr = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    gray = decode_gray(parse(make_dicom(ybr, elements=colour_elements("YBR_FULL"))))
    np.testing.assert_array_equal(gray, ybr[..., 0])


def test_ybr_of_whole_colours_under_the_header_of_half_of_them(make_dicom: DicomMaker) -> None:
    gray = phantom(64)
    ybr = np.stack([gray, np.full_like(gray, 90), np.full_like(gray, 140)], axis=-1)
    elements = colour_elements("YBR_FULL_422") | {"Rows": 64, "Columns": 64}
    image = read_study_image(make_dicom(ybr, elements=elements), 64)
    np.testing.assert_array_equal(image.pixels, gray)
    assert image.warnings == ("codestream:PhotometricInterpretation",)


def test_ybr_of_half_of_the_colours_has_no_planes(make_dicom: DicomMaker) -> None:
    gray = phantom(64)
    half = np.full((64, 32), 90, np.uint8)
    stored = np.stack([gray[:, ::2], gray[:, 1::2], half, half], axis=-1)
    elements = colour_elements("YBR_FULL_422") | {"Rows": 64, "Columns": 64}
    elements["PlanarConfiguration"] = 1
    image = read_study_image(make_dicom(stored, elements=elements), 64)
    np.testing.assert_array_equal(image.pixels, gray)
    assert image.warnings == ("left_out:PlanarConfiguration",)


@pytest.mark.parametrize("photometric", ["YBR_ICT", "YBR_RCT"])
def test_colours_of_jpeg_2000_that_were_decompressed_are_rgb(
    make_dicom: DicomMaker, photometric: str
) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    image = read_study_image(make_dicom(rgb, elements=colour_elements(photometric)), 50)
    expected = read_study_image(make_dicom(rgb, elements=colour_elements("RGB")), 50)
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert image.warnings == ("codestream:PhotometricInterpretation",)


def colour_elements(photometric: str) -> dict[str, Any]:
    return {
        "Rows": 40,
        "Columns": 50,
        "NumberOfFrames": None,
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": photometric,
    }


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_followed(make_dicom: DicomMaker, bits: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 2**bits, (3, 256))
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, channel in zip(("Red", "Green", "Blue"), rgb, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        entries = channel.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
        elements[f"{name}PaletteColorLookupTableData"] = entries
    gray = decode_gray(parse(make_dicom(RAMP, elements=elements)))
    expected = ([0.299, 0.587, 0.114] @ rgb * (255 / (2**bits - 1)))[RAMP]
    assert np.abs(gray - expected).max() <= 1
    elements["SegmentedRedPaletteColorLookupTableData"] = bytes(4)
    assert refused(make_dicom(RAMP, elements=elements)).reason == "photometric"


# --- what cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n" * 100, "not a DICOM file"),
        (b"<html>404</html>", "not a DICOM file"),
    ],
)
def test_what_is_no_dicom_file(data: bytes, message: str) -> None:
    error = refused(data)
    assert (error.reason, str(error)) == ("not_dicom", message)


def test_a_file_without_pixels(make_dicom: DicomMaker) -> None:
    assert refused(make_dicom(RAMP, elements={"PixelData": None})).reason == "no_pixels"
    assert refused(make_dicom(RAMP, elements={"Rows": None})).reason == "no_pixels"


@pytest.mark.parametrize("jpeg_quality", [None, 90])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_truncated_file(make_dicom: DicomMaker, jpeg_quality: int | None, share: float) -> None:
    data = make_dicom(phantom(256), jpeg_quality=jpeg_quality)
    assert refused(data[: int(len(data) * share)]).reason in {
        "not_dicom",
        "no_pixels",
        "undecodable",
    }


def damage_scan(data: bytes, share: float, damage: bytes) -> bytes:
    """`data`, one JPEG frame, overwritten at a share of its entropy-coded data."""
    changed = bytearray(data)
    start, end = changed.find(b"\xff\xda") + 20, changed.rfind(b"\xff\xd9") - len(damage)
    place = start + int(share * (end - start))
    changed[place : place + len(damage)] = damage
    return bytes(changed)


def colour_jpeg() -> dict[str, Any]:
    """The elements of a picture of 256 x 256 pixels in colour, JPEG baseline."""
    frame = io.BytesIO()
    Image.fromarray(np.stack([phantom(256, seed) for seed in range(3)], -1)).save(frame, "JPEG")
    return {
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": "YBR_FULL",
        "PixelData": encapsulate([frame.getvalue()]),
    }


@pytest.mark.parametrize(
    "elements",
    [{}, {"WindowCenter": 128.0, "WindowWidth": 64.0}, colour_jpeg()],
    ids=["usual", "windowed", "colour"],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_damaged_scan_is_no_picture(
    make_dicom: DicomMaker, elements: dict[str, Any], share: float
) -> None:
    data = make_dicom(phantom(256), jpeg_quality=90, elements=elements)
    assert read_study_image(data, 64).pixels.std() > 10
    error = refused(damage_scan(data, share, bytes(40)))
    assert error.reason == "undecodable"
    assert str(error).startswith("the JPEG frame is damaged: Corrupt JPEG data: ")


def test_what_libjpeg_finds_corrupt_in_real_files_is_no_picture(shared_data: Path) -> None:
    """16 bytes change anywhere in the scan. What decodes without a complaint after that, no decoder
    can find."""
    files = sorted((shared_data / "rsna-mini" / "stage_2_train_images").glob("*.dcm"))[:96]
    accepted = 0
    for i, path in enumerate(files):
        damage = np.random.default_rng(i).bytes(16)
        damaged = damage_scan(path.read_bytes(), i / len(files), damage)
        found = outcome(damaged)
        if found == ("undecodable",):
            continue
        assert len(found) > 1
        accepted += 1
        frame = get_frame(parse(damaged).PixelData, 0, number_of_frames=1)
        simplejpeg.decode_jpeg(frame, "GRAY", strict=True)
    print(f"{accepted} of {len(files)} damaged scans decode without a complaint of libjpeg's")
    assert accepted < len(files) // 2


def test_sound_files_of_other_encoders_are_not_taken_for_damaged() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    sound = []
    for path in sorted(folder.rglob("*.dcm")):
        data = path.read_bytes()
        if pydicom.uid.JPEGBaseline8Bit.encode() in data:
            dataset = parse(data)
            if "PixelData" in dataset and dataset.get("NumberOfFrames", 1) == 1:
                sound.append(dataset)
    assert len(sound) == 13
    for dataset in sound:
        assert decode_gray(dataset).std() > 0


def test_several_frames(make_dicom: DicomMaker) -> None:
    error = refused(make_dicom(np.stack([RAMP] * 3)))
    assert (error.reason, str(error)) == ("multi_frame", "3 frames, expected one")


def test_a_frame_that_claims_too_much_is_refused_before_it_is_decoded(
    make_dicom: DicomMaker,
) -> None:
    error = refused(make_dicom(RAMP, elements={"Rows": 60_000, "Columns": 60_000}))
    assert (error.reason, str(error)) == ("too_large", "claims 60000 x 60000 pixels")
    assert MAX_PIXELS < 60_000**2
    assert refused(make_dicom(RAMP, elements={"Rows": 0})).reason == "no_pixels"


def test_less_data_than_claimed(make_dicom: DicomMaker) -> None:
    assert refused(make_dicom(RAMP, elements={"Rows": 20})).reason == "undecodable"
    small = make_dicom(phantom(128), jpeg_quality=90, elements={"Rows": 256, "Columns": 256})
    assert refused(small).reason == "undecodable"


def test_a_palette_picture_needs_its_palette(make_dicom: DicomMaker) -> None:
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    assert refused(make_dicom(RAMP, elements=elements)).reason == "photometric"


@pytest.mark.parametrize(
    "elements",
    [
        {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0},
        {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        {"BitsStored": 0},
        {"PhotometricInterpretation": "HSV"},
        {"SamplesPerPixel": 4, "PhotometricInterpretation": "CMYK"},
        {"PixelData": None, "FloatPixelData": bytes(1024)},
    ],
    ids=str,
)
def test_pixels_that_are_no_1_to_16_bits_of_gray_or_colour(
    make_dicom: DicomMaker, elements: dict[str, Any]
) -> None:
    assert refused(make_dicom(RAMP, elements=elements)).reason == "photometric"


def test_a_picture_that_is_no_radiograph(make_dicom: DicomMaker) -> None:
    data = make_dicom(RAMP, elements={"SOPClassUID": pydicom.uid.CTImageStorage})
    error = refused(data)
    assert error.reason == "wrong_class"
    assert str(error) == "the SOP class (CT Image Storage) is no radiograph"
    assert decode_gray(parse(data)).shape == RAMP.shape
    unknown = refused(make_dicom(RAMP, elements={"SOPClassUID": "1.2.826.0.1.19.62"}))
    assert str(unknown) == "the SOP class is no radiograph"


@pytest.mark.parametrize(
    "uid",
    [
        None,
        pydicom.uid.ComputedRadiographyImageStorage,
        pydicom.uid.DigitalXRayImageStorageForPresentation,
        pydicom.uid.DigitalXRayImageStorageForProcessing,
        pydicom.uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        pydicom.uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    ],
)
def test_radiographs_and_secondary_captures(make_dicom: DicomMaker, uid: str | None) -> None:
    assert read_study_image(make_dicom(RAMP, elements={"SOPClassUID": uid}), 32).rows == 16


def test_a_transfer_syntax_that_nothing_reads(make_dicom: DicomMaker) -> None:
    data = make_dicom(phantom(64), jpeg_quality=90).replace(b"\xff\xd8\xff", b"\0\0\0")
    error = refused(data.replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.\x31\x30"))
    assert error.reason == "no_decoder"
    uid = b"1.2.840.10008.1.2.4.92"
    error = refused(data.replace(b"1.2.840.10008.1.2.4.50", uid))
    assert error.reason == "no_decoder"
    assert "JPEG 2000 Part 2" in str(error)
    assert uid.decode() in str(error)
    assert str(error).endswith("this transfer syntax is not supported")
    error = refused(data.replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.11361.19530417"))
    assert (error.reason, "19530417" in str(error)) == ("no_decoder", False)


@pytest.mark.parametrize(
    ("syntax", "name"), [("4.110", "JPEG XL Lossless"), ("8.1", "Deflated Image Frame Compression")]
)
def test_a_syntax_that_is_too_new_for_pydicom_has_its_name(syntax: str, name: str) -> None:
    uid = f"1.2.840.10008.1.2.{syntax}"
    with pytest.raises(DicomError, match=re.escape(f"no decoder for {name} ({uid})")):
        choose_plugin(uid, ())


@pytest.mark.parametrize("syntax", ["70", "80", "201"])
def test_without_the_extra_the_message_says_what_to_install(syntax: str) -> None:
    with pytest.raises(DicomError) as caught:
        choose_plugin(f"1.2.840.10008.1.2.4.{syntax}", ())
    assert caught.value.reason == "no_decoder"
    assert str(caught.value).endswith(f"4.{syntax}): pip install 'pneumo[codecs]'")


def test_gdcm_is_never_taken() -> None:
    for syntax in pydicom.uid.AllTransferSyntaxes:
        if syntax.is_encapsulated:
            with pytest.raises(DicomError):
                choose_plugin(syntax, ("gdcm",))


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    make_dicom: DicomMaker,
) -> None:
    data = make_dicom(phantom(64), jpeg_quality=90, elements={"Rows": 7000, "Columns": 7000})
    error = refused(data)
    assert error.reason == "undecodable"
    assert "holds 64 x 64 x 1 samples, the header says 7000 x 7000 x 1" in str(error)


def deflated(header: bytes, *contents: bytes) -> bytes:
    """A file whose data set is `contents`, deflated, of which a few thousand bytes are left."""
    uid = DeflatedExplicitVRLittleEndian.encode()
    meta = b"\x02\x00\x10\x00UI" + len(uid).to_bytes(2, "little") + uid
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = b"".join(map(packer.compress, contents)) + packer.flush()
    return header[:132] + meta + packed


def test_a_deflated_bomb_is_not_inflated(make_dicom: DicomMaker) -> None:
    data = deflated(make_dicom(RAMP), *[bytes(2**20)] * 300)
    assert len(data) < 2**19
    assert refused(data).reason == "too_large"


EMPTY_ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"


@pytest.mark.parametrize(
    "element",
    [
        b"",
        b"\x08\0\x05\0CS\0\0",
        b"\x28\0\x10\x30SQ\0\0\xff\xff\xff\xff" + EMPTY_ITEM,  # of any length, parsed at once
    ],
    ids=["zeros", "elements", "items"],
)
def test_a_small_file_of_very_many_elements_is_given_up(
    make_dicom: DicomMaker, element: bytes
) -> None:
    filling = EMPTY_ITEM if b"SQ" in element else element or bytes(8)
    data = deflated(make_dicom(RAMP), element, *[filling * 2**17] * 128)
    assert len(data) < 2**21
    error = refused(data)
    assert error.reason == "too_large"
    assert str(error) == "the header takes more than 500000 reads"


FEW_CALLS = 20_000
"""Reading the ramp takes some 3000; parsing millions of elements would take millions."""


@pytest.mark.parametrize(
    ("tag", "reason"),
    [(b"\x28\0\x10\x30", "too_large"), (b"\x10\0\x10\x10", "no_pixels")],
    ids=["a look-up table", "an age"],
)
def test_very_many_items_that_are_parsed_when_they_are_asked_for_never_are(
    make_dicom: DicomMaker, tag: bytes, reason: str
) -> None:
    element = tag + b"SQ\0\0" + (2**27).to_bytes(4, "little")
    data = deflated(make_dicom(RAMP), element, *[EMPTY_ITEM * 2**17] * 128)
    assert len(data) < 2**21
    reasons = []
    assert count_calls(lambda: reasons.append(refused(data).reason)) < FEW_CALLS
    assert reasons == [reason]


def test_what_fills_up_a_file_after_its_pixels_is_not_read(make_dicom: DicomMaker) -> None:
    data = make_dicom(RAMP) + bytes(2**25)
    images = []
    assert count_calls(lambda: images.append(read_study_image(data, 16))) < FEW_CALLS
    np.testing.assert_array_equal(images[0].pixels, RAMP)


def test_a_large_element_that_nobody_asks_for_does_no_harm(make_dicom: DicomMaker) -> None:
    data = make_dicom(RAMP, elements={"EncapsulatedDocument": bytes(3 * 2**20)})
    np.testing.assert_array_equal(read_study_image(data, 16).pixels, RAMP)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_runs_that_expand_beyond_the_picture(share: float) -> None:
    form = FrameFormat(8, 8, 1, "MONOCHROME2", 8, 8, 7, False, 0)
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    check_runs(header + b"\xc1\x05", form)  # 64 pixels
    with pytest.raises(DicomError, match="beyond the picture"):
        check_runs(header + b"\x81\x00" * int(1000 * share), form)


@pytest.mark.parametrize(
    "head", [b"", b"\x08\x00", b"\x08\x00\x05\x00CS\x04\x00abcd", b"\x02\x00\0\0"]
)
def test_garbage_without_a_preamble(head: bytes) -> None:
    assert refused(head + np.random.default_rng(0).bytes(4000)).reason == "not_dicom"


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian],
    ids=lambda syntax: syntax.keyword,
)
@pytest.mark.parametrize("meta", [True, False])
def test_neither_preamble_nor_meta_information_is_needed(
    make_dicom: DicomMaker, syntax: pydicom.uid.UID, meta: bool
) -> None:
    pixels = (phantom(64).astype(np.uint16) * 16).astype(np.uint16)
    dataset = parse(make_dicom(pixels))
    expected = decode_gray(dataset)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer,
        dataset,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
    )
    data = buffer.getvalue()
    if not meta:
        first = b"\x08\x00\x16\x00" if syntax.is_little_endian else b"\x00\x08\x00\x16"
        data = data[data.index(first) :]
    np.testing.assert_array_equal(read_study_image(data, 64).pixels, expected)


@pytest.mark.parametrize(
    "elements",
    [
        {"Rows": ""},
        {"BitsStored": ""},
        {"WindowCenter": "", "WindowWidth": ""},
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"VOILUTSequence": Sequence([])},
        {"PhotometricInterpretation": ""},
        {"NumberOfFrames": ""},
        {"WindowCenter": "", "WindowWidth": "1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("jpeg_quality", [None, 90])
def test_an_empty_element_gives_a_picture_or_a_reason(
    make_dicom: DicomMaker, elements: dict[str, Any], jpeg_quality: int | None
) -> None:
    check_outcome(make_dicom(phantom(128), jpeg_quality=jpeg_quality, elements=elements))


@pytest.mark.parametrize("frames", [[b"\0\0"], [b"\xff\xd8\xff\xd9"], [b"no JPEG at all"]])
def test_a_frame_that_is_no_jpeg(make_dicom: DicomMaker, frames: list[bytes]) -> None:
    elements = {"PixelData": encapsulate(frames)}
    error = refused(make_dicom(phantom(128), jpeg_quality=90, elements=elements))
    assert error.reason == "undecodable"


@examples(150)
@given(st.booleans(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of values that are none
def test_changed_bytes_give_a_picture_or_a_reason_and_nothing_else(
    make_dicom: DicomMaker, jpeg: bool, changes: list[tuple[float, int]]
) -> None:
    quality = 90 if jpeg else None
    data = bytearray(make_dicom(phantom(64), jpeg_quality=quality, identifier=IDENTIFIER))
    header_end = len(data) - (0 if jpeg else 64 * 64)
    for place, value in changes:
        data[132 + int(place * (header_end - 133))] = value
    check_outcome(bytes(data))


def test_real_files(shared_data: Path) -> None:
    files = sorted((shared_data / "rsna-mini" / "stage_2_train_images").glob("*.dcm"))
    assert files
    for path in files[:20]:
        data = path.read_bytes()
        image = read_study_image(data, 224)
        reference, _ = letterbox(decode_gray(parse(data)), 224)
        difference = np.abs(image.pixels.astype(int) - reference)
        assert difference.mean() <= 0.4
        assert difference.max() <= 3
        assert image.header.view in ("AP", "PA")
        assert image.header.sex in ("M", "F")
        assert image.header.spacing_mm is not None
