"""Evaluation, Quality -> pictures: values and arrays in, PNG, WebP or SVG bytes out.

Equal input gives equal bytes on one version of matplotlib: no date, no random ids, its own font.
Right and wrong are green and red, as everyone expects, and carry a sign and a word for who cannot
tell the two apart; every other pair of colours is blue and orange.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from pneumo.evaluate import DECISION, SCREENING, Evaluation, SplitEvaluation
from pneumo.explain import Maps, Outcome, Why
from pneumo.metrics import Confusion, Estimate
from pneumo.quality import AGE_BIN_YEARS, UNKNOWN, ContactSheet, Quality
from pneumo.studies import Box

INK = "#1d2733"
"""Text and axes; the report puts its own ink in its place."""
RULE = "#d5dbe2"
"""Grid lines; as INK."""
BLUE = "#2b7bab"
ORANGE = "#d07a1e"
GRAY = "#8a96a3"
RIGHT = "#1a7f37"
WRONG = "#cf222e"
BOX = (0, 214, 255)
"""Of the radiologists' boxes: unlike any gray and any color of the map."""

OUTCOME_WORDS: Mapping[Outcome, str] = {
    "tp": "true positive",
    "fp": "false positive",
    "fn": "false negative",
    "tn": "true negative",
}

CONTACT_PIXELS = 128
"""Height and width of a picture in a contact sheet."""
OVERLAY_PIXELS = 384
"""Height of an overlay's pictures."""
_CAPTION_PIXELS = 24
_CONTACT_COLUMNS, _CONTACT_GAP = 3, 4
_SPLIT_STYLES: Mapping[str, dict[str, Any]] = {
    "train": {"color": ORANGE, "linewidth": 1.3, "linestyle": "-"},
    "val": {"color": GRAY, "linewidth": 1.3, "linestyle": "--"},
    "test": {"color": BLUE, "linewidth": 2.0, "linestyle": "-"},
}

History = Sequence[Mapping[str, float | None]]
"""A mapping an epoch, as in the run's metrics.jsonl; may be empty."""

