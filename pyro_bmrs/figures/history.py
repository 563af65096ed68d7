"""The history of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyro_bmrs.figures.style import BLACK, BLUE, GREEN, ORANGE, floats, plain, styled_figure
from pyro_bmrs.tables import HISTORY_COLUMNS, REMOVAL_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COUNTED = "structures left"
# Only this many removals have their number written, and no two closer than this share of the axis: they would overlap.
MOST_REMOVAL_TEXTS, CLOSEST_REMOVAL_TEXTS = 6, 0.04


def plot_history(history: pd.DataFrame, removals: pd.DataFrame | None = None) -> Figure:
    """Draw the training history: losses, accuracy, KL divergence and the number of structures left.

    Panels whose column is never finite are left out; the fine-tuning is shaded. Where structures were removed, a
    dashed line crosses the panel of structures left. The largest removals have their number beside it.

    Args:
        history: a row per epoch, in order: ``phase`` ("fit" or "fine-tune"), ``epoch``, ``loss``,
            ``log_likelihood`` and ``validation_loss`` (nats per example), ``kl`` (nats, whole data set),
            ``validation_accuracy`` (0 to 1), ``kept`` (structures left) and ``seconds``.
        removals: a row per removed structure: ``phase`` ("fit", or "reduce" for those that the plan removed after
            the fit), ``epoch`` (of the fit, after which it was removed), ``layer`` and ``unit`` (its number).

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
        ['nats/example', 'KL (nats)', 'structures left']
    """
    from matplotlib.ticker import MaxNLocator

    require_columns("fit.history", history, HISTORY_COLUMNS)
    epochs, fitted = len(history), int((history["phase"] == "fit").sum())
    marks = {} if removals is None else _removal_marks(removals, fitted)
    epoch = np.arange(1, epochs + 1)
    panels: list[tuple[str, list[tuple[str, NDArray[np.float64], str, str, str]]]] = [
        (
            "nats/example",
            [
                ("training loss (fit: with KL)", floats(history, "loss"), BLUE, "-", "o"),
                ("training −log-lik.", -floats(history, "log_likelihood"), GREEN, ":", "^"),
                ("validation loss", floats(history, "validation_loss"), ORANGE, "--", "s"),
            ],
        ),
        ("accuracy (%)", [("validation", 100 * floats(history, "validation_accuracy"), ORANGE, "--", "s")]),
        ("KL (nats)", [("KL, whole data set", floats(history, "kl"), BLUE, "-", "o")]),
        (COUNTED, [(COUNTED, floats(history, "kept"), BLACK, "-", "D")]),
    ]
    panels = [panel for panel in panels if any(np.isfinite(line[1]).any() for line in panel[1])] or panels[:1]

    with styled_figure(0.9 + 1.3 * len(panels)) as figure:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, lines) in zip(rows, panels, strict=True):
            counts = label == COUNTED
            for name, values, colour, style, marker in lines:
                if np.isfinite(values).any():
                    axes.plot(
                        epoch, values, color=colour, linestyle=style, marker=marker, markersize=3.5, linewidth=1.4,
                        drawstyle="steps-mid" if counts else "default", label=name if axes is rows[0] else None,
                    )  # fmt: skip
            if fitted < epochs:
                axes.axvspan(
                    fitted + 0.5, epochs + 0.5, facecolor="#f3ead2", edgecolor="none", zorder=0,
                    label="fine-tuning" if axes is rows[0] else None,
                )  # fmt: skip
            axes.set_ylabel(label)
            axes.margins(y=0.12)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=counts))
            axes.yaxis.set_major_formatter(plain)
        rows[-1].set_xlabel("epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        if marks and panels[-1][0] == COUNTED:
            _draw_removals(rows[-1], marks)
        figure.align_ylabels()
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.5)
    return figure


def _removal_marks(removals: pd.DataFrame, epochs: int) -> dict[float, int]:
    """How many structures were removed, by the place on the axis of epochs; after the fit is between two epochs."""
    require_columns("removals", removals, REMOVAL_COLUMNS)
    fitting = (removals["phase"] == "fit").to_numpy(dtype=bool)
    places, counts = np.unique(np.where(fitting, floats(removals, "epoch"), epochs + 0.5), return_counts=True)
    return dict(zip(places.tolist(), counts.tolist(), strict=True))


def _draw_removals(axes: Axes, marks: dict[float, int]) -> None:
    for index, place in enumerate(marks):
        axes.axvline(
            place, color=ORANGE, linestyle=(0, (4, 2)), linewidth=1, zorder=1,
            label=None if index else "structures removed",
        )  # fmt: skip
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.4 * (top - bottom))  # the numbers stand above the curve
    written: list[float] = []
    for place in sorted(marks, key=lambda place: -marks[place]):
        apart = all(abs(place - other) >= CLOSEST_REMOVAL_TEXTS * (right - left) for other in written)
        if len(written) < MOST_REMOVAL_TEXTS and apart:
            written.append(place)
            axes.annotate(
                f"−{marks[place]:,}", (place, 1), xycoords=("data", "axes fraction"), xytext=(0, -1),
                textcoords="offset points", rotation=90, ha="center", va="top", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
            )  # fmt: skip
