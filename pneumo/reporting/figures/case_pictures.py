"""Figures of studies: the grid, the galleries, Grad-CAM over a study, boxes.

Correct is green and wrong is red; each also has a sign and a word, for readers who cannot tell
these colors apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from pneumo.evaluation.shown_studies import FindingErrors, Outcome, Why
from pneumo.images.boxes import Box
from pneumo.network.gradcam import Maps
from pneumo.reporting.figures.style import INK, STYLE, draw_placeholder, encode_figure, encode_image

RIGHT = "#1a7f37"
WRONG = "#cf222e"
SIGNS: Mapping[bool, tuple[str, str]] = {True: ("✓", RIGHT), False: ("✗", WRONG)}
"""Sign and color of a call that is right, and of one that is wrong."""
BOX = (0, 214, 255)
"""Of the radiologists' boxes: unlike any gray and any color of the map."""
OUTCOME_WORDS: Mapping[Outcome, str] = {
    "tp": "true positive",
    "fp": "false positive",
    "fn": "false negative",
    "tn": "true negative",
}
OVERLAY_PIXELS = 384
"""Height of an overlay's pictures."""
_CAPTION_PIXELS = 24


@dataclass(frozen=True, eq=False)
class Case:
    """One study to show."""

    image: npt.NDArray[np.uint8]
    """(H, W)."""
    target: int
    probability: float
    """Calibrated where there is a calibration, as `threshold`."""
    threshold: float
    is_called: bool
    """Whether it is called positive."""
    boxes: Sequence[Box] = ()
    """In pixels of `image`."""
    cam: Maps | None = None
    """(H, W) in [0, 1]."""
    finding: str = ""
    view: str = ""
    """'AP', 'PA' or '' where unknown."""
    age_band: str = ""
    """Such as `60-69`; '' where unknown."""
    why: Why | None = None
    """Why this study is shown; None for the grid."""
    stratum_size: int | None = None
    """Of a random sample: number of studies of its outcome and view."""

    @property
    def is_right(self) -> bool:
        """Whether the call and the target agree."""
        return self.is_called == (self.target == 1)

    @property
    def outcome(self) -> Outcome:
        """tp, fp, fn or tn."""
        if self.is_called:
            return "tp" if self.target else "fp"
        return "fn" if self.target else "tn"

    @property
    def caption(self) -> str:
        """`Pred: 1  p=0.87  Label: 1`."""
        return f"Pred: {self.is_called:d}  p={self.probability:.2f}  Label: {self.target}"


@dataclass(frozen=True, eq=False)
class Pictures:
    """The studies of test that are shown; empty without a threshold."""

    grid: list[Case]
    """A random sample."""
    gallery: dict[Outcome, list[Case]]
    """By outcome, with Grad-CAM and boxes, and why each was chosen."""
    errors: dict[Outcome, list[Case]]
    """The most certain false positives and false negatives, with Grad-CAM and boxes."""
    by_finding: list[FindingErrors]
    reason: str | None = None
    """Why no study is shown; None where some are."""
    sample: Sequence[Case] = ()
    """A random sample of each outcome and view."""

    def shrink(self, size: int) -> Self:
        """The same with images of at most `size` pixels in height."""
        return replace(
            self,
            grid=_shrink_all(self.grid, size),
            gallery={o: _shrink_all(cases, size) for o, cases in self.gallery.items()},
            errors={o: _shrink_all(cases, size) for o, cases in self.errors.items()},
            sample=_shrink_all(self.sample, size),
        )

    @classmethod
    def none(cls, reason: str) -> Self:
        """No study, with the reason."""
        return cls([], {}, {}, [], reason)


def _shrink_all(cases: Sequence[Case], size: int) -> list[Case]:
    return [shrink(case, size) for case in cases]


def shrink(case: Case, size: int) -> Case:
    """The case at most `size` pixels high, its boxes and its map with it."""
    height, width = case.image.shape
    scale = size / height
    if scale >= 1:
        return case
    shape = (max(1, round(width * scale)), size)
    cam = case.cam
    if cam is not None:
        small = Image.fromarray(cam).resize(shape, Image.Resampling.BILINEAR)
        cam = np.asarray(small).clip(0, 1)
    return replace(
        case,
        image=np.asarray(Image.fromarray(case.image).resize(shape, Image.Resampling.LANCZOS)),
        boxes=tuple(Box(*(scale * side for side in box)) for box in case.boxes),
        cam=cam,
    )