_STYLE: dict[Any, Any] = {
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


@dataclass(frozen=True, eq=False)
class Case:
    """One study to show."""

    image: npt.NDArray[np.uint8]
    """(H, W)."""
    target: int
    probability: float
    threshold: float
    """A probability at or above it is called positive."""
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
    """Why this study is shown, where there was a reason."""

    @property
    def prediction(self) -> int:
        """1 where the model calls pneumonia."""
        return int(self.probability >= self.threshold)

    @property
    def is_right(self) -> bool:
        """Whether prediction and target agree."""
        return self.prediction == self.target

    @property
    def outcome(self) -> Outcome:
        """tp, fp, fn or tn."""
        if self.prediction:
            return "tp" if self.target else "fp"
        return "fn" if self.target else "tn"

    @property
    def caption(self) -> str:
        """`Pred: 1  p=0.87  Label: 1`."""
        return f"Pred: {self.prediction}  p={self.probability:.2f}  Label: {self.target}"


def describe_estimate(estimate: Estimate, digits: int = 3) -> str:
    """`0.913 (0.854–0.962)`; `n/a` where undefined, without brackets where there is no interval."""
    if estimate.value is None:
        return "n/a"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def describe_n(part: SplitEvaluation) -> str:
    """`test, n = 30 studies of 21 patients, 9 positive`."""
    return (
        f"{part.split}, n = {part.n} studies of {part.patients} patients, {part.positives} positive"
    )


# --- whole figures -------------------------------------------------------------------------------


def draw_metrics(evaluation: Evaluation, history: History) -> bytes:
    """`metrics.png`: ROC, precision-recall, confusion matrix and training curves."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 8), layout="constrained")
        axes = figure.subplots(2, 3)
        plot_roc(axes[0, 0], evaluation)
        plot_precision_recall(axes[0, 1], evaluation)
        plot_confusion(axes[0, 2], evaluation, DECISION)
        plot_loss(axes[1, 0], history)
        plot_validation(axes[1, 1], history)
        plot_confusion(axes[1, 2], evaluation, SCREENING)
        figure.suptitle(
            f"Pneumonia on frontal chest X-rays: {describe_n(evaluation.test)}",
            x=0.01,
            ha="left",
            fontsize=12,
        )
        return _encode(figure, "png")


def draw_roc(evaluation: Evaluation) -> bytes:
    """`roc.svg`."""
    return _draw_one("roc", lambda axes: plot_roc(axes, evaluation))


def draw_precision_recall(evaluation: Evaluation) -> bytes:
    """`precision_recall.svg`."""
    return _draw_one("precision_recall", lambda axes: plot_precision_recall(axes, evaluation))


def draw_loss(history: History) -> bytes:
    """`loss.svg`."""
    return _draw_one("loss", lambda axes: plot_loss(axes, history))


def draw_validation(history: History) -> bytes:
    """`validation.svg`: AUROC, precision and recall on val by epoch."""
    return _draw_one("validation", lambda axes: plot_validation(axes, history))


def draw_confusion(evaluation: Evaluation) -> bytes:
    """`confusion.svg`: test at both operating points."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "confusion"}):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_confusion(left, evaluation, DECISION)
        plot_confusion(right, evaluation, SCREENING)
        return _encode(figure, "svg")


def draw_prediction_grid(cases: Sequence[Case], *, title: str) -> bytes:
    """`prediction_grid.png`: a cell a study, green and ✓ where right, red and ✗ where wrong."""
    columns = min(4, max(len(cases), 1))
    rows = max(1, math.ceil(len(cases) / columns))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.82 * rows + 0.4), layout="constrained")
        for axes in np.ravel(figure.subplots(rows, columns, squeeze=False)):
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            color = RIGHT if case.is_right else WRONG
            sign = "✓" if case.is_right else "✗"
            axes.imshow(case.image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{sign} {case.caption}", color=color, fontsize=9, loc="center")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return _encode(figure, "png")


def draw_case(case: Case) -> bytes:
    """A gallery picture (WebP): the study beside its Grad-CAM, the boxes drawn into both."""
    return _draw_pairs([case], "webp", title=None)


def draw_gradcam_example(cases: Sequence[Case], *, title: str) -> bytes:
    """`gradcam_example.png`: one row a study."""
    return _draw_pairs(cases, "png", title=title)


def draw_quality(quality: Quality) -> bytes:
    """`data_quality.png`: findings, views and sexes, ages and gray levels by split."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(15, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        plot_composition(left, quality)
        plot_ages(middle, quality)
        plot_intensity(right, quality)
        return _encode(figure, "png")


def draw_ages(quality: Quality) -> bytes:
    """`ages.svg`."""
    return _draw_one("ages", lambda axes: plot_ages(axes, quality))


def draw_intensity(quality: Quality) -> bytes:
    """`intensity.svg`."""
    return _draw_one("intensity", lambda axes: plot_intensity(axes, quality))


def draw_contact_sheet(sheet: ContactSheet) -> bytes:
    """The pictures (WebP), three in a row, and nothing else: the gaps are transparent, so that the
    sheet lies on any ground, and the caption is text beside it."""
    columns = min(_CONTACT_COLUMNS, max(len(sheet.pictures), 1))
    rows = max(1, math.ceil(len(sheet.pictures) / columns))
    step = CONTACT_PIXELS + _CONTACT_GAP
    size = (columns * step - _CONTACT_GAP, rows * step - _CONTACT_GAP)
    page = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, pixels in enumerate(sheet.pictures):
        picture = Image.fromarray(pixels).resize(
            (CONTACT_PIXELS, CONTACT_PIXELS), Image.Resampling.LANCZOS
        )
        row, column = divmod(i, columns)
        page.paste(picture.convert("RGBA"), (column * step, row * step))
    return encode_image(np.asarray(page))


def _draw_pairs(
    cases: Sequence[Case], file_format: Literal["png", "webp"], *, title: str | None
) -> bytes:
    rows = max(1, len(cases))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 3.3 * rows + (0.35 if title else 0)), layout="constrained")
        for axes in np.ravel(figure.subplots(rows, 1, squeeze=False)):
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            axes.imshow(compose_case(case, size=336))
            sign = "✓" if case.is_right else "✗"
            axes.set_title(
                f"{sign} {OUTCOME_WORDS[case.outcome]}   {case.caption}",
                color=RIGHT if case.is_right else WRONG,
                fontsize=9,
            )
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return _encode(figure, file_format)


def compose_case(case: Case, *, size: int) -> npt.NDArray[np.uint8]:
    """The study and, where it has a map, the map over it, side by side: (size, W, 3) uint8.

    Warm colors are where the evidence for pneumonia is, cyan outlines the radiologists' boxes.
    """
    return compose_picture(case.image, case.cam, case.boxes, size=size)


def compose_picture(
    image: npt.NDArray[np.uint8], cam: Maps | None, boxes: Sequence[Box] = (), *, size: int
) -> npt.NDArray[np.uint8]:
    """`compose_case` of a study of which nothing else is known."""
    scale = size / image.shape[0]
    width = max(1, round(image.shape[1] * scale))
    gray = np.asarray(Image.fromarray(image).resize((width, size), Image.Resampling.LANCZOS))
    panels = [np.repeat(gray[..., None], 3, axis=2)]
    if cam is not None:
        cam = np.asarray(
            Image.fromarray(cam).resize((width, size), Image.Resampling.BILINEAR)
        ).clip(0, 1)
        heat = mpl.colormaps["inferno"](0.25 + 0.75 * cam)[..., :3] * 255
        # Opaque where the evidence is, so that the anatomy elsewhere keeps its grays.
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
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _outline(
    panel: npt.NDArray[np.uint8], boxes: Sequence[Box], scale: float
) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(panel)
    pen = ImageDraw.Draw(image)
    for x, y, width, height in boxes:
        corners = (x * scale, y * scale, (x + width) * scale, (y + height) * scale)
        pen.rectangle(corners, outline=BOX, width=max(1, panel.shape[0] // 110))
    return np.asarray(image)


# --- panels --------------------------------------------------------------------------------------


def plot_roc(axes: Axes, evaluation: Evaluation) -> None:
    """ROC of val and test, with AUROC, interval and the operating points on test."""
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=":", label="chance")
    for part, style in _curve_styles(evaluation):
        if part.roc is not None:
            label = f"{part.split} {describe_estimate(part.auroc)}, n = {part.n}"
            axes.plot(part.roc.x, part.roc.y, label=label, **style)
    for name, marker in ((DECISION, "o"), (SCREENING, "s")):
        rates = evaluation.test.at[name].rates
        sensitivity, specificity = rates["recall"].value, rates["specificity"].value
        if sensitivity is not None and specificity is not None:
            axes.plot(
                1 - specificity,
                sensitivity,
                marker,
                color=ORANGE,
                markersize=6,
                label=f"{name}: {evaluation.points[name].rule}",
            )
    _finish_unit_square(axes, "ROC: AUROC (95 % interval)", "1 − specificity", "sensitivity")


def plot_precision_recall(axes: Axes, evaluation: Evaluation) -> None:
    """Precision over recall of val and test, with average precision and the prevalence."""
    for part, style in _curve_styles(evaluation):
        if part.precision_recall is not None:
            curve = part.precision_recall
            label = f"{part.split} {describe_estimate(part.average_precision)}, n = {part.n}"
            axes.plot(curve.x, curve.y, label=label, **style)
    prevalence = evaluation.test.prevalence
    if not math.isnan(prevalence):
        axes.axhline(
            prevalence,
            color=GRAY,
            linewidth=0.8,
            linestyle=":",
            label=f"chance: prevalence {prevalence:.2f}",
        )
    title = "Precision-recall: AP (95 % interval)"
    _finish_unit_square(axes, title, "recall (sensitivity)", "precision (PPV)")


def _curve_styles(evaluation: Evaluation) -> list[tuple[SplitEvaluation, dict[str, Any]]]:
    return [
        (evaluation.val, {"color": GRAY, "linewidth": 1.2}),
        (evaluation.test, {"color": BLUE, "linewidth": 2.0}),
    ]


def _finish_unit_square(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x_label, ylabel=y_label)
    axes.set_title(title)
    if axes.lines:
        axes.legend(loc="lower right" if "ROC" in title else "lower left")


def plot_confusion(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Test at one operating point: counts, and shares of each row."""
    point, counts = evaluation.points[name], evaluation.test.at[name].counts
    axes.grid(visible=False)
    if counts is None:
        axes.set_title(f"{name.capitalize()} ({point.rule})")
        _say_nothing(axes, "no threshold could be chosen on val")
        return
    table = confusion_table(counts)
    rows = table.sum(axis=1, keepdims=True)
    share = np.divide(table, rows, out=np.zeros((2, 2)), where=rows > 0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="equal")
    for row, column in np.ndindex(2, 2):
        axes.text(
            column,
            row,
            f"{table[row, column]}\n{share[row, column]:.0%}",
            ha="center",
            va="center",
            fontsize=13,
            color="white" if share[row, column] > 0.6 else INK,
        )
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="predicted", ylabel="label")
    axes.set_xticklabels(["negative", "positive"])
    axes.set_yticklabels(["negative", "positive"], rotation=90, va="center")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(
        f"{name.capitalize()}: {point.rule}\np ≥ {point.threshold:.3f}, test n = {table.sum()}"
    )


