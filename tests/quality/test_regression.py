"""Errors and intervals of a regression, beside scikit-learn, SciPy and brute force."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.quality import regression_quality
from pyro_bmrs.quality.regression import LEVEL


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), bmrs.MultiplicativeNoise(4), nn.Linear(4, 2))
    return bmrs.Regressor(net, scale=0.7)


def data(examples=203, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 3, generator=generator), torch.randn(examples, 2, generator=generator)


def at(model, theta, x):
    with torch.no_grad(), bmrs.networks.noise.FixedScales({"2": theta}):
        return model.net(x).double().numpy()


def test_a_point_is_one_normal(model):
    x, y = data()
    theta = torch.rand(4)
    found = regression_quality(model, (x, y), {"2": theta}, batch_size=50)
    mean, truth = at(model, theta, x), y.double().numpy()
    assert found["examples"] == 203
    assert found["rmse"] == pytest.approx(np.sqrt(((truth - mean) ** 2).mean()), rel=1e-6)
    one, other = mean[:, :1], truth[:, :1]
    alone = bmrs.Regressor(nn.Sequential(*model.net[:-1], nn.Linear(4, 1)), scale=0.7)
    with torch.no_grad():
        alone.net[-1].weight.copy_(model.net[-1].weight[:1])
        alone.net[-1].bias.copy_(model.net[-1].bias[:1])
    single = regression_quality(alone, (x, y[:, :1]), {"2": theta})
    assert single["rmse"] == pytest.approx(root_mean_squared_error(other, one), rel=1e-6)
    assert single["mae"] == pytest.approx(mean_absolute_error(other, one), rel=1e-6)
    assert single["r2"] == pytest.approx(r2_score(other, one), rel=1e-6)
    assert single["negative_log_likelihood"] == pytest.approx(-norm.logpdf(other, one, 0.7).mean(), rel=1e-6)
    reach = norm.ppf((1 + LEVEL) / 2) * 0.7
    assert single["width"] == pytest.approx(2 * reach, rel=1e-6)
    assert single["coverage"] == pytest.approx((np.abs(other - one) <= reach).mean())


def test_draws_are_a_mixture(model):
    x, y = data(40)
    theta = 2 * torch.rand(5, 4)
    found = regression_quality(model, (x, y), {"2": theta})
    means, truth = np.stack([at(model, one, x) for one in theta]), y.double().numpy()
    density = norm.pdf(truth, means, 0.7).mean(0)
    assert found["negative_log_likelihood"] == pytest.approx(-np.log(density).sum(1).mean(), rel=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt(((truth - means.mean(0)) ** 2).mean()), rel=1e-6)
    below = norm.cdf(truth, means, 0.7).mean(0)
    assert found["coverage"] == pytest.approx((np.abs(below - 0.5) <= LEVEL / 2).mean())
    widths = [
        np.subtract(*(
            brentq(lambda v, own=own, share=share: norm.cdf(v, own, 0.7).mean() - share, -50, 50)
            for share in ((1 + LEVEL) / 2, (1 - LEVEL) / 2)
        ))
        for own in means.reshape(5, -1).T
    ]  # fmt: skip
    assert found["width"] == pytest.approx(np.mean(widths), rel=1e-5)


def test_intervals_hold_what_they_say_of_data_from_the_model(model):
    """4,000 y of the predictive: the share inside is 0.9 with a standard deviation of 0.0047; false alarm 1e-4."""
    x, _ = data(2000)
    theta = torch.rand(4)
    generator = torch.Generator().manual_seed(2)
    y = torch.from_numpy(at(model, theta, x)).float() + 0.7 * torch.randn(2000, 2, generator=generator)
    found = regression_quality(model, (x, y), {"2": theta})
    assert abs(found["coverage"] - LEVEL) < 4 * 0.0047
    assert found["r2"] < 1


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="model must be a Regressor: got Classifier"):
        regression_quality(bmrs.Classifier(nn.Linear(2, 2)), data(), {})
