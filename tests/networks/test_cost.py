"""Costs: bytes counted by hand, timings only as long as they may take, files as large as they are said to be."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from torch import nn

from pyro_bmrs.networks import cost
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.cost import (
    compare_costs,
    file_bytes,
    latency_milliseconds,
    multiply_accumulates,
    multiply_accumulates_by_entry,
    parameters,
    peak_bytes,
)
from pyro_bmrs.networks.export import load_weights, save_weights

FLOAT = 4


def test_peak_bytes_counted_by_hand():
    net, x = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 2)), torch.randn(5, 10)
    weights = 10 * 30 + 30 + 30 * 2 + 2
    # while ReLU runs there are the input, the hidden units before it and those behind it
    assert peak_bytes(net, x) == FLOAT * (weights + 5 * 10 + 2 * 5 * 30)
    assert peak_bytes(net.double(), x.double()) == 2 * FLOAT * (weights + 5 * 10 + 2 * 5 * 30)


@pytest.mark.parametrize("depth", [2, 3, 10])
def test_a_chain_holds_two_activations_at_once(depth):
    x = torch.randn(8, 100)
    chain = nn.Sequential(*[nn.ReLU() for _ in range(depth)])
    assert peak_bytes(chain, x) == FLOAT * 800 * 3  # the input is the caller's and stays


def test_the_widest_place_counts_wherever_it_is():
    widths = [6, 50, 3, 40, 30, 2]
    net = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(widths)])
    weights = sum(a * b for a, b in pairwise(widths))
    widest = max(a + b for a, b in pairwise(widths[1:]))
    assert peak_bytes(net, torch.randn(7, 6)) == FLOAT * (weights + 7 * 6 + 7 * widest)


class Sum(nn.Module):
    """Of two inputs, beside a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(11, 3))

    def forward(self, left, right):
        return left + right


def test_what_is_held_is_counted_and_what_is_shared_is_counted_once():
    class Residual(nn.Module):
        def forward(self, x):
            first = x.relu()
            second = first.relu()
            third = second.relu()
            return first + third  # of five tensors, second is still held by its name

    x = torch.randn(4, 25)
    assert peak_bytes(Residual(), x) == FLOAT * 100 * 5
    assert peak_bytes(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Identity()), x) == FLOAT * 100
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    tied[1].weight = tied[0].weight
    y = torch.randn(1, 5)
    assert peak_bytes(tied, y) == FLOAT * (25 + 5 + 5 + 5)
    # a view of an input is no second input
    assert peak_bytes(Sum(), (x, x.view(4, 25))) == FLOAT * (33 + 2 * 100)


def test_buffers_and_all_inputs_count():
    given = {"left": torch.randn(2, 7), "right": torch.randn(2, 7)}
    wanted = FLOAT * (33 + 3 * 14)
    assert peak_bytes(Sum(), given) == wanted
    assert peak_bytes(Sum(), tuple(given.values())) == wanted
    assert peak_bytes(Sum(), given) == wanted  # nothing is remembered from one count to the next


class Clock(nn.Linear):
    """A linear layer whose every example takes some seconds of a clock that runs only here."""

    def __init__(self, inputs=3, outputs=2, *, each=0.0, call=0.0):
        super().__init__(inputs, outputs)
        self.each, self.call_cost, self.batches, self.threads = each, call, [], []

    now = 0.0

    def forward(self, x):
        self.batches.append(len(x))
        self.threads.append(torch.get_num_threads())
        Clock.now += self.call_cost + self.each * len(x)
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch):
    Clock.now = 0.0
    monkeypatch.setattr(cost.time, "perf_counter", lambda: Clock.now)


TIMINGS = [
    f"milliseconds_batch_{batch}_{words}" for words in ("one_thread", "all_threads") for batch in (1, 128)
]


def test_rows_of_the_comparison(clock):
    before, after, x = Clock(3, 8, each=1e-3), Clock(3, 4, each=5e-4), torch.randn(2, 3)
    table = compare_costs(before, after, x)
    assert list(table.columns) == ["before", "after", "error"]
    assert list(table.index) == [
        "parameters", "multiply_accumulates", "file_bytes", "peak_bytes_batch_128", *TIMINGS
    ]  # fmt: skip
    assert table.loc["parameters"].tolist() == [32, 16, 0]
    assert table.loc["multiply_accumulates"].tolist() == [24, 12, 0]
    assert table.loc["file_bytes"].tolist() == [file_bytes(before), file_bytes(after), 0]
    # the output is computed from weights and input alone: no hidden layer
    assert table.loc["peak_bytes_batch_128", ["before", "after"]].tolist() == [
        FLOAT * (size * 4 + 128 * 3 + 128 * size) for size in (8, 4)
    ]
    for name in TIMINGS:
        size = 128 if "128" in name else 1
        assert table.loc[name].tolist() == pytest.approx([1.0 * size, 0.5 * size, 0.0])


