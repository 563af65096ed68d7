"""Milliseconds before and after removal, for plans of given widths: parameters are not time.

    python analysis/latency.py [OUT.csv]

One process, one thread, interleaved runs, medians; which structures stay makes no difference to the time, so
they are drawn at random. The widths of LeNet5 are those that fits on MNIST have ended with (docs/results and
the paper notes), LeNet-5-Caffe's are a hundredth of its parameters, ResNet-18 keeps half of every layer's
filters, those of its residual streams included.
"""

import copy
import sys
from pathlib import Path

import pandas as pd
import torch
from torchvision.models import resnet18

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import latency_milliseconds, multiply_accumulates, parameters
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parents[1] / "models"


def lenet5():
    return Recipe.read(MODELS / "lenet5.py").module.network((1, 32, 32), 10), (1, 32, 32)


def lenet5_caffe():
    return Recipe.read(MODELS / "lenet5_caffe.py").module.network((1, 28, 28), 10), (1, 28, 28)


def resnet(side):
    return bmrs.insert_noise(resnet18(num_classes=10), torch.zeros(2, 3, side, side)), (3, side, side)


# name, network, widths kept (None: half of each), batch sizes, repeats
CASES = [
    ("LeNet5", lenet5, (6, 13, 16, 11), (1, 128), 60),
    ("LeNet5", lenet5, (5, 7, 11, 8), (1, 128), 60),
    ("LeNet5", lenet5, (3, 4, 9, 7), (1, 128), 60),
    ("LeNet-5-Caffe", lenet5_caffe, (8, 10, 10), (1, 128), 60),
    ("ResNet-18, 224 × 224", lambda: resnet(224), None, (1, 16), 7),
    ("ResNet-18, 64 × 64", lambda: resnet(64), None, (1, 128), 7),
]


def measured(name, make, widths, batches, repeats):
    torch.manual_seed(0)
    net, shape = make()
    net.eval()
    layers = noise_layers(bmrs.Classifier(net))
    widths = widths or [layer.features // 2 for layer in layers.values()]
    kept, scales = {}, {}
    for (site, layer), width in zip(layers.items(), widths, strict=True):
        kept[site] = torch.zeros(layer.features, dtype=torch.bool)
        kept[site][torch.randperm(layer.features)[:width]] = True
        scales[site] = torch.ones(layer.features)
    small = remove_structures(net, kept, scales, torch.randn(4, *shape)).network.eval()
    full = bmrs.without_noise(copy.deepcopy(net)).eval()
    row = {
        "network": name,
        "widths": "half" if len(widths) > 6 else "-".join(map(str, widths)),
        "parameters_before": parameters(full),
        "parameters_after": parameters(small),
        "removed_percent": 100 * (1 - parameters(small) / parameters(full)),
        "multiply_accumulates_before": multiply_accumulates(full, torch.randn(1, *shape)),
        "multiply_accumulates_after": multiply_accumulates(small, torch.randn(1, *shape)),
    }
    for batch in batches:
        before, after = latency_milliseconds([full, small], torch.randn(batch, *shape), repeats=repeats)
        yield {
            **row,
            "batch": batch,
            "milliseconds_before": before,
            "milliseconds_after": after,
            "speed_up": before / after,
        }


def main() -> pd.DataFrame:
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        for row in measured(*case):
            rows.append(row)
            print(
                f"{row['network']} {row['widths']}: {row['removed_percent']:.1f} % removed, batch {row['batch']}: "
                f"{row['milliseconds_before']:.2f} → {row['milliseconds_after']:.2f} ms, {row['speed_up']:.2f}×",
                flush=True,
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = main()
    if len(sys.argv) > 1:
        table.to_csv(sys.argv[1], index=False)
