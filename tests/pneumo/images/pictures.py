"""What the tests of pictures draw and read."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom

from pneumo.errors import DicomError
from pneumo.images.dicom import read_study_image

DicomMaker = Callable[..., bytes]
Pixels = npt.NDArray[Any]

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def parse(data: bytes) -> pydicom.FileDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(io.BytesIO(data))


def phantom(size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A smooth picture that uses most gray levels."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (6, 6)).astype(np.float32)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(smooth, 0, 255), np.uint8)


def outcome(data: bytes) -> tuple[Any, ...]:
    """All that reading a file gives, or the reason why it is refused."""
    try:
        image = read_study_image(data, 28)
    except DicomError as error:
        return (error.reason,)
    size = (image.rows, image.columns)
    return image.pixels.tobytes(), image.header, image.identifier, size, image.warnings
