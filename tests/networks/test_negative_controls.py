"""Networks that look like those that are handled, in which a removal would change what is left, or must be tied.

Of each: what stays is listed, nothing raises, and what is offered is removed exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from family import NORMALISED, OUTPUT, images, tokens
from test_conformance import conditioned, ones, outputs_of, plan, spread_of
from torch import nn
from traced_channels import GRN, Block, Pooled, behind_a_layer
from traced_families import TiedLanguageModel
from traced_heads import Attention, OfTokens, Residual

import pyro_bmrs as bmrs
from pyro_bmrs.networks import StructureError, noise_layers
from pyro_bmrs.networks.inputs import as_double, first_examples
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import remove_structures


class Of(nn.Module):
    """A network of named layers and a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.calls = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.calls(self, *inputs)


@dataclass(frozen=True)
class Control:
    """A network, what is offered of it by kind, and what stays: part of the reason by pattern of the path."""

    build: Callable
    offered: Mapping[str, int]
    stays: Mapping[str, str]
    # whether something stays because it can't be followed, cut or tried; None: as may be
    unsupported: bool | None = False


def halves_normalised_together():
    def forward(s, x):
        left, right = s.both(x).chunk(2, dim=-1)
        return s.head(torch.relu(s.hidden(s.norm(left) * right)))

    return Of(
        forward, both=nn.Linear(6, 16), norm=nn.LayerNorm(8), hidden=nn.Linear(8, 10), head=nn.Linear(10, 3)
    ), images(6)  # fmt: skip


def one_half_normalised():
    """The other half can be removed only with it: `chunk` makes equal parts."""

    def forward(s, x):
        left, right = s.both(x).chunk(2, dim=-1)
        return s.head(torch.relu(s.hidden(torch.cat([s.norm(left), right], dim=-1))))

    return Of(
        forward, both=nn.Linear(6, 16), norm=nn.LayerNorm(8), hidden=nn.Linear(16, 10), head=nn.Linear(10, 3)
    ), images(6)  # fmt: skip


def one_part_normalised():
    """Parts of stored sizes can have different numbers: the one that nothing normalises is offered."""

    def forward(s, x):
        left, right = s.both(x).split(s.sizes, dim=-1)
        return s.head(torch.cat([s.norm(left), right], dim=-1))

    network = Of(forward, both=nn.Linear(6, 13), norm=nn.LayerNorm(8), head=nn.Linear(13, 3))
    network.sizes = (8, 5)
    return network, images(6)


def parts_of_a_literal_size():
    def forward(s, x):
        left, right = s.both(x).split([8, 5], dim=-1)
        return s.head(torch.relu(s.hidden(torch.cat([left, torch.tanh(right)], dim=-1))))

    return Of(forward, both=nn.Linear(6, 13), hidden=nn.Linear(13, 10), head=nn.Linear(10, 3)), images(6)


