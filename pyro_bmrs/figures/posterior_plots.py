"""Figures of posteriors, predictions and runs: what each unit's θ is, how far the probabilities can be trusted.

As in `plots`: a figure of its own from every function, no global plotting state, and what belongs together is
told apart by shape, line or hatch as well as by colour. Rows with numbers that are missing or infinite are left
out; a table in which nothing is left raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.figures.plots import (
    BLACK,
    BLUE,
    GREEN,
    LARGEST_VECTOR_MAP,
    ORANGE,
    STYLE,
    _floats,
    _plain,
    _shortened,
    _units,
    new_figure,
    require_columns,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from pyro_bmrs.pruning import Plan

RELIABILITY_COLUMNS = ("network", "prediction", "lower", "upper", "count", "confidence", "accuracy")
WIDTH_COLUMNS = ("layer", "before", "after")
CRITERIA_COLUMNS = ("criterion", "parameters_removed", "accuracy", "score_threshold", "is_plan")
RISK_COLUMNS = ("network", "prediction", "coverage", "risk")
RUN_COLUMNS = ("run", "parameters", "accuracy")
ENTROPY_COLUMNS = ("data", "entropy")

QUANTILES = (0.05, 0.5, 0.95)
# More units than this in a layer are closer than their marks are wide.
MOST_UNITS = 500
# The accuracy of a bin with fewer examples is mostly chance: ±30 points at 10.
FEW_EXAMPLES = 10
# Widths that span more than this factor are drawn on a logarithmic axis.
LARGEST_LINEAR_RATIO = 50.0
# How far below the best accuracy the panel of the top reaches, in per cent points.
TOP = 5.0
# In-distribution entropy piles up at zero: heights that differ by more than this need a logarithmic axis.
LARGEST_LINEAR_DENSITY = 10.0
ENTROPY_BINS = 32

MOST_NETWORKS, MOST_CRITERIA, MOST_DATA = 6, 8, 4
GREY = "#777777"
# Colour (Okabe and Ito's), marker and line of each series.
SERIES: tuple[tuple[str, str, Any], ...] = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    ("#CC79A7", "D", (0, (6, 1, 1, 1, 1, 1))),
    (BLACK, "v", ":"),
    ("#56B4E9", "P", (0, (8, 2))),
    ("#E69F00", "X", (0, (3, 1, 1, 1))),
    (GREY, "p", (0, (2, 1))),
)
HATCHES = (None, "////", "\\\\\\\\", "|||")
LEGEND_LINE = 0.19  # inches


def plot_forest(plan: Plan, *, log_low: float = -20.0, log_high: float = 0.0) -> Figure:
    """Draw the posterior of every unit's θ: median and 5 to 95 % interval, a panel per layer.

    Units stand side by side, the largest median first. A filled circle is kept, a cross removed. Above 500
    units in a layer 500 of them are shown, evenly spaced in that order, and the title says so. Units without
    a posterior (removed during the fit) are counted but not drawn.

    Args:
        plan: has ``table``, as for :func:`plot_structures`; ``loc`` and ``scale`` are of log θ.
        log_low: lower bound of log θ in the posterior, and the axis's lower end.
        log_high: upper bound of log θ.

    Returns:
        A figure 5 inches wide: θ (dimensionless, logarithmic) against the unit's rank within its layer.

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
    from matplotlib import rc_context
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator

    table = _units(plan)
    loc, scale = _floats(table, "loc"), _floats(table, "scale")
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
        if len(rows) > MOST_UNITS:
            rank = np.linspace(0, len(rows) - 1, MOST_UNITS).round().astype(np.intp)
            kept += f", {MOST_UNITS} shown"
        rows = rows[np.argsort(-median[rows], kind="stable")][rank]
        panels.append((str(layer), kept, rows, rank + 1, total))

    with rc_context(STYLE):
        figure = new_figure(0.75 + 1.5 * len(panels))
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
                    rank[chosen],
                    low[shown],
                    high[shown],
                    color=colour,
                    linewidth=size / 3.5,
                    alpha=0.55,
                    rasterized=as_image,
                )
                axes.plot(
                    rank[chosen],
                    median[shown],
                    linestyle="none",
                    marker=marker,
                    markersize=size,
                    markeredgewidth=1.4 if size > 4 else 0.8,
                    color=colour,
                    rasterized=as_image,
                )
            room = 0.04 * (log_high - log_low)
            axes.set_ylim(math.exp(log_low - room), math.exp(log_high + room))
            axes.set_xlim(0.5 - 0.01 * total, rank[-1] + 0.5 + 0.01 * total)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_major_formatter(_power)
            axes.minorticks_off()
            ticks = MaxNLocator(6, integer=True, min_n_ticks=1).tick_values(1, rank[-1])
            axes.set_xticks([tick for tick in ticks if 1 <= tick <= rank[-1]])  # there is no unit 0
            axes.xaxis.set_major_formatter(_plain)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel("θ")
            letters = 24 if len(kept) <= 22 else 16
            axes.set_title(_shortened(layer, letters), loc="left", weight="bold", parse_math=False)
            axes.set_title(kept, loc="right", color="#444444")
        all_axes[-1].set_xlabel("unit, largest median first")
        figure.align_ylabels()
        handles = [
            Line2D(
                [], [], linestyle="none", marker=marker, color=colour, markersize=size, markeredgewidth=1.4
            )
            for marker, colour, size in (("o", BLUE, 6), ("x", ORANGE, 6), ("|", GREY, 11))
        ]
        _legend(figure, handles, ["kept", "removed", "5–95 %"])
    return figure


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
    from matplotlib import rc_context
    from matplotlib.lines import Line2D

    table = _finite("reliability", reliability, RELIABILITY_COLUMNS, ("confidence", "accuracy"))
    lines = _by_network("reliability", table)
    labels = [label for label, _ in lines]
    few_anywhere = bool((_floats(table, "count") < FEW_EXAMPLES).any())
    labels += ["perfectly calibrated"] + [f"under {FEW_EXAMPLES} examples"] * few_anywhere

    with rc_context(STYLE):
        figure = new_figure(4.4 + _legend_height(labels))
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linewidth=1, zorder=1)
        handles = []
        for (_, bins), (colour, marker, style) in zip(lines, SERIES, strict=False):
            order = np.argsort(_floats(bins, "confidence"), kind="stable")
            confidence, accuracy, count = (
                _floats(bins, column)[order] for column in ("confidence", "accuracy", "count")
            )
            few = ~(count >= FEW_EXAMPLES)
            # The line to a bin of few examples is as pale as its marker: its course is chance.
            for shown, strength in ((np.ones_like(few), 0.3), (~few, 1.0)):
                upper.plot(
                    100 * confidence[shown],
                    100 * accuracy[shown],
                    color=colour,
                    linestyle=style,
                    linewidth=1.4,
                    alpha=strength,
                )
            for shown, size, strength in ((~few, 5.5, 1.0), (few, 4.0, 0.5)):
                upper.plot(
                    100 * confidence[shown],
                    100 * accuracy[shown],
                    linestyle="none",
                    marker=marker,
                    markersize=size,
                    markeredgecolor="none",
                    color=colour,
                    alpha=strength,
                )
            lower.plot(
                100 * confidence,
                100 * count / np.nansum(count),
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=3.5,
                linewidth=1.2,
            )
            handles.append(Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=5.5))
        lowest = 100 * float(np.nanmin(_floats(table, "lower"), initial=1.0))
        upper.set_xlim(lowest - 2, 102)
        # 0 to 100 as on the axis of confidence: a network that is always wrong is drawn as clearly as one that
        # is always right.
        upper.set_ylim(-3, 103)
        upper.set_ylabel("accuracy (%)")
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(_plain)
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
        _legend(figure, handles, labels)
    return figure


