"""A trained network made smaller by curvature, by a variational fit, or by one after the other: equal size and epochs.

    OMP_NUM_THREADS=1 python analysis/two_ways.py models/lenet5.py fashion-mnist WEIGHTS --out FOLDER
        [--removed 0.8 0.9] [--epochs 6 18] [--kl-weights 30 100] [--batch-size 128] [--data-root DIR]

WEIGHTS is a state dict of the recipe's network without noise, as trained_networks.py leaves it. The ways, each with so
many epochs after the training:

- curvature: the Laplace plan of that size, refitted, then all epochs of plain training;
- variational: two thirds of them a fit from these weights with noise on all structures, once for each KL weight, the
  threshold at that size, then a third of plain training;
- both: the Laplace plan that removes half as much, refitted, then as variational.

Of the KL weights the row has that with the best validation accuracy. Columns: way, removed (share), parameters, epochs,
kl_weight, accuracy, negative_log_likelihood (test), seconds (of the processor, training of the full network left out).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import peers
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings


def by_curvature(plan: LaplacePlan, target: float, data: Dataset) -> nn.Module:
    """The first network of the path with at most so many parameters, refitted."""
    steps = 1 + int((plan.path.parameters > target).sum())
    return plan.at(-steps).apply(refit=data.train)


def by_fit(
    network: nn.Module, target: float, epochs: int, weight: float, data: Dataset, settings: RunSettings
) -> nn.Module:
    """The network after a variational fit, at the threshold that leaves about so many parameters."""
    model = bmrs.Classifier(bmrs.insert_noise(network, data.train[:8][0]))
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, data.train, data.validation, epochs=epochs, kl_weight=weight, batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, posterior_learning_rate=2e-2, seed=settings.seed, progress=False,
    )  # fmt: skip
    plan = bmrs.reduce(model, guide)
    scores = sorted(plan.table.score, reverse=True)
    low, high = 0, len(scores) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if plan.at(scores[middle]).parameters_left() <= target else (middle + 1, high)
        )
    return plan.at(scores[low]).apply()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--epochs", type=int, nargs="+", default=[6, 18])
    parser.add_argument("--kl-weights", type=float, nargs="+", default=[30.0, 100.0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.read(given.recipe)
    settings = RunSettings.of(recipe, given.data, {"weight_decay": 0.05, "batch_size": given.batch_size})
    data = bmrs.load_data(given.data, image_size=settings.image_size, data_root=given.data_root)
    network = bmrs.without_noise(recipe.network(data, settings.network or {}, 0))
    network.load_state_dict(load_weights(given.weights))
    network.eval()
    model = bmrs.Classifier(copied(network))
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, data.train, batch_size=500, progress=False)
    plan, full = bmrs.reduce(model, guide), parameters(network)
    assert isinstance(plan, LaplacePlan)
    rows = []

    def add(way: str, removed: float, epochs: int, weight: float, small: nn.Module, start: float) -> None:
        found = peers.measured(small, data)
        row = {
            "way": way, "removed": round(1 - parameters(small) / full, 4), "parameters": parameters(small),
            "epochs": epochs, "kl_weight": weight, "accuracy": found["accuracy"],
            "negative_log_likelihood": found["negative_log_likelihood"],
            "validation_accuracy": found["validation_accuracy"], "seconds": round(time.process_time() - start, 1),
            "size": removed,
        }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
        # of the KL weights the best on validation data
        best = (
            pd.DataFrame(rows).sort_values("validation_accuracy").groupby(["way", "size", "epochs"]).tail(1)
        )
        columns = ["validation_accuracy", "size"]
        write_table(
            given.out / "results.csv", best.drop(columns=columns).sort_values(["removed", "epochs", "way"])
        )

    add("full", 0.0, 0, float("nan"), network, time.process_time())
    for removed in given.removed:
        target = full * (1 - removed)
        for epochs in [0, *given.epochs]:
            start = time.process_time()
            small = by_curvature(plan, target, data)
            if epochs:
                peers.tune(small, settings, data, epochs)
            add("curvature", removed, epochs, float("nan"), small, start)
        for epochs in given.epochs:
            for weight in given.kl_weights:
                for way, share in (("variational", 0.0), ("both", removed / 2)):
                    start = time.process_time()
                    first = by_curvature(plan, full * (1 - share), data) if share else network
                    small = by_fit(first, target, epochs * 2 // 3, weight, data, settings)
                    peers.tune(small, settings, data, epochs - epochs * 2 // 3)
                    add(way, removed, epochs, weight, small, start)


if __name__ == "__main__":
    main()
