"""The tests: each folder mirrors a room of the product."""

from pathlib import Path
from typing import TypeVar

CHECKOUT = Path(__file__).resolve().parents[1]
"""The root of the repository."""

T = TypeVar("T")


def present(value: T | None) -> T:
    """`value`, which must not be None."""
    assert value is not None
    return value
