"""Priors that depend on another latent: noticed, and averaged over joint draws, against nested Monte Carlo."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal

from pyro_bmrs import log_evidence_change, reduce

pytestmark = pytest.mark.usefixtures("own_parameters", "no_second_opinion")


Y0 = torch.tensor(0.0)


def hierarchy(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 3):
        effects = pyro.sample("effects", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(effects, 0.5), obs=y)


YH = torch.tensor([0.1, 1.0, -0.4])
# Draws that ΔF is averaged over, draws of the reduced posterior, and how far their mean may be from the truth, in
# standard deviations: of 1,000 draws among 1,500 weighted ones 0.25 is about 4.5 standard errors.
SIZES = pytest.mark.parametrize(
    ("draws", "drawn", "within"),
    [
        pytest.param(1500, 1000, 0.25, id="fewer"),
        pytest.param(4000, 3000, 0.15, id="many", marks=pytest.mark.slow),
    ],
)


def hierarchy_guide(joint):
    # the scale is far above 0.3: below, the prior would be narrower than the posterior, and E[p̃/p] infinite
    guide = (AutoMultivariateNormal if joint else AutoDiagonalNormal)(hierarchy, init_scale=0.25)
    guide(YH)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.6, 0.05, 0.6, -0.2]))
        if joint:
            guide.scale_tril = torch.eye(4) + torch.tril(torch.full((4, 4), 0.4), -1)
    return guide


def nested_truth(guide, joint, log_reduced, columns):
    z = guide.get_posterior().sample((400_000,)).detach().double()
    scale, effects = z[:, 0].exp(), z[:, 1:][:, columns]
    ratio = (log_reduced(effects) - dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(effects)).sum(-1)
    return float(ratio.logsumexp(0)) - math.log(len(z))


FEWER_OR_MANY = pytest.mark.parametrize("draws", [1000, pytest.param(3000, marks=pytest.mark.slow)])


@pytest.mark.slow
@FEWER_OR_MANY
@pytest.mark.parametrize(
    "joint", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["joint", "mean-field"]
)
@pytest.mark.parametrize(
    "reduced",
    [
        pytest.param(dist.Normal(0.0, 0.4), id="closed inside", marks=pytest.mark.slow),
        pytest.param(dist.Laplace(0.0, 0.4), id="by draws"),
    ],
)
def test_dependent_priors_are_averaged(joint, reduced, draws):
    guide = hierarchy_guide(joint)
    plan = reduce(
        hierarchy, guide, {"effects": reduced}, YH, dependent_priors="average", draws=draws,
        groups={"outer": {"effects": [0, 2]}},
    )  # fmt: skip
    for row in plan.table.itertuples():
        truth = nested_truth(guide, joint, reduced.log_prob, [row.unit])
        assert row.standard_error > 0
        assert abs(row.log_evidence_change - truth) < 4.5 * row.standard_error + 0.01
    for columns, found in (([0, 2], plan.groups), ([0, 1, 2], plan.sites)):
        truth = nested_truth(guide, joint, reduced.log_prob, columns)
        assert abs(found.log_evidence_change[0] - truth) < 4.5 * found.standard_error[0] + 0.02


@pytest.mark.slow
@FEWER_OR_MANY
@pytest.mark.parametrize(
    "joint", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["mean-field", "joint"]
)
def test_a_point_under_a_dependent_prior(joint, draws):
    """Estimated from draws it would be nothing; conditional on all else it has a closed form."""
    guide = hierarchy_guide(joint)
    plan = reduce(hierarchy, guide, {"effects": 0.0}, YH, dependent_priors="average", draws=draws)
    for row in plan.table.itertuples():
        narrow = nested_truth(guide, joint, dist.Normal(0.0, 0.02).log_prob, [row.unit])
        assert abs(row.log_evidence_change - narrow) < 4.5 * row.standard_error + 0.02
        if draws > 1000:
            assert row.log_evidence_change == pytest.approx(narrow, abs=0.1)


@pytest.mark.slow
@SIZES
@pytest.mark.parametrize(
    "joint", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["mean-field", "joint"]
)
def test_the_reduced_posterior_under_a_dependent_prior(joint, draws, drawn, within):
    guide = hierarchy_guide(joint)
    plan = reduce(
        hierarchy, guide, {"effects": dist.Normal(0.0, 0.2)}, YH,
        dependent_priors="average", draws=draws, prior_log_odds=99.0,
    )  # fmt: skip
    found = plan.reduced_posterior().draw(drawn, YH)
    z = guide.get_posterior().sample((400_000,)).detach()
    scale, effects = z[:, 0].exp(), z[:, 1:]
    weights = (
        (dist.Normal(0.0, 0.2).log_prob(effects) - dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(effects))
        .sum(-1)
        .softmax(0)
    )
    for values, truth in ((found["scale"], scale), (found["effects"], effects)):
        mean = weights @ truth
        deviation = (weights @ (truth - mean) ** 2).sqrt()
        assert bool(((values.mean(0) - mean).abs() < within * deviation).all())
        assert bool(((values.std(0) / deviation - 1).abs() < within).all())


def coin(y):
    side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("weights", dist.Normal(torch.zeros(2), torch.where(side > 0, 1.0, 0.1)).to_event(1))


def coin_guide(y):
    pyro.sample("side", dist.Bernoulli(torch.tensor(0.9)))
    pyro.sample("weights", dist.Normal(torch.tensor([0.3, 0.5]), 0.05).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_discrete_parent_is_noticed(seed):
    """Two draws of it coincide most of the time."""
    with pytest.raises(ValueError, match="'weights' that depends on 'side'"):
        reduce(coin, coin_guide, {"weights": dist.Normal(0.0, 0.3)}, Y0, seed=seed)
    plan = reduce(
        coin,
        coin_guide,
        {"weights": dist.Normal(0.0, 0.3)},
        Y0,
        dependent_priors="average",
        draws=2000,
        seed=seed,
    )
    q, reduced = dist.Normal(torch.tensor([0.3, 0.5]), 0.05), dist.Normal(0.0, 0.3)
    given = [float(log_evidence_change(q, dist.Normal(0.0, width), reduced).sum()) for width in (1.0, 0.1)]
    truth = math.log(0.9 * math.exp(given[0]) + 0.1 * math.exp(given[1]))
    assert plan.sites.log_evidence_change[0] == pytest.approx(truth, abs=4.5 * plan.sites.standard_error[0])


def test_one_entry_of_a_discrete_vector_is_noticed():
    def model(y):
        side = pyro.sample("side", dist.Bernoulli(torch.full((10,), 0.5)).to_event(1))
        pyro.sample("weight", dist.Normal(0.0, 1 + 9 * side[0]))

    def guide(y):
        pyro.sample("side", dist.Bernoulli(torch.full((10,), 0.02)).to_event(1))
        pyro.sample("weight", dist.Normal(1.0, 0.5))

    for seed in range(6):
        with pytest.raises(ValueError, match="'weight' that depends on 'side'"):
            reduce(model, guide, {"weight": dist.Normal(0.0, 0.7)}, Y0, seed=seed)


def test_one_value_of_several_is_noticed():
    scales = torch.tensor([1.0, 1.0, 5.0])

    def model(y):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        pyro.sample("weight", dist.Normal(0.0, scales[kind]))

    def guide(y):
        pyro.sample("kind", dist.Categorical(torch.tensor([0.6, 0.39, 0.01])))
        pyro.sample("weight", dist.Normal(1.0, 0.5))

    reduced = {"weight": dist.Normal(0.0, 0.7), "kind": dist.Categorical(torch.tensor([0.9, 0.05, 0.05]))}
    for seed in range(6):
        with pytest.raises(NotImplementedError, match=r"'weight' can't be reduced together with \['kind'\]"):
            reduce(
                model, guide, reduced, Y0, seed=seed, dependent_priors="average", draws=100,
                groups={"both": {"weight": ..., "kind": ...}},
            )  # fmt: skip


@pytest.mark.parametrize("dependent_priors", ["raise", "average"])
def test_a_parent_that_only_the_model_has(dependent_priors):
    """Its draws would be of its prior, not of its posterior."""

    def model(y):
        side = pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("weight", dist.Normal(0.0, 1 + 9 * side))

    def guide(y):
        pyro.sample("weight", dist.Normal(1.0, 0.5))

    with pytest.raises(
        ValueError, match="depends on 'side', of which the guide has no posterior: sum it out"
    ):
        reduce(model, guide, {"weight": 0.0}, Y0, dependent_priors=dependent_priors)


def test_a_site_that_is_not_in_every_call():
    def model(y):
        if pyro.sample("side", dist.Bernoulli(0.5)) > 0:
            pyro.sample("weight", dist.Normal(0.0, 1.0))

    def guide(y):
        if pyro.sample("side", dist.Bernoulli(0.5)) > 0:
            pyro.sample("weight", dist.Normal(0.0, 0.5))

    with pytest.raises(ValueError, match=r"'weight' must be sampled in each call|none of .'weight'"):
        reduce(model, guide, {"weight": 0.0}, Y0)


@SIZES
@pytest.mark.slow
def test_what_is_correlated_with_a_parent_is_averaged_along(draws, drawn, within):
    """AutoGuideList: the scale and another site in one joint normal, the site whose prior has that scale in another."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("effects", dist.Normal(torch.zeros(2), scale).to_event(1))
        pyro.sample("friend", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["scale", "friend"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["effects"]), init_scale=0.3))
    guide(Y0)
    covariance = torch.tensor([[0.25, 0.2, 0.05], [0.2, 0.25, 0.05], [0.05, 0.05, 0.2]])
    factor = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        guide[0].loc.copy_(torch.tensor([1.0, 0.6, 0.0]))
        guide[0].scale = factor.diagonal().clone()
        guide[0].scale_tril = factor / factor.diagonal().unsqueeze(-1)
        guide[1].locs.effects.copy_(torch.tensor([1.0, -0.5]))
    reduced = {"effects": dist.Normal(0.0, 0.5), "friend": dist.Normal(0.0, 0.4)}
    plan = reduce(
        model, guide, reduced, Y0, dependent_priors="average", prior_log_odds=99.0, draws=draws,
        groups={"all": {"effects": ..., "friend": ...}},
    )  # fmt: skip
    z = dist.MultivariateNormal(torch.tensor([1.0, 0.6, 0.0]), covariance).sample((400_000,)).double()
    effects = dist.Normal(torch.tensor([1.0, -0.5]), 0.3).sample((400_000,)).double()
    scale, friend = z[:, 0].exp(), z[:, 1:]
    ratio = (
        reduced["effects"].log_prob(effects) - dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(effects)
    ).sum(-1)
    ratio = ratio + (reduced["friend"].log_prob(friend) - dist.Normal(0.0, 1.0).log_prob(friend)).sum(-1)
    truth = float(ratio.logsumexp(0)) - math.log(len(z))
    assert truth == pytest.approx(1.743, abs=0.02)
    assert abs(plan.groups.log_evidence_change[0] - truth) < 4.5 * plan.groups.standard_error[0] + 0.02
    weights = ratio.softmax(0)
    found = plan.reduced_posterior().draw(drawn, Y0)
    for values, wanted in ((found["scale"].log(), scale.log()), (found["friend"], friend)):
        mean = weights @ wanted
        deviation = (weights @ (wanted - mean) ** 2).sqrt()
        assert bool(((values.mean(0) - mean).abs() < within * deviation).all())