@pytest.mark.parametrize("runs", [10, 30, 100])
def test_the_error_of_a_ratio_is_that_of_its_median(runs):
    """Over 400 trials the mean error is the spread of the medians, to 15 %: 4 standard errors of that spread."""
    generator = torch.Generator().manual_seed(runs)
    medians, errors = [], []
    for _ in range(400):
        noise = torch.randn(runs, 2, generator=generator).mul(0.05).exp()
        times = (noise * torch.tensor([2.0, 1.0])).tolist()
        medians.append(statistics.median(after / before for before, after in times))
        errors.append(cost._ratio_error(times))
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(medians), rel=0.15)


def test_equal_networks_are_timed_as_one_and_save_nothing(clock):
    before, after, x = Clock(3, 8, each=1e-3), Clock(3, 8, each=2e-3), torch.randn(2, 3)
    table = compare_costs(before, after, x)
    assert (table.before == table.after).all()
    assert (table.error == 0).all()


def test_no_seconds_are_no_runs(clock, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(cost, "_latencies", forbidden)
    before, after = Clock(), Clock()
    table = compare_costs(before, after, torch.randn(4, 3), seconds=0)
    assert table.loc[TIMINGS].isna().all(axis=None)
    # one pass of one example each, for the multiply-accumulates
    assert before.batches == after.batches == [1]
    assert table.loc[["parameters", "multiply_accumulates", "file_bytes"]].notna().all(axis=None)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="seconds"):
            compare_costs(before, after, torch.randn(4, 3), seconds=bad)


def test_a_batch_that_would_take_too_long_is_left_out(clock):
    # 128 examples take longer than the second that each timing may take: not one run is spent on them
    before, after = Clock(3, 8, each=0.02), Clock(3, 4, each=0.01)
    table = compare_costs(before, after, torch.randn(1, 3), seconds=4.0)
    for words in ("one_thread", "all_threads"):
        assert table.loc[f"milliseconds_batch_1_{words}"].tolist() == pytest.approx([20.0, 10.0, 0.0])
        assert table.loc[f"milliseconds_batch_128_{words}"].isna().all()
    assert table.loc["peak_bytes_batch_128"].isna().all()
    assert set(before.batches) == set(after.batches) == {1}
    assert 0 < Clock.now <= 4.0 + 2 * 0.03  # and the two passes that are not timed


def test_repeats_are_as_many_as_there_is_time_for(clock):
    x = torch.randn(1, 3)
    slow, fast = Clock(call=0.1), Clock(call=0.05)
    assert latency_milliseconds([slow, fast], x, seconds=1.0) == pytest.approx([100.0, 50.0])
    assert len(slow.batches) == len(fast.batches) == 1 + 6
    slow, fast = Clock(call=0.1), Clock(call=0.05)
    assert latency_milliseconds([slow, fast], x, repeats=8) == pytest.approx([100.0, 50.0])
    assert len(slow.batches) == len(fast.batches) == 1 + 8
    # three runs of both would not fit: none, and the second network is not even called
    slow, fast = Clock(call=0.1), Clock(call=0.05)
    assert all(math.isnan(time) for time in latency_milliseconds([slow, fast], x, seconds=0.25))
    assert (len(slow.batches), len(fast.batches)) == (1, 0)


class FailsInLargeBatches(Clock):
    def forward(self, x):
        if len(x) > 1:
            raise RuntimeError("too large")
        return super().forward(x)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_and_modes_come_back(clock, two_threads):
    before, after = Clock(each=1e-3), Clock(each=1e-3)
    before.train(), after.eval()
    compare_costs(before, after, torch.randn(2, 3))
    assert set(before.threads) == {1, 2}
    assert torch.get_num_threads() == 2
    assert (before.training, after.training) == (True, False)
    failing = FailsInLargeBatches(each=1e-3).train()
    with pytest.raises(RuntimeError, match="too large"):
        compare_costs(failing, after, torch.randn(2, 3))
    assert failing.threads[-1] == 1  # it failed where there was one thread
    assert torch.get_num_threads() == 2
    assert (failing.training, after.training) == (True, False)


def tied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    net[2].weight = net[0].weight
    return net


def transposed():
    """A parameter whose memory is not in the order of its entries."""
    net = nn.Linear(4, 3)
    net.weight = nn.Parameter(torch.randn(4, 3).t())
    return net


@pytest.mark.parametrize(
    "make",
    [
        tied, transposed, lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)),
        lambda: nn.Linear(3, 2, dtype=torch.float64), lambda: nn.ReLU(),
    ],
    ids=["tied", "transposed", "buffers", "float64", "nothing"],
)  # fmt: skip
def test_files_are_as_large_as_said(make, tmp_path):
    net = make()
    path = save_weights(net, tmp_path / "deep" / "weights.safetensors")
    assert path.stat().st_size == file_bytes(net)
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
    loaded = load_weights(path)
    state = net.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert all(loaded[name].dtype == state[name].dtype for name in state)


def test_tied_weights_stay_tied_when_they_are_loaded(tmp_path):
    net, other = tied(), tied()
    with torch.no_grad():
        other[0].weight.zero_()
    other.load_state_dict(load_weights(save_weights(net, tmp_path / "weights.safetensors")))
    assert other[2].weight is other[0].weight
    assert torch.equal(other[0].weight, net[0].weight)
    assert parameters(net) == 28 + 20


