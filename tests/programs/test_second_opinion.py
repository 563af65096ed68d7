"""Is ΔF right? Where the guide can't tell, `reduce` says so; where it can, it is silent. Exact values by quadrature."""

from __future__ import annotations

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_files import model_file
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_bmrs import ImportanceError, greedy_reduction, reduce
from pyro_bmrs.evidence.importance import UnreliableEstimateWarning
from pyro_bmrs.programs.latents import Latents
from pyro_bmrs.programs.second_opinion import Choice, second_opinion

regression = model_file("linear_regression")

pytestmark = pytest.mark.usefixtures("empty_store")


def fit(model, guide, *args, steps=400):
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
    return guide


def asked(model, guide, reduced, *args, **more):
    """(the plan, the messages of its warnings). An estimate that is refused is a message, without a plan."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            plan = reduce(model, guide, reduced, *args, **more)
        except ImportanceError as error:
            return None, [str(error)]
    return plan, [str(one.message) for one in seen if issubclass(one.category, UnreliableEstimateWarning)]


def assert_honest(plan, messages, exact):
    """The model's number is right within 4.5 standard errors; the guide's has the right sign, or there is a warning."""
    if plan is None:
        assert messages
        return
    rows = plan.checked.set_index("name")
    for name, truth in exact.items():
        row = rows.loc[name]
        assert abs(row.checked - truth) < 4.5 * row.standard_error + 0.01, name
        if (row.log_evidence_change >= 0) != (truth >= 0):
            assert messages, name


# --- eight schools ------------------------------------------------------------------------------------

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, ERRORS), obs=y)


def by_hand(y):
    """Independent laws, a Gamma for tau: set near the mean-field optimum."""
    pyro.sample("mu", dist.Normal(4.4, 3.3))
    pyro.sample("tau", dist.Gamma(3.0, 0.8))
    loc = torch.tensor([0.3, 0.1, -0.1, 0.0, -0.2, -0.1, 0.3, 0.1])
    with pyro.plate("schools", 8):
        pyro.sample("z", dist.Normal(loc, 0.95))


def log_evidence(mu_scale=5.0, tau_scale=5.0):
    """log p(y) of eight schools; tau is 0 if its scale is. tau = scale · tan(u), the rest in closed form."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi / 2
    tau = tau_scale * u.tan() if tau_scale else torch.zeros(1, dtype=torch.float64)
    variance = ERRORS.double().square() + tau.square().unsqueeze(-1)
    ones = mu_scale * torch.ones(len(tau), 8, 1, dtype=torch.float64)
    law = dist.LowRankMultivariateNormal(torch.zeros(8, dtype=torch.float64), ones, variance)
    return float(law.log_prob(EFFECTS.double()).logsumexp(0)) - math.log(len(tau))


FULL = log_evidence()
EXACT = {
    "site 'z'": log_evidence(tau_scale=0.0) - FULL,
    "site 'mu'": log_evidence(mu_scale=1e-9) - FULL,
    "group 'both'": log_evidence(1e-9, 0.0) - FULL,
    "site 'tau'": log_evidence(tau_scale=0.1) - FULL,
}


def test_the_exact_values_of_eight_schools():
    wanted = {"site 'z'": 0.467, "site 'mu'": -0.487, "group 'both'": -0.144, "site 'tau'": 0.456}
    assert all(abs(EXACT[name] - value) < 1e-3 for name, value in wanted.items())


KINDS = {
    "AutoNormal": lambda: fit(schools, AutoNormal(schools), EFFECTS),
    "AutoMultivariateNormal": lambda: fit(schools, AutoMultivariateNormal(schools), EFFECTS),
    "AutoLowRank": lambda: fit(schools, AutoLowRankMultivariateNormal(schools, rank=2), EFFECTS),
    "AutoDiagonalNormal": lambda: fit(schools, AutoDiagonalNormal(schools), EFFECTS),
    "by hand": lambda: by_hand,
}
SLOW = ("AutoMultivariateNormal", "AutoLowRank", "AutoDiagonalNormal")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_eight_schools(kind):
    """A reduced prior that puts tau near 0, where a log-normal has no mass: ΔF had the wrong sign and a good k̂."""
    guide = KINDS[kind]()
    plan, messages = asked(schools, guide, {"tau": dist.HalfCauchy(0.1)}, EFFECTS)
    assert_honest(plan, messages, {"site 'tau'": EXACT["site 'tau'"]})
    if plan is not None and plan.sites.log_evidence_change[0] < 0:
        assert any("site 'tau'" in text and "by the model itself" in text for text in messages)
    groups = {"both": {"mu": ..., "z": ...}}
    plan, messages = asked(schools, guide, {"mu": 0.0, "z": 0.0}, EFFECTS, groups=groups)
    assert_honest(plan, messages, {name: EXACT[name] for name in ("site 'z'", "site 'mu'", "group 'both'")})