def draw_prediction_grid(cases: Sequence[Case], *, title: str, reason: str | None = None) -> bytes:
    """`prediction_grid.png`: a cell for each study, green with ✓ where the call is correct, red
    with ✗ where it is wrong. Without studies the figure shows `reason`."""
    if not cases:
        return _draw_reason(title, reason)
    columns = min(4, len(cases))
    rows = math.ceil(len(cases) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.82 * rows + 0.4), layout="constrained")
        for axes in np.ravel(figure.subplots(rows, columns, squeeze=False)):
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            sign, color = SIGNS[case.is_right]
            axes.imshow(case.image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{sign} {case.caption}", color=color, fontsize=9, loc="center")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return encode_figure(figure, "png")


def draw_case(case: Case) -> bytes:
    """A gallery picture (WebP): the study beside its Grad-CAM, the boxes drawn into both."""
    return _draw_pairs([case], "webp", title=None)


def draw_gradcam_example(cases: Sequence[Case], *, title: str, reason: str | None = None) -> bytes:
    """`gradcam_example.png`: a row for each study. Without studies it shows `reason`."""
    if not cases:
        return _draw_reason(title, reason)
    return _draw_pairs(cases, "png", title=title)


def _draw_pairs(
    cases: Sequence[Case], file_format: Literal["png", "webp"], *, title: str | None
) -> bytes:
    size = (6.2, 3.3 * len(cases) + (0.35 if title else 0))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained" if title else None)
        figure.subplots(len(cases), 1)
        if not title:  # one study of a gallery: the same place each time
            figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.92)
        for axes, case in zip(figure.axes, cases, strict=True):
            axes.set_axis_off()
            axes.imshow(compose_picture(case.image, case.cam, case.boxes, size=336))
            sign, color = SIGNS[case.is_right]
            title_of_case = f"{sign} {OUTCOME_WORDS[case.outcome]}   {case.caption}"
            axes.set_title(title_of_case, color=color, fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return encode_figure(figure, file_format)


def _draw_reason(title: str, reason: str | None) -> bytes:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        draw_placeholder(axes, f"not shown: {reason or 'no study'}")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return encode_figure(figure, "png")


def compose_picture(
    image: npt.NDArray[np.uint8], cam: Maps | None, boxes: Sequence[Box] = (), *, size: int
) -> npt.NDArray[np.uint8]:
    """An image and, where it has a map, the map over it, side by side: (size, W, 3) uint8.

    Warm colors are where the evidence for pneumonia is, cyan outlines the radiologists' boxes.

    >>> plt.imshow(pneumo.compose_picture(picture, model.maps([picture])[0], study.boxes, size=336))
    """
    scale = size / image.shape[0]
    width = max(1, round(image.shape[1] * scale))
    gray = np.asarray(Image.fromarray(image).resize((width, size), Image.Resampling.LANCZOS))
    panels = [np.repeat(gray[..., None], 3, axis=2)]
    if cam is not None:
        cam = np.asarray(
            Image.fromarray(cam).resize((width, size), Image.Resampling.BILINEAR)
        ).clip(0, 1)
        heat = mpl.colormaps["inferno"](0.25 + 0.75 * cam)[..., :3] * 255
        # Opaque only where the evidence is, so that the anatomy stays visible.
        opacity = 0.6 * cam[..., None]
        panels.append((panels[0] * (1 - opacity) + heat * opacity).astype(np.uint8))
    gap = np.full((size, max(2, size // 48), 3), 255, dtype=np.uint8)
    outlined = [_outline(panel, boxes, scale) for panel in panels]
    return np.concatenate([outlined[0], *(p for panel in outlined[1:] for p in (gap, panel))], 1)


def draw_overlay(image: npt.NDArray[np.uint8], cam: Maps, caption: str) -> bytes:
    """A PNG of `compose_picture` with a line of text below it."""
    pair = compose_picture(image, cam, size=OVERLAY_PIXELS)
    page = Image.new("RGB", (pair.shape[1], pair.shape[0] + _CAPTION_PIXELS), "white")
    page.paste(Image.fromarray(pair))
    font = ImageFont.load_default(size=0.6 * _CAPTION_PIXELS)
    ImageDraw.Draw(page).text((4, pair.shape[0] + 3), caption, fill=INK, font=font)
    return encode_image(np.asarray(page), "png")


def _outline(
    panel: npt.NDArray[np.uint8], boxes: Sequence[Box], scale: float
) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(panel)
    pen = ImageDraw.Draw(image)
    for x, y, width, height in boxes:
        corners = (x * scale, y * scale, (x + width) * scale, (y + height) * scale)
        pen.rectangle(corners, outline=BOX, width=max(1, panel.shape[0] // 110))
    return np.asarray(image)
