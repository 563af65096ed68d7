"""Several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyro_bmrs.figures.style import BLUE, GREY, LEGEND_LINE, finite_rows, floats, shortened, styled_figure
from pyro_bmrs.tables import RUN_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_runs(runs: pd.DataFrame) -> Figure:
    """Draw accuracy against the parameters left, a numbered point per run, with the runs' names below.

    Args:
        runs: a row per run, numbered from 1: ``run`` (its name), ``parameters`` (left, above 0) and
            ``accuracy`` (0 to 1); maybe ``accuracy_error``, drawn as bars.

    Returns:
        A figure 5 inches wide: accuracy (%) against parameters, logarithmic.

    Raises:
        ValueError: the table lacks a column, or has no row with finite parameters above 0 and accuracy.

    Example:
        >>> import pandas as pd
        >>> figure = plot_runs(pd.DataFrame({"run": ["a", "b"], "parameters": [61706, 4657],
        ...                                  "accuracy": [0.988, 0.99]}))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['1  a: 61,706 parameters, 98.80 %', '2  b: 4,657 parameters, 99.00 %']
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    require_columns("runs", runs, RUN_COLUMNS)
    # The number is the row's in the table that was given, which may be printed beside the figure.
    table = runs.assign(number=np.arange(1, len(runs) + 1))
    positive = table[floats(table, "parameters") > 0]
    table = finite_rows("runs", positive, RUN_COLUMNS, ("parameters", "accuracy"))
    parameters, accuracy = floats(table, "parameters"), 100 * floats(table, "accuracy")
    lines = [
        f"{number}  {shortened(str(run), 30)}: {count:,.0f} parameters, {share:.2f} %"
        for number, run, count, share in zip(table["number"], table["run"], parameters, accuracy, strict=True)
    ]

    with styled_figure(3.0 + LEGEND_LINE * len(lines)) as figure:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        error = 100 * floats(table, "accuracy_error") if "accuracy_error" in table else None
        axes.errorbar(
            parameters,
            accuracy,
            error,
            linestyle="none",
            marker="o",
            markersize=6,
            color=BLUE,
            alpha=0.8,
            elinewidth=1,
        )
        axes.margins(x=0.12, y=0.2)
        if parameters.max() > 10 * parameters.min():
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        else:  # too narrow for powers of ten
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.minorticks_off()
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("parameters left (logarithmic)")
        axes.set_ylabel("accuracy (%)")
        figure.legend(
            [Line2D([], [], linestyle="none") for _ in lines], lines, loc="outside lower left",
            handlelength=0, handletextpad=0, labelspacing=0.25,
        )  # fmt: skip
        # Where the points will lie is known once the layout is.
        figure.draw_without_rendering()
        points = axes.transData.transform(np.column_stack([parameters, accuracy])) * 72 / figure.dpi
        for number, x, y, offset in zip(table["number"], parameters, accuracy, _offsets(points), strict=True):
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2}
            axes.annotate(
                str(number), (x, y), xytext=tuple(offset), textcoords="offset points", ha="center", va="center",
                fontsize=9, arrowprops=line if np.hypot(*offset) > 12 else None,
            )  # fmt: skip
    return figure


def _offsets(points: NDArray[np.float64], clear: float = 12.0) -> list[NDArray[np.float64]]:
    """Where to put the label of each point so that it meets no point and no other label. Both in points (1/72")."""
    angles = np.radians(np.arange(90, 450, 30))
    rings = [
        radius * np.column_stack([np.cos(angles), np.sin(angles)]) for radius in (10.0, 20.0, 30.0, 42.0)
    ]
    candidates = np.concatenate(rings)
    taken = points
    offsets = []
    for point in points:
        places = point + candidates
        # A label is larger than a point, so the point itself, 10 away, is far enough.
        distances = np.linalg.norm(places[:, None] - taken, axis=2)
        distances[:, : len(points)] += clear - 9.5
        # the first that is clear, or else the one with the most room
        chosen = int(np.argmax(distances.min(axis=1).clip(max=clear)))
        offsets.append(candidates[chosen])
        taken = np.concatenate([taken, places[chosen : chosen + 1]])
    return offsets
