"""`reduce(model, guide, {site: reduced_prior})` on Pyro programs: closed forms, joint normals, draws, averages."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_files import model_file
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

from pyro_bmrs import ImportanceError, ProgramPlan, log_evidence_change, reduce
from pyro_bmrs.inference.posteriors import UnreadablePosteriorError
from pyro_bmrs.pruning.plan import COLUMNS

regression = model_file("linear_regression")
X, Y = regression.diabetes()


pytestmark = pytest.mark.usefixtures("own_parameters", "no_second_opinion")


def brute_force(posterior_draws, log_prior, log_reduced, mask=...):
    """(log mean of p̃/p over draws, its standard error)."""
    ratio = (log_reduced(posterior_draws) - log_prior(posterior_draws))[:, mask]
    ratio = ratio.flatten(1).sum(1) if ratio.dim() > 1 else ratio
    value = ratio.logsumexp(0) - math.log(len(ratio))
    weights = ratio.softmax(0)
    return float(value), float((weights.square().sum() - 1 / len(ratio)).clamp(min=0).sqrt())


# --- a model with sites of many kinds --------------------------------------------------------------


def varied(y=None):
    pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("cells", 2):
        pyro.sample("rates", dist.Gamma(3.0, 2.0))
    pyro.sample("scales", dist.LogNormal(0.0, 1.0).expand([2, 2]).to_event(2))
    pyro.sample("mixing", dist.Dirichlet(torch.ones(3)))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.3))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


Y0 = torch.tensor(0.0)
PRIORS = {
    "weights": dist.Normal(0.0, 1.0), "rates": dist.Gamma(3.0, 2.0), "scales": dist.LogNormal(0.0, 1.0),
    "mixing": dist.Dirichlet(torch.ones(3)), "vector": dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.3),
}  # fmt: skip
REDUCED = {
    "weights": dist.Normal(0.1, 0.6), "rates": dist.Gamma(4.0, 3.0), "scales": dist.LogNormal(0.1, 0.7),
    "mixing": dist.Dirichlet(torch.tensor([2.0, 2.0, 1.5])),
    "vector": dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
}  # fmt: skip
POINTS = {
    "weights": 0.1, "rates": torch.tensor([1.2, 0.9]), "scales": 1.3, "mixing": torch.tensor([0.3, 0.4, 0.3]),
    "vector": torch.tensor([0.1, -0.1]),
}  # fmt: skip
GUIDES = {
    "AutoNormal": lambda: AutoNormal(varied, init_scale=0.3),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(varied, init_scale=0.3),
    "AutoMultivariateNormal": lambda: correlated(AutoMultivariateNormal(varied, init_scale=0.3)),
    "AutoLowRankMultivariateNormal": lambda: correlated(
        AutoLowRankMultivariateNormal(varied, init_scale=0.2, rank=3)
    ),
}


def correlated(guide):
    guide(Y0)
    with torch.no_grad():
        if isinstance(guide, AutoMultivariateNormal):
            factor = torch.tril(0.5 * torch.randn(guide.latent_dim, guide.latent_dim), -1)
            guide.scale_tril = torch.eye(guide.latent_dim) + factor
            guide.scale = 0.25 * torch.ones(guide.latent_dim) / (1 + factor.square().sum(-1)).sqrt()
        else:
            guide.cov_factor = nn.Parameter(0.7 * torch.randn_like(guide.cov_factor))
        guide.loc += 0.1 * torch.randn(guide.latent_dim)
    return guide


def draws_of(guide, count=60_000):
    """Draws of the guide, all at once, by its unconstrained values."""
    values = {}
    with torch.no_grad():
        latent = None if isinstance(guide, AutoNormal) else guide.get_posterior().sample((count,))
        start = 0
        for name in PRIORS:
            node = guide.prototype_trace.nodes[name]
            transform = torch.distributions.biject_to(node["fn"].support)
            if latent is None:
                loc, scale = guide._get_loc_and_scale(name)
                values[name] = transform(loc + scale * torch.randn(count, *loc.shape))
                continue
            shape = guide._unconstrained_shapes[name]
            size = math.prod(shape)
            values[name] = transform(latent[:, start : start + size].reshape(count, *shape))
            start += size
    return values


@pytest.mark.parametrize("kind", GUIDES)
def test_every_site_against_brute_force(kind):
    """Per element and per site; 4.5 standard errors of both estimates, some 100 of them: one false alarm in 1,500."""
    guide = GUIDES[kind]()
    guide(Y0)
    plan = reduce(varied, guide, REDUCED, Y0, draws=10_000)
    drawn = draws_of(guide)
    for name, rows in plan.table.groupby("layer", sort=False):
        values = drawn[name]
        for row in rows.itertuples():
            shape = values.shape[1:] if name not in ("mixing", "vector") else values.shape[1:-1]
            mask = torch.zeros(shape, dtype=torch.bool)
            mask.view(-1)[row.unit] = True
            wanted, error = brute_force(values, PRIORS[name].log_prob, REDUCED[name].log_prob, mask)
            allowed = 4.5 * math.hypot(error, row.standard_error) + 1e-3
            assert abs(row.log_evidence_change - wanted) < allowed, (name, row.unit)
        wanted, error = brute_force(values, PRIORS[name].log_prob, REDUCED[name].log_prob)
        (site,) = plan.sites[plan.sites.site == name].itertuples()
        assert abs(site.log_evidence_change - wanted) < 4.5 * math.hypot(error, site.standard_error) + 1e-3, (
            name
        )


@pytest.mark.parametrize("kind", GUIDES)
def test_points_against_the_density_of_the_guide(kind):
    """Savage-Dickey, Jacobians included: normal densities of unconstrained values, taken apart by hand."""
    guide = GUIDES[kind]()
    guide(Y0)
    plan = reduce(varied, guide, POINTS, Y0)
    assert float(plan.table.standard_error.abs().max()) == 0
    for name in PRIORS:
        whole = torch.as_tensor(POINTS[name]).expand(guide.prototype_trace.nodes[name]["value"].shape)
        transform = torch.distributions.biject_to(guide.prototype_trace.nodes[name]["fn"].support)
        z = transform.inv(whole)
        jacobian = transform.inv.log_abs_det_jacobian(whole, z).sum()
        loc, covariance = normal_of(guide, name)
        log_q = dist.MultivariateNormal(loc, covariance).log_prob(z.flatten()) + jacobian
        log_p = PRIORS[name].log_prob(whole).sum()
        (site,) = plan.sites[plan.sites.site == name].itertuples()
        assert site.log_evidence_change == pytest.approx(float(log_q - log_p), abs=1e-4), name
        if name in ("weights", "rates", "scales"):  # elements of one number each
            for row in plan.table[plan.table.layer == name].itertuples():
                k = row.unit
                own = dist.Normal(loc[k], covariance[k, k].sqrt()).log_prob(z.flatten()[k])
                slope = 0.0 if name == "weights" else -float(whole.flatten()[k].log())
                wanted = float(own) + slope - float(PRIORS[name].log_prob(whole.flatten()[k]))
                assert row.log_evidence_change == pytest.approx(wanted, abs=1e-4), (name, k)


def normal_of(guide, name):
    """Mean and covariance of a site's unconstrained value."""
    with torch.no_grad():
        if isinstance(guide, AutoNormal):
            loc, scale = guide._get_loc_and_scale(name)
            return loc.flatten(), torch.diag(scale.flatten() ** 2)
        posterior, start = guide.get_posterior(), 0
        for other, shape in guide._unconstrained_shapes.items():
            if other == name:
                break
            start += math.prod(shape)
        own = slice(start, start + math.prod(guide._unconstrained_shapes[name]))
        if isinstance(guide, AutoDiagonalNormal):
            return posterior.mean[own], torch.diag(posterior.variance[own])
        return posterior.mean[own], posterior.covariance_matrix[own, own]


