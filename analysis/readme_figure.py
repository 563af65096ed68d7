"""The README's figure: kept and removed structures, and accuracy against parameters, from committed CSVs."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure


def draw(folder: Path) -> Figure:
    table = pd.read_csv(folder / "structures.csv", dtype={"layer": str})
    curve = pd.read_csv(folder / "diagnosis" / "curves.csv")
    curve = curve[curve.criterion == "BMRS_N (this plan)"]
    evaluation = pd.read_csv(folder / "evaluation.csv")
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    layers = list(dict.fromkeys(table.layer))
    for row, layer in enumerate(layers):
        kept = int((~table.removed[table.layer == layer]).sum())
        total = int((table.layer == layer).sum())
        left.barh(row, kept / total, color="#0b559f")
        left.barh(
            row, 1 - kept / total, left=kept / total, color="#fff", edgecolor="#d08a3e", hatch="xxx", lw=0.8
        )
        left.text(1.02, row, f"{kept} of {total}", va="center", fontsize=9)
    left.set_yticks(range(len(layers)), [layer.rsplit(".")[-1] for layer in layers])
    left.invert_yaxis()
    left.set_xlim(0, 1.22)
    left.set_xticks([])
    left.set_title("structures kept (filled) and removed (crossed)", fontsize=10)
    left.spines[["top", "right", "bottom"]].set_visible(False)

    right.plot(100 * curve.parameters_removed, 100 * curve.accuracy, "o-", ms=3, color="#0b559f")
    own = curve[curve.is_plan].iloc[0]
    right.plot(100 * own.parameters_removed, 100 * own.accuracy, "*", ms=15, color="#d0552b")
    right.annotate(
        "the size that is chosen", (100 * own.parameters_removed, 100 * own.accuracy), (30, 55), fontsize=9,
        arrowprops=dict(arrowstyle="-", color="#888"),
    )  # fmt: skip
    right.set_xlabel("parameters removed (%)")
    right.set_ylabel("validation accuracy (%),\nno fine-tuning")
    right.set_ylim(0, 103)
    right.spines[["top", "right"]].set_visible(False)
    removed = 100 * (1 - evaluation.parameters.iloc[-1] / evaluation.parameters.iloc[0])
    figure.suptitle(
        f"LeNet5 on MNIST: {removed:.1f} % of {evaluation.parameters.iloc[0]:,} parameters removed, test "
        f"accuracy {100 * evaluation.accuracy.iloc[0]:.2f} % → {100 * evaluation.accuracy.iloc[-1]:.2f} %",
        fontsize=11,
    )
    return figure
