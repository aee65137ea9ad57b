"""A rectangle around an opacity."""

from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle around an opacity, in pixels; (x, y) is its upper left corner."""

    x: float
    y: float
    width: float
    height: float
