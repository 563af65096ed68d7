"""The pass that makes a Laplace posterior: interrupted it goes on, and nothing in the process is changed."""

import itertools
import math
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


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x, y: (x, y[:, 0]), "y must have the output's shape"),
        (lambda x, y: (x, torch.where(y > 1, torch.nan, y)), "NaN"),
        (lambda x, y: (x, torch.where(y > 1, torch.inf, y)), "must be finite"),
        (lambda x, y: (torch.where(x > 2, torch.nan, x), y), "NaN"),
    ],
)
def test_data_that_can_not_be_used_leave_the_scale_of_a_regression(spoil, told):
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = 2 * x[:, :1] + 0.1 * torch.randn(200, 1)
    model = bmrs.Regressor(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, y), progress=False)
    before, known = float(model.log_scale), dict(guide.curvatures)
    with pytest.raises(ValueError, match=told) as caught:
        bmrs.fit(model, guide, spoil(x, y), progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert float(model.log_scale) == before
    assert guide.curvatures == known
    with pytest.raises(ValueError, match=told):
        bmrs.fit(model, guide, spoil(x, y), (x + 1, y), progress=False)
    assert float(model.log_scale) == before


def test_settings_that_a_pass_does_not_have_are_refused():
    model, guide = made()
    with pytest.raises(ValueError, match="epochs, kl_weight must be left out with an AutoKroneckerLaplace"):
        bmrs.fit(model, guide, data(), epochs=7, kl_weight=30, progress=False)
    bmrs.fit(model, guide, data(), progress=False)
    with pytest.raises(ValueError, match="kl_weight, groups must be left out with an AutoKroneckerLaplace"):
        bmrs.reduce(model, guide, kl_weight=3, groups={})


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


def test_layers_that_do_not_fit_together_are_taken_one_after_the_other(tmp_path, monkeypatch):
    torch.manual_seed(0)
    between = [nn.Linear(12, 12) for _ in range(5)]
    net = nn.Sequential(nn.Linear(6, 12), *between, nn.Linear(12, 2))
    model = bmrs.Classifier(net)
    guide = bmrs.AutoKroneckerLaplace(model)
    assert guide.portions == [("0", "1", "2", "3", "4", "5", "6")]
    bmrs.fit(model, guide, data(), batch_size=20, progress=False)
    # of four matrices of a layer, in float64; a quarter is needed while it is summed over
    streamed = bmrs.AutoKroneckerLaplace(model, memory=4 * 8 * (12**2 + 12**2) / 2**30)
    assert streamed.portions == [("0", "1", "2", "3"), ("4", "5", "6")]
    add, calls = curvature_pass._add, []

    def stopping(sums, model, layers, *others):
        add(sums, model, layers, *others)
        assert sums.moments.keys() == layers.keys()
        calls.append(tuple(layers))
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(curvature_pass, "_add", stopping)
    assert bmrs.fit(model, streamed, data(), batch_size=20, progress=False, checkpoints=tmp_path).interrupted
    assert not streamed.curvatures
    bmrs.fit(model, streamed, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    assert calls == [("0", "1", "2", "3")] * 11 + [("4", "5", "6")] * 11
    assert_equal(numbers(streamed), numbers(guide))
    assert streamed.log_likelihood == pytest.approx(guide.log_likelihood)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curvature-0-0.safetensors", "curvature-0-1.safetensors"]


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
        # other signs are drawn
        assert 0.5 < float(first[path][1].sum() / gradients.sum()) < 2


def test_sums_of_other_weights_are_not_taken_and_the_examples_are_there_either_way(tmp_path):
    model, guide = made()
    bmrs.fit(model, guide, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    before = guide.log_likelihood
    again = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, again, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    assert_equal(numbers(again), numbers(guide))
    assert len(bmrs.reduce(model, again).path)  # it has examples to look at, though none was summed
    bmrs.fit(model, None, data(), epochs=5, learning_rate=1e-2, progress=False)
    later = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, later, data(), batch_size=20, progress=False, checkpoints=tmp_path)
    assert later.log_likelihood > before + 10
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curvature-0-0.safetensors"]


def test_outside_of_pyro_the_model_predicts_with_its_own_weights():
    model, guide = made()
    x, y = data()
    model.eval()
    with torch.no_grad():
        wanted = model.net(x)
    bmrs.fit(model, guide, (x, y), progress=False)
    assert torch.equal(model(x), wanted)
    torch.testing.assert_close(bmrs.predict(model, None, x), wanted.softmax(1))
    # training goes on without a guide, and the posterior of the old weights is no part of the model any more
    bmrs.fit(model, None, (x, y), epochs=1, progress=False)
    assert pyro.poutine.trace(model).get_trace(x, y).stochastic_nodes == ["data"]


def per_token(positions, ignored, weights=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model = bmrs.Classifier(net, class_dim=-1, weights=weights)
    x, y = torch.randn(400, positions, 4), torch.randint(3, (400, positions))
    x[:, 0], y[:, 0] = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)), 0
    if ignored:
        y[:, 1:] = -100
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, y), progress=False)
    return float(guide.curvatures["2"].gradients[0].trace()), guide.log_likelihood


def test_what_does_not_count_has_no_curvature():
    alone, ignored, all_of_them = (
        per_token(1, ignored=False),
        per_token(10, ignored=True),
        per_token(10, ignored=False),
    )
    assert ignored[0] == pytest.approx(alone[0], rel=0.1)  # other signs are drawn
    assert all_of_them[0] > 7 * alone[0]
    weighed = per_token(10, ignored=False, weights=torch.full((3,), 0.01))
    assert weighed[0] == pytest.approx(0.01 * all_of_them[0], rel=0.1)
    assert weighed[1] == pytest.approx(0.01 * all_of_them[1], rel=1e-4)


