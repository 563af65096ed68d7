"""Jobs of someone new: a trained ResNet-8 at half its parameters, or half its work.

    OMP_NUM_THREADS=1 python analysis/newcomer.py --out FOLDER [--seeds 0 1 2] [--jobs parameters macs cifar10]
        [--ways curvature fit] [--tune 6] [--data-root DIR]

The network is models/resnet.py with depth 8 (77,754 parameters), trained as its recipe says but 15 epochs, on 16,000
images of Fashion-MNIST; for the job cifar10 on 12,000 images of CIFAR-10. Then one of two ways:

- curvature: `fit` of an AutoKroneckerLaplace, `reduce`, `plan.within(validation, …)`, `apply(refit=…)`.
- fit: `insert_noise`, `fit` of an AutoTruncatedLogNormal with 15 epochs and otherwise its defaults, weight decay as in
  training, `result.within(…)`, `apply()`. Two budgets of one data set share the fit.

And --tune epochs of training. Asked for are half the parameters, half the multiply-accumulates, and of CIFAR-10 57 % of
them.

Columns of FOLDER/results.csv: way, job, seed, network (full, smaller, tuned), parameters, macs, accuracy (test),
seconds (of the processor, for all steps after the training). Rows that are there are kept.
"""

from __future__ import annotations

import argparse
import time
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import peers
import torch
from torch import nn
from trials import Rows

import pyro_bmrs as bmrs
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import multiply_accumulates, parameters
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

JOBS = {
    "parameters": ("fashion-mnist", 16_000, {"parameters": 0.5}),
    "macs": ("fashion-mnist", 16_000, {"macs": 0.5}),
    "cifar10": ("cifar10", 12_000, {"macs": 0.57}),
}
EPOCHS = 15


class Newcomer:
    """One trained network, and both ways to make it smaller."""

    def __init__(self, recipe: Recipe, name: str, limit: int, seed: int, given: argparse.Namespace) -> None:
        self.settings = RunSettings.of(
            recipe, name, {"network": {"depth": 8}, "limit": limit, "seed": seed, "weight_decay": 0.05}
        )
        self.data = bmrs.load_data(
            name, image_size=self.settings.image_size, seed=0, limit=limit, data_root=given.data_root
        )
        weights = given.out / f"trained-{name}-{seed}.safetensors"
        self.network = peers.trained(recipe, self.settings, self.data, EPOCHS, weights=weights)

    @cached_property
    def _fitted(self) -> tuple[bmrs.Fit, float]:
        start = time.process_time()
        model = bmrs.Classifier(bmrs.insert_noise(self.network, self.data.train[:8][0]))
        guide = bmrs.AutoTruncatedLogNormal(model)
        result = bmrs.fit(
            model, guide, self.data.train, self.data.validation, epochs=EPOCHS, weight_decay=0.05,
            seed=self.settings.seed, progress=False,
        )  # fmt: skip
        return result, time.process_time() - start

    def smaller(self, way: str, asked: dict[str, float]) -> tuple[nn.Module, float]:
        """The smaller network, and the seconds of the processor that it took, with those of the fit."""
        if way == "fit":
            result, before = self._fitted
            start = time.process_time()
            return result.within(**asked, progress=False).apply(), before + time.process_time() - start
        start = time.process_time()
        model = bmrs.Classifier(copied(self.network))
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, self.data.train, batch_size=500, progress=False)
        plan = bmrs.reduce(model, guide).within(self.data.validation, **asked)
        return plan.apply(refit=self.data.train), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", nargs="+", default=[*JOBS], choices=[*JOBS])
    parser.add_argument("--ways", nargs="+", default=["curvature", "fit"], choices=["curvature", "fit"])
    parser.add_argument("--tune", type=int, default=6)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.read(Path(__file__).parents[1] / "models" / "resnet.py")
    rows = Rows(given.out / "results.csv", ("way", "job", "seed", "network"))
    for seed in given.seeds:
        made = cache(lambda name, limit, seed=seed: Newcomer(recipe, name, limit, seed, given))
        for job in given.jobs:
            name, limit, asked = JOBS[job]
            for way in given.ways:
                if rows.has(way, job, seed, "tuned"):
                    continue
                one = made(name, limit)

                def add(
                    kind: str, some: nn.Module, seconds: float, key: Any = (way, job, seed), one: Any = one
                ) -> None:
                    rows.add(
                        *key, kind, parameters=parameters(some),
                        macs=multiply_accumulates(some.eval(), one.data.test[:2][0]),
                        accuracy=peers.measured(some, one.data)["accuracy"], seconds=round(seconds, 1),
                    )  # fmt: skip

                add("full", one.network, 0.0)
                small, seconds = one.smaller(way, asked)
                add("smaller", small, seconds)
                start = time.process_time()
                peers.tune(small, one.settings, one.data, given.tune)
                add("tuned", small, seconds + time.process_time() - start)


if __name__ == "__main__":
    main()
