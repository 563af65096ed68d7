"""Pyro programs of the kinds that its tutorials teach, in our own words. `tests/test_inputs.py` tries each of them.

Each goes from a fit of a few steps through ΔF, checks, draws and predictions. That their numbers are right is tested
where they are exact: tests/programs/test_program_conformance.py, test_second_opinion.py.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from input_cases import InputCase
from pyro import poutine
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_bmrs as bmrs

N = 24
_random = torch.Generator().manual_seed(3)
X = torch.randn(N, generator=_random)
XS = torch.randn(N, 3, generator=_random)
Y = 0.8 * X + 0.5 * torch.randn(N, generator=_random)
ON = (torch.rand(N, generator=_random) < torch.sigmoid(2 * XS[:, 0])).float()
COUNTS = torch.poisson(torch.exp(0.5 + 0.4 * X), generator=_random)
GROUP = torch.arange(N) % 4
TIMES = -torch.log(torch.rand(N, generator=_random))
CENSORED = torch.rand(N, generator=_random) < 0.3
WORDS = torch.poisson(torch.tensor([4.0, 3, 2, 1, 1]).expand(N, 5), generator=_random)
KINDS = torch.bucketize(X, torch.tensor([-0.5, 0.5]))
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


def rugged(x, y=None):
    """Two groups of lines that may have different slopes."""
    (x, group), intercept = x, pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, torch.ones(3)).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    mean = intercept + slopes[0] * x + slopes[1] * group + slopes[2] * x * group
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, spread), obs=y)


def logistic(x, y=None):
    weights = pyro.sample("weights", dist.Normal(0.0, torch.ones(3)).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def schools(x, y=None):
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 10.0)), pyro.sample("spread", dist.HalfNormal(5.0))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        return pyro.sample("y", dist.Normal(effect, x), obs=y)


def batting(x, y=None):
    """Partial pooling of shares."""
    mean, size = pyro.sample("mean", dist.Beta(2.0, 5.0)), pyro.sample("size", dist.Gamma(5.0, 0.5))
    with pyro.plate("players", len(x)):
        share = pyro.sample("share", dist.Beta(mean * size, (1 - mean) * size))
        return pyro.sample("y", dist.Binomial(x, share), obs=y)


def mixture(x, y=None):
    """The component of each number is summed out."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        law = dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(means, 0.5))
        return pyro.sample("y", law, obs=y)


def topics(x, y=None):
    """Counts of words; the topic of each word is summed out."""
    words = pyro.sample("words", dist.Dirichlet(torch.ones(2, 5)).to_event(1))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("documents", len(x)):
        return pyro.sample("y", dist.Multinomial(probs=shares @ words, validate_args=False), obs=y)


def hierarchy(x, y=None):
    """Counts in groups with intercepts of their own."""
    x, group = x
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("spread", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(mean, spread))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Poisson((level[group] + slope * x).exp()), obs=y)


def overdispersed(x, y=None):
    level, slope = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("level", "slope"))
    size = pyro.sample("size", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.GammaPoisson(size, size / (level + slope * x).exp()), obs=y)


def many_zeros(x, y=None):
    gate, rate = pyro.sample("gate", dist.Beta(1.0, 1.0)), pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def ordered(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    free = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(free, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def survival(x, y=None):
    """Times until an event, some of them cut off."""
    slope, level = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("slope", "level"))
    rate, (times, censored) = (level + slope * x).exp(), (None, None) if y is None else y
    with pyro.plate("data", len(x)):
        if y is None:
            return rate
        pyro.factor("survived", torch.where(censored, -rate * times, 0.0))
        with poutine.mask(mask=~censored):
            pyro.sample("event", dist.Exponential(rate), obs=times)
    return rate


def process(x, y=None):
    """A Gaussian process: one event of all examples."""
    length, noise = (
        pyro.sample("length", dist.LogNormal(0.0, 1.0)),
        pyro.sample("noise", dist.LogNormal(-1.0, 1.0)),
    )
    kernel = torch.exp(-0.5 * ((x[:, None] - x[None]) / length) ** 2) + (noise + 1e-3) * torch.eye(len(x))
    return pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def series(x, y=None):
    """A local level that wanders."""
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    with pyro.plate("times", len(x)):
        return pyro.sample("y", dist.Normal(spread * steps.cumsum(0), 0.5), obs=y)


def sparse(x, y=None):
    """A horseshoe."""
    overall = pyro.sample("overall", dist.HalfCauchy(0.5))
    own = pyro.sample("own", dist.HalfCauchy(torch.ones(3)).to_event(1))
    weights = pyro.sample("weights", dist.Normal(0.0, overall * own).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)


def correlated(x, y=None):
    """A covariance with a prior of its own."""
    scales = pyro.sample("scales", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", len(x)):
        law = dist.MultivariateNormal(torch.zeros(3), scale_tril=scales[:, None] * factor)
        return pyro.sample("y", law, obs=y)


class Network(PyroModule):
    """A Bayesian neural network."""

    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, 4)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 1]).to_event(2))
        self.out = PyroModule[nn.Linear](4, 1)

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x[:, None]))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
        return mean


