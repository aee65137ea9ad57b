"""Charts of an evaluation: curves, confusion matrices, calibration, training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pneumo.evaluation.decision_curve import THRESHOLDS
from pneumo.evaluation.evaluation import Evaluation, SplitEvaluation
from pneumo.evaluation.metrics import Confusion
from pneumo.evaluation.operating_points import DECISION, SCREENING
from pneumo.evaluation.reliability import Histogram
from pneumo.reporting.figures.style import (
    BLUE,
    GRAY,
    INK,
    ORANGE,
    STYLE,
    as_svg,
    describe_estimate,
    draw_placeholder,
    encode_figure,
    show_threshold,
)

History = Sequence[Mapping[str, float | None]]
"""The metrics of each epoch, as in the run's metrics.jsonl; may be empty."""


def describe_n(part: SplitEvaluation) -> str:
    """`test, n = 30 studies of 21 patients, 9 positive`."""
    whose = "unknown patients" if part.patients is None else f"{part.patients} patients"
    return f"{part.split}, n = {part.n} studies of {whose}, {part.positives} positive"


def draw_metrics(
    evaluation: Evaluation, history: History, scored_epoch: int | None = None
) -> bytes:
    """`metrics.png`: ROC, precision-recall, confusion matrices and training curves with the scored
    epoch marked."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 8), layout="constrained")
        axes = figure.subplots(2, 3)
        plot_roc(axes[0, 0], evaluation)
        plot_precision_recall(axes[0, 1], evaluation)
        plot_confusion(axes[0, 2], evaluation, DECISION)
        plot_loss(axes[1, 0], history, scored_epoch)
        plot_validation(axes[1, 1], history, scored_epoch)
        plot_confusion(axes[1, 2], evaluation, SCREENING)
        figure.suptitle(
            f"Pneumonia on frontal chest X-rays: {describe_n(evaluation.test)}",
            x=0.01,
            ha="left",
            fontsize=12,
        )
        return encode_figure(figure, "png")


def draw_confusion(evaluation: Evaluation) -> bytes:
    """`confusion.svg`: test at both operating points."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": "confusion"}):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_confusion(left, evaluation, DECISION)
        plot_confusion(right, evaluation, SCREENING)
        return encode_figure(figure, "svg")


def plot_roc(axes: Axes, evaluation: Evaluation) -> None:
    """ROC of val and test, with AUROC, interval and the operating points on test."""
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=":", label="chance")
    for part, style in _curve_styles(evaluation):
        if part.roc is not None:
            label = f"{_name(part)} {describe_estimate(part.auroc)}, n = {part.n}"
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
            label = f"{_name(part)} {describe_estimate(part.average_precision)}, n = {part.n}"
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


def _name(part: SplitEvaluation) -> str:
    return "val (chosen on it)" if part.split == "val" else part.split


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
    """Test at one operating point: counts, and fractions of each row."""
    point, at = evaluation.points[name], evaluation.test.at[name]
    counts = at.counts
    axes.grid(visible=False)
    if counts is None:
        axes.set_title(f"{name.capitalize()} ({point.rule})")
        draw_placeholder(axes, str(at.reason))
        return
    table = confusion_table(counts)
    rows = table.sum(axis=1, keepdims=True)
    fraction = np.divide(table, rows, out=np.zeros((2, 2)), where=rows > 0)
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1.15, aspect="equal")
    for row, column in np.ndindex(2, 2):
        axes.text(
            column,
            row,
            f"{table[row, column]}\n{fraction[row, column]:.0%}",
            ha="center",
            va="center",
            fontsize=13,
            color="white" if fraction[row, column] > 0.6 else INK,
        )
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="predicted", ylabel="label")
    axes.set_xticklabels(["negative", "positive"])
    axes.set_yticklabels(["negative", "positive"], rotation=90, va="center")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    threshold = "" if point.threshold is None else f"p ≥ {show_threshold(point.threshold)}, "
    axes.set_title(f"{name.capitalize()}: {point.rule}\n{threshold}test n = {table.sum()}")


def plot_reliability(axes: Axes, evaluation: Evaluation) -> None:
    """Fraction of positives over predicted probability, by bin of test and smoothed, before and
    after calibration, with a histogram of the probabilities; bars are intervals over patients."""
    test = evaluation.test
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=":", label="perfect calibration")
    shown = (("uncalibrated", test.before, GRAY, "s"), ("calibrated", test.after, BLUE, "o"))
    for label, found, color, marker in shown:
        points = [(part.predicted, part.observed) for part in found.curve]
        for x, observed in points:
            if observed.low is not None and observed.high is not None:
                axes.plot([x, x], [observed.low, observed.high], color=color, linewidth=1)
        y = [_number(observed.value) for _, observed in points]
        axes.plot(
            [x for x, _ in points],
            y,
            marker,
            color=color,
            markersize=5,
            label=f"{label}, n = {test.n}" if points else None,
        )
        if found.smooth is not None:
            axes.plot(found.smooth.predicted, found.smooth.observed, color=color, linewidth=1.5)
    _plot_histogram(axes, test.after.histogram or test.before.histogram)
    if not test.before.curve:
        draw_placeholder(axes, str(test.before.brier.reason))
        axes.set_title("Calibration")
        return
    _finish_unit_square(axes, "Calibration", "predicted probability", "fraction of positives")
    axes.legend(loc="best")


