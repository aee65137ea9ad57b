"""Is this a frontal chest radiograph that a reader could read? Checked before a picture is used.

What is certain (nothing in the picture; a header that says another view or body part) refuses it;
what is doubtful is a warning, and the picture is used. docs/preparing.md has the codes, how often
real radiographs raise them, and how many broken ones do.
"""

import cv2
import numpy as np
import numpy.typing as npt

from pneumo.errors import DicomError
from pneumo.images.dicom import GrayImage
from pneumo.images.gray_levels import Gray
from pneumo.images.headers import Acquisition
from pneumo.images.letterbox import fit_shape

# Of view positions (PS3.3 C.8.1.1.1, C.8.11.5.1) and meanings of view codes (CID 4010).
_FRONTAL = frozenset(("AP", "PA", "ANTERO-POSTERIOR", "POSTERO-ANTERIOR", "FRONTAL"))
_NOT_FRONTAL = frozenset(
    (
        *("LL", "RL", "LATERAL", "LAT", "LEFT LATERAL", "RIGHT LATERAL", "LLO", "RLO", "LAO"),
        *("RAO", "LPO", "RPO", "OBLIQUE", "SWIMMERS", "XTABLE LATERAL", "TANGENTIAL"),
    )
)
# Of body parts examined (PS3.16 annex L).
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

_BLANK_LEVELS = 3  # 99.8 % of the pixels of a blank picture differ by at most this
_FEW_LEVELS = 32  # the same for the middle 98 % of an almost uniform one; real ones have over 90
_WHITE, _BLACK = 0.2, 0.6  # fractions of the pixels; real ones have 0.003 and 0.25 at most
_LONGEST_ASPECT = 1.6

# Gray levels of the left half of a frontal chest, drawn by hand: air beside the neck and the trunk
# is dark and so are the lungs; spine, heart and belly are bright.
_HALF_CHEST = (
    *((-6, -4, -2, 1), (-3, -2, -2, 1), (-1, 0, -2, 1), (-1, 0, -2, 2)),
    *((-1, 0, -2, 3), (-2, 1, 1, 4), (-2, 3, 4, 4), (-3, 3, 5, 5)),
)
_LIKE_A_CHEST = 0.25  # correlation with that drawing; real ones have 0.38 and above
_TURN_MARGIN = 0.15  # by how much a turned one must be more alike


def check_image(image: GrayImage) -> tuple[str, ...]:
    """What is doubtful about the picture, as codes. Raises DicomError for what is certain:
    not_frontal, not_chest, blank."""
    return (*check_header(image.acquisition), *check_pixels(image))


def check_header(acquisition: Acquisition) -> tuple[str, ...]:
    """What the header makes doubtful. Raises DicomError: not_frontal, not_chest."""
    if acquisition.view in _NOT_FRONTAL:
        raise DicomError("the header says that the view is not frontal", "not_frontal")
    is_chest = any(part in acquisition.body_part for part in _CHEST_WORDS)
    if acquisition.body_part in _NOT_CHEST:
        raise DicomError("the header says another body part than the chest", "not_chest")
    doubts = {
        "view": acquisition.view not in _FRONTAL and acquisition.view != "",
        "body_part": not is_chest and acquisition.body_part != "",
        "laterality": acquisition.laterality in ("L", "R"),
        "for_processing": acquisition.intent == "FOR PROCESSING",
        "modality": acquisition.modality not in _RADIOGRAPHY,
    }
    return tuple(f"doubtful:{code}" for code, is_raised in doubts.items() if is_raised)


def check_pixels(image: GrayImage) -> tuple[str, ...]:
    """What the picture makes doubtful. Raises DicomError(blank)."""
    left, top = image.offset
    height, width = fit_shape((image.rows, image.columns), len(image.pixels))
    shown = image.pixels[top : top + height, left : left + width]
    counts = cv2.calcHist([shown], [0], None, [256], [0, 256]).ravel() / shown.size
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
        **_compare_with_chest(shown),
    }
    return tuple(f"doubtful:{code}" for code, is_raised in doubts.items() if is_raised)


def _compare_with_chest(shown: Gray) -> dict[str, bool]:
    """Whether the picture is more like an inverted or a turned chest, or like none."""
    small = cv2.resize(shown, (8, 8), interpolation=cv2.INTER_AREA)
    alike = _TURNED_CHESTS @ _standardise(small.astype(np.float64)).ravel()
    upright, right, over, left = alike.tolist()
    turned = max(right, over, left)
    is_inverted = -upright > max(turned, _LIKE_A_CHEST)
    is_turned = turned > max(upright + _TURN_MARGIN, _LIKE_A_CHEST) and not is_inverted
    return {
        "inverted": is_inverted,
        "turned": is_turned,
        "unlike_chest": not (is_inverted or is_turned) and upright < _LIKE_A_CHEST,
    }


def _standardise(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean 0, and squares that sum to 1."""
    centred = levels - levels.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-9))


_DRAWN_CHEST = np.hstack([_HALF_CHEST, np.fliplr(_HALF_CHEST)]).astype(np.float64)
_TURNED_CHESTS = np.stack(
    [np.rot90(_standardise(_DRAWN_CHEST), turns).ravel() for turns in range(4)]
)
