"""What is added to layers' outputs, and that a refit makes up for what the sum lacks."""

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks import refit as refitting
from pyro_bmrs.networks.residuals import added


class Block(nn.Module):
    """A stream round two layers; how the second one's output meets it is `combine`."""

    def __init__(self, combine, width=6, units=20):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, units), nn.ReLU()
        self.down, self.combine = nn.Linear(units, width), combine

    def forward(self, x):
        return self.combine(x, self.down(self.act(self.up(self.norm(x)))))


def in_place(x, y):
    y += x
    return y


def with_dropout(x, y):
    return x + nn.functional.dropout(y, 0.5, training=False)


@pytest.mark.parametrize(
    "combine", [lambda x, y: x + y, lambda x, y: y + x, torch.add, in_place, with_dropout]
)
def test_a_stream_is_found_however_it_is_added(combine):
    found = added(Block(combine), ["up", "down"], torch.randn(4, 6))
    assert list(found) == ["down"]
    assert (found["down"].path, found["down"].is_output) == ("norm", False)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: x * y,
        lambda x, y: x + 2 * y,
        lambda x, y: x.sum(0) + y,  # of another shape
        lambda x, y: torch.cat([x, y], dim=1) + 1,
        lambda x, y: y.abs() + x,
        lambda x, y: (y.sum(), y + x)[1],  # used elsewhere before
        lambda x, y: x.cos() + y,  # no module's input or output
        lambda x, y: (x + y) * y,  # used elsewhere afterwards
        lambda x, y: x.mul_(2) + y,  # changed in place since
    ],
)
def test_what_is_no_sum_of_the_output_alone_is_none(combine):
    assert added(Block(combine), ["up", "down"], torch.randn(4, 6)) == {}


def test_of_two_layers_the_later_one_makes_up_and_a_normalisation_between_is_none():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.three(x)) + (self.one(x) + self.two(x))

    found = added(Two(), ["one", "two", "three"], torch.randn(3, 4))
    assert {path: (beside.path, beside.is_output) for path, beside in found.items()} == {"two": ("one", True)}


def test_a_module_that_is_called_again_is_no_source():
    class Twice(Block):
        def forward(self, x):
            stream = self.act(self.up(x))
            y = self.down(self.act(stream))  # act holds another tensor now
            return y, self.combine(stream, self.up(y))

    found = added(Twice(lambda x, y: x + y), ["down", "up"], torch.randn(4, 6))
    assert all(beside.path != "act" or not beside.is_output for beside in found.values())


def test_nothing_stays_on_the_network():
    block = Block(torch.add)
    added(block, ["down"], torch.randn(4, 6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    assert block.training


def test_a_refit_of_a_stream_comes_nearer_than_one_of_each_branch(monkeypatch):
    torch.manual_seed(0)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(10, 30), nn.Linear(30, 10)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    network = nn.Sequential(nn.Linear(10, 10), Branch(), Branch(), Branch(), nn.Linear(10, 4)).eval()
    x = torch.randn(2000, 10)
    data = x, network(x).argmax(1)
    model = bmrs.Classifier(network)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, data, progress=False)
    plan = bmrs.reduce(model, guide)
    plan = plan.at(-0.6 * len(plan.path))

    def error():
        small = plan.apply(refit=data)
        with torch.no_grad():
            return float((small(x) - network(x)).square().mean())

    together = error()
    monkeypatch.setattr(refitting, "added", lambda *_: {})
    assert together < 0.95 * error()