def test_joint_points_include_correlations():
    guide = GUIDES["AutoMultivariateNormal"]()
    plan = reduce(varied, guide, POINTS, Y0, groups={"both": {"weights": [0, 2], "rates": ...}})
    # the density of unconstrained values at the point, with the Jacobian of exp
    posterior = guide.get_posterior()
    own = torch.tensor([0, 2, 3, 4])
    z = torch.cat([torch.tensor([0.1, 0.1]), POINTS["rates"].log()])
    marginal = dist.MultivariateNormal(posterior.loc[own], posterior.covariance_matrix[own][:, own])
    log_q = marginal.log_prob(z) - POINTS["rates"].log().sum()
    log_p = (
        PRIORS["weights"].log_prob(torch.tensor(0.1)) * 2 + PRIORS["rates"].log_prob(POINTS["rates"]).sum()
    )
    assert float(plan.groups.log_evidence_change[0]) == pytest.approx(float(log_q - log_p), abs=1e-4)
    assert plan.groups.elements.tolist() == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draws", "within"), [(500, 0.25), pytest.param(1500, 0.2, marks=pytest.mark.slow)], ids=["fewer", "many"]
)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (number % 2)) for number, kind in enumerate(GUIDES)],
)
def test_the_reduced_posterior_of_each_kind(kind, draws, within):
    """Weighted draws of the guide are the truth; means and standard deviations of draws.

    The mean of 500 errs by 0.045 standard deviations: 0.25 are 4.5 of these and 0.05 for the weights' own error.
    """
    guide = GUIDES[kind]()
    guide(Y0)
    drawn = draws_of(guide)
    for name in ("weights", "rates", "mixing"):
        plan = reduce(varied, guide, {name: REDUCED[name]}, Y0, prior_log_odds=50.0)
        assert bool(plan.table.removed.all())
        found = plan.reduced_posterior().draw(draws, Y0)
        assert set(found) == set(PRIORS)
        ratio = REDUCED[name].log_prob(drawn[name]) - PRIORS[name].log_prob(drawn[name])
        ratio = ratio.reshape(len(ratio), -1).sum(1)
        weights = ratio.softmax(0)
        for site, values in found.items():
            assert values.dtype == torch.float32
            truth = drawn[site].flatten(1)
            values = values.flatten(1)
            mean = weights @ truth
            deviation = (weights @ (truth - mean) ** 2).sqrt()
            error = (values.mean(0) - mean).abs()
            assert bool((error < within * deviation).all()), (name, site)
            assert bool(((values.std(0) / deviation - 1).abs() < within).all()), (name, site)


