"""The figure of the pretrained networks: what was kept of each layer, and the accuracy, from committed CSVs."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("resnet", "ResNet-20"), ("vit", "small vision transformer")), strict=True
    ):
        table = pd.read_csv(RESULTS / f"pretrained_{name}" / "structures.csv", dtype={"layer": str})
        results = pd.read_csv(RESULTS / f"pretrained_{name}" / "results.csv").set_index("network")
        before, after = results.loc["trained without noise"], results.loc["smaller, fine-tuned"]
        layers = list(dict.fromkeys(table.layer))
        for row, layer in enumerate(layers):
            removed = table.removed[table.layer == layer]
            kept = 1 - removed.mean()
            axes.barh(row, kept, color="#0b559f")
            axes.barh(row, 1 - kept, left=kept, color="#fff", edgecolor="#d08a3e", hatch="xxx", lw=0.8)
            axes.text(1.02, row, f"{(~removed).sum()} of {len(removed)}", va="center", fontsize=8)
        names = [layer.replace("encoder.layers.encoder_layer_", "").replace("self_", "") for layer in layers]
        axes.set_yticks(range(len(layers)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        removed = 100 * (1 - after.parameters / before.parameters)
        axes.set_title(
            f"{title}: {removed:.1f} % of {before.parameters:,.0f}\nparameters removed, test accuracy "
            f"{100 * before.test_accuracy:.2f} % → {100 * after.test_accuracy:.2f} %",
            fontsize=9,
        )
    figure.suptitle(
        "CIFAR-10: structures kept (filled) and removed (crossed) of trained networks", fontsize=10
    )
    return figure
