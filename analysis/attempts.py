"""Three attempts at the two targets that the study misses: a trained network to a small size, by more than one step.

    OMP_NUM_THREADS=1 python analysis/attempts.py "LeNet-5-Caffe, MNIST" 0.00909 --out FOLDER [--seeds 0]
        [--ways NAME …] [--rounds 6] [--epochs 4] [--last 24] [--data-root DIR]

The cell's trained network (cells.py) is made smaller to that share of its parameters. Curvature is taken anew before
each round, structures leave by `within`, and weights are refitted:

- at once: one round, then all the epochs of the others together;
- in steps: --rounds of equal ratio, --epochs of training after each but the last, --last after that;
- both: in steps to twice the size, then a fit with noise for half of --last, `within` the size, and the other half.

A row of FOLDER/attempts.csv has the same columns as cells.csv.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import peers
import torch
from cells import CELLS, TUNED, Cell
from torch import nn
from trials import Rows

import pyro_bmrs as bmrs
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters

WAYS = ("at once", "in steps", "both")


def in_steps(cell: Cell, share: float, rounds: int, epochs: int) -> nn.Module:
    """The network at that share of its parameters, not yet trained after the last round."""
    net = copied(cell.start)
    for number in range(1, rounds + 1):
        size = cell.before * share ** (number / rounds)
        net = cell.curvature(net).within(parameters=size).apply(refit=cell.data.train, progress=False)
        if number < rounds:
            peers.tune(net, cell.settings, cell.data, epochs)
            net.eval()
            print(
                f"round {number}: {parameters(net)}", peers.measured(net, cell.data)["accuracy"], flush=True
            )
    return net


def attempt(cell: Cell, way: str, given: argparse.Namespace) -> tuple[nn.Module, int]:
    """The network, and the epochs it is still to be trained for."""
    share, between = given.share, (given.rounds - 1) * given.epochs
    if way == "at once":
        return in_steps(cell, share, 1, 0), between + given.last
    if way == "in steps":
        return in_steps(cell, share, given.rounds, given.epochs), given.last
    net = in_steps(cell, 2 * share, given.rounds, given.epochs)
    model = bmrs.Classifier(bmrs.insert_noise(net, cell.data.train[:8][0]))
    how = f"{share:g}-{given.rounds}-{given.epochs}-{given.last}"
    name = f"attempt-{cell.recipe.path.stem}-{cell.settings.data}-{cell.seed}-{how}"
    result, _ = cell.fitted(model, given.last // 2, name)
    small = result.within(parameters=round(share * cell.before), progress=False).apply()
    return bmrs.recalibrate(small, cell.data.train), given.last - given.last // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell", choices=CELLS)
    parser.add_argument("share", type=float)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--last", type=int, default=24)
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        cell = Cell(given.cell, seed, given.out, given.data_root)
        cell.rows = Rows(given.out / "attempts.csv", ("cell", "seed", "way", "size"))
        for way in given.ways:
            if not cell.rows.has(given.cell, seed, way, f"{given.share:g}"):
                begin = time.process_time()
                small, epochs = attempt(cell, way, given)
                spent = time.process_time() - begin
                total = cell.epochs - TUNED + (given.rounds - 1) * given.epochs + given.last
                cell.add(way, f"{given.share:g}", small, epochs, epochs=total, seconds=spent)


if __name__ == "__main__":
    main()
