"""Pictures of any shape become squares, by means over areas."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo.images.letterbox import letterbox
from tests.pneumo.images.pictures import Pixels

pytestmark = pytest.mark.processors

sides = st.integers(1, 300)


@given(sides, sides, st.sampled_from([32, 33, 64]))
def test_letterbox_keeps_the_aspect_and_pads_evenly(rows: int, columns: int, size: int) -> None:
    pixels, (left, top) = letterbox(np.full((rows, columns), 200, np.uint8), size)
    assert pixels.shape == (size, size)
    scale = size / max(rows, columns)
    filled = np.argwhere(pixels)
    height, width = filled.max(axis=0) - filled.min(axis=0) + 1
    assert abs(height - max(rows * scale, 1)) <= 0.5
    assert abs(width - max(columns * scale, 1)) <= 0.5
    assert tuple(filled.min(axis=0)) == (top, left)
    assert abs(size - height - 2 * top) <= 1
    assert abs(size - width - 2 * left) <= 1
    assert set(np.unique(pixels)) <= {0, 200}


@given(st.integers(2, 70), st.integers(1, 70), st.integers(1, 6), st.integers(0, 2**16))
def test_each_pixel_is_the_mean_over_its_area(
    period: int, outputs: int, times: int, seed: int
) -> None:
    side, size = period * times, min(outputs, period) * times
    image = np.random.default_rng(seed).integers(0, 256, (side, side)).astype(np.uint8)
    expected = area_means(area_means(image, size).T, size).T
    pixels, _ = letterbox(image, size)
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-3


def area_means(image: Pixels, size: int) -> npt.NDArray[np.float64]:
    """Means over `size` equal parts of each row, by differences of the running sum."""
    side = image.shape[1]
    edges = np.linspace(0, side, size + 1)
    sums = np.insert(np.cumsum(image, axis=1, dtype=np.float64), 0, 0.0, axis=1)
    at_edges = [np.interp(edges, np.arange(side + 1), row) for row in sums]
    return np.asarray(np.diff(at_edges, axis=1) * size / side)


def test_at_224_the_area_mean_is_opencvs() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1024, 1024)).astype(np.uint8)
    expected = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
    pixels, _ = letterbox(image, 224)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