def test_the_support_is_checked_under_dependent_priors_too():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("weight", dist.HalfCauchy(scale))

    guide = AutoNormal(model)
    guide(Y0)
    with pytest.raises(ValueError, match=r"'weight'.*within the support of the posterior"):
        reduce(model, guide, {"weight": dist.Normal(0.0, 0.5)}, Y0, dependent_priors="average", draws=100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow)])
def test_averaged_without_a_closed_form_there_is_a_reduced_posterior(kind):
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("weights", dist.Laplace(torch.zeros(2), scale).to_event(1))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    guide = kind(model, init_scale=0.3)
    guide(Y0)
    reduced = {"weights": dist.Normal(0.0, 0.4), "other": 0.0}
    plan = reduce(model, guide, reduced, Y0, dependent_priors="average", draws=1000, prior_log_odds=99.0)
    if kind is AutoNormal:  # independent blocks: one a point, the other weighted draws
        values = plan.reduced_posterior().draw(300, Y0)
        assert float(values["other"].abs().max()) == 0
        assert float(values["weights"].std()) < 0.3
    alone = {"weights": reduced["weights"]}
    plan = reduce(model, guide, alone, Y0, dependent_priors="average", draws=1000, prior_log_odds=99.0)
    before = torch.stack([guide(Y0)["weights"].detach() for _ in range(300)])
    after = plan.reduced_posterior().draw(300, Y0)["weights"]
    assert float(after.square().mean()) < float(before.square().mean())  # nearer to 0 than without