def test_another_threshold():
    """A plan of latents has no floor: what is better reduced goes, to the last element."""
    guide = GUIDES["AutoNormal"]()
    guide(Y0)
    plan = reduce(varied, guide, {"rates": dist.Gamma(4.0, 3.0), "scales": 1.0}, Y0, draws=1000)
    assert plan.at(0.0).table.equals(plan.table)
    assert "floor" not in str(plan.at(-99.0))
    assert plan.at(-99.0).table.removed.all()
    with pytest.raises(
        ValueError, match="min_kept and round_to are for structures of a network: got 3 and None"
    ):
        reduce(varied, guide, {"scales": 1.0}, Y0, min_kept=3)


def test_only_the_chosen_elements_are_reduced():
    guide = GUIDES["AutoDiagonalNormal"]()
    guide(Y0)
    with torch.no_grad():
        guide.loc[:3] = torch.tensor([0.0, 3.0, 0.05])
    plan = reduce(varied, guide, {"weights": 0.0}, Y0)
    assert plan.kept == {"weights": [1]}
    values = plan.reduced_posterior().draw(200, Y0)["weights"]
    assert float(values[:, [0, 2]].abs().max()) == 0
    assert float(values[:, 1].mean()) == pytest.approx(3.0, abs=0.1)
    assert float(plan.joint_evidence().log_evidence_change) == pytest.approx(
        plan.table.log_evidence_change[[0, 2]].sum()
    )
    none = plan.at(1e9)
    assert float(none.joint_evidence().log_evidence_change) == 0
    assert float(none.reduced_posterior().draw(50, Y0)["weights"][:, 0].std()) > 0.1


