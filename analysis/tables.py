"""Tables of README and docs that are made of committed CSVs. `python analysis/figures.py` writes them into their pages.

One list is typed: what others have published.

A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "analysis" / "results"
OURS = {
    "laplace": "a trained network, by curvature",
    "variational": "variational, from scratch",
    "both": "curvature, then variational",
}
PEERS = {
    "scratch": "the same widths from scratch",
    "taylor in steps": "Taylor in 100 steps (torch-pruning)",
    "fisher masks": "masks (Kwon et al.)",
    "posterior damage": "posterior damage (SpaM)",
}
LABELS = OURS | PEERS
# Removed and test accuracy in per cent: BMRS_N of Wright et al. (2024), Table 1.
PUBLISHED = {
    "MLP, MNIST": (48.9, 96.95),
    "MLP, Fashion-MNIST": (93.2, 84.99),
    "MLP, CIFAR-10": (76.4, 43.59),
    "LeNet5, MNIST": (86.9, 95.59),
    "LeNet5, Fashion-MNIST": (88.0, 77.90),
    "LeNet5 × 3, CIFAR-10": (62.9, 66.14),
}
# Reductions of study 1, whose KL weight was chosen for each cell (docs/results/kl_weight.md): files, and rows of them.
STUDY_1 = [
    ("MLP, MNIST", "mlp_inputs/reductions", "data == 'mnist' and kl_weight == 10"),
    ("MLP, MNIST", "mlp_inputs/reductions", "data == 'mnist' and kl_weight == 18"),
    ("MLP, Fashion-MNIST", "mlp_inputs/reductions", "data == 'fashion-mnist' and kl_weight == 15"),
    (
        "MLP, Fashion-MNIST",
        "mlp_inputs/reductions",
        "data == 'fashion-mnist' and kl_weight == 20 and epochs == 50",
    ),
    ("MLP, CIFAR-10", "mlp_inputs/reductions", "data == 'cifar10' and kl_weight == 7"),
    ("LeNet5, MNIST", "compression_curves/lenet5_mnist*/reductions", "kl_weight == 80"),
    ("LeNet5, MNIST", "compression_curves/lenet5_mnist*/reductions", "kl_weight == 240"),
    ("LeNet5, Fashion-MNIST", "weight_decay/weight_decay", "recipe == 'lenet5.py' and kl_weight == 130"),
    ("LeNet5 × 3, CIFAR-10", "compression_curves/lenet5_cifar10/reductions", "kl_weight == 140"),
    ("LeNet-5-Caffe, MNIST", "weight_decay/weight_decay", "recipe == 'lenet5_caffe.py' and kl_weight == 70"),
    ("LeNet-5-Caffe, MNIST", "weight_decay/weight_decay", "recipe == 'lenet5_caffe.py' and kl_weight == 80"),
]


# Points of parameters removed: where seeds differ by as much, the range is told.
_TOLD = 10


def cells() -> pd.DataFrame:
    """Rows of the cells that were begun: with a way of ours beside the full network."""
    table = pd.read_csv(RESULTS / "cells" / "cells.csv", dtype={"size": str})
    return table[table.cell.isin(table[table.way.isin(OURS)].cell)]


def rows_of(heads: list[str], lines: list[list[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def _mean(values: pd.Series, digits: int, factor: float = 1.0) -> str:
    """A mean and, of several seeds, its standard error."""
    error = f" ± {factor * values.sem():.{digits}f}" if len(values) > 1 else ""
    return f"{factor * values.mean():.{digits}f}{error}"


def _removed_and_accuracy(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    least, mean, most = (
        100 * value for value in (rows.removed.min(), rows.removed.mean(), rows.removed.max())
    )
    spread = f" ({least:.0f} to {most:.0f})" if most - least >= _TOLD else ""
    return f"{mean:.1f}{spread} / {_mean(rows.accuracy, 2, 100)}"


def _published(cell: str) -> str:
    return "{:.1f} / {:.2f}".format(*PUBLISHED[cell]) if cell in PUBLISHED else ""


def own_sizes() -> str:
    """Nothing chosen: parameters removed and accuracy at the size that each way chooses itself."""
    table, lines = cells(), []
    own = table[table["size"] == "own"]
    for cell, rows in own.groupby("cell", sort=False):
        full = rows[rows.way == "full"]
        lines.append([
            cell, _published(cell), _mean(full.accuracy, 2, 100),
            *(_removed_and_accuracy(rows[rows.way == way]) for way in OURS),
            str(rows[rows.way.isin(OURS)].seed.nunique()),
        ])  # fmt: skip
    return rows_of(["", "published BMRS_N", "full network", *OURS.values(), "seeds"], lines)


def in_short() -> str:
    """For the README: the size that is chosen by curvature, then variational."""
    table, lines = cells(), []
    own = table[(table["size"] == "own") & (table.way == "both")]
    for cell, rows in own.groupby("cell", sort=False):
        ours = f"{100 * rows.removed.mean():.1f} / {100 * rows.accuracy.mean():.2f}"
        lines.append([cell, _published(cell), ours, str(rows.seed.nunique())])
    return rows_of(["", "published BMRS_N", "ours", "seeds"], lines)


def _by_size(column: str, factor: float, digits: int, best: Callable[[pd.Series], float]) -> str:
    """A column for each way, a row for each cell and size asked for.

    Bold is the best way over the seeds that it has, of the ways that have these seeds.
    """
    table, lines = cells(), []
    table = table[(table.way != "full") & (table["size"] != "own")]
    for (cell, size), rows in table.groupby(["cell", "size"], sort=False):
        by_seed = factor * rows.pivot(index="seed", columns="way", values=column).reindex(
            columns=list(LABELS)
        )
        told = []
        for way in LABELS:
            values = by_seed[way].dropna()
            if values.empty:
                told.append("")
                continue
            text = _mean(values, digits)
            rivals = by_seed.loc[values.index].dropna(axis="columns").mean().round(digits)
            if len(rivals) > 1 and rivals[way] == best(rivals):
                text = f"**{text}**"
            if len(values) < len(by_seed):
                text += f" ({len(values)} of {len(by_seed)})"
            told.append(text)
        lines.append([cell, f"{100 * (1 - float(size)):.0f} %", *told])
    order = {cell: place for place, cell in enumerate(dict.fromkeys(table.cell))}
    lines.sort(key=lambda line: (order[line[0]], line[1]))
    return rows_of(["", "removed", *LABELS.values()], lines)


def accuracies() -> str:
    return _by_size("accuracy", 100, 2, pd.Series.max)


def losses() -> str:
    return _by_size("negative_log_likelihood", 1, 3, pd.Series.min)


def calibration() -> str:
    return _by_size("calibrated_error", 1, 4, pd.Series.min)


def chance() -> str:
    """What calibration errors are of the full networks, and of networks whose probabilities are true."""
    rows = pd.read_csv(RESULTS / "calibration" / "chance.csv")
    lines = [
        [
            row.cell, f"{100 * row.accuracy:.2f}", f"{row.calibrated_error:.4f}",
            f"{row.by_chance:.4f} ± {row.deviation:.4f}",
        ]
        for row in rows.itertuples()
    ]  # fmt: skip
    return rows_of(["full network", "accuracy", "calibration error", "by chance"], lines)


def chosen_weights() -> str:
    """What study 1 had with a KL weight chosen for the cell, and what today's defaults have at that size."""
    table, lines = cells(), []
    for cell, files, which in STUDY_1:
        runs = pd.concat(map(pd.read_csv, sorted(RESULTS.glob(f"{files}.csv")))).query(which)
        removed, accuracy = 100 * runs[["removed", "accuracy"]].mean()
        mine, told = table[(table.cell == cell) & table.way.isin(OURS)], []
        for way in OURS:
            curve = 100 * mine[mine.way == way].groupby("size")[["removed", "accuracy"]].mean()
            between = _between(curve.sort_values("removed"), removed)
            told.append("" if between is None else f"{between:.2f}")
        if any(told):
            lines.append([cell, f"{removed:.1f} %", f"{accuracy:.2f}", *told])
    return rows_of(["", "removed", "study 1, weight chosen", *OURS.values()], lines)


