"""Weights that are computed from other tensors: what they make and read stays, with the way back in the reason."""

import pytest
import torch
import torch.nn.utils as utils
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyro_bmrs as bmrs
from pyro_bmrs.networks import StructureError, check_weights, noise_layers
from pyro_bmrs.networks.attention import SeparateAttention, separate_attention


class OwnWeight(nn.Linear):
    """A layer that makes its weight from another parameter at each call."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.raw = self.weight
        del self.weight

    def forward(self, x):
        self.weight = self.raw.tanh()
        return super().forward(x)


def own(layer):
    made = OwnWeight(layer.in_features, layer.out_features)
    made(torch.zeros(1, layer.in_features))  # from now on its weight has a graph, which torch can't copy
    return made


# what computes a weight, and how its message says to undo it
WAYS = {
    "spectral_norm": (parametrizations.spectral_norm, "parametrize.remove_parametrizations("),
    "weight_norm": (parametrizations.weight_norm, "parametrize.remove_parametrizations("),
    "orthogonal": (parametrizations.orthogonal, "parametrize.remove_parametrizations("),
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3), "prune.remove("),
    "bias of a mask": (lambda layer: prune.l1_unstructured(layer, "bias", amount=0.3), "prune.remove("),
    "old weight_norm": (utils.weight_norm, "torch.nn.utils.remove_weight_norm("),
    "old spectral_norm": (utils.spectral_norm, "torch.nn.utils.remove_spectral_norm("),
    "own": (own, "make it a parameter"),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, about its old functions


def network(way, position, noise=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)]
    layers[position] = WAYS[way][0](layers[position]) or layers[position]
    if noise:
        layers[3] = nn.Sequential(layers[3], bmrs.MultiplicativeNoise(6))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("bias")])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_what_a_computed_weight_makes_or_reads_stays_and_is_named_with_the_way_back(way, position):
    net, x = network(way, position), torch.randn(6, 4)
    found = bmrs.structures(net, x)
    assert set(found.groups) == {"0", "2"} - {str(position), str(position - 2)}
    reasons = {stays.path: stays.reason for stays in found.refused if stays.unsupported}
    assert f"the weight of '{position}' is computed from other tensors" in reasons[str(position)]
    assert WAYS[way][1] in reasons[str(position)]
    if position:
        all_reasons = {stays.path: stays.reason for stays in found.refused}
        assert f"read by a weight that is computed, in '{position}'" in all_reasons[str(position - 2)]
    with pytest.raises(StructureError, match="leave_out=") as error:
        bmrs.insert_noise(net, x, strict=True)
    assert all(f"{path}: {reason}" in str(error.value) for path, reason in reasons.items())
    assert "\n" not in str(error.value)
    left_out = bmrs.structures(net, x, leave_out=str(position), strict=True)
    assert set(left_out.groups) == set(found.groups)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_masked_bias_goes_with_its_structures(position):
    net, x = network("bias of a mask", position), torch.randn(6, 4)
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, torch.zeros(6, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5, seed=0))
    small = plan.apply()
    assert set(plan.layers) == {"0", "2"}
    if str(position) in plan.kept:
        assert (
            small[position].bias_mask.tolist() == net[position].bias_mask[plan.kept[str(position)]].tolist()
        )


def test_the_way_back_is_the_way_back():
    net = network("mask", 2)
    with pytest.raises(StructureError) as error:
        bmrs.insert_noise(net, torch.randn(6, 4), strict=True)
    line = str(error.value).split("call ")[1].split(" first")[0]
    exec(line, {"torch": torch, "network": net})
    assert set(noise_layers(bmrs.insert_noise(net, torch.randn(6, 4)))) == {"0", "2"}


@pytest.mark.parametrize("way", WAYS)
def test_one_that_touches_no_structure_goes_through_fit_and_apply(way):
    net, x, y = network(way, 4), torch.randn(16, 4), torch.randint(2, (16,))
    net(x).sum().backward()
    noisy = bmrs.insert_noise(net, x, leave_out="4")
    assert set(noise_layers(noisy)) == {"0"}
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, torch.utils.data.TensorDataset(x, y), epochs=1)
    small = bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()
    assert small[0].out_features == 4
    assert small(x).shape == (16, 2)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("bias")])
@pytest.mark.parametrize("position", [2, 4])
def test_noise_by_hand_is_refused_before_the_fit(way, position):
    net = network(way, position, noise=True)
    bmrs.name_sites(net)
    with pytest.raises(StructureError, match=f"the weight of '{position}' is computed from other tensors"):
        check_weights(net, lambda: torch.randn(6, 4))


def test_without_computed_weights_or_away_from_noise_nothing_is_refused():
    check_weights(network("bias of a mask", 4, noise=True), lambda: torch.randn(6, 4))
    check_weights(network("spectral_norm", 0, noise=True), lambda: torch.randn(6, 4))
    plain = bmrs.insert_noise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4))
    check_weights(plain, lambda: pytest.fail("no input is needed"))


def test_a_weight_that_is_computed_since_noise_was_inserted_is_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    noisy = bmrs.insert_noise(net, torch.randn(6, 4))
    parametrizations.spectral_norm(noisy[2])
    with pytest.raises(StructureError, match=r"structures of '0': the weight of '2' is computed"):
        check_weights(noisy, lambda: torch.randn(6, 4))


def test_attention_with_a_computed_projection_stays_whole():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    parametrize.register_parametrization(attention.out_proj, "weight", nn.Tanh())

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = attention, nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    net, x = Attends(), torch.randn(3, 4, 8)
    assert not bmrs.structures(net, x).groups
    separate_attention(net)
    assert not any(isinstance(module, SeparateAttention) for module in net.modules())
