"""Is a budget in milliseconds met? A share of the time of LeNet5, ResNet-18 and a small vision transformer.

    OMP_NUM_THREADS=1 python analysis/time_budgets.py [--shares 0.9 0.8] [--out analysis/results/time_budgets]

Nothing is trained: a posterior as it starts gives the order. `plan.within(milliseconds=SHARE)` is asked for, the
network is cut, and then timed again beside the full one, interleaved in one process, medians, one thread.

Columns: network, examples (in a pass), asked (ms), measured (ms, of the smaller network), ratio (measured over asked),
share (asked of the full network's time), seconds (that `within` took).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from trials import Rows

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import latency_milliseconds
from pyro_bmrs.networks.inputs import repeated
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parents[1] / "models"


def networks() -> dict[str, tuple[nn.Module, torch.Tensor, int]]:
    """By name: a network without noise, an input, and how many examples a pass has."""
    import torchvision

    lenet5 = Recipe.read(MODELS / "lenet5.py")
    vit = Recipe.read(MODELS / "vit.py")
    digits = bmrs.load_data("digits", image_size=32)
    return {
        "LeNet5": (bmrs.without_noise(lenet5.network(digits, {}, 0)), digits.train[:2][0], 32),
        "ResNet-18, 32 px": (torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32), 8),
        "ViT, 4 layers, 32 px": (bmrs.without_noise(vit.network(digits, {}, 0)), digits.train[:2][0], 8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "time_budgets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(given.out / "time_budgets.csv", ("network", "share"))
    for name, (network, x, examples) in networks().items():
        torch.manual_seed(0)
        model = bmrs.Classifier(bmrs.insert_noise(network.eval(), x))
        guide = bmrs.AutoTruncatedLogNormal(model)
        guide(x, torch.zeros(len(x), dtype=torch.long))
        plan = bmrs.reduce(model, guide)
        for share in given.shares:
            if rows.has(name, share):
                continue
            start = time.perf_counter()
            asked = plan.within(milliseconds=share, batch_size=examples, progress=False)
            seconds = time.perf_counter() - start
            small = asked.apply()
            limit = asked.rule.budget["milliseconds"]
            _, measured = latency_milliseconds([network, small], repeated(x, examples), repeats=100)
            rows.add(
                name, share, examples=examples, asked=round(limit, 4), measured=round(measured, 4),
                ratio=round(measured / limit, 4), seconds=round(seconds, 1),
            )  # fmt: skip


if __name__ == "__main__":
    main()
