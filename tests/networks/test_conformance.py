"""One test over every kind of network: noise inserted, structures removed, and the small network is the reduced model.

In float32 the two differ by rounding that each layer adds and the layers behind it amplify: a ReLU behind a BatchNorm
by 1.2 if biases are 0, by 1.06 if they are 1. Relative to the spread of the outputs rounding is larger where the part
of a signal that varies with the example is small beside the part that does not. Weights as they come leave 1e-4 of the
spread in a ResNet-50; so that 1e-5 is more than rounding, `conditioned` gives each layer an output that spreads by one.
"""

import copy
import inspect
import json
import re
from ast import literal_eval
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Family
from network_families import FAMILIES, UNSUPPORTED, networks_page
from only_meta import OnlyMeta
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torchvision.models.resnet import BasicBlock, Bottleneck
from traced_channels import CHANNELS
from traced_families import TOKENS
from traced_heads import HEADS

import pyro_bmrs as bmrs
from pyro_bmrs.networks import surgery
from pyro_bmrs.networks.attention import SeparateAttention, separate_attention
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.hooked_noise import HookedNoise
from pyro_bmrs.networks.inputs import as_double, call, first_examples, map_tensors, tensors_of
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.precision import InDouble
from pyro_bmrs.networks.structures import StructureError, structure_groups
from pyro_bmrs.networks.surgery import EqualityError, remove_structures

