"""One picture in two files is found by its hash, and two pictures are not taken for one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pneumo.dataset.near_duplicates import MAX_DIFFERENT_BITS, find_near_duplicates, hash_picture
from pneumo.dataset.phantoms.drawing import render_study
from pneumo.dataset.phantoms.population import draw_population
from pneumo.images.dicom_files import UnusableFile, decode_file
from pneumo.images.letterbox import letterbox

Gray = npt.NDArray[np.uint8]
SIZE = 224


@pytest.fixture(scope="module")
def phantoms() -> list[Gray]:
    return [letterbox(render_study(s)[0], SIZE)[0] for s in draw_population(24, 5)]


def through_jpeg(pixels: Gray) -> Gray:
    packed = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
    return np.asarray(cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE), np.uint8)


CHANGES: dict[str, Callable[[Gray], Gray]] = {
    "smaller": lambda pixels: letterbox(letterbox(pixels, 128)[0], SIZE)[0],
    "jpeg": through_jpeg,
    "brighter": lambda pixels: np.clip(pixels.astype(int) + 15, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_was_saved_otherwise_is_found(phantoms: list[Gray], change: str) -> None:
    known = tuple(hash_picture(pixels) for pixels in phantoms[::2])
    hashes = [hash_picture(CHANGES[change](pixels)) for pixels in phantoms]
    assert find_near_duplicates(hashes, known) == [True, False] * 12


def test_no_hash_is_like_no_hash() -> None:
    assert find_near_duplicates(["", "0" * 64], ("", "0" * 64)) == [False, True]
    assert find_near_duplicates(["0" * 64], ()) == [False]
    assert find_near_duplicates([], ("0" * 64,)) == []


def test_any_number_of_bits(phantoms: list[Gray]) -> None:
    base = int(hash_picture(phantoms[0]), 16)
    for bits in (0, 1, MAX_DIFFERENT_BITS, MAX_DIFFERENT_BITS + 1, 255):
        other = f"{base ^ ((1 << bits) - 1):064x}"
        assert find_near_duplicates([other], (f"{base:064x}",)) == [bits <= MAX_DIFFERENT_BITS]


def test_of_real_studies_pairs_are_found_and_others_left_alone(shared_data: Path) -> None:
    """Which pictures are one is told by RSNA's mapping to NIH's names."""
    pictures: dict[str, list[str]] = {}
    for name in ("rsna-mini", "rsna-1k", "nih-mini"):
        folder = shared_data / name
        names: dict[str, Any] = {}
        for mapping in folder.glob("*mappings*.json"):
            names |= {r["subset_img_id"]: r["img_id"] for r in json.loads(mapping.read_text())}
        for path in sorted((*folder.rglob("*.dcm"), *folder.rglob("*.png"))):
            image = decode_file(path.read_bytes(), SIZE)
            assert not isinstance(image, UnusableFile)
            original = names.get(path.stem, path.name)
            pictures.setdefault(original, []).append(hash_picture(image.pixels))
    twice = [hashes for hashes in pictures.values() if len(hashes) > 1]
    assert len(twice) > 50
    assert all(find_near_duplicates([first], (second,)) == [True] for first, second in twice)
    single = [hashes[0] for hashes in pictures.values()]
    alike = [find_near_duplicates(single, (h,)) for h in single]
    assert sum(map(sum, alike)) == len(single), "each is like itself alone"
