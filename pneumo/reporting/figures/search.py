"""What a search found, drawn: the landscape, the settings side by side, learning by rung, and which
setting matters.

Colour is the objective everywhere, from low (blue) to high (yellow); the taken setting is ringed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pneumo.reporting.figures.style import (
    BLUE,
    GRAY,
    INK,
    ORANGE,
    STYLE,
    draw_chart,
    encode_figure,
    say_nothing,
)
from pneumo.search_space import Domain
from pneumo.tuning.objective import name_objective, smooth
from pneumo.tuning.search import Search
from pneumo.tuning.trials import OBJECTIVE, Trial

_COLOURS = "viridis"
_JUDGED = ("finished", "stopped")


def draw_landscape(search: Search) -> bytes:
    """`landscape.svg`: trials over the two keys that matter most, both numbers."""
    return draw_chart("landscape", lambda axes: plot_landscape(axes, search))


def draw_parallel(search: Search) -> bytes:
    """`parallel.svg`: a line a trial across all keys that vary, to its objective."""
    return _draw_wide("parallel", lambda axes: plot_parallel(axes, search))


def draw_learning(search: Search) -> bytes:
    """`learning.svg`: the smoothed objective by epoch, with the rungs."""
    return _draw_wide("learning", lambda axes: plot_learning(axes, search))


def draw_importance(search: Search) -> bytes:
    """`importance.svg`: share of the objective's variation that each key accounts for."""
    return draw_chart("importance", lambda axes: plot_importance(axes, search))


def _draw_wide(name: str, plot: Callable[[Axes], None]) -> bytes:
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        plot(figure.subplots())
        return encode_figure(figure, "svg")


def plot_landscape(axes: Axes, search: Search) -> None:
    """Each trial at its setting, its colour the objective; small where it was stopped."""
    keys = choose_axes(search)
    trials = _judged(search)
    if len(keys) < 2 or not trials:
        say_nothing(axes, "fewer than two numbers were searched")
        return
    space = search.config.tune.space
    x, y = (np.array([_number(trial.settings[key]) for trial in trials]) for key in keys)
    size = np.array([52.0 if trial.state == "finished" else 16.0 for trial in trials])
    points = axes.scatter(
        x, y, s=size, c=_objectives(search, trials), cmap=_COLOURS, edgecolor=INK, linewidth=0.4
    )
    taken = search.choice.trial.settings
    axes.scatter(
        [_number(taken[keys[0]])],
        [_number(taken[keys[1]])],
        s=170,
        facecolor="none",
        edgecolor=ORANGE,
        linewidth=1.8,
        label=f"taken: {search.choice.trial.name}",
    )
    for axis, key in (("x", keys[0]), ("y", keys[1])):
        getattr(axes, f"set_{axis}label")(key)
        if space[key].kind == "log_uniform":
            getattr(axes, f"set_{axis}scale")("log")
            ticks = getattr(axes, f"{axis}axis")
            ticks.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            ticks.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
            ticks.set_minor_formatter(NullFormatter())
    bar = axes.figure.colorbar(points, ax=axes, label=name_objective(search.config.tune))
    bar.outline.set_visible(False)
    axes.set_title(f"Landscape, n = {len(trials)} trials")
    axes.legend(loc="best")


def plot_parallel(axes: Axes, search: Search) -> None:
    """One vertical line a key, scaled to what was searched, and the objective at the right."""
    trials = _judged(search)
    keys = [key for key, domain in search.config.tune.space.items() if domain.varies]
    if not trials:
        say_nothing(axes, "no trial was judged")
        return
    objective = _objectives(search, trials)
    low, high = float(objective.min()), float(objective.max())
    scale = Normalize(low, high if high > low else low + 1e-9)
    colours = mpl.colormaps[_COLOURS]
    columns = [
        [_place(search.config.tune.space[key], t.settings[key]) for t in trials] for key in keys
    ]
    heights = np.array([*columns, scale(objective)]).T
    taken = search.choice.trial
    # The best on top.
    for i in np.argsort(objective):
        trial = trials[i]
        is_taken = trial.name == taken.name
        axes.plot(
            range(len(keys) + 1),
            heights[i],
            color=ORANGE if is_taken else colours(scale(objective[i])),
            linewidth=2.6 if is_taken else 1.1,
            alpha=1.0 if is_taken else 0.75,
            linestyle="-" if trial.state == "finished" else ":",
            zorder=3 if is_taken else 2,
        )
    for place in range(len(keys) + 1):
        axes.axvline(place, color=GRAY, linewidth=0.8, zorder=1)
    for place, key in enumerate(keys):
        bottom, top = _ends(search.config.tune.space[key])
        axes.text(place, -0.05, bottom, ha="center", va="top", fontsize=8)
        axes.text(place, 1.05, top, ha="center", va="bottom", fontsize=8)
    axes.text(len(keys), -0.05, f"{low:.3f}", ha="center", va="top", fontsize=8)
    axes.text(len(keys), 1.05, f"{high:.3f}", ha="center", va="bottom", fontsize=8)
    axes.set(ylim=(-0.16, 1.16), yticks=[], xlim=(-0.3, len(keys) + 0.3))
    axes.set_xticks(range(len(keys) + 1), [*keys, name_objective(search.config.tune)])
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0, pad=8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        f"Settings, n = {len(trials)} trials; dotted where stopped, thick: taken", pad=14
    )


