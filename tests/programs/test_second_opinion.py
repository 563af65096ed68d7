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

known, regression = model_file("known_evidence"), model_file("linear_regression")
schools, EFFECTS = known.schools, known.EFFECTS

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


def by_hand(y):
    """Independent laws, a Gamma for tau: set near the mean-field optimum."""
    pyro.sample("mu", dist.Normal(4.4, 3.3))
    pyro.sample("tau", dist.Gamma(3.0, 0.8))
    loc = torch.tensor([0.3, 0.1, -0.1, 0.0, -0.2, -0.1, 0.3, 0.1])
    with pyro.plate("schools", 8):
        pyro.sample("z", dist.Normal(loc, 0.95))


EXACT = known.exact_schools()


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
SLOW = ("AutoNormal", "AutoMultivariateNormal", "AutoLowRank", "AutoDiagonalNormal")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.95, pytest.param(0.99, marks=pytest.mark.slow)])
def test_correlated_regressors(rho):
    x, y = known.correlated_data(rho)
    guide = fit(known.logistic, AutoNormal(known.logistic), x, y)
    plan, messages = asked(known.logistic, guide, {"weights": 0.0}, x, y)
    assert_honest(plan, messages, known.exact_logistic(x, y))
    pair = re.compile(r"weights\[[01]\] and weights\[[01]\] for independent.*fit an AutoMultivariateNormal")
    assert any(pair.search(text) for text in messages)


# --- a varying intercept, as for radon in houses of counties -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_a_varying_intercept(kind):
    x, y = known.houses()
    guide = fit(known.intercepts, kind(known.intercepts), x, y)
    reduced = {"z": 0.0, "slope": 0.0, "spread": dist.HalfNormal(0.2)}
    plan, messages = asked(known.intercepts, guide, reduced, x, y)
    assert_honest(plan, messages, known.exact_intercepts(x, y))


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
    if plan is not None and abs(plan.sites.log_evidence_change[0] - exact) > 1 + 0.3 * abs(exact):
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


def test_a_discrete_latent_of_floating_point_numbers_is_summed_out():
    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        kind = pyro.sample("kind", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(2 * kind, 1.0), obs=y)

    def guide(y):
        pyro.sample("share", dist.Beta(2.4, 2.1))
        pyro.sample("kind", dist.Bernoulli(0.7))

    y, reduced = torch.tensor(1.4), dist.Beta(8.0, 2.0)
    likelihood = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(y).exp()
    exact = math.log(float(likelihood @ torch.tensor([0.2, 0.8]))) - math.log(float(likelihood.mean()))
    plan, _ = asked(model, guide, {"share": reduced}, y)
    assert plan.checked is not None
    assert plan.checked.checked[0] == pytest.approx(exact, abs=4 * plan.checked.standard_error[0] + 1e-3)


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


@pytest.mark.slow
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