# --- linear regression: all is known ----------------------------------------------------------------


def test_a_single_weight_and_the_table():
    plan = reduce(regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y)
    full = regression.log_evidence(X, Y)
    exact = [regression.log_evidence(X[:, [j for j in range(10) if j != k]], Y) - full for k in range(10)]
    assert plan.table.log_evidence_change.tolist() == pytest.approx(exact, abs=1e-9)
    assert plan.table.columns.tolist()[: len(COLUMNS)] == COLUMNS
    assert plan.table.unit.tolist() == list(range(10))
    assert (plan.table.score >= 0).equals(plan.table.removed)
    mean, covariance = regression.exact_posterior(X, Y)
    assert plan.table["mean"].tolist() == pytest.approx(mean.tolist())
    assert plan.table.scale.tolist() == pytest.approx(covariance.diagonal().sqrt().tolist())
    assert "ΔF of site weights as a whole: -208.4 nats" in str(plan)


def test_the_reduced_posterior_is_that_of_a_new_fit():
    """Friston & Penny: what is left moves, and is exactly the posterior of the smaller regression."""
    plan = reduce(regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y)
    kept = ~torch.tensor(plan.table.removed.to_numpy())
    mean, covariance = regression.exact_posterior(X[:, kept], Y)
    (part,) = plan.reduced_posterior().parts
    eye = torch.eye(part.noise_size, dtype=torch.float64)
    loc = part.unconstrained(torch.zeros(part.noise_size, dtype=torch.float64))
    factor = (part.unconstrained(eye) - loc).T  # a draw is loc + factor ε
    torch.testing.assert_close(loc[kept], mean)
    torch.testing.assert_close((factor @ factor.T)[kept][:, kept], covariance)
    assert float(loc[~kept].abs().max()) == 0
    assert float(factor[~kept].abs().max()) == 0
    predicted = Predictive(regression.model, guide=plan.reduced_posterior(), num_samples=200)(X)["y"]
    assert predicted.shape == (200, 442)
    torch.testing.assert_close(predicted.mean(0), X[:, kept] @ mean, atol=0.25, rtol=0)


def test_narrower_priors_and_log_odds():
    guide = regression.posterior(X, Y)
    plan = reduce(regression.model, guide, {"weights": dist.Normal(0.0, 0.1)}, X, Y, prior_log_odds=-1.0)
    assert (plan.table.score - plan.table.log_evidence_change).tolist() == pytest.approx([-1.0] * 10)
    exact = log_evidence_change(
        guide.get_posterior(),
        dist.Normal(torch.zeros(10), 0.5).to_event(1),
        dist.Normal(torch.zeros(10), 0.1).to_event(1),
    )
    assert plan.sites.log_evidence_change[0] == pytest.approx(float(exact), abs=1e-6)


def test_nothing_notices_being_looked_at():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(10)

        def forward(self, x, y=None):
            return regression.model(self.batch_norm(x.float()).double(), y)

    model = Net().train()
    guide = AutoNormal(model)
    guide(X, Y)
    pyro.param("untouched", torch.tensor(1.0))
    before = torch.get_rng_state(), model.batch_norm.running_mean.clone(), set(pyro.get_param_store())
    plan = reduce(model, guide, {"weights": dist.Laplace(torch.tensor(0.0), 0.3)}, X, Y)
    plan.joint_evidence()
    plan.reduced_posterior()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(model.batch_norm.running_mean, before[1])
    assert set(pyro.get_param_store()) == before[2]
    assert model.training
    assert model.batch_norm.training


def test_a_hand_written_guide_keeps_its_trained_parameters():
    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros(10, dtype=torch.float64))
        pyro.sample("weights", dist.Normal(loc, 0.1).to_event(1))

    guide(X, Y)
    pyro.get_param_store()["loc"] = torch.arange(10.0, dtype=torch.float64)
    plan = reduce(regression.model, guide, {"weights": 0.0}, X, Y)
    assert plan.table["loc"].tolist() == list(range(10))


