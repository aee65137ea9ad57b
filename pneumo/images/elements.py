"""Optional elements of a header: an invalid one is ignored, and recorded.

A record is an action and an element, `left_out:WindowWidth`, and never contains a value.
"""

import itertools
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
    return list(itertools.takewhile(math.isfinite, read_each(dataset, keyword, repairs)))


def read_each(dataset: pydicom.Dataset, keyword: str, repairs: Repairs) -> list[float]:
    """The element's numbers, NaN for each invalid one."""
    value = read_optional(dataset, keyword, repairs)
    if value is None:
        return []
    values = list(value) if isinstance(value, (MultiValue, list)) else [value]
    found = [_read_number(one) for one in values]
    if not all(map(math.isfinite, found)):
        repairs.add(f"left_out:{keyword}")
    elif any(isinstance(one, (str, bytes)) and not _is_plain(one) for one in values):
        repairs.add(f"spelling:{keyword}")
    return found


def _is_plain(value: str | bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return isinstance(value, str)


def _read_number(value: Any) -> float:
    """A finite number, also from `2048,5`, `[2048]` or two bytes; else NaN."""
    if isinstance(value, bytes):  # a number with VR OW
        return float(int.from_bytes(value, "little")) if len(value) == 2 else math.nan
    if isinstance(value, str):
        value = value.strip(" \0[]()").replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def read_integer(dataset: pydicom.Dataset, keyword: str, absent: int, repairs: Repairs) -> int:
    """A required integer, the first of several. Raises DicomError, which names the element."""
    own = Repairs()
    numbers = read_numbers(dataset, keyword, own)
    if not numbers and not own:
        return absent
    if not numbers or not numbers[0].is_integer():
        tag = Tag(tag_for_keyword(keyword) or 0)
        raise DicomError(f"{keyword} {tag} is {_kind(dataset, tag)}, not a whole number")
    if len(numbers) > 1:
        own.add(f"left_out:{keyword}")
    repairs |= own
    return int(numbers[0])


def _kind(dataset: pydicom.Dataset, tag: Any) -> str:
    """The kind of an element's value, for messages."""
    try:
        value = dataset[tag].value
    except Exception:
        return "no value of its type"
    if isinstance(value, (MultiValue, list)):
        return f"{len(value)} values"
    return "text" if isinstance(value, str) else f"of type {type(value).__name__}"
