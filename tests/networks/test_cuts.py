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

from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.cuts import COLUMNS, ROWS, Cuts, channel_dimension, channels, selections
from pyro_bmrs.networks.groups import Member, StructureGroup
from pyro_bmrs.networks.surgery import fold

quick = settings(max_examples=40, deadline=None)


@dataclass
class Layer:
    """A layer and, written down anew here, which dimension of which tensor counts its rows and columns."""

    module: nn.Module
    rows: dict[str, int]
    columns: dict[str, int]
    shape: tuple[int, ...]  # of one example of its input


def varied(module, seed):
    """Tensors of which no two entries are alike, buffers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module.eval()


@st.composite
def layers(draw, kinds=None):
    kind = draw(
        st.sampled_from(
            kinds
            or (
                "linear",
                "conv",
                "transposed",
                "grouped",
                "depthwise",
                "batch",
                "instance",
                "prelu",
                "embedding",
            )
        )
    )
    inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dims = draw(st.integers(1, 2))
    bias = draw(st.booleans())
    pixels = (5,) * dims
    made = {"weight": 0, "bias": 0} if bias else {"weight": 0}
    if kind == "linear":
        layer = Layer(nn.Linear(inputs, outputs, bias=bias), made, {"weight": 1}, (inputs,))
    elif kind in ("conv", "grouped"):
        groups = draw(st.integers(2, 3)) if kind == "grouped" else 1
        # as many filters and channels a group, at least two, so that none is depthwise
        inputs, outputs = inputs * groups + groups * (groups > 1), outputs * groups
        convolution = (nn.Conv1d, nn.Conv2d)[dims - 1](inputs, outputs, 3, groups=groups, bias=bias)
        layer = Layer(convolution, made, {"weight": 1}, (inputs, *pixels))
    elif kind == "transposed":
        convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1](inputs, outputs, 3, bias=bias)
        layer = Layer(convolution, {**made, "weight": 1}, {"weight": 0}, (inputs, *pixels))
    elif kind == "depthwise":
        inputs += 1
        convolution = (nn.Conv1d, nn.Conv2d)[dims - 1](inputs, inputs, 3, groups=inputs, bias=bias)
        layer = Layer(convolution, made, {}, (inputs, *pixels))
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
    """Increasing indices, at least one."""
    return sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size)))


def columns_of(draw, module):
    """Columns to keep: of a grouped convolution the same ones in each group."""
    groups = getattr(module, "groups", 1)
    each = channels(module, COLUMNS) // groups
    local = some_of(draw, each)
    return [group * each + index for group in range(groups) for index in local]


def rows_of(draw, module):
    """Rows to keep: of a grouped convolution as many in each group."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups in (1, module.in_channels):
        return some_of(draw, channels(module, ROWS))
    each = module.out_channels // module.groups
    local = some_of(draw, each)
    return [group * each + index for group in range(module.groups) for index in local]


@quick
@given(st.data(), layers())
def test_rows_and_columns_are_indexed(data, layer):
    module, before = layer.module, copy.deepcopy(layer.module)
    objects = dict(module.named_parameters())
    for parameter in objects.values():
        parameter.grad = torch.ones_like(parameter)
    tables, wanted, smaller = {ROWS: {}, COLUMNS: {}}, dict(before.state_dict()), set()
    for side, where, choose in ((ROWS, layer.rows, rows_of), (COLUMNS, layer.columns, columns_of)):
        if channels(module, side) is None or not where or not data.draw(st.booleans(), label=side):
            continue
        kept = tables[side][""] = choose(data.draw, module)
        local = kept
        if side == COLUMNS:
            each = channels(module, COLUMNS) // getattr(module, "groups", 1)
            local = [index for index in kept if index < each]
        smaller.update(where)
        for name, dim in where.items():
            wanted[name] = wanted[name].index_select(dim, torch.tensor(local))
    cuts = Cuts(tables[ROWS], tables[COLUMNS])
    left = cuts.parameters_left(module)
    cuts.cut(module)
    have = module.state_dict()
    assert list(have) == list(wanted)
    assert all(torch.equal(have[name], wanted[name]) for name in wanted)
    assert left == parameters(module)
    assert bool(cuts) == bool(tables[ROWS] or tables[COLUMNS])
    for name, parameter in module.named_parameters():
        assert parameter is objects[name]
        assert (parameter.grad is None) == (name in smaller)
    for side, table in tables.items():
        if table:
            assert channels(module, side) == len(table[""])


