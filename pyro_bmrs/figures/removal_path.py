"""The path of removals of a trained network: its evidence, and the rise of its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_bmrs.figures.style import BLACK, BLUE, ORANGE, finite_rows, floats, legend, plain, styled_figure
from pyro_bmrs.tables import PATH_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_removal_path(path: pd.DataFrame, chosen: int | None = None) -> Figure:
    """Draw the total ΔF along a path, and the rise of the loss, predicted and measured.

    Args:
        path: of a `LaplacePlan`: a row per structure in the order of removal, with ``parameters`` (left after it),
            ``total_loss_rise``, ``measured_loss_rise`` and ``total_evidence_change`` (nats of the data set). Rows
            without a ΔF are left out.
        chosen: how many structures the plan removes; None marks nothing.

    Returns:
        A figure 5 inches wide, of two panels.

    Raises:
        ValueError: the table lacks a column, or has no row with a finite ΔF.

    Example:
        >>> import pandas as pd
        >>> figure = plot_removal_path(pd.DataFrame({
        ...     "parameters": [90, 50, 20], "total_loss_rise": [1.0, 5.0, 30.0],
        ...     "measured_loss_rise": [float("nan"), 6.0, 90.0], "total_evidence_change": [20.0, 60.0, 10.0],
        ... }), chosen=2)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['total ΔF (nats)', 'rise of the loss (nats)']
    """
    table = finite_rows(
        "plan.path", path, PATH_COLUMNS, ("parameters", "total_evidence_change", "total_loss_rise")
    )
    left, evidence = floats(table, "parameters"), floats(table, "total_evidence_change")
    measured = table[np.isfinite(floats(table, "measured_loss_rise"))]
    with styled_figure(4.6) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        (line,) = above.plot(left, evidence, color=BLUE)
        above.axhline(0.0, color=BLACK, linewidth=0.8)
        (predicted,) = below.plot(left, floats(table, "total_loss_rise"), color=BLUE, linestyle="--")
        (seen,) = below.plot(
            floats(measured, "parameters"),
            floats(measured, "measured_loss_rise"),
            color=ORANGE,
            marker="o",
            linestyle="none",
        )
        below.set_yscale("symlog", linthresh=max(float(np.abs(evidence).max()) * 1e-3, 1e-9))
        below.yaxis.set_major_formatter(plain)
        handles, names = [line, predicted, seen], ["ΔF", "predicted", "measured"]
        if chosen is not None and 0 < chosen <= len(path):
            place = float(path["parameters"].iloc[chosen - 1])
            for axes in (above, below):
                mark = axes.axvline(place, color=BLACK, linestyle=":", linewidth=1.2)
            handles.append(mark)
            names.append("plan")
        # much of the evidence may be below 0 where nearly all is away
        best = float(evidence.max())
        if best > 0:
            above.set_ylim(bottom=max(float(evidence.min()), -best))
        below.invert_xaxis()
        above.set_ylabel("total ΔF (nats)")
        below.set_ylabel("rise of the loss (nats)")
        below.set_xlabel("parameters left")
        legend(figure, handles, names)
    return figure
