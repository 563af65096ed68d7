"""Accuracy against the parameters removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_bmrs.figures.style import (
    BLACK,
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
STAR: dict[str, Any] = dict(linestyle="none", marker="*", markeredgecolor=BLACK, markeredgewidth=0.9)


def plot_compression_curve(curve: pd.DataFrame) -> Figure:
    """Draw accuracy, or loss where there are no classes, against the share of parameters removed; a star is the plan.

    Args:
        curve: what `compression_curve` returned: a row per plan, in any order, with ``parameters_removed`` and
            ``accuracy`` (0 to 1), ``loss`` (nats per example) and ``is_plan`` (true for the plan itself). Rows without
            a finite share and accuracy, or loss, are left out.

    Returns:
        A figure as that of `plot_criteria`.

    Raises:
        ValueError: the table lacks a column, or has no row with a finite share and accuracy.

    Example:
        >>> import pandas as pd
        >>> figure = plot_compression_curve(pd.DataFrame({
        ...     "parameters_removed": [0.0, 0.9, 0.99], "accuracy": [0.99, 0.98, 0.6],
        ...     "loss": [0.1, 0.2, 1.0], "is_plan": [False, True, False],
        ... }))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['any threshold', 'plan']
    """
    require_columns("curve", curve, CURVE_COLUMNS)
    return plot_criteria(curve.assign(criterion="any threshold"))


def plot_criteria(curves: pd.DataFrame) -> Figure:
    """Draw accuracy, or loss, against parameters removed for several criteria, with a star at the plan of each.

    The upper panel shows the top 5 points below the best accuracy, the lower one everything. There is one panel
    where everything lies within these 5 points, and for losses.

    Args:
        curves: tables of `compression_curve` one below the other, with the column ``criterion``.

    Returns:
        A figure 5 inches wide, all axes in per cent.

    Raises:
        ValueError: the table lacks a column, has no row with a finite share and accuracy, or has more than 8
            criteria.

    Example:
        >>> import pandas as pd
        >>> figure = plot_criteria(pd.DataFrame({
        ...     "criterion": ["BMRS_N", "BMRS_N", "SNR", "SNR"], "parameters_removed": [0.0, 0.9, 0.0, 0.8],
        ...     "accuracy": [0.99, 0.98, 0.99, 0.6], "loss": [0.1, 0.2, 0.1, 1.0],
        ...     "is_plan": [False, True, False, True],
        ... }))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['BMRS_N', 'SNR', 'plan']
    """
    from matplotlib.lines import Line2D

    require_columns("curves", curves, CRITERIA_COLUMNS)
    classes = curves["accuracy"].notna().any()
    places = ["parameters_removed", "accuracy" if classes else "loss"]
    table = finite_rows("curves", curves, CRITERIA_COLUMNS, places)
    lines = series("curves", table, ["criterion"], MOST_CRITERIA)
    labels = [*(shortened(name, 40) for (name,), _ in lines), "plan"]
    best, worst = 100 * table[places[1]].max(), 100 * table[places[1]].min()
    zoomed = bool(classes and worst < best - TOP)

    with styled_figure((4.6 if zoomed else 3.1) + legend_height(labels)) as figure:
        panels = figure.subplots(
            1 + zoomed, 1, sharex=True, squeeze=False, height_ratios=(3, 2) if zoomed else None
        )[:, 0]
        for axes in panels:
            handles = []
            for (_, rows), look in zip(lines, SERIES, strict=False):
                curve = rows.sort_values(places[0], kind="stable")
                share, measured = (
                    100 * floats(curve, places[0]),
                    (100 if classes else 1) * floats(curve, places[1]),
                )
                stops = curve["is_plan"].to_numpy(dtype=bool)
                handles += axes.plot(share, measured, **look, markersize=3.5, linewidth=1.3)
                # Each star has the colour of its line; the line's marker tells the same without colour.
                axes.plot(share[stops], measured[stops], color=look["color"], markersize=13, zorder=3, **STAR)
            axes.set_ylabel("accuracy (%)" if classes else "loss (nats)")
            axes.margins(x=0.03, y=0.08)
            axes.ticklabel_format(axis="y", useOffset=False)
        if zoomed:
            panels[0].set_ylim(max(0.0, best - TOP), best + 0.1 * TOP)
            panels[0].set_title(f"the top {TOP:g} points", loc="left")
            panels[1].set_title("all", loc="left")
        panels[-1].set_xlabel("parameters removed (%)")
        legend(figure, [*handles, Line2D([], [], color="white", markersize=11, **STAR)], labels)
    return figure
