"""Whether cheap steps cost quality: LeNet5 on the embedded digits, by the cheap and by the ordinary path.

    OMP_NUM_THREADS=1 python analysis/lever_quality.py [--seeds 0 1 2] [--out FOLDER]

"ours" is what `fit` does; "ordinary" Pyro's ELBO, site by site, with independent draws, one per example. The
recipe's settings for digits, no fine-tuning. Writes lever_quality.csv: seed, kind, share of parameters removed
by BMRS_N, test accuracy of the reduced network. The same comparison on MNIST is in
results/fit_times/lenet5_w100*.csv (kinds "end" and "ordinary").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.files import write_atomically
from pyro_bmrs.inference import evaluate
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
KINDS = {
    "ours": dict(),
    "ordinary": dict(elbo="pyro", draws_per_batch=None, stratified=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lever_quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.read(MODELS / "lenet5.py")
    settings = recipe.settings("digits")
    options = {
        name: settings[name]
        for name in ("epochs", "batch_size", "learning_rate", "posterior_learning_rate", "kl_weight")
    }
    rows = []
    for seed in given.seeds:
        data = load_data("digits", image_size=settings["image_size"], seed=seed)
        for kind, path in KINDS.items():
            model = recipe.model(recipe.network(data, {}, seed))
            guide = recipe.guide(model)
            bmrs.fit(model, guide, data.train, data.validation, seed=seed, **options, **path)
            plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
            small = plan.apply()
            left = sum(parameter.numel() for parameter in small.parameters())
            removed, accuracy = (
                1 - left / plan.parameters_before(),
                evaluate(bmrs.Classifier(small), data.test).accuracy,
            )
            rows.append({"seed": seed, "kind": kind, "removed": removed, "test_accuracy": accuracy})
        table = pd.DataFrame(rows).round(5)
        write_atomically(
            given.out / "lever_quality.csv", lambda beside, table=table: table.to_csv(beside, index=False)
        )
        print(table.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