class Decoder(nn.Module):
    """A variational autoencoder: each example has a latent of its own."""

    def __init__(self):
        super().__init__()
        self.decode = nn.Linear(2, 3)

    def forward(self, x, y=None):
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Normal(0.0, torch.ones(2)).to_event(1))
            pyro.sample("y", dist.Normal(self.decode(code), 0.5).to_event(1), obs=y)
        return self.decode(code)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 4)

    def forward(self, x, y=None):
        loc, log_scale = self.encode(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))


class ByHand(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.full((3,), 0.3), constraint=dist.constraints.positive)

    def forward(self, x, y=None):
        pyro.sample("weights", dist.Normal(self.loc, self.scale).to_event(1))


def by_names(x, y=None):
    """A guide whose parameters are in Pyro's store alone."""
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("weights", dist.Normal(loc, 0.3).to_event(1))


def through(model, guide, data, reduced, *, batch_size=N, predicts=True):
    """From a fit of 20 epochs to predictions; all that comes out must be finite."""

    def run():
        made = guide(model)
        fit = bmrs.fit(
            model, made, data, epochs=20, batch_size=batch_size, posterior_learning_rate=0.03, progress=False
        )
        assert fit.history.loss.notna().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of guides that have hardly been fitted
            plan = bmrs.reduce(model, made, reduced, *data, dependent_priors="average", draws=200)
            assert plan.sites.log_evidence_change.notna().all()
            checks = bmrs.check_posterior(model, made, data, draws=100)
        assert checks.elbo.elbo.map(math.isfinite).all()
        tree = bmrs.to_datatree(model, made, data, draws=20)
        assert set(reduced) <= set(tree.posterior.data_vars)
        if predicts:
            assert len(bmrs.predict(model, made, data[0], draws=5)) == len(data[1])

    return run


