"""The noise layer: one latent per structure, shared over positions, drawn for groups of examples."""

from contextlib import contextmanager

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_bmrs
from pyro_bmrs import MultiplicativeNoise, name_sites
from pyro_bmrs.networks import noise
from pyro_bmrs.networks.hooked_noise import network_of, without_noise
from pyro_bmrs.networks.noise import examples_in_batch, fixed_scales, noise_layers


def layer(features=4, **options):
    noise = MultiplicativeNoise(features, **options)
    noise.site = "noise"
    return noise


@contextmanager
def several_draws():
    """As within the handler that draws several values per batch."""
    token = examples_in_batch.set(6)
    yield
    examples_in_batch.reset(token)


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 4), 1), ((6, 4, 3, 5), 1), ((6, 7, 4), -1), ((6, 7, 4), 2), ((6, 4, 9), 1)]
)
@pytest.mark.parametrize("draws", [None, 1, 2, 3, 4, 6])
def test_example_i_uses_draw_i_mod_draws_at_every_position(shape, dim, draws):
    x = torch.randn(shape)
    theta = torch.rand(4) if draws is None else torch.rand(draws, 4)
    noise = layer(dim=dim)
    noise.kept[2] = False
    with several_draws(), poutine.condition(data={"noise": theta}):
        y = noise(x)
    for i in range(len(x)):
        own = (theta if draws is None else theta[i % draws]) * noise.kept
        torch.testing.assert_close(
            y[i],
            (x[i].movedim(dim - 1 if dim > 0 else dim, -1) * own).movedim(-1, dim - 1 if dim > 0 else dim),
        )


def test_the_site_is_one_and_named_after_the_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), MultiplicativeNoise(4), nn.Linear(4, 2))
    holder = nn.ModuleDict({"body": net})
    name_sites(holder)
    trace = poutine.trace(net).get_trace(torch.randn(5, 3))
    assert trace.stochastic_nodes == ["body.2"]
    assert trace.nodes["body.2"]["value"].shape == (4,)
    name_sites(net)  # a second naming changes nothing
    assert list(noise_layers(holder)) == ["body.2"]


def test_two_layers_of_one_name_are_refused():
    first, second = nn.Sequential(layer()), nn.Sequential(layer())
    with pytest.raises(ValueError, match="'noise'"):
        name_sites(nn.Sequential(first, second))


@pytest.mark.parametrize("features", [0, -1, 2.5, "4"])
def test_bad_features_are_named(features):
    with pytest.raises(ValueError, match="features must be"):
        MultiplicativeNoise(features)


def test_bad_bounds_inputs_and_draws_are_named():
    with pytest.raises(ValueError, match="log_low"):
        MultiplicativeNoise(3, log_low=0.0, log_high=-1.0)
    with pytest.raises(ValueError, match="dim must not be 0"):
        MultiplicativeNoise(3, dim=0)
    with pytest.raises(ValueError, match=r"'noise'.*4 structures.*\(2, 3\)"):
        layer()(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="name_sites"):
        MultiplicativeNoise(3)(torch.zeros(2, 3))
    for theta in (torch.ones(3, 4), torch.ones(2, 1, 4)):
        with (
            several_draws(),
            poutine.condition(data={"noise": theta}),
            pytest.raises(ValueError, match="parallel=False"),
        ):
            layer()(torch.zeros(2, 4))


def test_a_stack_of_scales_is_not_taken_for_draws_per_batch():
    """Predictive(parallel=True) stacks whole draws, a plate round the network makes θ per example."""
    net = nn.Sequential(nn.Linear(3, 4), layer())
    guide = pyro_bmrs.AutoTruncatedLogNormal(pyro_bmrs.Classifier(net))
    x, y = torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    guide(x, y)
    predictive = pyro.infer.Predictive(guide.model, guide=guide, num_samples=3, parallel=True)
    with pytest.raises(ValueError, match="parallel=False"):
        predictive(x)
    with pyro.plate("data", 6), pytest.raises(ValueError, match=r"outside of pyro\.plate"):
        net(x)


def test_fixed_scales_knows_its_sites():
    net = nn.Sequential(nn.Linear(3, 4), layer())
    with (
        pytest.raises(ValueError, match=r"\['noise'\].*\['nosie'\]"),
        fixed_scales(net, {"nosie": torch.ones(4)}),
    ):
        pass


def test_the_network_of_a_model_is_the_smallest_module_with_all_the_noise():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(3, 3)
            self.blocks = nn.ModuleList(
                [nn.Sequential(nn.Linear(3, 4), MultiplicativeNoise(4)) for _ in range(2)]
            )

    own = Own()
    whole = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3), own)})
    assert network_of(whole) is whole["net"]  # what comes before the noise belongs to it
    assert network_of(nn.ModuleDict({"body": own})) is own
    assert network_of(own.blocks[0]) is own.blocks[0]
    with pytest.raises(ValueError, match="MultiplicativeNoise"):
        network_of(nn.Linear(2, 2))


def test_without_noise_leaves_no_trace():
    net = nn.Sequential(nn.Linear(3, 4), MultiplicativeNoise(4), nn.Linear(4, 2))
    without_noise(net)
    assert not any(isinstance(m, MultiplicativeNoise) for m in net.modules())
    assert set(net.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_gradients_reach_theta():
    theta = torch.rand(3, 4, requires_grad=True)
    with several_draws(), pyro.condition(data={"noise": theta}):
        layer()(torch.ones(6, 4)).sum().backward()
    torch.testing.assert_close(theta.grad, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((12, 6, 2, 2), 1), ((12, 6), 1), ((12, 4, 6), -1)])
def test_the_product_of_large_inputs_has_the_gradients_of_the_plain_one(shape, dim, exclusive, monkeypatch):
    monkeypatch.setattr(noise, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    theta = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)

    def product(x, theta):
        # as of a layer behind it, whose gradient belongs to nobody else
        return 1.0 * noise.scaled(x, theta, dim, "here", examples=len(x), exclusive=exclusive)

    assert torch.autograd.gradcheck(product, (x, theta))
    assert torch.autograd.gradgradcheck(product, (x, theta))