# --- sites of every kind of shape ----------------------------------------------------------------------


def test_a_site_of_one_number_in_a_joint_normal():
    def model(y):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    guide = AutoMultivariateNormal(model, init_scale=0.3)
    guide(Y0)
    plan = reduce(model, guide, {"a": 0.2, "b": dist.LogNormal(0.0, 0.5)}, Y0, prior_log_odds=9.0)
    assert plan.table.unit.tolist() == [0, 0]
    assert plan.reduced_posterior().draw(5, Y0)["b"].shape == (5,)


def test_a_categorical_site():
    def model(y):
        pyro.sample("kind", dist.Categorical(torch.ones(3)))

    def guide(y):
        pyro.sample("kind", dist.Categorical(torch.tensor([0.7, 0.2, 0.1])))

    plan = reduce(
        model, guide, {"kind": dist.Categorical(torch.tensor([0.1, 0.1, 0.8]))}, Y0, prior_log_odds=9.0
    )
    assert plan.sites.log_evidence_change[0] == pytest.approx(math.log(3 * (0.07 + 0.02 + 0.08)), abs=1e-6)
    values = plan.reduced_posterior().draw(400, Y0)["kind"]
    assert values.dtype == torch.long
    assert float((values == 2).float().mean()) == pytest.approx(0.08 / 0.17, abs=0.12)


def test_masked_elements_are_not_in_the_model():
    def model(y):
        pyro.sample(
            "weights", dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
        )
        with pyro.poutine.mask(mask=torch.tensor([False, True])), pyro.plate("plate", 2):
            pyro.sample("others", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    guide(Y0)
    plan = reduce(model, guide, {"weights": dist.Normal(0.0, 0.3), "others": dist.Normal(0.0, 0.3)}, Y0)
    assert plan.table.removed_in_fit.tolist() == [False, True, False, True, False]
    assert (plan.table.log_evidence_change == 0).tolist() == [False, True, False, True, False]
    assert plan.sites.elements.tolist() == [2, 1]


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_one_by_one_and_at_once(kind, parallel):
    def model(y=None):
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("plate", 2):
            b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a.sum(-1) + b, 0.1), obs=y)

    guide = kind(model, init_scale=0.3)
    guide(torch.zeros(2))
    for criterion in (
        {"a": 0.0},
        {"b": dist.Gamma(torch.tensor(3.0), 2.0)},
        {"a": dist.Normal(0.0, 0.2), "b": 1.0},
    ):
        plan = reduce(model, guide, criterion, torch.zeros(2), prior_log_odds=99.0)
        predictive = Predictive(model, guide=plan.reduced_posterior(), num_samples=7, parallel=parallel)
        samples = predictive()
        assert samples["y"].reshape(7, 2).shape == (7, 2)
        assert len(torch.unique(samples["y"])) == 14


