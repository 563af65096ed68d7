"""How long finding, inserting, reducing and removing take on a large network, one thread.

    python analysis/network_times.py [OUT.csv]

ResNet-50 at 224 × 224 pixels, random weights: seconds of structures and insert_noise (the latter includes the
former), of reduce over all structures, and of apply with half of them removed. Medians of three runs each;
the first call of each, which loads modules, is left out.
"""

import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torchvision.models import resnet50

import pyro_bmrs as bmrs

REPEATS = 3


def median_seconds(function):
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> pd.DataFrame:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = resnet50().eval(), torch.randn(2, 3, 224, 224)
    noisy = bmrs.insert_noise(net, x)
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, torch.zeros(2, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5, seed=0))
    seconds = {
        "structures": median_seconds(lambda: bmrs.structures(net, x)),
        "insert_noise": median_seconds(lambda: bmrs.insert_noise(net, x)),
        "reduce, BMRS_N": median_seconds(lambda: bmrs.reduce(model, guide, bmrs.BMRS_N())),
        "reduce, BMRS_U": median_seconds(lambda: bmrs.reduce(model, guide, bmrs.BMRS_U())),
        "apply, without measuring": median_seconds(lambda: plan.apply()),
        "apply, costs measured": median_seconds(plan.apply),
    }
    table = pd.DataFrame({"seconds": seconds}).rename_axis("step").reset_index()
    return table.assign(network="ResNet-50, 224 × 224", structures=len(plan.table), threads=1)


if __name__ == "__main__":
    result = main()
    print(result.to_string(index=False))
    if len(sys.argv) > 1:
        result.to_csv(Path(sys.argv[1]), index=False)
