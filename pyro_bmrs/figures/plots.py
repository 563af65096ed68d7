"""Figures of a reduction: structure map, compression curve, scores and training history.

Every function returns a :class:`matplotlib.figure.Figure` of its own and touches no global plotting state, so
the figures can be drawn in a notebook, a server or a test alike. Kept and removed differ by shape (filled or
crossed, plain or hatched) as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from pyro_bmrs.pruning import Plan

TABLE_COLUMNS = (
    "layer",
    "unit",
    "loc",
    "scale",
    "mean",
    "snr",
    "score",
    "log_evidence_change",
    "removed",
)
CURVE_COLUMNS = ("parameters_removed", "accuracy", "score_threshold", "is_plan")
HISTORY_COLUMNS = (
    "phase",
    "epoch",
    "loss",
    "log_likelihood",
    "kl",
    "validation_loss",
    "validation_accuracy",
    "kept",
    "seconds",
)
REMOVAL_COLUMNS = ("phase", "epoch", "layer", "unit")

# Okabe and Ito's palette: told apart with any common form of colour blindness, and in grey.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"
# Grey in the middle, not white: a removed unit is drawn by its outline alone and has to stay visible.
SCORE_COLOURS = ("#08306b", "#2f7fc1", "#a3a3a3", "#e08214", "#7f3b08")

FIGURE_WIDTH = 5.0  # inches; narrow, so that the labels can still be read when a phone shrinks the figure
MARGIN = 0.1  # inches
# Above this many units one vector shape per unit makes a page of megabytes; the cells become one image.
LARGEST_VECTOR_MAP = 4000
# A map in which the scores span more than this would show nothing but its extremes on a linear scale.
LARGEST_LINEAR_SCORE = 10.0
# Of the epochs in which units went, so many have their number written, and none so close to another (share of
# the axis) that the two would overlap.
MOST_REMOVAL_TEXTS, CLOSEST_REMOVAL_TEXTS = 6, 0.04

STYLE: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.8,
    # Layer names and criteria are the user's text: "$" in them is no formula.
    "text.parse_math": False,
}


def require_columns(name: str, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has the columns it is read by.

    Args:
        name: what to call the table in the message, e.g. ``"plan.table"``.
        table: any DataFrame; further columns are allowed.
        columns: the names it must have.

    Raises:
        ValueError: names the missing columns and all that are needed.

    Example:
        >>> import pandas as pd
        >>> require_columns("curve", pd.DataFrame({"accuracy": [0.9]}), ("accuracy",))
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"{name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; "
            f"it needs {', '.join(columns)} and has {', '.join(map(str, table.columns)) or 'none'}"
        )


def score_label(plan: Plan) -> str:
    """Name the score of a plan with its unit, and with the KL weight where the score is evidence.

    Args:
        plan: a plan; see :func:`plot_structures`.

    Returns:
        ``"score, from ΔF (nats)"``, with the weight if it is not 1; for a criterion without evidence the
        criterion's name takes the unit's place.

    Example:
        >>> from types import SimpleNamespace
        >>> from pyro_bmrs import Rule
        >>> score_label(SimpleNamespace(rule=Rule(criterion="BMRS_N", prior_log_odds=0.0, kl_weight=100.0)))
        'score, from ΔF (nats, KL weight 100)'
    """
    if plan.rule.has_evidence:
        return f"score, from {evidence_label(plan.rule.kl_weight)}"
    return f"score ({_shortened(plan.rule.criterion, 30)})"


def evidence_label(kl_weight: float) -> str:
    """Name the change in log-evidence with its unit, and with the KL weight where that is not 1.

    Args:
        kl_weight: the weight w of the KL term in the loss.

    Returns:
        A label for an axis or a column.

    Example:
        >>> evidence_label(1.0), evidence_label(100.0)
        ('ΔF (nats)', 'ΔF (nats, KL weight 100)')
    """
    return "ΔF (nats)" if kl_weight == 1 else f"ΔF (nats, KL weight {kl_weight:g})"


def plot_structures(plan: Plan) -> Figure:
    """Map every unit of every layer: what was kept, what was removed, and how clear the case was.

    One row of cells per layer (wrapped where it is long), one cell per unit, sorted by score, the
    clearest to keep first. A filled cell is kept, a crossed one removed; its colour is the score, on
    a scale that is linear near zero and logarithmic beyond where scores exceed 10.

    Args:
        plan: has ``table``, a DataFrame with a row per unit and the columns ``layer``, ``unit``, ``loc``,
            ``scale``, ``mean``, ``snr``, ``score`` (in the criterion's unit),
            ``log_evidence_change`` (nats) and ``removed``; and its ``rule``.

    Returns:
        A figure 5 inches wide, as high as the units need.

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
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, SymLogNorm
    from matplotlib.lines import Line2D
    from matplotlib.path import Path as Outline

    table = _units(plan)
    scores = _floats(table, "score")
    removed = table["removed"].to_numpy(dtype=bool)
    codes, layers = table["layer"].factorize(sort=False)
    largest = _largest(scores)
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
        # A score that is no number sorts last: nothing is known of that unit.
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

    with rc_context(STYLE):
        figure = new_figure(height, layout=None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, FIGURE_WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        side = cell * 72
        line_width = min(1.2, side / 8)
        for chosen, marker, share in ((~removed, "s", 0.82), (removed, crossed, 0.72)):
            axes.scatter(
                horizontal[chosen],
                vertical[chosen],
                s=(share * side) ** 2,
                marker=marker,
                facecolors=painted[chosen] if marker == "s" else "none",
                edgecolors="none" if marker == "s" else painted[chosen],
                linewidths=line_width,
                rasterized=len(table) > LARGEST_VECTOR_MAP,
            )
        for position_down, layer, count in headings:
            below = position_down + 0.6 * heading
            axes.text(MARGIN, below, _shortened(layer, 44), va="center", weight="bold", parse_math=False)
            axes.text(FIGURE_WIDTH - MARGIN, below, count, va="center", ha="right", color="#444444")
        shapes = [
            Line2D([], [], linestyle="none", marker="s", markersize=8, color=SCORE_COLOURS[1]),
            Line2D(
                [],
                [],
                linestyle="none",
                marker=crossed,
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=SCORE_COLOURS[3],
                markeredgewidth=1.2,
            ),
        ]
        figure.legend(
            shapes,
            ["kept", "removed"],
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=2,
            borderaxespad=0.2,
            handletextpad=0.2,
        )
        bar_width = FIGURE_WIDTH - 6 * MARGIN
        bar_axes = figure.add_axes(
            (3 * MARGIN / FIGURE_WIDTH, 0.48 / height, bar_width / FIGURE_WIDTH, 0.12 / height)
        )
        bar = figure.colorbar(colours, cax=bar_axes, orientation="horizontal")
        bar.outline.set_visible(False)
        if largest > LARGEST_LINEAR_SCORE:
            bar.set_ticks(_decades(-largest, largest))
        bar.ax.xaxis.set_major_formatter(_plain)
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=9, pad=2)
        bar.set_label(f"← keep | {score_label(plan)} | remove →", parse_math=False, labelpad=2)
    return figure


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
    from matplotlib import rc_context

    require_columns("curve", curve, CURVE_COLUMNS)
    share = 100 * _floats(curve, "parameters_removed")
    accuracy = 100 * _floats(curve, "accuracy")
    stops = curve["is_plan"].to_numpy(dtype=bool)
    shown = np.isfinite(share) & np.isfinite(accuracy)
    order = np.flatnonzero(shown)[np.argsort(share[shown], kind="stable")]

    with rc_context(STYLE):
        figure = new_figure(3.3)
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


def plot_scores(plan: Plan) -> Figure:
    """Draw the histogram of the scores, kept and removed, with the decision line at zero.

    Where scores exceed 10 the axis is linear between -1 and 1 and logarithmic beyond. Scores that are no
    number are left out.

    Args:
        plan: as for :func:`plot_structures`.

    Returns:
        A figure 5 inches wide: number of units against score (criterion's unit).

    Raises:
        ValueError: the table lacks a column, or has no rows.

    Example:
        >>> import pandas as pd
        >>> from types import SimpleNamespace
        >>> table = pd.DataFrame({
        ...     "layer": "fc1", "unit": [0, 1], "loc": [-0.1, -15.0], "scale": [0.1, 3.0],
        ...     "mean": [0.9, 1e-4], "snr": [9.0, 0.1], "score": [-8.0, 0.9],
        ...     "log_evidence_change": float("nan"), "removed": [False, True],
        ... })
        >>> from pyro_bmrs import Rule
        >>> figure = plot_scores(SimpleNamespace(table=table, rule=Rule(criterion="SNR")))
        >>> figure.axes[0].get_xlabel()
        '← keep | score (SNR) | remove →'
    """
    from matplotlib import rc_context
    from matplotlib.scale import SymmetricalLogTransform
    from matplotlib.ticker import MaxNLocator

    table = _units(plan)
    scores = _floats(table, "score")
    removed = table["removed"].to_numpy(dtype=bool)
    finite = np.isfinite(scores)
    logarithmic = _largest(scores) > LARGEST_LINEAR_SCORE
    forward: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    backward: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    if logarithmic:
        transform = SymmetricalLogTransform(10, 1.0, 1.0)
        forward, backward = transform.transform, transform.inverted().transform
    else:
        forward = backward = np.asarray
    position = forward(np.where(finite, scores, 0.0))
    threshold = math.inf if plan.rule.threshold is None else plan.rule.threshold
    drawn = math.isfinite(threshold)
    decided = float(forward(np.float64(threshold if drawn else 0.0)))
    lowest, highest = min(position.min(), decided), max(position.max(), decided)
    width = (highest - lowest) / 32 or 1.0
    # The threshold is an edge, so that no bar holds structures of both decisions.
    steps = np.arange(math.floor((lowest - decided) / width), math.floor((highest - decided) / width) + 2)
    edges = decided + width * steps

    with rc_context(STYLE):
        figure = new_figure(3.3)
        axes = figure.add_subplot()
        bounds = backward(edges)
        below = np.zeros(len(edges) - 1)
        for chosen, label, colour, hatch in (
            (~removed, "kept", BLUE, None),
            (removed, "removed", ORANGE, "////"),
        ):
            count, _ = np.histogram(position[chosen & finite], edges)
            some = count > 0
            axes.bar(
                bounds[:-1][some],
                count[some],
                width=np.diff(bounds)[some],
                align="edge",
                bottom=below[some],
                facecolor=colour if hatch is None else "white",
                edgecolor="white" if hatch is None else colour,
                hatch=hatch,
                linewidth=0.7,
                label=f"{label} ({int(chosen.sum()):,})",
            )
            below = below + count
        if drawn:
            axes.axvline(threshold, color=BLACK, linestyle="--", linewidth=1.5, label="threshold")
        if logarithmic:
            axes.set_xscale("symlog", linthresh=1.0)
            axes.set_xticks(_decades(bounds[0], bounds[-1]))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(_plain)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(f"← keep | {score_label(plan)} | remove →", parse_math=False)
        axes.set_ylabel("units")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.5)
    return figure


