"""ΔF against differences of exact log marginal likelihoods, where those are known."""

from __future__ import annotations

import math
from itertools import product

import pyro.distributions as dist
import pytest
import torch
from model_files import model_file

from pyro_bmrs import log_evidence_change, reduce

regression = model_file("linear_regression")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal_to(change: torch.Tensor, exact: torch.Tensor) -> None:
    assert float((change - exact).abs().max()) < 1e-10, (change, exact)


COUNTS = torch.tensor([3.0, 0, 7, 2, 4, 1, 5, 2, 0, 3], dtype=torch.float64)
SHAPES = [(2.0, 1.0), (0.5, 0.1), (9.0, 3.0), (1.0, 1.0)]


@pytest.mark.parametrize(("prior", "reduced"), list(product(SHAPES, SHAPES)))
def test_gamma_poisson(prior, reduced):
    """p(y) = Γ(a + Σy)/Γ(a) bᵃ/(b + n)^(a + Σy) / Πy!"""

    def log_evidence(shape, rate):
        total, n = float(COUNTS.sum()), len(COUNTS)
        grown = math.lgamma(shape + total) - math.lgamma(shape)
        return grown + shape * math.log(rate) - (shape + total) * math.log(rate + n)

    posterior = dist.Gamma(*t(prior[0] + float(COUNTS.sum()), prior[1] + len(COUNTS)))
    change = log_evidence_change(posterior, dist.Gamma(*t(*prior)), dist.Gamma(*t(*reduced)))
    assert_equal_to(change, t(log_evidence(*reduced) - log_evidence(*prior))[0])


@pytest.mark.parametrize(("prior", "reduced"), list(product(SHAPES, SHAPES)))
def test_beta_bernoulli(prior, reduced):
    """p(y) = B(a + heads, b + tails)/B(a, b)"""
    heads, tails = 31.0, 12.0

    def log_evidence(a, b):
        def log_beta(x, y):
            return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

        return log_beta(a + heads, b + tails) - log_beta(a, b)

    posterior = dist.Beta(*t(prior[0] + heads, prior[1] + tails))
    change = log_evidence_change(posterior, dist.Beta(*t(*prior)), dist.Beta(*t(*reduced)))
    assert_equal_to(change, t(log_evidence(*reduced) - log_evidence(*prior))[0])
    point = log_evidence_change(posterior, dist.Beta(*t(*prior)), dist.Delta(t(0.5)[0]))
    assert_equal_to(point, t((heads + tails) * math.log(0.5) - log_evidence(*prior))[0])


@pytest.mark.parametrize("reduced", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.1, 0.1), (5.0, 1.0, 0.5, 2.0)])
def test_dirichlet_categorical(reduced):
    """p(y) = Γ(Σa)/Γ(Σa + n) Π Γ(aₖ + nₖ)/Γ(aₖ)"""
    counts, prior = t(12.0, 3.0, 0.0, 25.0), t(1.0, 2.0, 0.5, 1.0)

    def log_evidence(a):
        return a.sum().lgamma() - (a + counts).sum().lgamma() + ((a + counts).lgamma() - a.lgamma()).sum()

    change = log_evidence_change(
        dist.Dirichlet(prior + counts), dist.Dirichlet(prior), dist.Dirichlet(t(*reduced))
    )
    assert_equal_to(change, log_evidence(t(*reduced)) - log_evidence(prior))


# --- linear regression with known noise ---------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("empty_store")


X, Y = regression.diabetes()
X = X[:, [0, 1, 2, 3, 4, 5, 6, 8]]
SUBSETS = list(product((False, True), repeat=8))  # what is left out


def exact_changes() -> torch.Tensor:
    full = regression.log_evidence(X, Y)
    return t(*(regression.log_evidence(X[:, ~torch.tensor(gone)], Y) - full for gone in SUBSETS))


def reduced_changes(**posterior) -> torch.Tensor:
    guide = regression.posterior(X, Y, **posterior)
    groups = {str(k): {"weights": torch.tensor(gone)} for k, gone in enumerate(SUBSETS) if any(gone)}
    plan = reduce(regression.model, guide, {"weights": 0.0}, X, Y, groups=groups)
    assert plan.groups.standard_error.max() == 0
    return torch.cat([t(0.0), torch.tensor(plan.groups.log_evidence_change.to_numpy())])


@pytest.mark.slow
def test_the_full_rank_guide_gives_the_exact_evidence_of_every_subset_of_eight():
    assert float((reduced_changes() - exact_changes()).abs().max()) < 1e-6


def test_what_a_mean_field_guide_costs():
    """Figures of docs/evidence.md. Its variances are those given all other weights: too small, and too independent."""
    error = reduced_changes(mean_field=True) - exact_changes()
    assert float(error.abs().max()) == pytest.approx(89.48, abs=0.01)
    assert float(error.abs().median()) == pytest.approx(34.45, abs=0.01)
    # one weight alone: zero looks farther away than it is, by as much as others could stand in for it
    single = error[[k for k, gone in enumerate(SUBSETS) if sum(gone) == 1]]
    assert float(single.min()) == pytest.approx(-65.11, abs=0.01)
    assert float(single.max()) < 0.1
    # several together: it does not know that what one leaves the other can't take
    assert float(error.max()) == pytest.approx(63.88, abs=0.01)
