"""Jobs of someone new: a trained ResNet-8 at half its parameters, or half its work.

    OMP_NUM_THREADS=1 python analysis/newcomer.py --out FOLDER [--seeds 0 1 2] [--jobs parameters macs cifar10]
        [--tune 6] [--data-root DIR]

The network is models/resnet.py with depth 8 (77,754 parameters), trained as its recipe says but 15 epochs, on 16,000
images of Fashion-MNIST; for the job cifar10 on 12,000 images of CIFAR-10. Then: curvature, `reduce`,
`plan.within(validation, …)`, `apply(refit=…)`, and --tune epochs of training. Asked for are half the parameters, half
the multiply-accumulates, and of CIFAR-10 57 % of them.

Columns of FOLDER/results.csv: job, seed, network (full, smaller, tuned), parameters, macs, accuracy (test), seconds (of
the processor, for all steps after the training).
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
from pyro_bmrs.networks.cost import multiply_accumulates, parameters
from pyro_bmrs.networks.export import load_weights, save_weights
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

JOBS = {
    "parameters": ("fashion-mnist", 16_000, {"parameters": 0.5}),
    "macs": ("fashion-mnist", 16_000, {"macs": 0.5}),
    "cifar10": ("cifar10", 12_000, {"macs": 0.57}),
}
EPOCHS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", nargs="+", default=[*JOBS], choices=[*JOBS])
    parser.add_argument("--tune", type=int, default=6)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe, rows = Recipe.read(Path(__file__).parents[1] / "models" / "resnet.py"), []
    for seed in given.seeds:
        for job in given.jobs:
            name, limit, asked = JOBS[job]
            settings = RunSettings.of(
                recipe, name, {"network": {"depth": 8}, "limit": limit, "seed": seed, "weight_decay": 0.05}
            )
            data = bmrs.load_data(
                name, image_size=settings.image_size, seed=0, limit=limit, data_root=given.data_root
            )
            weights = given.out / f"trained-{name}-{seed}.safetensors"
            if not weights.exists():
                save_weights(peers.trained(recipe, settings, data, EPOCHS), weights)
            network = bmrs.without_noise(recipe.network(data, settings.network or {}, seed))
            network.load_state_dict(load_weights(weights))
            start = time.process_time()

            def add(
                kind: str,
                some: nn.Module,
                job: str = job,
                seed: int = seed,
                data: Dataset = data,
                start: float = start,
            ) -> None:
                spent = time.process_time() - start
                rows.append(
                    {
                        "job": job, "seed": seed, "network": kind, "parameters": parameters(some),
                        "macs": multiply_accumulates(some.eval(), data.test[:2][0]),
                        "accuracy": peers.measured(some, data)["accuracy"], "seconds": round(spent, 1),
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
                write_table(given.out / "results.csv", pd.DataFrame(rows))

            add("full", network)
            model = bmrs.Classifier(copied(network.eval()))
            guide = bmrs.AutoKroneckerLaplace(model)
            bmrs.fit(model, guide, data.train, batch_size=500, progress=False)
            plan = bmrs.reduce(model, guide)
            small = plan.within(data.validation, **asked).apply(refit=data.train)
            add("smaller", small)
            peers.tune(small, settings, data, given.tune)
            add("tuned", small)


if __name__ == "__main__":
    main()
