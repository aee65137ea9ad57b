"""What can be logged to a W&B run: pictures, charts, tables, a page, files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Scalar = float | int | str | bool | None
MAX_IMAGES = 108
"""W&B shows at most this many pictures under one key."""
MAX_ROWS = 10_000
"""W&B draws at most this many rows."""


MAP_LEVELS: Mapping[int, str] = {0: "none", 1: "map ≥ 25 %", 2: "map ≥ 50 %", 3: "map ≥ 75 %"}
"""Levels of a Grad-CAM map, by fractions of its own maximum."""


@dataclass(frozen=True)
class Picture:
    """An encoded image (PNG, WebP), its caption, and what W&B shows over it or hides."""

    data: bytes
    caption: str
    boxes: Sequence[tuple[float, float, float, float]] = ()
    """The readers': (x, y, width, height) in pixels of the picture."""
    map_levels: bytes | None = None
    """Of the network's map at each pixel, see MAP_LEVELS: a gray PNG of the picture's size."""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side; the first MAX_IMAGES are shown."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class LineChart:
    """An interactive chart."""

    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """(x, y) of equal length by the line's name, at most MAX_ROWS points in all."""
    title: str
    x_label: str
    y_label: str

    def rows(self) -> list[tuple[str, float, float]]:
        """(line, x, y) of every point."""
        return [
            (name, float(x), float(y))
            for name, (xs, ys) in self.series.items()
            for x, y in zip(xs, ys, strict=True)
        ]


@dataclass(frozen=True)
class ConfusionChart:
    """A confusion matrix from the counts tp, fp, fn, tn."""

    counts: Mapping[str, int]
    title: str

    def rows(self) -> list[tuple[str, str, int]]:
        """(actual, predicted, count) of each cell."""
        cells = ((0, 0, "tn"), (0, 1, "fp"), (1, 0, "fn"), (1, 1, "tp"))
        words = ("no pneumonia", "pneumonia")
        return [
            (words[actual], words[predicted], self.counts[name])
            for actual, predicted, name in cells
        ]


@dataclass(frozen=True)
class Table:
    """Rows of scalars and pictures; W&B shows MAX_ROWS."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Picture | Scalar]]


@dataclass(frozen=True)
class Page:
    """A self-contained HTML page."""

    html: str


Media = Gallery | LineChart | ConfusionChart | Table | Page


@dataclass(frozen=True)
class Artifact:
    """Files under a versioned name; equal content is one version."""

    name: str
    type: str
    """'dataset', 'model', 'evaluation' or 'search'."""
    files: Mapping[str, bytes]
    """Content by name inside the artifact."""
    references: Mapping[str, str] = field(default_factory=dict)
    """URLs of files that stay in an object store, by name inside the artifact."""
    aliases: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
