"""How well a ranking foresees the loss: the score of each structure against what its removal alone costs.

    OMP_NUM_THREADS=1 python analysis/ranking.py RUN [RUN …] [--data-root FOLDER]

For each run of `pyro-bmrs run`, with its fitted posterior: every structure in turn is set to θ = 0, all others at
E[θ], nothing is tuned, and the NLL of the validation data is measured. Beside it stand the scores of all criteria.
Writes to `--out`: units.csv, a row per structure; ranking.csv, Spearman's correlation between the true rise in NLL
and what keeps a structure, per run and criterion: over all structures, within layers (mean weighted by structures)
and among those that BMRS_N keeps. Called again it does the runs that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import track
from scipy.stats import spearmanr

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.quality import predictions, quality
from pyro_bmrs.quality.curves import COMPARED
from pyro_bmrs.runs.folder import RunFolder
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run

# Resamples of structures for the standard error of a correlation.
RESAMPLES = 1000


def identity(folder: Path) -> dict[str, Any]:
    """What tells a run from the others."""
    stored = RunFolder(folder).needed_settings()
    settings = stored["settings"]
    return {
        "recipe": stored["recipe"], "data": settings.data, "kl_weight": settings.kl_weight, "seed": settings.seed
    }  # fmt: skip


def units_of(folder: Path, data_root: Path | None) -> pd.DataFrame:
    """A row per structure: what its removal alone does to the validation NLL (nats per example), and its scores."""
    stored = RunFolder(folder).needed_settings()
    run = Run(folder, Recipe.read(folder / "recipe.py", stored["recipe"]), stored["settings"], data_root=data_root,
              progress=False)  # fmt: skip
    run.load_posterior()
    means = {site: mean.detach() for site, mean in run.guide.mean().items()}

    def loss(scales: dict[str, torch.Tensor]) -> float:
        return float(
            quality(predictions(run.model, run.dataset.validation, scales))["negative_log_likelihood"]
        )

    table = None
    for name, criterion in COMPARED.items():
        found = bmrs.reduce(run.model, run.guide, criterion).table
        table = found[found.present][["layer", "unit"]].copy() if table is None else table
        table[name] = -found.score[found.present]  # higher: to be kept
    assert table is not None
    base = loss(means)
    changes = []
    for layer, count in track(
        [(layer, int(index)) for layer, mean in means.items() for index in range(len(mean))],
        description=folder.name,
    ):
        without = means[layer].clone()
        without[count] = 0.0
        changes.append(loss({**means, layer: without}) - base)
    table.insert(2, "change_of_loss", changes)
    for place, (name, value) in enumerate(identity(folder).items()):
        table.insert(place, name, value)
    return table


def correlations(units: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each criterion with the true change: of all, within layers, of those kept."""
    rows = []
    generator = np.random.default_rng(0)
    for key, run in units.groupby(["recipe", "data", "kl_weight", "seed"], sort=False):
        for name in COMPARED:
            score, truth = run[name].to_numpy(), run.change_of_loss.to_numpy()
            resampled = []
            for _ in range(RESAMPLES):
                chosen = generator.integers(len(run), size=len(run))
                resampled.append(spearmanr(score[chosen], truth[chosen]).statistic)
            layers = [
                (spearmanr(layer[name], layer.change_of_loss).statistic, len(layer))
                for _, layer in run.groupby("layer")
            ]
            within, sizes = zip(*[pair for pair in layers if np.isfinite(pair[0])], strict=True)
            kept = run[run["BMRS_N"] > 0]
            rows.append(
                dict(zip(("recipe", "data", "kl_weight", "seed"), key, strict=True))
                | {
                    "criterion": name, "structures": len(run), "spearman": spearmanr(score, truth).statistic,
                    "standard_error": float(np.nanstd(resampled)),
                    "within_layers": float(np.average(within, weights=sizes)), "kept": len(kept),
                    "among_kept": spearmanr(kept[name], kept.change_of_loss).statistic,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def draw(units: pd.DataFrame) -> Figure:
    """For each run a panel: ΔF of BMRS_N, and the rise in loss that it is to foresee, by layer."""
    runs: list[Any] = list(units.groupby(["recipe", "data", "kl_weight", "seed"], sort=False))
    figure = Figure(figsize=(4.6 * len(runs), 3.8), layout="constrained")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#111111")
    for axes, (key, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        for (layer, points), colour in zip(run.groupby("layer", sort=False), colours, strict=False):
            axes.plot(-points["BMRS_N"], points.change_of_loss, ".", color=colour, ms=5, label=layer)
        axes.axvline(0, color="#999", lw=0.8)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_yscale("symlog", linthresh=1e-5)
        axes.set(xlabel="ΔF of BMRS_N (nats); removed where ≥ 0", ylabel="rise in validation NLL (nats)")
        axes.set_title(f"{key[0].removesuffix('.py')}, {key[1]}, w = {key[2]:g}", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranking")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out / "units.csv"
    units = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for folder in given.runs:
        key = identity(folder)
        if len(units) and bool(
            pd.concat([units[name] == value for name, value in key.items()], axis=1).all(1).any()
        ):
            continue
        units = pd.concat([units, units_of(folder, given.data_root)], ignore_index=True)
        write_table(path, units)
    write_table(given.out / "ranking.csv", correlations(units))


if __name__ == "__main__":
    main()
