"""Accuracy against parameters left: reductions at several KL weights, and what else makes a network smaller.

    OMP_NUM_THREADS=1 python analysis/compression_curves.py analysis/studies/lenet5_mnist.yaml

does the runs of a study (as `pyro-bmrs sweep` does, into the same folders), and for each of its reductions by
BMRS_N what `peers.py` says: torch-pruning's importances at the same number of parameters, and the same widths
trained from scratch, all with the total number of epochs of the reduction. Then, from the posterior of the first
cell at `--criteria-at`, networks of several sizes by the rankings of all criteria, each with a short fine-tuning,
and each where its criterion stops by itself. Called again it goes on where it was stopped.

Writes to `--out`: reductions.csv, the study's table; peers.csv, a row per network; criteria.csv. figures.py draws them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from peers import METHODS, measured, pruned, trained, tune, widths_of
from torch import nn
from trials import Rows, figures

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.quality.curves import COMPARED
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.study import Cell, Study
from pyro_bmrs.runs.sweep import run_study

OURS, FULL, SCRATCH = "BMRS_N", "not reduced", "same widths from scratch"
ALL = (OURS, FULL, SCRATCH, *METHODS)
# Shares of the parameters to remove by the ranking of each criterion, and epochs of fine-tuning for each point.
SHARES = (0.5, 0.75, 0.88, 0.95, 0.98)
SHORT = 3


# what is made --------------------------------------------------------------------------------------------


def opened(cell: Cell, data_root: Path | None) -> Run:
    """The finished run of a cell, its posterior in place."""
    run = Run(cell.folder, Recipe.read(cell.recipe), cell.settings, data_root=data_root, progress=False)
    run.load_posterior()
    return run


def figures_of(net: nn.Module, run: Run) -> dict[str, Any]:
    return figures(net, run.dataset, run.parameters_before)


def compare_with_peers(cell: Cell, rows: Rows, methods: list[str], data_root: Path | None) -> None:
    """A row for each method: the reduction of this cell, and what is to be compared with it."""
    seed, weight = cell.settings.seed, cell.settings.kl_weight
    missing = [method for method in methods if not rows.has(seed, None if method == FULL else weight, method)]
    if not missing:
        return
    run = opened(cell, data_root)
    ours, settings, data = run.small_network(), run.settings, run.dataset
    for method in missing:
        begin = time.perf_counter()
        if method == OURS:
            net = ours
        elif method == FULL:
            net = trained(run.recipe, settings, data, settings.epochs + settings.fine_tune)
        elif method == SCRATCH:
            net = trained(run.recipe, settings, data, settings.epochs + settings.fine_tune, widths_of(ours))
        else:
            net = pruned(full_network(cell, run), method, parameters(ours), data, seed)
            tune(net, settings, data, settings.fine_tune)
        seconds = round(time.perf_counter() - begin, 1)
        rows.add(seed, None if method == FULL else weight, method, **figures_of(net, run), seconds=seconds)


def full_network(cell: Cell, run: Run) -> nn.Module:
    """The network without noise after the epochs of the fit; trained once for all that prune it."""
    settings = cell.settings
    how = f"{settings.epochs}-epochs-decay-{settings.weight_decay:g}-seed{settings.seed}"
    path = cell.folder.parent / f"{cell.recipe.stem}-{Path(settings.data).name}-full-{how}.safetensors"
    return trained(run.recipe, run.settings, run.dataset, run.settings.epochs, weights=path)


def compare_criteria(cell: Cell, rows: Rows, data_root: Path | None) -> None:
    """Networks of several sizes by each criterion's ranking on one posterior, and of the size where it stops."""
    places = [*SHARES, None]
    if all(rows.has(name, place) for name in COMPARED for place in places):
        return
    run = opened(cell, data_root)
    for name, criterion in COMPARED.items():
        plan = bmrs.reduce(run.model, run.guide, criterion)
        for place in places:
            if rows.has(name, place):
                continue
            variant = plan if place is None else plan.at(threshold_for(plan, place))
            begin = time.perf_counter()
            small = variant.apply()
            untuned = measured(small, run.dataset)
            tune(small, run.settings, run.dataset, SHORT)
            rows.add(
                name, place, **figures_of(small, run),
                **{f"{score} before tuning": untuned[score] for score in ("validation_accuracy", "accuracy")},
                seconds=round(time.perf_counter() - begin, 1),
            )  # fmt: skip


