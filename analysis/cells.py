"""The paper's six cells and LeNet-5-Caffe by defaults alone, in three ways, beside their strongest peers.

    OMP_NUM_THREADS=1 python analysis/cells.py --out FOLDER [--cells NAME …] [--seeds 0 1 2] [--ways NAME …]
        [--data-root DIR]

Nothing is chosen for a cell: the recipes' own settings, `kl_weight="auto"`, decay 0.05 of the weights. Every way has
the recipe's epochs of fit and fine-tuning together, E + F (24 + 12, on CIFAR-10 20 + 10):

- full: plain training for E + F epochs;
- variational: a fit of E epochs with noise, fine-tuned for F;
- laplace: plain training for E + F - 6 epochs, curvature, the plan, its refit, and 6 epochs of training;
- both: a third of the epochs plain training, the Laplace plan of the evidence, refitted; a third a fit with noise of
  what is left; a third fine-tuning;
- peers, "taylor in steps", "posterior damage", "fisher masks" (peers.py): pruned from the trained network of laplace
  to as many parameters, then 6 epochs of training;
- scratch: the widths that laplace has at a size, trained from new weights for E + F epochs.

Sizes: the evidence's own, and `within` 25, 10 and 5 % of the parameters (LeNet-5-Caffe: 3 and 1 % as well). A peer is
pruned to the parameters of laplace at each of them. Training, fine-tuning and peers have cosine rates and the epoch of
the highest validation accuracy. Rows that FOLDER/cells.csv has are passed over, and trained networks are kept.

Columns: cell, seed, way, size (asked for), epochs (in all), parameters, removed (share), widths, kl_weight, accuracy,
negative_log_likelihood, expected_calibration_error (test, 15 bins), calibrated_error (the same at the temperature of
the validation examples), validation_accuracy, untuned_accuracy (test, before the last epochs),
loss_before and loss_after (validation, of the full model and of the reduced one before training, nats an example),
predicted (rise of the loss along the path, nats an example; laplace only), evidence (ΔF of all that left, nats;
laplace only), seconds (of the processor, without the training of the full network).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import peers
import torch
from torch import nn
from trials import Rows, curvature, figures

import pyro_bmrs as bmrs
from pyro_bmrs.fitting import Fit
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

MODELS = Path(__file__).parent.parent / "models"
CELLS = {
    "MLP, MNIST": ("mlp.py", "mnist"),
    "MLP, Fashion-MNIST": ("mlp.py", "fashion-mnist"),
    "LeNet5, MNIST": ("lenet5.py", "mnist"),
    "LeNet5, Fashion-MNIST": ("lenet5.py", "fashion-mnist"),
    "LeNet-5-Caffe, MNIST": ("lenet5_caffe.py", "mnist"),
    "MLP, CIFAR-10": ("mlp.py", "cifar10"),
    "LeNet5 × 3, CIFAR-10": ("lenet5.py", "cifar10"),
}
PEERS = ("taylor in steps", "posterior damage", "fisher masks")
WAYS = ("full", "laplace", "variational", *PEERS, "both", "scratch")
OWN = "own"
TUNED = 6  # epochs after the curvature


class Cell:
    """One network on one data set, of one seed."""

    def __init__(self, name: str, seed: int, out: Path, data_root: Path | None) -> None:
        recipe, data = CELLS[name]
        self.name, self.seed, self.out = name, seed, out
        self.recipe = Recipe.read(MODELS / recipe)
        self.settings = RunSettings.of(self.recipe, data, {"seed": seed})
        self.data = bmrs.load_data(
            data, data_root=data_root, image_size=self.settings.image_size, seed=seed,
            validation_fraction=self.settings.validation_fraction,
        )  # fmt: skip
        self.epochs = self.settings.epochs + self.settings.fine_tune
        self.shares = (0.25, 0.1, 0.05, 0.03, 0.01) if "Caffe" in name else (0.25, 0.1, 0.05)
        self.rows = Rows(out / "cells.csv", ("cell", "seed", "way", "size"))

    @property
    def sizes(self) -> tuple[str, ...]:
        return (OWN, *map(str, self.shares))

    @cached_property
    def before(self) -> int:
        return parameters(self._plain())

    def _plain(self) -> nn.Module:
        return bmrs.without_noise(self.recipe.network(self.data, self.settings.network or {}, self.seed))

    def trained(self, epochs: int) -> nn.Module:
        """The network without noise after so many epochs, or what an earlier call has left."""
        name = f"{self.recipe.path.stem}-{self.settings.data}-{self.seed}-{epochs}.safetensors"
        return peers.trained(
            self.recipe, self.settings, self.data, epochs, weights=self.out / "trained" / name
        )

    @cached_property
    def start(self) -> nn.Module:
        """What the curvature is taken of, and the peers prune."""
        return self.trained(self.epochs - TUNED)

    def missing(self, way: str) -> list[str]:
        sizes = (OWN,) if way == "full" else self.sizes
        return [size for size in sizes if not self.rows.has(self.name, self.seed, way, size)]

    def loss(self, model: nn.Module) -> float:
        return evaluate(model, self.data.validation).loss

    def add(self, way: str, size: str, small: nn.Module, tuned: int, **more: Any) -> None:
        """Train the network for the last epochs, measure it, and write its row."""
        more = {"epochs": self.epochs, "loss_after": self.loss(bmrs.Classifier(small))} | more
        if tuned:
            more["untuned_accuracy"] = peers.measured(small, self.data)["accuracy"]
            peers.tune(small, self.settings, self.data, tuned)
        self.rows.add(self.name, self.seed, way, size, **figures(small, self.data, self.before), **more)

    def full(self) -> None:
        begin = time.process_time()
        self.add("full", OWN, self.trained(self.epochs), 0, seconds=time.process_time() - begin)

    @cached_property
    def laplace_plan(self) -> LaplacePlan:
        return self.curvature(self.start)

    def curvature(self, net: nn.Module) -> LaplacePlan:
        return curvature(net, self.data, self.seed)

    def _at(self, size: str) -> LaplacePlan:
        return self.laplace_plan if size == OWN else self.laplace_plan.within(parameters=float(size))

    def laplace(self) -> None:
        before = self.loss(bmrs.Classifier(copied(self.start)))
        begin = time.process_time()
        plan = self.laplace_plan
        spent = time.process_time() - begin
        for size in self.missing("laplace"):
            begin = time.process_time()
            plan = self._at(size)
            small = plan.apply(refit=self.data.train, progress=False)
            seconds = spent + time.process_time() - begin
            last = (
                plan.path[["total_loss_rise", "total_evidence_change"]]
                .head(plan.steps)
                .tail(1)
                .sum(min_count=1)
            )
            self.add(
                "laplace", size, small, TUNED, seconds=seconds, loss_before=before,
                predicted=last.total_loss_rise / len(self.data.train), evidence=last.total_evidence_change,
            )  # fmt: skip

    def fitted(self, model: nn.Module, epochs: int, name: str) -> tuple[Fit, Any]:
        """A fit with noise of so many epochs, which goes on where one of that name was stopped, and its guide."""
        guide = bmrs.AutoTruncatedLogNormal(model)
        result = bmrs.fit(
            model, guide, self.data.train, self.data.validation, self.settings, epochs=epochs,
            checkpoints=self.out / "fits" / name, label=name, progress=False,
        )  # fmt: skip
        if result.interrupted:
            raise KeyboardInterrupt
        return result, guide

    def by_fit(self, way: str, model: nn.Module, epochs: int, tuned: int, begin: float) -> None:
        """Rows of a fit with noise of so many epochs: its own size, and those it is asked for."""
        result, guide = self.fitted(
            model, epochs, f"{way}-{self.recipe.path.stem}-{self.settings.data}-{self.seed}"
        )
        spent, before = time.process_time() - begin, float(result.stages.validation_loss.min())
        for size, plan in self._plans(way, result, model, guide):
            begin = time.process_time()
            small, weight = plan.apply(), guide.kl_weight
            bmrs.recalibrate(small, self.data.train)
            seconds = spent + time.process_time() - begin
            self.add(way, size, small, tuned, kl_weight=weight, loss_before=before, seconds=seconds)

    def _plans(self, way: str, result: Fit, model: nn.Module, guide: Any) -> Iterator[tuple[str, Any]]:
        own = bmrs.reduce(model, guide)
        for size in self.missing(way):
            if size == OWN:
                yield size, own
                continue
            share = float(size) * self.before / own.parameters_before()
            if share < 1:
                yield size, result.within(parameters=share, progress=False)

    def variational(self) -> None:
        begin = time.process_time()
        model = bmrs.Classifier(self.recipe.network(self.data, self.settings.network or {}, self.seed))
        self.by_fit("variational", model, self.settings.epochs, self.settings.fine_tune, begin)

    def both(self) -> None:
        third = self.epochs // 3
        net, begin = self.trained(third), time.process_time()
        small = self.curvature(net).apply(refit=self.data.train, progress=False)
        model = bmrs.Classifier(bmrs.insert_noise(small, self.data.train[:8][0]))
        self.by_fit("both", model, third, self.epochs - 2 * third, begin)

    def peer(self, method: str) -> None:
        for size in self.missing(method):
            target, begin = self._at(size).parameters_left(), time.process_time()
            small = peers.pruned(self.start, method, target, self.data, self.seed)
            bmrs.recalibrate(small, self.data.train)
            self.add(method, size, small, TUNED, seconds=time.process_time() - begin)

    def scratch(self) -> None:
        for size in self.missing("scratch"):
            small, begin = self._at(size).apply(), time.process_time()
            torch.manual_seed(self.seed)
            for module in small.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            peers.tune(small, self.settings, self.data, self.epochs)
            self.add("scratch", size, small, 0, seconds=time.process_time() - begin)

    def run(self, way: str) -> None:
        if self.missing(way):
            make: Callable[[], None] = (lambda: self.peer(way)) if way in PEERS else getattr(self, way)
            make()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in given.cells:
            cell = Cell(name, seed, given.out, given.data_root)
            for way in given.ways:
                cell.run(way)


if __name__ == "__main__":
    main()
