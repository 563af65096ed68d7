"""The posterior of every kind of guide, read back: the same law as the guide draws from."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
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
from torch.distributions import constraints

from pyro_bmrs import AutoTruncatedLogNormal, LogUniform
from pyro_bmrs.inference.blocks import JointNormalBlock, SiteBlock
from pyro_bmrs.inference.posteriors import UnreadablePosteriorError, read_blocks

SITES = ("weights", "scale", "share", "mixing", "table")


pytestmark = pytest.mark.usefixtures("empty_store")


def model(y):
    pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.sample("share", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("mixing", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-2):
        pyro.sample("table", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, scale), obs=y)


Y = torch.tensor(0.3)
KINDS = {
    "AutoNormal": lambda: AutoNormal(model, init_scale=0.3),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model, init_scale=0.3),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model, init_scale=0.3),
    "AutoLowRankMultivariateNormal": lambda: AutoLowRankMultivariateNormal(model, init_scale=0.3, rank=4),
    "AutoLaplaceApproximation": lambda: laplace(),
    "AutoGuideList": lambda: parts(),
}


def fitted(guide):
    """With parameters that differ from one another."""
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(30):
        svi.step(Y)
    return guide


def laplace():
    return fitted(AutoLaplaceApproximation(model)).laplace_approximation(Y)


def parts():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["weights", "scale"]), init_scale=0.3))
    guide.append(
        AutoMultivariateNormal(pyro.poutine.block(model, hide=["weights", "scale", "y"]), init_scale=0.2)
    )
    return guide


def draws_of(blocks, count):
    values = {}
    for block in blocks:
        if isinstance(block, JointNormalBlock):
            values |= block.values(block.draw(count))
        else:
            values[block.site] = block.distribution.sample((count,))
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draws", "within"),
    [(1000, 0.045), pytest.param(4000, 0.03, marks=pytest.mark.slow)],
    ids=["fewer", "many"],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (number % 2)) for number, kind in enumerate(KINDS)]
)
def test_the_same_law_as_the_guide_draws_from(kind, draws, within):
    """Means and covariances of bounded functions of draws of the guide and of 20,000 of what was read.

    Means agree within 4.5 standard errors; covariances of numbers below one, of 1,000 draws,
    within 0.045, which is as many of the largest.
    """
    guide = KINDS[kind]()
    if kind != "AutoLaplaceApproximation":
        fitted(guide)
    blocks = read_blocks(guide, Y, sites=SITES)
    with torch.no_grad():
        given = [guide(Y) for _ in range(draws)]
        read = draws_of(blocks, 20_000)
    flat = [
        torch.cat(
            [torch.stack([draw[name] for draw in given]).reshape(draws, -1).double() for name in SITES], 1
        ),
        torch.cat([read[name].reshape(20_000, -1) for name in SITES], 1),
    ]
    flat = [torch.tanh(values) for values in flat]  # bounded: its moments have small errors
    means, covariances = [v.mean(0) for v in flat], [v.T.cov() for v in flat]
    error = (flat[0].var(0) * (1 / draws + 1 / 20_000)).sqrt()
    assert bool(((means[0] - means[1]).abs() < 4.5 * error + 1e-6).all())
    assert float((covariances[0] - covariances[1]).abs().max()) < within
    for name in SITES:
        assert read[name].shape[1:] == given[0][name].shape


def test_the_blocks_are_what_is_independent():
    mean_field = read_blocks(fitted(KINDS["AutoDiagonalNormal"]()), Y, sites=SITES)
    assert all(isinstance(block, SiteBlock) for block in mean_field)
    assert isinstance(mean_field[0].distribution, dist.Independent)  # no identity is left on it
    assert isinstance(mean_field[0].distribution.base_dist, dist.Normal)
    (joint,) = read_blocks(fitted(KINDS["AutoMultivariateNormal"]()), Y, sites=("scale",))
    assert joint.sites == SITES
    low_rank = read_blocks(fitted(KINDS["AutoLowRankMultivariateNormal"]()), Y, sites=("scale",))[0]
    everything = torch.arange(len(low_rank.loc))
    posterior = low_rank.factor @ low_rank.factor.T + low_rank.diagonal.diag()
    torch.testing.assert_close(low_rank.covariance(everything), posterior)
    torch.testing.assert_close(low_rank.covariance(everything[:2], everything[2:]), posterior[:2, 2:])


def test_a_program_of_ones_own():
    def guide(y):
        loc = pyro.param("loc", torch.tensor([0.5, -1.0, 2.0]))
        pyro.sample("weights", dist.Normal(loc, 0.1).to_event(1))
        rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("scale", dist.Gamma(4.0, rate))

    blocks = read_blocks(guide, Y, sites=("weights", "scale"))
    assert isinstance(blocks[1].distribution, dist.Gamma)
    assert blocks[1].distribution.rate.dtype == torch.float64
    assert not blocks[1].distribution.rate.requires_grad
    assert blocks[0].distribution.base_dist.loc.tolist() == [0.5, -1.0, 2.0]


def test_a_vector_with_full_covariance_is_a_joint_normal():
    def guide(y):
        pyro.sample("weights", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5))

    (block,) = read_blocks(guide, Y, sites=("weights",))
    assert isinstance(block, JointNormalBlock)
    torch.testing.assert_close(block.covariance(torch.arange(3)), (torch.eye(3) + 0.5).double())


def depends(y):
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.sample("weights", dist.Normal(torch.zeros(3), scale).to_event(1))


def depends_on_a_coin(y):
    side = pyro.sample("side", dist.Bernoulli(0.97))
    pyro.sample("weights", dist.Normal(side * torch.ones(3), 0.1).to_event(1))


def is_a_point(y):
    pyro.sample("weights", dist.Delta(torch.zeros(3), event_dim=1))


def subsampled(y):
    with pyro.plate("data", 100, subsample_size=10):
        pyro.sample("weights", dist.Normal(0.0, 1.0))


def called(guide):
    guide(Y)
    return guide


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: called(AutoDelta(model)), "is a Delta there"),
        (lambda: is_a_point, "is a Delta there"),
        (lambda: depends, "'weights' that does not depend on another latent"),
        (lambda: depends_on_a_coin, "'weights' that does not depend on another latent"),
        (lambda: called(AutoNormal(subsampled)), r"subsampled plate 'data' \(10 of 100\)"),
        (
            lambda: called(AutoStructured(model, conditionals="normal")),
            "that of AutoStructured is a Delta there",
        ),
        (lambda: subsampled, r"subsampled plate 'data' \(10 of 100\)"),
        (lambda: called(AutoIAFNormal(model)), "normal posterior of .*AutoIAFNormal is a Transformed"),
        (
            lambda: called(AutoLaplaceApproximation(model)),
            r"is a Delta; guide.laplace_approximation\(\*args\) gives",
        ),
    ],
)
def test_what_is_no_distribution_is_refused(make, message):
    with pytest.raises(UnreadablePosteriorError, match=message):
        read_blocks(make(), Y, sites=("weights",))


def test_only_the_sites_asked_for_must_be_readable():
    guide = AutoGuideList(model)
    guide.append(AutoDelta(pyro.poutine.block(model, expose=["scale"])))
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["scale", "y"])))
    guide(Y)
    assert read_blocks(guide, Y, sites=("weights",))[0].sites == ("weights",)
    with pytest.raises(UnreadablePosteriorError, match="'scale'"):
        read_blocks(guide, Y, sites=("scale",))


def test_sites_that_are_not_there():
    with pytest.raises(ValueError, match=r"it has none of \['bias'\], only of"):
        read_blocks(called(AutoNormal(model)), Y, sites=("weights", "bias"))
    with pytest.raises(RuntimeError, match="no parameters yet"):
        read_blocks(AutoNormal(model), Y, sites=("weights",))


def test_our_own_guide_and_what_a_fit_removed():
    def scales(y):
        pyro.sample("theta", LogUniform(torch.tensor(-20.0), torch.tensor(0.0)).expand([3]).to_event(1))

    guide = AutoTruncatedLogNormal(scales)
    guide(Y)
    guide.site_posterior("theta").kept[1] = False
    (block,) = read_blocks(guide, Y, sites=("theta",))
    assert block.kept.tolist() == [True, False, True]