def _plot_histogram(axes: Axes, histogram: Histogram | None) -> None:
    """Histogram of the probabilities at the lower edge; its tallest bar has a height of 0.12."""
    if histogram is None:
        return
    counts = np.array([histogram.negatives, histogram.positives]).sum(axis=0)
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.stairs(0.12 * counts / counts.max(), edges, fill=True, color=GRAY, alpha=0.35)


def plot_decision_curve(axes: Axes, evaluation: Evaluation) -> None:
    """Net benefit of acting on the model, on everyone and on nobody, by threshold, on test."""
    test = evaluation.test
    curve = test.decision_curve
    axes.set_title("Decision curve")
    if curve.reason is not None:
        draw_placeholder(axes, curve.reason)
        return
    model = [_number(one.value) for one in curve.model]
    low = [_number(one.low) for one in curve.model]
    high = [_number(one.high) for one in curve.model]
    axes.fill_between(THRESHOLDS, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(THRESHOLDS, model, color=BLUE, linewidth=2, label=f"model, n = {test.n}")
    axes.plot(THRESHOLDS, curve.treat_all, color=ORANGE, linestyle="--", label="act on all")
    axes.axhline(0, color=GRAY, linewidth=0.8, linestyle=":", label="act on nobody")
    # Without positives there is no benefit, but the axis needs a height.
    top = max([0.01, test.prevalence, *(h for h in high if not math.isnan(h))])
    axes.set(xlim=(0, 0.5), ylim=(-0.25 * top, 1.1 * top))
    axes.set(
        xlabel="threshold on the calibrated probability",
        ylabel="net benefit (true positives per study)",
    )
    axes.legend(loc="best")


def confusion_table(counts: Confusion) -> npt.NDArray[np.int64]:
    """[[tn, fp], [fn, tp]]: rows are labels, columns predictions."""
    return np.array([[counts.tn, counts.fp], [counts.fn, counts.tp]])


def plot_loss(axes: Axes, history: History, scored_epoch: int | None = None) -> None:
    """Loss of train and val by epoch."""
    _plot_history(
        axes,
        history,
        {
            "train/loss": ("train", GRAY, "--"),
            "val/loss": ("val", BLUE, "-"),
            "val/ema_loss": ("val, averaged weights", ORANGE, "-"),
        },
        scored_epoch,
    )
    axes.set(xlabel="epoch", ylabel="weighted cross-entropy (nats)")
    axes.set_title(f"Loss, {len(history)} epochs")


def plot_validation(axes: Axes, history: History, scored_epoch: int | None = None) -> None:
    """AUROC, precision and recall at p = 0.5 on val by epoch, of the averaged weights where there
    are any."""
    averaged = any("val/ema_auroc" in epoch for epoch in history)
    prefix, whose = ("val/ema_", ", averaged weights") if averaged else ("val/", "")
    _plot_history(
        axes,
        history,
        {
            f"{prefix}auroc": (f"AUROC{whose}", BLUE, "-"),
            f"{prefix}recall": (f"recall{whose}", ORANGE, "--"),
            f"{prefix}precision": (f"precision{whose}", GRAY, ":"),
        },
        scored_epoch,
    )
    axes.set(xlabel="epoch", ylabel="val (thresholded at p = 0.5)", ylim=(-0.02, 1.02))
    axes.set_title(f"Validation, {len(history)} epochs")


def _plot_history(
    axes: Axes,
    history: History,
    lines: Mapping[str, tuple[str, str, str]],
    scored_epoch: int | None,
) -> None:
    for key, (label, color, line) in lines.items():
        values = [_number(epoch.get(key)) for epoch in history]
        if not np.isnan(values).all():
            epochs = [_number(epoch["epoch"]) for epoch in history]
            axes.plot(epochs, values, line, color=color, marker=".", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if not axes.lines:
        draw_placeholder(axes, "no training history")
        return
    if scored_epoch is not None:
        label = f"epoch {scored_epoch}, scored"
        axes.axvline(scored_epoch, color=GRAY, linewidth=1.2, alpha=0.6, label=label)
    axes.legend(loc="best")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


draw_roc = as_svg("roc", plot_roc)
draw_precision_recall = as_svg("precision_recall", plot_precision_recall)
draw_reliability = as_svg("reliability", plot_reliability)
draw_decision_curve = as_svg("decision_curve", plot_decision_curve)
draw_loss = as_svg("loss", plot_loss)
draw_validation = as_svg("validation", plot_validation)
