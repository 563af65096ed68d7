"""Time and memory of a Laplace plan, from a network to a smaller one, beside a forward and a backward pass.

    OMP_NUM_THREADS=1 python analysis/laplace_cost.py --out FOLDER network resnet50
        [--images 500] [--side 224] [--batch 16] [--removed 0.3]
    OMP_NUM_THREADS=1 python analysis/laplace_cost.py --out FOLDER inputs [--widths 256 512 1024 2048 4096]

network: of torchvision, with random weights, on random images: one forward and backward pass over all of them, then
curvature, reduce, apply, and the refit. Columns: step, seconds (of the processor), ratio (to the first), gigabytes
(the largest resident memory of its own so far, temporary files apart, less that before the first step: 1e9 bytes).
Written to FOLDER/NETWORK.csv.
inputs: a linear layer of so many inputs between two others of 64 units, 4,000 examples: seconds of the same steps, in
FOLDER/inputs.csv.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning.laplace_plan import LaplacePlan


class Memory:
    """A context that looks at the resident memory of this process again and again.

    Attributes:
        most: the largest so far, without pages of files, in gigabytes.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, kilobytes * 1024 / 1e9)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def steps_of(
    network: nn.Module, data: tuple[Tensor, Tensor], batch: int, removed: float
) -> dict[str, Callable[[], Any]]:
    """By name, in order; each goes on from the one before."""
    model = bmrs.Classifier(network)
    found: dict[str, Any] = {}

    def passes() -> None:
        for x, y in zip(data[0].split(batch), data[1].split(batch), strict=True):
            cross_entropy(network(x), y).backward()
        network.zero_grad()

    def curvature() -> None:
        found["guide"] = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, found["guide"], data, batch_size=batch, progress=False)

    def reduce() -> None:
        plan = bmrs.reduce(model, found["guide"])
        assert isinstance(plan, LaplacePlan)
        count = 1 + int((plan.path.parameters > (1 - removed) * parameters(network)).sum())
        found["plan"] = plan.at(-min(count, len(plan.path)))

    def refit() -> None:
        found["plan"].apply(refit=data)

    return {
        "forward and backward": passes,
        "curvature": curvature,
        "reduce": reduce,
        "apply and refit": refit,
    }


def of_network(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(given.name, weights=None).eval()
    x = torch.randn(given.images, 3, given.side, given.side)
    y = torch.randint(1000, (given.images,))
    rows = []
    with Memory() as memory:
        time.sleep(0.2)
        base = memory.most
        for step, work in steps_of(network, (x, y), given.batch, given.removed).items():
            start = time.process_time()
            work()
            spent = time.process_time() - start
            rows.append({"step": step, "seconds": round(spent, 1), "gigabytes": round(memory.most - base, 2)})
            table = pd.DataFrame(rows).assign(ratio=lambda table: (table.seconds / table.seconds[0]).round(2))
            write_table(given.out / f"{given.name}.csv", table)
            print(rows[-1], flush=True)


def of_inputs(given: argparse.Namespace) -> None:
    rows = []
    for width in given.widths:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        data = torch.randn(4000, 64), torch.randint(10, (4000,))
        row: dict[str, Any] = {"inputs": width}
        for step, work in steps_of(network, data, 500, 0.5).items():
            start = time.process_time()
            work()
            row[step] = round(time.process_time() - start, 2)
        rows.append(row)
        print(row, flush=True)
        write_table(given.out / "inputs.csv", pd.DataFrame(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    kinds = parser.add_subparsers(dest="kind", required=True)
    network = kinds.add_parser("network")
    network.add_argument("name")
    network.add_argument("--images", type=int, default=500)
    network.add_argument("--side", type=int, default=224)
    network.add_argument("--batch", type=int, default=16)
    network.add_argument("--removed", type=float, default=0.3)
    inputs = kinds.add_parser("inputs")
    inputs.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    of_network(given) if given.kind == "network" else of_inputs(given)


if __name__ == "__main__":
    main()
