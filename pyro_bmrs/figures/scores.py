"""The scores of all structures, and what they are called."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pyro_bmrs.figures.style import BLACK, BLUE, ORANGE, floats, plain, shortened, styled_figure
from pyro_bmrs.tables import TABLE_COLUMNS, require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Rule(Protocol):
    """What figures read of a rule."""

    @property
    def criterion(self) -> str: ...
    @property
    def has_evidence(self) -> bool: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def threshold(self) -> float | None: ...


class Plan(Protocol):
    """What figures read of a plan."""

    @property
    def table(self) -> pd.DataFrame: ...
    @property
    def rule(self) -> Rule: ...


# A map in which the scores span more than this would show nothing but its extremes on a linear scale.
LARGEST_LINEAR_SCORE = 10.0


def score_label(rule: Rule) -> str:
    """Name the score of a rule for an axis or a column: with what it is measured in, or with the criterion.

    >>> from pyro_bmrs import Rule
    >>> score_label(Rule(criterion="BMRS_N", prior_log_odds=0.0, kl_weight=100.0)), score_label(Rule(criterion="SNR"))
    ('score, from ΔF (nats, KL weight 100)', 'score (SNR)')
    """
    if rule.has_evidence:
        return f"score, from {evidence_label(rule.kl_weight)}"
    return f"score ({shortened(rule.criterion, 30)})"


def evidence_label(kl_weight: float) -> str:
    """Name the change in log-evidence for an axis or a column, with the KL weight where that is not 1.

    >>> evidence_label(1.0), evidence_label(100.0)
    ('ΔF (nats)', 'ΔF (nats, KL weight 100)')
    """
    return "ΔF (nats)" if kl_weight == 1 else f"ΔF (nats, KL weight {kl_weight:g})"


# Inches of a character of a tick's label, and of an axis in a figure of this room.
_CHARACTER, _AXIS = 0.075, 4.2


def plot_scores(plan: Plan) -> Figure:
    """Draw the histogram of the scores, kept and removed, with a line at the threshold.

    Where scores exceed 10 the axis is linear between -1 and 1 and logarithmic beyond. Scores that are no
    number are left out. There is no line where the threshold is infinite, or a search decided without one.

    Args:
        plan: any plan; its ``table`` and ``rule`` are read.

    Returns:
        A figure 5 inches wide: number of structures against score (criterion's unit).

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
    from matplotlib.transforms import IdentityTransform

    table = structures_of(plan)
    scores = floats(table, "score")
    removed = table["removed"].to_numpy(dtype=bool)
    finite = np.isfinite(scores)
    logarithmic = largest_score(scores) > LARGEST_LINEAR_SCORE
    scale = SymmetricalLogTransform(10, 1.0, 1.0) if logarithmic else IdentityTransform()
    position = scale.transform(np.where(finite, scores, 0.0))
    threshold = finite_threshold(plan.rule)
    decided = float(scale.transform(np.float64(threshold or 0.0)))
    lowest, highest = min(position.min(), decided), max(position.max(), decided)
    width = (highest - lowest) / 32 or 1.0
    # The threshold is an edge, so that no bar holds structures of both decisions.
    steps = np.arange(math.floor((lowest - decided) / width), math.floor((highest - decided) / width) + 2)
    edges = decided + width * steps

    with styled_figure(3.3) as figure:
        axes = figure.add_subplot()
        bounds = scale.inverted().transform(edges)
        below = np.zeros(len(edges) - 1)
        kinds = ((~removed, "kept", BLUE, None), (removed, "removed", ORANGE, "////"))
        for chosen, label, colour, hatch in kinds:
            count, _ = np.histogram(position[chosen & finite], edges)
            some = count > 0
            axes.bar(
                bounds[:-1][some], count[some], np.diff(bounds)[some], below[some], align="edge", linewidth=0.7,
                facecolor=colour if hatch is None else "white", edgecolor="white" if hatch is None else colour,
                hatch=hatch, label=f"{label} ({int(chosen.sum()):,})",
            )  # fmt: skip
            below = below + count
        if threshold is not None:
            axes.axvline(threshold, color=BLACK, linestyle="--", linewidth=1.5, label="threshold")
        if logarithmic:
            axes.set_xscale("symlog", linthresh=1.0)
            axes.set_xticks(decades(bounds[0], bounds[-1]))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(f"← keep | {score_label(plan.rule)} | remove →", parse_math=False)
        axes.set_ylabel("structures")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.0, handlelength=1.5)
    return figure


def finite_threshold(rule: Rule) -> float | None:
    """The threshold of a rule; None where there is none to draw: it is infinite, or a search decided."""
    return rule.threshold if rule.threshold is not None and math.isfinite(rule.threshold) else None


def structures_of(plan: Plan) -> pd.DataFrame:
    """The table of a plan, which must have rows."""
    require_columns("plan.table", plan.table, TABLE_COLUMNS)
    if plan.table.empty:
        raise ValueError("plan.table has no rows: there is no structure to show")
    return plan.table


def largest_score(scores: NDArray[np.float64]) -> float:
    finite = np.abs(scores[np.isfinite(scores)])
    return float(finite.max(initial=0.0)) or 1.0


def decades(lowest: float, highest: float) -> list[float]:
    """Zero and powers of ten of both signs from lowest to highest, every so many that their labels have room.

    The axis is linear between -1 and 1, and logarithmic beyond.
    """
    from matplotlib.scale import SymmetricalLogTransform

    def place(ticks: list[float]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = SymmetricalLogTransform(10, 1.0, 1.0).transform(np.array(ticks))
        return found

    span = np.ptp(place([lowest, highest])) or 1.0
    largest = math.floor(math.log10(max(-lowest, highest, 1.0)))
    for every in range(1, largest + 2):
        powers = [10.0**exponent for exponent in range(largest % every, largest + 1, every)]
        ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
        ticks = [tick for tick in ticks if lowest <= tick <= highest]
        widths = np.array([_CHARACTER * (len(f"{tick:,.0f}") + 1) for tick in ticks])
        if (np.diff(place(ticks)) * _AXIS / span >= (widths[1:] + widths[:-1]) / 2).all():
            break
    return ticks
