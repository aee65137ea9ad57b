"""Optional elements of a header: an invalid one is ignored, and recorded.

A record is an action and an element, `left_out:WindowWidth`, and never contains a value.
"""

import math
from typing import Any

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from pneumo.errors import DicomError

Repairs = set[str]
"""Repairs made to read a file: `left_out`, `codestream`, `pixels`, `rescaled`, `spelling` or
`parsed`, each with a keyword; docs/preparing.md lists them."""


def read_optional(dataset: pydicom.Dataset, keyword: str, repairs: Repairs) -> Any:
    """The element's value; None where it is absent, empty, or invalid, which is recorded."""
    try:
        value = dataset.get(keyword)
    except Exception:  # pydicom raises many kinds
        repairs.add(f"left_out:{keyword}")
        return None
    return None if value is None or value in ("", b"", []) else value


def first_text(value: Any) -> str:
    """The first text of an element's value, without spaces around it; '' for None."""
    one = value[0] if isinstance(value, MultiValue) else value
    if isinstance(one, bytes):
        one = one.decode("ascii", "replace")
    return str(one or "").strip()


def read_numbers(dataset: pydicom.Dataset, keyword: str, repairs: Repairs) -> list[float]:
    """The element's finite numbers, up to the first invalid one."""
    value = read_optional(dataset, keyword, repairs)
    if value is None:
        return []
    values = list(value) if isinstance(value, (MultiValue, list)) else [value]
    found = list[float]()
    for one in values:
        number = _read_number(one)
        if number is None:
            repairs.add(f"left_out:{keyword}")
            return found
        found.append(number)
    if any(isinstance(one, (str, bytes)) and not _is_plain(one) for one in values):
        repairs.add(f"spelling:{keyword}")
    return found


def _is_plain(value: str | bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return isinstance(value, str)


def _read_number(value: Any) -> float | None:
    """A finite number, also from `2048,5`, `[2048]` or two bytes; else None."""
    if isinstance(value, bytes):  # a number with VR OW
        return float(int.from_bytes(value, "little")) if len(value) == 2 else None
    if isinstance(value, str):
        value = value.strip(" \0[]()").replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_integer(dataset: pydicom.Dataset, keyword: str, absent: int) -> int:
    """A required integer. Raises DicomError, which names the element."""
    try:
        value = dataset.get(keyword)
        return absent if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        tag = Tag(tag_for_keyword(keyword) or 0)
        raise DicomError(f"{keyword} {tag} is {_kind(dataset, tag)}, not a whole number") from error


def _kind(dataset: pydicom.Dataset, tag: Any) -> str:
    """The kind of an element's value, for messages."""
    try:
        value = dataset[tag].value
    except Exception:
        return "no value of its type"
    if isinstance(value, (MultiValue, list)):
        return f"{len(value)} values"
    return "text" if isinstance(value, str) else f"of type {type(value).__name__}"
