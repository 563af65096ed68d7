"""One command that says whether a device computes what the CPU computes, and how fast its steps are.

    python analysis/device_check.py [--device auto] [--precision 32] [--out CSV]

Draws, KL, gradients and evidence of one posterior on the device and on the CPU; a fit of LeNet5 on the
embedded digits on the device, its reduction by BMRS_N there and of the same posterior on the CPU, and the
smaller network's outputs on both; the Laplace posterior of its weights, by one pass on each; a fit whose steps are
replayed as a CUDA graph, and one with a compiled network, against the same fit without. Then the time of a step and
the kernels that it launches: without noise, with it, replayed, compiled.

All that was measured is one table at the end: check, error, bound, good; or milliseconds, ratio, kernels. Exits with 1
where something differs by more than its bound. Where there is no accelerator the CPU is compared with itself, which is
said.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.distributions.packed import draw_with_kl, uniforms
from pyro_bmrs.files import write_table
from pyro_bmrs.fitting.devices import open_fabric
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.fitting.optimizer import make_optimizer
from pyro_bmrs.fitting.step import Step
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
CPU = torch.device("cpu")


class Checks:
    """What was measured, a row each, printed as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @property
    def good(self) -> bool:
        return all(row.get("good", True) for row in self.rows)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(
            "  ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else str(value)
                for name, value in row.items()
            ),
            flush=True,
        )

    def compare(self, name: str, found: Tensor, wanted: Tensor, bound: float) -> None:
        found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
        scale = wanted.abs().max().clamp(min=1e-12)
        error = float((found - wanted).abs().max() / scale)
        self.add(check=name, error=error, bound=bound, good=error <= bound)


def arithmetic(device: torch.device, checks: Checks) -> None:
    """Draws, KL and their gradients over the parameter box, far tails included."""
    generator = torch.Generator().manual_seed(0)
    units = 5000
    loc = 40 * torch.rand(units, generator=generator) - 30
    log_scale = 12 * torch.rand(units, generator=generator) - 8
    u = uniforms(16, units, stratified=True)
    results = []
    for place in (CPU, device):
        parameters = [t.to(place).requires_grad_() for t in (loc, log_scale)]
        low, high = (torch.full((units,), bound, device=place) for bound in (-20.0, 0.0))
        kept = torch.ones(units, dtype=torch.bool, device=place)
        theta, kl = draw_with_kl(*parameters, low, high, kept, u.to(place))
        gradients = torch.autograd.grad(theta.sum() + 1e-3 * kl, parameters)
        q = bmrs.TruncatedLogNormal(loc.double().to(place), log_scale.double().exp().to(place))
        reduced = bmrs.BMRS_N().reduced_prior(bmrs.LogUniform(low.double(), high.double()))
        evidence = bmrs.log_evidence_change(q, bmrs.LogUniform(low.double(), high.double()), reduced)
        results.append((theta, kl, *gradients, evidence))
    names = ("draws of θ", "KL", "gradient of loc", "gradient of log scale", "change in log-evidence")
    for name, wanted, found, bound in zip(names, *results, (1e-6, 1e-6, 1e-5, 1e-5, 1e-9), strict=True):
        checks.compare(name, found, wanted, bound)


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Median time of a step, the device's queue included."""
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times[10:])[25]


def kernels(step: Callable[[], object], device: torch.device) -> float:
    """Kernels that a step launches; NaN on the CPU, where nothing is launched."""
    if device.type != "cuda":
        return math.nan
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.accelerator.synchronize(device)
    launches = (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
    )
    return float(sum(event.count for event in seen.key_averages() if event.key in launches))


def step_times(recipe: Recipe, data: Any, device: torch.device, precision: str, checks: Checks) -> None:
    """A step of LeNet5 at batch 128, as a fit takes it."""
    x, y = (part.to(device) for part in data.train[:128])
    noisy = recipe.network(data, {}, 0).to(device)
    plain = bmrs.without_noise(copy.deepcopy(noisy))
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True)
    fabric = open_fabric(device, precision, CPU)

    def without() -> None:
        with fabric.autocast():
            loss = cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    kinds: dict[str, Callable[[], object]] = {"without noise": without}
    for name, options in (
        ("with noise", {"cuda_graph": "off"}), ("… replayed as a CUDA graph", {"cuda_graph": "auto"}),
        ("… compiled", {"cuda_graph": "off", "compile": True}), ("… both", {"cuda_graph": "auto", "compile": True}),
    ):  # fmt: skip
        if device.type != "cuda" and options["cuda_graph"] == "auto":
            continue
        model = bmrs.Classifier(copy.deepcopy(noisy))
        guide = bmrs.AutoTruncatedLogNormal(model)
        guide(x, y)
        model.train()
        settings = bmrs.Settings(precision=precision, **options)
        objective = Objective(model, guide, (x, y), dataset_size=1000, draws=16)
        step = Step(fabric, objective, make_optimizer(model, guide, settings), settings, (x, y), 10)
        kinds[name] = lambda step=step: step(x, y, 1.0, 1.0, 0)
    first = math.nan
    for name, step in kinds.items():
        found = milliseconds(step, device)
        first = found if math.isnan(first) else first
        checks.add(
            check=f"step of LeNet5, {name}",
            milliseconds=found,
            ratio=found / first,
            kernels=kernels(step, device),
        )


