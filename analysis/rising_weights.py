"""Networks without a KL weight: one fit along rising weights, beside fits at fixed weights and two other ways.

    OMP_NUM_THREADS=1 python analysis/rising_weights.py models/lenet5.py mnist [--seeds 0] [--data-root FOLDER]
        [--network '{"select_inputs": true}'] [--weights 80 240] [--sizes 0.1 0.05] [--ways rise multiplier price full]

- `full`: the network without noise, of the epochs of fit and fine-tuning together.
- `weight W`: a fit at each of --weights, cosine rates, reduced by the evidence: the study's way.
- `rise`: one fit at kl_weight="auto"; its own choice, and `Fit.within` the parameters of each fit at a fixed weight and
  of each of --sizes (shares left).
- `multiplier`: the weight is a Lagrange multiplier (Rezende and Viola, 2018). After each epoch it is multiplied by
  exp(2 (κ - L)/κ), at most doubled or halved: L is the training loss, κ that after the epochs at w = 1 and one standard
  error of the validation loss.
- `price`: w = 1, and prior log-odds of half a structure's parameters times log N, in nats (Schwarz).

All have the epochs of the recipe and are fine-tuned alike. Writes a row for each network to rising_weights.csv, and the
stages of each rise to stages.csv, in --out. Rows that are there are passed over.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peers import measured, trained, tune
from torch import nn
from trials import Rows, Trial, figures, parser_of_trials, trials

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_table
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.layers import Layers, Scores

WAYS = ("full", "rise", "multiplier", "price")


@dataclass(frozen=True)
class PricedEvidence:
    """BMRS_N with the prior log-odds of a layer's structures at half their parameters times log N, in nats."""

    unit: ClassVar[str] = "nats"
    log_odds: Mapping[str, float]

    def __call__(self, layers: Layers) -> Scores:
        changes = bmrs.BMRS_N(prior_log_odds=0.0).log_evidence_change(layers)
        return {name: change + self.log_odds[name] for name, change in changes.items()}


@dataclass(frozen=True)
class OneOf:
    """Removes the first structure of one layer and nothing else: to count what leaves with it."""

    unit: ClassVar[str] = "none"
    layer: str

    def __call__(self, layers: Layers) -> Scores:
        scores = {
            name: torch.full(layer.kept.shape, -1.0, dtype=torch.float64) for name, layer in layers.items()
        }
        scores[self.layer][0] = 1.0
        return scores


def prices(model: nn.Module, guide: Any, examples: int) -> dict[str, float]:
    """½ n log N by layer, n the parameters that leave with a structure of the full network."""
    found = {}
    for layer in noise_layers(model):
        plan = bmrs.reduce(model, guide, OneOf(layer))
        found[layer] = 0.5 * (plan.parameters_before() - plan.parameters_left()) * math.log(examples)
    return found


def by_price(trial: Trial) -> bmrs.NetworkPlan:
    model, guide = trial.start()
    trial.fit(model, guide, kl_weight=1.0)
    return bmrs.reduce(model, guide, PricedEvidence(prices(model, guide, len(trial.data.train))))


def by_multiplier(trial: Trial) -> bmrs.NetworkPlan:
    model, guide = trial.start()
    settings, weight, allowed = trial.settings, 1.0, 0.0
    first = round(settings.warm_up * settings.epochs)
    for epoch in range(settings.epochs):
        trial.fit(
            model, guide, epochs=1, kl_weight=weight, seed=100 * settings.seed + epoch, schedule="constant",
            warm_up=0.0, keep_best=False,
        )  # fmt: skip
        loss = evaluate(model, trial.data.train, guide.mean()).loss
        if epoch + 1 == first:
            allowed = loss + evaluate(model, trial.data.validation, guide.mean()).standard_error
        elif epoch + 1 > first:
            weight *= math.exp(min(max(2 * (allowed - loss) / allowed, -math.log(2)), math.log(2)))
    print(f"multiplier: loss {loss:.4f}, allowed {allowed:.4f}, weight {weight:.3g}", flush=True)
    return bmrs.reduce(model, guide)


