"""How much do the chosen size, and a network of a given size, depend on the pass that takes the curvature?

    OMP_NUM_THREADS=1 python analysis/passes.py NAME RECIPE DATA WEIGHTS [--out analysis/results/passes]
        [--seeds 0 1 2 3] [--removed 0.75 0.9 0.95] [--data-root DIR]

WEIGHTS are what cells.py has trained. Each seed draws other signs and other examples; the split is that of seed 0.
Columns of OUT/passes.csv: network, seed, size (share asked for, or "own"), curvature ("signs"; rows of "labels" are of
the version of 30 November 2026 that drew labels), removed, accuracy and loss of the test images after the refit,
without training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from trials import Rows

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "passes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--removed", nargs="+", default=["0.75", "0.9", "0.95"])
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "passes.csv", ("network", "seed", "size", "curvature"))
    recipe = Recipe.read(given.recipe)
    settings = RunSettings.of(recipe, given.data, {"seed": 0})
    data = bmrs.load_data(
        given.data, data_root=given.data_root, image_size=settings.image_size, seed=0,
        validation_fraction=settings.validation_fraction,
    )  # fmt: skip
    net = bmrs.without_noise(recipe.network(data, settings.network or {}, 0))
    net.load_state_dict(load_weights(given.weights))
    for seed in given.seeds:
        sizes = [size for size in ("own", *given.removed) if not rows.has(given.name, seed, size, "signs")]
        if not sizes:
            continue
        model = bmrs.Classifier(copied(net).eval())
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, data.train, seed=seed, progress=False)
        plan = bmrs.reduce(model, guide)
        assert isinstance(plan, LaplacePlan)
        for size in sizes:
            one = plan if size == "own" else plan.within(parameters=1 - float(size))
            small = one.apply(refit=data.train, progress=False)
            found = evaluate(bmrs.Classifier(small), data.test)
            removed = 1 - parameters(small) / parameters(net)
            rows.add(
                given.name, seed, size, "signs", removed=removed, accuracy=found.accuracy, loss=found.loss
            )


if __name__ == "__main__":
    main()