def test_multiply_accumulates_are_of_one_example():
    net = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(16, 3))
    for batch in (1, 2, 9):
        assert multiply_accumulates(net, torch.randn(batch, 2, 6)) == 4 * 4 * 3 + 16 * 3


class Handing(nn.Module):
    """Hands parameters of its own to modules: an expanded class token, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(6, 4))
        self.first, self.second, self.norm = nn.Linear(4, 5), nn.Linear(4, 5), nn.LayerNorm(4)

    def forward(self, x):
        tokens = self.token.expand(len(x), -1, -1)
        return self.first(x) * self.second(tokens) + self.first(self.norm(self.table)).sum(0)


@pytest.mark.parametrize("asks", [True, False])
def test_a_parameter_is_handed_to_a_module(asks):
    """As in CaiT, PiT and DeBERTa."""
    network, x = Handing(), torch.randn(2, 3, 4)
    network.second.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in network.parameters()]
    assert multiply_accumulates(network, x.requires_grad_(asks)) == (3 + 1 + 6) * 4 * 5
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert x.requires_grad == asks
    assert not any(parameter._backward_hooks for parameter in network.parameters())
    with torch.no_grad():
        assert multiply_accumulates(nn.Sequential(network, nn.Flatten(), nn.Linear(15, 2)), x) == 200 + 30


@pytest.mark.parametrize("name", ["cait_xxs24_224", "pit_ti_224", "deberta"])
def test_networks_that_hand_a_parameter_to_a_module(name):
    if name == "deberta":
        transformers = pytest.importorskip("transformers")
        sizes = dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
        )
        config = transformers.DebertaV2Config(
            **sizes, relative_attention=True, position_buckets=4, share_att_key=True
        )
        network, x = transformers.DebertaV2Model(config), {"input_ids": torch.randint(9, (2, 5))}
    else:
        timm = pytest.importorskip("timm")
        network, x = timm.create_model(name, img_size=32), torch.randn(2, 3, 32, 32)
    assert multiply_accumulates(network.eval(), x) > 1000


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_counts_the_same_on_every_path_that_torch_takes(need_weights):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    # five tokens: four projections, and twice each of them with each other
    attention = 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8
    x = torch.randn(2, 5, 8)
    for net, count in (
        (Attending(), attention),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), attention + 5 * 2 * 8 * 16),
    ):
        assert multiply_accumulates(net.train(), x) == count
        assert multiply_accumulates(net.eval(), x) == count
        separate_attention(net)
        assert multiply_accumulates(net, x) == count


def test_work_of_entries_adds_up_to_the_work_of_the_network():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            for block in self.blocks:
                x = block(x).relu()
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    net, x = Blocks().eval(), torch.randn(3, 5, 4)
    found = multiply_accumulates_by_entry(net, x)
    assert found["blocks.0.weight"] == found["blocks.1.weight"] == found["last.weight"] == 5.0
    assert found["attention.in_proj_weight"] > 5.0
    total = sum(each * net.get_parameter(name).numel() for name, each in found.items())
    assert total == pytest.approx(multiply_accumulates(net, x))


class Recurrent(nn.Module):
    """Of examples (batch, steps, features) what a recurrent layer says of each step."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x if self.layer.batch_first else x.transpose(0, 1))[0]


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_counted_by_hand(layer, gates, batch_first):
    """The counter does not know torch's fused LSTM."""
    # seven steps: the gates of 6 units read 5 inputs and the 6 units
    x, each = torch.randn(3, 7, 5), 7 * gates * 6 * (5 + 6)
    assert multiply_accumulates(Recurrent(layer(5, 6, batch_first=batch_first)), x) == each
    both = Recurrent(layer(5, 6, batch_first=batch_first, bidirectional=True))
    assert multiply_accumulates(both, x) == 2 * each
    by_entry = {name: 7.0 for name, weight in both.named_parameters() if weight.dim() > 1}
    assert multiply_accumulates_by_entry(both, x) == by_entry
    # the second layer reads the units of both directions
    deep = Recurrent(layer(5, 6, 2, batch_first=batch_first, bidirectional=True))
    assert multiply_accumulates(deep, x) == 2 * each + 2 * 7 * gates * 6 * (12 + 6)


def test_recurrent_layers_of_an_accelerator_counted_by_hand():
    """As cuDNN computes them; on the meta device, where no accelerator is needed."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(5, 6, 2, bidirectional=True, device="meta")

        def forward(self, x):
            state, weights = torch.zeros(4, len(x), 6, device="meta"), [*self.layer.parameters()]
            return torch.ops.aten._cudnn_rnn(
                x, weights, 4, None, state, state, 2, 6, 0, 2, True, 0.0, False, True, [], None
            )[0]

    by_hand = 2 * 7 * 4 * 6 * (5 + 6) + 2 * 7 * 4 * 6 * (12 + 6)
    assert multiply_accumulates(Fused(), torch.zeros(3, 7, 5, device="meta")) == by_hand
