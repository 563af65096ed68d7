"""Reductions, diagnoses and runs to show: some made by hand in no time, one really fitted, in seconds."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from command_line import call
from filelock import FileLock
from torch import nn

from pyro_bmrs import MultiplicativeNoise, NetworkPlan, Rule
from pyro_bmrs.quality import Diagnosis, Frontier
from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage
from pyro_bmrs.quality.diagnosis import PARTS
from pyro_bmrs.quality.predictive import Predictions

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"
# The tiny recipe's network, with scores from clearly out to clearly in, so that a slider has a way to go.
SPREAD = """

class Spread(AutoTruncatedLogNormal):
    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        for posterior in self.posteriors:
            for start, lowest, highest in ((0, -1.5, -0.05), (1, -19.0, -4.0)):
                loc = posterior.loc.data[start::2]
                loc.copy_(torch.linspace(lowest, highest, len(loc)).flip(0))
                posterior.log_scale.data[start::2] = -0.3 * (loc + 15).clamp(min=-4)


def guide(model):
    return Spread(model)
"""
RUN_OPTIONS = ("--epochs", 8, "--learning-rate", 0.02, "--quiet")
DRAWS = 100


@cache
def finished_run(base):
    """The folder of a run of the spread recipe, complete with a diagnosis; one for all: to be read only.

    Args:
        base: pytest's own folder for temporary files. Where several processes test, each has its own in a common one.
    """
    base = base.parent if base.name.startswith("popen-") else base
    folder = base / "finished" / "spread"
    with FileLock(base / "finished.lock"):
        recipe = base / "spread.py"
        recipe.write_text(f"import torch\n{RECIPE.read_text()}{SPREAD}")
        assert call("run", recipe, "--out", folder, *RUN_OPTIONS, "--draws", DRAWS) == 0
    return folder


def make_plan(
    scores, *, gone=(), log_odds=0.5, min_kept=1, round_to=None, channels=None, criterion=None, kl_weight=1.0
):
    """A reduction by hand, of a chain of layers that it is bound to.

    Args:
        scores: of each structure, by layer.
        gone: pairs (layer, unit) that a fit removed; their scores may be NaN.
        log_odds: prior log-odds of the criterion; None: it is one without evidence.
    """
    names = [layer for layer, values in scores.items() for _ in values]
    units = [unit for values in scores.values() for unit in range(len(values))]
    score = np.array([value for values in scores.values() for value in values], dtype=float)
    in_fit = np.array([pair in set(gone) for pair in zip(names, units, strict=True)], dtype=bool)
    loc = np.linspace(-18.0, -0.1, len(score))
    table = pd.DataFrame(
        {
            "layer": names,
            "unit": units,
            "loc": loc,
            "scale": np.linspace(2.0, 0.05, len(score)),
            "mean": np.exp(loc),
            "snr": np.linspace(0.2, 30.0, len(score)),
            "score": score,
            "log_evidence_change": np.nan if log_odds is None else score - log_odds,
            "kl_weight": kl_weight,
            "removed": in_fit,
            "removed_in_fit": in_fit,
            "present": True,
        }
    )
    plan = NetworkPlan(
        table=table,
        rule=Rule(
            criterion=criterion or ("SNR" if log_odds is None else "Given"), prior_log_odds=log_odds,
            min_kept=min_kept, round_to=round_to, kl_weight=kl_weight,
        ),
        channels=channels or {},
    )  # fmt: skip
    network = chain({layer: len(values) for layer, values in scores.items()})
    return plan.at(0.0).bound_to(network, lambda: torch.zeros(4, INPUTS))


INPUTS, OUTPUTS = 3, 2


def chain(widths):
    """Linear layers one after the other, the noise of each called as `widths` says."""
    layers, inputs = [], INPUTS
    for name, width in widths.items():
        noise = MultiplicativeNoise(width)
        noise.site = name
        layers += [nn.Linear(inputs, width), nn.ReLU(), noise]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, OUTPUTS))


def parameters_of(widths):
    """Of a chain with so many structures in each layer: weights and biases."""
    sizes = [INPUTS, *widths, OUTPUTS]
    return sum(before * after + after for before, after in pairwise(sizes))


def random_scores(layers, seed=0):
    """About half of the structures score 0 or more; a few hundred nats lie between the best and the worst."""
    random = np.random.default_rng(seed)
    return {
        layer: np.where(
            random.random(width) < 0.5, 3 * random.random(width), -(10 ** random.uniform(-1, 2.5, width))
        )
        for layer, width in layers.items()
    }


def make_curve(plan, points=12):
    """Accuracy falls by one hundredth from point to point, so that each point has its own."""
    score = plan.table.score[~plan.table.removed_in_fit]
    thresholds = [
        np.inf, *sorted({0.0, *np.quantile(score, np.linspace(0, 1, points)).tolist()}, reverse=True),
    ]  # fmt: skip
    left = np.array(plan.parameters_at(thresholds))
    return pd.DataFrame(
        {
            "parameters_removed": 1 - left / plan.parameters_before(),
            "accuracy": 0.95 - 0.01 * np.arange(len(thresholds)),
            "loss": 0.1 + 0.02 * np.arange(len(thresholds)),
            "score_threshold": thresholds,
            "is_plan": [threshold == 0.0 for threshold in thresholds],
        }
    )


def make_frontier(plan, points=6):
    """Networks at some thresholds; accuracy falls by one hundredth from one to the next, so that each has its own."""
    score = plan.table.score[~plan.table.removed_in_fit]
    thresholds = [np.inf, *sorted({0.0, *np.quantile(score, np.linspace(0, 1, points))}, reverse=True)]
    plans = [plan if threshold == 0 else plan.at(threshold) for threshold in thresholds]
    left = plan.parameters_of(plans)
    table = pd.DataFrame(
        {
            "structures": [int((~one.table.removed).sum()) for one in plans],
            "parameters": left,
            "multiply_accumulates": [7 * number for number in left],
            "milliseconds": [0.25] * (len(left) - 1) + [np.nan],
            "loss": 0.1 + 0.02 * np.arange(len(left)),
            "standard_error": 0.01,
            "accuracy": 0.95 - 0.01 * np.arange(len(left)),
            "rmse": np.nan,
            "is_plan": [one is plan for one in plans],
            "is_evidence": [one is plan for one in plans],
            "is_one_standard_error": np.arange(len(left)) == 1,
        }
    )
    return Frontier(table, tuple(plans), {})


def make_diagnosis(plan, *, foreign="elsewhere", names=("full", "reduced"), notes=()):
    """A diagnosis of random predictions."""
    random = np.random.default_rng(0)
    curve = make_curve(plan)
    rows, bins, coverages = [], [], []
    for network in names:
        probability = random.dirichlet(np.full(4, 0.4), 200)
        label = np.array([random.choice(4, p=row) for row in probability])
        seen = Predictions(probability, np.zeros(200), label, 1)
        texts = dict(network=network, prediction="draws")
        rows.append({**texts, **quality(seen)})
        bins.append(reliability(seen).assign(**texts))
        coverages.append(risk_coverage(seen).assign(**texts))
    parts = ["all latents", *plan.layers]
    khat = np.array([1.3, -np.inf, -0.35, -0.1, *[0.2] * len(parts)])[: len(parts)]
    gone = plan.table.removed_in_fit
    return Diagnosis(
        khat=pd.DataFrame(
            {"part": parts, "latents": 3, "khat": khat, "threshold": 0.5, "reliable": khat <= 0.5}
        ),
        elbo=pd.DataFrame({"model": ["model"], "elbo": [-120.5], "standard_error": [1.5]}),
        contraction=pd.DataFrame(
            {
                "site": plan.table.layer,
                "unit": plan.table.unit,
                "contraction": np.where(gone, np.nan, random.random(len(gone))),
                "standard_error": 0.0,
            }
        ),
        loo=pd.DataFrame({"elpd_loo": [-130.25], "standard_error": [4.0]}),
        quality=pd.DataFrame(rows),
        reliability=pd.concat(bins, ignore_index=True),
        risk_coverage=pd.concat(coverages, ignore_index=True),
        entropy=pd.DataFrame({"data": ["test"] * 50 + [foreign] * 50, "entropy": random.random(100)}),
        curves=pd.concat(
            [curve.assign(criterion=f"{name} of {plan.rule.criterion}") for name in ("one", "other")]
        ),
        facts=dict(
            draws=100, seed=0, examples=150, dataset_size=200, kl_weight=plan.rule.kl_weight,
            out_of_distribution=foreign, curves_of=None, predictive_draws=20,
        ),
        notes=list(notes),
        parts=PARTS,
    )  # fmt: skip


def make_fit(plan):
    """Three epochs, with what the plan says that the fit removed."""
    history = pd.DataFrame(
        {
            "phase": "fit",
            "epoch": [1, 2, 3],
            "loss": [2.0, 1.0, 0.5],
            "log_likelihood": [-2.0, -1.0, -0.5],
            "kl": [9.0, 6.0, 5.0],
            "validation_loss": [2.1, 1.1, 0.6],
            "validation_accuracy": [0.5, 0.7, 0.9],
            "kept": len(plan.table),
            "seconds": 0.5,
        }
    )
    removals = plan.table.loc[plan.table.removed_in_fit, ["layer", "unit"]].assign(phase="fit", epoch=2)
    settings = {"epochs": 3, "batch_size": 32, "kl_weight": plan.rule.kl_weight, "seed": 0}
    return SimpleNamespace(history=history, removals=removals, settings=settings)


def make_evaluation(names=("full", "reduced"), split="test"):
    return pd.DataFrame(
        {
            "network": list(names),
            "split": split,
            "accuracy": [0.95, 0.93],
            "negative_log_likelihood": [0.2, 0.25],
            "parameters": [1000, 400],
        }
    )