def with_offset(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        effects = pyro.sample("effects", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(offset + effects, 0.5), obs=y)


@pytest.mark.slow
@SIZES
def test_what_is_correlated_with_an_averaged_site_is_averaged_with_it(draws, drawn, within):
    """scale, offset and effects share one joint normal: ΔF of offset and an effect is no sum of two."""
    guide = AutoMultivariateNormal(with_offset, init_scale=0.25)
    guide(YH)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.6, 0.3, 0.05, 0.6, -0.2]))
        guide.scale_tril = torch.eye(5) + torch.tril(torch.full((5, 5), -0.6), -1)
    reduced = {"effects": dist.Normal(0.0, 0.3), "offset": dist.Normal(0.0, 0.15)}
    plan = reduce(
        with_offset, guide, reduced, YH, dependent_priors="average", draws=draws, prior_log_odds=99.0,
        groups={"both": {"effects": 0, "offset": ...}},
    )  # fmt: skip
    z = guide.get_posterior().sample((400_000,)).detach().double()
    scale, offset, effects = z[:, 0].exp(), z[:, 1], z[:, 2:]
    ratio = reduced["offset"].log_prob(offset) - dist.Normal(0.0, 1.0).log_prob(offset)
    each = reduced["effects"].log_prob(effects) - dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(effects)
    truth = float((ratio + each[:, 0]).logsumexp(0)) - math.log(len(z))
    apart = plan.sites.log_evidence_change[1] + plan.table.log_evidence_change[0]
    assert abs(plan.groups.log_evidence_change[0] - truth) < 4.5 * plan.groups.standard_error[0] + 0.01
    assert abs(apart - truth) > 0.07
    weights = (ratio + each.sum(-1)).softmax(0)
    found = plan.reduced_posterior().draw(drawn, YH)
    for values, wanted in ((found["offset"], offset), (found["effects"], effects), (found["scale"], scale)):
        mean = weights @ wanted.float().double()
        deviation = (weights @ (wanted - mean) ** 2).sqrt()
        assert bool(((values.mean(0) - mean).abs() < within * deviation).all())
        assert bool(((values.std(0) / deviation - 1).abs() < within).all())


def test_dependent_priors_raise_unless_asked():
    with pytest.raises(
        ValueError, match=r"prior of 'effects' that depends on 'scale': pass dependent_priors='average'"
    ):
        reduce(hierarchy, hierarchy_guide(False), {"effects": 0.0}, YH)
    plan = reduce(hierarchy, hierarchy_guide(False), {"scale": dist.LogNormal(0.0, 0.3)}, YH)
    assert plan.table.standard_error.max() == 0
    with pytest.raises(NotImplementedError, match=r"'effects' can't be reduced together with \['scale'\]"):
        reduce(
            hierarchy, hierarchy_guide(False), {"effects": 0.0, "scale": 1.0}, YH,
            dependent_priors="average", draws=100, groups={"all": {"effects": ..., "scale": ...}},
        )  # fmt: skip