def laplace(recipe: Recipe, data: Any, device: torch.device, checks: Checks) -> None:
    """One pass of curvature of a trained network, its path of removals, and the refit, on both."""
    net = bmrs.without_noise(recipe.network(data, {}, 0))
    bmrs.fit(bmrs.Classifier(net), None, data.train, epochs=3, progress=False)
    results = []
    for place in (CPU, device):
        model = bmrs.Classifier(copy.deepcopy(net).to(place))
        guide = bmrs.AutoKroneckerLaplace(model)
        begin = time.perf_counter()
        bmrs.fit(model, guide, data.train, data.validation, device=place, progress=False)
        plan = bmrs.reduce(model, guide)
        small = plan.within(parameters=0.5, progress=False).apply(refit=data.train)
        seconds = time.perf_counter() - begin
        checks.add(check=f"Laplace, to the refit, on {place}", milliseconds=1e3 * seconds)
        with torch.no_grad():
            results.append((torch.tensor(guide.log_likelihood), small(data.test[:200][0].to(place))))
    # signs are drawn from each device's own generator, so that curvatures differ by their sampling error
    checks.compare("log-likelihood of the Laplace posterior", results[1][0], results[0][0], 1e-4)
    agree = (results[0][1].argmax(1) == results[1][1].argmax(1).cpu()).float().mean()
    checks.compare("classes by the refitted networks, half as large", agree, torch.tensor(1.0), 0.1)


def same_fits(recipe: Recipe, data: Any, device: torch.device, precision: str, checks: Checks) -> None:
    """Fits with equal seeds: replayed or compiled, and neither."""
    losses = {}
    kinds: dict[str, dict[str, Any]] = {
        "": {"cuda_graph": "off"},
        "compiled": {"cuda_graph": "off", "compile": True},
    }
    if device.type == "cuda":
        kinds["replayed"] = {"cuda_graph": "on"}
    for name, options in kinds.items():
        torch.manual_seed(0)
        model = bmrs.Classifier(recipe.network(data, {}, 0))
        guide = bmrs.AutoTruncatedLogNormal(model)
        found = bmrs.fit(
            model, guide, data.train, epochs=2, kl_weight=1.0, device=device, precision=precision, progress=False,
            **options,
        )  # fmt: skip
        losses[name] = torch.tensor(found.history["loss"].to_numpy())
    for name, found in losses.items():
        if name:
            checks.compare(f"losses of a fit, {name}", found, losses[""], 1e-2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="32", choices=("32", "bf16-mixed"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = open_fabric(given.device, given.precision, CPU).device
    note = "" if device.type != "cpu" else " (no accelerator: the CPU is compared with itself)"
    print(f"torch {torch.__version__}, {device}{note}")
    checks = Checks()
    arithmetic(device, checks)

    recipe = Recipe.read(MODELS / "lenet5.py")
    data = load_data("digits", image_size=32, seed=0)
    model = recipe.model(recipe.network(data, {}, 0))
    guide = recipe.guide(model)
    options = dict(epochs=given.epochs, batch_size=32, kl_weight=5.0)
    begin = time.perf_counter()
    result = bmrs.fit(
        model, guide, data.train, data.validation, device=device, removal="epoch",
        criterion=bmrs.BMRS_N(), precision=given.precision, progress=False, **options,
    )  # fmt: skip
    print(f"     {result} ({time.perf_counter() - begin:.1f} s)")
    there = bmrs.reduce(model, guide, bmrs.BMRS_N())
    small = there.apply()
    model.cpu()
    guide.cpu()
    here = bmrs.reduce(model, guide, bmrs.BMRS_N())
    scores = [torch.tensor(plan.table.score.to_numpy()) for plan in (there, here)]
    checks.compare("scores of the fitted posterior", scores[0], scores[1], 1e-9)
    x = data.test[:200][0]
    with torch.no_grad():
        on_device = small(x.to(device))
        on_cpu = here.apply()(x)
    checks.compare("outputs of the smaller network", on_device, on_cpu, 1e-2)
    checks.add(check="the plans keep the same structures", good=there.kept == here.kept)
    laplace(recipe, data, device, checks)
    same_fits(recipe, data, device, given.precision, checks)
    step_times(recipe, data, device, given.precision, checks)
    table = pd.DataFrame(checks.rows)
    print(table.to_string(index=False, na_rep="", float_format="{:.3g}".format))
    if given.out:
        write_table(given.out, table)
    return 0 if checks.good else 1


if __name__ == "__main__":
    sys.exit(main())