# --- on disk, and what is refused ------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    guide = GUIDES["AutoNormal"]()
    guide(Y0)
    plan = reduce(
        varied, guide, {"weights": dist.Laplace(0.0, 1.0), "rates": dist.Gamma(4.0, 3.0)}, Y0,
        groups={"some": {"weights": 1, "rates": slice(1)}},
    )  # fmt: skip
    path = plan.save(tmp_path / "plan.json")
    loaded = ProgramPlan.load(path)
    assert loaded.table.equals(plan.table)
    assert loaded.sites.equals(plan.sites)
    assert loaded.groups.equals(plan.groups)
    assert str(loaded) == str(plan)
    with pytest.raises(ValueError, match="loaded or unpickled knows no reduced priors"):
        loaded.reduced_posterior()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(criterion={}), ValueError, "at least one site"),
        (dict(criterion={"bias": 0.0}), ValueError, "none of .'bias'"),
        (dict(criterion={"weights": math.nan}), ValueError, "'weights' a finite point: got nan"),
        (dict(guide=None), TypeError, "guide must be a Pyro guide: got NoneType"),
        (dict(criterion={"weights": "zero"}), TypeError, "a distribution or a number.*got str"),
        (dict(criterion={"weights": dist.Normal(torch.zeros(4), 1.0)}), ValueError, r"broadcasts to its shape \(10,\)"),
        (dict(criterion={"weights": dist.Delta(torch.zeros(10), log_density=1.0)}), ValueError, "point of mass one"),
        (dict(args=(X,)), None, ""),
        (dict(args=()), ValueError, "model_args must be what the model is called with: got 0"),
        (dict(dependent_priors="ignore"), ValueError, "'raise' or 'average': got 'ignore'"),
        (dict(draws=10), ValueError, "draws must be an integer of at least 100: got 10"),
        (dict(prior_log_odds=math.nan), ValueError, "prior_log_odds must be a finite number"),
        (dict(groups=["a"]), TypeError, "groups must map names to"),
        (dict(groups={"a": {"weights": True}}), ValueError, "must give numbers below 10"),
        (dict(seed="x"), ValueError, "seed must be an integer of at least 0: got 'x'"),
        (dict(groups={"a": [0]}), TypeError, "groups must map 'a' to a mapping of sites"),
        (dict(groups={"a": {"bias": 0}}), ValueError, r"groups must name sites of \['weights'\]"),
        (dict(groups={"a": {"weights": torch.tensor([0, 1])}}), None, ""),
        (dict(groups={"a": {"weights": [0.9]}}), ValueError, "must give numbers below 10"),
        (dict(groups={"a": {"weights": 10}}), ValueError, "numbers below 10.*'a' has 10"),
        (dict(groups={"a": {"weights": torch.ones(3, dtype=torch.bool)}}), ValueError, r"mask of the shape \(10,\)"),
        (dict(criterion={"weights": dist.Laplace(torch.tensor(0.0), 1e-6)}), ImportanceError, "'weights'.*carry"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, kind, message):
    given = dict(criterion={"weights": 0.0}, args=(X, Y)) | change
    criterion, args = given.pop("criterion"), given.pop("args")
    guide = given.pop("guide", regression.posterior(X, Y))
    if kind is None:
        reduce(regression.model, guide, criterion, *args, **given)
        return
    with pytest.raises(kind, match=message):
        reduce(regression.model, guide, criterion, *args, **given)


def test_the_plan_of_a_program_has_no_network_to_cut():
    plan = reduce(regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y)
    assert isinstance(plan, ProgramPlan)
    assert not hasattr(plan, "apply")


def test_a_guide_that_is_a_point_is_told():
    guide = pyro.infer.autoguide.AutoDelta(regression.model)
    guide(X, Y)
    with pytest.raises(UnreadablePosteriorError, match="is a Delta there"):
        reduce(regression.model, guide, {"weights": 0.0}, X, Y)


# --- laws of their own, and laws that depend on others ------------------------------------------------


def test_a_law_with_a_base_is_no_wrapper():
    """Zero-inflated: the sum over all counts is exact."""
    q, p = dist.Poisson(2.0), dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=torch.tensor(0.7))
    counts = torch.arange(0.0, 60.0, dtype=torch.float64)

    def sites(prior, reduced):
        found = reduce(
            lambda: pyro.sample("n", prior), lambda: pyro.sample("n", q), {"n": reduced}, draws=20_000
        ).sites
        exact = (q.log_prob(counts) + reduced.log_prob(counts) - prior.log_prob(counts)).logsumexp(0)
        return found.log_evidence_change[0], found.standard_error[0], float(exact)

    for prior, reduced in ((p, dist.Poisson(1.0)), (dist.Poisson(3.0), p)):
        change, error, exact = sites(prior, reduced)
        assert 0 < error < 0.05
        assert change == pytest.approx(exact, abs=4 * error)