def plot_learning(axes: Axes, search: Search) -> None:
    """How each trial's objective grew; those that were stopped end at a rung."""
    config = search.config.tune
    for trial in reversed(search.trials):
        values = [record[OBJECTIVE] for record in trial.history]
        known = [value for value in values if value is not None]
        smoothed = [smooth(known[: i + 1], config.smoothing_epochs) for i in range(len(known))]
        if not smoothed:
            continue
        is_taken = trial.name == search.choice.trial.name
        colour = ORANGE if is_taken else BLUE if trial.state == "finished" else GRAY
        epochs = range(1, len(smoothed) + 1)
        axes.plot(epochs, smoothed, color=colour, linewidth=2.2 if is_taken else 0.9, alpha=0.9)
        if trial.state != "finished":
            axes.plot(epochs[-1], smoothed[-1], "x", color=colour, markersize=4)
    for rung in config.rungs:
        axes.axvline(rung, color=INK, linewidth=0.7, linestyle=":")
    for label, colour in (("taken", ORANGE), ("all epochs", BLUE), ("stopped at a rung", GRAY)):
        axes.plot([], [], color=colour, label=label)
    axes.set(xlabel="epoch", ylabel=name_objective(config))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rungs = f"; rungs after {', '.join(map(str, config.rungs))}" if config.rungs else ""
    axes.set_title(f"Learning on val, n = {len(search.trials)}{rungs}")
    axes.legend(loc="lower right")


def plot_importance(axes: Axes, search: Search) -> None:
    """Bars, the most important on top."""
    if not search.importance:
        say_nothing(axes, "too few trials, or one key, to tell")
        return
    keys = list(search.importance)[::-1]
    axes.barh(keys, [search.importance[key] for key in keys], color=BLUE)
    axes.set(xlim=(0, 1), xlabel="share of the objective's variation")
    axes.grid(visible=False, axis="y")
    axes.set_title(f"Importance (fANOVA), n = {len(_judged(search))} trials")


def choose_axes(search: Search) -> list[str]:
    """The two numeric keys that vary and matter most, or come first in the space."""
    space = search.config.tune.space
    numeric = [
        key
        for key, domain in space.items()
        if domain.varies and all(_is_number(trial.settings[key]) for trial in search.trials)
    ]
    return sorted(numeric, key=lambda key: -search.importance.get(key, 0.0))[:2]


def _judged(search: Search) -> Sequence[Trial]:
    return [
        trial
        for trial in search.trials
        if trial.state in _JUDGED and trial.objective(search.config.tune) is not None
    ]


def _objectives(search: Search, trials: Sequence[Trial]) -> npt.NDArray[np.float64]:
    return np.array([trial.objective(search.config.tune) for trial in trials], dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    assert _is_number(value)
    return float(value)


def _place(domain: Domain, value: Any) -> float:
    """Where on its line a value is, 0 to 1."""
    if domain.kind in ("choice", "fixed"):
        return domain.values.index(value) / max(len(domain.values) - 1, 1)
    low, high, at = domain.low, domain.high, _number(value)
    if domain.kind == "log_uniform":
        low, high, at = np.log(low), np.log(high), np.log(at)
    return float((at - low) / (high - low)) if high > low else 0.5


def _ends(domain: Domain) -> tuple[str, str]:
    first, last = domain.values[0], domain.values[-1]
    return tuple(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (first, last))  # type: ignore[return-value]
