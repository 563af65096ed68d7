"""The table of the seven cells in docs/results.md, and its figures, from committed CSVs.

python analysis/cells_figure.py prints the table as Markdown.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pyro_bmrs.figures.style import SERIES

CSV = Path(__file__).parent / "results" / "cells" / "cells.csv"
LABELS = {
    "laplace": "a trained network, by curvature",
    "variational": "variational, from scratch",
    "both": "curvature, then variational",
    "taylor in steps": "Taylor in 100 steps (torch-pruning)",
    "posterior damage": "posterior damage (SpaM)",
    "fisher masks": "masks (Kwon et al.)",
    "scratch": "the same widths from scratch",
}
OURS = ("laplace", "variational", "both")


def means(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """By cell, size and way: mean over seeds, its standard error, and how many seeds."""
    return table.groupby(["cell", "size", "way"], sort=False)[list(columns)].agg(["mean", "sem", "count"])


def markdown(table: pd.DataFrame) -> str:
    """Removed and accuracy of each way at each size, in per cent."""
    ways = [way for way in LABELS if way in set(table.way)]
    lines = [f"| cell | size | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    found = means(table, "removed", "accuracy")
    for (cell, size), _ in table[table.way != "full"].groupby(["cell", "size"], sort=False):
        row = []
        for way in ways:
            if (cell, size, way) not in found.index:
                row.append("")
                continue
            one = found.loc[(cell, size, way)]
            error = one["accuracy", "sem"]
            told = f" ± {100 * error:.2f}" if error == error else ""
            row.append(f"{100 * one['removed', 'mean']:.1f} / {100 * one['accuracy', 'mean']:.2f}{told}")
        lines.append(f"| {cell} | {size} | {' | '.join(row)} |")
    return "\n".join(lines)


def draw_cells() -> Figure:
    """Accuracy against the share removed, a panel for each cell."""
    table = pd.read_csv(CSV, dtype={"size": str})
    cells = [*dict.fromkeys(table.cell)]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    for axes, cell in zip(panels, cells, strict=False):
        mine = table[table.cell == cell]
        for (way, label), style in zip(LABELS.items(), SERIES, strict=False):
            rows = mine[mine.way == way]
            if rows.empty:
                continue
            curve = rows.groupby("size")[["removed", "accuracy"]].mean().sort_values("removed")
            axes.plot(
                100 * curve.removed,
                100 * curve.accuracy,
                **style,
                ms=4,
                lw=2 if way in OURS else 1,
                label=label,
            )
        full = mine[mine.way == "full"].accuracy
        if len(full):
            axes.axhline(100 * full.mean(), color="#777777", lw=1, ls=":", label="full network")
        ours = 100 * mine[mine.way.isin(OURS)].accuracy
        axes.set_ylim(ours.min() - 2 * (ours.max() - ours.min()), None)
        axes.set_title(cell)
    for axes in panels[len(cells) :]:
        axes.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, loc="center", frameon=False)
    figure.supxlabel("parameters removed (%)")
    figure.supylabel("test accuracy (%)")
    return figure


def draw_foresight() -> Figure:
    """The rise of the validation loss that was predicted, and that which came, before and after training."""
    table = pd.read_csv(CSV, dtype={"size": str})
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = table[table.way == "laplace"].dropna(subset=["predicted"])
    for (cell, mine), style in zip(rows.groupby("cell", sort=False), SERIES, strict=False):
        rise = (mine.loss_after - mine.loss_before).clip(lower=1e-4)
        axes.plot(mine.predicted.clip(lower=1e-4), rise, **style | {"linestyle": "none"}, label=cell)
    axes.axline((1e-3, 1e-3), (1, 1), color="#777777", lw=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="predicted rise (nats an example)",
        ylabel="rise on validation data",
    )
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    print(markdown(pd.read_csv(CSV, dtype={"size": str})))
