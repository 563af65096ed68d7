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
    """In place of CUDA: a run that notes how it was called, and a graph that runs it again, on the same tensors."""

    def __init__(self, fails=False):
        self.ran, self.captured, self.replayed, self.fails = [], 0, 0, fails

    def run(self, x, y, kl_weight):
        self.ran.append(isinstance(kl_weight, torch.Tensor))
        return torch.stack([x.sum() * kl_weight, y.sum().float()])

    def aside(self, run):
        return run()

    def graph(self, run):
        if self.fails:
            raise ValueError("something waits for the device")
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay


FIRST = torch.zeros(3), torch.tensor([0])


def numbers(replayed, odd=None):
    """What eight batches give and should give; one of them may be smaller."""
    found, wanted = [], []
    for number in range(8):
        x = torch.full((2 if number == odd else 3,), float(number))
        y, weight = torch.tensor([number]), 0.5 * number
        found.append(replayed(x, y, weight))
        wanted.append(torch.stack([x.sum() * weight, y.sum().float()]))
    return torch.stack(found), torch.stack(wanted)


def test_batches_of_the_first_form_are_replayed_and_others_run_as_they_are():
    stage = Stage()
    found, wanted = numbers(Replayed(stage.run, FIRST, stage, required=False), odd=5)
    assert torch.equal(found, wanted)  # none overwritten by a later one
    assert (stage.captured, stage.replayed) == (1, 4)
    assert stage.ran == [False] * 3 + [True] * 2 + [False] + [True] * 2


def test_a_smaller_batch_that_comes_first_is_not_the_one_to_replay():
    stage = Stage()
    found, wanted = numbers(Replayed(stage.run, FIRST, stage, required=False), odd=0)
    assert torch.equal(found, wanted)
    assert stage.replayed == 4


def test_what_can_not_be_captured_runs_as_it_is_and_says_so():
    stage = Stage(fails=True)
    replayed = Replayed(stage.run, FIRST, stage, required=False)
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph.*: something waits for the device"):
        found, wanted = numbers(replayed)
    assert torch.equal(found, wanted)
    assert stage.ran == [False] * 8
    with pytest.raises(RuntimeError, match='pass cuda_graph="off": something waits'):
        numbers(Replayed(stage.run, FIRST, stage, required=True))


def test_a_batch_with_more_than_tensors_is_not_replayed():
    """A graph would go on with the number that it was made with."""
    stage = Stage()
    replayed = Replayed(
        lambda x, y, weight: x[0].sum() * x[1] * weight, ((FIRST[0], 1), FIRST[1]), stage, required=False
    )
    for number in range(8):
        assert replayed((torch.ones(3), number), torch.tensor([0]), 1.0) == 3 * number
    assert not stage.captured


def test_inputs_stay_the_callers_own():
    stage = Stage()
    replayed = Replayed(stage.run, FIRST, stage, required=False)
    x = torch.ones(3)
    for _ in range(4):
        replayed(x, torch.tensor([0]), 1.0)
    x += 1
    assert replayed(torch.full((3,), 5.0), torch.tensor([0]), 1.0)[0] == 15
    assert torch.equal(x, torch.full((3,), 2.0))


def test_a_fit_with_a_graph_is_the_fit_without(monkeypatch):
    removal = dict(removal="epoch", criterion="Random:fraction=0.3", warm_up=0.0)
    plain, removing = fitted(cuda_graph="off"), fitted(**removal)
    stages = []
    monkeypatch.setattr(steps, "check_step", lambda *_: None)
    monkeypatch.setattr(steps, "Capture", lambda device: stages.append(Stage()) or stages[-1])
    for inserted in (False, True):
        same(fitted(network(inserted)), fitted(network(inserted), cuda_graph="off"), rtol=0, atol=0)
    same(fitted(), plain, rtol=0, atol=0)
    assert [stage.captured for stage in stages] == [1, 1, 1]
    assert all(stage.replayed for stage in stages)
    stages.clear()
    found = fitted(**removal)
    same(found, removing, rtol=0, atol=0)
    assert len(found[0].removals)
    assert len(stages) > 1  # tensors of other shapes after each removal


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
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=processes)
    model, settings = bmrs.Classifier(network()), bmrs.Settings(cuda_graph="on", accumulate=accumulate)
    with pytest.raises(ValueError, match=f'cuda_graph must be "auto" or "off": {reason}'):
        steps.check_step(fabric, model, elbo, settings)
    assert steps.check_step(fabric, model, elbo, settings.changed(cuda_graph="auto")) == reason


def test_what_is_refused_leaves_old_checkpoints(tmp_path):
    fitted(checkpoints=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ValueError, match="cuda_graph must be"):
        fitted(checkpoints=tmp_path, overwrite=True, cuda_graph="on")
    assert before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_a_fit_goes_on_with_steps_that_are_taken_in_another_way(tmp_path):
    one, _ = fitted(checkpoints=tmp_path)
    other, _ = fitted(checkpoints=tmp_path, cuda_graph="off")
    assert other.history.equals(one.history)


def test_a_loader_with_fewer_batches_than_it_says_loses_none(monkeypatch):
    class Fewer(torch.utils.data.DataLoader):
        def __len__(self):
            return super().__len__() + 3

    x = torch.randn(40, 4)
    loader = Fewer(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    histories = []
    for at_once in (True, False):
        monkeypatch.setattr(Loop, "reads_at_once", at_once)
        model = bmrs.Classifier(network())
        guide = bmrs.AutoTruncatedLogNormal(model)
        result = bmrs.fit(model, guide, loader, epochs=2, kl_weight=1.0, progress=False)
        histories.append(result.history.drop(columns="seconds"))
    assert histories[0].equals(histories[1])


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


def wide():
    """Activations so large that a fit saves them as their factors."""
    torch.manual_seed(0)
    return bmrs.insert_noise(
        nn.Sequential(nn.Linear(4, 9000), nn.Tanh(), nn.Linear(9000, 3)), torch.randn(2, 4)
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize(
    "made", [network, lambda: network(inserted=True), wide], ids=["layers", "inserted", "wide"]
)
def test_a_fit_of_a_compiled_network_is_the_fit_of_the_network(made):
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = fitted(made(), compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    same(compiled, fitted(made()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_network_that_shrinks_stays_compiled():
    from torch._dynamo.utils import counters

    removal = dict(removal="epoch", criterion="Random:fraction=0.3", warm_up=0.0)
    counters.clear()
    compiled = fitted(compile=True, **removal)
    assert not counters["graph_break"]
    assert not counters["frames"].get("skipped")
    same(compiled, fitted(**removal), rtol=1e-4, atol=1e-5)


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
