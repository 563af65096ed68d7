"""The scores of all structures, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyro_bmrs.figures.style import BLACK, BLUE, ORANGE, floats, plain, shortened, styled_figure
from pyro_bmrs.tables import TABLE_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from pyro_bmrs.pruning import Plan
# A map in which the scores span more than this would show nothing but its extremes on a linear scale.
LARGEST_LINEAR_SCORE = 10.0


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
    return f"score ({shortened(plan.rule.criterion, 30)})"


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


def plot_scores(plan: Plan) -> Figure:
    """Draw the histogram of the scores, kept and removed, with a line at the threshold.

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
    from matplotlib.scale import SymmetricalLogTransform
    from matplotlib.ticker import MaxNLocator

    table = structures_of(plan)
    scores = floats(table, "score")
    removed = table["removed"].to_numpy(dtype=bool)
    finite = np.isfinite(scores)
    logarithmic = largest_score(scores) > LARGEST_LINEAR_SCORE
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

    with styled_figure(3.3) as figure:
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
            axes.set_xticks(decades(bounds[0], bounds[-1]))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(f"← keep | {score_label(plan)} | remove →", parse_math=False)
        axes.set_ylabel("units")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.5)
    return figure


def structures_of(plan: Plan) -> pd.DataFrame:
    require_columns("plan.table", plan.table, TABLE_COLUMNS)
    if plan.table.empty:
        raise ValueError("plan.table has no rows: there is no unit to show")
    return plan.table


def largest_score(scores: NDArray[np.float64]) -> float:
    finite = np.abs(scores[np.isfinite(scores)])
    return float(finite.max(initial=0.0)) or 1.0


def decades(lowest: float, highest: float, most: int = 7) -> list[float]:
    """Return zero and powers of ten of both signs from lowest to highest, every so many that few are left."""
    largest = math.floor(math.log10(max(-lowest, highest)))
    for every in range(1, largest + 2):
        powers = [10.0**exponent for exponent in range(largest % every, largest + 1, every)]
        ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
        ticks = [tick for tick in ticks if lowest <= tick <= highest]
        if len(ticks) <= most:
            break
    return ticks