class Study:
    """The ways on one data set and seed."""

    def __init__(self, given: Any, trial: Trial, rows: Rows) -> None:
        self.given, self.trial, self.rows = given, trial, rows
        self.key = given.recipe.name, given.data, trial.settings.seed

    def add(self, way: str, size: str, small: nn.Module, weight: float, seconds: float) -> None:
        trial = self.trial
        untuned = measured(small, trial.data)["accuracy"]
        tune(small, trial.settings, trial.data, trial.settings.fine_tune)
        found = figures(small, trial.data, trial.before)
        self.rows.add(
            *self.key, way, size, kl_weight=weight, **found, accuracy_before_tuning=untuned, seconds=seconds
        )

    def full(self) -> None:
        settings, begin = self.trial.settings, time.process_time()
        epochs = settings.epochs + settings.fine_tune
        net = trained(self.trial.recipe, settings, self.trial.data, epochs)
        found = figures(net, self.trial.data, self.trial.before)
        self.rows.add(*self.key, "full", "own", **found, seconds=time.process_time() - begin)

    def weight(self, weight: float) -> None:
        (model, guide), begin = self.trial.start(), time.process_time()
        self.trial.fit(model, guide, kl_weight=weight)
        small = bmrs.reduce(model, guide).apply()
        self.add(f"weight {weight:g}", "own", small, weight, time.process_time() - begin)

    def rise(self) -> None:
        table = self.rows.table
        same = (table.recipe == self.key[0]) & (table.data == self.key[1]) & (table.seed == self.key[2])
        fixed = [] if table.empty else table[same & table.way.str.startswith("weight")].parameters.astype(int)
        asked = [
            size for size in [*self.given.sizes, *fixed] if not self.rows.has(*self.key, "rise", f"{size:g}")
        ]
        if not asked and self.rows.has(*self.key, "rise", "own"):
            return
        (model, guide), begin = self.trial.start(), time.process_time()
        trial, settings = self.trial, self.trial.settings.changed(kl_weight="auto")
        result = bmrs.fit(model, guide, trial.data.train, trial.data.validation, settings, progress=False)
        seconds = time.process_time() - begin
        print(result.stages.to_string(), flush=True)
        name = f"stages-{self.given.recipe.stem}-{self.key[1]}-{self.key[2]}.csv"
        write_table(self.rows.path.with_name(name), result.stages)
        if not self.rows.has(*self.key, "rise", "own"):
            self.add("rise", "own", bmrs.reduce(model, guide).apply(), guide.kl_weight, seconds)
        for size in asked:
            plan = result.within(parameters=size, progress=False)
            self.add("rise", f"{size:g}", plan.apply(), guide.kl_weight, seconds)

    def run(self) -> None:
        for weight in self.given.weights:
            if not self.rows.has(*self.key, f"weight {weight:g}", "own"):
                self.weight(weight)
        for way in self.given.ways:
            if way == "rise":
                self.rise()
            elif self.rows.has(*self.key, way, "own"):
                continue
            elif way == "full":
                self.full()
            else:
                begin = time.process_time()
                plan = by_price(self.trial) if way == "price" else by_multiplier(self.trial)
                self.add(way, "own", plan.apply(), plan.rule.kl_weight, time.process_time() - begin)


def main() -> None:
    parser = parser_of_trials(__doc__, "rising_weights")
    parser.add_argument(
        "--network", type=json.loads, help="sizes of the network as JSON; default: the recipe's"
    )
    parser.add_argument("--weights", type=float, nargs="*", default=[])
    parser.add_argument("--sizes", type=float, nargs="*", default=[])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["rise", "full"])
    given = parser.parse_args()
    rows = Rows(given.out / "rising_weights.csv", ("recipe", "data", "seed", "way", "size"))
    for trial in trials(given):
        Study(given, trial, rows).run()


if __name__ == "__main__":
    main()
