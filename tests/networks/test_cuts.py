"""Cutting is indexing: what stays of every tensor, what is refused, and scales folded into what reads them."""

import copy
import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.groups import Count, Member, StructureGroup, after, cuts_of
from pyro_bmrs.networks.surgery import fold

quick = settings(max_examples=40, deadline=None)


@dataclass
class Layer:
    """A layer and, written down anew here, which dimension of which tensor counts what it makes and reads."""

    module: nn.Module
    made: dict[str, int]
    read: dict[str, int]
    shape: tuple[int, ...]  # of one example of its input
    groups: int = 1


def varied(module, seed):
    """Tensors of which no two entries are alike, buffers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module.eval()


KINDS = (
    "linear", "conv", "transposed", "grouped", "transposed in groups", "depthwise", "multiplied", "batch", "instance",
    "prelu", "embedding",
)  # fmt: skip


@st.composite
def layers(draw, kinds=KINDS):
    kind = draw(st.sampled_from(kinds))
    inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dims = draw(st.integers(1, 2))
    bias = draw(st.booleans())
    pixels = (5,) * dims
    made = {"weight": 0, "bias": 0} if bias else {"weight": 0}
    ahead, back = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    groups = draw(st.integers(2, 3)) if "group" in kind else 1
    inputs, outputs = inputs * groups, outputs * groups
    if kind == "linear":
        layer = Layer(nn.Linear(inputs, outputs, bias=bias), made, {"weight": 1}, (inputs,))
    elif kind in ("conv", "grouped"):
        convolution = ahead(inputs, outputs, 3, groups=groups, bias=bias)
        layer = Layer(convolution, made, {"weight": 1}, (inputs, *pixels), groups)
    elif kind.startswith("transposed"):
        convolution = back(inputs, outputs, 3, groups=groups, bias=bias)
        layer = Layer(convolution, {**made, "weight": 1}, {"weight": 0}, (inputs, *pixels), groups)
    elif kind in ("depthwise", "multiplied"):
        inputs += 1
        times = 1 if kind == "depthwise" else draw(st.integers(2, 3))
        convolution = ahead(inputs, inputs * times, 3, groups=inputs, bias=bias)
        layer = Layer(convolution, made, {}, (inputs, *pixels), inputs)
    elif kind in ("batch", "instance"):
        affine, track = draw(st.booleans()), draw(st.booleans())
        class_ = {
            "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
            "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d),
        }[kind][dims - 1]
        tensors = {name: 0 for name in ("weight", "bias") if affine}
        tensors |= {name: 0 for name in ("running_mean", "running_var") if track}
        norm = class_(inputs, affine=affine, track_running_stats=track)
        layer = Layer(norm, tensors, {}, (inputs, *pixels))
    elif kind == "prelu":
        layer = Layer(nn.PReLU(inputs), {"weight": 0}, {}, (inputs, *pixels))
    else:
        layer = Layer(nn.Embedding(outputs, inputs), {"weight": 1}, {}, (4,))
    varied(layer.module, draw(st.integers(0, 99)))
    return layer


def some_of(draw, size):
    """Increasing numbers, at least one."""
    return sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size)))


def spread(local, groups, each):
    """The same numbers in each group."""
    return [group * each + index for group in range(groups) for index in local]


@dataclass
class Choice:
    """What is to stay of a layer, and the cuts that say so."""

    cuts: Cuts
    made: list[int] | None  # channels of its output
    read: list[int] | None  # channels of its input


def chosen(draw, layer, path=""):
    """Cuts of one layer: of what it makes, of what it reads, or of both; channel by channel where it is depthwise."""
    module, start = layer.module, f"{path}." if path else ""
    tensors, numbers = {}, {}

    def keep(name, dim, kept):
        tensors.setdefault(f"{start}{name}", {})[dim] = kept

    if isinstance(module, nn.Conv1d | nn.Conv2d) and layer.groups == module.in_channels and not layer.read:
        read = some_of(draw, layer.groups)
        times = module.out_channels // layer.groups
        made = [channel * times + k for channel in read for k in range(times)]
        for name, dim in layer.made.items():
            keep(name, dim, made)
        numbers[path] = {"groups": len(read)}
        return Choice(Cuts(tensors, {}, numbers), made, read)
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    made = read = None
    if layer.made and draw(st.booleans(), label="made"):
        size = layer.module.weight.shape[1 if transposed else 0] if "weight" in layer.made else None
        if "weight" not in layer.made or not layer.read:
            size = getattr(module, next(iter(layer.made))).shape[layer.made[next(iter(layer.made))]]
        if transposed:
            local = some_of(draw, size)
            made = spread(local, layer.groups, size)
        else:
            # as many rows of each group, not the same ones
            each = size // layer.groups
            count = draw(st.integers(1, each))
            made = [
                group * each + row
                for group in range(layer.groups)
                for row in sorted(draw(st.permutations(range(each)))[:count])
            ]
        for name, dim in layer.made.items():
            keep(name, dim, local if transposed and name == "weight" else made)
    if layer.read and draw(st.booleans(), label="read"):
        ((name, dim),) = layer.read.items()
        size = module.weight.shape[dim]
        if transposed:
            each = size // layer.groups
            count = draw(st.integers(1, each))
            read = [
                group * each + row
                for group in range(layer.groups)
                for row in sorted(draw(st.permutations(range(each)))[:count])
            ]
            keep(name, dim, read)
        else:
            local = some_of(draw, size)
            read = spread(local, layer.groups, size)
            keep(name, dim, local)
    return Choice(Cuts(tensors, {}, numbers), made, read)


@quick
@given(st.data(), layers())
def test_every_tensor_is_indexed(data, layer):
    module, before = layer.module, copy.deepcopy(layer.module)
    objects = dict(module.named_parameters())
    for parameter in objects.values():
        parameter.grad = torch.ones_like(parameter)
    cuts = chosen(data.draw, layer).cuts
    wanted = dict(before.state_dict())
    for name, dims in cuts.tensors.items():
        for dim, kept in dims.items():
            wanted[name] = wanted[name].index_select(dim, torch.tensor(kept))
    left = cuts.parameters_left(module)
    cuts.cut(module)
    have = module.state_dict()
    assert list(have) == list(wanted)
    assert all(torch.equal(have[name], wanted[name]) for name in wanted)
    assert left == parameters(module)
    assert bool(cuts) == bool(cuts.tensors)
    for name, parameter in module.named_parameters():
        assert parameter is objects[name]
        assert (parameter.grad is None) == (name in cuts.tensors)


@quick
@given(st.data(), layers())
def test_what_is_left_computes_its_part_of_the_whole(data, layer):
    """The channels left of the output are those the whole layer gives where the cut inputs are zero."""
    module, whole = layer.module, copy.deepcopy(layer.module)
    indexed = isinstance(module, nn.Embedding)
    x = torch.randint(module.num_embeddings, (3, *layer.shape)) if indexed else torch.randn(3, *layer.shape)
    choice = chosen(data.draw, layer)
    small_x = x
    if choice.read is not None:
        small_x = x.index_select(1, torch.tensor(choice.read))
        x = torch.zeros_like(x).index_copy(1, torch.tensor(choice.read), small_x)
    elif choice.made is not None and not indexed and not layer.read:
        # each channel for itself: those that go take theirs along
        small_x = x.index_select(1, torch.tensor(choice.made))
    choice.cuts.cut(module)
    at = 1 if not indexed and not isinstance(module, nn.Linear) else -1
    expected = whole(x)
    if choice.made is not None:
        expected = expected.index_select(at, torch.tensor(choice.made))
    torch.testing.assert_close(module(small_x), expected)


@quick
@given(st.data(), st.lists(st.integers(1, 6), min_size=2, max_size=4), st.booleans())
def test_parameters_left_are_those_that_are_left(data, widths, images):
    parts = []
    for size, following in pairwise(widths):
        made, pixels = {"weight": 0, "bias": 0}, (5, 5) if images else ()
        layer = nn.Conv2d(size, following, 3) if images else nn.Linear(size, following)
        norm = nn.BatchNorm2d(following) if images else nn.BatchNorm1d(following)
        statistics = {"running_mean": 0, "running_var": 0}
        parts += [
            Layer(layer, made, {"weight": 1}, (size, *pixels)),
            Layer(norm, made | statistics, {}, (following, *pixels)),
            Layer(nn.PReLU(following), {"weight": 0}, {}, (following, *pixels)),
        ]
    network = nn.Sequential(*(part.module for part in parts))
    tensors = {}
    for path, part in enumerate(parts):
        tensors |= chosen(data.draw, part, str(path)).cuts.tensors
    cuts = Cuts(tensors)
    left = cuts.parameters_left(network)
    cuts.cut(network)
    assert left == parameters(network)


def test_numbers_that_modules_keep_follow():
    network = nn.Sequential(
        nn.Linear(4, 5), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Embedding(3, 7), nn.PReLU(4),
        nn.BatchNorm2d(4), nn.ConvTranspose2d(3, 5, 2), nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Conv2d(3, 6, 3, groups=3), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm((2, 3)), nn.InstanceNorm2d(4),
        bmrs.InputSelection(5), nn.InstanceNorm2d(3, affine=True),
    )  # fmt: skip
    network[0].num_heads, network[0].sizes, network[0].pair = 4, (4, 7), [1, 3]
    rows = {
        "0": [1, 3], "1": [0, 3], "2": [1, 2], "4": [3], "5": [0, 1, 2], "8": [2, 3], "9": [1, 2], "10": [2, 3],
        "14": [0],
    }  # fmt: skip
    tensors = {f"{path}.weight": {0: kept} for path, kept in rows.items()}
    tensors |= {f"{path}.bias": {0: kept} for path, kept in rows.items() if path != "4"}
    tensors |= {f"5.running_{name}": {0: rows["5"]} for name in ("mean", "var")}
    tensors["0.weight"] = {0: [1, 3], 1: [0]}
    tensors["1.weight"] = {0: [0, 3], 1: [1]}
    tensors["3.weight"] = {1: [0, 6]}
    tensors |= {"6.weight": {0: [0, 2], 1: [4]}, "6.bias": {0: [4]}}
    tensors |= {"7.weight": {0: [1, 3], 1: [0, 2]}, "7.bias": {0: [0, 2, 3, 5]}}
    tensors |= {"11.weight": {1: [0, 2]}, "13.index": {0: [1]}}
    numbers = {
        "0": {"num_heads": 2, "sizes.1": 3, "pair.0": 1}, "2": {"groups": 2}, "8": {"groups": 1},
        "10": {"num_groups": 1}, "12": {"num_features": 2},
    }  # fmt: skip
    Cuts(tensors, {"13": [1, 4]}, numbers).cut(network)
    assert repr(network) == repr(
        nn.Sequential(
            nn.Linear(1, 2), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, groups=2), nn.Embedding(3, 2),
            nn.PReLU(1), nn.BatchNorm2d(3), nn.ConvTranspose2d(2, 1, 2), nn.ConvTranspose2d(2, 4, 2, groups=2),
            nn.Conv2d(1, 2, 3), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.RMSNorm((2, 2)), nn.InstanceNorm2d(2),
            network[13], nn.InstanceNorm2d(1, affine=True),
        )
    )  # fmt: skip
    assert (network[0].num_heads, network[0].sizes, network[0].pair) == (2, (4, 3), [1, 3])
    assert (network[13].features, network[13].width, network[13].index.tolist()) == (1, 2, [0])


class Tied(nn.Module):
    """An embedding whose weight is also that of the layer at the end, and an own parameter."""

    def __init__(self, ties=True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.arange(1.0, 6.0))
        if ties:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x) * self.scale)


def test_a_tensor_that_layers_share_is_cut_once():
    members = (
        Member("embedding", "weight", 1, "producer", torch.arange(5), torch.arange(5)),
        Member("", "scale", 0, "between", torch.arange(5), torch.arange(5)),
        Member("head", "weight", 1, "consumer", torch.arange(5), torch.arange(5), input_dim=-1),
    )
    group, kept = StructureGroup("s", 5, members), torch.tensor([True, False, True, False, False])
    network, x = Tied(), torch.tensor([[0, 3], [6, 2]])
    cuts = cuts_of(network, [group], {"s": kept})
    assert {name: dims for name, dims in cuts.tensors.items() if dims == {1: [0, 2]}}.keys() == {
        "embedding.weight", "head.weight",
    }  # fmt: skip
    whole = copy.deepcopy(network)
    with torch.no_grad():
        whole.scale[~kept] = 0
    assert cuts.parameters_left(network) == 14 + 7 + 2
    for one, ties in ((network, True), (Tied(ties=False), False)):
        cuts.cut(one)
        assert (one.head.weight is one.embedding.weight) is ties
        assert (one.embedding.embedding_dim, one.head.in_features, len(one.scale)) == (2, 2, 2)
    torch.testing.assert_close(network(x), whole(x))
    # one name is enough where layers do share
    single = Tied()
    Cuts({"head.weight": {1: [0, 2]}, "scale": {0: [0, 2]}}).cut(single)
    assert (single.embedding.embedding_dim, single.head.in_features) == (2, 2)
    with pytest.raises(
        ValueError, match=r"'head.weight', which layers share, would be cut twice in dimension 1"
    ):
        Cuts({"embedding.weight": {1: [0]}, "head.weight": {1: [1]}}).cut(Tied())


@pytest.mark.parametrize("times", [1, 2])
def test_a_depthwise_convolution_counts_its_groups(times):
    convolution = varied(nn.Conv2d(4, 4 * times, 3, groups=4), 0)
    rows, units = torch.arange(4 * times), torch.arange(4 * times) // times
    members = tuple(Member("0", name, 0, "between", rows, units) for name in ("weight", "bias"))
    count = Count("0", "groups", 4, torch.arange(4), torch.arange(4))
    group = StructureGroup("s", 4, members, counts=(count,))
    network = nn.Sequential(copy.deepcopy(convolution))
    for kept in ([True, False, True, True], [False, True, True]):  # one removal after the other
        masks = {"s": torch.tensor(kept)}
        cuts = cuts_of(network, [group], masks)
        assert cuts.numbers == {"0": {"groups": sum(kept)}}
        cuts.cut(network)
        (group,) = after([group], masks, cuts)
    assert (group.counts[0].size, group.counts[0].indices.tolist(), group.features) == (2, [0, 1], 2)
    assert [(m.indices.tolist(), m.units.tolist()) for m in group.members] == [
        ([*range(2 * times)], [k // times for k in range(2 * times)])
    ] * 2
    x = torch.randn(2, 4, 5, 5)
    wanted = convolution(x).unflatten(1, (4, times))[:, [2, 3]].flatten(1, 2)
    torch.testing.assert_close(network(x[:, [2, 3]]), wanted)


def test_groups_that_own_parts_of_one_tensor_and_one_number_add_up():
    """As the parts of a fused projection do, or branches that are joined."""
    network = nn.Sequential(nn.Linear(2, 6))
    network[0].split = [4, 2]
    network[0].total = 6
    one = StructureGroup(
        "one", 2, (Member("0", "weight", 0, "producer", torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])),
                   Member("0", "bias", 0, "between", torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))),
        counts=(Count("0", "split.0", 4, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])),
                Count("0", "total", 6, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]))),
    )  # fmt: skip
    other = StructureGroup(
        "other", 2, (Member("0", "weight", 0, "producer", torch.tensor([4, 5]), torch.tensor([0, 1])),
                     Member("0", "bias", 0, "between", torch.tensor([4, 5]), torch.tensor([0, 1]))),
        counts=(Count("0", "split.1", 2, torch.tensor([0, 1]), torch.tensor([0, 1])),
                Count("0", "total", 6, torch.tensor([4, 5]), torch.tensor([0, 1]))),
    )  # fmt: skip
    kept = {"one": torch.tensor([False, True]), "other": torch.tensor([False, True])}
    cuts = cuts_of(network, [one, other], kept)
    assert cuts == Cuts(
        {"0.weight": {0: [2, 3, 5]}, "0.bias": {0: [2, 3, 5]}},
        {},
        {"0": {"split.0": 2, "total": 3, "split.1": 1}},
    )
    cuts.cut(network)
    assert (network[0].out_features, network[0].split, network[0].total) == (3, [2, 1], 3)
    first, second = after([one, other], kept, cuts)
    assert [count.size for count in (*first.counts, *second.counts)] == [2, 3, 1, 3]
    assert first.members[0].indices.tolist() == first.counts[1].indices.tolist() == [0, 1]
    assert second.members[0].indices.tolist() == second.counts[1].indices.tolist() == [2]


def test_a_group_seen_from_the_whole_network():
    entries = (torch.arange(2), torch.arange(2))
    members = (
        Member("", "scale", 0, "between", *entries),
        Member("a.b", "weight", 1, "consumer", *entries, reader=""),
        Member("a", "weight", 1, "consumer", *entries, reader="c"),
        Member("a", "weight", 1, "consumer", *entries),
    )
    group = StructureGroup("s", 2, members, counts=(Count("", "n", 2, *entries),)).below("net.0")
    assert [(m.path, m.reader, m.read_by) for m in group.members] == [
        ("net.0", None, "net.0"), ("net.0.a.b", "net.0", "net.0"), ("net.0.a", "net.0.c", "net.0.c"),
        ("net.0.a", None, "net.0.a"),
    ]  # fmt: skip
    assert group.counts[0].path == "net.0"


def plain():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LayerNorm(3), nn.BatchNorm1d(3),
        nn.ConvTranspose1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=2), nn.GroupNorm(2, 4),
        bmrs.InputSelection(3),
    )  # fmt: skip
    network[2].num_heads, network[2].flag, network[2].ratio, network[2].sizes = 2, True, 2.0, (3, 1.5)
    return network


def of(name, dim, kept):
    return dict(tensors={name: {dim: kept}})


def number(path, name, value):
    return dict(numbers={path: {name: value}})


BAD = [
    (of("9.weight", 0, [0]), "'9.weight' is no tensor"),
    (of("0", 0, [0]), "'0' is no tensor"),
    (of("", 0, [0]), "'' is no tensor"),
    (of("0.weight.data", 0, [0]), "'0.weight.data' is no tensor"),
    (of("1.weight", 0, [0]), "'1.weight' is no tensor"),
    (of("__class__", 0, [0]), "'__class__' is no tensor"),
    (of("0.in_features", 0, [0]), "'0.in_features' is no tensor"),
    (of("0._parameters", 0, [0]), "'0._parameters' is no tensor"),
    (of("0.weight", 2, [0]), r"'0.weight' of shape \(5, 4\) has no dimension 2"),
    (of("0.weight", -1, [0]), r"'0.weight' of shape \(5, 4\) has no dimension -1"),
    (of("0.weight", True, [0]), r"'0.weight' of shape \(5, 4\) has no dimension True"),
    (of("0.weight", "0", [0]), r"'0.weight' of shape \(5, 4\) has no dimension '0'"),
    (of("4.num_batches_tracked", 0, [0]), r"of shape \(\) has no dimension 0"),
    (of("0.weight", 0, [0, 5]), "'0.weight' has entries 0 to 4 in dimension 0"),
    (of("0.weight", 1, [4]), "'0.weight' has entries 0 to 3 in dimension 1"),
    (of("0.weight", 0, [-1, 2]), "'0.weight' has entries 0 to 4"),
    (of("0.weight", 0, [2, 1]), "increasing"),
    (of("0.weight", 0, [1, 1]), "increasing"),
    (of("0.weight", 0, []), "'0.weight' has entries 0 to 4"),
    (of("2.weight", 1, []), "'2.weight' has entries 0 to 4"),
    (of("0.weight", 0, [0.0, 1.0]), "'0.weight' has entries"),
    (of("0.weight", 0, [True]), "'0.weight' has entries"),
    (of("0.weight", 0, ["1"]), "'0.weight' has entries"),
    (of("0.weight", 0, [None]), "'0.weight' has entries"),
    (of("0.weight", 0, [[0, 1]]), "'0.weight' has entries"),
    (of("0.weight", 0, [{}]), "'0.weight' has entries"),
    (of("0.weight", 0, (0, 1)), "'0.weight' has entries"),
    (of("2.weight", 0, [0, 1]), r"'2' would make channels of shape \(2,\), and have {'bias': \(3,\)}"),
    (of("2.bias", 0, [0, 1]), r"'2' would make channels of shape \(3,\), and have {'bias': \(2,\)}"),
    (of("3.bias", 0, [0, 1]), r"'3' would make channels of shape \(3,\), and have {'bias': \(2,\)}"),
    (
        of("4.running_mean", 0, [0, 1]),
        r"'4' would make channels of shape \(3,\), and have .*'running_mean': \(2,\)",
    ),
    (of("5.weight", 1, [0]), r"'5' would make channels of shape \(2,\), and have {'bias': \(4,\)}"),
    (of("5.weight", 0, [0, 1, 2]), "each of the groups of '5' must keep equally many rows"),
    (of("5.weight", 0, [0, 1]), "each of the groups of '5' must keep equally many rows"),
    (
        dict(tensors={f"6.{name}": {0: [0, 1, 2]} for name in ("weight", "bias")}),
        "each of the groups of '6' must",
    ),
    (number("6", "groups", 1), "each of the groups of '6' must keep"),
    (
        dict(tensors={f"7.{name}": {0: [0, 1, 2]} for name in ("weight", "bias")}),
        "each of the groups of '7' must",
    ),
    (of("8.index", 0, [3]), "'8.index' has entries 0 to 2"),
    (dict(widths={"0": [0]}), "'0' is no InputSelection"),
    (dict(widths={"9": [0]}), "'9' is no InputSelection"),
    (dict(widths={"8": [0, 1]}), "'8' passes on features that its input has lost"),
    (dict(widths={"8": [3]}), "'8' has inputs 0 to 2"),
    (dict(widths={"8": "012"}), "'8' has inputs 0 to 2"),
    (number("2", "num_heads", 2.0), r"'num_heads' of '2' can become 1 to 2: got 2\.0"),
    (number("2", "num_heads", True), "'num_heads' of '2' can become 1 to 2: got True"),
    (number("2", "num_heads", "1"), "'num_heads' of '2' can become 1 to 2: got '1'"),
    (number("2", "num_heads", [1]), "'num_heads' of '2' can become 1 to 2"),
    (number("2", "num_heads", 0), "'num_heads' of '2' can become 1 to 2: got 0"),
    (number("2", "num_heads", 3), "'num_heads' of '2' can become 1 to 2: got 3"),
    (number("2", "num_heads.0", 1), r"'2' has no number 'num_heads\.0'"),
    (number("2", "flag", 1), "'2' has no number 'flag'"),
    (number("2", "training", 1), "'2' has no number 'training'"),
    (number("2", "ratio", 1), "'2' has no number 'ratio'"),
    (number("2", "sizes", 1), "'2' has no number 'sizes'"),
    (number("2", "sizes.1", 1), r"'2' has no number 'sizes\.1'"),
    (number("2", "sizes.2", 1), r"'2' has no number 'sizes\.2'"),
    (number("2", "sizes.-1", 1), r"'2' has no number 'sizes\.-1'"),
    (number("2", "sizes.0.0", 1), r"'2' has no number 'sizes\.0\.0'"),
    (number("2", "weight", 1), "'2' has no number 'weight'"),
    (number("2", "nothing", 1), "'2' has no number 'nothing'"),
    (number("2", "forward", 1), "'2' has no number 'forward'"),
    (number("2", "__class__", 1), "'2' has no number '__class__'"),
    (number("9", "in_features", 1), "'9' has no number"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(wrong) for wrong, _ in BAD])
def test_what_does_not_fit_is_refused_and_nothing_is_cut(wrong, message):
    network = plain()
    before, printed = copy.deepcopy(network.state_dict()), repr(network)
    # a right cut before and one behind the wrong one: neither may happen
    right = dict(
        tensors={"0.weight": {0: [0, 1]}, "0.bias": {0: [0, 1]}, "2.weight": {1: [0, 1]}},
        widths={}, numbers={"2": {"num_heads": 1}},
    )  # fmt: skip
    both = {name: {**right[name], **wrong.get(name, {})} for name in right}
    for cuts in (
        Cuts(**wrong),
        Cuts(**both),
        Cuts(**{name: dict(reversed(t.items())) for name, t in both.items()}),
    ):
        with pytest.raises(ValueError, match=f"cuts must fit the network: .*{message}"):
            cuts.check(network)
        with pytest.raises(ValueError, match="cuts must fit the network"):
            cuts.cut(network)
    state = network.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert repr(network) == printed
    assert (network[2].num_heads, network[2].sizes) == (2, (3, 1.5))
    Cuts(**right).cut(network)  # and the right ones alone are
    assert network[0].out_features == 2


def test_integers_of_layers_follow_their_tensors_whatever_a_file_says():
    network = plain()
    Cuts(
        {"0.weight": {0: [0, 1]}, "0.bias": {0: [0, 1]}}, {}, {"0": {"in_features": 1, "out_features": 1}}
    ).cut(network)
    assert (network[0].in_features, network[0].out_features) == (4, 2)


def test_cuts_go_through_json():
    network = plain()
    cuts = Cuts(
        {
            "0.weight": {0: [0, 2, 4]},
            "0.bias": {0: [0, 2, 4]},
            "2.weight": {1: [0, 2, 4]},
            "8.index": {0: [0, 2]},
        },
        {"8": [0, 2]},
        {"2": {"num_heads": 1, "sizes.0": 2}},
    )
    again = Cuts.from_json(json.loads(json.dumps(cuts.to_json())))
    assert again == cuts
    other = copy.deepcopy(network)
    cuts.cut(network)
    again.cut(other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert (other[2].num_heads, other[2].sizes, other[8].width) == (1, (2, 1.5), 2)
    assert Cuts.from_json(json.loads(json.dumps(Cuts().to_json()))) == Cuts()
    assert not Cuts()


EMPTY = {"tensors": {}, "widths": {}, "numbers": {}}


@pytest.mark.parametrize(
    "document",
    [
        None, 3, "tensors", [], {}, ["tensors", "widths", "numbers"], {"rows": {}, "columns": {}, "attributes": {}},
        {"tensors": {}, "widths": {}}, {**EMPTY, "more": {}}, {**EMPTY, "tensors": []}, {**EMPTY, "tensors": None},
        {**EMPTY, "widths": "0"}, {**EMPTY, "widths": {"0": 1}}, {**EMPTY, "widths": {"0": {"0": 1}}},
        {**EMPTY, "tensors": {"0": "01"}}, {**EMPTY, "tensors": {"0": [0]}}, {**EMPTY, "tensors": {"0": {"0": 1}}},
        {**EMPTY, "tensors": {"0": {"0": "01"}}}, {**EMPTY, "tensors": {"0": {"00": [0]}}},
        {**EMPTY, "tensors": {"0": {"-1": [0]}}}, {**EMPTY, "tensors": {"0": {"a": [0]}}},
        {**EMPTY, "tensors": {"0": {0: [0]}}}, {**EMPTY, "tensors": {"0": {"٣": [0]}}},
        {**EMPTY, "numbers": {"0": []}}, {**EMPTY, "numbers": {"0": 1}}, {**EMPTY, "numbers": []},
    ],
    ids=str,
)  # fmt: skip
def test_foreign_documents_are_refused(document):
    with pytest.raises(ValueError, match="cuts must"):
        Cuts.from_json(document)


def test_cuts_seen_from_a_part():
    cuts = Cuts(
        {"a.b.weight": {0: [0]}, "ab.c.weight": {1: [1]}, "a.weight": {0: [2]}},
        {"a.b.c": [3], "a": [4]},
        {"a.b": {"num_heads": 1}, "b": {"n": 2}, "a": {"n": 3}},
    )
    assert cuts.below("a") == Cuts(
        {"b.weight": {0: [0]}, "weight": {0: [2]}},
        {"b.c": [3], "": [4]},
        {"b": {"num_heads": 1}, "": {"n": 3}},
    )
    assert cuts.below("") is cuts


@quick
@given(st.data())
def test_cuts_one_after_the_other_are_those_at_once(data):
    network, whole = nn.Sequential(nn.Linear(6, 5)), None
    whole = copy.deepcopy(network)
    steps = []
    for _ in range(2):
        layer = Layer(network[0], {"weight": 0, "bias": 0}, {"weight": 1}, (network[0].in_features,))
        steps.append(chosen(data.draw, layer, "0").cuts)
        steps[-1].cut(network)
    steps[0].then(steps[1]).cut(whole)
    assert repr(whole) == repr(network)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), whole.parameters(), strict=True))


@quick
@given(
    st.data(), layers(kinds=("linear", "conv", "transposed", "transposed in groups", "grouped", "grouped"))
)
def test_folding_multiplies_the_input(data, layer):
    module, whole = layer.module, copy.deepcopy(layer.module)
    ((name, dim),) = layer.read.items()
    size = module.weight.shape[dim]
    # some entries belong to structures, one to several of them, the others to none
    entries = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
    features = data.draw(st.integers(1, 4))
    units = data.draw(st.lists(st.integers(0, features - 1), min_size=len(entries), max_size=len(entries)))
    scale = torch.linspace(0.2, 1.7, features, dtype=torch.float64)
    if data.draw(st.booleans()):
        scale[0] = 0.0
    member = Member("", name, dim, "consumer", torch.tensor(entries), torch.tensor(units), input_dim=-1)
    bystander = Member("", name, 1 - dim, "producer", torch.zeros(1, dtype=torch.long), torch.zeros(1).long())
    # the same tensor in a second place is multiplied once
    members = (bystander, member, member) if data.draw(st.booleans()) else (bystander, member)
    fold(module, [StructureGroup("site", features, members)], {"site": scale})
    factor = torch.ones(size)
    for entry, unit in zip(entries, units, strict=True):
        factor[entry] = scale[unit]
    x = torch.randn(3, *layer.shape)
    factor = factor.repeat(x.shape[1] // size)
    torch.testing.assert_close(module(x), whole(x * factor.view(1, -1, *[1] * (x.dim() - 2))))
    if module.bias is not None:
        assert torch.equal(module.bias, whole.bias)


def test_folding_into_a_tensor_of_three_dimensions_along_two():
    """As weights of experts that read one group of structures, and of which each is a structure itself."""
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(3, 4, 5))
    before = module.experts.detach().clone()
    whole, inner = torch.rand(3), torch.rand(4)
    groups = [
        StructureGroup("a", 3, (Member("", "experts", 0, "consumer", torch.arange(3), torch.arange(3)),)),
        StructureGroup("b", 4, (Member("", "experts", 1, "consumer", torch.arange(4), torch.arange(4)),)),
    ]
    fold(module, groups, {"a": whole, "b": inner})
    torch.testing.assert_close(module.experts.data, torch.einsum("e,i,eio->eio", whole, inner, before))
