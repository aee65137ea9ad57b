"""PNG, JPEG and TIFF bytes -> an 8-bit gray image, 0 = black, as `dicom` for DICOM.

Colour is converted to luminance (ITU-R BT.601). Values of 8 bits are unchanged; those of 16 bits,
which have no window, are scaled from the image's minimum (black) to its maximum (white). Palettes
are applied, an opaque alpha channel is dropped, an EXIF or TIFF orientation is applied.
"""

import io
import warnings
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pneumo.errors import DicomError
from pneumo.images.dicom import GrayImage, make_image
from pneumo.images.frame_format import MAX_PIXELS
from pneumo.images.gray_levels import Gray

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_ORIENTATION, _PHOTOMETRIC, _MIN_IS_WHITE = 274, 262, 0
_BITS, _PLANAR, _SEPARATE = 258, 284, 2
_PNG_BIT_DEPTH = 24  # position in the file


def is_picture(data: bytes) -> bool:
    """Whether `data` starts with the signature of PNG, JPEG or TIFF, and is no DICOM file, whose
    first 128 bytes may be anything."""
    return data.startswith(_SIGNATURES) and data[128:132] != b"DICM"


def read_picture(data: bytes, image_size: int) -> GrayImage:
    """The image in `data` (PNG, JPEG or TIFF) at `image_size`, letterboxed, without any header.

    Raises DicomError with a reason code: multi_frame, too_large, photometric, undecodable.
    """
    gray = decode_picture(data)
    return make_image(gray, image_size, shape=(gray.shape[0], gray.shape[1]))


def decode_picture(data: bytes) -> Gray:
    """The image at full resolution, (H, W) uint8. Raises as `read_picture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; the size is checked below
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
                return _decode(data, image)
    except DicomError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise DicomError(f"the picture does not decode: {type(error).__name__}") from error


def _decode(data: bytes, image: Image.Image) -> Gray:
    if image.width * image.height > MAX_PIXELS:
        raise DicomError(f"claims {image.width} x {image.height} pixels", "too_large")
    if image.mode == "CMYK":
        raise DicomError("CMYK colours", "photometric")
    if image.format in ("JPEG", "MPO"):  # MPO: a camera's JPEG, with a preview after it
        return _turn(simplejpeg.decode_jpeg(data, "GRAY")[..., 0], image)
    if getattr(image, "n_frames", 1) > 1:
        raise DicomError(f"{getattr(image, 'n_frames', 1)} pages or frames", "multi_frame")
    if isinstance(image, TiffImageFile):
        _check_tiff(image)
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise DicomError("the picture does not decode")
    if stored.dtype not in (np.uint8, np.uint16):
        raise DicomError(f"values of type {stored.dtype}, not of 8 or 16 bits", "photometric")
    if stored.ndim == 2 and "transparency" in image.info:
        # OpenCV ignores the transparent value of a gray PNG; for colour it makes an alpha channel.
        # Pillow scales it to 8 bits only where the file has one bit.
        white, bits = np.iinfo(stored.dtype).max, data[_PNG_BIT_DEPTH]
        factor = 1 if bits == 1 else white // (2**bits - 1)
        if (stored == image.info["transparency"] * factor).any():
            raise DicomError("a picture with transparent parts", "photometric")
    levels = _to_luminance(stored)
    if levels.dtype == np.uint8:
        gray: Gray = np.asarray(levels, np.uint8)
    else:
        gray = _stretch(levels)
        # OpenCV applies it to 8 bits alone.
        if image.format == "TIFF" and image.getexif().get(_PHOTOMETRIC) == _MIN_IS_WHITE:
            gray = np.asarray(cv2.bitwise_not(gray))
    return gray if image.format == "TIFF" else _turn(gray, image)


def _check_tiff(image: TiffImageFile) -> None:
    """Raises an error for a TIFF that OpenCV would decode wrongly: a damaged one, of which it shows
    a part, one with a plane of 16 bits for each colour, or a gray one with transparent parts."""
    if image.tag_v2.get(_PLANAR) == _SEPARATE and max(image.tag_v2.get(_BITS, (1,))) > 8:
        raise DicomError("colours of 16 bits in separate planes", "photometric")
    image.load()
    if image.mode == "LA" and image.getchannel("A").getextrema()[0] != 255:  # OpenCV drops it
        raise DicomError("a picture with transparent parts", "photometric")


def _to_luminance(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W) or BGR(A) (H, W, C) -> luminance (H, W)."""
    if stored.ndim == 2:
        return stored
    if stored.shape[2] == 4:
        if (stored[..., 3] != np.iinfo(stored.dtype).max).any():
            raise DicomError("a picture with transparent parts", "photometric")
        stored = stored[..., :3]
    if stored.shape[2] != 3:
        raise DicomError(f"{stored.shape[2]} channels", "photometric")
    return np.asarray(cv2.cvtColor(stored, cv2.COLOR_BGR2GRAY))


def _stretch(levels: npt.NDArray[Any]) -> Gray:
    """Scaled so that the minimum is 0 and the maximum 255; 0 where they are equal."""
    low, high = int(levels.min()), int(levels.max())
    scaled = (levels.astype(np.float32) - low) * (255 / max(high - low, 1))
    return np.asarray(np.rint(scaled), np.uint8)


def _turn(gray: Gray, image: Image.Image) -> Gray:
    """Apply the EXIF orientation: mirrored, then rotated by quarter turns."""
    # Else Pillow would decode a whole PNG to look for EXIF at its end.
    if "exif" not in image.info:
        return gray
    mirrored, quarters = {
        2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3),
        8: (False, 1),
    }.get(image.getexif().get(_ORIENTATION, 1), (False, 0))  # fmt: skip
    if mirrored:
        gray = gray[:, ::-1]
    return np.ascontiguousarray(np.rot90(gray, quarters))