def threshold_for(plan: bmrs.NetworkPlan, share: float) -> float:
    """The threshold at which the parameters left are nearest to 1 - share of all."""
    scores = plan.table[plan.table.present].score.sort_values(ascending=False, ignore_index=True)
    wanted = (1 - share) * plan.parameters_before()
    low, high = 0, len(scores) - 1
    while low < high:  # parameters fall with the number of structures removed
        middle = (low + high) // 2
        low, high = (
            (low, middle) if plan.at(scores[middle]).parameters_left() <= wanted else (middle + 1, high)
        )
    nearest = min(
        scores.iloc[max(low - 1, 0) : low + 1], key=lambda t: abs(plan.at(t).parameters_left() - wanted)
    )
    return float(nearest)


# what is drawn -------------------------------------------------------------------------------------------

STYLES = {
    OURS: ("#0072B2", "o", "-"),
    SCRATCH: ("#111111", "s", "--"),
    "taylor in steps": ("#D55E00", "^", "--"),
    "taylor": ("#E69F00", "v", ":"),
    "magnitude": ("#009E73", "D", ":"),
    "random": ("#999999", "x", ":"),
}


def draw(peers: pd.DataFrame, criteria: pd.DataFrame, title: str) -> Figure:
    """Left: our reductions and their peers, mean and standard error over seeds. Right: criteria on one posterior."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, (colour, marker, line) in STYLES.items():
        points = peers[peers.method == method].groupby("kl_weight")
        if not len(points):
            continue
        x, y = 100 * (1 - points.removed.mean()), 100 * points.accuracy.mean()
        error = 100 * points.accuracy.std() / points.accuracy.count() ** 0.5
        left.errorbar(
            x, y, error, color=colour, marker=marker, linestyle=line, ms=5, lw=1.2, capsize=2, label=method
        )
    full = peers[peers.method == FULL].accuracy
    left.axhline(100 * full.mean(), color="#999999", lw=0.8)
    left.annotate(
        FULL,
        (1.0, 100 * full.mean()),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
    )
    _finish(left, f"{title}: equal parameters, equal epochs", peers[peers.method == OURS].accuracy)
    if len(criteria):
        _draw_criteria(right, criteria)
    else:
        right.set_axis_off()
    return figure


def _draw_criteria(axes: Axes, criteria: pd.DataFrame) -> None:
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#111111", "#56B4E9", "#999999"]
    curves = zip(criteria.groupby("criterion", sort=False), colours, strict=False)
    for index, ((name, points), colour) in enumerate(curves):
        curve = points[points.share.notna()].sort_values("removed")
        # some lie on one another: the later the thinner
        axes.plot(
            100 * (1 - curve.removed),
            100 * curve.accuracy,
            color=colour,
            marker=".",
            lw=1 + 0.7 * (len(colours) - 1 - index),
            label=str(name),
        )
        stop = points[points.share.isna()]
        axes.plot(
            100 * (1 - stop.removed),
            100 * stop.accuracy,
            color=colour,
            marker="*",
            ms=13,
            mec="white",
            ls="none",
        )
    _finish(
        axes,
        f"one posterior, {SHORT} epochs of tuning; stars: stopping points",
        criteria[criteria.criterion == "BMRS_N"].accuracy,
    )


def _finish(axes: Axes, title: str, accuracy: pd.Series) -> None:
    axes.set(xscale="log", xlabel="parameters left (%)", ylabel="test accuracy (%)")
    axes.invert_xaxis()
    axes.set_title(title, fontsize=9)
    axes.set_ylim(100 * (accuracy.min() - 0.02 - (1 - accuracy.max())), 100 * min(accuracy.max() + 0.005, 1))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7.5, frameon=False, loc="lower left")
    axes.grid(alpha=0.3, which="both", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def cells_of(study: Study) -> Iterator[Cell]:
    return (cell for cell in study.cells if cell.settings.criterion == OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=Path, help="folder of the runs; default the study's")
    parser.add_argument(
        "--out", type=Path, help="default analysis/results/compression_curves/<name of the study>"
    )
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--methods", nargs="*", default=ALL, choices=ALL, metavar="METHOD")
    parser.add_argument(
        "--criteria-at", type=float, metavar="KL_WEIGHT", help="default: no curves of criteria"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study.read(given.study, out=given.runs)
    out = given.out or Path(__file__).parent / "results" / "compression_curves" / given.study.stem
    peers = Rows(out / "peers.csv", ("seed", "kl_weight", "method"))
    criteria = Rows(out / "criteria.csv", ("criterion", "share"))
    write_table(out / "reductions.csv", run_study(study, data_root=given.data_root).drop(columns="folder"))
    for cell in cells_of(study):
        compare_with_peers(cell, peers, given.methods, given.data_root)
    for cell in [cell for cell in cells_of(study) if cell.settings.kl_weight == given.criteria_at][:1]:
        compare_criteria(cell, criteria, given.data_root)


if __name__ == "__main__":
    main()
