"""Small programs of every kind that Pyro allows, held to exact answers from fit to leave-one-out.

Each has one number θ behind it, so that evidence, posterior, ΔF and leave-one-out are integrals over a grid. Seeds are
fixed. Bounds are those of the approximation by a normal (of log θ, where θ is positive) and of 1,000 draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_bmrs as bmrs

pytestmark = pytest.mark.usefixtures("empty_store")

N = 12
X = torch.linspace(-1.0, 2.0, N)
Y = 0.8 * X + 0.7 * torch.randn(N, generator=torch.Generator().manual_seed(1))
COUNTS = torch.tensor([3.0, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 4])
OBSERVED = torch.arange(N) % 4 != 1
WEIGHTS = torch.linspace(0.25, 2.0, N)

PRIOR, NARROW = dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.3)


def of_line(theta):
    """log p(y | θ) of each observation, for a column of θ."""
    return dist.Normal(theta * X, 0.7).log_prob(Y)


@dataclass
class Case:
    """A program and what is true of it.

    Attributes:
        model: called as model(x, y).
        data: x and y.
        prior, reduced: of θ.
        terms: log-likelihood of each observation at a column of θ, (grid, 1) → (grid, observations).
        weights: how often each counts.
        site: the latent.
        sites: all observed ones; those with deterministic values.
        guide: makes the guide.
        grid: of θ.
        batch_size: of the fit.
        leave_one_out: whether the observations are those of `terms`, each of weight 1.
    """

    model: Callable[..., Any]
    data: tuple[Any, Any] = (X, Y)
    prior: Any = PRIOR
    reduced: Any = NARROW
    terms: Callable[[Any], Any] = of_line
    weights: Any = 1.0
    belief: Callable[[Any], Any] = torch.zeros_like
    site: str = "w"
    observed: tuple[str, ...] = ("y",)
    deterministic: tuple[str, ...] = ()
    guide: Callable[..., Any] = AutoNormal
    grid: Any = field(default_factory=lambda: torch.linspace(-4.0, 4.0, 8001, dtype=torch.float64))
    batch_size: int = N
    leave_one_out: bool = True

    @property
    def values(self):
        """What is observed, without weights and masks."""
        return self.data[1][0] if isinstance(self.data[1], tuple) else self.data[1]

    def exact(self):
        theta = self.grid.unsqueeze(1)
        step = float(self.grid[1] - self.grid[0])
        terms = self.terms(theta) * self.weights
        log_p = self.prior.log_prob(self.grid) + terms.sum(1) + self.belief(self.grid)
        reduced = log_p - self.prior.log_prob(self.grid) + self.reduced.log_prob(self.grid)

        def integral(values):
            return float(values.logsumexp(0)) + math.log(step)

        evidence = integral(log_p)
        weight = (log_p - evidence).exp() * step
        mean = float((weight * self.grid).sum())
        return {
            "evidence": evidence,
            "mean": mean,
            "deviation": math.sqrt(float((weight * (self.grid - mean) ** 2).sum())),
            "change": integral(reduced) - evidence,
            "loo": sum(evidence - integral(log_p - terms[:, i]) for i in range(terms.shape[1])),
        }


def slope(name="w", law=PRIOR):
    return pyro.sample(name, law)


def observe(mean, y, name="y", **options):
    return pyro.sample(name, dist.Normal(mean, 0.7), obs=y, **options)


def line(x, y):
    w = slope()
    with pyro.plate("data", len(x)):
        observe(w * x, y)


def beside(x, y):
    line(x, y)
    pyro.deterministic("square", x.new_tensor(3.0))


def between(x, y):
    w = slope()
    mean = pyro.deterministic("mean", w * x, event_dim=0)
    with pyro.plate("data", len(x)):
        observe(mean, y)


def masked(x, y):
    (y, there), w = y, slope()
    with pyro.plate("data", len(x)), poutine.mask(mask=there):
        observe(w * x, y)


def masked_law(x, y):
    (y, there), w = y, slope()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.7).mask(there), obs=y)


def believed(x, y):
    w = slope()
    pyro.factor("belief", -0.5 * (w - 1.0) ** 2)
    with pyro.plate("data", len(x)):
        observe(w * x, y)


def by_factors(x, y):
    w = slope()
    with pyro.plate("data", len(x)):
        observe(w * x, y)
        pyro.factor("belief", (-0.5 * (w - 1.0) ** 2 / len(x)).expand(len(x)))


def weighted(x, y):
    (y, weights), w = y, slope()
    with pyro.plate("data", len(x)), poutine.scale(scale=weights):
        observe(w * x, y)


def subsampled(x, y):
    """The batch as a subsample of all."""
    w = slope()
    chosen = None if len(x) == N else torch.arange(len(x))
    with pyro.plate("data", N, subsample=chosen):
        observe(w * x, y)


def in_events(x, y):
    w = slope()
    pyro.sample("y", dist.Normal(w * x, 0.7).to_event(1), obs=y)


def two_sites(x, y):
    w = slope()
    with pyro.plate("first", 6):
        observe(w * x[:6], y[:6], "y")
    with pyro.plate("second", 6):
        observe(w * x[6:], y[6:], "z")


def nested(x, y):
    w = slope()
    with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 3, dim=-2):
        observe(w * x, y)


def decentered(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        observe(w * x, y)


def conditioned(x, y):
    def free(x, y):
        w = slope()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.7))

    return pyro.condition(free, data={"y": y})(x, y)


class Bayesian(PyroModule):
    """A network whose weight is a latent."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(PRIOR)

    def forward(self, x, y):
        w = self.w
        with pyro.plate("data", len(x)):
            observe(w * x, y)


