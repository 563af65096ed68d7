"""What all figures share: their style, their numbers and texts, their series and legends.

Every figure is a :class:`matplotlib.figure.Figure` of its own and touches no global plotting state. So it can be drawn
in a notebook, a server or a test alike. Things of different kinds differ in shape, line or hatch as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pyro_bmrs.tables import require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any common form of colour blindness, and in grey.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"
GREY = "#777777"
# Each series differs from the others by colour, marker and line.
SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": ORANGE, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
    {"color": BLACK, "marker": "v", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "P", "linestyle": (0, (8, 2))},
    {"color": "#E69F00", "marker": "X", "linestyle": (0, (3, 1, 1, 1))},
    {"color": GREY, "marker": "p", "linestyle": (0, (2, 1))},
)
FIGURE_WIDTH = 5.0  # inches; narrow, so that the labels can still be read when a phone shrinks the figure
MARGIN = 0.1  # inches
# Above this many structures, one vector shape for each makes a page of megabytes; the cells become one image.
LARGEST_VECTOR_MAP = 4000
# Numbers that span more than this factor are drawn on a logarithmic axis.
LARGEST_LINEAR_RATIO = 50.0
LEGEND_LINE = 0.19  # inches
# More series than this can't be told apart in one figure.
MOST_NETWORKS = 6
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


@contextmanager
def styled_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Iterator[Figure]:
    """A new figure, and the style of all figures while it is drawn. Matplotlib's own settings play no part.

    Args:
        height: in inches.
        layout: matplotlib's layout engine; None for places that are computed by hand.
    """
    from matplotlib import rc_context

    from pyro_bmrs.figures.drawing import Drawing

    with rc_context(STYLE):
        yield Drawing(figsize=(FIGURE_WIDTH, height), layout=layout)


def floats(table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    return np.asarray(table[column].to_numpy(dtype=np.float64, na_value=np.nan))


def plain(value: float, position: float = 0.0) -> str:
    """A number on an axis, with a true minus sign."""
    size = abs(value)
    pattern = ".3g" if value and not 1e-3 <= size < 1e6 else ",.4g" if size < 1e4 else ",.0f"
    return format(value, pattern).replace("-", "−")


def shortened(text: str, most: int) -> str:
    """Shorten a user's text in its middle, on one line: both ends of a module's path tell it apart."""
    text = "".join(character if character.isprintable() else "�" for character in text)
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"


def finite_rows(
    name: str, table: pd.DataFrame, columns: Sequence[str], numbers: Sequence[str]
) -> pd.DataFrame:
    """The rows in which the numbers are finite, of a table that has all columns."""
    require_columns(name, table, columns)
    finite = np.isfinite(np.column_stack([floats(table, column) for column in numbers])).all(axis=1)
    if not finite.any():
        raise ValueError(f"{name} has no row with a finite {' and '.join(numbers)}: there is nothing to show")
    return table[finite]


def series(
    name: str, table: pd.DataFrame, columns: list[str], most: int
) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """The rows of each series by the texts in `columns`, in the order in which they first appear."""
    groups = [(tuple(map(str, key)), rows) for key, rows in table.groupby(columns, sort=False, dropna=False)]
    if len(groups) > most:
        raise ValueError(
            f"{name} has {len(groups)} different {' and '.join(columns)}; more than {most} can't be told apart "
            "in one figure: choose some"
        )
    return groups


def series_by_network(name: str, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A labelled series per network and prediction; the prediction is named where there are several."""
    groups = series(name, table, ["network", "prediction"], MOST_NETWORKS)
    one = len({prediction for (_, prediction), _ in groups}) == 1
    return [
        (shortened(network, 24) if one else f"{shortened(network, 16)}, {shortened(prediction, 8)}", rows)
        for (network, prediction), rows in groups
    ]


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend above the axes. Labels are given, as matplotlib itself leaves out those that begin with "_"."""
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=_legend_columns(labels),
        columnspacing=1.2,
        handlelength=2.8,
        labelspacing=0.3,
    )


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels))
    return 3 if longest <= 12 else 2 if longest <= 26 else 1


def legend_height(labels: Sequence[str]) -> float:
    return LEGEND_LINE * math.ceil(len(labels) / _legend_columns(labels))
