"""The closed-form refit of a smaller network."""

import copy

import pytest
import torch
from torch import nn

from pyro_bmrs.networks import refit as refitting
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.refit import examples_within, refit


def twins():
    """A network whose hidden units come in pairs that are equal, and the cuts that leave one of each."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    net[1].momentum = None
    with torch.no_grad():
        net.train()(torch.randn(2000, 2, 6, 6))  # statistics of the inputs that the tests have
        net.eval()
        for tensor in (*net[0].parameters(), *net[1].parameters(), net[1].running_mean, net[1].running_var):
            tensor[1::2] = tensor[::2]
        for tensor in net[5].parameters():
            tensor[1::2] = tensor[::2]
    columns = [4 * channel + place for channel in (0, 2, 4) for place in range(4)]
    pairs, units = [0, 2, 4], [0, 2, 4, 6]
    cuts = Cuts(
        {
            **{f"0.{name}": {0: pairs} for name in ("weight", "bias")},
            **{f"1.{name}": {0: pairs} for name in ("weight", "bias", "running_mean", "running_var")},
            "5.weight": {0: units, 1: columns}, "5.bias": {0: units}, "7.weight": {1: units},
        }
    )  # fmt: skip
    small = copy.deepcopy(net)
    cuts.cut(small)
    return net, small, cuts


def test_what_twins_did_is_taken_over():
    """The columns of twins are added, though nobody said that they are twins."""
    net, small, cuts = twins()
    x = torch.randn(2000, 2, 6, 6)
    with torch.no_grad():
        wanted = net(x)
        apart = (small(x) - wanted).abs().max()
        refit(small, net, cuts, x)
        near = (small(x) - wanted).abs().max()
    assert apart > 0.1
    assert near < 0.1 * apart
    # the ridge is a thousandth of the mean: what can't be told apart stays near its weights
    assert (small[0].weight - net[0].weight[::2]).abs().max() < 1e-3


class WithMore(nn.Linear):
    """Adds what its weight knows nothing of, as adapters do."""

    def forward(self, x):
        return super().forward(x) + 3 * x.sum(-1, keepdim=True)


def test_a_layer_that_computes_something_else_keeps_its_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), WithMore(6, 3))
    small, cuts = (
        copy.deepcopy(net),
        Cuts({"0.weight": {0: [0, 2, 3]}, "0.bias": {0: [0, 2, 3]}, "2.weight": {1: [0, 2, 3]}}),
    )
    cuts.cut(small)
    before = small[2].weight.clone()
    refit(small, net, cuts, torch.randn(50, 4))
    assert torch.equal(small[2].weight, before)


class Looped(nn.Module):
    """The same block twice: what is added in the second round has not been made when the first one runs."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x):
        for _ in range(2):
            x = self.norm(x + self.down(self.up(x).relu()))
        return x


