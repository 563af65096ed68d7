"""Sparse linear regression (automatic relevance determination) on scikit-learn's diabetes data.

Each weight has its own precision, which is a latent too. So the prior of a weight depends on another
latent, and ΔF of setting the weight to 0 averages over the posterior of its precision:

    x, y = diabetes()
    guide = fit(x, y)
    bmrs.reduce(model, guide, {"weights": 0.0}, x, y, dependent_priors="average")

`log_evidence` is the reference, from long importance sampling over the precisions. Given these, the weights
are integrated out exactly.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

NOISE = 0.7  # standard deviation of y around x weights; all variables are standardised
SHAPE, RATE = 2.0, 0.2  # of the Gamma prior of each precision: weights of about 0.3


def diabetes():
    """(x, y) standardised, float64: age, sex, bmi, bp, s3, s5, s6. Shapes: (442, 7), (442,)."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(part).double() for part in load_diabetes(return_X_y=True))
    x = x[:, [0, 1, 2, 3, 6, 8, 9]]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def model(x, y=None):
    """precision ~ Gamma(SHAPE, RATE), weights ~ Normal(0, 1/precision), y ~ Normal(x weights, NOISE²)."""
    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    precision = pyro.sample("precision", dist.Gamma(SHAPE * ones, RATE).to_event(1))
    weights = pyro.sample("weights", dist.Normal(0 * ones, precision.rsqrt()).to_event(1))
    with pyro.plate("patients", len(x)):
        # not x @ weights: this takes any number of draws of the weights at once
        pyro.sample("y", dist.Normal((x * weights).sum(-1), NOISE), obs=y)


def fit(x, y, *, guide=None, steps=1500, seed=0):
    """A guide (by default of full rank) after SVI with 16 draws per step."""
    pyro.set_rng_seed(seed)
    guide = guide or AutoMultivariateNormal(model)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(x, y)
    return guide


def log_evidence(x, y, *, draws=200_000, seed=0):
    """(log p(y), its standard error) in nats, by importance sampling of the precisions.

    The proposal of each log precision is a normal. Three rounds adapt its mean and scale.
    """
    generator = torch.Generator().manual_seed(seed)
    n, columns = x.shape
    squares, products = x.T @ x, x.T @ y
    prior = dist.Gamma(torch.tensor(SHAPE, dtype=x.dtype), RATE)
    loc = torch.full((columns,), math.log(SHAPE / RATE), dtype=x.dtype)
    scale = torch.ones(columns, dtype=x.dtype)
    for count in (draws // 10, draws // 10, draws // 10, draws):
        proposal = dist.Normal(loc, scale)
        log_precision = loc + scale * torch.randn(count, columns, dtype=x.dtype, generator=generator)
        precision = log_precision.exp()
        factor = torch.linalg.cholesky(torch.diag_embed(precision) + squares / NOISE**2)
        z = torch.linalg.solve_triangular(factor, (products / NOISE**2).unsqueeze(-1), upper=False)
        log_likelihood = (
            0.5 * z.square().sum((-1, -2))
            - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            + 0.5 * log_precision.sum(-1)
            - 0.5 * float(y @ y) / NOISE**2
            - n * math.log(NOISE * math.sqrt(2 * math.pi))
        )
        jacobian = log_precision.sum(-1)
        log_weights = (
            log_likelihood
            + prior.log_prob(precision).sum(-1)
            + jacobian
            - proposal.log_prob(log_precision).sum(-1)
        )
        weights = log_weights.softmax(0)
        loc = weights @ log_precision
        scale = (
            weights @ (log_precision - loc) ** 2
        ).sqrt() * 1.2  # wider than the posterior, to cover its tails
    error = (float(weights.square().sum()) - 1 / count) ** 0.5
    return float(log_weights.logsumexp(0)) - math.log(count), error
