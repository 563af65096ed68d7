"""The widths of the layers before and after a reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_bmrs.figures.style import (
    BLACK,
    BLUE,
    LARGEST_LINEAR_RATIO,
    finite_rows,
    floats,
    legend,
    plain,
    shortened,
    styled_figure,
)
from pyro_bmrs.tables import WIDTH_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_widths(widths: pd.DataFrame) -> Figure:
    """Draw the width of each layer before the reduction, as an outline, and after it, filled.

    Args:
        widths: a row per layer, the first on top: ``layer``, ``before`` and ``after`` (structures).

    Returns:
        A figure 5 inches wide, as high as the layers need; the axis is logarithmic where the widest layer has
        more than 50 times the structures of the narrowest.

    Raises:
        ValueError: the table lacks a column, or has no row with finite widths.

    Example:
        >>> import pandas as pd
        >>> figure = plot_widths(pd.DataFrame({"layer": ["conv1", "fc1"], "before": [6, 120], "after": [6, 11]}))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['6 → 6', '120 → 11']
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    table = finite_rows("widths", widths, WIDTH_COLUMNS, ("before", "after"))
    before, after = floats(table, "before"), floats(table, "after")
    position = np.arange(len(table))
    widest = float(max(before.max(), after.max(), 1.0))
    narrowest = before[before > 0].min(initial=widest)
    logarithmic = widest / narrowest > LARGEST_LINEAR_RATIO
    numbers = [f"{first:,.0f} → {second:,.0f}" for first, second in zip(before, after, strict=True)]
    # Room for the longest of the numbers, as a share of the axis.
    room = 0.03 + 0.024 * max(map(len, numbers))

    with styled_figure(0.85 + 0.24 * max(len(table), 3)) as figure:
        axes = figure.add_subplot()
        drawn = [
            axes.barh(position, width, height=0.74, facecolor=colour, edgecolor=BLACK, linewidth=0.9)
            for width, colour in ((before, "white"), (after, BLUE))
        ]
        if logarithmic:
            axes.set_xscale("log")
            left = 0.7 * min(narrowest, after[after > 0].min(initial=widest))
            axes.set_xlim(left, widest * (widest / left) ** (room / (1 - room)))
            ticks = LogLocator(numticks=6).tick_values(left, widest)
            axes.set_xticks([tick for tick in ticks if left <= tick <= widest])
            axes.minorticks_off()
        else:
            axes.set_xlim(0, widest / (1 - room))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(plain)
        for place, first, second, text in zip(position, before, after, numbers, strict=True):
            axes.annotate(
                text, (max(first, second), place), xytext=(4, 0), textcoords="offset points",
                va="center_baseline", fontsize=9,
            )  # fmt: skip
        axes.set_ylim(len(table) - 0.4, -0.6)
        names = [shortened(str(layer), 24) for layer in table["layer"]]
        axes.set_yticks(position, labels=names, fontsize=9, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("structures (logarithmic)" if logarithmic else "structures")
        legend(figure, drawn, ["before", "after"])
    return figure
