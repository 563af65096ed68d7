"""The figures of docs/gallery, all in one form: what a network can do against the share of parameters left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pyro_bmrs.figures import plot_frontier
from pyro_bmrs.figures.style import BLACK, BLUE, GREY, ORANGE, SERIES, styled_figure

RESULTS = Path(__file__).parent / "results"


def _sizes(measure: str, full: float, lines: Mapping[str, pd.Series]) -> Figure:
    """A line for each way: its measure by parameters left (%), the full network dashed."""
    with styled_figure(3.4) as figure:
        axes = figure.add_subplot()
        axes.axhline(full, color=GREY, linestyle="--", linewidth=1, label="full network")
        for (label, line), style in zip(lines.items(), SERIES, strict=False):
            line = line.sort_index()
            axes.plot(line.index, line, **style, markersize=5, label=label)
        axes.invert_xaxis()
        axes.set(xlabel="parameters left (%)", ylabel=measure)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def trained(name: str) -> Figure:
    """ResNet-20 and the vision transformer: means over seeds."""
    table = pd.read_csv(RESULTS / f"trained_{name}" / "results.csv", dtype={"size": str})

    def line(method: str, epochs: int) -> pd.Series:
        rows = table[(table.method == method) & (table.epochs == epochs)]
        means = 100 * rows.groupby("size")[["removed", "accuracy"]].mean()
        return pd.Series(means.accuracy.to_numpy(), 100 - means.removed)

    return _sizes(
        "test accuracy (%)", 100 * table[table.method == "full"].accuracy.mean(),
        {
            "by evidence, without training": line("evidence", 0), "… after 6 epochs": line("evidence", 6),
            "masks (Kwon et al.)": line("fisher masks", 0), "… after 6 epochs ": line("fisher masks", 6),
        },
    )  # fmt: skip


def crepe() -> Figure:
    table = pd.read_csv(RESULTS / "crepe" / "results.csv")
    tones = table[table.sound == "tones"].drop_duplicates(["parameters", "epochs", "network"])
    made = tones[~tones.network.str.contains("before") & (tones.parameters != 486552) & (tones.removed > 0)]
    tiny = tones[(tones.parameters == 486552) & (tones.epochs == 0)]

    def line(rows: pd.DataFrame) -> pd.Series:
        return pd.Series((100 * rows.within_50).to_numpy(), 100 - 100 * rows.removed)

    return _sizes(
        "frames within 50 cents (%)", 100 * tones[tones.network == "full"].within_50.iloc[0],
        {
            "by evidence, without training": line(made[made.epochs == 0]),
            "… after 3 epochs": line(made[made.epochs == 3]), "the authors' own tiny": line(tiny),
        },
    )  # fmt: skip


def minilm() -> Figure:
    table = pd.read_csv(RESULTS / "minilm" / "results.csv")

    def line(way: str) -> pd.Series:
        rows = table[table.way == way]
        return pd.Series((100 * rows.first_ten).to_numpy(), 100 - 100 * rows.removed)

    return _sizes(
        "right answer among ten (%)", 100 * table[table.way == "full"].first_ten.iloc[0],
        {"by evidence, without training": line("evidence"), "by magnitude": line("magnitude")},
    )  # fmt: skip


def large(network: str) -> Figure:
    table = pd.read_csv(RESULTS / "large_networks" / "results.csv")
    table = table[table.network == network].sort_values(["way", "rate"])
    with styled_figure(2.6) as figure:
        axes = figure.add_subplot()
        rows = table[table.way != "full"]
        places = range(len(rows))
        full = 100 * table[table.way == "full"].accuracy.iloc[0]
        axes.axvline(full, color=GREY, linestyle="--", linewidth=1, label="full network")
        axes.plot(100 * rows.accuracy_untrained, places, "s", color=ORANGE, label="before the last epochs")
        axes.plot(100 * rows.accuracy, places, "o", color=BLUE, label="after them")
        labels = [f"{row.way}, rate {row.rate:g}" for row in rows.itertuples(index=False)]
        axes.set_yticks(list(places), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("test accuracy (%)")
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def diabetes() -> Figure:
    return plot_frontier(pd.read_csv(RESULTS / "gallery" / "diabetes_frontier.csv"))


def schools() -> Figure:
    table = pd.read_csv(RESULTS / "gallery" / "eight_schools.csv")
    with styled_figure(3.0) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.plot(table.scale, table.exact, color=BLACK, label="exact, by quadrature")
        axes.plot(table.scale, table.by_guide, "o", color=ORANGE, label="by the guide")
        axes.errorbar(
            table.scale, table.by_model, yerr=2 * table.standard_error, fmt="s", markersize=4, color=BLUE,
            label="by the model, ± 2 errors",
        )  # fmt: skip
        axes.set(xscale="log", xlabel="scale of the reduced prior of tau", ylabel="ΔF (nats)")
        figure.legend(loc="outside upper left", ncols=2)
    return figure
