"""No device is assumed anywhere: model, guide, network and evidence run on `meta` without one CPU tensor."""

import pyro
import pytest
import torch
from only_meta import OnlyMeta
from pyro import poutine
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.distributions import packed
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.inference.elbo import LatentsPerBatch
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.pruning.layers import LayerStructures


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), bmrs.MultiplicativeNoise(4), nn.Flatten(), nn.Linear(4 * 36, 6), nn.Tanh(),
        bmrs.MultiplicativeNoise(6), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize("draws", [1, 3, 4, 8])
def test_model_guide_network_and_evidence(draws):
    with torch.device("meta"):
        x, y = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
        model = bmrs.Classifier(network())
    guide = bmrs.AutoTruncatedLogNormal(model)
    with pyro.validation_enabled(False), OnlyMeta():
        guide(x, y)
        with LatentsPerBatch(guide.sites, draws, 8, 0.5, 1.0):
            guide_trace = poutine.trace(guide).get_trace(x, y)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, y)
        for site in guide.sites:
            q, p = guide_trace.nodes[site]["fn"], model_trace.nodes[site]["fn"]
            assert torch.distributions.kl_divergence(q, p).is_meta
            assert q.log_prob(guide_trace.nodes[site]["value"]).is_meta
        assert model_trace.nodes["_RETURN"]["value"].shape == (8, 3)
        assert all(value.is_meta for value in [*guide.mean().values(), *guide.median().values()])
        layers = {
            site: LayerStructures(
                guide.posterior()[site], layer.prior().base_dist.base_dist, layer.kept, lambda: torch.ones(1)
            )
            for site, layer in noise_layers(model).items()
        }
        for criterion in (bmrs.BMRS_N(), bmrs.BMRS_U(), bmrs.BMRS_U(4, 23), bmrs.SNR(), bmrs.ExpectedScale()):
            scores = criterion(layers)
            assert {name: score.shape for name, score in scores.items()} == {"2": (4,), "6": (6,)}
            assert all(score.is_meta and score.dtype == torch.float64 for score in scores.values())


@pytest.mark.parametrize("draws", [1, 3, 4, None])
@pytest.mark.parametrize("inserted", [False, True])
def test_the_fused_step(draws, inserted):
    with torch.device("meta"):
        x, y = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
    net = network()
    if inserted:
        net = bmrs.insert_noise(bmrs.without_noise(net), torch.randn(2, 1, 8, 8))
    model = bmrs.Classifier(net.to("meta"))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with pyro.validation_enabled(False):
        with OnlyMeta():
            guide(x, y)
        objective = Objective(model, guide, (x, y), dataset_size=100, draws=draws)
        assert objective.elbo == "fused"
        with OnlyMeta():
            loss, likelihood = objective(x, y, 2.0)
            loss.backward()
    assert loss.is_meta
    assert likelihood.is_meta
    assert all(parameter.grad.is_meta for parameter in [*model.parameters(), *guide.parameters()])


@pytest.mark.parametrize("columns", [True, False])
def test_the_inside_of_the_fused_operations(columns):
    """Which a mode does not see where they are called."""
    with torch.device("meta"):
        loc, low, high = torch.randn(5), torch.full((5,), -20.0), torch.zeros(5)
        kept = torch.ones(5, dtype=torch.bool)
    strata = packed._strata(3, loc.device)
    with OnlyMeta():
        u = packed._uniforms(strata, 3, 5, loc.device)
        drawn = packed._draw(loc, loc, low, high, kept, u, columns=columns)
        gradients = packed._gradients(drawn.theta, drawn.kl, drawn.slopes, drawn.kl_slopes, loc.dtype)
    assert [gradient.shape for gradient in gradients] == [(5,), (5,)]
    assert drawn.theta.shape == (3, 5)


def test_the_check_itself_can_fail():
    with pytest.raises(AssertionError), OnlyMeta():
        torch.zeros(2, device="meta") * torch.ones(2)[0]
