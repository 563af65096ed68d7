"""Accuracy against the parameters removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_bmrs.figures.style import (
    BLACK,
    BLUE,
    ORANGE,
    SERIES,
    finite_rows,
    floats,
    legend,
    legend_height,
    series,
    shortened,
    styled_figure,
)
from pyro_bmrs.tables import CRITERIA_COLUMNS, CURVE_COLUMNS, MOST_CRITERIA, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# How far below the best accuracy the panel of the top reaches, in per cent points.
TOP = 5.0


def plot_compression_curve(curve: pd.DataFrame) -> Figure:
    """Draw accuracy against the share of parameters removed, and mark where the criterion stops.

    Args:
        curve: a row per network, in any order: ``parameters_removed`` (a fraction, 0 to 1), ``accuracy``
            (0 to 1), ``score_threshold`` (criterion's unit) and ``is_plan`` (true for the criterion's own
            stopping point). Rows without a finite fraction and accuracy are left out.

    Returns:
        A figure 5 inches wide, both axes in per cent.

    Raises:
        ValueError: the table lacks a column.

    Example:
        >>> import pandas as pd
        >>> figure = plot_compression_curve(pd.DataFrame({
        ...     "parameters_removed": [0.0, 0.9, 0.99], "accuracy": [0.99, 0.98, 0.6],
        ...     "score_threshold": [9.0, 0.0, -9.0], "is_plan": [False, True, False],
        ... }))
        >>> figure.axes[0].get_ylabel()
        'accuracy (%)'
    """
    require_columns("curve", curve, CURVE_COLUMNS)
    share = 100 * floats(curve, "parameters_removed")
    accuracy = 100 * floats(curve, "accuracy")
    stops = curve["is_plan"].to_numpy(dtype=bool)
    shown = np.isfinite(share) & np.isfinite(accuracy)
    order = np.flatnonzero(shown)[np.argsort(share[shown], kind="stable")]

    with styled_figure(3.3) as figure:
        axes = figure.add_subplot()
        axes.plot(
            share[order], accuracy[order], color=BLUE, marker="o", markersize=3.5, label="any threshold"
        )
        for index, row in enumerate(order[stops[order]]):
            axes.plot(
                share[row],
                accuracy[row],
                linestyle="none",
                marker="*",
                markersize=15,
                color=ORANGE,
                markeredgecolor=BLACK,
                zorder=3,
                label="where the criterion stops" if index == 0 else None,
            )
        axes.set_xlabel("parameters removed (%)")
        axes.set_ylabel("accuracy (%)")
        axes.margins(x=0.03, y=0.08)
        if len(order):
            figure.legend(loc="outside upper left", ncols=2)
    return figure


def plot_criteria(curves: pd.DataFrame) -> Figure:
    """Draw accuracy against parameters removed for several criteria, with a star where each would stop.

    The upper panel is the top 5 points below the best accuracy, the lower one everything; a single panel where
    everything lies within these 5 points.

    Args:
        curves: a row per network, in any order: ``criterion``, ``parameters_removed`` (a fraction, 0 to 1),
            ``accuracy`` (0 to 1), ``score_threshold`` (criterion's unit) and ``is_plan`` (true for the
            criterion's own stopping point), as `compression_curve` returns them, one below the other.

    Returns:
        A figure 5 inches wide, all axes in per cent.

    Raises:
        ValueError: the table lacks a column, has no row with a finite fraction and accuracy, or has more than 8
            criteria.

    Example:
        >>> import pandas as pd
        >>> figure = plot_criteria(pd.DataFrame({
        ...     "criterion": ["BMRS_N", "BMRS_N", "SNR", "SNR"], "parameters_removed": [0.0, 0.9, 0.0, 0.8],
        ...     "accuracy": [0.99, 0.98, 0.99, 0.6], "score_threshold": [9.0, 0.0, 9.0, 0.0],
        ...     "is_plan": [False, True, False, True],
        ... }))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['BMRS_N', 'SNR', 'stopping point']
    """
    from matplotlib.lines import Line2D

    table = finite_rows("curves", curves, CRITERIA_COLUMNS, ("parameters_removed", "accuracy"))
    lines = series("curves", table, ["criterion"], MOST_CRITERIA)
    labels = [*(shortened(name, 40) for (name,), _ in lines), "stopping point"]
    all_accuracies = 100 * floats(table, "accuracy")
    best, worst = float(all_accuracies.max()), float(all_accuracies.min())
    zoomed = worst < best - TOP

    with styled_figure((4.6 if zoomed else 3.1) + legend_height(labels)) as figure:
        panels = figure.subplots(
            1 + zoomed, 1, sharex=True, squeeze=False, height_ratios=(3, 2) if zoomed else None
        )[:, 0]
        handles = []
        for (_, curve), (colour, marker, style) in zip(lines, SERIES, strict=False):
            order = np.argsort(floats(curve, "parameters_removed"), kind="stable")
            share = 100 * floats(curve, "parameters_removed")[order]
            accuracy = 100 * floats(curve, "accuracy")[order]
            stops = curve["is_plan"].to_numpy(dtype=bool)[order]
            for axes in panels:
                axes.plot(
                    share,
                    accuracy,
                    color=colour,
                    linestyle=style,
                    marker=marker,
                    markersize=3.5,
                    linewidth=1.3,
                )
                # Each series has a star of its own line's colour; which one it is, its line's marker says.
                axes.plot(
                    share[stops],
                    accuracy[stops],
                    linestyle="none",
                    marker="*",
                    markersize=13,
                    color=colour,
                    markeredgecolor=BLACK,
                    markeredgewidth=0.9,
                    zorder=3,
                )
            handles.append(Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=5))
        for axes in panels:
            axes.set_ylabel("accuracy (%)")
            axes.margins(x=0.03, y=0.08)
            axes.ticklabel_format(axis="y", useOffset=False)
        if zoomed:
            panels[0].set_ylim(max(0.0, best - TOP), best + 0.1 * TOP)
            panels[0].set_title(f"the top {TOP:g} points", loc="left")
            panels[1].set_title("all", loc="left")
        panels[-1].set_xlabel("parameters removed (%)")
        handles.append(
            Line2D([], [], linestyle="none", marker="*", markersize=11, color="white", markeredgecolor=BLACK)
        )
        legend(figure, handles, labels)
    return figure
