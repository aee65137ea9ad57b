"""Checks that an image is a frontal chest radiograph of usable quality.

Certain faults (a blank image; another view or body part in the header) raise an error; doubts are
warnings, and the image is used. docs/preparing.md lists the codes, with their rates among real and
among broken radiographs.
"""

import re

import cv2
import numpy as np
import numpy.typing as npt

from pneumo.errors import DicomError
from pneumo.images.dicom import GrayImage
from pneumo.images.gray_levels import Gray
from pneumo.images.headers import Acquisition
from pneumo.images.letterbox import fit_shape

# View positions (PS3.3 C.8.1.1.1, C.8.11.5.1) and meanings of view codes (CID 4010).
_FRONTAL = frozenset(("AP", "PA", "ANTERO-POSTERIOR", "POSTERO-ANTERIOR", "FRONTAL"))
_NOT_FRONTAL = frozenset(
    (
        *("L", "R", "LL", "RL", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO"),
        *("SWIMMERS", "TANGENTIAL"),
    )
)
_LATERAL = re.compile("(?<!BI)LAT|OBL")
"""In `LAT L`, `LLAT`, `XTABLE LATERAL`. A lateral decubitus is frontal, of somebody lying down."""
# Body parts examined (PS3.16 annex L).
_CHEST_WORDS = ("CHEST", "THORAX", "LUNG", "RIB", "HEART", "STERNUM")
_NOT_CHEST = frozenset(
    (
        *("SKULL", "HEAD", "JAW", "MAXILLA", "MANDIBLE", "TEETH", "NECK", "SPINE", "CSPINE"),
        *("TSPINE", "LSPINE", "SSPINE", "CERVICAL SPINE", "LUMBAR SPINE", "COCCYX", "SACRUM"),
        *("ABDOMEN", "PELVIS", "KIDNEY", "BLADDER", "BREAST", "HIP", "SHOULDER", "CLAVICLE"),
        *("SCAPULA", "ARM", "HUMERUS", "ELBOW", "FOREARM", "WRIST", "HAND", "FINGER", "LEG"),
        *("THIGH", "FEMUR", "KNEE", "PATELLA", "TIBIA", "TIBIA AND FIBULA", "ANKLE", "FOOT"),
        *("CALCANEUS", "TOE", "EXTREMITY"),
    )
)
_RADIOGRAPHY = frozenset(("CR", "DX", "RG", "OT", "XR", ""))

_BLANK_LEVELS = 3  # range of 99.8 % of the pixels of a blank image, at most
_FEW_LEVELS = 32  # range of the middle 98 % of an almost uniform one; in real ones over 90
_WHITE, _BLACK = 0.2, 0.6  # fractions of the pixels; in real images at most 0.003 and 0.25
_LONGEST_ASPECT = 1.6

# Relative gray levels of the left half of a frontal chest: air beside neck and trunk is dark, and
# so are the lungs; spine, heart and abdomen are bright.
_HALF_CHEST = (
    *((-6, -4, -2, 1), (-3, -2, -2, 1), (-1, 0, -2, 1), (-1, 0, -2, 2)),
    *((-1, 0, -2, 3), (-2, 1, 1, 4), (-2, 3, 4, 4), (-3, 3, 5, 5)),
)
_MIN_CORRELATION = 0.25  # with that template; real images have 0.38 and above
_TURN_MARGIN = 0.15  # how much higher the correlation of a rotated template must be


def check_image(image: GrayImage) -> tuple[str, ...]:
    """Codes of the doubts about an image. Raises DicomError for certain faults: not_frontal,
    not_chest, blank."""
    return (*check_header(image.acquisition), *check_pixels(image))


def check_header(acquisition: Acquisition) -> tuple[str, ...]:
    """Codes of doubts from the header. Raises DicomError: not_frontal, not_chest."""
    view = acquisition.view
    if view in _NOT_FRONTAL or (_LATERAL.search(view) and "DECUB" not in view):
        raise DicomError("the header says that the view is not frontal", "not_frontal")
    is_chest = any(part in acquisition.body_part for part in _CHEST_WORDS)
    if acquisition.body_part in _NOT_CHEST:
        raise DicomError("the header says another body part than the chest", "not_chest")
    doubts = {
        "view": view not in _FRONTAL and view != "",
        "body_part": not is_chest and acquisition.body_part != "",
        "laterality": acquisition.laterality in ("L", "R"),
        "for_processing": acquisition.intent == "FOR PROCESSING",
        "modality": acquisition.modality not in _RADIOGRAPHY,
    }
    return tuple(f"doubtful:{code}" for code, is_raised in doubts.items() if is_raised)


def check_pixels(image: GrayImage) -> tuple[str, ...]:
    """Codes of doubts from the pixels. Raises DicomError(blank)."""
    left, top = image.offset
    height, width = fit_shape((image.rows, image.columns), len(image.pixels))
    inner = image.pixels[top : top + height, left : left + width]
    counts = cv2.calcHist([inner], [0], None, [256], [0, 256]).ravel() / inner.size
    below = np.cumsum(counts)
    low, dark, bright, high = np.searchsorted(below, (0.001, 0.01, 0.99, 0.999)).tolist()
    if high - low <= _BLANK_LEVELS:
        raise DicomError("the picture is blank: all pixels are alike", "blank")
    longer, shorter = max(image.rows, image.columns), min(image.rows, image.columns)
    doubts = {
        "uniform": bright - dark < _FEW_LEVELS,
        "white": counts[254:].sum() > _WHITE,
        "black": counts[:2].sum() > _BLACK,
        "aspect": longer > _LONGEST_ASPECT * shorter,
        **_compare_with_chest(inner),
    }
    return tuple(f"doubtful:{code}" for code, is_raised in doubts.items() if is_raised)


def _compare_with_chest(image: Gray) -> dict[str, bool]:
    """Whether the image correlates best with an inverted or rotated chest, or with none."""
    small = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA)
    correlations = _TURNED_CHESTS @ _standardise(small.astype(np.float64)).ravel()
    upright, *turned = correlations.tolist()
    best_turned = max(turned)
    is_inverted = -upright > max(best_turned, _MIN_CORRELATION)
    is_turned = best_turned > max(upright + _TURN_MARGIN, _MIN_CORRELATION) and not is_inverted
    return {
        "inverted": is_inverted,
        "turned": is_turned,
        "unlike_chest": not (is_inverted or is_turned) and upright < _MIN_CORRELATION,
    }


def _standardise(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean 0 and norm 1."""
    centred = levels - levels.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-9))


_CHEST = np.hstack([_HALF_CHEST, np.fliplr(_HALF_CHEST)]).astype(np.float64)
_TURNED_CHESTS = np.stack([np.rot90(_standardise(_CHEST), turns).ravel() for turns in range(4)])
