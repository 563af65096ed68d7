"""Pyro programs that people have, of the kinds in Pyro's own tutorials. `tests/test_inputs.py` tries each.

Where a number is known exactly, by a formula or by a sum over a grid, it is asserted. Bounds are those of a posterior
after some hundred steps; seeds are fixed.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from input_cases import InputCase
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_bmrs as bmrs

_generator = torch.Generator().manual_seed(3)


def normal(*shape):
    return torch.randn(*shape, generator=_generator)


N = 40
X, XX, NOTHING = normal(N), normal(N, 3), torch.zeros(N)
MENDED = "mended: "
FIRST = "refused before the first step"


# --- what is asked of a program -------------------------------------------------------------------------------


def fitted(model, guide, data, steps=50, batch_size=N, rate=0.1):
    """The guide after some steps."""
    made = guide(model) if isinstance(guide, type) else guide
    bmrs.fit(
        model, made, data, epochs=steps * batch_size // N, batch_size=batch_size, posterior_learning_rate=rate,
        learning_rate=0.03, schedule="cosine", progress=False,
    )  # fmt: skip
    return made


def bound(model, guide, data, evidence, within):
    """Asserts that the ELBO is below the evidence, and by how much at most."""
    elbo = bmrs.check_posterior(model, guide, data, draws=100).elbo.iloc[0]
    assert evidence - within < elbo.elbo < evidence + 4 * elbo.standard_error + 1e-3, (elbo.elbo, evidence)


def mean_of(model, guide, data, site, draws=100):
    return torch.as_tensor(
        bmrs.to_datatree(model, guide, data, draws=draws).posterior[site].to_numpy()[0]
    ).mean(0)


def change(model, guide, reduced, data, **options):
    plan = bmrs.reduce(model, guide, reduced, *data, draws=300, **options)
    return float(plan.sites.log_evidence_change.iloc[0])


def near(found, wanted, within):
    assert (torch.as_tensor(found) - torch.as_tensor(wanted)).abs().max() < within, (found, wanted)


def over_grid(grid, log_joint):
    """log ∫ exp(log_joint) over an even grid."""
    return float(torch.logsumexp(log_joint, 0)) + math.log(float(grid[1] - grid[0]))


CASES: list[InputCase] = []


def case(given, works="", refused="", note="as it was", kind="Pyro programs"):
    def add(run):
        CASES.append(InputCase(kind, given, run, works, refused, note))
        return run

    return add


# --- regressions ----------------------------------------------------------------------------------------------

SIDE = (torch.arange(N) % 2).float()
INCOME = 1 - 0.3 * X + 0.5 * X * SIDE + 0.3 * normal(N)
TERRAIN = (X, SIDE), INCOME


def terrain(x, y):
    rugged, side = x
    names = "level", "slope", "side", "both"
    level, slope, shift, both = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in names)
    with pyro.plate("data", len(y)):
        pyro.sample(
            "y", dist.Normal(level + slope * rugged + shift * side + both * rugged * side, 0.3), obs=y
        )


def exact_terrain(columns):
    design = torch.stack([torch.ones(N), X, SIDE, X * SIDE], 1)[:, columns]
    return float(dist.MultivariateNormal(NOTHING, design @ design.T + 0.09 * torch.eye(N)).log_prob(INCOME))


EVIDENCE = exact_terrain([0, 1, 2, 3])
WITHOUT = exact_terrain([0, 1, 2]) - EVIDENCE


@case(
    "regression with an interaction, `AutoMultivariateNormal`",
    "the ELBO is below the exact evidence, by 0.5 nats at most; ΔF of the interaction is the exact one, to 2 nats",
)
def _():
    guide = fitted(terrain, AutoMultivariateNormal, TERRAIN, steps=80)
    bound(terrain, guide, TERRAIN, EVIDENCE, 0.5)
    near(change(terrain, guide, {"both": 0.0}, TERRAIN), WITHOUT, 2.0)


@case(
    "the same, `AutoLowRankMultivariateNormal`",
    "the ELBO is below the evidence, by 3 nats at most; ΔF has the sign of the exact one",
)
def _():
    guide = fitted(terrain, AutoLowRankMultivariateNormal, TERRAIN, steps=80)
    bound(terrain, guide, TERRAIN, EVIDENCE, 3.0)
    assert change(terrain, guide, {"both": 0.0}, TERRAIN) * WITHOUT > 0


@case("the same, `AutoDiagonalNormal`", "the ELBO is below the evidence, by 3 nats at most")
def _():
    bound(terrain, fitted(terrain, AutoDiagonalNormal, TERRAIN, steps=80), TERRAIN, EVIDENCE, 3.0)


@case(
    "the same, `AutoLaplaceApproximation`: fitted, then `guide.laplace_approximation()`",
    "exact for a normal posterior: ΔF to 0.1 nats",
)
def _():
    guide = fitted(terrain, AutoLaplaceApproximation, TERRAIN, steps=80).laplace_approximation(*TERRAIN)
    near(change(terrain, guide, {"both": 0.0}, TERRAIN), WITHOUT, 0.1)


@case("the same, `AutoIAFNormal`", "it is fitted; the ELBO is below the evidence")
def _():
    guide = AutoIAFNormal(terrain, hidden_dim=[8])
    bound(terrain, fitted(terrain, guide, TERRAIN, steps=60), TERRAIN, EVIDENCE, 400.0)


@case(
    "evidence from an `AutoIAFNormal`",
    refused="^guide must have a normal posterior of .'both'.: that of AutoIAFNormal is a",
)
def _():
    guide = AutoIAFNormal(terrain, hidden_dim=[8])
    guide(*TERRAIN)
    change(terrain, guide, {"both": 0.0}, TERRAIN)


@case(
    "evidence from an `AutoDelta`",
    refused="^guide must have a distribution at 'both': that of AutoDelta is a Delta",
)
def _():
    change(terrain, fitted(terrain, AutoDelta, TERRAIN, steps=2), {"both": 0.0}, TERRAIN)


@case("`check_posterior` of an `AutoDelta`", refused="^guide must have a density that is known")
def _():
    bmrs.check_posterior(terrain, fitted(terrain, AutoDelta, TERRAIN, steps=2), TERRAIN)


@case(
    "`AutoGuideList` of an `AutoDelta` and an `AutoMultivariateNormal`",
    "the point is taken as known; `loo` works",
)
def _():
    guide = AutoGuideList(terrain)
    guide.append(AutoDelta(poutine.block(terrain, expose=["side"])))
    guide.append(AutoMultivariateNormal(poutine.block(terrain, hide=["side"])))
    fitted(terrain, guide, TERRAIN, steps=80)
    assert math.isfinite(bmrs.loo(bmrs.to_datatree(terrain, guide, TERRAIN, draws=300)).elpd)


PASSED = (torch.arange(N) % 3 > 0).float()


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y)
    return torch.sigmoid(w * x)


@case(
    "logistic regression in batches",
    "evidence and ΔF as by quadrature, to 0.1 nats; `predict` gives probabilities",
)
def _():
    grid = torch.linspace(-4.0, 4.0, 2001)
    terms = dist.Bernoulli(logits=grid[:, None] * X).log_prob(PASSED).sum(1)
    evidence = over_grid(grid, terms + dist.Normal(0.0, 1.0).log_prob(grid))
    guide = fitted(logistic, AutoNormal, (X, PASSED), steps=80, batch_size=N // 2)
    bound(logistic, guide, (X, PASSED), evidence, 0.1)
    reduced = over_grid(grid, terms + dist.Normal(0.0, 0.3).log_prob(grid)) - evidence
    near(change(logistic, guide, {"w": dist.Normal(0.0, 0.3)}, (X, PASSED)), reduced, 0.1)
    chances = bmrs.predict(logistic, guide, X, draws=20)
    assert chances.shape == (N,)
    assert ((chances > 0) & (chances < 1)).all()


def of_three(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(3)).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


OF_THREE = XX, XX @ torch.tensor([1.0, 0.0, -0.5]) + 0.5 * normal(N)


class ByHand(PyroModule):
    """A guide with PyroParam."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.full((3,), 0.3), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))


