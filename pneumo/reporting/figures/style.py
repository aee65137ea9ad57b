"""The style of all figures, numbers as text, and figures as bytes.

Equal input gives equal bytes with one version of Matplotlib: no date, no random ids, Matplotlib's
own font.
"""

import io
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pneumo.evaluation.estimates import Estimate

P = ParamSpec("P")

_DPI = 130

INK = "#1d2733"
"""Text and axes; the report replaces it by its own color."""
RULE = "#d5dbe2"
"""Grid lines; replaced as INK is."""
BLUE = "#2b7bab"
ORANGE = "#d07a1e"
GRAY = "#8a96a3"
SPLIT_STYLES: Mapping[str, dict[str, Any]] = {
    "train": {"color": ORANGE, "linewidth": 1.3, "linestyle": "-"},
    "val": {"color": GRAY, "linewidth": 1.3, "linestyle": "--"},
    "test": {"color": BLUE, "linewidth": 2.0, "linestyle": "-"},
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}


def describe_estimate(estimate: Estimate, digits: int = 3) -> str:
    """`0.913 (0.854–0.962)`; `n/a` where undefined, without brackets where there is no interval."""
    if estimate.value is None:
        return "n/a"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def show_threshold(value: float) -> str:
    """`0.412`; with more digits where it would be shown as 0 or 1."""
    digits = 3
    while digits < 9 and 0 < value < 1 and float(f"{value:.{digits}f}") in (0.0, 1.0):
        digits += 1
    return f"{value:.{digits}f}"


def as_svg(name: str, plot: Callable[Concatenate[Axes, P], None]) -> Callable[P, bytes]:
    """A function that draws `plot` as an SVG of one panel. `name` makes its ids differ from those
    of other figures in one page."""

    def draw(*given: P.args, **settings: P.kwargs) -> bytes:
        with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
            figure = Figure(figsize=(4.4, 4.0), layout="constrained")
            plot(figure.subplots(), *given, **settings)
            return encode_figure(figure, "svg")

    return draw


def encode_figure(figure: Figure, file_format: Literal["png", "webp", "svg"]) -> bytes:
    """The figure as a file."""
    if file_format == "svg":
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        return buffer.getvalue()
    figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(figure)  # once; `savefig` draws a first time for the layout
    canvas.draw()
    return encode_image(np.asarray(canvas.buffer_rgba())[..., :3], file_format)


def encode_image(
    image: npt.NDArray[np.uint8], file_format: Literal["png", "webp"] = "webp"
) -> bytes:
    """An image (H, W), (H, W, 3) or, with opacity, (H, W, 4) uint8 as a file."""
    buffer = io.BytesIO()
    options = {"quality": 82, "method": 4} if file_format == "webp" else {}
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


def draw_placeholder(axes: Axes, why: str) -> None:
    """Write why a chart is empty."""
    text = textwrap.fill(why, 40)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GRAY)
    axes.set(xticks=[], yticks=[])
