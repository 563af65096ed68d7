"""The figure of what fits cost, from committed CSVs: steps, and whole fits that shrink."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "plain again": "A/A control",
    "floor": "floor: one Normal site in Pyro",
    "ours": "ours: fused, 16 stratified draws",
    "ours, a draw per example": "… a draw per example",
    "packed, in Pyro's ELBO": "… in Pyro's ELBO",
    "site by site, in Pyro's ELBO": "… site by site, in Pyro's ELBO",
}
CASES = {
    "lenet5_w100": "LeNet5, w = 100",
    "lenet5_w200": "LeNet5, w = 200",
    "lenet5_caffe_w100": "LeNet-5-Caffe, w = 100",
    "mlp_3x1000_w100": "MLP 3×1000, w = 100",
}
COLOURS = ("#0b559f", "#5aa2d8", "#d08a3e", "#777")


def steps(axes: Axes) -> None:
    table = pd.read_csv(RESULTS / "step_times" / "step_times.csv")
    networks = list(dict.fromkeys(table.network))
    for row, (kind, label) in enumerate(KINDS.items()):
        for column, network in enumerate(networks):
            found = table[(table.kind == kind) & (table.network == network)]
            if found.empty:
                continue
            place = row + (column - 1) * 0.25
            axes.barh(
                place, found.ratio.iloc[0], 0.22, color=COLOURS[column], label=network if row == 2 else None
            )
            axes.text(
                found.ratio.iloc[0] * 1.03, place, f"{found.ratio.iloc[0]:.2f}", va="center", fontsize=7
            )
        axes.text(0.9, row, label, ha="right", va="center", fontsize=8)
    axes.axvline(1, color="#999", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.93, 30)
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("a step, relative to one without noise", fontsize=9)


def whole_fits(axes: Axes) -> None:
    for colour, (case, label) in zip(COLOURS, CASES.items(), strict=True):
        table = pd.read_csv(RESULTS / "fit_times" / f"{case}.csv")
        table = table[table.seed == 0]
        seconds = table.pivot_table(index="epoch", columns="kind", values="cpu_seconds").cumsum()
        last = table[(table.kind == "epoch") & table.parameters_removed.notna()].iloc[0]
        axes.plot(
            seconds.index, seconds.epoch / seconds.plain, color=colour,
            label=f"{label}: {100 * last.parameters_removed:.1f} % removed, {100 * last.test_accuracy:.2f} %",
        )  # fmt: skip
    axes.axhline(1, color="#999", lw=0.8)
    axes.set_ylim(0, 1.5)
    axes.set_xlabel("epoch")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.set_title(
        "time since the start of a fit that shrinks,\nrelative to training the full network without noise",
        fontsize=9,
    )


def draw() -> Figure:
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    steps(left)
    whole_fits(right)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