def shuffled(x, groups):
    batch, channels, *rest = x.shape
    return x.view(batch, groups, channels // groups, *rest).transpose(1, 2).reshape(x.shape)


def two_shuffles():
    """In groups of 2 and of 3: of 12 channels only those that both tie leave together."""
    part = Of(lambda s, x: torch.relu(s.last(shuffled(shuffled(x, 2), 3))), last=nn.Conv2d(12, 5, 1))
    return Pooled(Block(3, 12), part, 5), images(3, 6, 6)


def literal_shuffle():
    def forward(s, x):
        return torch.relu(s.last(x.view(len(x), 2, 6, 6, 6).transpose(1, 2).reshape(len(x), 12, 6, 6)))

    return Pooled(Block(3, 12), Of(forward, last=nn.Conv2d(12, 5, 1)), 5), images(3, 6, 6)


def pixels_of_all_channels():
    """Channels and pixels are mixed up: a column reads several channels, at the same places of different examples."""

    def forward(s, x):
        x = torch.relu(s.first(x))
        return s.head(torch.relu(s.hidden(x.reshape(len(x), -1, 5).mean(dim=1))))

    return Of(forward, first=nn.Conv2d(3, 8, 1), hidden=nn.Linear(5, 10), head=nn.Linear(10, 3)), images(
        3, 5, 4
    )


def gate_of_the_mean_of_all_channels():
    def forward(s, x):
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return torch.relu(s.last(x * torch.sigmoid(s.gate(both))))

    part = Of(forward, gate=nn.Conv2d(2, 1, 3, padding=1), last=nn.Conv2d(8, 6, 1))
    return Pooled(Block(3, 8), part, 6), images(3, 6, 6)


def gate_of_the_norm_of_all_channels():
    return behind_a_layer(nn.Linear(8, 6), Of(lambda s, x: F.normalize(x, dim=1)))


def running_sum_over_channels():
    return behind_a_layer(nn.Linear(8, 6), Of(lambda s, x: x.cumsum(dim=1)))


def sorted_channels():
    return behind_a_layer(nn.Linear(8, 6), Of(lambda s, x: x.sort(dim=1).values))


def channels_that_meet_their_neighbours():
    """Each is added to the next one: all are tied, to one structure."""
    return behind_a_layer(nn.Linear(8, 6), Of(lambda s, x: x + x.roll(1, dims=1)))


def channels_that_meet_every_second():
    """Of 6 channels 0, 2, 4 are tied, and 1, 3, 5; but the shift is written into forward."""
    return behind_a_layer(nn.Linear(8, 6), Of(lambda s, x: x + x.roll(2, dims=1)))


def scaled_by_an_input():
    network = Of(
        lambda s, x, scale: s.head(torch.relu(s.hidden(torch.relu(s.first(x)) * scale))),
        first=nn.Linear(6, 8), hidden=nn.Linear(8, 10), head=nn.Linear(10, 3),
    )  # fmt: skip
    return network, (images(6), 0.5 + torch.rand(32, 8))


def added_to_an_input():
    network = Of(
        lambda s, x: s.head(torch.relu(s.hidden(x + s.second(torch.relu(s.first(x)))))),
        first=nn.Linear(6, 8), second=nn.Linear(8, 6), hidden=nn.Linear(6, 10), head=nn.Linear(10, 3),
    )  # fmt: skip
    return network, images(6)


def scaled_by_one_number_of_an_input():
    """A number per example ties nothing."""
    network = Of(
        lambda s, x, scale: s.head(torch.relu(s.first(x)) * scale),
        first=nn.Linear(6, 8),
        head=nn.Linear(8, 3),
    )
    return network, (images(6), 0.5 + torch.rand(32, 1))


class Computed(nn.Module):
    """Adds, or multiplies by, what a function makes of a parameter."""

    def __init__(self, function, *shape):
        super().__init__()
        self.table, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return x + self.function(self.table)


def positions_with_a_softmax_over_channels():
    return OfTokens(12, Computed(lambda table: table.softmax(dim=-1), 1, 7, 12)), images(7, 6)


def positions_with_a_softmax_over_tokens():
    """Each channel's positions depend on that channel alone."""
    return OfTokens(12, Computed(lambda table: table.softmax(dim=-2), 1, 7, 12)), images(7, 6)


def positions_that_are_centred():
    return OfTokens(12, Computed(lambda table: table - table.mean(-1, keepdim=True), 7, 12)), images(7, 6)


def positions_the_other_way_round():
    return OfTokens(12, Computed(lambda table: table.t(), 12, 7)), images(7, 6)


def one_normalisation_group():
    part = nn.Sequential(nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    return Pooled(nn.Conv2d(3, 8, 3), part, 6), images(3, 8, 8)


def normalisation_groups_across_a_concatenation():
    """Groups of 4 that hold 2 channels of one convolution and 2 of another, or 4 of one."""

    def forward(s, x):
        return torch.relu(s.last(torch.relu(s.norm(torch.cat([s.left(x), s.right(x)], dim=1)))))

    part = Of(
        forward, left=nn.Conv2d(4, 6, 1), right=nn.Conv2d(4, 6, 3, padding=1), norm=nn.GroupNorm(3, 12),
        last=nn.Conv2d(12, 5, 1),
    )  # fmt: skip
    return Pooled(Block(3, 4), part, 5), images(3, 6, 6)


def global_response(value):
    def build():
        grn = GRN(12)
        nn.init.constant_(grn.gamma, value)
        network = Of(
            lambda s, x: s.head(F.gelu(s.out(s.grn(F.gelu(s.wide(x.permute(0, 2, 3, 1)))))).mean((1, 2))),
            wide=nn.Linear(3, 12), grn=grn, out=nn.Linear(12, 10), head=nn.Linear(10, 3),
        )  # fmt: skip
        return network, images(3, 5, 5)

    return build


class LiteralAttention(Attention):
    """Says its sizes in its forward."""

    def forward(self, x):
        query, key, value = self.qkv(x).reshape(len(x), 7, 3, 4, 6).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.transpose(1, 2).reshape(len(x), 7, 24))


def literal_heads():
    return OfTokens(20, Residual(LiteralAttention(20, 4, 6))), images(7, 6)


class ManyQueries(nn.Module):
    """All query heads ask one key head: it belongs to none of them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 24), nn.Linear(16, 6), nn.Linear(16, 6)
        self.out = nn.Linear(24, 16)

    def forward(self, x):
        query = self.query(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        key, value = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        scores = (query @ key.transpose(-2, -1)).softmax(dim=-1)
        return self.out((scores @ value).transpose(1, 2).flatten(2))


def one_key_head_for_all():
    return OfTokens(16, Residual(ManyQueries())), images(7, 6)


class HeadsThatMix(Attention):
    """Attention of one head is mixed with that of the others, as in talking heads; or all are normalised at once."""

    def __init__(self, width, heads, head_dim, *, talking):
        super().__init__(width, heads, head_dim)
        self.talk = nn.Linear(heads, heads) if talking else nn.LayerNorm(heads * head_dim)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1)
        if isinstance(self.talk, nn.Linear):
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return self.proj(self.talk(found) if isinstance(self.talk, nn.LayerNorm) else found)


def normalised_heads():
    return OfTokens(16, Residual(HeadsThatMix(16, 4, 6, talking=False))), images(7, 6)


def talking_heads():
    """Queries and keys of a head go with its values, since one projection makes them: with its row and its column."""
    return OfTokens(16, Residual(HeadsThatMix(16, 4, 6, talking=True))), images(7, 6)


def weight_of_two_streams():
    """One square weight, whose columns read the input first, and what it makes itself then."""

    def forward(s, x):
        return s.head(torch.relu(s.second(torch.relu(s.first(x)))))

    network = Of(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 8), head=nn.Linear(8, 3))
    network.second.weight = network.first.weight
    return network, images(8)


def tied_the_wrong_way_round():
    """The output layer reads the stream backwards: a channel leaves with the one that its column meets."""
    network = TiedLanguageModel()
    network.head = Of(lambda s, x: F.linear(x.flip(-1), s.weight))
    network.head.weight = network.embedding.weight
    return network, tokens()


def rows_that_are_an_output_elsewhere():
    """A hidden layer that the network returns too."""
    network = Of(
        lambda s, x: (s.head(torch.relu(s.second(h := torch.relu(s.first(x))))), h),
        first=nn.Linear(6, 8), second=nn.Linear(8, 10), head=nn.Linear(10, 3),
    )  # fmt: skip
    return network, images(6)


def decoded_with_the_encoders_weight():
    """An autoencoder whose decoder is the encoder's weight, transposed: it makes what the encoder reads."""

    def forward(s, x):
        code = torch.relu(s.encoder(torch.relu(s.first(x))))
        return s.head(torch.relu(F.linear(code, s.encoder.weight.t())))

    network = Of(forward, first=nn.Linear(8, 12), encoder=nn.Linear(12, 7), head=nn.Linear(12, 3))
    return network, images(8)


CONTROLS = [
    Control(halves_normalised_together, {"units": 10}, {"both": NORMALISED, "head": OUTPUT}),
    Control(one_half_normalised, {"units": 10}, {"both": "", "head": OUTPUT}),
    Control(one_part_normalised, {"units": 5}, {"both": NORMALISED, "head": OUTPUT}),
    Control(parts_of_a_literal_size, {"units": 10}, {"both": "", "head": OUTPUT}, unsupported=True),
    # i and i + 6 are tied; they are 2 i and 2 i + 1 behind the first shuffle. There p, p + 4 and p + 8 would be tied;
    # but of the two ways to keep a box the other is tried, which the number of groups does not allow
    Control(two_shuffles, {"filters": 5}, {"first.0": "", "head": OUTPUT}, unsupported=True),
    Control(literal_shuffle, {"filters": 5}, {"first.0": "", "head": OUTPUT}, unsupported=True),
    Control(pixels_of_all_channels, {"units": 10}, {"first": "", "head": OUTPUT}),
    Control(gate_of_the_mean_of_all_channels, {"filters": 6}, {"first.0": "", "part.gate": "", "head": OUTPUT}),
    Control(gate_of_the_norm_of_all_channels, {"units": 18}, {"4": "", "6": OUTPUT}),
    Control(running_sum_over_channels, {"units": 18}, {"4": "", "6": OUTPUT}, unsupported=None),
    Control(sorted_channels, {"units": 18}, {"4": "", "6": OUTPUT}, unsupported=None),
    Control(channels_that_meet_their_neighbours, {"units": 18}, {"4": "", "6": OUTPUT}),
    # with half of them gone the shift by two is another
    Control(channels_that_meet_every_second, {"units": 18}, {"4": "", "6": OUTPUT}, unsupported=True),
    Control(scaled_by_an_input, {"units": 10}, {"first": "", "head": OUTPUT}),
    Control(added_to_an_input, {"units": 18}, {"second": "added to an input", "head": OUTPUT}),
    Control(scaled_by_one_number_of_an_input, {"units": 8}, {"head": OUTPUT}),
    Control(positions_with_a_softmax_over_channels, {}, {"embedding": "", "head": OUTPUT}),
    Control(positions_with_a_softmax_over_tokens, {"units": 12}, {"head": OUTPUT}),
    Control(positions_that_are_centred, {}, {"embedding": "", "head": OUTPUT}),
    Control(positions_the_other_way_round, {"units": 12}, {"head": OUTPUT}),
    Control(one_normalisation_group, {"filters": 6}, {"first": NORMALISED, "head": OUTPUT}),
    # each of the three groups has channels of other layers, so that it would be the last of its kind
    Control(
        normalisation_groups_across_a_concatenation, {"filters": 4 + 5},
        {"part.left": NORMALISED, "part.right": NORMALISED, "head": OUTPUT},
    ),
    Control(global_response(0.0), {"units": 10}, {"wide": "", "head": OUTPUT}),
    Control(global_response(0.7), {"units": 10}, {"wide": "", "head": OUTPUT}),
    Control(
        literal_heads, {"units": 20}, {"parts.0.part.0.qkv": "", "head": OUTPUT}, unsupported=True
    ),
    # a query head has rows and columns of its own
    Control(
        one_key_head_for_all, {"heads": 4, "units": 16},
        {"parts.0.part.0.key": "", "parts.0.part.0.value": "", "head": OUTPUT},
    ),
    Control(normalised_heads, {"units": 16}, {"parts.0.part.0.qkv": NORMALISED, "head": OUTPUT}),
    Control(talking_heads, {"heads": 4, "units": 16}, {"head": OUTPUT}),
    Control(weight_of_two_streams, {}, {"first": "", "head": OUTPUT}, unsupported=None),
    Control(tied_the_wrong_way_round, {"units": 8 + 12}, {"head": OUTPUT}),
    Control(
        decoded_with_the_encoders_weight, {"units": 7},
        {"first": "read by 'encoder.weight', with which another module makes them", "head": OUTPUT}, unsupported=True,
    ),
    Control(rows_that_are_an_output_elsewhere, {"units": 10}, {"first": OUTPUT, "head": OUTPUT}),
]  # fmt: skip
NAMES = [control.build.__qualname__.split(".")[0] for control in CONTROLS]


@pytest.fixture(params=CONTROLS, ids=[f"{number}-{name}" for number, name in enumerate(NAMES)])
def control(request):
    torch.manual_seed(0)
    network, example = request.param.build()
    return request.param, network, example


def test_what_stays_is_listed_and_nothing_raises(control):
    some, network, example = control
    found = bmrs.structures(network, example)
    offered: dict[str, int] = {}
    for group in found:
        offered[group.kind] = offered.get(group.kind, 0) + group.features
    assert offered == some.offered
    met = set()
    for refused in found.refused:
        (pattern,) = [pattern for pattern in some.stays if fnmatchcase(refused.path, pattern)]
        assert some.stays[pattern] in refused.reason
        assert refused.reason
        met.add(pattern)
    assert met == set(some.stays)
    unsupported = any(refused.unsupported for refused in found.refused)
    assert some.unsupported in (unsupported, None)
    if unsupported:
        with pytest.raises(StructureError):
            bmrs.structures(network, example, strict=True)
    else:
        bmrs.structures(network, example, strict=True)


def test_what_is_offered_is_removed_exactly(control):
    some, network, example = control
    if not some.offered:
        with pytest.raises(StructureError, match="something that can be removed"):
            bmrs.insert_noise(network, example)
        return
    if not some.build.__qualname__.startswith("global_response"):
        conditioned(network, example)
    noisy = bmrs.insert_noise(network, example).double()
    example = first_examples(as_double(example), 8)
    assert_equal(noisy, network.double(), ones(noisy), example)
    kept, scales = plan(noisy, example, "half")
    small = remove_structures(noisy, kept, scales, example).network
    assert_equal(noisy, small, {site: scales[site] * kept[site] for site in kept}, example)
    removed = {site for site, keep in kept.items() if not keep.all()}
    assert removed == set(noise_layers(noisy)) == set(structure_groups(noisy, example))


def assert_equal(noisy, other, theta, example):
    want, have = outputs_of(noisy, example, scales=theta)[""], outputs_of(other.eval(), example)[""]
    for wanted, found in zip(want, have, strict=True):
        assert spread_of(wanted) > 0
        assert (wanted - found).abs().max() <= 1e-10 * spread_of(wanted)
