"""A step as it is, compiled, and as a graph that is replayed: one result."""

import shutil
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.fitting import loop
from pyro_bmrs.fitting import step as steps
from pyro_bmrs.fitting.loop import Loop
from pyro_bmrs.fitting.step import Replayed


def network(inserted=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    if inserted:
        return bmrs.insert_noise(net, torch.randn(2, 4))
    return nn.Sequential(
        *net[:2], bmrs.MultiplicativeNoise(8), *net[2:4], bmrs.MultiplicativeNoise(6), net[4]
    )


def fitted(net=None, **changes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(42, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    model = bmrs.Classifier(net or network())
    guide = bmrs.AutoTruncatedLogNormal(model)
    result = bmrs.fit(model, guide, (x, y), epochs=3, batch_size=8, kl_weight=2.0, progress=False, **changes)
    return result, [*model.parameters(), *guide.parameters()]


def same(one, other, **tolerance):
    histories = [
        torch.tensor(fit[0].history[["loss", "log_likelihood", "kl"]].to_numpy()) for fit in (one, other)
    ]
    torch.testing.assert_close(*histories, **tolerance)
    for found, wanted in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


# a graph --------------------------------------------------------------------------------------------------


class Stage:
    """A run that notes how it was called, and a capture that notes that it happened."""

    def __init__(self):
        self.ran, self.captured, self.replayed = [], 0, 0

    def run(self, x, y, kl_weight):
        self.ran.append(isinstance(kl_weight, torch.Tensor))
        return torch.stack([x.sum() * kl_weight, y.sum().float()])

    def capture(self, run):
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay


def test_batches_of_the_first_form_are_replayed_and_others_run_as_they_are():
    stage = Stage()
    replayed = Replayed(stage.run, stage.capture)
    found, wanted = [], []
    for number in range(8):
        x = torch.full((2 if number == 5 else 3,), float(number))  # the fifth is a smaller one
        y, weight = torch.tensor([number]), 0.5 * number
        found.append(replayed(x, y, weight))
        wanted.append(torch.stack([x.sum() * weight, y.sum().float()]))
    assert torch.equal(torch.stack(found), torch.stack(wanted))  # none overwritten by a later one
    assert (stage.captured, stage.replayed) == (1, 4)
    assert stage.ran == [False] * 3 + [True] * 2 + [False] + [True] * 2


def test_what_is_replayed_is_told_from_inputs_that_change_later():
    stage = Stage()
    replayed = Replayed(stage.run, stage.capture)
    x = torch.ones(3)
    for _ in range(4):
        replayed(x, torch.tensor([0]), 1.0)
    x += 1  # the caller's own
    assert replayed(torch.full((3,), 5.0), torch.tensor([0]), 1.0)[0] == 15
    assert torch.equal(x, torch.full((3,), 2.0))


def test_a_fit_with_a_graph_is_the_fit_without(monkeypatch):
    """On the CPU the graph is a function that runs the step again, on the same tensors as a graph would."""
    plain = fitted(cuda_graph="off")
    captures = []

    def capture(run):
        captures.append(run)
        return run

    monkeypatch.setattr(steps, "captured", capture)
    monkeypatch.setattr(steps.Step, "_against_a_graph", lambda self, objective: None)
    same(fitted(), plain, rtol=0, atol=0)
    assert len(captures) == 1
    captures.clear()
    removing = fitted(removal="epoch", criterion="Random:fraction=0.3", warm_up=0.0)
    assert len(removing[0].removals)
    assert len(captures) > 1  # of other shapes after each removal
    monkeypatch.undo()
    same(removing, fitted(removal="epoch", criterion="Random:fraction=0.3", warm_up=0.0), rtol=0, atol=0)


def test_a_graph_that_can_not_be_is_refused():
    with pytest.raises(
        ValueError, match=r'cuda_graph must be "auto" or "off": .* this one is cpu: got \'on\''
    ):
        fitted(cuda_graph="on")


@pytest.mark.parametrize(
    ("accumulate", "processes", "elbo", "reason"),
    [
        (2, 1, "fused", "gradients are accumulated"), (1, 2, "fused", "several processes share the gradients"),
        (1, 1, "pyro", "the ELBO is pyro, and not fused"),
    ],
)  # fmt: skip
def test_on_a_gpu_too(accumulate, processes, elbo, reason):
    fabric = SimpleNamespace(
        device=torch.device("cuda"),
        world_size=processes,
        strategy=SimpleNamespace(setup_module=lambda module: module),
    )
    objective, settings = SimpleNamespace(elbo=elbo), bmrs.Settings(cuda_graph="on", accumulate=accumulate)
    with pytest.raises(ValueError, match=f'cuda_graph must be "auto" or "off": {reason}'):
        steps.Step(fabric, objective, None, settings, 3)
    settings = settings.changed(cuda_graph="auto")
    assert steps.Step(fabric, objective, None, settings, 3).graph is None


def test_losses_that_are_read_late_are_all_there(monkeypatch):
    """As on an accelerator: nothing is read between the first step of an epoch and its last."""
    at_once, readings, read = fitted(), [], Loop._read
    monkeypatch.setattr(loop, "_BETWEEN_READINGS", 1e9)
    monkeypatch.setattr(Loop, "reads_at_once", False)
    monkeypatch.setattr(
        Loop, "_read", lambda self, unread: readings.append(len(unread)) or read(self, unread)
    )
    same(fitted(), at_once, rtol=0, atol=0)
    assert readings == [6, 6, 6]


def test_a_loss_that_is_read_late_and_not_finite_names_its_batch(monkeypatch):
    monkeypatch.setattr(loop, "_BETWEEN_READINGS", 1e9)
    monkeypatch.setattr(Loop, "reads_at_once", False)
    model = bmrs.Classifier(network())
    guide = bmrs.AutoTruncatedLogNormal(model)
    x = torch.randn(40, 4)
    x[::8, 0] = torch.inf
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        FloatingPointError, match=r"loss became nan at batch \d of epoch 1; the parameters of epoch 0"
    ):
        bmrs.fit(
            model, guide, (x, torch.randint(3, (40,))), epochs=2, batch_size=4, kl_weight=1.0, progress=False
        )
    assert all(map(torch.equal, model.parameters(), before))


# a compiled network ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("inserted", [False, True])
def test_a_fit_of_a_compiled_network_is_the_fit_of_the_network(inserted):
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = fitted(network(inserted), compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    same(compiled, fitted(network(inserted)), rtol=1e-4, atol=1e-5)


def test_only_a_network_can_be_compiled():
    def program(x, y):
        w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", pyro.distributions.Normal(x @ w, 1.0), obs=y)

    data = torch.randn(6, 4), torch.randn(6)
    with pytest.raises(
        ValueError, match="compile must be False for a model that is no Classifier or Regressor"
    ):
        bmrs.fit(program, AutoNormal(program), data, epochs=1, compile=True, progress=False)