@case("a guide by hand, with `PyroParam`", "the posterior mean is the exact one, to 0.05")
def _():
    guide = fitted(of_three, ByHand(), OF_THREE, steps=80)
    x, y = OF_THREE
    near(guide.loc.detach(), torch.linalg.solve(x.T @ x / 0.25 + torch.eye(3), x.T @ y / 0.25), 0.05)


def with_param(x, y=None):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("w", dist.Normal(loc, 0.3).to_event(1))


@case(
    "a guide by hand, with `pyro.param`",
    refused="^guide has the pyro.param 'loc', which no optimiser here would train",
    note=FIRST,
)
def _():
    fitted(of_three, with_param, OF_THREE)


def sparse(x, y=None):
    overall = pyro.sample("overall", dist.HalfCauchy(1.0))
    single = pyro.sample("single", dist.HalfCauchy(torch.ones(3)).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, overall * single).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@case("a horseshoe", '`dependent_priors="average"` tells the weight that is 0 in truth from the others')
def _():
    guide = fitted(sparse, AutoNormal, OF_THREE, steps=80)
    table = bmrs.reduce(sparse, guide, {"w": 0.0}, *OF_THREE, dependent_priors="average", draws=300).table
    first, second, third = table.log_evidence_change
    assert second > 0 > max(first, third)


