"""How much the gradient of the posterior's parameters varies with the number of draws of θ per batch.

    OMP_NUM_THREADS=1 python analysis/gradient_variance.py [--out FOLDER]

LeNet5 on MNIST after `--epochs` epochs of a fit; one batch of 128, whose gradient is drawn again and again.
Writes gradient_variance.csv: draws, stratified, and the standard deviation of the gradients of loc and of
log scale (root mean square over all units) over that of 128 independent draws, one per example. figures.py draws it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.files import write_atomically
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
DRAWS = (1, 2, 4, 8, 16, 32, 64, 128)


def deviations(objective: Objective, x: Tensor, y: Tensor, repeats: int) -> dict[str, float]:
    """Root mean square, over units, of the standard deviation of the gradient by each kind of parameter."""
    gradients: dict[str, list[Tensor]] = {"loc": [], "log_scale": []}
    posteriors = objective.guide.posteriors
    for _ in range(repeats):
        objective.zero_grad()
        objective(x, y, 1.0)[0].backward()
        for name, found in gradients.items():
            found.append(torch.cat([getattr(posterior, name).grad for posterior in posteriors]))
    return {name: float(torch.stack(found).var(0).mean().sqrt()) for name, found in gradients.items()}


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for stratified, colour in ((False, "#d08a3e"), (True, "#0b559f")):
        rows = table[table.stratified == stratified]
        axes.plot(
            rows.draws, rows["loc"], "o-", color=colour, label="stratified" if stratified else "independent"
        )
    axes.axhline(1, color="#999", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(DRAWS, map(str, DRAWS))
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("values of θ per batch of 128")
    axes.set_ylabel("standard deviation of the gradient of loc,\nrelative to 128 independent draws")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gradient_variance")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.read(MODELS / "lenet5.py")
    data = load_data("mnist", image_size=32, seed=0)
    model = recipe.model(recipe.network(data, {}, 0))
    guide = recipe.guide(model)
    bmrs.fit(
        model, guide, data.train, epochs=given.epochs, kl_weight=100.0, learning_rate=1.4e-3, warm_up=0.0
    )
    x, y = data.train[:128]
    rows = []
    torch.manual_seed(0)
    for stratified in (False, True):
        for draws in DRAWS:
            objective = Objective(
                model, guide, (x, y), dataset_size=len(data.train), draws=draws, stratified=stratified
            )
            found = deviations(objective, x, y, given.repeats)
            rows.append({"draws": draws, "stratified": stratified, **found})
    table = pd.DataFrame(rows)
    reference = table[(table.draws == 128) & ~table.stratified].iloc[0]
    for name in ("loc", "log_scale"):
        table[name] = (table[name] / reference[name]).round(3)
    write_atomically(given.out / "gradient_variance.csv", lambda beside: table.to_csv(beside, index=False))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
