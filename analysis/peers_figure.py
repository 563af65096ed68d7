"""The figure of what else makes a network as small: accuracy at equal parameters and epochs, from committed CSVs."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "compression_curves"
# (folder, KL weight, title)
PANELS = (
    ("lenet5_mnist_again", 80, "LeNet5, MNIST"),
    ("lenet5_mnist_again", 240, "LeNet5, MNIST"),
    ("lenet5_fashion", 160, "LeNet5, Fashion-MNIST"),
    ("lenet5_cifar10", 140, "LeNet5 × 3, CIFAR-10"),
)
METHODS = {
    "BMRS_N": ("BMRS_N, this package", "#0b559f"),
    "taylor in steps": ("torch-pruning, Taylor, 100 steps", "#d08a3e"),
    "same widths from scratch": ("its widths, from scratch", "#555555"),
    "magnitude": ("torch-pruning, magnitude", "#999999"),
    "taylor": ("torch-pruning, Taylor, one step", "#999999"),
}
# Peers that show how wide a panel is.
NEAR = ("taylor in steps", "same widths from scratch")


def _panel(axes: Axes, table: pd.DataFrame, title: str) -> None:
    """A dot per method: the mean over seeds with its standard error, and each seed."""
    near = [100 * table[table.method == method].accuracy for method in ("BMRS_N", *NEAR)]
    best = near[0].mean()
    # what lies farther off is named at the edge, or nothing else could be told apart
    left = best - 4 * (best - min(found.min() for found in near))
    for row, (method, (_, colour)) in enumerate(METHODS.items()):
        found = 100 * table[table.method == method].accuracy
        if found.empty:
            axes.text(
                0.02,
                row,
                "not run",
                transform=axes.get_yaxis_transform(),
                fontsize=7,
                va="center",
                color="#999",
            )
            continue
        if found.mean() < left:
            axes.text(
                0.02, row, f"← {found.mean():.2f}", transform=axes.get_yaxis_transform(), fontsize=7.5, va="center",
                color=colour,
            )  # fmt: skip
            continue
        axes.plot(found, [row] * len(found), "|", color=colour, ms=7, alpha=0.6)
        axes.plot(found.mean(), row, "o", color=colour, ms=7)
        axes.annotate(
            f"{found.mean():.2f}", (found.mean(), row), (0, 7), textcoords="offset points", ha="center", fontsize=7.5,
            color=colour,
        )  # fmt: skip
    ours = table[table.method == "BMRS_N"]
    axes.set_title(f"{title}\n{100 * ours.removed.mean():.1f} % removed", fontsize=9)
    axes.set_xlabel("test accuracy (%)")
    axes.set_ylim(len(METHODS) - 0.5, -0.7)
    axes.set_xlim(left, best + 0.3 * (best - left))
    axes.grid(axis="x", alpha=0.3, lw=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw() -> Figure:
    figure = Figure(figsize=(11.5, 2.9), layout="constrained")
    for axes, (folder, weight, title) in zip(
        figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True
    ):
        table = pd.read_csv(RESULTS / folder / "peers.csv")
        _panel(axes, table[table.kl_weight == weight], title)
        axes.set_yticks(range(len(METHODS)), [label for label, _ in METHODS.values()], fontsize=8.5)
    return figure