def confusion_table(counts: Confusion) -> npt.NDArray[np.int64]:
    """[[tn, fp], [fn, tp]]: rows are labels, columns predictions."""
    return np.array([[counts.tn, counts.fp], [counts.fn, counts.tp]])


def plot_loss(axes: Axes, history: History) -> None:
    """Loss of train and val by epoch."""
    _plot_history(
        axes,
        history,
        {"train/loss": ("train", GRAY, "--"), "val/loss": ("val", BLUE, "-")},
    )
    axes.set(xlabel="epoch", ylabel="weighted cross-entropy (nats)")
    axes.set_title(f"Loss, {len(history)} epochs")


def plot_validation(axes: Axes, history: History) -> None:
    """AUROC, precision and recall at p = 0.5 on val by epoch; the best AUROC is marked."""
    _plot_history(
        axes,
        history,
        {
            "val/auroc": ("AUROC", BLUE, "-"),
            "val/recall": ("recall", ORANGE, "--"),
            "val/precision": ("precision", GRAY, ":"),
        },
    )
    aurocs = [_number(epoch.get("val/auroc")) for epoch in history]
    if not np.isnan(aurocs).all():
        best = int(np.nanargmax(aurocs))
        axes.plot(
            _number(history[best]["epoch"]), aurocs[best], "o", color=BLUE, markersize=7, zorder=3
        )
    axes.set(xlabel="epoch", ylabel="val (thresholded at p = 0.5)", ylim=(-0.02, 1.02))
    axes.set_title(f"Validation, {len(history)} epochs")


