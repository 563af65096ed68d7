"""How long it takes to find the structures of a network and to give it noise, and how much memory.

    OMP_NUM_THREADS=1 python analysis/structure_times.py --out analysis/results/structure_times.csv

A row for each network, each in a process of its own: seconds of `insert_noise`, which finds the structures and tries
them, on two examples and one thread; the median of --repeats runs after one on a small network, which loads what is
loaded once. `forward`: seconds of one pass of the network on the same examples. peak_mb: largest resident memory, with
Python, torch and the network itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table


def _image_network(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    return getattr(torchvision.models, name)(), torch.randn(2, 3, 224, 224)


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=10,
        num_key_value_heads=5, vocab_size=32000,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(32000, (2, 32))}


NETWORKS = {
    "resnet50": lambda: _image_network("resnet50"),
    "vit_b_16": lambda: _image_network("vit_b_16"),
    "vit_l_16": lambda: _image_network("vit_l_16"),
    "llama of 107 M parameters": _llama,
}


def _measured(name: str, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    bmrs.insert_noise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    network, example = NETWORKS[name]()
    network.eval()
    found, passes = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        noisy = bmrs.insert_noise(network, example)
        found.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            network(**example) if isinstance(example, dict) else network(example)
        passes.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "structures": sum(layer.features for layer in noisy.structure_noise.layers),
        "seconds": round(statistics.median(found), 2),
        "forward": round(statistics.median(passes), 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the CSV; default: nothing is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of:
        print(json.dumps(_measured(given.of, given.repeats)))
        return
    rows = []
    for name in NETWORKS:
        command = [sys.executable, __file__, "--of", name, "--repeats", str(given.repeats)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"network": name, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    if given.out:
        write_table(given.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
