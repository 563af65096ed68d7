"""Groups of coordinates of a joint normal: any order, any combination, any batch size give the same."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from pyro_bmrs import log_evidence_change
from pyro_bmrs.evidence import joint_normal
from pyro_bmrs.evidence.joint_normal import GroupReduction, all_subsets, as_one, by_themselves, reduce_group
from pyro_bmrs.evidence.normal import multivariate_change, normal_change


def posterior(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, dtype=torch.float64, generator=generator) / n**0.5
    covariance = 0.3 * (root @ root.mT) + 0.05 * torch.eye(n, dtype=torch.float64)
    return torch.randn(n, dtype=torch.float64, generator=generator), covariance


def group(*coordinates: int, width: float = 0.0, at: float = 0.1) -> GroupReduction:
    n = len(coordinates)
    eye = torch.eye(n, dtype=torch.float64)
    loc = torch.full((n,), at, dtype=torch.float64)
    return GroupReduction(torch.tensor(coordinates), loc, width * eye, 0 * loc, 2.0 * eye + 0.5)


def density_group(*coordinates: int) -> GroupReduction:
    """A point under a prior that is known by its density alone: here the normal one, so that both can be compared."""
    same = group(*coordinates)
    density = dist.MultivariateNormal(same.prior_loc, same.prior_covariance).log_prob(same.reduced_loc)
    return GroupReduction(same.coordinates, same.reduced_loc, same.reduced_factor, log_prior_density=density)


SETS = {
    "points": [group(0), group(3), group(5), group(1)],
    "narrow": [group(0, width=0.1), group(3, width=0.3), group(5, width=0.01), group(1, width=1.0)],
    "several each": [group(0, 4), group(3), group(5, 1, 6), group(2, 7)],
    "mixed": [group(0, 4, width=0.2), group(3), group(5, 1, 6), group(2, width=0.5)],
}


@pytest.mark.parametrize("groups", SETS.values(), ids=SETS)
def test_all_ways_to_reduce_agree(groups):
    loc, covariance = posterior(8)
    changes = all_subsets(loc, covariance, groups)
    assert changes.shape == (16,)
    assert float(changes[0]) == 0
    for model in range(1, 16):
        chosen = [member for k, member in enumerate(groups) if model >> k & 1]
        at_once = reduce_group(loc, covariance, as_one(chosen))
        for order in (chosen, chosen[::-1]):
            total, state = 0.0, (loc, covariance)
            for member in order:
                change, *state = reduce_group(*state, member)
                total += float(change)
            assert total == pytest.approx(float(at_once[0]), abs=1e-10)
            torch.testing.assert_close(state[0], at_once[1], atol=1e-10, rtol=0)
            torch.testing.assert_close(state[1], at_once[2], atol=1e-10, rtol=0)
        assert float(changes[model]) == pytest.approx(float(at_once[0]), abs=1e-10)


def test_against_the_dispatch():
    """One group is what log_evidence_change says of its marginal."""
    loc, covariance = posterior(8)
    member = group(5, 1, 6, width=0.3)
    own = member.coordinates
    wanted = log_evidence_change(
        dist.MultivariateNormal(loc[own], covariance[own][:, own]),
        dist.MultivariateNormal(member.prior_loc, member.prior_covariance),
        dist.MultivariateNormal(member.reduced_loc, member.reduced_factor @ member.reduced_factor.mT),
    )
    assert float(reduce_group(loc, covariance, member)[0]) == pytest.approx(float(wanted), abs=1e-12)


def test_a_prior_known_by_its_density_alone():
    loc, covariance = posterior(8)
    known = all_subsets(loc, covariance, [group(0), group(3, 4), group(5)])
    density = all_subsets(loc, covariance, [density_group(0), density_group(3, 4), density_group(5)])
    torch.testing.assert_close(known, density, atol=1e-10, rtol=0)
    mixed, both = as_one([group(0), density_group(3)]), as_one([group(0), group(3)])
    torch.testing.assert_close(reduce_group(loc, covariance, mixed), reduce_group(loc, covariance, both))
    # points first, then what is reduced to a normal
    mixed, both = as_one([group(0, width=0.1), density_group(3)]), as_one([group(0, width=0.1), group(3)])
    torch.testing.assert_close(reduce_group(loc, covariance, mixed), reduce_group(loc, covariance, both))
    trees = [all_subsets(loc, covariance, [one, group(5)]) for one in (mixed, both)]
    torch.testing.assert_close(*trees)
    assert by_themselves([mixed])[1][0].coordinates.tolist() == [0, 1]


@pytest.mark.parametrize("budget", [1, 300, 10**4])
def test_the_tree_may_be_cut_anywhere(monkeypatch, budget):
    loc, covariance = posterior(8)
    groups = SETS["several each"]
    whole = all_subsets(loc, covariance, groups)
    monkeypatch.setattr(joint_normal, "_BUDGET", budget)
    done = []
    torch.testing.assert_close(all_subsets(loc, covariance, groups, done.append), whole, atol=0, rtol=1e-14)
    assert sum(done) == 16


def test_a_million_models():
    """20 groups; time and memory are measured by analysis/diabetes_ranking.py."""
    loc, covariance = posterior(24)
    changes = all_subsets(loc, covariance, [group(k) for k in range(20)])
    assert changes.shape == (2**20,)
    assert bool(torch.isfinite(changes).all())
    some = torch.randint(2**20, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    for model in some:
        chosen = [group(k) for k in range(20) if model >> k & 1]
        wanted = float(reduce_group(loc, covariance, as_one(chosen))[0])
        assert float(changes[model]) == pytest.approx(wanted, abs=1e-8)


mp.dps = 40


def exact_change(q, p, reduced):
    """The formula of the docstring, in 40 digits."""
    (mq, sq), (m0, s0), (m1, s1) = ((mpf(loc), mpf(scale)) for loc, scale in (q, p, reduced))
    precision = sq**-2 + s1**-2 - s0**-2
    mean = (mq / sq**2 + m1 / s1**2 - m0 / s0**2) / precision
    quadratic = ((mean - mq) / sq) ** 2 + ((mean - m1) / s1) ** 2 - ((mean - m0) / s0) ** 2
    return mp.log(s0 / sq / s1) - mp.log(precision) / 2 - quadratic / 2


locations, log_scales = st.floats(-50.0, 50.0), st.floats(-12.0, 3.0)


@settings(max_examples=300, deadline=None)
@given(locations, locations, locations, log_scales, st.floats(0.01, 5.0), log_scales)
def test_one_variable_over_the_box(q_loc, p_loc, reduced_loc, q_log, wider, reduced_log):
    q_scale, reduced_scale = (float(torch.tensor(value).double().exp()) for value in (q_log, reduced_log))
    q, p, reduced = (q_loc, q_scale), (p_loc, q_scale * (1 + wider)), (reduced_loc, reduced_scale)
    found = normal_change(
        *(torch.tensor(value, dtype=torch.float64) for law in (q, p, reduced) for value in law)
    )
    wanted = exact_change(q, p, reduced)
    # relative to the largest quadratic: what the means themselves allow
    size = (
        1
        + ((abs(q_loc) + abs(p_loc) + abs(reduced_loc)) / q_scale) * float(abs(wanted)) ** 0.5
        + float(abs(wanted))
    )
    assert abs(float(found.log_evidence_change) - float(wanted)) <= 1e-13 * size


def test_many_variables_with_a_point_in_some_directions():
    loc, covariance = posterior(3)
    factor = torch.zeros(3, 3, dtype=torch.float64)
    factor[1, 1] = 0.4
    found = multivariate_change(
        loc, covariance, torch.zeros(3).double(), 4 * torch.eye(3).double(), torch.zeros(3).double(), factor
    )
    nearly = factor + 1e-5 * torch.eye(3).double()
    near = multivariate_change(
        loc, covariance, torch.zeros(3).double(), 4 * torch.eye(3).double(), torch.zeros(3).double(), nearly
    )
    torch.testing.assert_close(found.log_evidence_change, near.log_evidence_change, atol=1e-3, rtol=0)
    assert float(found.covariance[0].abs().max()) == 0
    assert float(found.covariance[1, 1]) > 0
