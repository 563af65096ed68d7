"""A Laplace posterior on disk: what is read back is what was written, and nothing else is taken for it."""

import pandas as pd
import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs


def made(channels=4):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, channels, 3),
        nn.ReLU(),
        nn.Conv2d(channels, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    model = bmrs.Classifier(network)
    # 36 inputs: the second convolution is taken apart, the first is not
    return model, bmrs.AutoKroneckerLaplace(model, widest=30)


@pytest.fixture(scope="module")
def fitted():
    model, guide = made()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 6, 6, generator=generator)
    bmrs.fit(model, guide, (x, (x.mean((1, 2, 3)) > 0).long()), progress=False)
    return model, guide


def test_what_is_read_back_decides_as_what_was_written(fitted, tmp_path):
    model, guide = fitted
    path = bmrs.save_posterior(tmp_path / "posterior.safetensors", model, guide)
    other, fresh = made()
    with torch.no_grad():
        other.net[0].weight.add_(1.0)
    bmrs.load_posterior(path, other, fresh)
    assert guide.curvatures["2"].positions is not None
    for layer, one in guide.curvatures.items():
        for part in ("inputs", "gradients", "weights", "positions", "mean"):
            written, read = getattr(one, part), getattr(fresh.curvatures[layer], part)
            assert (written is None) == (read is None)
            assert written is None or torch.allclose(written, read, rtol=1e-12, atol=0)
    assert fresh.deltas == pytest.approx(guide.deltas, rel=1e-9)
    assert fresh.log_marginal_likelihood() == pytest.approx(guide.log_marginal_likelihood(), rel=1e-9)
    with pytest.raises(RuntimeError, match="guide must have examples"):
        bmrs.reduce(other, fresh)
    fresh.shown = guide.shown
    plans = [bmrs.reduce(*pair) for pair in ((model, guide), (other, fresh))]
    pd.testing.assert_frame_equal(plans[0].path, plans[1].path, rtol=1e-6)


def test_a_posterior_before_its_fit_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="no posterior yet"):
        bmrs.save_posterior(tmp_path / "posterior.safetensors", *made())
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_network_or_kind_is_refused(fitted, tmp_path):
    path = bmrs.save_posterior(tmp_path / "posterior.safetensors", *fitted)
    with pytest.raises(ValueError, match="belongs to another network"):
        bmrs.load_posterior(path, *made(channels=5))
    model = bmrs.Classifier(nn.Sequential(nn.Linear(4, 8), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2)))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"guide must be an AutoKroneckerLaplace.*: got AutoTruncatedLogNormal"
    ):
        bmrs.load_posterior(path, model, guide)
    variational = bmrs.save_posterior(tmp_path / "other.safetensors", model, guide)
    with pytest.raises(
        ValueError, match=r"guide must be an AutoTruncatedLogNormal.*: got AutoKroneckerLaplace"
    ):
        bmrs.load_posterior(variational, *made())