@pytest.mark.slow
def test_the_error_of_the_second_opinion():
    """40 seeds of four reductions: 95 % intervals cover at least 85 % (a false alarm in 10,000)."""
    guide = KINDS["AutoNormal"]()
    covered = []
    for seed in range(40):
        for reduced in ({"z": 0.0}, {"mu": 0.0}, {"tau": dist.HalfCauchy(0.1)}):
            latents = Latents(schools, guide, reduced, (EFFECTS,), seed=seed)
            ((name, site),) = latents.sites.items()
            exact = EXACT[f"site {name!r}"]
            found = second_opinion(latents, [Choice(name, {name: site.kept}, exact, 0.0)])
            covered.append(abs(found.checked[0] - exact) < 1.96 * found.standard_error[0])
    assert sum(covered) / len(covered) > 0.85


# --- correlated regressors, in a logistic regression -----------------------------------------------------


def logistic(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * weights).sum(-1)), obs=y)


def correlated_data(rho):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 2, generator=generator)
    x[:, 1] = rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]
    return x, torch.bernoulli(torch.sigmoid(0.8 * x[:, 0]), generator=generator)


def exact_logistic(x, y):
    """log p(y) on a grid of the weights."""
    line = torch.linspace(-7.0, 7.0, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * x.shape[1]).reshape(-1, x.shape[1])
    log_likelihood = torch.nn.functional.logsigmoid((2 * y - 1).double() * (grid @ x.double().T)).sum(-1)
    density = log_likelihood + dist.Normal(0.0, 1.5).log_prob(grid).sum(-1)
    return float(density.logsumexp(0)) + x.shape[1] * math.log(float(line[1] - line[0]))


@pytest.mark.parametrize("rho", [0.95, pytest.param(0.99, marks=pytest.mark.slow)])
def test_correlated_regressors(rho):
    x, y = correlated_data(rho)
    full = exact_logistic(x, y)
    exact = {
        "weights[0]": exact_logistic(x[:, 1:], y) - full,
        "weights[1]": exact_logistic(x[:, :1], y) - full,
        "site 'weights'": len(y) * math.log(0.5) - full,
    }
    plan, messages = asked(logistic, fit(logistic, AutoNormal(logistic), x, y), {"weights": 0.0}, x, y)
    assert_honest(plan, messages, exact)
    pair = re.compile(r"weights\[[01]\] and weights\[[01]\] for independent.*fit an AutoMultivariateNormal")
    assert any(pair.search(text) for text in messages)


# --- a varying intercept, as for radon in houses of counties -------------------------------------------------

COUNTY = torch.arange(10).repeat_interleave(6)


def radon(x, y):
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("counties", 10):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(base + slope * x + (spread * z)[..., COUNTY], 0.75), obs=y)


def exact_radon(x, y, *, slope=1.0, spread=1.0):
    """log p(y): normal given the spread, which is summed over the middles of 400 cells."""
    ones, members = torch.ones_like(x), torch.nn.functional.one_hot(COUNTY).double()
    fixed = 4 * ones.outer(ones) + slope**2 * x.outer(x) + 0.75**2 * torch.eye(len(x))
    u = (torch.arange(400).double() + 0.5) / 80
    covariance = fixed.double() + (spread * u)[:, None, None].square() * (members @ members.T)
    density = dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(y.double())
    return float((density + dist.HalfNormal(torch.tensor(1.0).double()).log_prob(u)).logsumexp(0)) - math.log(
        80
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_a_varying_intercept(kind):
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 2, (60,), generator=generator).float()
    of_counties = 0.15 * torch.randn(10, generator=generator)
    y = 1.3 - 0.3 * x + of_counties[COUNTY] + 0.75 * torch.randn(60, generator=generator)
    full = exact_radon(x, y)
    exact = {
        "site 'z'": exact_radon(x, y, spread=0.0) - full,
        "site 'slope'": exact_radon(x, y, slope=0.0) - full,
        "site 'spread'": exact_radon(x, y, spread=0.2) - full,
    }
    guide = fit(radon, kind(radon), x, y)
    reduced = {"z": 0.0, "slope": 0.0, "spread": dist.HalfNormal(0.2)}
    plan, messages = asked(radon, guide, reduced, x, y)
    assert_honest(plan, messages, exact)