def test_a_block_that_is_called_twice_keeps_its_weights():
    torch.manual_seed(0)
    net = Looped().eval()
    kept = [0, 1, 3, 4, 6]
    small = copy.deepcopy(net)
    cuts = Cuts({"up.weight": {0: kept}, "up.bias": {0: kept}, "down.weight": {1: kept}})
    cuts.cut(small)
    before = copy.deepcopy(small.state_dict())
    refit(small, net, cuts, torch.randn(50, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_rows_go_where_inputs_are():
    layers = {
        "wide": nn.Linear(900, 10),
        "narrow": nn.Linear(30, 10),
        "grouped": nn.Conv1d(40, 40, 3, groups=20),
    }
    found = refitting._rows_within(layers, 1e6)
    assert (
        sum(4 * found[path] * outputs for path, outputs in (("wide", 10), ("narrow", 10), ("grouped", 40)))
        <= 1e6
    )
    assert found["wide"] > 3 * found["narrow"] > 3 * found["grouped"] > 3000
    assert refitting._rows_within(layers, 1e12) == dict.fromkeys(layers, 100_000)


def test_a_layer_too_wide_for_the_memory_keeps_its_weights():
    net, small, cuts = twins()
    before = small[5].weight.clone()
    # 12 inputs and a bias, 3 matrices of float64
    memory = 2.9 * 13**2 * 8 / 0.25 / 2**30
    with pytest.warns(UserWarning, match="not fitted again: '0', '5', of which"):
        refit(small, net, cuts, torch.randn(100, 2, 6, 6), memory=memory)
    assert torch.equal(small[5].weight, before)
    assert not torch.equal(small[7].weight, net[7].weight[:, ::2])


def test_batch_norm_has_the_statistics_of_its_inputs():
    net, small, cuts = twins()
    x = 3 + 2 * torch.randn(500, 2, 6, 6)
    refit(small, net, cuts, x)
    with torch.no_grad():
        inside = small[0](x)
    variance, mean = torch.var_mean(inside, dim=(0, 2, 3))
    torch.testing.assert_close(small[1].running_mean, mean)
    torch.testing.assert_close(small[1].running_var, variance)


class Siamese(nn.Module):
    """One block for two inputs on different scales."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.head = nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.cat([self.inner(self.norm(part)) for part in (x, 5 * x + 1)], 1))


def test_batch_norm_that_is_called_twice_keeps_its_statistics():
    torch.manual_seed(0)
    net, x = Siamese(), torch.randn(300, 4)
    net(x)
    net.eval()
    small = copy.deepcopy(net)
    refit(small, net, Cuts(), x)
    assert torch.equal(small.norm.running_mean, net.norm.running_mean)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-3)


def test_a_bias_that_layers_share_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)
            self.two.bias = self.one.bias

        def forward(self, x):
            return self.head(torch.cat([torch.relu(self.one(x)), torch.tanh(self.two(x) + 1)], 1))

    torch.manual_seed(0)
    net, x = Shared(), torch.randn(300, 4) + 1
    small = copy.deepcopy(net)
    with torch.no_grad():
        small.one.weight += 0.1
        small.two.weight -= 0.1
    refit(small, net, Cuts(), x)
    assert torch.equal(small.one.bias, net.one.bias)
    assert small.two.bias is small.one.bias
    torch.testing.assert_close(small(x), net(x), rtol=0.01, atol=0.01)


def test_the_full_network_stays_and_the_smaller_is_in_evaluation():
    net, small, cuts = twins()
    before = copy.deepcopy(net.state_dict())
    layers = []
    refit(small.train(), net.train(), cuts, torch.randn(40, 2, 6, 6), advance=lambda: layers.append(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert not small.training
    assert len(layers) == 3
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*net.modules(), *small.modules())
    )


def test_a_layer_that_is_called_twice_is_left_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    net = Twice()
    small = copy.deepcopy(net)
    with torch.no_grad():
        small.last.weight += 0.1
    before = small.inner.weight.clone()
    refit(small, net, Cuts(), torch.randn(300, 4))
    assert torch.equal(small.inner.weight, before)
    assert (small.last.weight - net.last.weight).abs().max() < 0.03


class TimeFirst(nn.Module):
    """Examples stand behind time inside, as in torch's own transformer layers by default."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 24), nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x.transpose(0, 1))))).mean(0))


def test_examples_in_another_dimension_are_not_confused():
    torch.manual_seed(0)
    net, x = TimeFirst(), torch.randn(600, 5, 6)
    small = copy.deepcopy(net)
    refit(small, net, Cuts(), x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def test_a_weight_that_layers_share_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(torch.tanh(self.inner(self.embedding(tokens))))

    torch.manual_seed(0)
    net = Tied()
    small = copy.deepcopy(net)
    with torch.no_grad():
        small.inner.weight += 0.1
    refit(small, net, Cuts(), torch.randint(20, (400, 6)))
    assert torch.equal(small.embedding.weight, net.embedding.weight)
    assert (small.inner.weight - net.inner.weight).abs().max() < 0.05


def test_one_value_per_channel_and_batch_norm_by_keyword():
    class Keyword(nn.Sequential):
        def forward(self, x):
            return self[2](torch.relu(self[1](input=self[0](x))))

    torch.manual_seed(0)
    for net in (Keyword(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),):
        for count in (1, 50):
            small, x = copy.deepcopy(net), torch.randn(count, 4)
            refit(small, net.eval(), Cuts(), x)
            assert bool(small(x).isfinite().all())


@pytest.mark.parametrize("chunk", [2, 4, 8, 16])
def test_examples_behind_time_are_no_others(chunk, monkeypatch):
    """Nothing was cut, so nothing changes; with 8 times, chunks of 2, 4 and 8 examples look like a batch."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.down(self.up(x.transpose(0, 1)).relu()).mean(0)

    torch.manual_seed(0)
    net = TimeFirst()
    small, x = copy.deepcopy(net), torch.randn(16, 8, 5)
    monkeypatch.setattr(refitting, "examples_within", lambda *_: chunk)
    refit(small, net, Cuts(), x)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


def test_fewer_examples_of_a_network_that_needs_more_memory():
    class Attention(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x  # (times, times) for each example

    few = [examples_within(Attention(), torch.randn(2, times, 4), 1.0) for times in (64, 512)]
    assert 32 < few[0] / few[1] < 100
    # the matrix twice, 4 bytes each
    assert few[1] <= 0.35 * 2**30 / (512 * 512 * 4)