def test_half_precision_has_the_moments_of_single():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2)).to(dtype)
        model = bmrs.Classifier(net)
        x = torch.randn(300, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, (x, (x[:, 0] > 0).long()), progress=False)
        a = guide.curvatures["2"].inputs[0]
        assert float(torch.linalg.eigvalsh(a).min()) > -1e-6 * float(a.trace())
        found.append(a)
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.01)


def test_sums_of_other_data_are_no_part_of_a_pass(tmp_path):
    x, y = data()
    model, guide = made()
    bmrs.fit(model, guide, (x, y), checkpoints=tmp_path, progress=False)
    model, other = made()
    bmrs.fit(model, other, (3 * x, y), checkpoints=tmp_path, progress=False)
    ratio = other.curvatures["0"].inputs.diagonal(dim1=-2, dim2=-1) / guide.curvatures["0"].inputs.diagonal(
        dim1=-2, dim2=-1
    )
    assert torch.allclose(ratio, torch.full_like(ratio, 9.0), rtol=1e-5)


def test_a_loader_of_more_than_tensors_is_fine_and_random_numbers_go_on_as_they_would():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 2)

        def forward(self, x, name):
            return self.down(self.up(x).tanh())

    x, y = data(100)

    def collate(batch):
        inputs, labels = (torch.stack(part) for part in zip(*batch, strict=True))
        return (inputs, "a name"), labels

    loader = torch.utils.data.DataLoader([*zip(x, y, strict=True)], 20, shuffle=True, collate_fn=collate)
    model = bmrs.Classifier(Named())
    guide = bmrs.AutoKroneckerLaplace(model)
    state = torch.get_rng_state()
    bmrs.fit(model, guide, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    (shown, name), labels = guide.shown
    assert (len(shown), name, len(labels)) == (100, "a name", 100)


@pytest.mark.parametrize(
    "p", [[0.9, 0.06, 0.03, 0.01], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]]
)
def test_over_all_signs_gradients_have_the_curvature_of_the_classes(p):
    p = torch.tensor(p, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    found = curvature_pass._signed(p.expand_as(signs), signs)
    torch.testing.assert_close(found.T @ found / len(signs), torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("classes", [2, 10])
def test_a_network_that_is_sure_has_the_same_curvature_in_each_pass(classes):
    """Drawn labels are those of the network but once in a thousand: the spread was 0.4 and 0.5 of the mean."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes))
    with torch.no_grad():
        net[2].weight *= 100
    model, traces = bmrs.Classifier(net), []
    for seed in range(8):
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, data(), seed=seed, progress=False)
        traces.append(guide.curvatures["2"].gradients.diagonal(dim1=-2, dim2=-1).sum())
    assert torch.stack(traces).std() < 0.05 * torch.stack(traces).mean()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_pass_sums_the_curvature_of_the_classes(classes):
    """Signs of each example and class are their own: at the output G is the mean of diag p − p pᵀ, within 5 errors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, classes, bias=False))
    x = torch.randn(4000, 6)
    model = bmrs.Classifier(net)
    guide = bmrs.AutoKroneckerLaplace(model, examples=4000)
    bmrs.fit(model, guide, (x, torch.zeros(4000, dtype=torch.long)), progress=False)
    p = net(x).detach().double().softmax(1)
    each = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    # the variance of g gᵀ over signs
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=classes)), dtype=torch.float64)
    g = curvature_pass._signed(p.unsqueeze(1).expand(-1, len(signs), -1), signs.expand(len(p), -1, -1))
    variance = (g.unsqueeze(3) * g.unsqueeze(2)).var(1, correction=0)
    error = variance.sum(0).sqrt() / len(p)
    off = guide.curvatures["0"].gradients[0] - each.mean(0)
    assert (off.abs() <= 5 * error + 1e-6).all()
    if classes == 3:
        assert (error > 1e-4).any()  # or there was nothing to test


class Counting(nn.Sequential):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__(
            nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 2)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_buffers_stay_and_a_norm_without_statistics_is_no_obstacle():
    torch.manual_seed(0)
    model = bmrs.Classifier(Counting())
    guide = bmrs.AutoKroneckerLaplace(model)
    x = torch.randn(100, 4)
    train = x, (x[:, 0] > 0).long()
    bmrs.fit(model, guide, train, progress=False)
    assert float(model.net.calls) == 0
    small = bmrs.reduce(model, guide).at(-3).apply(refit=train)
    assert small(x).shape == (100, 2)


def test_weights_that_are_not_finite_are_told_in_a_line():
    model, guide = made()
    with torch.no_grad():
        next(model.net.parameters()).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"^model must have finite parameters: got NaN or inf in '") as error:
        bmrs.fit(model, guide, data(), progress=False)
    assert len(str(error.value)) < 100


def test_a_guide_without_room_for_any_layer_says_so():
    model, _ = made()
    with pytest.warns(UserWarning, match="no curvature of"):
        guide = bmrs.AutoKroneckerLaplace(model, memory=1e-9)
    bmrs.fit(model, guide, data(), progress=False)
    with pytest.raises(RuntimeError, match="no layer with a posterior: none fits into memory=1e-09 GiB"):
        bmrs.reduce(model, guide)
