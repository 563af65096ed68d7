"""The pass that makes a Laplace posterior: interrupted it goes on, and nothing in the process is changed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.fitting import curvature_pass

SUPPORT = Path(__file__).parent.parent / "support"


def made(**options):
    torch.manual_seed(0)
    model = bmrs.Classifier(nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2)))
    return model, bmrs.AutoKroneckerLaplace(model, **options)


def data(examples=203):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def numbers(guide):
    return {path: (one.inputs, one.gradients) for path, one in guide.curvatures.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for path, tensors in one.items():
        assert all(map(torch.equal, tensors, other[path])), path


def test_a_pass_leaves_no_trace_and_has_a_history():
    model, guide = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, store = torch.get_rng_state(), set(pyro.get_param_store().keys())
    result = bmrs.fit(model, guide, data(), data(), progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert set(pyro.get_param_store().keys()) == store
    (row,) = result.history.to_dict("records")
    assert row["phase"] == "curvature"
    assert row["loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert guide.dataset_size == 203
    assert guide.log_likelihood == pytest.approx(-203 * row["loss"])


def test_the_batch_size_is_a_matter_of_taste_and_examples_are_at_most_those_asked_for():
    model, guide = made()
    bmrs.fit(model, guide, data(), batch_size=203, progress=False)
    inputs = guide.curvatures["0"].inputs
    bmrs.fit(model, guide, data(), batch_size=50, progress=False)
    torch.testing.assert_close(guide.curvatures["0"].inputs, inputs, rtol=1e-5, atol=1e-6)
    few, some = made(examples=100)
    bmrs.fit(few, some, data(), batch_size=50, progress=False)
    assert some.dataset_size == 203
    assert some.curvatures["0"].examples == 203
    assert not torch.equal(some.curvatures["0"].inputs, inputs)


def test_interrupted_and_called_again_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    model, guide = made()
    bmrs.fit(model, guide, data(), batch_size=20, progress=False)
    whole = numbers(guide)
    model, guide = made()
    calls = []
    add = curvature_pass._add

    def stopping(*arguments):
        add(*arguments)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(curvature_pass, "_add", stopping)
    stopped = bmrs.fit(model, guide, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    assert stopped.interrupted
    assert not guide.curvatures
    assert len(calls) == 4
    model, guide = made()
    result = bmrs.fit(model, guide, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    assert not result.interrupted
    assert len(calls) == 11
    assert_equal(numbers(guide), whole)


def test_sums_of_another_pass_are_not_taken(tmp_path):
    for seed in (0, 1):
        model, guide = made()
        bmrs.fit(model, guide, data(), batch_size=20, progress=False, checkpoints=tmp_path, seed=seed)
        alone, other = made()
        bmrs.fit(alone, other, data(), batch_size=20, progress=False, seed=seed)
        assert_equal(numbers(guide), numbers(other))


@pytest.mark.slow
def test_two_processes_share_a_pass(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SUPPORT / "two_passes.py"), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal(first, second)
    model, guide = made()
    bmrs.fit(model, guide, tuple(part[:200] for part in data()), batch_size=50, progress=False)
    for path, (inputs, gradients) in numbers(guide).items():
        torch.testing.assert_close(first[path][0], inputs, rtol=1e-5, atol=1e-6)
        # other labels are drawn
        assert 0.5 < float(first[path][1].sum() / gradients.sum()) < 2
