"""Three Pyro programs whose log evidence is known by quadrature: eight schools, a logistic regression, a hierarchy.

What `reduce` says of ΔF = log p̃(y) - log p(y) can be compared with the difference of two exact values:

    bmrs.reduce(schools, guide, {"tau": dist.HalfCauchy(0.1)}, EFFECTS).checked
    exact_schools()["site 'tau'"]                               # +0.456 nats

Data of the eight schools: Rubin, "Estimation in parallel randomized experiments" (1981).
"""

import math

import pyro
import pyro.distributions as dist
import torch

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COUNTY = torch.arange(10).repeat_interleave(6)


def schools(y):
    """mu ~ Normal(0, 5²), tau ~ HalfCauchy(5), z ~ Normal(0, 1), y ~ Normal(mu + tau z, ERRORS²). Shape of y: (8,)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, ERRORS), obs=y)


def schools_log_evidence(mu_scale=5.0, tau_scale=5.0):
    """log p(y) in nats with mu ~ Normal(0, mu_scale²) and tau ~ HalfCauchy(tau_scale); at scale 0 tau is 0.

    y is normal given tau = scale · tan(u), which is summed over the middles of 20,000 cells of u.
    """
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi / 2
    tau = tau_scale * u.tan() if tau_scale else torch.zeros(1, dtype=torch.float64)
    variance = ERRORS.double().square() + tau.square().unsqueeze(-1)
    ones = mu_scale * torch.ones(len(tau), 8, 1, dtype=torch.float64)
    law = dist.LowRankMultivariateNormal(torch.zeros(8, dtype=torch.float64), ones, variance)
    return float(law.log_prob(EFFECTS.double()).logsumexp(0)) - math.log(len(tau))


def exact_schools():
    """ΔF in nats of z = 0, mu = 0, both, and tau ~ HalfCauchy(0.1), by what is reduced."""
    full = schools_log_evidence()
    return {
        "site 'z'": schools_log_evidence(tau_scale=0.0) - full,
        "site 'mu'": schools_log_evidence(mu_scale=1e-9) - full,
        "group 'both'": schools_log_evidence(1e-9, 0.0) - full,
        "site 'tau'": schools_log_evidence(tau_scale=0.1) - full,
    }


def logistic(x, y):
    """weights ~ Normal(0, 1.5²), y ~ Bernoulli(logits = x weights). Shapes: (n, k), (n,)."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * weights).sum(-1)), obs=y)


def correlated_data(rho):
    """(x, y) of a logistic regression whose two regressors have correlation rho. Shapes: (100, 2), (100,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 2, generator=generator)
    x[:, 1] = rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]
    return x, torch.bernoulli(torch.sigmoid(0.8 * x[:, 0]), generator=generator)


def exact_logistic(x, y):
    """ΔF in nats of reducing each weight to 0, and all, by what is reduced: sums over a grid of the weights."""

    def log_evidence(x):
        line = torch.linspace(-7.0, 7.0, 281, dtype=torch.float64)
        grid = torch.cartesian_prod(*[line] * x.shape[1]).reshape(-1, x.shape[1])
        log_likelihood = torch.nn.functional.logsigmoid((2 * y - 1).double() * (grid @ x.double().T)).sum(-1)
        density = log_likelihood + dist.Normal(0.0, 1.5).log_prob(grid).sum(-1)
        return float(density.logsumexp(0)) + x.shape[1] * math.log(float(line[1] - line[0]))

    full = log_evidence(x)
    return {
        "weights[0]": log_evidence(x[:, 1:]) - full,
        "weights[1]": log_evidence(x[:, :1]) - full,
        "site 'weights'": len(y) * math.log(0.5) - full,
    }


def intercepts(x, y):
    """An intercept for each of ten counties, as for radon in houses. Shapes: (60,), (60,)."""
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("counties", 10):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(base + slope * x + (spread * z)[..., COUNTY], 0.75), obs=y)


def houses():
    """(x, y) of sixty houses. Shapes: (60,), (60,)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 2, (60,), generator=generator).float()
    of_counties = 0.15 * torch.randn(10, generator=generator)
    return x, 1.3 - 0.3 * x + of_counties[COUNTY] + 0.75 * torch.randn(60, generator=generator)


def exact_intercepts(x, y):
    """ΔF in nats of z = 0, slope = 0 and spread ~ HalfNormal(0.2), by what is reduced.

    y is normal given the spread, which is summed over the middles of 400 cells.
    """

    def log_evidence(*, slope=1.0, spread=1.0):
        ones, members = torch.ones_like(x), torch.nn.functional.one_hot(COUNTY).double()
        fixed = 4 * ones.outer(ones) + slope**2 * x.outer(x) + 0.75**2 * torch.eye(len(x))
        u = (torch.arange(400).double() + 0.5) / 80
        covariance = fixed.double() + (spread * u)[:, None, None].square() * (members @ members.T)
        density = dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(y.double())
        prior = dist.HalfNormal(torch.tensor(1.0).double()).log_prob(u)
        return float((density + prior).logsumexp(0)) - math.log(80)

    full = log_evidence()
    return {
        "site 'z'": log_evidence(spread=0.0) - full,
        "site 'slope'": log_evidence(slope=0.0) - full,
        "site 'spread'": log_evidence(spread=0.2) - full,
    }