@quick
@given(st.data(), layers())
def test_what_is_left_computes_its_part_of_the_whole(data, layer):
    """The channels left of the output are those the whole layer gives where the cut inputs are zero."""
    module, whole = layer.module, copy.deepcopy(layer.module)
    indexed = isinstance(module, nn.Embedding)
    x = torch.randint(module.num_embeddings, (3, *layer.shape)) if indexed else torch.randn(3, *layer.shape)
    rows = rows_of(data.draw, module)
    tables = {ROWS: {"": rows}, COLUMNS: {}}
    small_x = x
    if layer.columns:
        columns = tables[COLUMNS][""] = columns_of(data.draw, module)
        dim = channel_dimension(module)
        small_x = x.index_select(dim, torch.tensor(columns))
        x = torch.zeros_like(x).index_copy(dim, torch.tensor(columns), small_x)
    elif not indexed:
        # each channel for itself: those that go take theirs along
        small_x = x.index_select(1, torch.tensor(rows))
    Cuts(tables[ROWS], tables[COLUMNS]).cut(module)
    at = 1 if not indexed and not isinstance(module, nn.Linear) else -1
    expected = whole(x).index_select(at, torch.tensor(rows))
    torch.testing.assert_close(module(small_x), expected)


@quick
@given(st.data(), st.lists(st.integers(1, 6), min_size=2, max_size=4), st.booleans())
def test_parameters_left_are_those_that_are_left(data, widths, images):
    parts = []
    for size, following in pairwise(widths):
        if images:
            parts += [nn.Conv2d(size, following, 3), nn.BatchNorm2d(following), nn.PReLU(following)]
        else:
            parts += [nn.Linear(size, following), nn.BatchNorm1d(following), nn.PReLU(following)]
    network = nn.Sequential(*parts)
    rows, columns = {}, {}
    for path, module in network.named_children():
        if data.draw(st.booleans()):
            rows[path] = some_of(data.draw, channels(module, ROWS))
        if channels(module, COLUMNS) is not None and data.draw(st.booleans()):
            columns[path] = some_of(data.draw, channels(module, COLUMNS))
    cuts = Cuts(rows, columns)
    left = cuts.parameters_left(network)
    cuts.cut(network)
    assert left == parameters(network)


def test_numbers_that_modules_keep_follow():
    network = nn.Sequential(
        nn.Linear(4, 5), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Embedding(3, 7), nn.PReLU(4),
        nn.BatchNorm2d(4), nn.ConvTranspose2d(3, 5, 2),
    )  # fmt: skip
    network[0].num_heads = 4
    rows = {"0": [1, 3], "1": [0, 3], "2": [1, 2], "3": [0, 6], "4": [3], "5": [0, 1, 2], "6": [4]}
    Cuts(rows, {"0": [0], "1": [1, 3], "6": [0, 2]}, {"0": {"num_heads": 2}}).cut(network)
    assert repr(network) == repr(
        nn.Sequential(
            nn.Linear(1, 2), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, groups=2), nn.Embedding(3, 2),
            nn.PReLU(1), nn.BatchNorm2d(3), nn.ConvTranspose2d(2, 1, 2),
        )
    )  # fmt: skip
    assert network[0].num_heads == 2


def plain():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LayerNorm(3), nn.BatchNorm1d(3),
        nn.ConvTranspose1d(4, 4, 3, groups=2), nn.MultiheadAttention(4, 2),
    )  # fmt: skip
    network[2].num_heads = 2
    return network


BAD = [
    (dict(rows={"7": [0]}), "'7' is no layer"),
    (dict(rows={"0.weight": [0]}), "'0.weight' is no layer"),
    (dict(rows={"": [0]}), "'' is no layer"),
    (dict(columns={"__class__": [0]}), "'__class__' is no layer"),
    (dict(rows={"1": [0]}), "'1' is no layer of it that can be cut"),
    (dict(rows={"3": [0]}), "'3' is no layer of it that can be cut"),
    (dict(columns={"4": [0]}), "'4' is no layer of it that can be cut"),
    (dict(rows={"5": [0]}), "'5' is no layer of it that can be cut"),
    (dict(rows={"6": [0]}), "'6' is no layer of it that can be cut"),
    (dict(rows={"0": [0, 5]}), "'0' has rows 0 to 4"),
    (dict(columns={"0": [4]}), "'0' has columns 0 to 3"),
    (dict(rows={"0": [-1, 2]}), "'0' has rows 0 to 4"),
    (dict(rows={"0": [2, 1]}), "increasing"),
    (dict(rows={"0": [1, 1]}), "increasing"),
    (dict(rows={"0": []}), "'0' has rows 0 to 4"),
    (dict(columns={"2": []}), "'2' has columns 0 to 4"),
    (dict(rows={"0": [0.0, 1.0]}), "'0' has rows"),
    (dict(rows={"0": [True]}), "'0' has rows"),
    (dict(rows={"0": ["1"]}), "'0' has rows"),
    (dict(rows={"0": [None]}), "'0' has rows"),
    (dict(rows={"0": [[0, 1]]}), "'0' has rows"),
    (dict(rows={"0": [{}]}), "'0' has rows"),
    (dict(attributes={"2": {"num_heads": 2.0}}), "'2' has no number 'num_heads'"),
    (dict(attributes={"2": {"num_heads": True}}), "'2' has no number 'num_heads'"),
    (dict(attributes={"2": {"num_heads": "1"}}), "'2' has no number 'num_heads'"),
    (dict(attributes={"2": {"num_heads": [1]}}), "'2' has no number 'num_heads'"),
    (dict(attributes={"2": {"weight": 1}}), "'2' has no number 'weight'"),
    (dict(attributes={"2": {"nothing": 1}}), "'2' has no number 'nothing'"),
    (dict(attributes={"2": {"forward": 1}}), "'2' has no number 'forward'"),
    (dict(attributes={"9": {"in_features": 1}}), "'9' has no number"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(wrong) for wrong, _ in BAD])
