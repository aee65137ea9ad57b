"""Charts of a store's data: findings, ages, gray levels, contact sheets."""

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pneumo.dataset.contact_sheets import ContactSheet
from pneumo.dataset.quality import AGE_BIN_YEARS, UNKNOWN, Quality
from pneumo.reporting.figures.style import (
    SPLIT_STYLES,
    STYLE,
    as_svg,
    draw_placeholder,
    encode_figure,
    encode_image,
)

CONTACT_PIXELS = 128
"""Height and width of a picture in a contact sheet, at most."""
_CONTACT_COLUMNS, _CONTACT_GAP = 3, 4


def draw_quality(quality: Quality) -> bytes:
    """`data_quality.png`: findings, views and sexes, ages and gray levels by split."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        plot_composition(left, quality)
        plot_ages(middle, quality)
        plot_intensity(right, quality)
        return encode_figure(figure, "png")


def draw_contact_sheet(sheet: ContactSheet) -> bytes:
    """The images as WebP, three in a row. The gaps are transparent, so that the sheet fits any
    background. Images are not enlarged."""
    side = min(CONTACT_PIXELS, max((len(pixels) for pixels in sheet.pictures), default=1))
    columns = min(_CONTACT_COLUMNS, max(len(sheet.pictures), 1))
    rows = max(1, math.ceil(len(sheet.pictures) / columns))
    step = side + _CONTACT_GAP
    size = (columns * step - _CONTACT_GAP, rows * step - _CONTACT_GAP)
    page = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, pixels in enumerate(sheet.pictures):
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
        row, column = divmod(i, columns)
        page.paste(picture.convert("RGBA"), (column * step, row * step))
    return encode_image(np.asarray(page))


def plot_composition(axes: Axes, quality: Quality) -> None:
    """Fraction of each split's studies with each finding, view and sex."""
    shown = [
        (what, value)
        for what in ("finding", "view", "sex")
        for value in _list_values(quality, what)
    ]
    height = 0.8 / len(quality.splits)
    for k, (name, split) in enumerate(quality.splits.items()):
        fractions = [
            100 * split.counts[what][value] / max(split.studies, 1) for what, value in shown
        ]
        axes.barh(
            [i + (k - 1) * height for i in range(len(shown))],
            fractions,
            height=0.9 * height,
            color=SPLIT_STYLES[name]["color"],
            label=f"{name}, n = {split.studies:,}",
        )
    labels = [f"{what} {value}" if value == UNKNOWN else value for what, value in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="% of the split's studies")
    axes.set_title("Finding, view and sex")
    axes.legend(loc="best")


def _list_values(quality: Quality, what: str) -> list[str]:
    """The values of a property; 'unknown' only where some studies have it."""
    counts = [split.counts[what] for split in quality.splits.values()]
    return [v for v in counts[0] if v != UNKNOWN or any(one[v] for one in counts)]


def plot_ages(axes: Axes, quality: Quality) -> None:
    """Fraction of each split's studies by age, of those whose age is known."""
    ages = {name: _join_oldest(split.ages) for name, split in quality.splits.items()}
    for name, bins in ages.items():
        known = sum(bins)
        if known:
            axes.stairs(
                [100 * n / known for n in bins],
                [AGE_BIN_YEARS * i for i in range(len(bins) + 1)],
                label=f"{name}, n = {known:,}",
                **SPLIT_STYLES[name],
            )
    axes.set_title(f"Age, by {AGE_BIN_YEARS} years")
    if not axes.patches:
        draw_placeholder(axes, "no age is known")
        return
    last = max(i for bins in ages.values() for i, n in enumerate(bins) if n)
    axes.set(xlabel="years; 90 and over together", ylabel="% of studies of known age")
    axes.set(xlim=(0, AGE_BIN_YEARS * (last + 1)), ylim=(0, 1.25 * axes.dataLim.ymax))
    axes.legend(loc="upper left")


def _join_oldest(bins: Sequence[int]) -> list[int]:
    """The bins with 90 years and over as the last (45 CFR 164.514(b)(2)(i)(C))."""
    last = 90 // AGE_BIN_YEARS
    return [*bins[:last], sum(bins[last:])]


def plot_intensity(axes: Axes, quality: Quality) -> None:
    """Fraction of each split's pixels by gray level, between pure black and pure white."""
    for name, split in quality.splits.items():
        histogram = np.array(split.intensity.histogram, dtype=np.float64)
        if histogram.sum():
            # Two levels per point, as JPEG leaves some levels empty.
            fraction = 100 * histogram[1:-1].reshape(-1, 2).mean(axis=1) / histogram.sum()
            axes.plot(np.arange(1.5, 255, 2), fraction, label=name, **SPLIT_STYLES[name])
    axes.set_title("Gray levels of the stored pictures")
    if not axes.lines:
        draw_placeholder(axes, "no pictures")
        return
    axes.set(xlabel="gray level (0 and 255 left out)", ylabel="% of pixels a level")
    axes.set(xlim=(0, 255), ylim=(0, None))
    axes.legend(loc="best")


draw_ages = as_svg("ages", plot_ages)
draw_intensity = as_svg("intensity", plot_intensity)
