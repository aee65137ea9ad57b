"""The four values of a DICOM header that are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pydicom

from pneumo.images.gray_levels import read_number

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


def read_header(dataset: pydicom.Dataset) -> Header:
    """Age (0010,1010), sex (0010,0040), view (0018,5101) and pixel spacing (0028,0030)."""
    return make_header(
        age=str(dataset.get("PatientAge") or ""),
        sex=dataset.get("PatientSex"),
        view=dataset.get("ViewPosition"),
        spacing=dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing"),
    )


def make_header(*, age: str, sex: Any, view: Any, spacing: Any) -> Header:
    """A header of these values as they stand in the file; what is implausible becomes None."""
    try:
        spacing_mm = read_number(spacing) or 0.0
    except (TypeError, ValueError):
        spacing_mm = 0.0
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
