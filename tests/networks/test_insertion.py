"""Networks of users: what a trace does not see of what they do, and what must not be touched."""

import copy

import pyro
import pytest
import torch
from called import Calls, at_one, fitted, relu, staying
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyro_bmrs as bmrs
from pyro_bmrs.networks import StructureError, noise_layers
from pyro_bmrs.networks.attention import SeparateAttention
from pyro_bmrs.networks.hooked_noise import HookedNoise
from pyro_bmrs.networks.noise import fixed_scales


def test_attention_that_two_blocks_share_loses_heads_in_both():
    shared = nn.MultiheadAttention(16, 4, batch_first=True)
    net = Calls(
        lambda s, x: s.head((s.second(*[s.first(x, x, x)[0]] * 3)[0]).mean(1)),
        first=shared, second=shared, head=nn.Linear(16, 3), hidden=nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(6, 5, 16)
    found = bmrs.structures(net, x)
    assert {site: (group.features, group.kind) for site, group in found.groups.items()} == {
        "first": (4, "heads")
    }
    assert "first.out_proj" in staying(net, x)  # the projections read the input too, which loses nothing
    _, _, plan = fitted(net, x)
    small = plan.apply()
    assert small.first is small.second
    assert small.first.num_heads == len(plan.kept["first"]) < 4


def test_hooks_on_attention_are_not_lost():
    net = Calls(
        lambda s, x: s.out(relu(s.mid(s.att(x, x, x)[0].mean(1)))),
        att=nn.MultiheadAttention(8, 2, batch_first=True), mid=nn.Linear(8, 6), out=nn.Linear(6, 2),
    )  # fmt: skip
    net.att.register_forward_hook(lambda module, arguments, output: (3 * output[0], output[1]))
    x = torch.randn(3, 4, 8)
    noisy = bmrs.insert_noise(net, x)
    assert not any(isinstance(module, SeparateAttention) for module in noisy.modules())
    torch.testing.assert_close(at_one(noisy, x), net(x))


def test_what_feeds_a_branch_that_runs_in_training_alone_stays():
    def forward(s, x):
        h = relu(s.a(x))
        main = s.b(relu(s.mid(h)))
        return (main, s.auxiliary(h)) if s.training else main

    net = Calls(
        forward, a=nn.Linear(4, 8), mid=nn.Linear(8, 6), b=nn.Linear(6, 2),
        auxiliary=nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)),
    )  # fmt: skip
    x = torch.randn(6, 4)
    reasons = staying(net.eval(), x, strict=True)
    assert reasons["a"] == "read by 'auxiliary.0', which runs in training alone"
    assert "auxiliary.0" in reasons
    _, _, plan = fitted(net, x)
    assert set(plan.layers) == {"mid"}
    small = plan.apply()
    assert [tuple(out.shape) for out in small.train()(x)] == [(6, 2), (6, 2)]


def test_groups_that_must_be_equally_wide_are_found_before_the_fit():
    def forward(s, x):
        left, right = relu(s.left(x)), relu(s.right(x))
        assert left.shape == right.shape
        return s.out(left) + s.other(right)

    net = Calls(
        forward, left=nn.Linear(4, 16), right=nn.Linear(4, 16), out=nn.Linear(16, 2), other=nn.Linear(16, 2)
    )
    x = torch.randn(2, 4)
    with pytest.raises(StructureError, match=r"leave_out=\['left', 'right'\]"):
        bmrs.structures(net, x, strict=True)
    found = bmrs.structures(net, x)
    assert not found.groups
    assert {stays.path for stays in found.refused if stays.unsupported} == {"left", "right"}
    assert "AssertionError" in staying(net, x)["left"]
    with pytest.raises(
        StructureError, match=r"something that can be removed: .*left: the smaller network fails"
    ):
        bmrs.insert_noise(net, x)


@pytest.mark.parametrize("share", [1e-4, 1.0])
def test_channels_that_mix_a_little_are_found_before_the_fit(share):
    net = Calls(
        lambda s, x: s.b((h := relu(s.a(x))) + share * h.mean(1, keepdim=True)),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 2),
    )
    found = bmrs.structures(net, torch.randn(2, 4), strict=True)
    assert not found.groups
    assert staying(net, torch.randn(2, 4))["a"] == "read all at once by '(itself)', a Calls"
    assert staying(net, torch.randn(2, 4), leave_out="a")["a"] == "left out"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net, x = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype),
        torch.randn(6, 4, dtype=dtype),
    )
    _, _, plan = fitted(net, x)
    assert {parameter.dtype for parameter in plan.apply().parameters()} == {dtype}


