"""A mixture of two normals for twelve points. Its evidence is a sum over all assignments.

    guide = fit(POINTS)
    bmrs.reduce(model, guide, {"share": dist.Beta(20.0, 20.0)}, POINTS)   # are the components equally large?

The guide is written by hand: a Beta for the share and normals for the means, so that ΔF has a closed
form. The assignments are summed out.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch.distributions import constraints

POINTS = torch.tensor([-3.1, -2.6, -2.2, -1.9, -1.4, 1.2, 1.7, 1.8, 2.3, 2.5, 2.9, 3.4], dtype=torch.float64)
SHARE = (2.0, 2.0)  # concentrations of the Beta prior of component 1's share
MEANS, SPREAD = (-2.0, 2.0), 1.5  # locs and scale of the normal priors of the two means
NOISE = 0.8  # standard deviation of each component


@config_enumerate
def model(points):
    """share ~ Beta, means ~ Normal; each point is from component 1 with probability share, else from component 0."""
    ones = torch.ones((), dtype=points.dtype, device=points.device)
    share = pyro.sample("share", dist.Beta(SHARE[0] * ones, SHARE[1]))
    centres = torch.tensor(MEANS, dtype=points.dtype, device=points.device)
    means = pyro.sample("means", dist.Normal(centres, SPREAD).to_event(1))
    with pyro.plate("points", len(points)):
        component = pyro.sample("component", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(means[component.long()], NOISE), obs=points)


def guide(points):
    """A Beta and two normals, independent of each other."""
    ones = torch.ones(2, dtype=points.dtype, device=points.device)
    counts = pyro.param("counts", 4 * ones, constraint=constraints.positive)
    loc = pyro.param("loc", lambda: torch.tensor(MEANS, dtype=points.dtype, device=points.device))
    scale = pyro.param("scale", 0.5 * ones, constraint=constraints.positive)
    pyro.sample("share", dist.Beta(counts[0], counts[1]))
    pyro.sample("means", dist.Normal(loc, scale).to_event(1))


def fit(points, *, steps=1500, seed=0):
    """The guide after SVI with the assignments summed out."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(steps):
        svi.step(points)
    return guide


def log_evidence(points, *, share=SHARE, means=MEANS, spread=SPREAD):
    """The exact log p(y) in nats: a sum over all 2ⁿ assignments, each with the parameters integrated out."""
    n = len(points)
    assignments = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=points.dtype)
    second = assignments.sum(-1)

    def log_beta(first, other):
        return torch.lgamma(first) + torch.lgamma(other) - torch.lgamma(first + other)

    a, b = (torch.tensor(value, dtype=points.dtype) for value in share)
    total = log_beta(a + second, b + n - second) - log_beta(a, b)
    for chosen, centre in ((1 - assignments, means[0]), (assignments, means[1])):
        away = points - centre
        count, mean, square = chosen.sum(-1), chosen @ away, chosen @ away**2
        variance = NOISE**2 + count * spread**2
        total = total - 0.5 * (square - spread**2 * mean**2 / variance) / NOISE**2
        total = (
            total - 0.5 * torch.log(variance / NOISE**2) - count * math.log(NOISE * math.sqrt(2 * math.pi))
        )
    return float(total.logsumexp(0))
