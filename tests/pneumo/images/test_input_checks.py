"""Pictures that no reader could read are found, and real radiographs are left in peace."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pneumo.errors import DicomError
from pneumo.images.dicom import GrayImage, read_study_image
from pneumo.images.dicom_files import UnusableFile, decode_file
from pneumo.images.headers import NO_ACQUISITION
from pneumo.images.input_checks import check_header, check_image, check_pixels
from tests.conftest import draw_chest

DicomMaker = Callable[..., bytes]
Gray = npt.NDArray[np.uint8]
RAMP = np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def whiten(pixels: Gray) -> Gray:
    """By a window whose upper end is the 40 % darkest pixels'."""
    white = max(float(np.quantile(pixels, 0.4)), 1.0)
    return np.minimum(pixels.astype(float) / white * 255, 255).astype(np.uint8)


BROKEN: dict[str, Callable[[Gray], Gray]] = {
    "inverted": lambda pixels: 255 - pixels,
    "turned by 90°": lambda pixels: np.ascontiguousarray(np.rot90(pixels)),
    "turned by 180°": lambda pixels: np.ascontiguousarray(np.rot90(pixels, 2)),
    "turned by 270°": lambda pixels: np.ascontiguousarray(np.rot90(pixels, 3)),
    "blank": lambda pixels: np.full_like(pixels, int(pixels.mean())),
    "white": whiten,
}
CODES = {
    "inverted": "doubtful:inverted",
    "blank": "blank",
    "white": "doubtful:white",
} | {f"turned by {angle}°": "doubtful:turned" for angle in (90, 180, 270)}


def checked(image: GrayImage) -> tuple[str, ...]:
    try:
        return check_pixels(image)
    except DicomError as error:
        return (error.reason,)


@cache
def real_images(folder: Path, size: int) -> tuple[GrayImage, ...]:
    files = sorted((folder / "rsna-mini" / "stage_2_train_images").glob("*.dcm"))
    return tuple(read_study_image(path.read_bytes(), size) for path in files)


@pytest.mark.parametrize("size", [64, 224])
def test_real_radiographs_raise_at_most_one_false_alarm_in_a_hundred(
    shared_data: Path, size: int
) -> None:
    images = real_images(shared_data, size)
    alarms = [check_image(image) for image in images]
    assert len(images) > 200
    assert sum(map(bool, alarms)) <= 0.01 * len(images)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("size", [64, 224])
def test_95_of_100_broken_ones_are_found(shared_data: Path, kind: str, size: int) -> None:
    images = real_images(shared_data, size)
    found = [CODES[kind] in checked(replace(i, pixels=BROKEN[kind](i.pixels))) for i in images]
    print(f"{kind} at {size}: {np.mean(found):.1%} found")
    assert np.mean(found) >= 0.95


def make_image(make_dicom: DicomMaker, pixels: Gray, **elements: Any) -> GrayImage:
    return read_study_image(make_dicom(pixels, elements=elements), 128)


@pytest.mark.parametrize(
    "view",
    ["LL", "RL", "lateral ", "LAT", "RAO", "LLO", "L", "LLAT", "L LAT", "Lateral left", "PA/LAT"],
)
def test_a_view_that_is_not_frontal_is_refused(make_dicom: DicomMaker, view: str) -> None:
    unusable = decode_file(make_dicom(RAMP, elements={"ViewPosition": view}), 64)
    assert isinstance(unusable, UnusableFile)
    assert unusable.reason == "not_frontal"


@pytest.mark.parametrize("quality", [None, 90])
@pytest.mark.parametrize("part", ["HAND", "Knee", "ABDOMEN", "BREAST"])
def test_another_body_part_is_refused(
    make_dicom: DicomMaker, part: str, quality: int | None
) -> None:
    data = make_dicom(RAMP, jpeg_quality=quality, elements={"BodyPartExamined": part})
    unusable = decode_file(data, 64)
    assert isinstance(unusable, UnusableFile)
    assert unusable.reason == "not_chest"


def test_the_codes_of_a_header_say_it_too(make_dicom: DicomMaker) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "399067008", "SCT", "lateral"
    elements = {"ViewPosition": None, "ViewCodeSequence": Sequence([code])}
    for quality in (None, 90):
        unusable = decode_file(make_dicom(RAMP, jpeg_quality=quality, elements=elements), 64)
        assert isinstance(unusable, UnusableFile)
        assert unusable.reason == "not_frontal"


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"view": "LLD"}, "view"),
        ({"view": "LATERAL DECUBITUS"}, "view"),
        ({"view": "BILATERAL"}, "view"),
        ({"body_part": "UNKNOWN 3"}, "body_part"),
        ({"laterality": "L"}, "laterality"),
        ({"intent": "FOR PROCESSING"}, "for_processing"),
        ({"modality": "MG"}, "modality"),
    ],
)
def test_what_a_header_makes_doubtful(elements: dict[str, str], code: str) -> None:
    assert check_header(replace(NO_ACQUISITION, **elements)) == (f"doubtful:{code}",)
    assert check_header(NO_ACQUISITION) == ()
    usual = {"view": "PA", "body_part": "PORT CHEST", "intent": "FOR PRESENTATION"}
    assert check_header(replace(NO_ACQUISITION, **usual, modality="DX", laterality="U")) == ()


@pytest.mark.parametrize(
    ("elements", "is_square"),
    [
        ({}, True),
        ({"PixelAspectRatio": [3, 3]}, True),
        ({"PixelAspectRatio": [1000, 1001]}, True),
        ({"PixelAspectRatio": [100, 98]}, False),
        ({"PixelSpacing": [0.2, 0.1]}, False),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.1]}, False),
        ({"PixelSpacing": [0.2], "ImagerPixelSpacing": [0.2, 0.1]}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("quality", [None, 90])
@pytest.mark.parametrize("height", [128, 300])
def test_pixels_that_are_not_square_make_the_aspect_doubtful(
    make_dicom: DicomMaker,
    height: int,
    quality: int | None,
    elements: dict[str, Any],
    is_square: bool,
) -> None:
    pixels = cv2.resize(draw_chest(128), (128, height))
    image = decode_file(make_dicom(pixels, jpeg_quality=quality, elements=elements), 64)
    assert isinstance(image, GrayImage)
    assert image.warnings.count("doubtful:aspect") == (height == 300 or not is_square)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("shape", [(64, 64), (300, 200)])
def test_a_blank_picture_is_refused(
    make_dicom: DicomMaker, level: int, shape: tuple[int, int]
) -> None:
    unusable = decode_file(make_dicom(np.full(shape, level, np.uint8)), 64)
    assert isinstance(unusable, UnusableFile)
    assert unusable.reason == "blank"


def test_what_a_picture_makes_doubtful(make_dicom: DicomMaker) -> None:
    chest = draw_chest(128)
    assert checked(make_image(make_dicom, chest)) == ()
    collimated = np.zeros((256, 256), np.uint8)
    collimated[80:180, 80:180] = cv2.resize(chest, (100, 100))
    faint = (chest // 16 + 100).astype(np.uint8)
    long = cv2.resize(chest, (60, 128))
    rng = np.random.default_rng(0)
    assert "doubtful:black" in checked(make_image(make_dicom, collimated))
    assert "doubtful:uniform" in checked(make_image(make_dicom, faint))
    assert "doubtful:aspect" in checked(make_image(make_dicom, long))
    checks = np.kron(rng.integers(0, 2, (32, 32)), np.full((8, 8), 255)).astype(np.uint8)
    assert "doubtful:unlike_chest" in checked(make_image(make_dicom, checks))