@case(
    "evidence of a prior that depends on other latents",
    refused="^model has a prior of 'w' that depends on .*dependent_priors='average'",
    note=FIRST,
)
def _():
    guide = AutoNormal(sparse)
    guide(*OF_THREE)
    change(sparse, guide, {"w": 0.0}, OF_THREE)


OUTPUTS = XX @ torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]) + 0.3 * normal(N, 2)


def outputs(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(3, 2)).to_event(2))
    with pyro.plate("outputs", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
        pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)


@case("several outputs in a plate of their own, in batches", "the posterior mean is the exact one, to 0.1")
def _():
    guide = fitted(outputs, AutoNormal, (XX, OUTPUTS), steps=80, batch_size=N // 2)
    exact = torch.linalg.solve(XX.T @ XX / 0.09 + torch.eye(3), XX.T @ OUTPUTS / 0.09)
    near(mean_of(outputs, guide, (XX, OUTPUTS), "w"), exact, 0.1)


def correlated(x, y=None):
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(3)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", len(x)):
        law = dist.MultivariateNormal(torch.zeros(3), scale_tril=spread[:, None] * root)
        pyro.sample("y", law, obs=y)


SHARED = normal(N, 1) + 0.5 * normal(N, 3)


@case(
    "correlations with an LKJ prior", "all three are found, to 0.25; ΔF of a prior nearer to none is below 0"
)
def _():
    guide = fitted(correlated, AutoNormal, (NOTHING, SHARED), steps=80)
    root = mean_of(correlated, guide, (NOTHING, SHARED), "root")
    near(root @ root.T, torch.corrcoef(SHARED.T), 0.25)
    assert change(correlated, guide, {"root": dist.LKJCholesky(3, 4.0)}, (NOTHING, SHARED)) < 0


GRADES = torch.bucketize(X + 0.3 * normal(N), torch.tensor([-0.5, 0.5]))


def ordinal(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    apart = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(apart, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


@case(
    "ordinal regression",
    "the slope is positive, and the cuts are in order; without the slope the evidence falls",
)
def _():
    guide = fitted(ordinal, AutoNormal, (X, GRADES), steps=80)
    assert mean_of(ordinal, guide, (X, GRADES), "slope") > 1
    assert mean_of(ordinal, guide, (X, GRADES), "cuts").diff() > 0
    assert change(ordinal, guide, {"slope": 0.0}, (X, GRADES)) < -3


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.first, self.last = PyroModule[nn.Linear](1, 6), PyroModule[nn.Linear](6, 1)
        for layer in (self.first, self.last):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(self, x, y=None):
        mean = self.last(torch.tanh(self.first(x[:, None]))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)
        return mean


@case(
    "a Bayesian network of `PyroModule` and `PyroSample`, in batches",
    "`predict` is within 0.3 of a sine, in the mean",
)
def _():
    model = Bayesian()
    guide = fitted(model, AutoNormal, (X, X.sin()), steps=200, batch_size=N // 2)
    assert (bmrs.predict(model, guide, X, draws=20) - X.sin()).abs().mean() < 0.3


# --- groups and shares ----------------------------------------------------------------------------------------

ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SCHOOLS = ERRORS, EFFECTS


def schools(errors, y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(effect, errors), obs=y)
    return effect


KNOWN = pyro.condition(schools, data={"spread": torch.tensor(3.0)})


@case(
    "eight schools, with `pyro.condition` on the spread",
    "the ELBO is below the exact evidence, by 3 nats at most",
)
def _():
    covariance = 100.0 + torch.diag(ERRORS**2 + 9.0)
    exact = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(EFFECTS) + dist.HalfCauchy(
        5.0
    ).log_prob(torch.tensor(3.0))
    bound(KNOWN, fitted(KNOWN, AutoNormal, SCHOOLS, steps=80), SCHOOLS, float(exact), 3.0)


@case(
    "eight schools with `LocScaleReparam(0.0)`",
    "effects are deterministic sites; each is nearer to the others than its own measurement",
)
def _():
    model = poutine.reparam(schools, {"effect": LocScaleReparam(0.0)})
    found = mean_of(model, fitted(model, AutoNormal, SCHOOLS, steps=80), SCHOOLS, "effect")
    assert found.std() < EFFECTS.std()


@case(
    "`LocScaleReparam()`, which learns how far",
    refused="^model has the pyro.param 'effect_centered', which no optimiser",
    note=FIRST,
)
def _():
    fitted(poutine.reparam(schools, {"effect": LocScaleReparam()}), AutoNormal, SCHOOLS)


@case("eight schools, `AutoStructured`", "it is fitted and checked")
def _():
    guide = AutoStructured(
        schools, conditionals=dict.fromkeys(("mean", "spread", "effect"), "normal"),
        dependencies={"effect": {"mean": "linear"}},
    )  # fmt: skip
    fitted(schools, guide, SCHOOLS, steps=60)
    assert math.isfinite(bmrs.check_posterior(schools, guide, SCHOOLS, draws=100).elbo.elbo.iloc[0])


@case(
    "evidence from an `AutoStructured`",
    refused="^guide must have a distribution at 'mean': that of AutoStructured is a Delta",
)
def _():
    guide = AutoStructured(
        schools, conditionals=dict.fromkeys(("mean", "spread", "effect"), "normal"), dependencies={}
    )
    guide(*SCHOOLS)
    change(schools, guide, {"mean": 0.0}, SCHOOLS)


AT_BATS, HITS = (
    torch.tensor([45.0, 45, 45, 45, 30, 20, 10, 44]),
    torch.tensor([18.0, 17, 12, 10, 8, 4, 1, 15]),
)


def baseball(times, y=None):
    mean, sure = pyro.sample("mean", dist.Uniform(0.0, 1.0)), pyro.sample("sure", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(times)):
        chance = pyro.sample("chance", dist.Beta(mean * sure, (1 - mean) * sure))
        pyro.sample("y", dist.Binomial(times, chance), obs=y)


@case(
    "batting averages, partly pooled",
    "who hit 1 of 10 is thought better than that, and worse than all together",
)
def _():
    guide = fitted(baseball, AutoNormal, (AT_BATS, HITS), steps=80)
    assert 0.1 < mean_of(baseball, guide, (AT_BATS, HITS), "chance")[6] < HITS.sum() / AT_BATS.sum()
    assert change(baseball, guide, {"mean": dist.Beta(3.0, 8.0)}, (AT_BATS, HITS)) > 0


GROUPS = torch.arange(N) % 5
COUNTS = torch.exp(0.5 + 0.6 * X).round()


def grouped(x, y=None):
    x, group = x
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("spread", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 5):
        level = pyro.sample("level", dist.Normal(mean, spread))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((level[group] + slope * x).exp()), obs=y)


@case(
    "counts with a level for each group, the group as an index in x, in batches",
    "the slope 0.6 is found, to 0.25",
)
def _():
    data = (X, GROUPS), COUNTS
    near(
        mean_of(
            grouped,
            fitted(grouped, AutoMultivariateNormal, data, steps=80, batch_size=N // 2),
            data,
            "slope",
        ),
        0.6,
        0.25,
    )


def overdispersed(x, y=None):
    level, slope = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("level", "slope"))
    shape = pyro.sample("shape", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.GammaPoisson(shape, shape / (level + slope * x).exp()), obs=y)


@case("negative binomial counts", "the slope 0.6 is found, to 0.3; ΔF of a Gamma prior is estimated")
def _():
    guide = fitted(overdispersed, AutoNormal, (X, COUNTS), steps=80)
    near(mean_of(overdispersed, guide, (X, COUNTS), "slope"), 0.6, 0.3)
    assert math.isfinite(change(overdispersed, guide, {"shape": dist.Gamma(3.0, 0.5)}, (X, COUNTS)))


ZEROS = torch.where(torch.arange(N) % 5 < 2, 0.0, torch.poisson(torch.full((N,), 4.0), generator=_generator))


def inflated(x, y=None):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(4.0, gate=gate), obs=y)


@case("zero-inflated counts", "evidence as by quadrature, to 0.1 nats")
def _():
    grid = torch.linspace(0.0005, 0.9995, 1000)
    terms = dist.ZeroInflatedPoisson(torch.tensor(4.0), gate=grid[:, None]).log_prob(ZEROS).sum(1)
    bound(
        inflated,
        fitted(inflated, AutoNormal, (NOTHING, ZEROS), steps=80),
        (NOTHING, ZEROS),
        over_grid(grid, terms),
        0.1,
    )


TOSSES = (torch.arange(N) % 4 > 0).float()


def tosses(x, y):
    bias = pyro.sample("bias", dist.Beta(10.0, 10.0))
    for i in pyro.plate("tosses", len(y)):
        pyro.sample(f"toss_{i}", dist.Bernoulli(bias), obs=y[i])


@case(
    "coins in a loop over a sequential plate, in batches",
    "the ELBO is below the exact evidence, by 0.1 nats at most",
)
def _():
    heads = float(TOSSES.sum())
    exact = sum(sign * math.lgamma(at) for sign, at in (
        (1, 10 + heads), (1, 10 + N - heads), (-1, 20 + N), (-2, 10), (1, 20)
    ))  # fmt: skip
    bound(
        tosses,
        fitted(tosses, AutoNormal, (NOTHING, TOSSES), batch_size=N // 2),
        (NOTHING, TOSSES),
        exact,
        0.1,
    )


# --- mixtures and words ---------------------------------------------------------------------------------------

TWO = torch.cat([normal(N // 2) * 0.5 - 2, normal(N // 2) * 0.5 + 2])


def mixture(x, y=None):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(means, 0.5)), obs=y)


@case(
    "a mixture of normals, summed out by `MixtureSameFamily`, in batches",
    "means and shares are found, to 0.3 and 0.1; ΔF of equal shares is above 0",
)
def _():
    guide = fitted(mixture, AutoNormal, (NOTHING, TWO), steps=80, batch_size=N // 2)
    near(mean_of(mixture, guide, (NOTHING, TWO), "means"), [-2.0, 2.0], 0.3)
    near(mean_of(mixture, guide, (NOTHING, TWO), "share"), [0.5, 0.5], 0.1)
    assert change(mixture, guide, {"share": dist.Dirichlet(torch.full((2,), 10.0))}, (NOTHING, TWO)) > 0


def labelled(x, y=None):
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(means[kind], 0.5), obs=y)


@case(
    "the same with labels that Pyro would enumerate",
    refused="^guide must have a posterior of every latent of the model: it has none of .'kind'.. Sum them out",
    note=FIRST,
)
def _():
    fitted(labelled, AutoNormal(poutine.block(labelled, hide=["kind"])), (NOTHING, TWO))


WORDS = torch.multinomial(
    torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05]), 20 * N, replacement=True, generator=_generator
)
WORDS = nn.functional.one_hot(WORDS.reshape(N, 20), 5).sum(1).float()


def topics(x, y=None):
    words = pyro.sample("words", dist.Dirichlet(torch.ones(2, 5)).to_event(1))
    with pyro.plate("documents", len(x)):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        pyro.sample("y", dist.Multinomial(20, share @ words), obs=y)


@case(
    "topics: word by word summed out, a share for each document",
    "what is expected of words is found, to 0.05",
)
def _():
    guide = fitted(topics, AutoNormal, (NOTHING, WORDS), steps=70)
    tree = bmrs.to_datatree(topics, guide, (NOTHING, WORDS), draws=50)
    words, share = (torch.as_tensor(tree.posterior[name].to_numpy()[0]) for name in ("words", "share"))
    near((share @ words).mean((0, 1)), WORDS.mean(0) / 20, 0.05)


@case(
    "the same in batches, `AutoNormal`",
    refused="^batch_size must be 40 or more, .*single examples, .'share'.",
    note=FIRST,
)
def _():
    fitted(topics, AutoNormal, (NOTHING, WORDS), batch_size=N // 2)


def documents(x, y=None):
    with pyro.plate("words", 5):
        weight = pyro.sample("weight", dist.Gamma(2.0, 1.0))
    with pyro.plate("documents", len(x)):
        pyro.sample("y", dist.DirichletMultinomial(weight, 20), obs=y)


@case("counts of words, `DirichletMultinomial`", "the commonest word has the largest weight")
def _():
    guide = fitted(documents, AutoNormal, (NOTHING, WORDS), steps=70)
    assert mean_of(documents, guide, (NOTHING, WORDS), "weight").argmax() == WORDS.sum(0).argmax()


# --- time and space -------------------------------------------------------------------------------------------

TIMES = torch.arange(N).float()
WALK = torch.zeros(N)
for _step in range(1, N):
    WALK[_step] = 0.8 * WALK[_step - 1] + 0.3 * normal(1)[0]
SERIES = TIMES, WALK


def autoregression(times, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("steps", len(times) - 1):
        pyro.sample("y", dist.Normal(slope * y[:-1], 0.3), obs=y[1:])


@case(
    "a series that depends on its last step, in one batch",
    "the slope is the exact one, to 0.05",
    note=MENDED + "one batch keeps its order; it was shuffled, and the slope was half of the true one",
)
def _():
    precision = 1 + WALK[:-1].square().sum() / 0.09
    exact = (WALK[:-1] * WALK[1:]).sum() / 0.09 / precision
    guide = fitted(autoregression, AutoNormal, SERIES)
    near(guide.locs.slope.detach(), exact, 0.05)


@case(
    "the same in batches",
    refused="^batch_size must be the number of all examples, 40, .*as in a time series",
    note=MENDED + "it was fitted to pieces, in random order",
)
def _():
    fitted(autoregression, AutoNormal, SERIES, batch_size=N // 4)


def local_level(times, y=None):
    steps = pyro.sample("steps", dist.Normal(0.0, torch.full((len(times),), 0.3)).to_event(1))
    with pyro.plate("data", len(times)):
        pyro.sample("y", dist.Normal(steps.cumsum(0), 0.3), obs=y)


@case(
    "a level that walks, `AutoLaplaceApproximation`",
    "the ELBO is below the exact evidence, by 0.5 nats at most",
)
def _():
    sums = torch.ones(N, N).tril()
    exact = dist.MultivariateNormal(NOTHING, 0.09 * (sums @ sums.T + torch.eye(N))).log_prob(WALK)
    guide = fitted(local_level, AutoLaplaceApproximation, SERIES, steps=200).laplace_approximation(*SERIES)
    bound(local_level, guide, SERIES, float(exact), 0.5)


@case(
    "the same in batches",
    refused=r"^batch_size must be .*its latents \['steps'\] have other shapes for fewer",
    note=MENDED + "it was fitted to pieces, in random order",
)
def _():
    fitted(local_level, AutoNormal, SERIES, batch_size=N // 4)


def process(x, y=None):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    covariance = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


WAVE = X, X.sin() + 0.3 * normal(N)


@case("a Gaussian process as a `MultivariateNormal`", "evidence as by quadrature, to 0.3 nats")
def _():
    grid = torch.linspace(0.01, 8.0, 800)
    covariance = torch.exp(-0.5 * ((X[:, None] - X) / grid[:, None, None]) ** 2) + 0.1 * torch.eye(N)
    log_p = dist.MultivariateNormal(NOTHING, covariance).log_prob(WAVE[1]) + dist.LogNormal(
        0.0, 1.0
    ).log_prob(grid)
    bound(process, fitted(process, AutoNormal, WAVE, steps=80), WAVE, over_grid(grid, log_p), 0.3)


@case(
    "the same in batches",
    refused="^batch_size must be the number of all examples, 40,",
    note=MENDED + "it was fitted to pieces",
)
def _():
    fitted(process, AutoNormal, WAVE, batch_size=N // 4)


YEARS = torch.cat([torch.poisson(torch.full((N // 2,), rate), generator=_generator) for rate in (2.0, 6.0)])


def change_point(times, y):
    early, late = (pyro.sample(name, dist.Gamma(2.0, 0.5)) for name in ("early", "late"))
    before = dist.Poisson(early).log_prob(y).cumsum(0)
    after = dist.Poisson(late).log_prob(y).flip(0).cumsum(0).flip(0)
    pyro.factor("year", torch.logsumexp(before[:-1] + after[1:], 0) - math.log(len(y) - 1))


@case(
    "a change point, summed out in a `pyro.factor`",
    "both rates, 2 and 6, are found, to 1",
    note=MENDED + "years were shuffled",
)
def _():
    guide = fitted(change_point, AutoNormal, (TIMES, YEARS), steps=80)
    near([mean_of(change_point, guide, (TIMES, YEARS), name) for name in ("early", "late")], [2.0, 6.0], 1.0)


@case("`loo` of a program that has only factors", refused="^tree must have the group log_likelihood")
def _():
    guide = AutoNormal(change_point)
    guide(TIMES, YEARS)
    bmrs.loo(bmrs.to_datatree(change_point, guide, (TIMES, YEARS), draws=100))


# --- latents of single examples -------------------------------------------------------------------------------

LINE = normal(N, 1) * torch.tensor([1.0, 0.5, -1.0]) + 0.2 * normal(N, 3)
DIRECTION = torch.tensor([1.0, 0.5, -1.0])


def factor_analysis(x, y=None):
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z[:, None] * DIRECTION, noise).to_event(1), obs=y)


@case(
    "factor analysis, a latent for each example",
    "noise as by quadrature over it, to 0.03; the ELBO is below the evidence, by 1 nat at most",
)
def _():
    grid = torch.linspace(0.05, 1.0, 400)
    covariance = DIRECTION[:, None] * DIRECTION + grid[:, None, None, None] ** 2 * torch.eye(3)
    log_p = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(LINE).sum(1) + dist.LogNormal(
        -1.0, 0.5
    ).log_prob(grid)
    guide = fitted(factor_analysis, AutoNormal, (NOTHING, LINE), steps=120)
    bound(factor_analysis, guide, (NOTHING, LINE), over_grid(grid, log_p), 1.0)
    near(
        mean_of(factor_analysis, guide, (NOTHING, LINE), "noise"),
        float((log_p.softmax(0) * grid).sum()),
        0.03,
    )


class Autoencoder(nn.Module):
    """Model and guide are methods of one module."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    def model(self, x, y=None):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(1)).to_event(1))
            pyro.sample("y", dist.Normal(self.decoder(z), 0.2).to_event(1), obs=y)
        return self.decoder(z)

    def guide(self, x, y=None):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@case(
    "an autoencoder, `vae.model` and `vae.guide`, in batches",
    "both are trained; `predict` gives back its input, to 0.4 in the mean",
    note=MENDED + "methods of a module were refused as having parameters of no module",
)
def _():
    vae = Autoencoder()
    fitted(vae.model, vae.guide, (LINE, LINE), steps=120, batch_size=N // 2)
    assert (bmrs.predict(vae.model, vae.guide, LINE, draws=20) - LINE).abs().mean() < 0.4


def encoded_at_once(x, y=None):
    z = pyro.sample("z", dist.Normal(0.0, torch.ones(len(x), 1)).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(z * DIRECTION, 0.2).to_event(1), obs=y)


class EncoderAtOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 1)

    def forward(self, x, y=None):
        pyro.sample("z", dist.Normal(self.encoder(x), 0.3).to_event(2))


@case(
    "latents of examples outside of their plate, in batches",
    refused=r"^batch_size must be .*its latents \['z'\] have other shapes",
    note=MENDED + "their KL counted as that of latents that all batches share",
)
def _():
    fitted(encoded_at_once, EncoderAtOnce(), (LINE, LINE), batch_size=N // 2)


# --- what was not observed ------------------------------------------------------------------------------------

DEATHS = -torch.log(torch.rand(N, generator=_generator))
ALIVE = torch.arange(N) % 3 == 0
FOLLOWED = NOTHING, (DEATHS, ALIVE)


def rate_by_factor(x, y):
    times, alive = y
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(times)):
        pyro.factor("death", torch.where(alive, 0.0, rate.log()) - rate * times)


def rate_by_masks(x, y):
    times, alive = y
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", len(times)):
        with poutine.mask(mask=~alive):
            pyro.sample("death", dist.Exponential(rate), obs=times)
        with poutine.mask(mask=alive):
            pyro.sample("alive", dist.Bernoulli((-rate * times).exp()), obs=torch.ones(len(times)))


def _of_rate(model):
    deaths, time = float((~ALIVE).sum()), float(DEATHS.sum())
    exact = math.lgamma(1 + deaths) - (1 + deaths) * math.log(1 + time)
    bound(model, fitted(model, AutoNormal, FOLLOWED, steps=120, batch_size=N // 2), FOLLOWED, exact, 0.1)


@case(
    "censored times by `pyro.factor`, in batches", "the ELBO is below the exact evidence, by 0.1 nats at most"
)
def _():
    _of_rate(rate_by_factor)


@case("censored times by masks, two observed sites, in batches", "the same")
def _():
    _of_rate(rate_by_masks)


@case(
    "`loo` of a program with two observed sites",
    refused="^var_name must be one of the observed sites .'death', 'alive'.",
)
def _():
    guide = AutoNormal(rate_by_masks)
    guide(*FOLLOWED)
    bmrs.loo(bmrs.to_datatree(rate_by_masks, guide, FOLLOWED, draws=100))


def with_gaps(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y.nan_to_num(), obs_mask=~y.isnan())


def masked_gaps(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


GAPS = X, torch.where(torch.arange(N) % 4 == 0, torch.nan, 0.8 * X + 0.5 * normal(N))


@case("missing observations, `obs_mask`", "the slope is that of the others, to 0.1")
def _():
    x, y = (part[~GAPS[1].isnan()] for part in GAPS)
    exact = (x * y).sum() / 0.25 / (1 + x.square().sum() / 0.25)
    near(mean_of(with_gaps, fitted(with_gaps, AutoNormal, GAPS, steps=80), GAPS, "w"), exact, 0.1)


@case(
    "NaN where nothing was observed, under `poutine.mask`",
    refused="^data must have no NaN: 10 of 40 values of 'y' are",
    note=MENDED + "the gradient was NaN, and the fit said to lower the learning rate",
)
def _():
    fitted(masked_gaps, AutoNormal, GAPS)


# --- programs with a mistake ----------------------------------------------------------------------------------


def square(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(3, 1)).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@case(
    "a mean of shape (n, 1) beside y of shape (n,)",
    refused=r"^model must observe a value for each element .* 'y' has .* shape \(40,\) and laws of \(40, 40\)",
    note=MENDED + "all n² pairs were counted",
)
def _():
    fitted(square, AutoNormal, OF_THREE)


def half(x, y=None):
    with poutine.scale(scale=0.5):
        of_three(x, y)


@case(
    "a model under `poutine.scale(scale=0.5)`",
    refused="^model must scale its likelihood either by 1 .* got 0.5$",
    note=FIRST,
)
def _():
    fitted(half, AutoNormal, OF_THREE)


def some(x, y):
    w = pyro.sample("w", dist.Normal(0.0, torch.ones(3)).to_event(1))
    with pyro.plate("data", len(x), subsample_size=10) as chosen:
        pyro.sample("y", dist.Normal(x[chosen] @ w, 0.5), obs=y[chosen])


@case(
    "a plate with `subsample_size`: other examples in each call",
    refused="^model must scale its likelihood either by 1",
    note=FIRST,
)
def _():
    fitted(some, AutoNormal, OF_THREE)


class Backwards(nn.Module):
    """The guide draws first what stands last in the model."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), -1.0))
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, y):
        below = pyro.sample("below", dist.Normal(self.loc[0], self.log_scale[0].exp()))
        pyro.sample("above", dist.Normal(self.loc[1] + self.slope * below, self.log_scale[1].exp()))


def chain(x, y):
    above = pyro.sample("above", dist.Normal(0.0, 1.0))
    below = pyro.sample("below", dist.Normal(above, 0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(below, 1.0), obs=y)


@case(
    "a guide that draws in another order than the model",
    "the ELBO is below the exact evidence, by 0.1 nats at most",
    note=MENDED + "a KL was taken at the wrong draw; the slope was half of the true one",
)
def _():
    twos = torch.full((10,), 2.0)
    exact = dist.MultivariateNormal(torch.zeros(10), 1.09 + torch.eye(10)).log_prob(twos)
    bound(chain, fitted(chain, Backwards(), (twos, twos), steps=200), (twos, twos), float(exact), 0.1)


class Branching:
    """A model that draws `shift` in every second call."""

    calls = 0

    def __call__(self, x, y):
        self.calls += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.calls % 2 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x + shift, 1.0), obs=y)


@case(
    "a latent that is drawn in some calls only",
    refused="^(model must draw the same latents in each call|guide must have .* latent).*shift",
    note=MENDED + "it was a KeyError",
)
def _():
    model = Branching()
    fitted(model, AutoNormal(model), (X, X))


def alone(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@case(
    "a model of y alone",
    refused=r"^train must be what the model is called with: got 2 of them, .*too many positional arguments",
    note=MENDED + "it was Python's error alone",
)
def _():
    fitted(alone, AutoNormal, (X, X))


def needs_y(x, y):
    pyro.sample("scale", dist.LogNormal(y.mean(), 1.0))
    return logistic(x, y)


@case(
    "`predict` with a model that looks at y",
    refused=r"^model must be callable without observations to predict, as model\(x, None\)",
    note=MENDED + "it was Python's error alone",
)
def _():
    guide = AutoNormal(needs_y)
    guide(X, PASSED)
    bmrs.predict(needs_y, guide, X, draws=2)


PROGRAM_CASES = CASES
