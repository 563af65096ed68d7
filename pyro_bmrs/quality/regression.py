"""How well a regression predicts, from draws of θ or from one point: errors of the mean, and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.inference.batches import AT_ONCE, Batches, Data
from pyro_bmrs.inference.evaluate import standard_error
from pyro_bmrs.inference.likelihoods import Regressor
from pyro_bmrs.inference.predict import output_at
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.quality.predictive import split_draws

# What central intervals are to hold, and halvings until their ends are known.
LEVEL, _HALVINGS = 0.9, 60


def regression_quality(
    model: Regressor, data: Data, theta: Mapping[str, Tensor], *, batch_size: int = AT_ONCE
) -> dict[str, float]:
    """Errors and intervals of the predictive (1/S) Σ_s Normal(f(x; θ_s), scale²), element by element of y.

    >>> import torch
    >>> from torch import nn
    >>> from pyro_bmrs import MultiplicativeNoise, Regressor
    >>> _ = torch.manual_seed(0)
    >>> model = Regressor(nn.Sequential(nn.Linear(2, 3), MultiplicativeNoise(3), nn.Linear(3, 1)), scale=1.0)
    >>> x = torch.randn(500, 2)
    >>> point = {"1": torch.ones(3)}
    >>> found = regression_quality(model, (x, torch.randn(500, 1)), point)
    >>> round(found["width"], 2)
    3.29

    Args:
        model: of (x, y).
        data: (x, y), a data set or a loader.
        theta: θ of every noise layer by site, (features,) for a point or (draws, features); empty without noise layers.
        batch_size: examples per pass through the network; a loader keeps its own.

    Returns:
        examples; rmse of the mean with its standard error rmse_error, and mae, in the model's `unit`;
        r2 = 1 − Σ(y − mean)²/Σ(y − ȳ)², of all outputs together; negative_log_likelihood (nats per example);
        coverage, the share of y in its central interval of 90 %, and width, the mean width of these (in `unit`).

    Raises:
        TypeError, ValueError: for a bad argument, named.
    """
    check(isinstance(model, Regressor), "model", "a Regressor", type(model), TypeError)
    check(is_whole(batch_size, 1), "batch_size", "a positive integer", batch_size)
    device = next(model.parameters()).device
    thetas = split_draws(model, theta, device)
    parts: list[tuple[Tensor, ...]] = []
    with untouched(model):
        for x, y in Batches(data, batch_size, device, "data"):
            given = model.observed(y)[0].cpu().double()
            means = torch.stack([output_at(model, values, x).cpu().double() for values in thetas], -1)
            scale = model.log_scale.exp().cpu().double().expand_as(means)
            law = MixtureSameFamily(Categorical(torch.ones_like(means)), Normal(means, scale))
            low, high = (_quantile(law, means, scale, (1 + sign * LEVEL) / 2) for sign in (-1, 1))
            parts.append((given, law.mean, law.log_prob(given), low, high))  # type: ignore[no-untyped-call]
    y, mean, log_likelihood, low, high = (torch.cat(part) for part in zip(*parts, strict=True))
    error, examples, unit = model.errors(mean, y), len(y), model.unit.cpu()
    squares = error.square().reshape(examples, -1).mean(1)
    rmse = float(squares.mean().sqrt())
    # of a root, by its slope
    spread = standard_error(squares) / (2 * rmse) if rmse else math.nan
    return {
        "examples": examples,
        "rmse": rmse,
        "rmse_error": spread,
        "mae": float(error.abs().mean()),
        "r2": 1 - float(error.square().sum() / ((y - y.mean(0)) * unit).square().sum()),
        "negative_log_likelihood": -float(log_likelihood.sum()) / examples,
        "coverage": float(((low <= y) & (y <= high)).double().mean()),
        "width": float(((high - low) * unit).mean()),
    }


def _quantile(law: MixtureSameFamily, means: Tensor, scale: Tensor, share: float) -> Tensor:
    """Where the cumulative distribution of a mixture of normals is `share`, by halving. Shape: that of its mean."""
    reach = 10 * scale.amax(-1)
    low, high = means.amin(-1) - reach, means.amax(-1) + reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = law.cdf(middle) < share  # type: ignore[no-untyped-call]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
