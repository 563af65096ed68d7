"""Goodness of fit of the draws, in the middle and in both tails.

Each of the 26 tests counts 100,000 draws in 40 bins of equal probability, whose edges are quantiles in
150-digit arithmetic, and refuses Pearson's χ² (39 degrees of freedom; 2,500 expected a bin) beyond its
1 - 10⁻⁴/26 quantile. By Bonferroni's inequality a right sampler fails any of them with probability at most
10⁻⁴ in all; the seeds are fixed, so that this is risked once per version of the generator, not at each run.

A scale that is 5 % off shifts the bins by a χ² noncentrality of 490 or more where the scale can be seen at
all (not where the law is flat), against a threshold near 91: the power is above 0.999999, and the last test
holds the test itself to it.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from reference import Law
from scipy.stats import chi2

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

DRAWS, BINS = 100_000, 40
FALSE_ALARM = 1e-4
CASES = {
    "middle": (-3.0, 0.3),
    "at the lower edge": (-20.0, 0.5),
    "below": (-26.0, 1.0),
    "far below": (-40.0, 1.0),
    "above": (4.0, 0.5),
    "far above": (20.0, 0.8),
}
FLAT = {"flat": (-10.0, 148.4)}
DTYPES = [torch.float32, torch.float64]
THRESHOLD = float(chi2.isf(FALSE_ALARM / 26, BINS - 1))


@functools.cache
def edges(loc: float, scale: float) -> torch.Tensor:
    """The 39 inner edges in log θ."""
    law = Law(loc, scale)
    return torch.tensor([float(law.quantile(k / BINS)) for k in range(1, BINS)], dtype=torch.float64)


def chi_square(draws: torch.Tensor, inner_edges: torch.Tensor) -> float:
    # an edge may fall between two float32 numbers, so the comparison is made in float64
    counts = torch.bincount(torch.bucketize(draws.double(), inner_edges), minlength=BINS)
    expected = draws.numel() / BINS
    return float(((counts - expected) ** 2 / expected).sum())


SAMPLED = [
    *((name, *point, law) for name, point in CASES.items() for law in ("log θ", "θ")),
    ("flat", *FLAT["flat"], "θ"),
]
assert len(SAMPLED) * len(DTYPES) == 26, "the docstring's count"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "loc", "scale", "law"), SAMPLED)
def test_goodness_of_fit(name, loc, scale, law, dtype):
    torch.manual_seed(len(name))
    q = TruncatedLogNormal(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype))
    if law == "θ":
        statistic = chi_square(q.rsample((DRAWS,)), edges(loc, scale).exp())
    else:
        statistic = chi_square(q.base_dist.rsample((DRAWS,)), edges(loc, scale))
    assert statistic < THRESHOLD


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_uniform(dtype):
    """Not among the 26: torch's own Uniform is under it, and this only guards the transform (p > 1e-6)."""
    torch.manual_seed(0)
    draws = LogUniform(torch.tensor(-20.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)).sample((DRAWS,))
    inner = torch.linspace(-20, 0, BINS + 1, dtype=torch.float64)[1:-1]
    assert chi_square(draws.double().log(), inner) < chi2.isf(1e-6, BINS - 1)


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("name", CASES)
def test_a_scale_five_percent_off_is_detected(name, factor):
    loc, scale = CASES[name]
    torch.manual_seed(0)
    draws = TruncatedNormal(*torch.tensor([loc, factor * scale, -20.0, 0.0]).double()).rsample((DRAWS,))
    assert chi_square(draws, edges(loc, scale)) > 2 * THRESHOLD


def test_every_element_is_drawn_by_itself():
    """The largest of 1225 correlations in an expanded law is below 6 standard errors (p < 3e-6)."""
    torch.manual_seed(0)
    q = TruncatedLogNormal(torch.tensor(-3.0), torch.tensor(0.3)).expand([50])
    correlation = torch.corrcoef(q.rsample((20_000,)).T)
    assert float((correlation - torch.eye(50)).abs().max()) < 6 / math.sqrt(20_000)
