"""Accuracy, error or loss, against what networks of all sizes cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmrs.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    finite_rows,
    floats,
    legend,
    styled_figure,
)
from pyro_bmrs.tables import FRONTIER_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# How far below the best accuracy the figure reaches, in points.
SHOWN = 15.0
# What is drawn: the first that is known.
_HEIGHTS = {"accuracy": "accuracy (%)", "rmse": "root mean square error", "loss": "loss (nats)"}
# Of the full network's cost: the column and its name, and what a budget calls it.
_COSTS = {
    "parameters": ("parameters", "parameters left (%)"),
    "macs": ("multiply_accumulates", "multiply-adds left (%)"),
    "milliseconds": ("milliseconds", "time of one example left (%)"),
}
_MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "is_evidence": ("evidence's choice", {"marker": "D", "color": GREEN, "markersize": 8}),
    "is_one_standard_error": ("one standard error", {"marker": "s", "color": ORANGE, "markersize": 9}),
    "is_plan": ("plan", {"marker": "*", "color": BLUE, "markersize": 13}),
}


def plot_frontier(table: pd.DataFrame, budget: Mapping[str, float] | None = None) -> Figure:
    """Draw accuracy, or where there are no classes the error or else the loss, against the share left of each cost.

    Args:
        table: of a `Frontier`, the largest network first, whose costs count as 100 %.
        budget: what was asked for, by name; costs among them are drawn as lines.

    Returns:
        A figure 5 inches wide, a panel for each cost that was measured. The band is one standard error of the loss;
        for an accuracy p of n examples none is drawn.

    Raises:
        ValueError: the table lacks a column, or has no row with finite parameters and loss.

    Example:
        >>> import pandas as pd
        >>> figure = plot_frontier(pd.DataFrame({
        ...     "parameters": [100, 50, 10], "multiply_accumulates": [900, 300, 50], "milliseconds": float("nan"),
        ...     "loss": [0.1, 0.11, 0.5], "standard_error": 0.01, "accuracy": [0.97, 0.97, 0.8], "rmse": float("nan"),
        ...     "is_plan": [False, True, False], "is_evidence": [False, True, False],
        ...     "is_one_standard_error": [False, True, False],
        ... }), {"parameters": 60.0})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['parameters left (%)', 'multiply-adds left (%)']
    """
    from matplotlib.lines import Line2D

    table = finite_rows("table", table, FRONTIER_COLUMNS, ("parameters", "loss"))
    measure = next(name for name in _HEIGHTS if np.isfinite(floats(table, name)).any())
    classes = measure == "accuracy"
    height = floats(table, measure) * (100 if classes else 1)
    shown = {name: cost for name, cost in _COSTS.items() if np.isfinite(floats(table, cost[0])).all()}
    marks = [(name, *mark) for name, mark in _MARKS.items() if table[name].any()]
    limits = {name: limit for name, limit in (budget or {}).items() if name in shown}
    with styled_figure(0.5 + 2.4 * len(shown)) as figure:
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, (name, (column, label)) in zip(panels, shown.items(), strict=True):
            cost = floats(table, column)
            left = 100 * cost / cost[0]
            order = np.argsort(left, kind="stable")
            # times need not fall with the size
            line = "none" if name == "milliseconds" else "-"
            axes.plot(
                left[order],
                height[order],
                color=BLUE,
                marker="o",
                markersize=3.5,
                linewidth=1.3,
                linestyle=line,
            )
            if measure == "loss":
                error = np.nan_to_num(floats(table, "standard_error"))
                axes.fill_between(
                    left[order], (height - error)[order], (height + error)[order], color=BLUE, alpha=0.15
                )
            for mark, _, look in marks:
                here = table[mark].to_numpy(dtype=bool)
                axes.plot(left[here], height[here], linestyle="none", markeredgecolor=BLACK, zorder=3, **look)
            if name in limits:
                axes.axvline(100 * limits[name] / cost[0], color=GREY, linestyle="--", linewidth=1.2)
            if classes:  # the smallest networks guess, which would hide all others
                axes.set_ylim(bottom=max(height.min(), height.max() - SHOWN) - 0.5)
            axes.invert_xaxis()
            axes.set_xlabel(label)
            axes.set_ylabel(_HEIGHTS[measure])
            axes.ticklabel_format(axis="y", useOffset=False)
        handles = [Line2D([], [], color=BLUE, marker="o", markersize=3.5)]
        handles += [Line2D([], [], linestyle="none", markeredgecolor=BLACK, **look) for _, _, look in marks]
        names = ["sizes", *(name for _, name, _ in marks)]
        if limits:
            handles.append(Line2D([], [], color=GREY, linestyle="--"))
            names.append("budget")
        legend(figure, handles, names)
    return figure