def _between(curve: pd.DataFrame, removed: float) -> float | None:
    """The accuracy at that share, on the line between the sizes beside it."""
    below, above = curve[curve.removed <= removed], curve[curve.removed >= removed]
    if below.empty or above.empty:
        return None
    a, b = below.iloc[-1], above.iloc[0]
    span = b.removed - a.removed
    return float(a.accuracy + (b.accuracy - a.accuracy) * ((removed - a.removed) / span if span else 0.0))


def paths() -> pd.DataFrame:
    """Sizes of trained networks (foresight.py), with the share of parameters (%) that left."""
    rows = pd.read_csv(RESULTS / "foresight" / "foresight.csv", dtype={"removed": str})
    full = rows[rows.removed == "0.0"].set_index(["network", "seed"]).parameters
    before = full.loc[pd.MultiIndex.from_frame(rows[["network", "seed"]])].to_numpy()
    return rows.assign(share=100 * (1 - rows.parameters / before))


def foresight() -> str:
    """Trained networks: what the evidence says of sizes, and what came."""
    lines = []
    for (name, _), rows in paths().groupby(["network", "seed"], sort=False):
        full, own = (rows[rows.removed == size].iloc[0] for size in ("0.0", "own"))
        asked = rows[rows.removed != "own"]
        highest, best = rows.loc[rows.evidence.idxmax()], rows.loc[rows.refitted_loss.idxmin()]
        rise = own.train_loss - full.train_loss
        lines.append([
            name, f"{own.share:.0f} %", f"{highest.share:.0f} %", f"{best.share:.0f} %",
            f"{full.validation_loss:.3f} → {own.refitted_loss:.3f}", f"{own.predicted:.4f}", f"{rise:.4f}",
            f"{rise / own.predicted:.1f}", f"{asked.evidence.corr(-asked.refitted_loss, method='spearman'):.2f}",
        ])  # fmt: skip
    heads = ["", "chosen size", "maximum of ΔF", "least validation loss", "validation loss, full → chosen and refitted",
             "rise predicted", "rise", "ratio", "ΔF ~ − validation loss"]  # fmt: skip
    return rows_of(heads, lines)


TABLES = {
    "foresight": foresight,
    "own sizes": own_sizes,
    "in short": in_short,
    "accuracies": accuracies,
    "losses": losses,
    "calibration": calibration,
    "chance": chance,
    "chosen weights": chosen_weights,
}
MARKED = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n\n?).*?(\n?<!-- end of table -->)", re.S)


def written(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: for a table that is not in TABLES.
    """
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3].lstrip()}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
