"""What a trained network loses when it gets smaller without a fit, beside torch-pruning at the same sizes.

    OMP_NUM_THREADS=1 python analysis/trained_networks.py models/lenet5.py fashion-mnist --out FOLDER
        [--seeds 0 1 2] [--train 16] [--tune 0 1 3 6] [--removed 0.5 0.7 0.8 0.9] [--peers magnitude taylor …]
        [--batch-size 128] [--network '{"patch": 8}'] [--limit IMAGES] [--data-root DIR]

The recipe's network without noise is trained with --train epochs and decay 0.05 of the weights (`peers.trained`), once
a seed. Then the Laplace posterior of its weights is taken, `reduce` decides, and `apply(refit=…)` gives the smaller
network, at the size of the largest evidence and at those of --removed. The peers, all of `peers.METHODS` and
`peers.OTHERS` but for random, prune the same network to as many parameters, and BatchNorm gets new statistics. Every
smaller network is tuned from there for each number of epochs in --tune, with the same settings (`peers.tune`). Rows
that FOLDER/results.csv has are passed over, so the command can be called again.

Columns: data, seed, method, size (asked for: a share that leaves, or "evidence"), parameters, removed (share), epochs
(of tuning), accuracy, negative_log_likelihood (test), predicted (rise of the loss by plan.path at that size, nats per
example), evidence (ΔF of all that left, nats), seconds (of the processor: curvature, reduce, apply with refit; of a
peer its pruning), expected_calibration_error (15 bins, test), calibrated_error (the same, at the temperature of the
validation examples; older rows have neither).
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import peers
import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

DECAY = 0.05
PEERS = [name for name in (*peers.METHODS, *peers.OTHERS) if name != "random"]
KEY = ["data", "seed", "method", "size", "epochs"]
COLUMNS = [
    *KEY, "parameters", "removed", "accuracy", "negative_log_likelihood", "predicted", "evidence", "seconds",
    "expected_calibration_error", "calibrated_error",
]  # fmt: skip


class Study:
    """One recipe on one data set; rows are written as they come."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.file = given, given.out / "results.csv"
        self.recipe = Recipe.read(given.recipe)
        changes: dict[str, Any] = {"weight_decay": DECAY, "limit": given.limit}
        changes |= {"batch_size": given.batch_size} if given.batch_size else {}
        changes |= {"network": json.loads(given.network)} if given.network else {}
        self.settings = RunSettings.of(self.recipe, given.data, changes)
        self.data = bmrs.load_data(
            given.data,
            image_size=self.settings.image_size,
            seed=0,
            data_root=given.data_root,
            limit=given.limit,
        )
        self.table = (
            pd.read_csv(self.file, dtype={"size": str})
            if self.file.exists()
            else pd.DataFrame(columns=COLUMNS)
        )

    def has(self, *key: Any) -> bool:
        wanted = pd.Series(True, index=self.table.index)
        for name, value in zip(KEY, key, strict=True):
            wanted &= self.table[name].astype(str) == str(value)
        return bool(wanted.any())

    def add(self, key: tuple[Any, ...], network: nn.Module, full: int, **more: float) -> None:
        found = peers.measured(network, self.data)
        row = {
            **dict(zip(KEY, key, strict=True)), "parameters": parameters(network),
            "removed": round(1 - parameters(network) / full, 5), "accuracy": found["accuracy"],
            **{name: found[name] for name in ("negative_log_likelihood", *COLUMNS[-2:])}, **more,
        }  # fmt: skip
        new = pd.DataFrame([row], columns=COLUMNS)
        self.table = new if self.table.empty else pd.concat([self.table, new], ignore_index=True)
        write_table(self.file, self.table)
        print(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()},
            flush=True,
        )

    def trained(self, seed: int) -> nn.Module:
        """The network of a seed, or what an earlier call has left."""
        weights = self.given.out / f"trained-{self.given.data}-{seed}.safetensors"
        return peers.trained(
            self.recipe, self.settings.changed(seed=seed), self.data, self.given.train, weights=weights
        )

    def run(self) -> None:
        for seed in self.given.seeds:
            network = self.trained(seed)
            full = parameters(network)
            key = (self.given.data, seed, "full", "0", 0)
            if not self.has(*key):
                self.add(key, network, full)
            sizes = self.by_evidence(network, seed, full)
            for method in self.given.peers:
                for size, target in sizes.items():
                    made = partial(self.by_peer, network, method, target, seed)
                    self.tuned((self.given.data, seed, method, size), full, made)

    def by_evidence(self, network: nn.Module, seed: int, full: int) -> dict[str, int]:
        """Rows of ours. Returns the parameters at each size."""
        train = self.data.train
        start = time.process_time()
        model = bmrs.Classifier(copied(network))
        guide = bmrs.AutoKroneckerLaplace(model)
        batch = int(
            min(500, 1.5e6 // train[:1][0].numel())
        )  # what activations of large images leave room for
        bmrs.fit(model, guide, train, batch_size=batch, seed=seed, progress=False)
        plan = bmrs.reduce(model, guide)
        assert isinstance(plan, LaplacePlan)
        spent, sizes = time.process_time() - start, {}
        for size in ("evidence", *map(str, self.given.removed)):
            steps = (
                int(-plan.rule.threshold)
                if size == "evidence"
                else 1 + int((plan.path.parameters > full * (1 - float(size))).sum())
            )  # type: ignore[operator]
            own = plan.at(-steps)
            sizes[size] = own.parameters_left()
            row = plan.path.iloc[steps - 1]

            def smaller(own: LaplacePlan = own, row: pd.Series = row) -> tuple[nn.Module, dict[str, float]]:
                start = time.process_time()
                small = own.apply(refit=train)
                each = guide.dataset_size
                return small, {
                    "predicted": row.total_loss_rise / each,
                    "evidence": row.total_evidence_change, "seconds": spent + time.process_time() - start,
                }  # fmt: skip

            self.tuned((self.given.data, seed, "evidence", size), full, smaller)
        return sizes

    def by_peer(
        self, network: nn.Module, method: str, target: int, seed: int
    ) -> tuple[nn.Module, dict[str, float]]:
        start = time.process_time()
        small = peers.pruned(network, method, target, self.data, seed)
        bmrs.recalibrate(small, self.data.train)  # as the refit does
        return small, {"seconds": time.process_time() - start}

    def tuned(self, key: tuple[Any, ...], full: int, make: Any) -> None:
        """Rows of one smaller network, after each number of epochs."""
        left = [epochs for epochs in self.given.tune if not self.has(*key, epochs)]
        if not left:
            return
        small, more = make()
        for epochs in left:
            network = copied(small)
            if epochs:
                peers.tune(network, self.settings.changed(seed=key[1]), self.data, epochs)
            self.add((*key, epochs), network, full, **more)


def draw(csv: Path, data: str) -> Figure:
    """Accuracy against the share that left, before training and after, for each method."""
    table = pd.read_csv(csv, dtype={"size": str})
    table = table[table.data == data]
    epochs = sorted(set(table.epochs) - {0})
    columns = [0, *epochs[-1:]]
    figure = Figure(figsize=(5 * len(columns), 3.6), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)
    full = table[table.method == "full"].accuracy.mean()
    methods = [*dict.fromkeys(table.method)]
    for axis, number in zip(axes[0], columns, strict=True):
        for method, rows in table[
            (table.method != "full") & (table.epochs == number) & (table["size"] != "evidence")
        ].groupby("method"):
            means = rows.groupby("size")[["removed", "accuracy"]].mean().sort_values("removed")
            axis.plot(
                100 * means.removed,
                100 * means.accuracy,
                "o-",
                color=f"C{methods.index(method)}",
                label=f"{method}",
                lw=2 if method == "evidence" else 1,
            )
        own = table[(table.method == "evidence") & (table["size"] == "evidence") & (table.epochs == number)]
        axis.plot(100 * own.removed, 100 * own.accuracy, "k*", ms=9, label="evidence's own size")
        axis.axhline(100 * full, color="grey", lw=1, ls="--")
        axis.set(
            title="without training" if not number else f"after {number} epochs",
            xlabel="parameters removed (%)",
        )
        axis.set_ylim(bottom=max(0.0, 100 * full - 25))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=16)
    parser.add_argument("--tune", type=int, nargs="+", default=[0, 1, 3, 6])
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--peers", nargs="*", default=PEERS)
    parser.add_argument("--batch-size", type=int, help="of training and tuning; default: the recipe's")
    parser.add_argument("--network", help="sizes of the network as JSON; default: the recipe's")
    parser.add_argument("--limit", type=int, help="of training examples; default: all")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    Study(given).run()


if __name__ == "__main__":
    main()