def plot_history(history: pd.DataFrame, removals: pd.DataFrame | None = None) -> Figure:
    """Draw the training history: losses, accuracy, KL divergence and the number of units left.

    Panels whose column is never finite are left out; the fine-tuning is shaded. Where units were removed, a
    dashed line crosses the panel of units left, and the largest removals have their number beside it.

    Args:
        history: a row per epoch, in order: ``phase`` ("fit" or "fine-tune"), ``epoch``, ``loss``,
            ``log_likelihood`` and ``validation_loss`` (nats per example), ``kl`` (nats, whole data set),
            ``validation_accuracy`` (0 to 1), ``kept`` (units left) and ``seconds``.
        removals: a row per removed unit: ``phase`` ("fit", or "reduce" for what the plan removed after the
            fit), ``epoch`` (of the fit, after which the unit went), ``layer`` and ``unit``.

    Returns:
        A figure 5 inches wide; epochs are counted through both phases, from 1.

    Raises:
        ValueError: a table lacks a column.

    Example:
        >>> import pandas as pd
        >>> figure = plot_history(pd.DataFrame({
        ...     "phase": ["fit", "fine-tune"], "epoch": [1, 2], "loss": [0.9, 0.2],
        ...     "log_likelihood": [-0.8, -0.2], "kl": [900.0, float("nan")],
        ...     "validation_loss": [0.5, 0.3], "validation_accuracy": float("nan"),
        ...     "kept": [226, 40], "seconds": [3.0, 2.0],
        ... }))
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['nats/example', 'KL (nats)', 'units left']
    """
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    require_columns("fit.history", history, HISTORY_COLUMNS)
    marks = {} if removals is None else _removal_marks(removals, int((history["phase"] == "fit").sum()))
    epoch = np.arange(1, len(history) + 1)
    tuned = (history["phase"] == "fine-tune").to_numpy(dtype=bool)
    panels: list[tuple[str, list[tuple[str, NDArray[np.float64], str, str, str]]]] = [
        (
            "nats/example",
            [
                ("training loss (fit: with KL)", _floats(history, "loss"), BLUE, "-", "o"),
                ("training −log-lik.", -_floats(history, "log_likelihood"), GREEN, ":", "^"),
                ("validation loss", _floats(history, "validation_loss"), ORANGE, "--", "s"),
            ],
        ),
        ("accuracy (%)", [("validation", 100 * _floats(history, "validation_accuracy"), ORANGE, "--", "s")]),
        ("KL (nats)", [("KL, whole data set", _floats(history, "kl"), BLUE, "-", "o")]),
        ("units left", [("units left", _floats(history, "kept"), BLACK, "-", "D")]),
    ]
    panels = [panel for panel in panels if any(np.isfinite(line[1]).any() for line in panel[1])] or panels[:1]

    with rc_context(STYLE):
        figure = new_figure(0.9 + 1.3 * len(panels))
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, lines) in zip(rows, panels, strict=True):
            for name, values, colour, style, marker in lines:
                if np.isfinite(values).any():
                    axes.plot(
                        epoch,
                        values,
                        color=colour,
                        linestyle=style,
                        marker=marker,
                        markersize=3.5,
                        linewidth=1.4,
                        drawstyle="steps-mid" if label == "units left" else "default",
                        label=name if axes is rows[0] else None,
                    )
            for first, last in _runs(tuned):
                axes.axvspan(
                    first + 0.5,
                    last + 0.5,
                    facecolor="#f3ead2",
                    edgecolor="none",
                    zorder=0,
                    label="fine-tuning" if axes is rows[0] and first == _runs(tuned)[0][0] else None,
                )
            axes.set_ylabel(label)
            axes.margins(y=0.12)
            if label == "units left":
                for index, place in enumerate(marks):
                    axes.axvline(
                        place,
                        color=ORANGE,
                        linestyle=(0, (4, 2)),
                        linewidth=1,
                        zorder=1,
                        label="units removed" if index == 0 else None,
                    )
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=label == "units left"))
            axes.yaxis.set_major_formatter(_plain)
        rows[-1].set_xlabel("epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        if panels[-1][0] == "units left":
            left, right = rows[-1].get_xlim()
            if marks:  # the numbers stand above the curve
                bottom, top = rows[-1].get_ylim()
                rows[-1].set_ylim(bottom, top + 0.4 * (top - bottom))
            for place in _written(marks, CLOSEST_REMOVAL_TEXTS * (right - left)):
                rows[-1].annotate(
                    f"−{marks[place]:,}",
                    (place, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, -1),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    va="top",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
                )
        figure.align_ylabels()
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.5)
    return figure


