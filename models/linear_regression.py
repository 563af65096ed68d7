"""Linear regression with known scales on scikit-learn's diabetes data, where the exact evidence is known.

The data are 10 measurements of 442 patients and the progression of the disease a year later, all standardised. Which
measurements are needed? `reduce` and `exhaustive_reduction` answer from one posterior:

    x, y = diabetes()
    guide = posterior(x, y)                                     # or fit one: AutoMultivariateNormal and SVI
    plan = bmrs.reduce(model, guide, {"weights": 0.0}, x, y)    # is the model better with this weight at 0?
    bmrs.exhaustive_reduction(model, guide, {"weights": 0.0}, x, y).table(10)   # all 1,024 models
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal

PRIOR_SCALE = 0.5  # of each weight; all variables are standardised
NOISE = 0.7  # standard deviation of y around x weights
NAMES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def diabetes():
    """(x, y) standardised, float64. Shapes: (442, 10), (442,)."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(part).double() for part in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def model(x, y=None):
    """weights ~ Normal(0, PRIOR_SCALE²), y ~ Normal(x weights, NOISE²)."""
    zeros = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    weights = pyro.sample("weights", dist.Normal(zeros, PRIOR_SCALE).to_event(1))
    with pyro.plate("patients", len(x)):
        # not x @ weights: this takes any number of draws of the weights at once
        pyro.sample("y", dist.Normal((x * weights).sum(-1), NOISE), obs=y)


def exact_posterior(x, y):
    """(mean, covariance) of the weights, given the data."""
    precision = x.T @ x / NOISE**2 + torch.eye(x.shape[1], dtype=x.dtype) / PRIOR_SCALE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ (x.T @ y) / NOISE**2, covariance


def posterior(x, y, *, mean_field=False):
    """A guide at its optimum, set without a fit: the exact posterior, or its mean-field approximation.

    The mean-field normal nearest to a normal has the same mean and the same diagonal of the precision.
    """
    guide = (AutoDiagonalNormal if mean_field else AutoMultivariateNormal)(model)
    guide(x, y)  # creates the parameters
    mean, covariance = exact_posterior(x, y)
    guide.loc.data = mean
    if mean_field:
        guide.scale = torch.linalg.inv(covariance).diagonal().rsqrt()
    else:
        factor = torch.linalg.cholesky(covariance)
        guide.scale = factor.diagonal().clone()
        guide.scale_tril = factor / factor.diagonal().unsqueeze(-1)
    return guide


def log_evidence(x, y):
    """The exact log p(y) in nats: y is normal with covariance NOISE² I + PRIOR_SCALE² x xᵀ."""
    n, columns = x.shape
    inner = torch.eye(columns, dtype=x.dtype) + (PRIOR_SCALE / NOISE) ** 2 * x.T @ x
    factor = torch.linalg.cholesky(inner)
    z = torch.linalg.solve_triangular(factor, (x.T @ y).unsqueeze(-1), upper=False)
    explained = (PRIOR_SCALE / NOISE**2) ** 2 * float(z.square().sum())
    quadratic = float(y @ y) / NOISE**2 - explained
    log_determinant = 2 * float(factor.diagonal().log().sum()) + 2 * n * math.log(NOISE)
    return -0.5 * (quadratic + log_determinant + n * math.log(2 * math.pi))