def test_a_network_that_can_not_run_in_float64_is_checked_as_it_is():
    net = Calls(
        lambda s, x: s.b(relu(s.a(torch.ones(5, 5) @ x))).mean(1), a=nn.Linear(4, 8), b=nn.Linear(8, 3)
    )
    _, _, plan = fitted(net, torch.randn(6, 5, 4))
    assert plan.apply().a.out_features < 8


def test_a_gated_recurrent_unit_is_named():
    net = Calls(
        lambda s, x: s.out(s.rnn(relu(s.b(relu(s.a(x)))).transpose(1, 2))[0][:, -1]),
        a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 8, 3), rnn=nn.GRU(8, 6, batch_first=True), out=nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(6, 3, 12)
    with pytest.raises(StructureError, match=r"rnn: a recurrent GRU, .*leave_out=\['rnn'\]"):
        bmrs.insert_noise(net, x, strict=True)
    assert staying(net, x)["b"] == "read by 'rnn', a recurrent GRU, which is not cut"
    _, _, plan = fitted(net, x)
    assert plan.apply().a.out_channels == 4
    assert set(bmrs.structures(net, x, leave_out="rnn", strict=True).groups) == {"a"}


def test_one_slope_for_all_channels_ties_none():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(), nn.Conv2d(8, 4, 3))
    assert [group.features for group in bmrs.structures(net, torch.randn(2, 3, 9, 9))] == [8]


@pytest.mark.parametrize("width", [(4, 6), (10, 6), (10, 12)])
def test_a_gate_and_what_it_multiplies_are_one_structure_whatever_the_widths(width):
    hidden, gated = width
    net = nn.Sequential(
        nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, gated), nn.GLU(), nn.Linear(gated // 2, 2)
    )
    x = torch.randn(4, 4)
    found = bmrs.structures(net, x, strict=True)
    assert {site: (group.features, group.channels) for site, group in found.groups.items()} == {
        "0": (hidden, 1),
        "2": (gated // 2, 1),
    }
    _, _, plan = fitted(net, x)
    assert plan.apply()[2].out_features == 2 * len(plan.kept["2"])


def test_structures_that_nothing_reads_are_not_offered():
    net = Calls(
        lambda s, x: s.out(relu(s.a(x))) * s.gate(x).amax(1, keepdim=True),
        a=nn.Linear(4, 8), gate=nn.Linear(4, 5), out=nn.Linear(8, 2),
    )  # fmt: skip
    x = torch.randn(4, 4)
    assert set(bmrs.structures(net, x, strict=True).groups) == {"a"}
    assert staying(net, x)["gate"] == "read all at once by '(itself)', a Calls"


def test_infinities_of_a_mask_are_no_difference():
    net = Calls(
        lambda s, x: s.b(relu(s.a(x))).masked_fill(torch.tensor([False, True, False]), -torch.inf),
        a=nn.Linear(4, 8),
        b=nn.Linear(8, 3),
    )
    x = torch.randn(6, 4)
    noisy = bmrs.insert_noise(net, x)
    assert noise_layers(noisy)


def test_activation_checkpointing():
    net = Calls(
        lambda s, x: s.c(checkpoint(lambda h: relu(s.b(relu(s.a(h)))), x, use_reentrant=False)),
        a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2),
    )  # fmt: skip
    x, y = torch.randn(32, 4), torch.randint(2, (32,))
    model, guide, _ = fitted(net, x)
    result = bmrs.fit(model, guide, (x, y), epochs=1, batch_size=8, progress=False)
    assert result.history.loss.notna().all()
    copy.deepcopy(model)  # what the last pass drew does not stand in the way
    with pytest.raises(RuntimeError, match="call the network itself"):
        model.net.c(torch.randn(2, 8))


