"""Estimates of ΔF from draws: right, honest about their error, and refused where they would be wrong."""

from __future__ import annotations

import math
import warnings

import pyro.distributions as dist
import pytest
import torch

from pyro_bmrs import ImportanceError, LogUniform, TruncatedLogNormal, log_evidence_change
from pyro_bmrs.evidence import estimate_log_evidence_change, estimate_log_mean
from pyro_bmrs.evidence.importance import UnreliableEstimateWarning, khat_threshold


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


NORMAL = dist.Normal(t(0.5), t(0.4)), dist.Normal(t(0.0), t(1.0)), dist.Normal(t(0.2), t(0.6))


def test_the_error_is_as_large_as_said():
    """300 runs of 1,000 draws: 95 % intervals cover at least 90 % (a false alarm in 10,000), and not all."""
    exact = log_evidence_change(*NORMAL)
    z = []
    for seed in range(300):
        found = estimate_log_evidence_change(*NORMAL, draws=1000, seed=seed)
        z.append(float((found.estimate - exact) / found.standard_error))
    covered = sum(abs(value) < 1.96 for value in z) / len(z)
    assert 0.90 < covered < 1.0
    assert abs(sum(z) / len(z)) < 4.5 / math.sqrt(300)  # unbiased; a false alarm in 100,000


@pytest.mark.parametrize(("draws", "width"), [(4000, 0.01), (2000, 0.02), (4000, 0.05)])
def test_the_error_of_narrow_reductions(draws, width):
    """So few draws carry weight that a Pareto law fitted to the tail would be wrong: 95 % intervals of 150 runs."""
    q, p, reduced = dist.Normal(t(0.3), t(0.5)), dist.Normal(t(0.0), t(1.0)), dist.Normal(t(0.0), t(width))
    exact, z = log_evidence_change(q, p, reduced), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        for seed in range(150):
            found = estimate_log_evidence_change(q, p, reduced, draws=draws, seed=seed)
            z.append(float((found.estimate - exact) / found.standard_error))
    assert sum(abs(value) < 1.96 for value in z) / len(z) > 0.88  # a false alarm in 10,000


def test_hidden_elements_don_t_count():
    q, p, reduced = dist.Normal(torch.zeros(2), 0.5), dist.Normal(torch.zeros(2), 1.0), dist.Normal(0.0, 0.5)
    hidden = p.mask(torch.tensor([True, False]))
    found = estimate_log_evidence_change(q, hidden, reduced)
    assert float(found.estimate[1]) == 0
    assert float(found.estimate[0]) == pytest.approx(float(log_evidence_change(q, p, reduced)[0]), abs=0.05)
    together = estimate_log_evidence_change(
        q.to_event(1), hidden.to_event(1), reduced.expand([2]).to_event(1)
    )
    assert float(together.estimate) == pytest.approx(float(found.estimate[0]), abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (200, 3), (1, 3)])
def test_expanded_elements_are_estimated_alike(shape):
    q = dist.ExpandedDistribution(dist.Normal(torch.tensor([0.0, 0.5, 1.0]), 0.5), torch.Size(shape))
    p, reduced = dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.5)
    found = estimate_log_evidence_change(q, p, reduced, draws=200)
    assert found.estimate.shape == shape
    single = estimate_log_evidence_change(q.base_dist, p, reduced, draws=200)
    torch.testing.assert_close(found.estimate, single.estimate.expand(shape), rtol=1e-12, atol=1e-14)
    wrapped = [law.to_event(1) for law in (q, p.expand(shape), reduced.expand(shape))]
    whole = estimate_log_evidence_change(*wrapped, draws=2000)
    assert whole.estimate.shape == shape[:1]
    hidden = q.mask(torch.tensor([True, True, False]))
    assert float(estimate_log_evidence_change(hidden, p, reduced, draws=200).estimate[0, 2]) == 0


def test_a_posterior_that_reaches_outside_the_prior():
    """Where the reduced prior has no mass either, its draws weigh nothing."""
    q, p, reduced = dist.Normal(t(1.0), t(0.7)), dist.Gamma(*t(2.0, 1.0)), dist.Gamma(*t(3.0, 2.0))
    found = estimate_log_evidence_change(q, p, reduced)
    grid = torch.linspace(1e-6, 8.0, 200_001, dtype=torch.float64)
    density = (q.log_prob(grid) + reduced.log_prob(grid) - p.log_prob(grid)).exp()
    truth = float(torch.trapezoid(density, grid).log())
    assert abs(float(found.estimate) - truth) < 4.5 * float(found.standard_error)


