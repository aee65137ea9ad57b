"""The AUROC matrix of an external validation: runs by data sets."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from pneumo.reporting.figures.style import STYLE, encode_figure


def draw_matrix(matrix: Mapping[str, Mapping[str, Any]]) -> bytes:
    """`matrix.png`: the AUROC of each run (row) on each set (column), as in metrics.json; colors
    from 0.5 (white) to 1."""
    columns = list_columns(matrix)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = (1.8 + 1.5 * len(columns), 1.3 + 0.7 * len(matrix))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        cells = [[row.get(name) for name in columns] for row in matrix.values()]
        values = np.array([[cell and cell["value"] for cell in row] for row in cells], np.float64)
        axes.imshow(np.nan_to_num(values, nan=0.5), cmap="Blues", vmin=0.5, vmax=1.0, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            text, color = _label_cell(cells[y][x]), "w" if value > 0.8 else "k"
            axes.text(x, y, text, ha="center", va="center", color=color)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(matrix)), list(matrix))
        axes.set_title("AUROC: run (row) on set (column)")
        return encode_figure(figure, "png")


def list_columns(matrix: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sets that any run was evaluated on, its own test first."""
    return list(dict.fromkeys(name for row in matrix.values() for name in row))


def _label_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not evaluated"
    if found["value"] is None:
        return "not known"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f}\n{found['low']:.3f}–{found['high']:.3f}"
