"""The four values of a DICOM header that are kept."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pydicom

from pneumo.images.elements import Repairs, read_numbers, read_optional

OLDEST_PLAUSIBLE_AGE = 120


@dataclass(frozen=True)
class Header:
    """What is kept of a header; None where absent or implausible."""

    age: int | None
    """Years, 0 to 120."""
    sex: str | None
    """'M' or 'F'."""
    view: str | None
    """'AP' or 'PA'."""
    spacing_mm: float | None
    """Distance of pixel centres in the original image, rows."""


NO_HEADER = Header(age=None, sex=None, view=None, spacing_mm=None)


@dataclass(frozen=True)
class Acquisition:
    """What a header says of how the picture was taken, in capitals; empty where it says nothing."""

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
"""The value of the element with this keyword; of a sequence, the meaning of its first code."""


def make_acquisition(get: Get) -> Acquisition:
    """What a header says of how the picture was taken."""

    def text(*keywords: str) -> str:
        value = next((found for keyword in keywords if (found := get(keyword))), "")
        return " ".join(str(value).upper().split())

    return Acquisition(
        view=text("ViewPosition", "ViewCodeSequence"),
        body_part=text("BodyPartExamined", "AnatomicRegionSequence"),
        laterality=text("Laterality", "ImageLaterality"),
        intent=text("PresentationIntentType"),
        modality=text("Modality"),
    )


def read_from(dataset: pydicom.Dataset, repairs: Repairs) -> Get:
    """Gives values of `dataset`; None where there is none, or none that makes sense."""

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


def read_header(dataset: pydicom.Dataset, repairs: Repairs) -> Header:
    """Age (0010,1010), sex (0010,0040), view (0018,5101) and pixel spacing (0028,0030)."""
    return make_header(
        age=str(read_optional(dataset, "PatientAge", repairs) or ""),
        sex=read_optional(dataset, "PatientSex", repairs),
        view=read_optional(dataset, "ViewPosition", repairs),
        spacing=read_numbers(dataset, "PixelSpacing", repairs)
        or read_numbers(dataset, "ImagerPixelSpacing", repairs),
    )


def make_header(
    *, age: str, sex: str | None, view: str | None, spacing: Sequence[float] = ()
) -> Header:
    """A header of these values as they stand in the file; what is implausible becomes None.

    `spacing` is that of the rows, in mm, and perhaps more numbers.
    """
    spacing_mm = spacing[0] if spacing else 0.0
    return Header(
        age=parse_age(age),
        sex=sex if sex in ("M", "F") else None,
        view=view if view in ("AP", "PA") else None,
        spacing_mm=spacing_mm if 0 < spacing_mm < 10 else None,
    )


def parse_age(text: str) -> int | None:
    """Years from an AS value (`062Y`, `008M`) or RSNA's bare integer (`62`); None if
    implausible."""
    match = re.fullmatch(r"\s*(\d{1,3})([DWMY]?)\s*", text)
    if match is None:
        return None
    years = int(int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1, "": 1}[match[2]])
    return years if years <= OLDEST_PLAUSIBLE_AGE else None