class WithWeights(nn.Module):
    """A module with a parameter of its own, which stays."""

    def __init__(self):
        super().__init__()
        self.still = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x, y):
        w = slope()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, self.still), obs=y)


def rates(x, y):
    rate = pyro.sample("w", dist.Gamma(3.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def coins(x, y):
    bias = pyro.sample("w", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Binomial(10, bias), obs=y)


def spread(x, y):
    scale = pyro.sample("w", dist.LogNormal(-0.3, 0.25))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def log_normal(x, y):
    rate = pyro.sample("w", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def mixed(x, y):
    """Each observation may be an outlier; which of them is summed out."""
    w = slope()
    means = torch.stack([w * x, torch.zeros_like(x)], -1)
    scales = torch.tensor([0.7, 3.0])
    kinds = dist.Categorical(torch.tensor([0.9, 0.1]).expand(len(x), 2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(kinds, dist.Normal(means, scales)), obs=y)


def of_mixture(theta):
    first = math.log(0.9) + of_line(theta)
    second = (math.log(0.1) + dist.Normal(0.0, 3.0).log_prob(Y)).expand_as(first)
    return torch.logaddexp(first, second)


def by_hand(model):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(-1.5))

        def forward(self, x, y):
            pyro.sample("w", dist.Normal(self.loc, self.log_scale.exp()))

    return Guide()


def listed(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    return guide


POSITIVE = torch.linspace(1e-3, 12.0, 12001, dtype=torch.float64)
UNIT = torch.linspace(1e-4, 1 - 1e-4, 9999, dtype=torch.float64)
MISSING = torch.where(OBSERVED, 1.0, 0.0)
THERE = X, (Y, OBSERVED)


def plain(law):
    return lambda theta: law(theta).log_prob(COUNTS)


CASES = {
    "a latent and observations": Case(line),
    "a joint normal guide": Case(line, guide=AutoMultivariateNormal),
    "a guide by hand": Case(line, guide=by_hand),
    "a list of guides": Case(line, guide=listed),
    "a deterministic site beside": Case(beside, deterministic=("square",)),
    "a deterministic site between": Case(between, deterministic=("mean",)),
    "masked observations": Case(masked, THERE, weights=MISSING, leave_one_out=False),
    "a masked distribution": Case(masked_law, THERE, weights=MISSING, leave_one_out=False),
    "a factor": Case(believed, belief=lambda w: -0.5 * (w - 1) ** 2),
    "factors of examples": Case(by_factors, belief=lambda w: -0.5 * (w - 1) ** 2),
    "weights of examples": Case(weighted, (X, (Y, WEIGHTS)), weights=WEIGHTS, leave_one_out=False),
    "batches of a subsampled plate": Case(subsampled, batch_size=4),
    "one event": Case(in_events, leave_one_out=False),
    "two observed sites": Case(two_sites, observed=("y", "z"), leave_one_out=False),
    "nested plates": Case(nested, (X.reshape(3, 4), Y.reshape(3, 4)), batch_size=3),
    "a decentred latent": Case(
        poutine.reparam(decentered, {"w": LocScaleReparam(0.0)}), site="w_decentered", deterministic=("w",)
    ),
    "a conditioned model": Case(conditioned),
    "a latent weight of a module": Case(Bayesian()),
    "a module with parameters": Case(WithWeights()),
    "a mixture that is summed out": Case(mixed, terms=of_mixture),
    "counts and a rate": Case(
        rates, (X, COUNTS), dist.Gamma(3.0, 1.0), dist.Gamma(2.0, 1.0), plain(dist.Poisson), grid=POSITIVE
    ),
    "shares and a bias": Case(
        coins, (X, COUNTS), dist.Beta(2.0, 2.0), dist.Beta(4.0, 4.0), plain(lambda p: dist.Binomial(10, p)), grid=UNIT
    ),
    "a scale": Case(
        spread, prior=dist.LogNormal(-0.3, 0.25), reduced=dist.LogNormal(-0.5, 0.4),
        terms=lambda scale: dist.Normal(0.0, scale).log_prob(Y), grid=POSITIVE,
    ),
    "a transformed latent": Case(
        poutine.reparam(log_normal, {"w": TransformReparam()}), (X, COUNTS), dist.Normal(0.0, 1.0),
        dist.Normal(0.5, 1.0), lambda z: dist.Poisson(z.exp()).log_prob(COUNTS), site="w_base", deterministic=("w",),
    ),
}  # fmt: skip
QUICK = ("batches of a subsampled plate",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_program_from_fit_to_leave_one_out(name):
    case = CASES[name]
    wanted = case.exact()
    torch.manual_seed(0)
    guide = case.guide(case.model)
    fit = bmrs.fit(
        case.model, guide, case.data, epochs=500 * case.batch_size // N, batch_size=case.batch_size,
        posterior_learning_rate=0.03, schedule="cosine", seed=1, progress=False,
    )  # fmt: skip
    assert fit.history.loss.notna().all()

    tree = bmrs.to_datatree(case.model, guide, case.data, draws=1000)
    drawn = tree.posterior[case.site].to_numpy().ravel()
    assert drawn.mean() == pytest.approx(wanted["mean"], abs=0.2 * wanted["deviation"])
    assert drawn.std() == pytest.approx(wanted["deviation"], rel=0.2)
    assert set(tree.posterior.data_vars) == {case.site, *case.deterministic}
    assert set(tree.log_likelihood.data_vars) == set(tree.observed_data.data_vars) == set(case.observed)
    np.testing.assert_allclose(
        np.concatenate([tree.observed_data[site].to_numpy().ravel() for site in case.observed]),
        case.values.ravel(),
    )

    checks = bmrs.check_posterior(case.model, guide, case.data)
    elbo = checks.elbo.iloc[0]
    assert checks.khat.reliable.all()
    assert elbo.elbo < wanted["evidence"] + 4 * elbo.standard_error + 1e-3
    assert elbo.elbo == pytest.approx(wanted["evidence"], abs=0.1)

    plan = bmrs.reduce(case.model, guide, {case.site: case.reduced}, *case.data)
    assert float(plan.sites.log_evidence_change.iloc[0]) == pytest.approx(wanted["change"], abs=0.12)

    if case.leave_one_out:
        found = bmrs.loo(tree)
        assert float(found.elpd) == pytest.approx(wanted["loo"], abs=0.15)


# --- what can't be read is refused by name ---------------------------------------------------------------


def labelled(x, y):
    """A mixture whose labels are latents, to be enumerated."""
    w = slope()
    with pyro.plate("data", len(x)):
        kind = pyro.sample(
            "kind", dist.Categorical(torch.tensor([0.9, 0.1])), infer={"enumerate": "parallel"}
        )
        pyro.sample("y", dist.Normal(torch.where(kind == 0, w * x, 0.0 * x), 0.7), obs=y)


def discrete_guide(x, y):
    pyro.sample("w", dist.Normal(torch.zeros((), requires_grad=True), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.5], requires_grad=True)))


def with_missing(x, y):
    (y, there), w = y, slope()
    with pyro.plate("data", len(x)):
        observe(w * x, y, obs_mask=there)


WITHOUT_KIND = AutoNormal(poutine.block(labelled, hide=["kind"]))
ASKED = {
    "fit": lambda model, guide, data: bmrs.fit(model, guide, data, epochs=1, progress=False),
    "check_posterior": lambda model, guide, data: bmrs.check_posterior(model, guide, data, draws=100),
    "to_datatree": lambda model, guide, data: bmrs.to_datatree(model, guide, data, draws=10),
}


@pytest.mark.parametrize("asked", ASKED)
def test_enumerated_latents_without_a_posterior_are_refused_by_name(asked):
    WITHOUT_KIND(X, Y)
    with pytest.raises(
        ValueError, match=r"posterior of every latent of the model: it has none of \['kind'\]. Sum them out"
    ):
        ASKED[asked](labelled, WITHOUT_KIND, (X, Y))


def test_discrete_latents_of_a_guide_are_refused_by_a_fit():
    with pytest.raises(
        ValueError, match=r"guide must draw 'kind' from a distribution with rsample, .*: Categorical has none"
    ):
        ASKED["fit"](labelled, discrete_guide, (X, Y))


@pytest.mark.parametrize("asked", ["check_posterior"])
def test_a_point_has_no_density_to_compare(asked):
    guide = AutoDelta(line)
    guide(X, Y)
    with pytest.raises(ValueError, match="guide must have a density that is known"):
        ASKED[asked](line, guide, (X, Y))


def test_latents_of_examples_belong_to_examples():
    """A guide has one posterior for each place; batches put other examples there each time."""
    guide = AutoNormal(with_missing)
    with pytest.raises(
        ValueError, match=r"batch_size must be 12 or more, .* single examples, \['y_unobserved'\]"
    ):
        bmrs.fit(with_missing, guide, THERE, epochs=1, batch_size=4, progress=False)


# --- missing observations ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_missing_observations_have_the_evidence_of_the_others():
    """`obs_mask` makes latents of all observations; those that are there have no density in the model."""
    case = Case(with_missing, THERE, weights=MISSING)
    wanted = case.exact()
    guide = AutoNormal(with_missing)
    bmrs.fit(
        with_missing,
        guide,
        THERE,
        epochs=500,
        posterior_learning_rate=0.03,
        schedule="cosine",
        progress=False,
    )
    elbo = bmrs.check_posterior(with_missing, guide, THERE).elbo.iloc[0]
    assert elbo.elbo < wanted["evidence"] + 4 * elbo.standard_error
    assert elbo.elbo == pytest.approx(wanted["evidence"], abs=0.5)  # mean-field of w and what is missing


@pytest.mark.parametrize("asked", ASKED)
def test_a_guide_that_mixes_what_is_missing_with_what_is_not_warns(asked):
    guide = AutoMultivariateNormal(with_missing)
    guide(*THERE)
    with pytest.warns(
        UserWarning, match="model leaves 9 of 12 elements of latent 'y_unobserved' without a density"
    ):
        ASKED[asked](with_missing, guide, THERE)