def test_what_depends_on_a_reduced_site_moves_with_it():
    """q(a) q(b | a) is the exact posterior; under a = 0 the posterior of b is known."""
    covariance = torch.tensor([[101.0, 100.0], [100.0, 101.0]]).inverse()
    loc = covariance @ torch.tensor([200.0, 200.0])
    slope = covariance[0, 1] / covariance[0, 0]

    def model():
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        pyro.sample("y", dist.Normal(a + b, 0.1), obs=torch.tensor(2.0))

    def guide():
        a = pyro.sample("a", dist.Normal(loc[0], covariance[0, 0].sqrt()))
        left = (covariance[1, 1] - slope * covariance[0, 1]).sqrt()
        pyro.sample("b", dist.Normal(loc[1] + slope * (a - loc[0]), left))

    plan = reduce(model, guide, {"a": 0.0}, prior_log_odds=5.0)
    b = plan.reduced_posterior().draw(1000)["b"]
    assert float(b.mean()) == pytest.approx(200 / 101, abs=5 * 101**-0.5 / 1000**0.5)
    assert float(b.std()) == pytest.approx(101**-0.5, rel=0.12)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_a_reduced_prior_may_couple_what_a_plate_holds(kind):
    """Three independent effects, or one that all share: exact for a normal guide."""
    shared = 0.1 * torch.eye(3) + 0.9

    def model():
        with pyro.plate("groups", 3):
            effect = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=torch.tensor([0.3, 0.5, 0.4]))

    guide = kind(model, init_scale=0.7)
    guide()
    plan = reduce(model, guide, {"w": dist.MultivariateNormal(torch.zeros(3), shared)}, prior_log_odds=9.0)
    if kind is AutoMultivariateNormal:
        posterior = dist.MultivariateNormal(guide.loc, scale_tril=guide.scale[:, None] * guide.scale_tril)
    else:
        posterior = dist.MultivariateNormal(guide.locs.w, covariance_matrix=torch.eye(3) * guide.scales.w**2)
    laws = (
        posterior,
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        dist.MultivariateNormal(torch.zeros(3), shared),
    )
    assert plan.sites.log_evidence_change[0] == pytest.approx(float(log_evidence_change(*laws)), abs=1e-5)
    guide_of_reduced = plan.reduced_posterior()
    assert guide_of_reduced.draw(2)["w"].shape == (2, 3)
    for parallel in (False, True):
        found = Predictive(model, guide=guide_of_reduced, num_samples=50, parallel=parallel)()
        assert found["w"].shape == (50, 3)


def test_the_second_opinion_on_a_reduced_prior_that_couples_a_plate(monkeypatch):
    """Its integral is exact: y is normal under both priors."""
    monkeypatch.undo()  # no_second_opinion
    y, shared = torch.tensor([0.3, 0.5, 0.4]), 0.1 * torch.eye(3) + 0.9

    def model():
        with pyro.plate("groups", 3):
            effect = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    def guide():
        with pyro.plate("groups", 3):
            pyro.sample("w", dist.Normal(y / 2, 0.5**0.5))

    plan = reduce(model, guide, {"w": dist.MultivariateNormal(torch.zeros(3), shared)})
    of_y = [
        dist.MultivariateNormal(torch.zeros(3), c + torch.eye(3)).log_prob(y) for c in (shared, torch.eye(3))
    ]
    assert plan.checked is not None
    assert plan.checked.checked[0] == pytest.approx(float(of_y[0] - of_y[1]), abs=0.02)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3,)])
def test_bounds_for_each_element_in_a_joint_normal(shape):
    high = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)

    def model():
        pyro.sample("x", dist.Uniform(torch.zeros(shape), high).to_event(len(shape)))

    joint, apart = (kind(model, init_scale=0.5) for kind in (AutoMultivariateNormal, AutoDiagonalNormal))
    joint()
    apart()
    with torch.no_grad():
        apart.loc.copy_(joint.loc)
    changes = [
        reduce(model, guide, {"x": 0.5}).table.log_evidence_change.to_numpy() for guide in (joint, apart)
    ]
    assert changes[0] == pytest.approx(changes[1], rel=1e-4)