def test_several_draws_need_examples_in_the_first_dimension_whatever_the_sizes():
    net = Calls(lambda s, x: s.b(relu(s.a(x.transpose(0, 1)))).mean(0), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    x, y = torch.randn(6, 6, 4), torch.randint(2, (6,))  # as many positions as examples
    model, guide, _ = fitted(net, x)
    with pytest.raises(ValueError, match="draws_per_batch=1"):
        bmrs.fit(model, guide, (x, y), epochs=1, batch_size=6, progress=False)
    bmrs.fit(model, guide, (x, y), epochs=1, batch_size=6, draws_per_batch=1, progress=False)


def test_looking_leaves_no_trace():
    def forward(s, x):
        s.steps += 1
        return s.b(relu(s.a(x)))

    net = Calls(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    net.register_buffer("steps", torch.zeros(()))
    state = torch.get_rng_state()
    noisy = bmrs.insert_noise(net, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert net.steps == noisy.steps == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_the_original_load_into_the_network_with_noise():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    noisy = bmrs.insert_noise(net, x)
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    noisy.load_state_dict(other.state_dict())
    torch.testing.assert_close(at_one(noisy, x), other(x))


@pytest.mark.parametrize(
    ("net", "shape", "sites"),
    [
        (
            Calls(
                lambda s, x: s.out(torch.cat([x, relu(s.a(x))], 1)), a=nn.Linear(4, 8), out=nn.Linear(12, 2)
            ),
            (4,),
            {"a"},
        ),
        (
            Calls(
                lambda s, x: s.out(torch.cat([relu(s.a(x)), relu(s.b(x))], 1)).mean(-1),
                a=nn.Conv1d(3, 6, 3), b=nn.Conv1d(3, 5, 3), out=nn.Conv1d(11, 2, 1),
            ),
            (3, 12),
            {"a", "b"},
        ),
        (
            Calls(
                lambda s, x: s.out(torch.cat([relu(s.a(x)), relu(s.b(x))], -1)).mean((1, 2)),
                a=nn.Linear(3, 6), b=nn.Linear(3, 5), out=nn.Linear(11, 2),
            ),
            (4, 4, 3),
            {"a", "b"},
        ),
    ],
    ids=["with-the-input", "one-dimensional", "channels-last"],
)  # fmt: skip
def test_concatenation_wherever_the_channels_lie(net, shape, sites):
    _, _, plan = fitted(net, torch.randn(6, *shape))
    assert set(plan.layers) == sites
    plan.apply()


def test_a_plan_made_after_shrinking_rebuilds_the_original(tmp_path):
    def original():
        return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))

    x = torch.randn(16, 4)
    model, guide, plan = fitted(original(), x)
    plan.shrink(model, guide)
    second = bmrs.reduce(model, guide, bmrs.Random(0.3, seed=3))
    small = second.apply()
    from pyro_bmrs.networks.export import save_weights

    save_weights(small, tmp_path / "small.safetensors")
    again = bmrs.NetworkPlan.load(second.save(tmp_path / "plan.json"))
    rebuilt = again.rebuild(original(), tmp_path / "small.safetensors")
    torch.testing.assert_close(rebuilt(x), small(x))
    assert again.cuts.tensors["0.weight"][0] == again.kept["0"]


def test_a_fit_that_removes_goes_on_after_shrinking():
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    model, guide, plan = fitted(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)), x)
    plan.shrink(model, guide)
    left = set(plan.kept["0"])
    result = bmrs.fit(
        model, guide, (x, y), epochs=1, batch_size=16, removal="epoch", warm_up=0.0, progress=False,
        criterion=bmrs.Random(0.4, seed=1),
    )  # fmt: skip
    assert set(result.removals.unit) <= left
    assert len(result.removals)


def test_several_draws_act_on_their_examples():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)
    noisy = bmrs.insert_noise(net, x)
    from pyro_bmrs.networks.noise import examples_in_batch

    theta = torch.rand(3, 8)
    token = examples_in_batch.set(6)
    try:
        with torch.no_grad(), pyro.poutine.trace(), fixed_scales(noisy, {"0": theta}):
            have = noisy(x)
    finally:
        examples_in_batch.reset(token)
    hidden = relu(net[0](x)) * theta.repeat(2, 1)
    torch.testing.assert_close(have, net[2](hidden))


def test_a_network_that_noise_at_one_would_change_is_refused(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    real = HookedNoise.attach

    def spoiled(self, network):
        with torch.no_grad():
            network[2].bias.add_(1e-2)
        real(self, network)

    monkeypatch.setattr(HookedNoise, "attach", spoiled)
    with pytest.raises(StructureError, match=r"with every θ at 1 output 0 differs by 0\.01"):
        bmrs.insert_noise(net, torch.randn(5, 4))
