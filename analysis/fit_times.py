"""What a whole fit costs that shrinks as it goes, against training the full network without noise as long.

    OMP_NUM_THREADS=1 python analysis/fit_times.py NAME [--seeds 0 1 2] [--kinds …] [--epochs 30] [--out FILE]

NAME is one of the cases below. In one process, one thread, an epoch of the plain network and an epoch of
each fit follow one another; all see the same batches of MNIST (80 % of the training set, 128 a step) with
fused Adam and look at the validation part after each epoch. The plain loop is torch's alone. Writes a row
per seed, kind and epoch: seconds and CPU seconds of the epoch (its end with evidence, removal and surgery
included), validation accuracy, parameters; and of the last epoch the test accuracy of the reduced network and
its parameters.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.files import write_atomically
from pyro_bmrs.fitting.loop import Loop, Task, isolated
from pyro_bmrs.inference import evaluate
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
# recipe, arguments of its network, KL weight, learning rate, kinds of fit
CASES = {
    "lenet5_w60": ("lenet5", {}, 60.0, 1.4e-3, ("epoch", "end")),
    "lenet5_w100": ("lenet5", {}, 100.0, 1.4e-3, ("epoch", "end")),
    "lenet5_w200": ("lenet5", {}, 200.0, 1.4e-3, ("epoch", "end")),
    "lenet5_w100_ordinary": ("lenet5", {}, 100.0, 1.4e-3, ("ordinary",)),
    "lenet5_caffe_w100": ("lenet5_caffe", {}, 100.0, 1e-3, ("epoch",)),
    "mlp_3x1000_w100": ("mlp", {"widths": (1000,) * 3, "select_inputs": False}, 100.0, 8.5e-4, ("epoch",)),
}
SETTINGS = bmrs.Settings(batch_size=128, posterior_learning_rate=5e-3, keep_best=False)


def fitted(
    recipe: Recipe,
    net: nn.Module,
    data: object,
    kind: str,
    weight: float,
    rate: float,
    epochs: int,
    seed: int,
) -> Loop:
    """A fit, ready for its first epoch. "ordinary": Pyro's ELBO, every draw for itself, one per example."""
    model = recipe.model(net)
    guide = recipe.guide(model)
    settings = SETTINGS.changed(epochs=epochs, learning_rate=rate, kl_weight=weight, seed=seed)
    if kind == "ordinary":
        settings = settings.changed(elbo="pyro", draws_per_batch=None, stratified=False)
    else:
        settings = settings.changed(removal=kind)
    task = Task(
        model, guide, data.train, data.validation, settings, None, 1, overwrite=False, label="", progress=False,
        validate=False,
    )  # fmt: skip
    return Loop(Fabric(accelerator="cpu", devices=1), task)


def plain_epochs(net: nn.Module, data: object, rate: float, epochs: int, seed: int) -> Iterator[float]:
    """Training without noise in plain torch; yields the validation accuracy after each epoch."""
    optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
    train = Batches(data.train, 128, torch.device("cpu"), "train")
    held_out = Batches(data.validation, 1000, torch.device("cpu"), "validation")
    for epoch in range(epochs):
        net.train()
        for x, y, *_ in train.epoch(torch.Generator().manual_seed(1000 * seed + epoch)):
            loss = cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not loss.isfinite():
                raise FloatingPointError(f"loss became {float(loss)}")
        net.eval()
        with torch.no_grad():
            right = sum(int((net(x).argmax(1) == y).sum()) for x, y in held_out)
        yield right / held_out.size


def study(name: str, seed: int, epochs: int, chosen: list[str] | None) -> list[dict[str, object]]:
    """All rows of one seed, of the chosen kinds."""
    file, options, weight, rate, kinds = CASES[name]
    chosen = chosen or ["plain", *kinds]
    recipe = Recipe.read(MODELS / f"{file}.py")
    size = recipe.settings("mnist").get("image_size")
    data = load_data("mnist", image_size=size, seed=seed)
    net = recipe.network(data, options, seed)
    plain = bmrs.without_noise(copy.deepcopy(net))
    full = sum(parameter.numel() for parameter in plain.parameters())
    loops = {
        kind: fitted(recipe, copy.deepcopy(net), data, kind, weight, rate, epochs, seed)
        for kind in kinds
        if kind in chosen
    }
    runs = {kind: loop.epochs() for kind, loop in loops.items()}
    if "plain" in chosen:
        runs = {"plain": plain_epochs(plain, data, rate, epochs, seed)} | runs
    rows: list[dict[str, object]] = []
    for epoch in range(1, epochs + 1):
        for kind, run in runs.items():
            begin, cpu = time.perf_counter(), time.process_time()
            outcome = next(run)
            row: dict[str, object] = {"case": name, "seed": seed, "kind": kind, "epoch": epoch}
            row |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
            history = {} if kind == "plain" else loops[kind].state.history[-1]
            row["validation_accuracy"] = outcome if kind == "plain" else history["validation_accuracy"]
            row["parameters"] = full if kind == "plain" else history["parameters"]
            row["kept"] = history.get("kept")
            rows.append(row)
    for kind in runs:
        small = plain
        if kind != "plain":
            loop = loops[kind]
            small = bmrs.reduce(loop.model, loop.guide, bmrs.BMRS_N()).apply()
        last = next(row for row in reversed(rows) if row["kind"] == kind)
        last["test_accuracy"] = evaluate(bmrs.Classifier(small), data.test).accuracy
        last["parameters_left"] = sum(parameter.numel() for parameter in small.parameters())
        last["parameters_removed"] = 1 - last["parameters_left"] / full
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", help="only these: plain, and of the case's own")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or Path(__file__).parent / "results" / "fit_times" / f"{given.name}.csv"
    rows: list[dict[str, object]] = []
    for seed in given.seeds:
        with isolated(seed, validate=False):
            rows += study(given.name, seed, given.epochs, given.kinds)
        table = pd.DataFrame(rows)
        write_atomically(out, lambda beside, table=table: table.to_csv(beside, index=False))
        of_seed = table[table.seed == seed]
        total = of_seed.groupby("kind")[["seconds", "cpu_seconds"]].sum()
        reference = total.loc["plain"] if "plain" in total.index else 1.0
        print(f"seed {seed}\n{total.div(reference).round(3)}")
        print(
            of_seed.dropna(subset="test_accuracy").drop(columns=["seconds", "cpu_seconds"]).to_string(),
            flush=True,
        )


if __name__ == "__main__":
    main()