WORKS = "fit, ΔF, checks, draws for ArviZ, predictions"
WHOLE = torch.full((8,), 45.0), torch.tensor([18.0, 17, 12, 10, 8, 4, 1, 15])
PROGRAMS = {
    "lines with an interaction, AutoMultivariateNormal": through(
        rugged, AutoMultivariateNormal, ((X, (GROUP < 2).float()), Y), {"slopes": 0.0}
    ),
    "the same, AutoLowRankMultivariateNormal": through(
        rugged, AutoLowRankMultivariateNormal, ((X, (GROUP < 2).float()), Y), {"slopes": 0.0}
    ),
    "logistic regression, AutoNormal": through(logistic, AutoNormal, (XS, ON), {"weights": 0.0}),
    "logistic regression in batches, a guide by hand with PyroParam": through(
        logistic, lambda model: ByHand(), (XS, ON), {"weights": 0.0}, batch_size=8
    ),
    "eight schools": through(schools, AutoNormal, (ERRORS, EFFECTS), {"mean": 0.0}),
    "eight schools, decentred by LocScaleReparam": through(
        poutine.reparam(schools, {"effect": LocScaleReparam(0.0)}), AutoNormal, (ERRORS, EFFECTS), {"mean": 0.0}
    ),
    "eight schools, a latent conditioned by pyro.condition": through(
        pyro.condition(schools, data={"spread": torch.tensor(3.0)}), AutoNormal, (ERRORS, EFFECTS), {"mean": 0.0}
    ),
    "shares with partial pooling": through(batting, AutoNormal, WHOLE, {"mean": dist.Beta(3.0, 8.0)}),
    "a mixture, components summed out": through(
        mixture, AutoNormal, (X, Y + GROUP - 2), {"shares": dist.Dirichlet(torch.tensor([5.0, 5.0]))}
    ),
    "topics of documents, summed out": through(
        topics, AutoNormal, (torch.zeros(N), WORDS), {"words": dist.Dirichlet(torch.full((5,), 2.0))}, predicts=False
    ),
    "counts in groups, an index as a second input": through(
        hierarchy, AutoMultivariateNormal, ((X, GROUP), COUNTS), {"slope": 0.0}
    ),
    "counts with more spread than Poisson": through(overdispersed, AutoNormal, (X, COUNTS), {"slope": 0.0}),
    "counts with many zeros": through(many_zeros, AutoNormal, (X, COUNTS), {"gate": dist.Beta(1.0, 9.0)}),
    "ordered classes": through(ordered, AutoNormal, (X, KINDS), {"slope": 0.0}),
    "survival with censoring, by a factor and a mask": through(
        survival, AutoNormal, (X, (TIMES, CENSORED)), {"slope": 0.0}, predicts=False
    ),
    "a Gaussian process": through(process, AutoNormal, (X, Y), {"length": dist.LogNormal(1.0, 0.5)}),
    "a time series with a wandering level": through(
        series, AutoMultivariateNormal, (X, Y.cumsum(0)), {"spread": dist.HalfNormal(0.5)}
    ),
    "a horseshoe": through(sparse, AutoNormal, (XS, XS[:, 0]), {"overall": dist.HalfCauchy(0.2)}),
    "a correlation matrix (LKJ)": through(correlated, AutoNormal, (XS, XS), {"scales": dist.LogNormal(0.0, 0.3)}),
    "a Bayesian network of PyroSample": through(Network(), AutoNormal, (X, Y), {"hidden.weight": 0.0}, batch_size=8),
    "a variational autoencoder in batches": through(
        Decoder(), lambda model: Encoder(), (XS, XS), {"code": 0.0}, batch_size=8
    ),
}  # fmt: skip


def refused_fit(model, guide, data, **settings):
    return lambda: bmrs.fit(
        model, guide(model), data, **{"epochs": 1, "batch_size": N, "progress": False, **settings}
    )


def reduced_by(guide):
    def run():
        made = guide(rugged)
        data = (X, (GROUP < 2).float()), Y
        made(*data)
        bmrs.reduce(rugged, made, {"slopes": 0.0}, *data)

    return run


BEFORE = "refused before the first step"
REFUSED = {
    "a guide whose parameters are pyro.param alone": (
        refused_fit(logistic, lambda model: by_names, (XS, ON)),
        r"^guide has the pyro.param 'loc', which no optimiser here would train: make it an nn.Parameter or PyroParam",
        BEFORE,
    ),
    "latents of single examples under an autoguide, in batches": (
        refused_fit(Decoder(), AutoNormal, (XS, XS), batch_size=8),
        r"^batch_size must be 24 or more, .* for latents of single examples, \['code'\]",
        BEFORE,
    ),
    "a Gaussian process in batches": (
        refused_fit(process, AutoNormal, (X, Y), batch_size=8),
        r"^batch_size must be the number of all examples, 24, for a model whose examples depend on each other",
        BEFORE,
    ),
    "a time series in batches": (
        refused_fit(series, AutoNormal, (X, Y), batch_size=8),
        r"^batch_size must be the number of all examples, 24, .* its latents \['steps'\] have other shapes",
        BEFORE,
    ),
    "a flow as the guide (AutoIAFNormal), to reduce": (
        reduced_by(lambda model: AutoIAFNormal(model, hidden_dim=[8])),
        r"^guide must have a normal posterior of \['slopes'\]: that of AutoIAFNormal is a TransformedDistribution",
        "refused by `reduce`; `fit` takes it",
    ),
}
PROGRAM_CASES = [
    *(InputCase("programs", given, run, works=WORKS, note="tried anew") for given, run in PROGRAMS.items()),
    *(
        InputCase("programs", given, run, refused=refused, note=note)
        for given, (run, refused, note) in REFUSED.items()
    ),
]
