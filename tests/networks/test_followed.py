"""What a trace has to see: which structures it finds, and which it must not offer."""

import pytest
import torch
import torch.nn.functional as F
from called import Calls, fitted, relu, staying
from torch import nn
from torch.nn.utils import prune

import pyro_bmrs as bmrs
from pyro_bmrs.networks.noise import fixed_scales


def test_attention_weights_that_nobody_reads_tie_no_heads():
    # torch's attention averages its weights over heads unless need_weights=False
    net = Calls(
        lambda s, x: s.head(s.attention(x, x, x)[0].mean(1)),
        attention=nn.MultiheadAttention(16, 4, batch_first=True), head=nn.Linear(16, 3),
    )  # fmt: skip
    groups = bmrs.structures(net, torch.randn(2, 5, 16), strict=True).groups
    assert {site: (group.features, group.kind) for site, group in groups.items()} == {
        "attention": (4, "heads"), "attention.out_proj": (16, "units")
    }  # fmt: skip


class OwnAttention(nn.Module):
    """Attention whose number of heads has a name that nobody knows, and can be their size too."""

    def __init__(self, width, parts):
        super().__init__()
        self.parts = parts
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        shape = (*x.shape[:2], self.parts, -1)
        query, key, value = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        context = torch.softmax(query @ key.transpose(-2, -1), -1) @ value
        return self.out(context.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_heads_are_found_whatever_their_size(heads):
    net = Calls(
        lambda s, x: s.head(s.attention(x).mean(1)), attention=OwnAttention(16, heads), head=nn.Linear(16, 3)
    )
    x = torch.randn(6, 5, 16)
    assert bmrs.structures(net, x, strict=True).groups["attention"].features == heads
    _, _, plan = fitted(net, x)
    assert plan.apply().attention.parts == len(plan.kept["attention"])


def test_a_layer_that_reads_the_input_too_keeps_its_columns():
    net = Calls(
        lambda s, x: s.head(relu(s.shared(x)) + relu(s.shared(relu(s.first(x))))),
        first=nn.Linear(8, 8), shared=nn.Linear(8, 8), head=nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(6, 8)
    assert set(bmrs.structures(net, x).groups) == {"shared"}
    assert "first" in staying(net, x)
    _, _, plan = fitted(net, x)
    assert plan.apply().shared.in_features == 8


@pytest.mark.parametrize(("groups", "width"), [(1, 6), (2, 6), (4, 12), (8, 8), (8, 16)])
def test_transposed_convolutions_in_groups(groups, width):
    net = Calls(
        lambda s, x: s.out(relu(s.up(relu(s.first(x))))).mean((2, 3)),
        first=nn.Conv2d(1, 8, 3), up=nn.ConvTranspose2d(8, width, 3, groups=groups), out=nn.Conv2d(width, 3, 3),
    )  # fmt: skip
    x = torch.randn(6, 1, 6, 6)
    found = bmrs.structures(net, x, strict=True)
    if groups == 8:  # each filter goes with the channel that it reads
        assert {site: group.features for site, group in found.groups.items()} == {"first": 8}
    else:
        assert {site: group.features for site, group in found.groups.items()} == {
            "first": 8 // groups, "up": width // groups
        }  # fmt: skip
    _, _, plan = fitted(net, x)
    assert plan.apply().out.in_channels < width


@pytest.mark.parametrize("entry", [0, 29, -1, -2])
def test_a_channel_that_forward_calls_by_its_number_keeps_all(entry):
    def forward(s, x):
        h = relu(s.a(x)).clone()
        h[:, entry] *= 2
        return s.b(h)

    net = Calls(forward, a=nn.Linear(4, 30), b=nn.Linear(30, 3))
    for seed in range(3):
        torch.manual_seed(seed)
        assert not bmrs.structures(net, torch.randn(6, 4)).groups


def test_what_is_set_to_0_by_a_slice_keeps_all():
    def forward(s, x):
        h = relu(s.a(x))
        h[:, 2:5] = 0
        return s.b(h)

    net = Calls(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert not bmrs.structures(net, torch.randn(6, 4)).groups


def test_patches_that_are_added_up_are_followed_or_listed():
    net = Calls(
        lambda s, x: s.b(F.fold(F.unfold(relu(s.a(x)), 3), (6, 6), 3)).mean((2, 3)),
        a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    x = torch.randn(6, 3, 8, 8)
    found = bmrs.structures(net, x)
    assert "a" in found.groups or "a" in staying(net, x)
    if found.groups:
        fitted(net, x)[2].apply()


def tied():
    """Two layers of one weight that read the same."""
    net = Calls(
        lambda s, x: s.head(relu(s.b(h := relu(s.a(x)))) + relu(s.c(h))),
        a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(8, 6), head=nn.Linear(6, 3),
    )  # fmt: skip
    net.c.weight = net.b.weight
    return net


@pytest.mark.parametrize("leave_out", ["b", "c", "b.weight", "c.weight"])
def test_a_weight_that_layers_share_is_left_out_under_each_name(leave_out):
    x = torch.randn(6, 4)
    assert set(bmrs.structures(tied(), x).groups) == {"a", "b"}
    assert not bmrs.structures(tied(), x, leave_out=leave_out).groups


def test_leave_out_names_a_parameter_of_the_network_itself():
    net = Calls(lambda s, x: s.b(relu(s.a(x) + s.shift)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    net.shift = nn.Parameter(torch.randn(8))
    assert staying(net, torch.randn(2, 4), leave_out="shift")["a"] == "tied to 'shift', which is left out"


def test_norms_that_share_a_weight_are_followed():
    net = Calls(
        lambda s, x: s.b(s.n(s.a(x))) + s.d(s.m(s.c(x))),
        a=nn.Linear(4, 8), b=nn.Linear(8, 3), c=nn.Linear(4, 8), d=nn.Linear(8, 3), n=nn.RMSNorm(8, eps=1e-6),
        m=nn.RMSNorm(8, eps=1e-6),
    )  # fmt: skip
    net.m.weight = net.n.weight
    x = torch.randn(6, 4)
    assert sum(group.features for group in bmrs.structures(net, x)) == 8
    fitted(net, x)[2].apply()


@pytest.mark.parametrize("scale", [1.0, 2e-2, 1e-3])
@pytest.mark.parametrize("epsilon", [1e-7, None])
def test_a_root_mean_square_of_small_numbers_is_removed_from_exactly(epsilon, scale):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.RMSNorm(16, eps=epsilon), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight.mul_(scale)
    x = torch.randn(64, 4)
    model, _, plan = fitted(net, x)
    small = plan.apply()
    with torch.no_grad(), fixed_scales(model.net.eval(), plan.theta_mean()):
        torch.testing.assert_close(model.net(x), small(x), rtol=1e-5, atol=1e-5)


def test_a_masked_bias_is_not_listed_as_what_can_not_go():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(net[0], "bias", amount=0.3)
    found = bmrs.structures(net, torch.randn(2, 4), strict=True)
    assert set(found.groups) == {"0"}
    assert "0" not in {stays.path for stays in found.refused}


def test_a_shuffle_in_front_of_a_convolution_in_groups():
    net = Calls(
        lambda s, x: s.out(relu(s.part(F.channel_shuffle(relu(s.first(x)), 2)))).mean((2, 3)),
        first=nn.Conv2d(3, 8, 1), part=nn.Conv2d(8, 8, 1, groups=2), out=nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    x = torch.randn(6, 3, 4, 4)
    groups = bmrs.structures(net, x, strict=True).groups
    assert {site: group.features for site, group in groups.items()} == {"first": 2, "part": 4}
    fitted(net, x)[2].apply()


def test_streams_that_norms_read_are_fitted_with_the_usual_draws():
    net = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    model, guide, _ = fitted(net, x)
    result = bmrs.fit(model, guide, (x, y), epochs=1, batch_size=16, progress=False)
    assert result.history.loss.notna().all()