def test_discrete_laws():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_log_evidence_change(dist.Poisson(t(3.0)), dist.Poisson(t(1.5)), dist.Poisson(t(2.0)))
    exact = log_evidence_change(dist.Poisson(t(3.0)), dist.Poisson(t(1.5)), dist.Poisson(t(2.0)))
    assert abs(float(found.estimate - exact)) < 4.5 * float(found.standard_error)


def khat(scale: float, dimensions: int, draws: int, seed: int) -> float:
    """k̂ of log weights log p - log q, p standard normal and q `scale` times as wide."""
    torch.manual_seed(seed)
    x = scale * torch.randn(draws, dimensions, dtype=torch.float64)
    log_p = -0.5 * x.square().sum(-1)
    log_q = -0.5 * (x / scale).square().sum(-1) - dimensions * math.log(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        return float(estimate_log_mean(log_p - log_q).khat)


def test_khat_has_its_sign_the_right_way_round():
    """Theory: 1 - scale². In 20 runs each of 4,000 draws none was on the wrong side; the wrong sign swaps them."""
    assert all(khat(0.9, 5, 4000, seed) < 0.5 for seed in range(20))
    assert all(khat(1 / 3, 5, 4000, seed) > 0.7 for seed in range(20))
    assert all(khat(1.5, 5, 4000, seed) < 0.1 for seed in range(20))  # too wide: bounded weights


def test_equal_weights_are_perfect():
    q, p, _ = NORMAL
    found = estimate_log_evidence_change(q, p, p)
    assert float(found.estimate) == pytest.approx(0, abs=1e-12)
    assert float(found.standard_error) < 1e-12
    assert float(found.khat) == -math.inf
    assert bool(found.reliable)
    same = estimate_log_mean(torch.full((400,), 2.0))
    assert float(same.estimate) == pytest.approx(2.0)
    assert float(same.effective_sample_size) == pytest.approx(400)
    # equal but for rounding: what an exact posterior gives
    noisy = estimate_log_mean(1e-12 * torch.randn(4000, dtype=torch.float64) - 3.0)
    assert float(noisy.khat) == -math.inf
    assert float(noisy.estimate) == pytest.approx(-3.0)


def test_weights_of_an_interval_are_zero_or_equal():
    """A reduced prior that is the prior cut to a part: no tail, and less than the error of a share among draws of q."""
    q, p, reduced = (
        TruncatedLogNormal(t(-3.0), t(2.0)),
        LogUniform(*t(-20.0, 0.0)),
        LogUniform(*t(-4.0, -1.0)),
    )
    found = estimate_log_evidence_change(q, p, reduced, draws=4000)
    share = float(q.cdf(t(-1.0).exp()) - q.cdf(t(-4.0).exp()))
    assert float(found.khat) == -math.inf
    assert 0 < float(found.standard_error) < math.sqrt((1 - share) / share / 4000) / 3
    assert abs(float(found.estimate - log_evidence_change(q, p, reduced))) < 4.5 * float(found.standard_error)
    assert float(found.log_weights.exp().sum()) == pytest.approx(1.0)


def test_a_bounded_tail_of_equal_weights():
    weights = torch.cat([t(0.0).expand(3000), torch.linspace(-2, -0.01, 1000, dtype=torch.float64)])
    found = estimate_log_mean(weights)
    assert float(found.khat) == -math.inf
    assert float(found.estimate) == pytest.approx(float(weights.logsumexp(0)) - math.log(4000))


@pytest.mark.parametrize("width", [1e-6, 1e-3])
def test_a_spike_is_estimated_from_its_own_draws(width):
    """The density ratio at its place; to the first order in its width."""
    q, p, _ = NORMAL
    found = estimate_log_evidence_change(q, p, dist.Normal(t(0.3), t(width)))
    ratio = float(q.log_prob(t(0.3)) - p.log_prob(t(0.3)))
    assert float(found.estimate) == pytest.approx(ratio, abs=4.5 * float(found.standard_error) + width**2)
    assert float(found.standard_error) < 0.01
    assert bool(found.reliable)


# posterior, prior, reduced prior with heavier tails, exact ΔF
HEAVY = [
    (dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 1.0), 0.0),
    (dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 0.3), 0.0),
    (dist.Gamma(2.0, 1.0), dist.Gamma(2.0, 1.0), dist.HalfCauchy(1.0), 0.0),
    (dist.Normal(0.0, 0.9), dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 1.0), None),
    (dist.Normal(0.0, 0.6), dist.Normal(0.0, 1.0), dist.StudentT(3.0, 0.0, 1.0), None),
    (dist.Normal(0.0, 0.8), dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0), None),
]


