"""How far the predicted probabilities of a network can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_bmrs.figures.style import (
    GREY,
    SERIES,
    finite_rows,
    floats,
    legend,
    legend_height,
    plain,
    series,
    series_by_network,
    shortened,
    styled_figure,
)
from pyro_bmrs.tables import ENTROPY_COLUMNS, RELIABILITY_COLUMNS, RISK_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# The accuracy of a bin with fewer examples is mostly chance: ±30 points at 10.
FEW_EXAMPLES = 10
# In-distribution entropy piles up at zero: heights that differ by more than this need a logarithmic axis.
LARGEST_LINEAR_DENSITY = 10.0
ENTROPY_BINS = 32
HATCHES = (None, "////", "\\\\\\\\", "|||")
MOST_DATA = 4


def plot_reliability(reliability: pd.DataFrame) -> Figure:
    """Draw accuracy against confidence, with the diagonal of perfect calibration, and the examples per bin.

    A line per pair of network and prediction. Bins with fewer than 10 examples have a small pale marker.

    Args:
        reliability: a row per bin: ``network`` and ``prediction`` (e.g. "draws" or "mean"), ``lower`` and
            ``upper`` (edges of the bin, 0 to 1), ``count`` (examples), ``confidence`` (mean of the bin, 0 to
            1) and ``accuracy`` (0 to 1). Empty bins are left out.

    Returns:
        A figure 5 inches wide, all axes in per cent; the shares of a line add up to 100 %, and their axis is
        logarithmic.

    Raises:
        ValueError: the table lacks a column, has no bin with a finite confidence and accuracy, or more than 6
            pairs of network and prediction.

    Example:
        >>> import pandas as pd
        >>> figure = plot_reliability(pd.DataFrame({
        ...     "network": "full", "prediction": "mean", "lower": [0.0, 0.5], "upper": [0.5, 1.0],
        ...     "count": [20, 80], "confidence": [0.4, 0.9], "accuracy": [0.3, 0.8],
        ... }))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['accuracy (%)', 'examples (%)']
    """
    from matplotlib.lines import Line2D

    table = finite_rows("reliability", reliability, RELIABILITY_COLUMNS, ("confidence", "accuracy"))
    lines = series_by_network("reliability", table)
    labels = [label for label, _ in lines]
    few_anywhere = bool((floats(table, "count") < FEW_EXAMPLES).any())
    labels += ["perfectly calibrated"] + [f"under {FEW_EXAMPLES} examples"] * few_anywhere

    with styled_figure(4.4 + legend_height(labels)) as figure:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linewidth=1, zorder=1)
        handles = []
        for (_, bins), look in zip(lines, SERIES, strict=False):
            bins = bins.sort_values("confidence", kind="stable")
            confidence, accuracy = 100 * floats(bins, "confidence"), 100 * floats(bins, "accuracy")
            count = floats(bins, "count")
            few = ~(count >= FEW_EXAMPLES)
            # The line to a bin of few examples is as pale as its marker: its course is chance.
            for shown, strength in ((np.ones_like(few), 0.3), (~few, 1.0)):
                line = {**look, "marker": None}
                upper.plot(confidence[shown], accuracy[shown], **line, linewidth=1.4, alpha=strength)
            for shown, size, strength in ((~few, 5.5, 1.0), (few, 4.0, 0.5)):
                markers = {**look, "linestyle": "none", "markersize": size, "markeredgecolor": "none"}
                upper.plot(confidence[shown], accuracy[shown], **markers, alpha=strength)
            share = 100 * count / np.nansum(count)
            handles += lower.plot(confidence, share, **look, markersize=3.5, linewidth=1.2)
        lowest = 100 * float(np.nanmin(floats(table, "lower"), initial=1.0))
        upper.set_xlim(lowest - 2, 102)
        # 0 to 100 as on the axis of confidence: a network that is always wrong is drawn as clearly as one that
        # is always right.
        upper.set_ylim(-3, 103)
        upper.set_ylabel("accuracy (%)")
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(plain)
        lower.minorticks_off()
        lower.margins(y=0.15)
        lower.set_ylabel("examples (%)")
        lower.set_xlabel("confidence (%)")
        figure.align_ylabels()
        handles.append(Line2D([], [], color=GREY, linewidth=1))
        if few_anywhere:
            handles.append(
                Line2D([], [], linestyle="none", marker="o", markersize=3.5, color=GREY, alpha=0.6)
            )
        legend(figure, handles, labels)
    return figure


def plot_risk_coverage(table: pd.DataFrame) -> Figure:
    """Draw the error among the examples a network answers against the share that it answers.

    A line per pair of network and prediction.

    Args:
        table: rows in any order: ``network`` and ``prediction`` (e.g. "draws" or "mean"), ``coverage`` (share
            of the examples answered, the most confident first, 0 to 1) and ``risk`` (share of these that is
            wrong, 0 to 1).

    Returns:
        A figure 5 inches wide, both axes in per cent.

    Raises:
        ValueError: the table lacks a column, has no row with a finite coverage and risk, or more than 6 pairs
            of network and prediction.

    Example:
        >>> import pandas as pd
        >>> figure = plot_risk_coverage(pd.DataFrame({
        ...     "network": "full", "prediction": "mean", "coverage": [0.5, 1.0], "risk": [0.0, 0.02],
        ... }))
        >>> figure.axes[0].get_ylabel()
        'wrong among the answered (%)'
    """
    shown = finite_rows("risk_coverage", table, RISK_COLUMNS, ("coverage", "risk"))
    lines = series_by_network("risk_coverage", shown)
    labels = [label for label, _ in lines]

    with styled_figure(3.1 + legend_height(labels)) as figure:
        axes = figure.add_subplot()
        handles = []
        for index, ((_, curve), look) in enumerate(zip(lines, SERIES, strict=False)):
            curve = curve.sort_values("coverage", kind="stable")
            coverage = floats(curve, "coverage")
            # Each line has its markers elsewhere, so that they don't hide each other where the lines meet.
            marked = np.linspace(0.04, 1, 7) - 0.02 * index
            handles += axes.plot(
                100 * coverage, 100 * floats(curve, "risk"),
                **look, markersize=5, linewidth=1.4,
                # A curve has as many points as there are examples.
                markevery=np.unique(np.searchsorted(coverage, marked).clip(max=len(coverage) - 1)).tolist(),
            )  # fmt: skip
        axes.set_xlim(0, 101)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("answered, most confident first (%)")
        axes.set_ylabel("wrong among the answered (%)")
        legend(figure, handles, labels)
    return figure


def plot_entropy(entropies: pd.DataFrame) -> Figure:
    """Draw the distribution of the predictive entropy, of data like the training's and of other data.

    Args:
        entropies: a row per example: ``data`` (what the example is from, e.g. "test" or the name of another
            data set; the first to appear is filled, the others are hatched) and ``entropy`` (of the predicted
            classes, nats, 0 or more).

    Returns:
        A figure 5 inches wide: density (per nat) against entropy (nats), on equal bins for all; logarithmic
        upwards where the highest peak would hide the others.

    Raises:
        ValueError: the table lacks a column, has no row with a finite entropy, or more than 4 kinds of data.

    Example:
        >>> import pandas as pd
        >>> figure = plot_entropy(pd.DataFrame({
        ...     "data": ["test", "test", "letters"], "entropy": [0.01, 0.02, 1.2],
        ... }))
        >>> figure.axes[0].get_xlabel()
        'entropy of the prediction (nats)'
    """
    from matplotlib.colors import to_rgba

    table = finite_rows("entropies", entropies, ENTROPY_COLUMNS, ("entropy",))
    kinds = [
        (shortened(name, 20), floats(rows, "entropy"))
        for (name,), rows in series("entropies", table, ["data"], MOST_DATA)
    ]
    values = floats(table, "entropy")
    # An entropy computed in float32 can be a hair below zero.
    edges = np.linspace(min(0.0, float(values.min())), max(0.0, float(values.max())) or 1.0, ENTROPY_BINS + 1)
    densities = [np.histogram(entropy, edges, density=True)[0] for _, entropy in kinds]
    peaks = [float(density.max()) for density in densities]
    logarithmic = max(peaks) > LARGEST_LINEAR_DENSITY * min(peaks)
    labels = [
        f"{name}: {len(entropy):,}, median {plain(float(f'{np.median(entropy):.2g}'))}"
        for name, entropy in kinds
    ]

    with styled_figure(3.1 + legend_height(labels)) as figure:
        axes = figure.add_subplot()
        # A step down to the axis, and on a logarithmic one to less than a single example's height.
        floor = 0.5 * min(density[density > 0].min() for density in densities) if logarithmic else 0.0
        handles = []
        for density, look, hatch in zip(densities, SERIES, HATCHES, strict=False):
            handles.append(
                axes.stairs(
                    np.maximum(density, floor),
                    edges,
                    baseline=floor,
                    fill=True,
                    hatch=hatch,
                    linewidth=1.2,
                    facecolor=to_rgba(look["color"], 0.55 if hatch is None else 0.1),
                    edgecolor=look["color"],
                )
            )
        if logarithmic:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(plain)
        axes.set_ylim(bottom=floor)
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("entropy of the prediction (nats)")
        axes.set_ylabel("density (per nat)")
        legend(figure, handles, labels)
    return figure
