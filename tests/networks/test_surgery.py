"""Physical removal: what is gone is gone, what is left computes the reduced model, and a lie is caught."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import MultiplicativeNoise, name_sites
from pyro_bmrs.networks import surgery
from pyro_bmrs.networks.cost import compare_costs, multiply_accumulates, parameters
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.groups import Member, StructureGroup
from pyro_bmrs.networks.hooked_noise import HookedNoise
from pyro_bmrs.networks.inputs import tensors_of
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import EqualityError, remove_structures


def mlp():
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, 6), nn.Tanh(), MultiplicativeNoise(6),
        nn.Dropout(0.5), nn.Linear(6, 3),
    ), (5,)  # fmt: skip


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), MultiplicativeNoise(4), nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5), nn.ReLU(), MultiplicativeNoise(5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 7),
        nn.GELU(), MultiplicativeNoise(7), nn.Linear(7, 3),
    ), (1, 14, 14)  # fmt: skip


def one_dimensional():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ELU(), MultiplicativeNoise(6), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), MultiplicativeNoise(4), nn.Linear(4, 2),
    ), (2, 12)  # fmt: skip


class Shared(nn.Module):
    """One hidden layer read by two heads."""

    def __init__(self):
        super().__init__()
        self.hidden, self.noise = nn.Linear(4, 9), MultiplicativeNoise(9)
        self.left, self.right = nn.Linear(9, 2), nn.Linear(9, 3)

    def forward(self, x):
        h = self.noise(torch.sigmoid(self.hidden(x)))
        return {"left": self.left(h), "right": (self.right(h),)}


def shared():
    return Shared(), (4,)


FAMILIES = [mlp, convolutions, one_dimensional, shared]


def conditioned(make, seed=0):
    """The network with varying outputs: BatchNorm has seen data, parameters are not tiny."""
    torch.manual_seed(seed)
    net, shape = make()
    name_sites(net)
    x = torch.randn(16, *shape)
    with (
        torch.no_grad(),
        fixed_scales(net, {s: torch.ones(n.features) for s, n in noise_layers(net).items()}),
    ):
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
        net.train()(x)
    return net.eval(), x


def random_plan(net, seed, extreme=None):
    # scales of 0.5 to 1, so that one unit a layer still gives outputs that vary
    generator = torch.Generator().manual_seed(seed)
    kept, scales = {}, {}
    for site, noise in noise_layers(net).items():
        keep = torch.rand(noise.features, generator=generator) < 0.5
        if extreme == "all":
            keep[:] = True
        if extreme == "one":
            keep[:] = False
        if not keep.any():
            keep[int(torch.randint(noise.features, (), generator=generator))] = True
        kept[site] = keep
        scales[site] = 0.5 + 0.5 * torch.rand(noise.features, generator=generator, dtype=torch.float64)
    return kept, scales


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("extreme", [None, "all", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smaller_network_is_the_reduced_model(make, extreme, dtype):
    net, x = conditioned(make)
    net, x = net.to(dtype), x.to(dtype)
    before = copy.deepcopy(net.state_dict())
    kept, scales = random_plan(net, 1, extreme)
    small = remove_structures(net, kept, scales, x).network
    with torch.no_grad(), fixed_scales(net, {s: scales[s].to(dtype) * kept[s] for s in kept}):
        expected = tensors_of(net(x))
    with torch.no_grad():
        actual = tensors_of(small(x))
    for want, have in zip(expected, actual, strict=True):
        spread = (want - want.mean(0)).abs().max()
        assert spread > 0.01
        assert (want - have).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-10) * spread
        assert have.dtype == dtype
    # the given network is untouched, the new one is plain
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert type(small) is type(net)
    assert not any(isinstance(module, MultiplicativeNoise) for module in small.modules())
    assert not any(name.endswith(("kept", "log_low", "log_high")) for name in small.state_dict())


@pytest.mark.parametrize("make", FAMILIES)
def test_indices_shifted_by_one_are_caught(make, monkeypatch):
    net, x = conditioned(make)
    kept, scales = random_plan(net, 3)
    for site in kept:
        kept[site][:2] = torch.tensor([True, False])
    real = surgery.structure_groups

    def shifted(network, example):
        groups = real(network, example)
        site = next(iter(groups))
        group = groups[site]
        wrong = []
        for member in group.members:
            units = (member.units + 1) % group.features if member.role == "consumer" else member.units
            wrong.append(replace(member, units=units))
        groups[site] = replace(group, members=tuple(wrong))
        return groups

    monkeypatch.setattr(surgery, "structure_groups", shifted)
    with pytest.raises(
        EqualityError, match=r"differs from the reduced model: output 0 of .* by at most [\d.e+-]+"
    ):
        remove_structures(net, kept, scales, x)


def test_noise_before_an_activation_that_is_not_homogeneous_is_caught():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), MultiplicativeNoise(6), nn.Sigmoid(), nn.Linear(6, 2))
    name_sites(net)
    kept, scales = random_plan(net, 0)
    with pytest.raises(EqualityError, match="where its structures are consumed"):
        remove_structures(net, kept, scales, torch.randn(8, 4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 10_000))
def test_any_chain_and_any_plan(widths, seed):
    torch.manual_seed(seed)
    layers, inputs = [], 3
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.Tanh(), MultiplicativeNoise(width)]
        inputs = width
    net = nn.Sequential(*layers, nn.Linear(inputs, 2))
    name_sites(net)
    kept, scales = random_plan(net, seed)
    small = remove_structures(net, kept, scales, torch.randn(6, 3)).network
    left = [3, *(int(kept[site].sum()) for site in kept), 2]
    assert parameters(small) == sum(a * b + b for a, b in pairwise(left))


def test_a_filter_owns_its_block_of_columns_behind_flatten():
    net, x = conditioned(convolutions)
    group = structure_groups(net, x)["7"]
    tensors = [(member.role, f"{member.path}.{member.name}", member.dim) for member in group.members]
    norm = [("between", f"5.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")]
    assert tensors == [("producer", "4.weight", 0), *norm, ("consumer", "10.weight", 1)]
    (columns,) = group.consumers
    chosen = columns.indices[torch.isin(columns.units, torch.tensor([0, 3]))]
    assert chosen.sort().values.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    kept = {s: torch.ones(n.features, dtype=torch.bool) for s, n in noise_layers(net).items()}
    kept["7"][[0, 3]] = False
    small = remove_structures(net, kept, {s: torch.ones(len(k)).double() for s, k in kept.items()}, x).network
    # two filters of 4·3·3, two pairs of BatchNorm parameters, eight columns of seven rows
    assert parameters(net) - parameters(small) == 2 * 36 + 4 + 8 * 7


def test_what_was_frozen_or_in_evaluation_stays_so():
    net, x = conditioned(convolutions)
    net.train()
    net[5].eval()
    net[4].requires_grad_(False)
    small = remove_structures(net, *random_plan(net, 2), x).network
    assert small.training
    assert [module.training for module in small] == [module.training for module in net]
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {"4.weight"}
    assert all(parameter.grad is None for parameter in small.parameters())


def test_what_has_no_producer_or_no_reader_is_refused_by_name():
    for net, word in (
        (nn.Sequential(MultiplicativeNoise(4), nn.Linear(4, 2)), "makes"),
        (nn.Sequential(nn.Linear(4, 2), MultiplicativeNoise(2)), "reads"),
    ):
        name_sites(net)
        with pytest.raises(ValueError, match=f"'[01]'.*{word}"):
            structure_groups(net, torch.randn(2, 4))


def test_bad_plans_are_refused_before_any_work():
    net, x = conditioned(mlp)
    kept, scales = random_plan(net, 0)
    for bad_kept, bad_scales, message in (
        ({}, scales, "kept must have the sites"),
        (kept, {}, "scales must have the sites"),
        ({**kept, "2": torch.zeros(8, dtype=torch.bool)}, scales, "at least one of 8"),
        ({**kept, "2": torch.ones(7, dtype=torch.bool)}, scales, r"shape \(8,\)"),
        (kept, {**scales, "5": torch.full((6,), torch.nan)}, "'5'.*finite"),
    ):
        with pytest.raises(ValueError, match=message):
            remove_structures(net, bad_kept, bad_scales, x)


def test_costs_are_counted_and_measured():
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(3, 1, 8, 8)
    assert parameters(net) == 40 + 725
    assert multiply_accumulates(net, x) == 4 * 36 * 9 + 144 * 5
    table = compare_costs(net, net, x)
    assert (table.loc["parameters", ["before", "after"]] == 765).all()
    assert (table[["before", "after"]] > 0).all(axis=None)
    with pytest.raises(ValueError, match="before must be a network without noise"):
        compare_costs(nn.Sequential(MultiplicativeNoise(2)), net, x)


class Branches(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.noise_left, self.noise_right = MultiplicativeNoise(6), MultiplicativeNoise(6)
        self.join, self.out = join, nn.Linear(12 if join is torch.cat else 6, 2)

    def forward(self, x):
        parts = [self.noise_left(self.left(x)), self.noise_right(self.right(x))]
        return self.out(torch.cat(parts, dim=1) if self.join is torch.cat else parts[0] + parts[1])


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (Branches(torch.add), (4,), "both tied to"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), MultiplicativeNoise(6), nn.Linear(6, 2)),
            (4,),
            "normalised together by '1', a LayerNorm",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), MultiplicativeNoise(4), nn.ConvTranspose2d(4, 2, 3, groups=2)),
            (1, 8, 8),
            r"of noise layer '1' are tied to each other: its 4 form only 2 that can be removed alone",
        ),
    ],
    ids=["addition", "layer-norm", "transposed-in-groups"],
)
def test_what_is_not_handled_is_refused_by_name(net, shape, message):
    name_sites(net)
    with pytest.raises(ValueError, match=message):
        structure_groups(net, torch.randn(2, *shape))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Branches(torch.cat), (4,)),
        (
            nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), MultiplicativeNoise(4), nn.Conv2d(4, 2, 1)
            ),
            (1, 8, 8),
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 3), MultiplicativeNoise(4), nn.ConvTranspose2d(4, 2, 3)), (1, 8, 8)),
        (nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), MultiplicativeNoise(6), nn.Linear(6, 2)), (4,)),
    ],
    ids=["concatenation", "depthwise", "transposed", "prelu"],
)
def test_layers_by_hand_in_other_places_are_cut_too(net, shape):
    torch.manual_seed(0)
    name_sites(net)
    x = torch.randn(6, *shape)
    kept, scales = random_plan(net, 5)
    small, cuts, difference = remove_structures(net, kept, scales, x)
    assert cuts
    assert difference < 1e-12
    assert parameters(small) == cuts.parameters_left(net) < parameters(net)


def test_batch_norm_without_parameters_is_cut_too():
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), MultiplicativeNoise(6), nn.Linear(6, 2)
    )
    name_sites(net)
    small = remove_structures(net, *random_plan(net, 1), torch.randn(8, 4)).network
    assert len(small[1].running_mean) == small[0].out_features < 6


class Keeps(nn.Module):
    """Remembers its last activation, counts its calls, and keeps a running number."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.second = nn.Linear(4, 6), MultiplicativeNoise(6), nn.Linear(6, 2)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.last, self.calls = self.first(x), self.calls + 1
        self.seen.add_(1)
        return self.second(self.noise(self.last.tanh())) + self.seen


