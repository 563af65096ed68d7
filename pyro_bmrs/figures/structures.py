"""The map of all structures: what was kept, what was removed, and how clear each case was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_bmrs.figures.scores import (
    LARGEST_LINEAR_SCORE,
    Plan,
    decades,
    finite_threshold,
    largest_score,
    score_label,
    structures_of,
)
from pyro_bmrs.figures.style import (
    FIGURE_WIDTH,
    LARGEST_VECTOR_MAP,
    MARGIN,
    floats,
    plain,
    shortened,
    styled_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Grey in the middle, not white: a removed structure is drawn as an outline and has to stay visible.
SCORE_COLOURS = ("#08306b", "#2f7fc1", "#a3a3a3", "#e08214", "#7f3b08")


def plot_structures(plan: Plan) -> Figure:
    """Map every structure of every layer: what was kept, what was removed, and how clear each case was.

    Each layer is a row of cells, wrapped where it is long. A cell is a structure; they are sorted by score, the
    clearest to keep first. A filled cell is kept, a crossed one removed. Its colour is the distance of the score from
    the threshold, on a scale that is logarithmic where distances exceed 10.

    Args:
        plan: any plan; its ``table`` and ``rule`` are read.

    Returns:
        A figure 5 inches wide, as high as the structures need.

    Raises:
        ValueError: the table lacks a column, or has no rows.

    Example:
        >>> import pandas as pd
        >>> from types import SimpleNamespace
        >>> table = pd.DataFrame({
        ...     "layer": "fc1", "unit": [0, 1], "loc": [-0.1, -15.0], "scale": [0.1, 3.0],
        ...     "mean": [0.9, 1e-4], "snr": [9.0, 0.1], "score": [-90.0, 2.0],
        ...     "log_evidence_change": [-91.0, 1.0], "removed": [False, True],
        ... })
        >>> from pyro_bmrs import Rule
        >>> figure = plot_structures(SimpleNamespace(table=table, rule=Rule(criterion="BMRS_N", prior_log_odds=0.0)))
        >>> float(figure.get_figwidth())
        5.0
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, SymLogNorm
    from matplotlib.lines import Line2D
    from matplotlib.path import Path as Outline

    table = structures_of(plan)
    threshold = finite_threshold(plan.rule) or 0.0
    scores = floats(table, "score") - threshold
    removed = table["removed"].to_numpy(dtype=bool)
    codes, layers = table["layer"].factorize(sort=False)
    largest = largest_score(scores)
    widest = int(np.bincount(codes).max())
    columns = 80 if len(table) > LARGEST_VECTOR_MAP else max(20, min(40, widest))
    cell = (FIGURE_WIDTH - 2 * MARGIN) / columns

    # All lengths in inches, downwards from the top edge.
    header, heading, gap, footer = 0.35, 0.22, 0.12, 0.65
    crossed = Outline(
        [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)],
        [1, 2, 2, 2, 2, 2, 1, 2],
    )
    horizontal, vertical = np.empty(len(table)), np.empty(len(table))
    headings: list[tuple[float, str, str]] = []
    top = header
    for code, layer in enumerate(layers):
        rows = np.flatnonzero(codes == code)
        # A score that is no number sorts last.
        rows = rows[np.argsort(scores[rows], kind="stable")]
        position = np.arange(len(rows))
        headings.append((top, str(layer), f"{int((~removed[rows]).sum()):,} of {len(rows):,} kept"))
        top += heading
        horizontal[rows] = MARGIN + (position % columns + 0.5) * cell
        vertical[rows] = top + (position // columns + 0.5) * cell
        top += math.ceil(len(rows) / columns) * cell + gap
    height = top + footer

    norm = (
        SymLogNorm(linthresh=1.0, vmin=-largest, vmax=largest)
        if largest > LARGEST_LINEAR_SCORE
        else Normalize(vmin=-largest, vmax=largest)
    )
    colours = ScalarMappable(norm, LinearSegmentedColormap.from_list("score", SCORE_COLOURS))
    # A score that is no number gets the middle's grey.
    painted = colours.to_rgba(np.where(np.isfinite(scores), scores, 0.0))

    with styled_figure(height, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, FIGURE_WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        side = cell * 72
        line_width = min(1.2, side / 8)
        for chosen, marker, share in ((~removed, "s", 0.82), (removed, crossed, 0.72)):
            axes.scatter(
                horizontal[chosen], vertical[chosen], s=(share * side) ** 2, marker=marker, linewidths=line_width,
                facecolors=painted[chosen] if marker == "s" else "none",
                edgecolors="none" if marker == "s" else painted[chosen],
                rasterized=len(table) > LARGEST_VECTOR_MAP,
            )  # fmt: skip
        for place, layer, count in headings:
            below = place + 0.6 * heading
            axes.text(MARGIN, below, shortened(layer, 44), va="center", weight="bold", parse_math=False)
            axes.text(FIGURE_WIDTH - MARGIN, below, count, va="center", ha="right", color="#444444")
        shapes = [
            Line2D([], [], linestyle="none", marker="s", markersize=8, color=SCORE_COLOURS[1]),
            Line2D(
                [],
                [],
                linestyle="none",
                marker=crossed,
                markersize=7,
                color=SCORE_COLOURS[3],
                fillstyle="none",
            ),
        ]
        figure.legend(
            shapes, ["kept", "removed"], loc="upper left", ncols=2, borderaxespad=0.2, handletextpad=0.2
        )
        bar_width = FIGURE_WIDTH - 6 * MARGIN
        bar_axes = figure.add_axes(
            (3 * MARGIN / FIGURE_WIDTH, 0.48 / height, bar_width / FIGURE_WIDTH, 0.12 / height)
        )
        bar = figure.colorbar(colours, cax=bar_axes, orientation="horizontal")
        bar.outline.set_visible(False)
        if largest > LARGEST_LINEAR_SCORE:
            bar.set_ticks(decades(-largest, largest))
        bar.ax.xaxis.set_major_formatter(plain)
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=9, pad=2)
        label = score_label(plan.rule) + (f", above {threshold:.4g}" if threshold else "")
        bar.set_label(f"← keep | {label} | remove →", parse_math=False, labelpad=2)
    return figure