def plot_widths(widths: pd.DataFrame) -> Figure:
    """Draw the width of each layer before the reduction, as an outline, and after it, filled.

    Args:
        widths: a row per layer, the first on top: ``layer``, ``before`` and ``after`` (units).

    Returns:
        A figure 5 inches wide, as high as the layers need; the axis is logarithmic where the widest layer has
        more than 50 times the units of the narrowest.

    Raises:
        ValueError: the table lacks a column, or has no row with finite widths.

    Example:
        >>> import pandas as pd
        >>> figure = plot_widths(pd.DataFrame({"layer": ["conv1", "fc1"], "before": [6, 120], "after": [6, 11]}))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['6 → 6', '120 → 11']
    """
    from matplotlib import rc_context
    from matplotlib.ticker import LogLocator, MaxNLocator

    table = _finite("widths", widths, WIDTH_COLUMNS, ("before", "after"))
    before, after = _floats(table, "before"), _floats(table, "after")
    position = np.arange(len(table))
    widest = float(max(before.max(), after.max(), 1.0))
    narrowest = before[before > 0].min(initial=widest)
    logarithmic = widest / narrowest > LARGEST_LINEAR_RATIO
    numbers = [
        f"{first:,.0f} → {second:,.0f}".replace("-", "−") for first, second in zip(before, after, strict=True)
    ]
    # Room for the longest of the numbers, as a share of the axis.
    room = 0.03 + 0.024 * max(map(len, numbers))

    with rc_context(STYLE):
        figure = new_figure(0.85 + 0.24 * max(len(table), 3))
        axes = figure.add_subplot()
        drawn = [
            axes.barh(position, before, height=0.74, facecolor="white", edgecolor=BLACK, linewidth=0.9),
            axes.barh(position, after, height=0.74, facecolor=BLUE, edgecolor=BLACK, linewidth=0.9),
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
        axes.xaxis.set_major_formatter(_plain)
        for place, first, second, text in zip(position, before, after, numbers, strict=True):
            axes.annotate(
                text,
                (max(first, second), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=9,
            )
        axes.set_ylim(len(table) - 0.4, -0.6)
        names = [_shortened(str(layer), 24) for layer in table["layer"]]
        axes.set_yticks(position, labels=names, fontsize=9, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("units (logarithmic)" if logarithmic else "units")
        _legend(figure, drawn, ["before", "after"])
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
    from matplotlib import rc_context
    from matplotlib.lines import Line2D

    table = _finite("curves", curves, CRITERIA_COLUMNS, ("parameters_removed", "accuracy"))
    lines = _grouped("curves", table, ["criterion"], MOST_CRITERIA)
    labels = [*(_shortened(name, 40) for (name,), _ in lines), "stopping point"]
    all_accuracies = 100 * _floats(table, "accuracy")
    best, worst = float(all_accuracies.max()), float(all_accuracies.min())
    zoomed = worst < best - TOP

    with rc_context(STYLE):
        figure = new_figure((4.6 if zoomed else 3.1) + _legend_height(labels))
        panels = figure.subplots(
            1 + zoomed, 1, sharex=True, squeeze=False, height_ratios=(3, 2) if zoomed else None
        )[:, 0]
        handles = []
        for (_, curve), (colour, marker, style) in zip(lines, SERIES, strict=False):
            order = np.argsort(_floats(curve, "parameters_removed"), kind="stable")
            share = 100 * _floats(curve, "parameters_removed")[order]
            accuracy = 100 * _floats(curve, "accuracy")[order]
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
        _legend(figure, handles, labels)
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
    from matplotlib import rc_context

    shown = _finite("risk_coverage", table, RISK_COLUMNS, ("coverage", "risk"))
    lines = _by_network("risk_coverage", shown)
    labels = [label for label, _ in lines]

    with rc_context(STYLE):
        figure = new_figure(3.1 + _legend_height(labels))
        axes = figure.add_subplot()
        handles = []
        for index, ((_, curve), (colour, marker, style)) in enumerate(zip(lines, SERIES, strict=False)):
            order = np.argsort(_floats(curve, "coverage"), kind="stable")
            coverage = _floats(curve, "coverage")[order]
            # Each line has its markers elsewhere, so that they don't hide each other where the lines meet.
            marked = np.linspace(0.04, 1, 7) - 0.02 * index
            handles += axes.plot(
                100 * coverage,
                100 * _floats(curve, "risk")[order],
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=5,
                # A curve has as many points as there are examples.
                markevery=np.unique(np.searchsorted(coverage, marked).clip(max=len(coverage) - 1)).tolist(),
                linewidth=1.4,
            )
        axes.set_xlim(0, 101)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("answered, most confident first (%)")
        axes.set_ylabel("wrong among the answered (%)")
        _legend(figure, handles, labels)
    return figure


def plot_runs(runs: pd.DataFrame) -> Figure:
    """Draw accuracy against the parameters left, a numbered point per run, with the runs' names below.

    Args:
        runs: a row per run, numbered from 1: ``run`` (its name), ``parameters`` (left, above 0) and
            ``accuracy`` (0 to 1).

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
    from matplotlib import rc_context
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    require_columns("runs", runs, RUN_COLUMNS)
    # The number is the row's in the table that was given, which may be printed beside the figure.
    table = runs.assign(number=np.arange(1, len(runs) + 1))
    positive = table[_floats(table, "parameters") > 0]
    table = _finite("runs", positive, RUN_COLUMNS, ("parameters", "accuracy"))
    parameters, accuracy = _floats(table, "parameters"), 100 * _floats(table, "accuracy")
    lines = [
        f"{number}  {_shortened(str(run), 30)}: {count:,.0f} parameters, {share:.2f} %"
        for number, run, count, share in zip(table["number"], table["run"], parameters, accuracy, strict=True)
    ]

    with rc_context(STYLE):
        figure = new_figure(3.0 + LEGEND_LINE * len(lines))
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.plot(parameters, accuracy, linestyle="none", marker="o", markersize=6, color=BLUE, alpha=0.8)
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
            [Line2D([], [], linestyle="none") for _ in lines],
            lines,
            loc="outside lower left",
            handlelength=0,
            handletextpad=0,
            labelspacing=0.25,
        )
        # Where the points will lie is known once the layout is.
        figure.draw_without_rendering()
        points = axes.transData.transform(np.column_stack([parameters, accuracy])) * 72 / figure.dpi
        for number, x, y, offset in zip(table["number"], parameters, accuracy, _offsets(points), strict=True):
            axes.annotate(
                str(number),
                (x, y),
                xytext=tuple(offset),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2}
                if np.hypot(*offset) > 12
                else None,
            )
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
    from matplotlib import rc_context

    table = _finite("entropies", entropies, ENTROPY_COLUMNS, ("entropy",))
    kinds = [
        (_shortened(name, 20), _floats(rows, "entropy"))
        for (name,), rows in _grouped("entropies", table, ["data"], MOST_DATA)
    ]
    values = _floats(table, "entropy")
    # An entropy computed in float32 can be a hair below zero.
    edges = np.linspace(min(0.0, float(values.min())), max(0.0, float(values.max())) or 1.0, ENTROPY_BINS + 1)
    densities = [np.histogram(entropy, edges, density=True)[0] for _, entropy in kinds]
    peaks = [float(density.max()) for density in densities]
    logarithmic = max(peaks) > LARGEST_LINEAR_DENSITY * min(peaks)
    labels = [
        f"{name}: {len(entropy):,}, median {_plain(float(f'{np.median(entropy):.2g}'))}"
        for name, entropy in kinds
    ]

    with rc_context(STYLE):
        figure = new_figure(3.1 + _legend_height(labels))
        axes = figure.add_subplot()
        # A step down to the axis, and on a logarithmic one to less than a single example's height.
        floor = 0.5 * min(density[density > 0].min() for density in densities) if logarithmic else 0.0
        handles = []
        for density, (colour, _, _), hatch in zip(densities, SERIES, HATCHES, strict=False):
            handles.append(
                axes.stairs(
                    np.maximum(density, floor),
                    edges,
                    baseline=floor,
                    fill=True,
                    facecolor=(*_rgb(colour), 0.55 if hatch is None else 0.1),
                    edgecolor=colour,
                    hatch=hatch,
                    linewidth=1.2,
                )
            )
        if logarithmic:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(_plain)
        axes.set_ylim(bottom=floor)
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("entropy of the prediction (nats)")
        axes.set_ylabel("density (per nat)")
        _legend(figure, handles, labels)
    return figure


def _finite(name: str, table: pd.DataFrame, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """The rows in which the numbers are finite, of a table that has all columns."""
    require_columns(name, table, columns)
    finite = np.isfinite(np.column_stack([_floats(table, column) for column in numbers])).all(axis=1)
    if not finite.any():
        raise ValueError(f"{name} has no row with a finite {' and '.join(numbers)}: there is nothing to show")
    return table[finite]


def _grouped(
    name: str, table: pd.DataFrame, columns: list[str], most: int
) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """The rows of each series, in the order in which they first appear, by the texts in `columns`."""
    groups = [(tuple(map(str, key)), rows) for key, rows in table.groupby(columns, sort=False, dropna=False)]
    if len(groups) > most:
        raise ValueError(
            f"{name} has {len(groups)} different {' and '.join(columns)}; more than {most} can't be told apart "
            "in one figure: choose some"
        )
    return groups


def _by_network(name: str, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A labelled series per network and prediction; the prediction is named where there are several."""
    groups = _grouped(name, table, ["network", "prediction"], MOST_NETWORKS)
    one = len({prediction for (_, prediction), _ in groups}) == 1
    return [
        (_shortened(network, 24) if one else f"{_shortened(network, 16)}, {_shortened(prediction, 8)}", rows)
        for (network, prediction), rows in groups
    ]


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels))
    return 3 if longest <= 12 else 2 if longest <= 26 else 1


def _legend_height(labels: Sequence[str]) -> float:
    return LEGEND_LINE * math.ceil(len(labels) / _legend_columns(labels))


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the axes; handles and labels are given, as matplotlib leaves out what a user named "_something"."""
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=_legend_columns(labels),
        columnspacing=1.2,
        handlelength=2.8,
        labelspacing=0.3,
    )


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
        free = distances.min(axis=1)
        chosen = int(np.argmax(free >= clear)) if (free >= clear).any() else int(np.argmax(free))
        offsets.append(candidates[chosen])
        taken = np.concatenate([taken, places[chosen : chosen + 1]])
    return offsets


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue


def _power(value: float, position: float = 0.0) -> str:
    """A power of ten without mathematical markup, which the figures don't parse."""
    exponent = round(math.log10(value))
    if exponent == 0:
        return "1"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