def test_a_network_is_copied_once_and_the_check_leaves_nothing_in_the_copy(monkeypatch):
    """A second copy, in float64, would be most of the memory that the removal of structures takes."""
    copies = []
    real = surgery.copied
    monkeypatch.setattr(surgery, "copied", lambda network: copies.append(network) or real(network))
    net = Keeps()
    name_sites(net)
    small = remove_structures(net, *random_plan(net, 1), torch.randn(8, 4)).network
    assert copies == [net]
    assert small.first.out_features == small.second.in_features < 6
    assert (small.calls, float(small.seen), hasattr(small, "last")) == (0, 0.0, False)
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.float32}


class Wide(nn.Module):
    """Two branches of own code, of which a reader gives an output that loses channels."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 5))

        def forward(self, x):
            return x @ self.w

    def __init__(self):
        super().__init__()
        self.first, self.mixing, self.last = nn.Linear(4, 6), self.Mixing(), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.mixing(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("right", [True, False])
def test_outputs_of_own_readers_are_compared_where_their_channels_are_known(right):
    torch.manual_seed(0)
    six, five = torch.arange(6), torch.arange(5)
    made = Member("mixing", "w", 1, "producer", five, five)
    groups = [
        StructureGroup("first", 6, (
            Member("first", "weight", 0, "producer", six, six), Member("first", "bias", 0, "between", six, six),
            Member("mixing", "w", 0, "consumer", six, six if right else (six + 1) % 6),
        )),
        StructureGroup("mixing", 5, (made, Member("last", "weight", 1, "consumer", five, five, input_dim=-1))),
    ]  # fmt: skip
    net = Wide()
    noise = HookedNoise(net, [replace(groups[0], members=(*groups[0].members[:2], Member(
        "mixing", "w", 0, "consumer", six, six))), groups[1]])  # fmt: skip
    noise.attach(net)
    by_site = {group.site: group for group in groups}
    scales = {site: torch.linspace(0.5, 1.0, group.features).double() for site, group in by_site.items()}
    for kept in (torch.tensor([True, False, True, True, False]), torch.ones(5, dtype=torch.bool)):
        masks = {"first": torch.tensor([True, False, True, True, False, True]), "mixing": kept}
        if right:
            remove_structures(net, masks, scales, torch.randn(8, 4), groups=by_site)
        else:
            # all channels of the own reader are left: it is compared itself; else what comes after it
            where = "mixing" if kept.all() else "last"
            with pytest.raises(EqualityError, match=f"output 0 of {where} by at most"):
                remove_structures(net, masks, scales, torch.randn(8, 4), groups=by_site)


def deep_sines(depth):
    """Large weights without normalisation: each layer makes what rounding has left several times larger."""
    torch.manual_seed(0)
    layers = [nn.Linear(48, 48) for _ in range(depth)]
    net = nn.Sequential(*(part for layer in layers for part in (layer, Sine())), nn.Linear(48, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8)
    return bmrs.insert_noise(net, torch.randn(4, 48))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


@pytest.mark.parametrize(("depth", "right"), [(6, True), (18, True), (6, False), (18, False)])
def test_rounding_that_a_network_amplifies_is_told_from_a_mistake(depth, right, monkeypatch):
    noisy = deep_sines(depth)
    kept = {site: torch.arange(48) % 3 != 1 for site in noise_layers(noisy)}
    theta = {site: torch.linspace(0.5, 1.5, 48) for site in kept}
    if not right:  # as large as rounding is in the deep one
        cut = Cuts.cut

        def slightly_wrong(cuts, network):
            cut(cuts, network)
            network[0].weight.data.mul_(1 + (1e-9 if depth == 6 else 1e-12))

        monkeypatch.setattr(Cuts, "cut", slightly_wrong)
        with pytest.raises(EqualityError, match="differs from the reduced model"):
            remove_structures(noisy, kept, theta, torch.randn(4, 48))
        return
    found = remove_structures(noisy, kept, theta, torch.randn(4, 48)).difference
    assert found <= 1e-10 if depth == 6 else 1e-10 < found <= 1e-6


class Constant(nn.Module):
    """An output that does not depend on its input."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x):
        return self.value.expand(len(x), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_bit_of_an_output_that_is_constant_is_no_mistake(dtype):
    x, value = torch.randn(5, 3, dtype=dtype), torch.tensor([0.67, -0.2], dtype=dtype)
    wanted = surgery.Expected({"the network": [Constant(value)(x)]}, frozenset(), "")
    tolerance = 0.1 * torch.finfo(dtype).eps
    rounded = torch.nextafter(value, torch.ones_like(value))
    surgery.check_equal(Constant(rounded), wanted, x, tolerance=tolerance)
    with pytest.raises(EqualityError, match="differs from the reduced model"):
        surgery.check_equal(Constant(value * (1 + 1e-4)), wanted, x, tolerance=surgery.OWN_TOLERANCE)


def test_the_last_bits_of_half_precision_are_more_than_is_allowed():
    x, value = torch.randn(5, 3), torch.tensor([0.67, -0.2], dtype=torch.bfloat16)
    wanted = surgery.Expected({"the network": [Constant(value)(x)]}, frozenset(), "")
    with pytest.raises(EqualityError, match="differs from the reduced model"):
        surgery.check_equal(Constant(value * 1.05), wanted, x, tolerance=surgery.OWN_TOLERANCE)
