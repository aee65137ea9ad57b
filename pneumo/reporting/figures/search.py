"""Optuna's plots of a search: parallel coordinates, contour, learning curves, importance."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import optuna
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from optuna.visualization import matplotlib as plots

from pneumo.config import without_folders
from pneumo.reporting.figures.style import (
    INK,
    RULE,
    STYLE,
    as_svg,
    draw_placeholder,
    encode_figure,
)
from pneumo.tuning.objective import name_objective
from pneumo.tuning.optuna_study import to_optuna_study
from pneumo.tuning.search import Search

_Plot = Callable[[Any], Any]
"""An Optuna study to the axes of its plot; Optuna has no types."""


def draw_parallel(search: Search) -> bytes:
    """`parallel.svg`: a line for each trial, from its objective across all keys that vary."""
    plot = partial(plots.plot_parallel_coordinate, target_name=_name(search))
    return _draw("parallel", "Settings", search, plot, size=(9.2, 4.4))


def draw_contour(search: Search) -> bytes:
    """`contour.svg`: the objective over the two most important keys."""
    keys = choose_axes(search)
    if len(keys) < 2:
        return as_svg("contour", draw_placeholder)("fewer than two keys vary")
    plot = partial(plots.plot_contour, params=list(keys), target_name=_name(search))
    return _draw("contour", "Contour", search, plot)


def draw_learning(search: Search) -> bytes:
    """`learning.svg`: the smoothed objective by epoch, with the rungs."""

    def plot(study: Any) -> Any:
        axes = plots.plot_intermediate_values(study)
        axes.set(xlabel="epoch", ylabel=_name(search))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for rung in search.config.tune.rungs:
            axes.axvline(rung, color=INK, linewidth=0.7, linestyle=":")
        return axes

    return _draw("learning", "Learning on val", search, plot, size=(9.2, 3.9))


def draw_importance(search: Search) -> bytes:
    """`importance.svg`: the fraction of the objective's variance that each key explains."""
    if not search.importance:
        return as_svg("importance", draw_placeholder)("too few trials, or only one key")

    def plot(study: Any) -> Any:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=search.config.seed)
        axes = plots.plot_param_importances(study, evaluator=evaluator)
        axes.set(xlabel="fraction of the objective's variation", ylabel="")
        return axes

    return _draw("importance", "Importance (fANOVA)", search, plot)


def choose_axes(search: Search) -> Sequence[str]:
    """The two most important keys with several values; without importances the first two."""
    comparable = [trial for trial in search.trials if trial.is_comparable]
    keys = [
        key
        for key, domain in search.config.tune.space.items()
        if domain.varies and len({trial.settings[key] for trial in comparable}) > 1
    ]
    return sorted(keys, key=lambda key: -search.importance.get(key, 0.0))[:2]


def _draw(
    name: str,
    title: str,
    search: Search,
    plot: _Plot,
    size: tuple[float, float] = (4.4, 4.0),
) -> bytes:
    """One of Optuna's plots as SVG, in the colors of the page."""
    study = to_optuna_study(search.trials, search.config.tune)
    if len({trial.value for trial in study.trials}) < 2:
        why = "fewer than two trials with different objectives"
        return as_svg(name, draw_placeholder)(why)
    # Optuna sets its own style through pyplot, and warns that its plots are experimental.
    settings: dict[Any, Any] = {
        **STYLE,
        "figure.constrained_layout.use": True,
        "figure.figsize": size,
        "backend": "agg",
        "svg.hashsalt": name,
    }
    with mpl.rc_context(settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            axes: Axes = plot(study)
        figure = axes.get_figure(root=True)
        assert figure is not None
        for part in figure.axes:
            part.tick_params(which="both", colors=INK, grid_color=RULE, labelsize=8)
            for text in (part.title, part.xaxis.label, part.yaxis.label, *part.texts):
                text.set(color=INK, fontsize=9)
            for axis in (part.xaxis, part.yaxis):
                if isinstance(axis.get_major_formatter(), FuncFormatter):  # words, no numbers
                    labels = (label.get_text() for label in axis.get_ticklabels())
                    axis.set_ticklabels([_show_word(label) for label in labels])
            if legend := part.get_legend():  # a name for each trial, or for the objective alone
                legend.remove()
        title = f"{title}, n = {len(study.trials)} trials"
        axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")
        drawn = encode_figure(figure, "svg")
        plt.close(figure)
    return drawn


def _show_word(word: str) -> str:
    """A file without its folders; a dollar sign as it is, which matplotlib reads as a formula."""
    return str(without_folders(word)).replace("$", r"\$")


def _name(search: Search) -> str:
    return name_objective(search.config.tune)
