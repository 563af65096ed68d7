"""How the time of a step's noise, and of `reduce`, grow with the number of units: linearly.

    OMP_NUM_THREADS=1 python analysis/fit_scaling.py [--out FOLDER]

For 100 to 1,000,000 units in one layer, one thread: the draw of 16 values of θ per unit and the KL with their
backward pass (what a step pays beside the network), a step's Adam of their parameters, and `reduce` by BMRS_N
(posterior to table). Medians of several repeats. Writes fit_scaling.csv; figures.py draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_atomically
from pyro_bmrs.inference.packed import PackedLatents
from pyro_bmrs.networks.noise import noise_layers

UNITS = (100, 1_000, 10_000, 100_000, 1_000_000)


def median(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median milliseconds of as many repeats as fit into `seconds`, at least five."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[len(times) // 2]


def measured(units: int) -> dict[str, float]:
    net = nn.Sequential(nn.Linear(1, units), bmrs.MultiplicativeNoise(units), nn.Linear(units, 2))
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # from dead to certain, some beyond the upper bound
        loc = 20.5 * torch.rand(units, generator=generator) - 20
        guide.posteriors[0].loc.copy_(loc)
        guide.posteriors[0].log_scale.copy_(3 * torch.rand(units, generator=generator) - 2)
    packed = PackedLatents(guide, noise_layers(model), stratified=True)
    optimizer = torch.optim.Adam(guide.parameters(), 1e-8, fused=True)

    def noise() -> None:
        drawn = packed.draw(16)
        (drawn.values["1"].sum() + drawn.kl).backward()

    noise()
    return {
        "units": units,
        "noise_milliseconds": round(median(noise), 4),
        "adam_milliseconds": round(median(optimizer.step), 4),
        "reduce_milliseconds": round(median(lambda: bmrs.reduce(model, guide, bmrs.BMRS_N())), 4),
    }


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for column, label, colour in (
        ("noise_milliseconds", "noise of a step: 16 draws, KL, gradients", "#0b559f"),
        ("reduce_milliseconds", "reduce by BMRS_N, to the table", "#d08a3e"),
        ("adam_milliseconds", "Adam of the posterior", "#777"),
    ):
        axes.plot(table.units, table[column], "o-", color=colour, label=label)
    last = table.iloc[-1]
    axes.plot(
        [1e3, 1e6],
        [last.noise_milliseconds / 1e3, last.noise_milliseconds],
        ":",
        color="#999",
        label="linear",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("units")
    axes.set_ylabel("milliseconds, one thread")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fit_scaling")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = pd.DataFrame([measured(units) for units in UNITS])
    write_atomically(given.out / "fit_scaling.csv", lambda beside: table.to_csv(beside, index=False))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