# --- one scale, one number, one kind: other laws, and reduced priors far away or far wider ---------------------

COUNTS = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0])


def rate(y):
    value = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Poisson(value), obs=y)


def narrow(y):
    pyro.sample("rate", dist.LogNormal(-0.05, 0.2))


def conjugate(shape, scale):
    total = float(COUNTS.sum())
    return (
        shape * math.log(scale) - math.lgamma(shape) + math.lgamma(shape + total)
        - (shape + total) * math.log(scale + 5)
    )  # fmt: skip


@pytest.mark.parametrize("prior", [(1.0, 20.0), (1.0, 0.02), (40.0, 8.0)], ids=["near 0", "wide", "far away"])
def test_a_guide_too_narrow_for_the_reduced_prior(prior):
    """A log-normal of half the posterior's width, under Gamma reduced priors."""
    plan, messages = asked(rate, narrow, {"rate": dist.Gamma(*prior)}, COUNTS)
    exact = conjugate(*prior) - conjugate(2.0, 1.0)
    assert_honest(plan, messages, {"site 'rate'": exact})
    found = plan.sites.log_evidence_change[0]
    if abs(found - exact) > 1 + 0.3 * abs(exact):
        assert messages


def test_a_discrete_latent_is_summed_out():
    def model(y):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[kind], 1.0), obs=y)

    def guide(y):
        pyro.sample("kind", dist.Categorical(torch.tensor([0.98, 0.01, 0.01])))

    y = torch.tensor(1.8)
    likelihood = dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 1.0).log_prob(y).exp()
    reduced = torch.tensor([0.1, 0.1, 0.8])
    exact = math.log(float(likelihood @ reduced)) - math.log(float(likelihood.mean()))
    plan, messages = asked(model, guide, {"kind": dist.Categorical(reduced)}, y)
    assert plan.checked.checked[0] == pytest.approx(exact, abs=1e-5)
    assert any("site 'kind'" in text for text in messages)


def test_a_model_that_can_not_be_asked():
    """It looks at a value, which vmap does not allow: the guide's reach alone is judged."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, scale if float(scale) > 0.01 else scale + 0.01), obs=y)

    def guide(y):
        pyro.sample("scale", dist.LogNormal(0.0, 0.5))

    y = torch.tensor(0.5)
    plan, messages = asked(model, guide, {"scale": dist.LogNormal(0.0, 0.7)}, y)
    assert plan.checked is None
    assert not messages
    plan, messages = asked(model, guide, {"scale": dist.HalfCauchy(0.05)}, y)
    assert any("lies beyond" in text for text in messages)


def test_searches_ask_too():
    x, y = regression.diabetes()
    guide = regression.posterior(x, y, mean_field=True)
    with pytest.warns(
        UnreliableEstimateWarning, match="for independent, and the model gives them a correlation"
    ):
        greedy_reduction(regression.model, guide, {"weights": 0.0}, x, y)


# --- no false alarms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_exact_posteriors_raise_no_alarm(count):
    """Regressions of simulated data, ΔF of each weight and of all: none in 200 data sets of 4 reductions."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(50, 3, dtype=torch.float64, generator=generator)
        x[:, 1] += x[:, 0]
        y = 0.3 * torch.randn(3, dtype=torch.float64, generator=generator) @ x.T
        y = y + regression.NOISE * torch.randn(50, dtype=torch.float64, generator=generator)
        plan, messages = asked(regression.model, regression.posterior(x, y), {"weights": 0.0}, x, y)
        assert not messages
        assert plan.checked.checked.notna().all()


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_conjugate_rates_raise_no_alarm(count):
    def guide(y):
        pyro.sample("rate", dist.Gamma(2.0 + y.sum(), 6.0))

    torch.manual_seed(0)
    for _ in range(count):
        y = dist.Poisson(1.5).sample((5,))
        for reduced in (dist.Gamma(3.0, 2.0), dist.Gamma(1.0, 1.0), 1.0):
            assert not asked(rate, guide, {"rate": reduced}, y)[1]
