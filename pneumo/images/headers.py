"""A DICOM header's values: four that are kept, and how the image was taken, which is checked."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pydicom

from pneumo.images.elements import Repairs, read_optional

OLDEST_PLAUSIBLE_AGE = 120


@dataclass(frozen=True)
class Header:
    """The values of a header that are kept; None where absent or implausible."""

    age: int | None
    """Years, 0 to 120."""
    sex: str | None
    """'M' or 'F'."""
    view: str | None
    """'AP' or 'PA'."""
    spacing_mm: float | None
    """Distance between the rows of the original image."""


NO_HEADER = Header(age=None, sex=None, view=None, spacing_mm=None)


@dataclass(frozen=True)
class Acquisition:
    """How the image was taken, in capital letters; '' where the header does not say."""

    view: str
    """View position (0018,5101), else the meaning of the view code (0054,0220)."""
    body_part: str
    """(0018,0015), else the meaning of the anatomic region (0008,2218)."""
    laterality: str
    """(0020,0060) or (0020,0062)."""
    intent: str
    """Presentation intent type (0008,0068)."""
    modality: str


NO_ACQUISITION = Acquisition("", "", "", "", "")


Get = Callable[[str], Any]
"""Returns the value of an element by keyword; for a sequence, the meaning of its first code."""


def make_acquisition(get: Get) -> Acquisition:
    """The acquisition of a header whose values `get` returns."""

    def text(*keywords: str) -> str:
        value = next((found for keyword in keywords if (found := get(keyword))), "")
        return _normalise(value)

    return Acquisition(
        view=text("ViewPosition", "ViewCodeSequence"),
        body_part=text("BodyPartExamined", "AnatomicRegionSequence"),
        laterality=text("Laterality", "ImageLaterality"),
        intent=text("PresentationIntentType"),
        modality=text("Modality"),
    )


def read_from(dataset: pydicom.Dataset, repairs: Repairs) -> Get:
    """A function that returns values of `dataset`; None where they are missing or invalid."""

    def get(keyword: str) -> Any:
        value = read_optional(dataset, keyword, repairs)
        if not value or not keyword.endswith("Sequence"):
            return value
        try:
            return value[0].get("CodeMeaning")
        except (AttributeError, IndexError, TypeError, ValueError):
            repairs.add(f"left_out:{keyword}")
            return None

    return get


def read_header(get: Get, spacing: Sequence[float]) -> Header:
    """Age (0010,1010), sex (0010,0040) and view (0018,5101); see `make_header`."""
    age, sex, view = (get(name) for name in ("PatientAge", "PatientSex", "ViewPosition"))
    return make_header(age=str(age or ""), sex=sex, view=view, spacing=spacing)


def make_header(
    *, age: str, sex: str | None, view: str | None, spacing: Sequence[float] = ()
) -> Header:
    """The header of these raw values; implausible ones become None, `Female` and `pa` are read.

    `spacing` starts with the distance between rows, in mm; further numbers are ignored.
    """
    spacing_mm = spacing[0] if spacing else 0.0
    return Header(
        age=parse_age(age),
        sex={"M": "M", "MALE": "M", "F": "F", "FEMALE": "F"}.get(_normalise(sex)),
        view=view if (view := _normalise(view)) in ("AP", "PA") else None,
        spacing_mm=spacing_mm if 0 < spacing_mm < 10 else None,
    )


def _normalise(value: object) -> str:
    """In capital letters, with single spaces."""
    return " ".join(str(value or "").upper().split())


def parse_age(text: str) -> int | None:
    """Years from an AS value (`062Y`, `008M`), RSNA's integer (`62`) or a table's `62.5` or `62y`;
    None if implausible."""
    match = re.fullmatch(r"\s*(\d{1,3})(?:\.\d+)?([DWMY]?)\s*", text.upper())
    if match is None:
        return None
    years = int(int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1, "": 1}[match[2]])
    return years if years <= OLDEST_PLAUSIBLE_AGE else None
