"""The figures of docs/evidence.md: a prior, a posterior and two reductions; the models of the diabetes data."""

from __future__ import annotations

import sys
from pathlib import Path

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

import pyro_bmrs as bmrs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "models"))
import linear_regression as regression  # noqa: E402


def draw() -> dict[str, Figure]:
    """By name."""
    reductions = bmrs.plot_reductions(
        posterior=dist.Normal(0.25, 0.25),
        prior=dist.Normal(0.0, 1.0),
        reduced_priors={"shrunk to zero": dist.Normal(0.0, 0.2), "shrunk to one": dist.Normal(1.0, 0.2)},
        values=torch.linspace(-1.5, 2.0, 400),
    )
    x, y = regression.diabetes()
    groups = {name: {"weights": k} for k, name in enumerate(regression.NAMES)}
    found = bmrs.exhaustive_reduction(
        regression.model, regression.posterior(x, y), {"weights": 0.0}, x, y, groups=groups
    )
    scales = torch.logspace(-2.5, 0.0, 120)
    curve = bmrs.evidence_curve(
        regression.model,
        regression.posterior(x, y),
        {"weights": lambda scale: dist.Normal(0.0 * scale, scale)},
        x,
        y,
        scale=scales[scales < regression.PRIOR_SCALE],
    )
    return {
        "evidence_reductions": reductions,
        "evidence_models": bmrs.plot_models(found),
        "evidence_curve": bmrs.plot_evidence_curve(curve),
    }