COMPARED = 8  # examples; normalisation statistics are of all of them
LEAST_SPREAD = 0.01
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@torch.no_grad()
def conditioned(network, example, scales=None):
    """Random weights under which each layer's output spreads by one over the examples, and BatchNorm to match.

    Biases of activations are positive, so that a single unit that is left is alive. Residual branches of ResNets end
    in a small weight, as with torchvision's `zero_init_residual`.

    Args:
        scales: θ for which that is to be so, where `network` has noise.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        draw = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.copy_(draw * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * draw)
    network.eval()
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            (module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight.mul_(0.3)
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.reset_running_stats()
            module.momentum = None if isinstance(module, _BatchNorm) else 1.0
            module.train()

    def rescale(module, arguments, output):
        spread = (output - output.mean(dim=0)).std()
        factor = 1 / spread if spread > 0 else torch.ones_like(spread)
        module.weight.mul_(factor)
        output = output * factor
        if module.bias is not None:
            dim = 1 if isinstance(module, _ConvNd) else output.dim() - 1
            mean = output.mean(dim=[other for other in range(output.dim()) if other != dim])
            shift = 0.3 * torch.randn(mean.shape, generator=generator).to(mean) - mean
            module.bias.mul_(factor).add_(shift)
            output = output + shift.view([-1 if other == dim else 1 for other in range(output.dim())])
        return output

    handles = [
        module.register_forward_hook(rescale)
        for module in network.modules()
        if isinstance(module, nn.Linear | _ConvNd)
    ]
    with fixed_scales(network, scales or {}):
        call(network, example)
        for handle in handles:
            handle.remove()
        network.eval()
        for output in floating(call(network, example)):
            assert spread_of(output) >= LEAST_SPREAD * output.abs().max()
    return network


def floating(value) -> list[Tensor]:
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def spread_of(output: Tensor) -> Tensor:
    return (output - output.mean(dim=0)).abs().max()


@torch.no_grad()
def outputs_of(network, example, paths=(), scales=None) -> dict[str, list[Tensor]]:
    """What the layers at `paths` give, by path, and under "" what the network gives."""
    found: dict[str, list[Tensor]] = {}

    def keep(path):
        return lambda module, arguments, output: found.setdefault(path, []).extend(floating(output))

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    double = next(network.parameters()).dtype == torch.float64
    with (
        nullcontext() if scales is None else fixed_scales(network, scales),
        InDouble() if double else nullcontext(),
    ):
        found[""] = floating(call(network, example))
    for handle in handles:
        handle.remove()
    return found


def ones(network) -> dict[str, Tensor]:
    return {site: torch.ones_like(layer.kept).float() for site, layer in noise_layers(network).items()}


def plan(network, example, kind, seed=1):
    """(kept, scales): half of each group, all of it or one structure, at scales between 0.5 and 1.

    Of structures inside others those of one that is kept, so that something of it is left.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, scales = {}, {}
    groups = structure_groups(network, example)
    for site, layer in noise_layers(network).items():
        # the root mean square of few channels leaves little of them but their signs
        one = 8 if groups[site].norms else 1
        count = {"half": max(1, layer.features // 2), "nothing": layer.features, "all but one": one}[kind]
        kept[site] = torch.zeros(layer.features, dtype=torch.bool)
        kept[site][torch.randperm(layer.features, generator=generator)[:count]] = True
        scales[site] = 0.5 + 0.5 * torch.rand(layer.features, generator=generator, dtype=torch.float64)
    for inner, outers in Nesting.of(groups.values()).owners.items():
        inside = torch.stack([kept[outer][owner] & (owner >= 0) for outer, owner in outers.items()]).any(0)
        order = (~inside).int().argsort(stable=True)
        kept[inner] = torch.zeros_like(inside).index_fill(0, order[: int(kept[inner].sum())], True)
    return kept, scales


@dataclass
class Inserted:
    """A family's network, the same with noise, and what the network was before that."""

    family: Family
    network: nn.Module
    example: Any
    noisy: nn.Module
    before: nn.Module


@dataclass
class Removed:
    """What is left of a noisy network after a plan."""

    inserted: Inserted
    kind: str
    dtype: torch.dtype
    noisy: nn.Module
    example: Any
    kept: dict[str, Tensor]
    scales: dict[str, Tensor]  # θ of the reduced model
    small: nn.Module
    cuts: Cuts


# Families that take seconds each. Smaller ones have each of their parts: convnext residual streams and depthwise
# convolutions, u_net concatenation and BatchNorm, lenet5 flattened filters, channel_shuffle what shufflenet does.
HEAVY = {
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3", "vgg", "resnext", "densenet", "shufflenet", "albert"
}  # fmt: skip
# Of these the quick tests run one plan.
ONE_MECHANISM = {family.build.__name__ for family in (*CHANNELS, *HEADS, *TOKENS)}


def pytest_generate_tests(metafunc):
    """Each family, and of each what three plans leave in both precisions; among the quick tests float64 has one."""
    if "removed" in metafunc.fixturenames:
        metafunc.parametrize(
            ("inserted", "removed"),
            [
                pytest.param(
                    family,
                    (kind, dtype),
                    id=f"{family.build.__name__}-{kind}-{dtype}".replace("torch.", ""),
                    marks=[pytest.mark.slow]
                    * (
                        family.build.__name__ in HEAVY
                        or kind == "nothing"
                        or (dtype == torch.float64 and kind != "half")
                        or (
                            family.build.__name__ in ONE_MECHANISM
                            and (kind, dtype) != ("half", torch.float32)
                        )
                    ),
                )
                for family in FAMILIES
                for kind in ("half", "nothing", "all but one")
                for dtype in TOLERANCES
            ],
            indirect=True,
            scope="module",
        )
    elif "inserted" in metafunc.fixturenames:
        named = [
            pytest.param(
                family, id=family.build.__name__, marks=[pytest.mark.slow] * (family.build.__name__ in HEAVY)
            )
            for family in FAMILIES
        ]
        metafunc.parametrize("inserted", named, indirect=True, scope="module")


@pytest.fixture(scope="module")
def inserted(request):
    family = request.param
    torch.manual_seed(0)
    network, example = family.build()
    conditioned(network, example)
    before = copy.deepcopy(network)
    return Inserted(family, network, example, bmrs.insert_noise(network, example), before)


@pytest.fixture(scope="module")
def removed(inserted, request):
    kind, dtype = request.param
    noisy = copy.deepcopy(inserted.noisy).to(dtype)
    kept, scales = plan(noisy, inserted.example, kind)
    theta = {site: (scales[site] * kept[site]).to(dtype) for site in kept}
    example = as_double(inserted.example) if dtype == torch.float64 else inserted.example
    conditioned(noisy, example, theta)
    example = first_examples(example, COMPARED)
    small, cuts, _ = remove_structures(noisy, kept, scales, example)
    return Removed(inserted, kind, dtype, noisy, example, kept, theta, small, cuts)


def test_the_structures_are_those_expected(inserted):
    found = bmrs.structures(inserted.network, inserted.example)
    kinds: dict[str, int] = {}
    for group in found:
        kinds[group.kind] = kinds.get(group.kind, 0) + group.features
    assert len(found) == inserted.family.groups
    assert kinds == inserted.family.structures
    expected = dict(inserted.family.stays)
    met = set()
    for refused in found.refused:
        pattern = refused.path
        if pattern not in expected:
            (pattern,) = [some for some in expected if fnmatchcase(refused.path, some)]
        assert expected[pattern] in refused.reason
        met.add(pattern)
    assert met == set(expected)
    if inserted.family.build.__name__ in ONE_MECHANISM - {"gru"}:
        assert not any(refused.unsupported for refused in found.refused)


def test_insertion_leaves_the_network_alone(inserted):
    network, before = inserted.network, inserted.before
    after = network.state_dict()
    assert list(after) == list(before.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())
    for module, old in zip(network.modules(), before.modules(), strict=True):
        assert type(module) is type(old)
        assert module.training == old.training
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    flags = [(parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    assert flags == [(True, None)] * len(flags)


def test_the_noisy_network_is_called_and_loaded_as_the_original(inserted):
    network, noisy, example = inserted.network, copy.deepcopy(inserted.noisy), inserted.example
    assert type(noisy) is type(network)
    assert inspect.signature(noisy.forward) == inspect.signature(network.forward)
    assert noisy.training == network.training
    replaced = [path for path, module in noisy.named_modules() if isinstance(module, SeparateAttention)]
    names, old_names = ({name for name, _ in some.named_parameters()} for some in (noisy, network))
    assert all(name.startswith(tuple(f"{path}." for path in replaced)) for name in names ^ old_names)
    for name, parameter in network.named_parameters():
        if name in names:
            assert torch.equal(noisy.get_parameter(name), parameter)
    want = outputs_of(network, example)[""]
    have = outputs_of(noisy, example, scales=ones(noisy))[""]
    assert_close(have, want, 1e-5)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.zero_()
    missing, unexpected = noisy.load_state_dict(network.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("structure_noise.") for name in missing)
    assert_close(outputs_of(noisy, example, scales=ones(noisy))[""], have, 0.0)


def assert_close(have, want, tolerance):
    for found, wanted in zip(have, want, strict=True):
        assert found.dtype == wanted.dtype
        assert spread_of(wanted) >= LEAST_SPREAD * wanted.abs().max()
        assert (found - wanted).abs().max() <= tolerance * spread_of(wanted)


def test_the_small_network_is_the_reduced_model(removed):
    noisy, small, tolerance = removed.noisy, removed.small, TOLERANCES[removed.dtype]
    groups = structure_groups(noisy, removed.example).values()
    paths = list(dict.fromkeys(member.read_by for group in groups for member in group.consumers))
    paths = [path for path in paths if path]  # the network itself is compared anyway
    have = outputs_of(small, removed.example, [path for path in paths if is_called(small, path)])
    want = outputs_of(noisy, removed.example, paths, removed.scales)
    assert_close(have.pop(""), want.pop(""), tolerance)
    if not any(isinstance(module, nn.MultiheadAttention) for module in small.modules()):
        assert set(have) == set(want)
    for path, found in have.items():
        for actual, expected in zip(found, want[path], strict=True):
            expected = what_is_left(noisy, removed.cuts, path, expected)
            if expected is None:
                continue
            scale = max(spread_of(expected), LEAST_SPREAD * expected.abs().max())
            assert (actual - expected).abs().max() <= tolerance * scale, path


def what_is_left(network, cuts, path, output) -> Tensor | None:
    """The entries of a layer's output that it has in the smaller network; None for a module that is no torch layer."""
    layer = network.get_submodule(path)
    if not isinstance(layer, nn.Linear | _ConvNd):
        return None
    dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
    kept = cuts.tensors.get(f"{path}.weight", {}).get(dim)
    if kept is None:
        return output
    return output.index_select(1 if isinstance(layer, _ConvNd) else -1, torch.tensor(kept))


def is_called(network, path) -> bool:
    """Whether a layer is run as a module: torch's attention reads the weights of its own."""
    parent = path.rpartition(".")[0]
    return not isinstance(network.get_submodule(parent), nn.MultiheadAttention)


def test_the_small_network_is_plain_and_as_small_as_planned(removed):
    small, noisy = removed.small, removed.noisy
    assert type(small) is type(removed.inserted.network)
    assert parameters(small) == removed.cuts.parameters_left(noisy)
    assert all(parameter.dtype == removed.dtype for parameter in small.parameters())
    for module in small.modules():
        assert not isinstance(module, HookedNoise | bmrs.MultiplicativeNoise)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    original = removed.inserted.network
    if removed.kind == "nothing":
        assert parameters(small) == parameters(original)
        assert [type(module) for module in small.modules()] == [type(module) for module in original.modules()]
        assert list(small.state_dict()) == list(original.state_dict())
    else:
        assert parameters(small) < parameters(original)


def test_numbers_that_modules_keep_are_those_of_what_is_left(removed):
    sizes: dict[tuple[str, str], int] = {}
    gone: dict[tuple[str, str], set[int]] = {}
    for group in structure_groups(removed.noisy, removed.example).values():
        for count in group.counts:
            lost = count.indices[~removed.kept[group.site][count.units]]
            assert sizes.setdefault((count.path, count.name), count.size) == count.size
            gone.setdefault((count.path, count.name), set()).update(lost.tolist())
    for (path, name), size in sizes.items():
        assert number(removed.noisy, path, name) == size
        assert number(removed.small, path, name) == size - len(gone[path, name])


def number(network, path, name) -> int:
    """A number that a module keeps, or an entry of several that it keeps."""
    attribute, _, entry = name.partition(".")
    value = getattr(network.get_submodule(path), attribute)
    return value[int(entry)] if entry else value


def test_sizes_of_layers_are_those_of_their_weights(removed):
    for path, module in removed.small.named_modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), path
        elif isinstance(module, nn.Embedding):
            assert tuple(module.weight.shape) == (module.num_embeddings, module.embedding_dim), path
        elif isinstance(module, _ConvNd):
            sides = (module.out_channels, module.in_channels // module.groups)
            if isinstance(module, _ConvTransposeNd):
                sides = (module.in_channels, module.out_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == sides, path
        elif isinstance(module, _NormBase) and module.affine:
            assert len(module.weight) == module.num_features, path
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels, path
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            assert tuple(module.weight.shape) == tuple(module.normalized_shape), path


def test_it_is_rebuilt_from_a_fresh_network_and_json(removed):
    cuts = Cuts.from_json(json.loads(json.dumps(removed.cuts.to_json())))
    fresh = removed.inserted.family.build()[0].to(removed.dtype).eval()
    separate_attention(fresh)
    cuts.cut(fresh)
    fresh = bmrs.without_noise(fresh)
    fresh.load_state_dict(removed.small.state_dict())
    for found, wanted in zip(
        outputs_of(fresh, removed.example)[""], outputs_of(removed.small, removed.example)[""], strict=True
    ):
        assert torch.equal(found, wanted)


def test_indices_shifted_by_one_are_caught(inserted, monkeypatch):
    example = first_examples(inserted.example, COMPARED)
    kept, scales = plan(inserted.noisy, example, "half")
    groups = structure_groups(inserted.noisy, example)
    first_of_kind = {group.kind: site for site, group in reversed(groups.items())}
    for site in first_of_kind.values():
        kept[site][:2] = torch.tensor([True, False])
        group = groups[site]
        # what is selected of a structure is shifted along, or the layers would not even fit
        selections = {member.path for member in group.members if member.role == "selection"}
        wrong = [
            replace(member, units=shifted_by_one(member.units))
            if member.role in ("consumer", "both") or member.path in selections
            else member
            for member in group.members
        ]
        shifted = {**groups, site: replace(group, members=tuple(wrong))}
        monkeypatch.setattr(surgery, "structure_groups", lambda network, example, shifted=shifted: shifted)
        caught = r"differs from the reduced model: output \d+ of .* by at"
        makers, readers = (
            {(member.path, member.name, member.dim) for member in group.members if member.role in roles}
            for roles in (["producer"], ["consumer", "both"])
        )
        # of positions fewer than planned may be left where filters go as well; a weight that makes and reads loses
        # both; a layer that reads some of the structures may lose another number of columns
        some = any(len(member.units.unique()) < group.features for member in group.consumers)
        tied = makers & readers or shares_a_weight(inserted.noisy, makers, readers)
        if group.kind == "positions" or some or tied:
            caught += r"|fails in '.*' with|has shape"
        with pytest.raises((EqualityError, ValueError), match=caught + "|cuts must fit the network"):
            remove_structures(inserted.noisy, kept, scales, example)


def shifted_by_one(units: Tensor) -> Tensor:
    """Each structure replaced by the next one of which a tensor has entries."""
    own, places = units.unique(return_inverse=True)
    return own[(places + 1) % len(own)]


def shares_a_weight(network, makers, readers) -> bool:
    """Whether one tensor makes structures and reads them along one dimension, under two paths."""
    made, read = (
        {(id(getattr(network.get_submodule(path), name)), dim) for path, name, dim in members}
        for members in (makers, readers)
    )
    return bool(made & read)


def family(name) -> Family:
    return next(some for some in FAMILIES if some.build.__name__ == name)


@pytest.mark.parametrize("name", ["hugging_face_vit", "hugging_face_bert", "hugging_face_llama"])
def test_attention_of_hugging_face_counts_the_heads_that_are_left(name):
    torch.manual_seed(0)
    network, example = family(name).build()
    noisy = bmrs.insert_noise(network, example)
    kept, scales = plan(noisy, example, "nothing")
    sites = [group.site for group in structure_groups(noisy, example).values() if group.kind == "heads"]
    assert len(sites) == 2
    for left, site in enumerate(sites, start=1):
        kept[site][left:] = False
    small = remove_structures(noisy, kept, scales, example).network
    for left, site in enumerate(sites, start=1):
        attention = small.get_submodule(site)
        if name == "hugging_face_llama":
            assert attention.q_proj.out_features == attention.o_proj.in_features == 2 * 8 * left
            assert attention.k_proj.out_features == attention.v_proj.out_features == 8 * left
            assert attention.num_key_value_groups == 2
        else:
            assert attention.num_attention_heads == left
        if name == "hugging_face_bert":
            assert attention.all_head_size == 8 * left


@pytest.mark.parametrize("unsupported", UNSUPPORTED, ids=lambda some: some.name)
def test_what_can_not_be_followed_stays_and_the_rest_is_handled(unsupported):
    torch.manual_seed(0)
    network, example = unsupported.build()
    found = bmrs.structures(network, example)
    reasons = [
        refused.reason
        for refused in found.refused
        if refused.unsupported and fnmatchcase(refused.path, unsupported.path)
    ]
    assert any(unsupported.reason in reason for reason in reasons)
    assert all(len(reason.split()) > 2 for reason in reasons)
    for function in (bmrs.structures, bmrs.insert_noise):
        with pytest.raises(StructureError) as caught:
            function(network, example, strict=True)
        assert all(reason in str(caught.value) for reason in reasons)
        # what the message says to leave out is left out
        advice = re.search(r"leave_out=(\[.*\])", str(caught.value))
        function(network, example, strict=True, leave_out=literal_eval(advice[1]))
    noisy = bmrs.insert_noise(network, example)
    kept, scales = plan(noisy, example, "half")
    small = remove_structures(noisy, kept, scales, example).network
    assert parameters(small) < parameters(network)


@pytest.mark.parametrize(
    "some",
    [
        pytest.param(
            some,
            id=some.build.__name__,
            marks=[pytest.mark.slow] * (some.build.__name__ in {*HEAVY, *ONE_MECHANISM}),
        )
        for some in FAMILIES
    ],
)
def test_on_the_meta_device(some):
    with torch.device("meta"):
        network, example = some.build()
    if some.build.__name__ == "hugging_face_bert":
        del example["attention_mask"]  # Hugging Face looks at its values
    example = map_tensors(lambda tensor: tensor.to("meta"), example)
    noisy = bmrs.insert_noise(network, example)
    # nothing is tried there, and a table of zeros can't be seen to be one
    assert len(noise_layers(noisy)) == some.groups + {"swin": 1, "t5": -1}.get(some.build.__name__, 0)
    with fixed_scales(noisy, ones(noisy)), OnlyMeta():
        outputs = call(noisy, example)
    assert [output.shape for output in tensors_of(outputs)] == [
        output.shape for output in tensors_of(call(network, example))
    ]


def test_the_page_of_networks_is_what_the_families_say():
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    assert page.read_text() == networks_page(), (
        "docs/networks.md is out of date: python tests/support/network_families.py > docs/networks.md"
    )


def nested():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(96, 5), nn.Tanh(), nn.Linear(5, 3)),
    ), torch.randn(8, 1, 8, 8)


@pytest.mark.parametrize(
    ("leave_out", "sites"),
    [
        ([], ["0.0", "0.2", "1.0"]),
        (["0.0"], ["0.2", "1.0"]),
        (["0.2"], ["1.0"]),
        (["0"], ["1.0"]),
        (["1.*"], ["0.0"]),
        (["*.0"], []),
        (["0.0", "1.2"], ["0.2"]),
        (["0.2.bias"], ["0.0", "1.0"]),
    ],
)
def test_what_is_left_out_stays_with_all_that_it_touches(leave_out, sites):
    network, example = nested()
    assert list(bmrs.structures(network, example, leave_out=leave_out).groups) == sites
    if sites:
        assert list(noise_layers(bmrs.insert_noise(network, example, leave_out=leave_out))) == sites
    else:
        with pytest.raises(StructureError, match=r"something that can be removed: .*left out"):
            bmrs.insert_noise(network, example, leave_out=leave_out)


def test_what_is_to_be_left_out_must_exist():
    network, example = nested()
    for wrong in ("2", "0.0.0", "1.?.weights", "Linear"):
        with pytest.raises(ValueError, match=f"leave_out.*none matches {re.escape(repr(wrong))}"):
            bmrs.insert_noise(network, example, leave_out=["0.0", wrong])


class OneDictionary(nn.Module):
    """Takes a dictionary as its one argument."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, batch):
        return self.head(torch.tanh(self.hidden(batch["numbers"]))) * batch["weight"][:, None]


class TwoArguments(nn.Module):
    """Takes two tensors, by position or by keyword."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, numbers, shift):
        return self.head(input=torch.tanh(self.hidden(numbers))) + shift


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (OneDictionary(), {"numbers": torch.randn(8, 4), "weight": torch.rand(8)}),
        (TwoArguments(), (torch.randn(8, 4), torch.randn(8, 2))),
        (TwoArguments(), {"shift": torch.randn(8, 2), "numbers": torch.randn(8, 4)}),
    ],
    ids=["dictionary", "positions", "keywords"],
)
def test_inputs_of_every_form(network, example):
    noisy = bmrs.insert_noise(network, example)
    assert list(noise_layers(noisy)) == ["hidden"]
    kept, scales = plan(noisy, example, "half")
    small = remove_structures(noisy, kept, scales, example).network
    assert (small.hidden.out_features, small.head.in_features) == (3, 3)


def test_noise_is_inserted_once():
    network, example = nested()
    noisy = bmrs.insert_noise(network, example)
    for again in (bmrs.structures, bmrs.insert_noise):
        with pytest.raises(ValueError, match=r"no noise layers yet: it has \['0\.0', '0\.2', '1\.0'\]"):
            again(noisy, example)


def test_structures_are_printed_and_tabulated():
    found = bmrs.structures(*nested())
    assert str(found).splitlines() == [
        "15 structures in 3 groups",
        "  0.0: 4 filters, read by 0.2",
        "  0.2: 6 filters, read by 1.0",
        "  1.0: 5 units, read by 1.2",
        "not removable:",
        "  1.2: 3 channels, an output of the network",
    ]
    table = found.table
    assert list(table.name) == ["0.0", "0.2", "1.0", "1.2"]
    assert list(table.kind) == ["filters", "filters", "units", ""]
    assert list(table.structures) == [4, 6, 5, 0]
    assert list(table.read_by) == ["0.2", "1.0", "1.2", ""]
    assert list(table.reason) == ["", "", "", "an output of the network"]
    network, example = family("vision_transformer").build()
    assert "self_attention: 4 heads of 8 channels, read by" in str(bmrs.structures(network, example))


def test_a_copy_has_noise_of_its_own():
    network, example = nested()
    noisy = bmrs.insert_noise(network, example)
    other = copy.deepcopy(noisy)
    before = outputs_of(noisy, example, scales=ones(noisy))[""][0]
    for layer in noise_layers(other).values():
        layer.kept.zero_()
    constant = outputs_of(other, example, scales=ones(other))[""][0]
    assert spread_of(constant) == 0
    assert torch.equal(outputs_of(noisy, example, scales=ones(noisy))[""][0], before)
    other[1][2].weight.data.zero_()
    bmrs.without_noise(other)
    assert torch.equal(outputs_of(noisy, example, scales=ones(noisy))[""][0], before)


def test_a_layer_called_outside_of_the_network_is_refused():
    noisy = bmrs.insert_noise(*nested())
    for path, shape in (("0.2", (2, 4, 6, 6)), ("1.2", (2, 5))):
        with pytest.raises(RuntimeError, match=f"layer '{path}' has noise .* call the network itself"):
            noisy.get_submodule(path)(torch.randn(shape))
    with pytest.raises(RuntimeError, match="call the network itself"):
        noisy[1](torch.randn(2, 96))


def test_a_failed_call_leaves_no_draw_behind():
    network, example = nested()
    noisy = bmrs.insert_noise(network, example)
    with pytest.raises(RuntimeError, match="channels"), fixed_scales(noisy, ones(noisy)):
        noisy(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="call the network itself"):
        noisy[1](torch.randn(2, 96))


@pytest.mark.parametrize("draws", [1, 3, None])
def test_a_fit_draws_several_values_per_batch(draws):
    network, x = nested()
    x = torch.cat([x, x + 0.1])
    y = torch.arange(16) % 3
    noisy = bmrs.insert_noise(network, x)
    shapes = set()
    for layer in noise_layers(noisy).values():
        draw = layer.draw
        layer.draw = lambda draw=draw: shapes.add(tuple((theta := draw()).shape)) or theta
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    before = copy.deepcopy(noisy.state_dict())
    result = bmrs.fit(
        model, guide, (x, y), epochs=1, batch_size=8, draws_per_batch=draws, progress=False, validate=True
    )
    assert result.history.loss.notna().all()
    count = draws or 8
    assert {(count, features) if count > 1 else (features,) for features in (4, 6, 5)} <= shapes
    assert any(not torch.equal(value, before[name]) for name, value in noisy.state_dict().items())