@pytest.mark.parametrize(("q", "p", "reduced", "exact"), HEAVY)
def test_heavier_tails_than_the_priors(q, p, reduced, exact):
    """Exact where the data say nothing. Else at 4.5 standard errors one false alarm in 2,400 runs of 60."""
    if exact is None:
        x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
        density = q.log_prob(x) + reduced.log_prob(x) - p.log_prob(x)
        exact = float(density.logsumexp(0) + math.log(float(x[1] - x[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            found = estimate_log_evidence_change(q, p, reduced, seed=seed)
            assert float(found.standard_error) < 0.005
            assert abs(float(found.estimate) - exact) < 4.5 * float(found.standard_error) + 1e-6


def test_a_reduced_prior_where_the_posterior_has_hardly_any_mass_is_refused():
    q, p, _ = NORMAL
    with pytest.raises(ImportanceError, match="carry weight"):
        estimate_log_evidence_change(q, p, dist.Normal(t(9.0), t(0.2)))


def test_only_the_elements_that_fail_are_named():
    q, p, _ = NORMAL
    with pytest.raises(ImportanceError, match=r"of elements \[1\]"):
        estimate_log_evidence_change(q, p, dist.Normal(t(0.2, 9.0), t(0.6, 0.2)))


@pytest.mark.parametrize(
    ("q", "p", "reduced", "name"),
    [
        (dist.Gamma(2.0, 1.0), dist.Normal(0.0, 3.0), dist.Normal(0.0, 1.0), "posterior"),
        (dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Normal(0.0, 1.0), "prior"),
        (dist.Uniform(0.0, 1.0), dist.Normal(0.0, 3.0), dist.Beta(1.0, 1.0), None),
        (dist.Uniform(0.0, 0.5), dist.Normal(0.0, 3.0), dist.Beta(1.0, 1.0), "posterior"),
        (
            dist.Dirichlet(torch.ones(3)),
            dist.Dirichlet(torch.ones(3)),
            dist.Dirichlet(2 * torch.ones(3)),
            None,
        ),
        (dist.Poisson(3.0), dist.Geometric(0.3), dist.Poisson(2.0), None),
    ],
)
def test_the_reduced_prior_must_lie_within_both_supports(q, p, reduced, name):
    if name is None:
        estimate_log_evidence_change(q, p, reduced)
        return
    with pytest.raises(ValueError, match=f"within the support of the {name}"):
        estimate_log_evidence_change(q, p, reduced)


def test_warned_above_the_threshold():
    """Weights of a Pareto distribution with k = 0.9."""
    torch.manual_seed(0)
    with pytest.warns(UnreliableEstimateWarning, match=r"k̂ is \d\.\d+, above 0\.70"):
        found = estimate_log_mean(-0.9 * torch.rand(4000, dtype=torch.float64).log())
    assert not bool(found.reliable)


def test_the_threshold_grows_with_the_draws():
    assert [round(khat_threshold(draws), 3) for draws in (100, 1000, 2200, 10**6)] == [0.5, 0.667, 0.7, 0.7]


def test_batches_seeds_and_generators():
    q, p, reduced = (
        dist.Normal(torch.zeros(2, 3), 0.5),
        dist.Laplace(0.0, 1.0),
        dist.Normal(torch.zeros(3), 0.8),
    )
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (estimate_log_evidence_change(q, p, reduced, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.estimate.shape == first.khat.shape == first.carrying_draws.shape == (2, 3)
    assert first.log_weights.shape == (4000, 2, 3)
    assert torch.equal(first.estimate, same.estimate)
    assert not torch.equal(first.estimate, other.estimate)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(bad):
    with pytest.raises(ValueError, match="log_weights must be finite"):
        estimate_log_mean(torch.full((200,), bad))


def test_too_few_draws():
    with pytest.raises(ValueError, match=r"draws must be an integer of at least 100: got 1000\.0"):
        estimate_log_evidence_change(*NORMAL, draws=1000.0)
    with pytest.raises(ValueError, match="draws must be an integer of at least 100: got 99"):
        estimate_log_evidence_change(*NORMAL, draws=99)
    with pytest.raises(ImportanceError, match="only 0 of 200"):
        estimate_log_mean(torch.full((200,), -math.inf))
