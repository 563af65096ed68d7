"""cdf beyond the support, and the signal-to-noise ratio of every distribution."""

import pytest
import torch

from pyro_bmrs import LogUniform, TruncatedLogNormal, TruncatedNormal

DISTRIBUTIONS = [
    TruncatedNormal(torch.tensor(-3.0), torch.tensor(0.7), -20.0, 0.0),
    TruncatedLogNormal(torch.tensor(-3.0), torch.tensor(0.7)),
    LogUniform(torch.tensor(-20.0), torch.tensor(0.0)),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_cdf_is_0_below_the_support_and_1_above(distribution):
    values = torch.tensor([-1e3, -25.0, 5.0, 1e3])
    assert distribution.cdf(values).tolist() == [0.0, 0.0, 1.0, 1.0]
    if not isinstance(distribution, TruncatedNormal):
        assert distribution.cdf(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_snr_is_mean_over_standard_deviation(distribution):
    assert float(distribution.snr) == pytest.approx(
        float(distribution.mean / distribution.variance.sqrt()), rel=1e-5
    )
    torch.manual_seed(0)
    draws = distribution.sample((400_000,)).double()
    # 1 % is 7 standard errors of the ratio for the widest of the three
    assert float(distribution.snr) == pytest.approx(float(draws.mean() / draws.std()), rel=0.01)
