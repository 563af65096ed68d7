"""Statistics gathered anew: those of the data, by batches, and nothing else of the network or the process."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs import MultiplicativeNoise, recalibrate

EXAMPLES = 70


def data(count=EXAMPLES, shape=(4,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 + 2.0 * torch.randn(count, *shape, generator=generator)
    return x, torch.zeros(count, dtype=torch.long)


def dense():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )  # fmt: skip


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1),
        nn.BatchNorm2d(2, momentum=0.3), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def statistics(net):
    return {name: tensor.clone() for name, tensor in net.named_buffers() if "running" in name}


@torch.no_grad()
def directly(net, batches):
    """The averages over batches of mean and unbiased variance, each layer normalising by its batch's own."""
    found = {}
    for x in batches:
        for path, layer in net.named_children():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                channels = x.transpose(0, 1).flatten(1)
                mean, count = channels.mean(1), channels.shape[1]
                square = (channels - mean[:, None]).square().sum(1)
                found.setdefault(f"{path}.running_mean", []).append(mean)
                found.setdefault(f"{path}.running_var", []).append(square / (count - 1))
                shape = (1, -1, *[1] * (x.dim() - 2))
                x = (x - mean.view(shape)) / (square / count + layer.eps).sqrt().view(shape)
                if layer.affine:
                    x = x * layer.weight.view(shape) + layer.bias.view(shape)
            elif not isinstance(layer, nn.Dropout):
                x = layer(x)
    return {name: torch.stack(parts).mean(0) for name, parts in found.items()}


@pytest.mark.parametrize(("make", "shape"), [(dense, (4,)), (images, (1, 6, 6))], ids=["dense", "images"])
@pytest.mark.parametrize("batch_size", [EXAMPLES, 14, 35])
def test_statistics_are_the_averages_over_batches(make, shape, batch_size):
    net = make()
    x, y = data(shape=shape)
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(7))
    wanted = directly(net, x[order].split(batch_size))
    parameters = copy.deepcopy(dict(net.named_parameters()))
    assert recalibrate(net, (x, y), batch_size=batch_size, seed=7) is net
    have = statistics(net)
    assert have.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(have[name], wanted[name], msg=name)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in net.named_parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_only_as_many_examples_as_asked_for():
    x, y = data()
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))
    for examples, batches in ((20, 2), (21, 3), (2, 1), (60, 6), (4096, 7)):
        net = dense()
        wanted = directly(net, x[order].split(10)[:batches])
        recalibrate(net, (x, y), examples=examples, batch_size=10)
        for name, tensor in statistics(net).items():
            torch.testing.assert_close(tensor, wanted[name], msg=f"{examples} {name}")


def test_what_was_there_before_does_not_count_and_a_seed_is_a_seed():
    x, y = data()
    one, other, third = dense(), dense(), dense()
    other(100.0 * torch.randn(8, 4))  # other statistics to begin with
    for net, seed in ((one, 1), (other, 1), (third, 2)):
        recalibrate(net, (x, y), batch_size=16, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert not torch.equal(one[1].running_mean, third[1].running_mean)


def frozen_in_part():
    """Modes and momenta of all kinds."""
    net = dense()
    net.train()
    net[1].eval()
    net[4].eval()
    net[1].momentum, net[5].momentum = 0.25, None
    return net


def settings_of(net):
    return [(module.training, getattr(module, "momentum", "none")) for module in net.modules()]


def test_modes_and_momenta_come_back():
    net = frozen_in_part()
    before = settings_of(net)
    recalibrate(net, data())
    assert settings_of(net) == before


def test_modes_and_momenta_come_back_after_an_error():
    class Breaks(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 20:
                raise OSError("the disk is gone")
            return torch.randn(4), 0

    for wrong in (Breaks(), data(shape=(3,))):
        net = frozen_in_part()
        before = settings_of(net)
        with pytest.raises((OSError, RuntimeError), match=r"disk is gone|shapes cannot be multiplied"):
            recalibrate(net, wrong, batch_size=8)
        assert settings_of(net) == before


class Items(Dataset):
    """Not tensors, but pairs one by one."""

    def __init__(self, count=EXAMPLES):
        self.x, self.y = data(count)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


@pytest.mark.parametrize("source", [data, Items], ids=["tensors", "dataset"])
def test_generators_are_untouched(source):
    net = dense()
    torch.manual_seed(3)
    given = source()
    before = torch.get_rng_state()
    recalibrate(net, given, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_kind_of_data_gives_the_same():
    x, y = data()
    nets = [dense() for _ in range(4)]
    recalibrate(nets[0], (x, y), batch_size=EXAMPLES)
    recalibrate(nets[1], TensorDataset(x, y), batch_size=EXAMPLES)
    recalibrate(nets[2], Items(), batch_size=EXAMPLES)
    recalibrate(nets[3], DataLoader(Items(), batch_size=EXAMPLES))
    for net in nets[1:]:
        for name, tensor in statistics(net).items():
            torch.testing.assert_close(tensor, statistics(nets[0])[name])


@pytest.mark.parametrize("batch_size", [3, 23, 69])
def test_a_last_batch_of_one_is_left_out(batch_size):
    net = dense()
    x, y = data()
    assert EXAMPLES % batch_size == 1
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))
    wanted = directly(net, x[order][:-1].split(batch_size))
    recalibrate(net, (x, y), batch_size=batch_size)
    for name, tensor in statistics(net).items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_dropout_and_other_layers_stay_in_evaluation():
    seen = []

    class Watches(nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    net = nn.Sequential(nn.Dropout(0.9), Watches(), nn.BatchNorm1d(4)).train()
    x, y = data()
    recalibrate(net, (x, y), batch_size=EXAMPLES)
    assert set(seen) == {False}
    torch.testing.assert_close(net[2].running_mean, x.mean(0))
    assert net[1].training


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Dropout()),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    ],
    ids=["no-batch-norm", "no-statistics"],
)
def test_a_network_without_statistics_is_not_even_called(make):
    net = make()
    before = copy.deepcopy(net.state_dict())
    net.register_forward_hook(lambda *_: pytest.fail("called"))
    assert recalibrate(net, data()) is net
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_networks_of_keywords_are_called_with_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, *, left, right):
            return self.norm(torch.cat([left, right], 1))

    x, _ = data(shape=(2,))

    class Pairs(Dataset):
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, index):
            return {"left": x[index, :1], "right": x[index, 1:]}, 0

    net = recalibrate(Named(), Pairs(), batch_size=EXAMPLES)
    torch.testing.assert_close(net.norm.running_mean, x.mean(0))


def test_noise_is_refused():
    by_hand = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), MultiplicativeNoise(6), nn.Linear(6, 2))
    inserted = bmrs.insert_noise(dense(), torch.randn(2, 4))
    for net in (by_hand, inserted):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="no noise layers"):
            recalibrate(net, data())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["examples", "batch_size"])
@pytest.mark.parametrize("value", [1, 0, -5, 2.0, "64", None, True])
def test_bad_numbers_are_named(name, value):
    net = dense()
    net(torch.randn(8, 4))
    before = statistics(net)
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 2: got {value!r}"):
        recalibrate(net, data(), **{name: value})
    assert all(torch.equal(tensor, before[key]) for key, tensor in statistics(net).items())
