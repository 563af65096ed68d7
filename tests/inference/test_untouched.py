"""What runs a program leaves no trace: each trace, a program that tries to leave all of them, every public function."""

import random

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList
from torch import nn
from torch.distributions import Distribution

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.quality import diagnose
from pyro_bmrs.quality.predictive import predictions

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class RestlessNetwork(nn.Module):
    """A network that changes itself and torch's generator whenever it is called."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(3, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.5),
            nn.Tanh(),
            bmrs.MultiplicativeNoise(6),
            nn.Linear(6, 2),
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        torch.rand(3)
        self.calls += 1  # in place
        self.last = x.detach().mean()  # another tensor
        output = self.inside(x)
        self.inside.train(not self.inside.training)
        return output


class RestlessModel(bmrs.Classifier):
    """A Pyro model that leaves every trace that it can."""

    def forward(self, x, y=None):
        leave_traces()
        return super().forward(x, y)


def leave_traces():
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    pyro.get_param_store()[f"left behind {len(pyro.get_param_store())}"] = torch.ones(2)
    pyro.param("also left behind", torch.ones(2))
    pyro.enable_validation(not pyro.settings.get("validate_infer"))
    Distribution.set_default_validate_args(not Distribution._validate_args)


def restless_guide(x, y=None):
    leave_traces()
    torch.rand(3)
    pyro.sample("inside.4", bmrs.TruncatedLogNormal(torch.full((6,), -1.0), 0.5, -20.0, 0.0).to_event(1))


class Process:
    """All that must be as it was, as it is now."""

    def __init__(self, *programs):
        self.tensors = {
            (number, name): tensor.clone()
            for number, program in enumerate(programs)
            for name, tensor in program.state_dict(keep_vars=True).items()
        }
        self.buffers = [buffer for program in programs for buffer in program.buffers()]
        self.modes = [part.training for program in programs for part in program.modules()]
        self.gradients = [
            p.grad is None and p.requires_grad for program in programs for p in program.parameters()
        ]
        self.store = {name: value.clone() for name, value in pyro.get_param_store().items()}
        self.generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        self.settings = pyro.settings.get(), Distribution._validate_args, torch.is_grad_enabled()


def check_same(before, after):
    for kind in ("tensors", "store"):
        one, other = getattr(before, kind), getattr(after, kind)
        assert one.keys() == other.keys(), kind
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], kind
    assert all(one is other for one, other in zip(before.buffers, after.buffers, strict=True))
    assert before.modes == after.modes
    assert before.gradients == after.gradients
    assert torch.equal(before.generators[0], after.generators[0])
    assert before.generators[1] == after.generators[1]
    assert np.array_equal(before.generators[2], after.generators[2])
    assert before.settings == after.settings


@pytest.fixture
def somebody(empty_store):
    """A process in which others have parameters and settings of their own."""
    pyro.param("somebody's", torch.tensor(2.0))
    with pyro.settings.context(validate_infer=False, validate_distributions_torch=True):
        yield
    pyro.clear_param_store()


@pytest.fixture
def restless(somebody):
    net = RestlessNetwork().train()
    net.inside[1].eval()  # each part has a mode of its own
    return RestlessModel(net)


def test_no_trace_is_left_within_the_context(restless):
    before = Process(restless)
    with untouched(restless, seed=3):
        assert not any(part.training for part in restless.modules())
        assert "somebody's" in pyro.get_param_store()
        pyro.poutine.trace(restless).get_trace(X, Y)
        assert restless.net.calls == 1
    check_same(before, Process(restless))


def test_no_trace_is_left_by_a_program_that_fails(restless):
    before = Process(restless)

    def run():
        with untouched(restless):
            pyro.poutine.trace(restless).get_trace(X, Y)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    check_same(before, Process(restless))


def test_the_seed_is_of_all_generators_and_without_one_they_go_on():
    def draw():
        return float(torch.rand(())), random.random(), np.random.rand()  # noqa: NPY002

    drawn = []
    for seed in (1, 1, 2, 2**40):
        with untouched(seed=seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3]
    with untouched():
        ahead = draw()
    assert draw() == ahead


def test_gradients_are_made_only_where_asked_for():
    weight = torch.ones((), requires_grad=True)
    with untouched():
        assert not (2 * weight).requires_grad
    with untouched(gradients=True):
        assert (2 * weight).requires_grad
    with torch.no_grad(), untouched(gradients=True):
        assert not (2 * weight).requires_grad


def test_a_graph_that_remembers_statistics_is_not_spoiled():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    loss = net(X).sum()
    with untouched(net):
        net(X)
    loss.backward()  # would fail after a change in place


def posterior_of(model, kind):
    if kind == "AutoTruncatedLogNormal":
        guide = bmrs.AutoTruncatedLogNormal(model)
    elif kind == "AutoGuideList":
        guide = AutoGuideList(model)
        guide.append(bmrs.AutoTruncatedLogNormal(pyro.poutine.block(model, expose=["inside.4"])))
    else:
        return restless_guide
    with untouched(model):
        guide(X, Y)
    return guide


REDUCED = {"inside.4": bmrs.LogUniform(-20.0, -10.0)}
FUNCTIONS = {
    "reduce": lambda model, guide: bmrs.reduce(model, guide, bmrs.BMRS_N(), X, Y),
    "reduce by priors": lambda model, guide: bmrs.reduce(model, guide, REDUCED, X, Y, draws=100),
    "evidence_curve": lambda model, guide: bmrs.evidence_curve(model, guide, bmrs.BMRS_U(), X, Y, bits=[2, 8]),
    "greedy_reduction": lambda model, guide: bmrs.greedy_reduction(model, guide, REDUCED, X, Y, draws=100),
    "exhaustive_reduction": lambda model, guide: bmrs.exhaustive_reduction(model, guide, REDUCED, X, Y, draws=100),
    "check_posterior": lambda model, guide: bmrs.check_posterior(model, guide, (X, Y), draws=100),
    "to_datatree": lambda model, guide: bmrs.to_datatree(model, guide, (X, Y), draws=100),
    "reduced_posterior": lambda model, guide: (
        bmrs.reduce(model, guide, REDUCED, X, Y, draws=100).reduced_posterior().draw(3, X, Y)
    ),
    "diagnose": lambda model, guide: diagnose(
        model, guide, bmrs.reduce(model, guide, bmrs.Random(fraction=0.5), X, Y), (X, Y), (X, Y), validation=(X, Y),
        draws=100, criteria={"BMRS_N": bmrs.BMRS_N()},
    ),
    "evaluate": lambda model, guide: evaluate(model, (X, Y), {"inside.4": torch.ones(6)}),
    "predict": lambda model, guide: bmrs.predict(model, guide, X, batch_size=9),
    "predict from draws": lambda model, guide: bmrs.predict(model, guide, X, draws=3),
    "predictions": lambda model, guide: predictions(model, (X, Y), {"inside.4": torch.ones(2, 6)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of the traces, and of a posterior that is none
@pytest.mark.parametrize(
    "kind",
    [
        "AutoGuideList",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("AutoTruncatedLogNormal", "hand-written")),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_leave_no_trace(restless, name, kind):
    guide = posterior_of(restless, kind)
    programs = [program for program in (restless, guide) if isinstance(program, nn.Module)]
    before = Process(*programs)
    FUNCTIONS[name](restless, guide)
    check_same(before, Process(*programs))
