"""What torch wraps networks in, and what a copy would share with the original."""

import copy
import functools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks import StructureError, network_of, noise_layers
from pyro_bmrs.networks.copies import copied, left_alone, uncompiled


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder(x))


def whole(net):
    return torch.compile(net, backend="eager")


def part(net):
    net.encoder = torch.compile(net.encoder, backend="eager")
    return net


def both(net):
    return torch.compile(part(net), backend="eager")


def in_place(net):
    net.compile(backend="eager")
    net.encoder.compile(backend="eager")
    return net


def its_forward(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return net


COMPILED = [whole, part, both, in_place, its_forward]


def is_compiled(net):
    return any(
        "_orig_mod" in part._modules or part._compiled_call_impl or ("forward" in vars(part)
        and hasattr(part.forward, "_torchdynamo_orig_callable"))
        for part in net.modules()
    )  # fmt: skip


@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_network_has_the_structures_of_the_plain_one(way):
    torch.manual_seed(0)
    plain, x = Small(), torch.randn(6, 4)
    net = way(copy.deepcopy(plain))
    assert is_compiled(net)
    assert str(bmrs.structures(net, x)) == str(bmrs.structures(plain, x))
    noisy = bmrs.insert_noise(net, x)
    assert is_compiled(net)
    assert not is_compiled(noisy)
    assert type(noisy) is Small
    assert list(noise_layers(noisy)) == ["encoder.0", "encoder.2"]


@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_noisy_network_is_fitted_reduced_and_rebuilt_as_the_plain_one(way, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randint(2, (16,))
    noisy = way(bmrs.insert_noise(Small(), x))
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, torch.utils.data.TensorDataset(x, y), epochs=1)
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5))
    small = plan.apply()
    assert not is_compiled(small)
    assert not any("_orig_mod" in name for name in small.state_dict())
    torch.testing.assert_close(plan.apply(noisy, x)(x), small(x))
    weights = tmp_path / "small.safetensors"
    save_file(small.state_dict(), weights)
    rebuilt = plan.rebuild(way(Small()), weights)
    assert not is_compiled(rebuilt)
    torch.testing.assert_close(rebuilt(x), small(x))
    assert not is_compiled(bmrs.without_noise(noisy))


def test_noise_by_hand_in_a_compiled_network_has_the_names_of_the_plain_one():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    model = bmrs.Classifier(torch.compile(net, backend="eager"))
    assert list(noise_layers(model)) == ["2"]
    assert model.net is net
    assert network_of(torch.compile(model, backend="eager")) is net


def test_undoing_leaves_a_plain_network_as_it_is():
    net = Small()
    before = list(net.named_modules())
    assert uncompiled(net) is net
    assert list(net.named_modules()) == before


class Remembers(Small):
    """Keeps activations of the last call, for a loss or a look at them."""

    def forward(self, x):
        self.last = self.encoder(x)
        self.history = {"hidden": [self.last]}
        return self.head(self.last)


def test_a_network_that_remembers_activations_is_copied():
    net, x = Remembers(), torch.randn(6, 4)
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(net)
    copy_of_it = copied(net)
    torch.testing.assert_close(copy_of_it.last, net.last)
    assert copy_of_it.last is copy_of_it.history["hidden"][0]
    assert copy_of_it.last.is_leaf
    assert net.last.grad_fn is not None
    noisy = bmrs.insert_noise(net, x)
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    data = torch.utils.data.TensorDataset(x, torch.randint(2, (6,)))
    bmrs.fit(model, guide, data, epochs=1)
    assert bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()(x).shape == (6, 2)


def with_forward(net):
    plain = net.forward

    @functools.wraps(plain)
    def forward(x):
        return plain(x).float()

    net.forward = forward
    return net


def with_hook(net):
    net.encoder.register_forward_hook(lambda module, inputs, output: output + net.encoder[0](inputs[0]).sum())
    return net


@pytest.mark.parametrize("way", [with_forward, with_hook])
def test_functions_that_hold_modules_of_the_original_are_refused(way):
    # a copy would call the original's layers: it could be cut, and would compute as before
    with pytest.raises(StructureError, match=r"a copy of it still calls 'encoder.0'"):
        bmrs.insert_noise(way(Small()), torch.randn(6, 4))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, about TorchScript
def test_what_torch_wraps_networks_in_is_named():
    net, x = Small(), torch.randn(6, 4)
    with pytest.raises(
        TypeError, match=r"network must be the module itself: got it in a DataParallel; pass its"
    ):
        bmrs.structures(nn.DataParallel(net), x)
    with pytest.raises(TypeError, match=r"net must be the module itself: got it in a DataParallel"):
        bmrs.Classifier(nn.DataParallel(net))
    for made in (torch.jit.trace(net, x), torch.jit.script(net)):
        with pytest.raises(TypeError, match=r"network must be Python code: got TorchScript \w+; pass what"):
            bmrs.insert_noise(made, x)
    net.encoder = torch.jit.script(net.encoder)
    with pytest.raises(TypeError, match=r"network must be Python code: got TorchScript in 'encoder'"):
        bmrs.insert_noise(net, x)


def test_a_traced_graph_is_refused_itself_and_handled_as_a_part():
    net, x = Small(), torch.randn(16, 4)
    with pytest.raises(TypeError, match=r"network must be the network itself: got a traced graph of it"):
        bmrs.insert_noise(torch.fx.symbolic_trace(net), x)
    net.encoder = torch.fx.symbolic_trace(net.encoder)
    noisy = bmrs.insert_noise(net, x)
    assert list(noise_layers(noisy)) == ["encoder.0", "encoder.2"]
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, torch.utils.data.TensorDataset(x, torch.randint(2, (16,))), epochs=1)
    small = bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()
    assert getattr(small.encoder, "0").out_features < 8
    assert small(x).shape == (16, 2)


def test_a_network_that_was_left_alone_is_as_it_was_also_after_an_error():
    net = Remembers()
    net.register_buffer("steps", torch.zeros(3))
    net.cache = None
    before, buffer = dict(vars(net)), net.steps

    def change():
        net(torch.randn(6, 4))
        net.steps += 1
        net.encoder.mask, net.cache = torch.ones(2), [1]
        net.register_buffer("steps", torch.ones(5))
        net.encoder.register_buffer("table", torch.ones(5))
        raise ArithmeticError

    with pytest.raises(ArithmeticError), left_alone(net):
        change()
    assert vars(net) == before
    assert net.steps is buffer
    assert net.steps.tolist() == [0.0] * 3
    assert not hasattr(net, "last")
    assert not hasattr(net.encoder, "mask")
    assert not hasattr(net.encoder, "table")
