"""What a step of a fit costs against the same network without noise, and what each lever gives.

    OMP_NUM_THREADS=1 python analysis/step_times.py [--out FOLDER]

One process, one thread; the steps of all kinds follow one another, in another order in each round, and
medians are compared. A step is: loss, backward pass, step of fused Adam, and looking at the loss. Kinds:

    plain            the network without noise, in torch alone; plain again is its A/A control
    floor            one Normal site for all units in Pyro, one shared draw: the cheapest noise Pyro can have
    ours             what `fit` does: fused, 16 stratified draws per batch
    …, compiled      by torch.compile, as `fit(compile=True)` has it
    other rows       `ours` with one lever moved

Writes step_times.csv: network, batch, kind, draws, milliseconds (median), ratio to plain (median of the
ratios within a round), and the quartiles of that ratio.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_atomically
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.networks.noise import drawn_together, noise_layers
from pyro_bmrs.runs.recipe import Recipe

MODELS = Path(__file__).parent.parent / "models"
DATASET_SIZE = 48_000
# recipe, arguments of its network, input shape, batch, rounds
CASES = {
    "LeNet5": ("lenet5", {}, (1, 32, 32), 128, 200),
    "MLP 7×100": ("mlp", {"widths": (100,) * 7, "select_inputs": False}, (1, 32, 32), 128, 600),
    "ResNet-18": ("resnet", {"depth": 18}, (3, 32, 32), 32, 15),
}
# kind → options of the objective, and of Adam
LEVERS = {
    "ours": (dict(draws=16), {}),
    "ours, 8 draws": (dict(draws=8), {}),
    "ours, 1 draw": (dict(draws=1), {}),
    "ours, a draw per example": (dict(draws=None), {}),
    "independent uniforms": (dict(draws=16, stratified=False), {}),
    "packed, in Pyro's ELBO": (dict(draws=16, elbo="packed"), {}),
    "site by site, in Pyro's ELBO": (dict(draws=16, elbo="pyro"), {}),
    "site by site, a draw per example": (dict(draws=None, elbo="pyro"), {}),
    "Adam not fused": (dict(draws=16), {"fused": False}),
    "ours, compiled": (dict(draws=16), {}),
}
COMPILED = "plain, compiled", "ours, compiled"
SLOW = ("ResNet-18",)
OF_SLOW = (
    "ours",
    "ours, 8 draws",
    "ours, 1 draw",
    "ours, a draw per example",
    "site by site, in Pyro's ELBO",
    "ours, compiled",
)


class NormalFloor(nn.Module):
    """One Normal latent for all units of a network, in Pyro: model and guide."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.sizes = {site: layer.features for site, layer in noise_layers(net).items()}
        self.loc = nn.Parameter(torch.ones(sum(self.sizes.values())))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, -5.0))

    def model(self, x: Tensor, y: Tensor) -> None:
        prior = pyro.distributions.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        with pyro.poutine.scale(scale=len(x) / DATASET_SIZE):
            theta = pyro.sample("theta", prior)
        parts = dict(zip(self.sizes, theta.split(list(self.sizes.values())), strict=True))
        with drawn_together(parts, len(x)):
            logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.poutine.scale(scale=len(x) / DATASET_SIZE):
            pyro.sample("theta", pyro.distributions.Normal(self.loc, self.log_scale.exp()).to_event(1))


def stepper(loss: Callable[[], Tensor], modules: list[nn.Module], fused: bool = True) -> Callable[[], None]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=fused)

    def step() -> None:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not value.isfinite():
            raise FloatingPointError("the loss is not finite")

    return step


def kinds(name: str) -> dict[str, Callable[[], None]]:
    """All kinds of step of a network, by name."""
    file, options, shape, batch, _ = CASES[name]
    recipe = Recipe.read(MODELS / f"{file}.py")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    noisy = recipe.network(SimpleNamespace(input_shape=shape, num_outputs=10), options, 0)
    steps: dict[str, Callable[[], None]] = {}
    for kind in ("plain", "plain again", "plain, compiled"):
        net = bmrs.without_noise(copy.deepcopy(noisy))
        if kind in COMPILED:
            net.compile()
        steps[kind] = stepper(lambda net=net: cross_entropy(net(x), y), [net])
    floor = NormalFloor(copy.deepcopy(noisy))
    elbo = TraceMeanField_ELBO()
    steps["floor"] = stepper(
        lambda: elbo.differentiable_loss(floor.model, floor.guide, x, y) / batch, [floor]
    )
    for kind, (options, of_adam) in LEVERS.items():
        if name in SLOW and kind not in OF_SLOW:
            continue
        model = bmrs.Classifier(copy.deepcopy(noisy))
        guide = bmrs.AutoTruncatedLogNormal(model)
        guide(x, y)
        model.train()
        objective = Objective(model, guide, (x, y), dataset_size=DATASET_SIZE, **options)
        if kind in COMPILED:  # as in a fit: not where Pyro traces the model, which breaks the graph
            model.net.compile()
        steps[kind] = stepper(lambda objective=objective: objective(x, y, 1.0)[0], [model, guide], **of_adam)
    return steps


def measured(name: str) -> list[dict[str, object]]:
    """Rows of one network."""
    *_, batch, rounds = CASES[name]
    steps = kinds(name)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    order = random.Random(0)
    for round_ in range(rounds + 2):
        # in another order each time: a step finds the caches as the one before has left them
        for kind, step in order.sample(list(steps.items()), len(steps)):
            begin = time.perf_counter()
            step()
            if round_ >= 2:
                times[kind].append(1e3 * (time.perf_counter() - begin))
    table = pd.DataFrame(times)
    ratios = table.div(table["plain"], axis=0)
    draws = {kind: options["draws"] or batch for kind, (options, _) in LEVERS.items()}
    return [
        {
            "network": name, "batch": batch, "kind": kind, "draws": draws.get(kind, 1), "rounds": rounds,
            "milliseconds": round(table[kind].median(), 3),
            "ratio": round(table[kind].median() / table["plain"].median(), 3),
            "ratio_in_round": round(ratios[kind].median(), 3),
            "ratio_quarter": round(ratios[kind].quantile(0.25), 3),
            "ratio_three_quarters": round(ratios[kind].quantile(0.75), 3),
        }
        for kind in steps
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_times")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for name in given.networks:
        with pyro.validation_enabled(False):
            rows += measured(name)
        table = pd.DataFrame(rows)
        write_atomically(
            given.out / "step_times.csv", lambda beside, table=table: table.to_csv(beside, index=False)
        )
        print(table[table.network == name].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
