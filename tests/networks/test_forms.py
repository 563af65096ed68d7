"""Networks and inputs of every form that people have, from the noise to the small network; or refused by name."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.inputs import call, tensors_of


class Both(nn.Module):
    """Two inputs, whose channels are added, and two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 8)
        self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, p, q):
        hidden = torch.relu(self.left(p)) + torch.relu(self.right(q))
        return self.first(hidden), self.second(hidden)


class Named(NamedTuple):
    p: torch.Tensor
    q: torch.Tensor


class Output(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor


class OfDictionary(Both):
    def forward(self, batch):
        return dict(zip(("first", "second"), super().forward(batch["p"], batch["q"]), strict=True))


class OfNamedTuple(Both):
    def forward(self, batch):
        return Output(*super().forward(batch.p, batch.q))


class OfAnyKeywords(Both):
    def forward(self, **given):
        return super().forward(given["p"], given["q"])


class OfOptional(Both):
    def forward(self, p, q=None):
        return list(super().forward(p, p if q is None else q))


class Siamese(nn.Module):
    """Shared layers that are called twice; those behind them once."""

    def __init__(self):
        super().__init__()
        self.shared, self.joined, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, p, q):
        return self.head(torch.relu(self.joined(torch.relu(self.shared(p)) * torch.relu(self.shared(q)))))


def mlp():
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Sequential(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    ).to(memory_format=torch.channels_last)  # fmt: skip


def with_strides():
    net = mlp()
    for parameter in net.parameters():
        parameter.data = parameter.data.t().contiguous().t()
    return net


def x(*shape):
    return torch.randn(16, *(shape or (4,)))


def images():
    return x(3, 6, 6).to(memory_format=torch.channels_last)


FORMS = {
    "two inputs and outputs": (Both, lambda: (x(), x()), lambda out: out[0], 8),
    "dictionaries": (OfDictionary, lambda: {"p": x(), "q": x()}, lambda out: out["first"], 8),
    "named tuples": (OfNamedTuple, lambda: Named(x(), x()), lambda out: out.logits, 8),
    "any keywords": (OfAnyKeywords, lambda: {"p": x(), "q": x()}, lambda out: out[0], 8),
    "an optional argument": (OfOptional, lambda: (x(), None), lambda out: out[0], 8),
    "layers called twice": (Siamese, lambda: (x(), x()), None, 11),
    "bfloat16": (lambda: mlp().bfloat16(), lambda: x().bfloat16(), None, 14),
    "frozen": (lambda: mlp().requires_grad_(False), x, None, 14),
    "strides": (with_strides, x, None, 14),
    "channels last": (convolutions, images, None, 14),
    "an input that requires a gradient": (mlp, lambda: x().requires_grad_(), None, 14),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_small_network_is_called_as_the_one_with_noise(form):
    torch.manual_seed(0)
    make, make_input, find, structures = FORMS[form]
    inputs = make_input()
    model = bmrs.Classifier(bmrs.insert_noise(make(), inputs), find)
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(inputs, torch.zeros(16, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5, seed=1))
    assert plan.widths().before.sum() == structures
    small = plan.apply()
    with torch.no_grad():
        want, have = tensors_of(call(make(), inputs)), tensors_of(call(small, inputs))
    assert [(out.shape, out.dtype) for out in have] == [(out.shape, out.dtype) for out in want]


@pytest.mark.parametrize("form", ["strides", "channels last", "frozen"])
def test_weights_of_any_layout_are_fitted(form):
    make, make_input, find, _ = FORMS[form]
    inputs = make_input()
    model = bmrs.Classifier(bmrs.insert_noise(make(), inputs), find)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, (inputs, torch.randint(2, (16,))), epochs=1, batch_size=8)
    moved = [not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert any(moved) == (form != "frozen")
    layouts = [(one.stride(), other.stride()) for one, other in zip(before, model.parameters(), strict=True)]
    assert all(one == other for one, other in layouts)


def made_in_inference_mode():
    with torch.inference_mode():
        return mlp()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)),
            "all its parameters: '0.weight' is made",
        ),
        (made_in_inference_mode, "made outside of torch.inference_mode: '0.weight' can't have a gradient"),
        (lambda: mlp().to(torch.complex64), r"real parameters: got '0.weight' of type torch.complex64"),
        (nn.Sequential, "parameters: Sequential has none"),
    ],
)
def test_what_can_have_no_noise_is_refused_by_name(make, words):
    for function in (bmrs.structures, bmrs.insert_noise):
        with pytest.raises(ValueError, match=f"^network must (have|be) {words}"):
            function(make(), x())