def test_what_does_not_fit_is_refused_and_nothing_is_cut(wrong, message):
    network = plain()
    before, printed = copy.deepcopy(network.state_dict()), repr(network)
    # a right cut before and one behind the wrong one: neither may happen
    right = dict(rows={"0": [0, 1]}, columns={"2": [0, 1]}, attributes={"2": {"num_heads": 1}})
    both = {name: {**right[name], **wrong.get(name, {}), **right[name]} for name in right}
    for name, table in wrong.items():
        both[name] |= table
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
    assert network[2].num_heads == 2
    Cuts(**right).cut(network)  # and the right ones alone are
    assert network[0].out_features == 2


def test_cuts_go_through_json():
    network = plain()
    cuts = Cuts({"0": [0, 2, 4]}, {"2": [0, 2, 4]}, {"2": {"num_heads": 1}})
    again = Cuts.from_json(json.loads(json.dumps(cuts.to_json())))
    assert again == cuts
    other = copy.deepcopy(network)
    cuts.cut(network)
    again.cut(other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert other[2].num_heads == 1
    assert Cuts.from_json(json.loads(json.dumps(Cuts().to_json()))) == Cuts()
    assert not Cuts()


EMPTY = {"rows": {}, "columns": {}, "attributes": {}}


@pytest.mark.parametrize(
    "document",
    [
        None, 3, "rows", [], {}, ["rows", "columns", "attributes"],
        {"rows": {}, "columns": {}}, {**EMPTY, "more": {}}, {**EMPTY, "rows": []}, {**EMPTY, "rows": None},
        {**EMPTY, "columns": "0"}, {**EMPTY, "rows": {"0": 1}}, {**EMPTY, "rows": {"0": {"0": 1}}},
        {**EMPTY, "columns": {"0": "01"}}, {**EMPTY, "columns": {"0": None}}, {**EMPTY, "attributes": {"0": []}},
        {**EMPTY, "attributes": {"0": 1}}, {**EMPTY, "attributes": []},
    ],
    ids=str,
)  # fmt: skip
def test_foreign_documents_are_refused(document):
    with pytest.raises(ValueError, match="cuts must"):
        Cuts.from_json(document)


def test_cuts_seen_from_a_part():
    cuts = Cuts({"a.b": [0], "ab.c": [1], "a": [2]}, {"a.b.c": [3]}, {"a.b": {"num_heads": 1}, "b": {"n": 2}})
    assert cuts.below("a") == Cuts({"b": [0]}, {"b.c": [3]}, {"b": {"num_heads": 1}})
    assert cuts.below("") is cuts


@quick
@given(st.data(), layers(kinds=("linear", "conv", "transposed", "grouped", "grouped")))
def test_folding_multiplies_the_input(data, layer):
    module, whole = layer.module, copy.deepcopy(layer.module)
    size = channels(module, COLUMNS)
    # some columns belong to structures, one to several of them, the others to none
    columns = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
    features = data.draw(st.integers(1, 4))
    units = data.draw(st.lists(st.integers(0, features - 1), min_size=len(columns), max_size=len(columns)))
    scale = torch.linspace(0.2, 1.7, features, dtype=torch.float64)
    if data.draw(st.booleans()):
        scale[0] = 0.0
    member = Member("", "consumer", torch.tensor(columns), torch.tensor(units))
    bystander = Member("", "producer", torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    fold(module, [StructureGroup("site", features, (bystander, member))], {"site": scale})
    factor = torch.ones(size)
    for column, unit in zip(columns, units, strict=True):
        factor[column] = scale[unit]
    x = torch.randn(3, *layer.shape)
    torch.testing.assert_close(module(x), whole(x * factor.view(1, -1, *[1] * (x.dim() - 2))))
    if module.bias is not None:
        assert torch.equal(module.bias, whole.bias)


def test_every_tensor_of_a_layer_is_named_once():
    for module in (
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3),
    ):
        present = {name for name, tensor in module.state_dict().items() if tensor.dim()}
        assert {name for name, _ in selections(module, ROWS)} == present