def new_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of the width of all, to be drawn on in `rc_context(STYLE)`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(FIGURE_WIDTH, height), layout=layout)


def _units(plan: Plan) -> pd.DataFrame:
    require_columns("plan.table", plan.table, TABLE_COLUMNS)
    if plan.table.empty:
        raise ValueError("plan.table has no rows: there is no unit to show")
    return plan.table


def _floats(table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    return np.asarray(table[column].to_numpy(dtype=np.float64, na_value=np.nan))


def _largest(scores: NDArray[np.float64]) -> float:
    finite = np.abs(scores[np.isfinite(scores)])
    return float(finite.max(initial=0.0)) or 1.0


def _removal_marks(removals: pd.DataFrame, epochs: int) -> dict[float, int]:
    """Where on the axis of epochs units went, in order, and how many; after the fit is between two epochs."""
    require_columns("removals", removals, REMOVAL_COLUMNS)
    fitting = (removals["phase"] == "fit").to_numpy(dtype=bool)
    places, counts = np.unique(
        np.where(fitting, _floats(removals, "epoch"), epochs + 0.5), return_counts=True
    )
    return dict(zip(places.tolist(), counts.tolist(), strict=True))


def _written(marks: dict[float, int], closest: float) -> list[float]:
    """The places of the largest removals, none closer to a larger one than told."""
    chosen: list[float] = []
    for place in sorted(marks, key=lambda place: -marks[place]):
        if len(chosen) < MOST_REMOVAL_TEXTS and all(abs(place - other) >= closest for other in chosen):
            chosen.append(place)
    return chosen


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the half-open ranges in which ``flags`` is true."""
    steps = np.diff(np.concatenate([[False], flags, [False]]).astype(int))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def _decades(lowest: float, highest: float, most: int = 7) -> list[float]:
    """Return zero and powers of ten of both signs from lowest to highest, every so many that few are left."""
    largest = math.floor(math.log10(max(-lowest, highest)))
    for every in range(1, largest + 2):
        powers = [10.0**exponent for exponent in range(largest % every, largest + 1, every)]
        ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
        ticks = [tick for tick in ticks if lowest <= tick <= highest]
        if len(ticks) <= most:
            break
    return ticks


def _plain(value: float, position: float = 0.0) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value:,.0f}".replace("-", "−")


def _shortened(text: str, most: int) -> str:
    """Shorten a user's text in its middle, on one line: both ends of a module's path tell it apart."""
    text = "".join(character if character.isprintable() else "�" for character in text)
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"