def test_a_point_beside_a_normal_where_a_prior_is_not_normal():
    """ΔF of both by a sum over a grid of w, at the point of s."""

    def model():
        w, s = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(w, s), obs=torch.tensor(0.3))

    guide = AutoMultivariateNormal(model, init_scale=0.4)
    guide()
    guide.loc.data, guide.scale_tril = torch.tensor([0.2, -0.1]), torch.tensor([[1.0, 0.0], [0.6, 1.0]])
    priors = {"w": dist.Normal(0.0, 0.3), "s": 1.0}
    plan = reduce(model, guide, priors, prior_log_odds=9.0, groups={"both": {"w": ..., "s": ...}})
    covariance = 0.4**2 * torch.tensor([[1.0, 0.6], [0.6, 1.36]], dtype=torch.float64)
    q = torch.distributions.MultivariateNormal(torch.tensor([0.2, -0.1], dtype=torch.float64), covariance)
    w = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    log_q = q.log_prob(torch.stack([w, torch.zeros_like(w)], -1))  # log s = 0, where its Jacobian is 1
    ratio = dist.Normal(0.0, 0.3).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w)
    width = float(w[1] - w[0])
    exact = (log_q + ratio).logsumexp(0) + math.log(width) - dist.HalfNormal(1.0).log_prob(torch.tensor(1.0))
    assert plan.groups.log_evidence_change[0] == pytest.approx(float(exact), abs=1e-5)
    drawn = plan.reduced_posterior().draw(500)
    assert bool((drawn["s"] == 1).all())
    weights = (log_q + ratio).softmax(0)
    mean = float((weights * w).sum())
    spread = float((weights * (w - mean) ** 2).sum().sqrt())
    assert float(drawn["w"].mean()) == pytest.approx(mean, abs=5 * spread / 500**0.5)


def test_a_share_below_one_half():
    """A uniform prior of a part of [0, 1] beside a Beta has no closed form here: it is estimated."""

    def model():
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Binomial(10, p), obs=torch.tensor(3.0))

    found = reduce(model, lambda: pyro.sample("p", dist.Beta(4.0, 8.0)), {"p": dist.Uniform(0.0, 0.5)}).sites
    p = torch.linspace(0, 0.5, 100_001, dtype=torch.float64)[1:]
    exact = math.log(2 * float(dist.Beta(4.0, 8.0).log_prob(p).exp().mean()) * 0.5)
    assert 0 < found.standard_error[0] < 0.02
    assert found.log_evidence_change[0] == pytest.approx(exact, abs=4 * found.standard_error[0])


def _vector():
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def _choice():
    pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))


def _guide_of(name, law):
    return lambda: pyro.sample(name, law)


W, K = dist.Normal(torch.zeros(3), 0.5).to_event(1), dist.Categorical(torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("model", "guide", "given", "message"),
    [
        (_vector, W, {"w": dist.Normal(torch.zeros(3), 0.1).mask(torch.arange(3) == 0)}, "without a mask"),
        (_vector, W, {"w": torch.tensor(1j)}, "criterion must give 'w' a finite point: got"),
        (_vector, W, {"w": dist.Bernoulli(0.5)}, "a reduced prior of real numbers, as its prior is: got Bernoulli"),
        (_vector, W, {"w": dist.ImproperUniform(dist.constraints.real, (), ())}, "'w': reduced_prior must be a law"),
        (_vector, dist.Normal(torch.zeros(1), 0.5).to_event(1), {"w": 0.0}, r"in the model, \(3,\): got \(1,\)"),
        (_choice, dist.Categorical(torch.ones(3, 2)), {"k": 1}, r"that it has in the model, \(\): got \(3,\)"),
        (_choice, K, {"k": dist.Categorical(torch.ones(3))}, r"the same number of values: got \[2, 2, 3\]"),
        (_choice, K, {"k": 2}, "must be a point where the posterior has a positive, finite density"),
    ],
)  # fmt: skip
def test_reduced_priors_that_do_not_fit(model, guide, given, message):
    (name,) = given
    with pytest.raises(ValueError, match=message):
        reduce(model, _guide_of(name, guide), given)


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="groups must give elements of 'w': 'g' has none with slice"):
        reduce(_vector, _guide_of("w", W), {"w": 0.0}, groups={"g": {"w": slice(5, 9)}})
