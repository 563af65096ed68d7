"""What to do for someone who has never heard of KL weights: two ways that need none, each tried on every cell.

    OMP_NUM_THREADS=1 python analysis/honest_default.py models/lenet5.py mnist [--seeds 0] [--data-root FOLDER]

- `price`: the ELBO itself (w = 1), and prior log-odds that make a unit pay for the n parameters it brings, n/2 log N
  nats: what they cost under Laplace's or Schwarz's approximation of the evidence.
- `path`: one fit along weights that rise from 1, reduced after each stage; the chosen stage is the smallest network
  whose validation log-likelihood is within one standard error of the best stage's.

Both have the epochs of the recipe's fit and of its fine-tuning. Writes a row per way and seed to honest_default.csv,
and every stage of the paths to paths.csv, in `--out`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from peers import measured, tune
from torch import Tensor, nn
from trials import Rows, Trial, figures, parser_of_trials, trials

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.layers import Layers, Scores
from pyro_bmrs.quality import predictions

STAGES, LAST = 12, 1000.0


@dataclass(frozen=True)
class PricedEvidence:
    """BMRS_N with the prior log-odds of a layer's units at half their parameters times log N, in nats."""

    unit: ClassVar[str] = "nats"
    log_odds: Mapping[str, float]

    def __call__(self, layers: Layers) -> Scores:
        changes = bmrs.BMRS_N(prior_log_odds=0.0).log_evidence_change(layers)
        return {name: change + self.log_odds[name] for name, change in changes.items()}


@dataclass(frozen=True)
class OneOf:
    """Removes the first unit of one layer and nothing else: to count what leaves with it."""

    unit: ClassVar[str] = "none"
    layer: str

    def __call__(self, layers: Layers) -> Scores:
        scores = {
            name: torch.full(layer.kept.shape, -1.0, dtype=torch.float64) for name, layer in layers.items()
        }
        scores[self.layer][0] = 1.0
        return scores


def prices(model: nn.Module, guide: Any, examples: int) -> dict[str, float]:
    """½ n log N by layer, n the parameters that leave with a unit of the full network."""
    found = {}
    for layer in noise_layers(model):
        plan = bmrs.reduce(model, guide, OneOf(layer))
        found[layer] = 0.5 * (plan.parameters_before() - plan.parameters_left()) * math.log(examples)
    return found


def fitted(trial: Trial, weights: list[float], epochs: int, **options: Any) -> Any:
    """(weight, model, guide) after each stage of so many epochs at that weight."""
    model, guide = trial.start()
    for stage, weight in enumerate(weights):
        seed = 100 * trial.settings.seed + stage
        trial.fit(model, guide, epochs=epochs, kl_weight=weight, seed=seed, **options)
        yield weight, model, guide


def by_price(trial: Trial) -> nn.Module:
    ((_, model, guide),) = fitted(trial, [1.0], trial.settings.epochs)
    log_odds = prices(model, guide, len(trial.data.train))
    print({layer: round(price, 1) for layer, price in log_odds.items()}, flush=True)
    return bmrs.reduce(model, guide, PricedEvidence(log_odds)).apply()


def by_path(trial: Trial, stages: Rows) -> nn.Module:
    weights = [float(weight) for weight in np.geomspace(1.0, LAST, STAGES)]
    found: list[tuple[float, float, int, nn.Module]] = []
    epochs = max(1, trial.settings.epochs // STAGES)
    options = {"schedule": "constant", "warm_up": 0.0, "keep_best": False}
    for weight, model, guide in fitted(trial, weights, epochs, **options):
        small = bmrs.reduce(model, guide, bmrs.BMRS_N()).apply()
        none: Mapping[str, Tensor] = {}
        scored = predictions(bmrs.Classifier(small), trial.data.validation, none)
        losses = -np.log(scored.probability[np.arange(len(scored.label)), scored.label].clip(1e-300))
        loss, error = losses.mean(), losses.std() / len(losses) ** 0.5
        found.append((loss, error, parameters(small), copy.deepcopy(small)))
        stages.add(
            trial.recipe.name, trial.settings.data, trial.settings.seed, weight, parameters=parameters(small),
            validation_loss=loss, standard_error=error,
            validation_accuracy=float((scored.predicted == scored.label).mean()),
        )  # fmt: skip
    best = min(found, key=lambda stage: stage[0])
    good = [stage for stage in found if stage[0] <= best[0] + best[1]]
    return min(good, key=lambda stage: stage[2])[3]


def main() -> None:
    given = parser_of_trials(__doc__, "honest_default").parse_args()
    rows = Rows(given.out / "honest_default.csv", ("recipe", "data", "seed", "way"))
    stages = Rows(given.out / "paths.csv", ("recipe", "data", "seed", "kl_weight"))
    for trial in trials(given):
        for way in ("path", "price"):
            key = given.recipe.name, given.data, trial.settings.seed, way
            if rows.has(*key):
                continue
            small = by_path(trial, stages) if way == "path" else by_price(trial)
            untuned = measured(small, trial.data)["accuracy"]
            tune(small, trial.settings, trial.data, trial.settings.fine_tune)
            rows.add(*key, **figures(small, trial.data, trial.before), accuracy_before_tuning=untuned)


if __name__ == "__main__":
    main()
