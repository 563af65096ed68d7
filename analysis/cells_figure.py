"""The figure of the cells in docs/results.md. `python analysis/figures.py cells` draws it."""

from __future__ import annotations

import tables
from matplotlib.figure import Figure

from pyro_bmrs.figures.style import SERIES


def draw() -> Figure:
    """Accuracy against the share removed, a panel for each cell: means at the sizes asked for, and each seed's own."""
    table = tables.cells()
    cells = [*dict.fromkeys(table.cell)]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    for axes, cell in zip(panels, cells, strict=False):
        mine = table[table.cell == cell]
        for (way, label), style in zip(tables.LABELS.items(), SERIES, strict=False):
            rows = mine[mine.way == way]
            if rows.empty:
                continue
            own, asked = rows[rows["size"] == "own"], rows[rows["size"] != "own"]
            hollow = {**style, "linestyle": "none", "mfc": "none"}
            axes.plot(100 * own.removed, 100 * own.accuracy, **hollow, ms=5)
            curve = asked.groupby("size")[["removed", "accuracy"]].mean().sort_values("removed")
            axes.plot(
                100 * curve.removed,
                100 * curve.accuracy,
                **style,
                ms=4,
                lw=2 if way in tables.OURS else 1,
                label=label,
            )
        full = mine[mine.way == "full"].accuracy
        if len(full):
            axes.axhline(100 * full.mean(), color="#777777", lw=1, ls=":", label="full network")
        ours = 100 * mine[mine.way.isin(tables.OURS)].accuracy
        spread = ours.max() - ours.min()
        axes.set_ylim(ours.min() - 2 * spread, max(ours.max(), 100 * full.max()) + spread / 5)
        axes.set_title(cell)
    for axes in panels[len(cells) :]:
        axes.axis("off")
    drawn = {
        label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in (*tables.LABELS.values(), "full network") if label in drawn]
    panels[-1].legend([drawn[label] for label in labels], labels, loc="center", frameon=False)
    figure.supxlabel("parameters removed (%)")
    figure.supylabel("test accuracy (%)")
    return figure