def _plot_history(axes: Axes, history: History, lines: Mapping[str, tuple[str, str, str]]) -> None:
    for key, (label, color, line) in lines.items():
        values = [_number(epoch.get(key)) for epoch in history]
        if not np.isnan(values).all():
            epochs = [_number(epoch["epoch"]) for epoch in history]
            axes.plot(epochs, values, line, color=color, marker=".", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.lines:
        axes.legend(loc="best")
    else:
        _say_nothing(axes, "no training history")


def plot_composition(axes: Axes, quality: Quality) -> None:
    """Share of each split's studies with each finding, view and sex."""
    shown = [
        (what, value)
        for what in ("finding", "view", "sex")
        for value, *_ in _list_counts(quality, what)
    ]
    height = 0.8 / len(quality.splits)
    for k, (name, split) in enumerate(quality.splits.items()):
        shares = [100 * split.counts[what][value] / max(split.studies, 1) for what, value in shown]
        axes.barh(
            [i + (k - 1) * height for i in range(len(shown))],
            shares,
            height=0.9 * height,
            color=_SPLIT_STYLES[name]["color"],
            label=f"{name}, n = {split.studies:,}",
        )
    labels = [f"{what} {value}" if value == UNKNOWN else value for what, value in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="% of the split's studies")
    axes.set_title("Finding, view and sex")
    axes.legend(loc="best")


def _list_counts(quality: Quality, what: str) -> list[tuple[str, int]]:
    """Value and studies of a property in all splits, without 'unknown' where nothing is."""
    values = next(iter(quality.splits.values())).counts[what]
    totals = [(v, sum(s.counts[what][v] for s in quality.splits.values())) for v in values]
    return [(value, total) for value, total in totals if total or value != UNKNOWN]


def plot_ages(axes: Axes, quality: Quality) -> None:
    """Share of each split's studies by age, of those whose age is known."""
    for name, split in quality.splits.items():
        known = sum(split.ages)
        if known:
            edges = [AGE_BIN_YEARS * i for i in range(len(split.ages) + 1)]
            axes.stairs(
                [100 * n / known for n in split.ages],
                edges,
                label=f"{name}, n = {known:,}",
                **_SPLIT_STYLES[name],
            )
    axes.set_title(f"Age, by {AGE_BIN_YEARS} years")
    if not axes.patches:
        _say_nothing(axes, "no age is known")
        return
    last = max(i for split in quality.splits.values() for i, n in enumerate(split.ages) if n)
    axes.set(xlabel="years", ylabel="% of studies of known age")
    axes.set(xlim=(0, AGE_BIN_YEARS * (last + 1)), ylim=(0, 1.25 * axes.dataLim.ymax))
    axes.legend(loc="upper left")


def plot_intensity(axes: Axes, quality: Quality) -> None:
    """Share of each split's pixels by gray level, between pure black and pure white."""
    for name, split in quality.splits.items():
        histogram = np.array(split.intensity.histogram, dtype=np.float64)
        if histogram.sum():
            # Two levels a point: JPEG leaves some levels empty.
            share = 100 * histogram[1:-1].reshape(-1, 2).mean(axis=1) / histogram.sum()
            axes.plot(np.arange(1.5, 255, 2), share, label=name, **_SPLIT_STYLES[name])
    axes.set_title("Gray levels of the stored pictures")
    if not axes.lines:
        _say_nothing(axes, "no pictures")
        return
    axes.set(xlabel="gray level (0 and 255 left out)", ylabel="% of pixels a level")
    axes.set(xlim=(0, 255), ylim=(0, None))
    axes.legend(loc="best")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _say_nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GRAY)
    axes.set(xticks=[], yticks=[])


# --- encoding ------------------------------------------------------------------------------------


def _draw_one(name: str, plot: Any) -> bytes:
    """One panel as SVG. The salt is the name: ids of two figures in one page must differ."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 4.0), layout="constrained")
        plot(figure.subplots())
        return _encode(figure, "svg")


def _encode(figure: Figure, file_format: Literal["png", "webp", "svg"]) -> bytes:
    buffer = io.BytesIO()
    if file_format == "svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        return buffer.getvalue()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    if file_format == "png":
        return buffer.getvalue()
    return encode_image(np.asarray(Image.open(buffer).convert("RGB")))


def encode_image(image: npt.NDArray[np.uint8]) -> bytes:
    """(H, W), (H, W, 3) or, with opacity, (H, W, 4) uint8 as WebP."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "webp", quality=82, method=4)
    return buffer.getvalue()
