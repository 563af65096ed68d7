"""One command that says whether a device computes what the CPU computes, and how fast its steps are.

    python analysis/device_check.py [--device auto] [--precision 32]

Draws, KL, gradients and evidence of one posterior on the device and on the CPU; a fit of LeNet5 on the
embedded digits on the device, its reduction by BMRS_N there and of the same posterior on the CPU, and the
smaller network's outputs on both; then the time of a step, with noise and without. Exits with 1 where
something differs by more than the bound beside it. Where there is no accelerator the CPU is compared with
itself, which is said.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.distributions.packed import draw_with_kl, uniforms
from pyro_bmrs.fitting.devices import open_fabric
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.inference.site_posterior import bounded
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
CPU = torch.device("cpu")


class Checks:
    """Differences beside their bounds, printed as they come."""

    def __init__(self) -> None:
        self.good = True

    def compare(self, name: str, found: Tensor, wanted: Tensor, bound: float) -> None:
        found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
        scale = wanted.abs().max().clamp(min=1e-12)
        error = float((found - wanted).abs().max() / scale)
        good = error <= bound
        self.good &= good
        print(f"{'ok  ' if good else 'FAIL'} {name:<44} {error:.1e} (bound {bound:.0e})")


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
        theta, kl = draw_with_kl(*bounded(*parameters, low, high), low, high, kept, u.to(place))
        gradients = torch.autograd.grad(theta.sum() + 1e-3 * kl, parameters)
        q = bmrs.TruncatedLogNormal(loc.double().to(place), log_scale.double().exp().to(place))
        reduced = bmrs.BMRS_N().reduced_prior(bmrs.LogUniform(low.double(), high.double()))
        evidence = bmrs.log_evidence_change(q, bmrs.LogUniform(low.double(), high.double()), reduced)
        results.append((theta, kl, *gradients, evidence))
    names = ("draws of θ", "KL", "gradient of loc", "gradient of log scale", "change in log-evidence")
    for name, wanted, found, bound in zip(names, *results, (1e-6, 1e-9, 1e-5, 1e-5, 1e-9), strict=True):
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


def step_times(recipe: Recipe, data: object, device: torch.device) -> None:
    x, y = (part.to(device) for part in data.train[:128])
    noisy = recipe.network(data, {}, 0).to(device)
    plain = bmrs.without_noise(copy.deepcopy(noisy))
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    objective = Objective(model, guide, (x, y), dataset_size=1000, draws=16)

    def stepper(loss: Callable[[], Tensor], *modules: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], fused=True)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    without = milliseconds(stepper(lambda: cross_entropy(plain(x), y), plain), device)
    with_noise = milliseconds(stepper(lambda: objective(x, y, 1.0)[0], model, guide), device)
    print(
        f"     step of LeNet5, batch {len(y)}: {with_noise:.2f} ms with noise, {without:.2f} ms without "
        f"({with_noise / without:.2f} times)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="32", choices=("32", "bf16-mixed"))
    parser.add_argument("--epochs", type=int, default=30)
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
    options = {
        name: recipe.settings("digits")[name]
        for name in ("batch_size", "learning_rate", "posterior_learning_rate", "kl_weight")
    }
    begin = time.perf_counter()
    result = bmrs.fit(
        model, guide, data.train, data.validation, epochs=given.epochs, device=device, removal="epoch",
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
    if there.kept != here.kept:
        print("FAIL the plans keep different structures")
        checks.good = False
    step_times(recipe, data, device)
    return 0 if checks.good else 1


if __name__ == "__main__":
    sys.exit(main())
