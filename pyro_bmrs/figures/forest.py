"""The posterior of every structure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.figures.scores import Plan, structures_of
from pyro_bmrs.figures.style import (
    BLUE,
    GREY,
    LARGEST_VECTOR_MAP,
    ORANGE,
    floats,
    legend,
    plain,
    shortened,
    styled_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.05, 0.5, 0.95)
# More structures than this in a layer are closer than their marks are wide.
MOST_SHOWN = 500


def plot_forest(plan: Plan, *, log_low: float = -20.0, log_high: float = 0.0) -> Figure:
    """Draw the posterior of every structure's θ: median and 5 to 95 % interval, a panel per layer.

    Structures stand side by side, the largest median first. A filled circle is kept, a cross removed. Of more than
    500 structures in a layer, 500 are shown, evenly spaced in that order, and the title says so. Structures without
    a posterior (removed during the fit) are counted but not drawn.

    Args:
        plan: any plan with ``loc`` and ``scale`` of log θ in its table.
        log_low, log_high: bounds of log θ in the posterior; θ is drawn between them.

    Returns:
        A figure 5 inches wide: θ (dimensionless, logarithmic) against rank within the layer.

    Raises:
        ValueError: the table lacks a column, has no rows, or has none with a finite ``loc`` and ``scale``; or
            ``log_low`` is not below ``log_high``.

    Example:
        >>> import pandas as pd
        >>> from types import SimpleNamespace
        >>> table = pd.DataFrame({
        ...     "layer": "fc1", "unit": [0, 1], "loc": [-0.1, -15.0], "scale": [0.1, 3.0],
        ...     "mean": [0.9, 1e-4], "snr": [9.0, 0.1], "score": [-90.0, 2.0],
        ...     "log_evidence_change": [-91.0, 1.0], "removed": [False, True],
        ... })
        >>> figure = plot_forest(SimpleNamespace(table=table))
        >>> figure.axes[0].get_title("left"), figure.axes[0].get_title("right")
        ('fc1', '1 of 2 kept')
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator

    table = structures_of(plan)
    loc, scale = floats(table, "loc"), floats(table, "scale")
    known = np.isfinite(loc) & np.isfinite(scale) & (scale > 0)
    if not known.any():
        raise ValueError("plan.table has no row with a finite loc and scale: there is no posterior to show")
    posterior = TruncatedLogNormal(
        torch.from_numpy(loc[known]), torch.from_numpy(scale[known]), log_low, log_high, validate_args=True
    )
    quantiles = np.full((len(QUANTILES), len(table)), np.nan)
    for row, probability in zip(quantiles, QUANTILES, strict=True):
        row[known] = posterior.icdf(torch.tensor(probability, dtype=torch.float64)).numpy()
    low, median, high = np.maximum(quantiles, math.exp(log_low))
    removed = table["removed"].to_numpy(dtype=bool)
    codes, layers = table["layer"].factorize(sort=False)

    panels: list[tuple[str, str, NDArray[np.intp], NDArray[np.intp], int]] = []
    for code, layer in enumerate(layers):
        rows = np.flatnonzero((codes == code) & known)
        if not len(rows):
            continue
        total = int((codes == code).sum())
        kept = f"{int((~removed[codes == code]).sum()):,} of {total:,} kept"
        rank = np.arange(len(rows))
        if len(rows) > MOST_SHOWN:
            rank = np.linspace(0, len(rows) - 1, MOST_SHOWN).round().astype(np.intp)
            kept += f", {MOST_SHOWN} shown"
        rows = rows[np.argsort(-median[rows], kind="stable")][rank]
        panels.append((str(layer), kept, rows, rank + 1, total))

    with styled_figure(0.75 + 1.5 * len(panels)) as figure:
        all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        as_image = sum(len(panel[2]) for panel in panels) > LARGEST_VECTOR_MAP
        for axes, (layer, kept, rows, rank, total) in zip(all_axes, panels, strict=True):
            axes.set_yscale("log")
            size = float(np.clip(300 / len(rows), 2.0, 6.0))
            for chosen, colour, marker in ((~removed[rows], BLUE, "o"), (removed[rows], ORANGE, "x")):
                shown = rows[chosen]
                if not len(shown):
                    continue
                axes.vlines(
                    rank[chosen], low[shown], high[shown],
                    color=colour, linewidth=size / 3.5, alpha=0.55, rasterized=as_image,
                )  # fmt: skip
                axes.plot(
                    rank[chosen], median[shown], color=colour, linestyle="none", marker=marker,
                    markersize=size, markeredgewidth=1.4 if size > 4 else 0.8, rasterized=as_image,
                )  # fmt: skip
            room = 0.04 * (log_high - log_low)
            axes.set_ylim(math.exp(log_low - room), math.exp(log_high + room))
            axes.set_xlim(0.5 - 0.01 * total, rank[-1] + 0.5 + 0.01 * total)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_major_formatter(_power)
            axes.minorticks_off()
            ticks = MaxNLocator(6, integer=True, min_n_ticks=1).tick_values(1, rank[-1])
            axes.set_xticks([tick for tick in ticks if 1 <= tick <= rank[-1]])  # ranks begin at 1
            axes.xaxis.set_major_formatter(plain)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel("θ")
            letters = 24 if len(kept) <= 22 else 16
            axes.set_title(shortened(layer, letters), loc="left", weight="bold", parse_math=False)
            axes.set_title(kept, loc="right", color="#444444")
        all_axes[-1].set_xlabel("structure, largest median first")
        figure.align_ylabels()
        handles = [
            Line2D(
                [], [], linestyle="none", marker=marker, color=colour, markersize=size, markeredgewidth=1.4
            )
            for marker, colour, size in (("o", BLUE, 6), ("x", ORANGE, 6), ("|", GREY, 11))
        ]
        legend(figure, handles, ["kept", "removed", "5–95 %"])
    return figure


def _power(value: float, position: float = 0.0) -> str:
    """A power of ten without mathematical markup, which the figures don't parse."""
    exponent = str(round(math.log10(value)))
    return "1" if exponent == "0" else "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
