"""From a trained network to a smaller one by the evidence of its Laplace posterior."""

import copy

import numpy as np
import pyro
import pytest
import torch
from network_families import FAMILIES
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.evidence.kronecker import KroneckerCurvature
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.inputs import call, tensors_of
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.removal_path import LayerLoss, reduced_weights

F64 = torch.float64


def blobs(examples=600, seed=0):
    """Three classes that two of six inputs tell apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (examples,), generator=generator)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    x = torch.randn(examples, 6, generator=generator)
    x[:, :2] += centres[y]
    return x, y


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    model = bmrs.Classifier(net)
    bmrs.fit(model, None, blobs(), epochs=20, batch_size=50, weight_decay=0.05, progress=False)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, blobs(), progress=False)
    return model, guide, bmrs.reduce(model, guide)


def accuracy(net, data=None):
    x, y = data or blobs(2000, seed=1)
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def test_most_of_a_network_that_is_too_large_leaves_and_nothing_is_lost(trained):
    model, _, plan = trained
    small = plan.apply(refit=blobs())
    assert parameters(small) < 0.35 * parameters(model.net)
    assert accuracy(small) > accuracy(model.net) - 0.01
    assert type(small) is nn.Sequential
    # without the refit too
    assert accuracy(plan.apply()) > accuracy(model.net) - 0.03


def test_the_path_is_part_of_the_plan(trained):
    _, _, plan = trained
    path = plan.path
    assert len(path) == 68  # one of each layer stays
    assert (path.parameters.diff().dropna() < 0).all()
    for steps in (1, 10, 40, 68):
        at = plan.at(-steps)
        assert int(at.table.removed.sum()) == steps
        assert at.parameters_left() == path.parameters[steps - 1]
    best = int(-plan.rule.threshold)
    assert path.total_evidence_change.idxmax() == best - 1
    assert path.total_evidence_change.max() > 0
    assert "predicted rise of the loss" in str(plan)
    # each structure alone: what it costs where it is read is offset by what its own weights cost
    assert plan.table.log_evidence_change.to_numpy() == pytest.approx(
        torch.cat([plan.alone[layer].sum(1) for layer in plan.layers]).numpy()
    )


def test_the_order_is_by_loss_per_parameter(trained):
    _, guide, plan = trained
    first = plan.path.iloc[0]
    reader = {"0": "2", "2": "4"}
    scores = {}
    for layer, read_by in reader.items():
        loss = LayerLoss(guide.curvatures[read_by])
        count = guide.curvatures[read_by].shape[2]
        each = 7 + 30 if layer == "0" else 41 + 3
        for unit, rise in enumerate(loss.of_sets(torch.arange(count)[:, None])):
            scores[layer, unit] = float(rise) / each
    assert min(scores, key=scores.get) == (first.layer, first.unit)


def test_the_rise_of_the_loss_is_that_of_the_best_weights():
    """½ N tr(G E A Eᵀ) with E what weights change by, as the others take over: dense, step by step."""
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=F64) @ (torch.eye(6, dtype=F64) + 0.2 * torch.randn(6, 6, dtype=F64))
    layer = nn.Linear(6, 4).double()
    root = torch.randn(4, 9, dtype=F64)
    one = KroneckerCurvature((x.T @ x / 200)[None], (root @ root.T)[None], layer.weight.detach()[None], 200)
    loss, total, away = LayerLoss(one), 0.0, torch.zeros(6, dtype=torch.bool)
    for inputs in ([1], [4, 0], [3]):
        total += float(loss.of_sets(torch.tensor([inputs])))
        loss.remove_inputs(torch.tensor(inputs))
        away[inputs] = True
        change = (reduced_weights(one, away) - one.weights)[0]
        expected = 0.5 * 200 * torch.trace(one.gradients[0] @ change @ one.inputs[0] @ change.T)
        # but for the ridge
        assert total == pytest.approx(float(expected), rel=0.02)


def test_a_plan_is_saved_and_loaded_and_cuts_a_fresh_network(trained, tmp_path):
    model, _, plan = trained
    again = LaplacePlan.load(plan.save(tmp_path / "plan.json"))
    assert again.kept == plan.kept
    assert again.rule == plan.rule
    assert list(again.path.columns) == list(plan.path.columns)
    for name in plan.path.columns.drop("layer"):
        assert again.path[name].to_numpy() == pytest.approx(plan.path[name].to_numpy(), nan_ok=True)
    small = again.rebuild(copy.deepcopy(model.net))
    assert parameters(small) == plan.parameters_left()
    with pytest.raises(ValueError, match="refit needs the full network: this plan was loaded from disk"):
        again.apply(bmrs.insert_noise(model.net, blobs()[0][:2]), blobs()[0][:8], refit=blobs())


def test_floors(trained):
    model, guide, _ = trained
    plan = bmrs.reduce(model, guide, min_kept=0.5)
    assert list(plan.at(-1e9).widths().after) == [20, 15]
    assert len(plan.path) == 35


def test_weights_are_latents(trained):
    model, guide, _ = trained
    x, y = blobs(50)
    names = ["0.weight", "2.weight", "4.weight"]
    assert list(guide.posterior()) == names
    assert pyro.poutine.trace(guide).get_trace(x).stochastic_nodes == names
    trace = pyro.poutine.trace(model).get_trace(x, y)
    assert trace.stochastic_nodes == [*names, "data"]
    drawn = pyro.infer.Predictive(model, guide=guide, num_samples=5)(x)
    assert drawn["y"].shape == (5, 50)
    point, mean = bmrs.predict(model, guide, x), bmrs.predict(model, guide, x, draws=200)
    torch.testing.assert_close(point, model.net(x).softmax(1))
    # the posterior is less sure than its mean
    assert float(mean.max(1).values.mean()) < float(point.max(1).values.mean())
    tree = bmrs.to_datatree(model, guide, (x, y), draws=30)
    assert tree.posterior["0.weight"].shape == (1, 30, 40, 6)


def test_the_evidence_prefers_weights_that_are_needed(trained):
    """log p(data) of the network is larger than that of one whose output weights are of no use."""
    _, guide, _ = trained
    assert guide.log_marginal_likelihood() > 600 * np.log(1 / 3)


def test_a_regression():
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(400, 1)
    net = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 1))
    model = bmrs.Regressor(net)
    bmrs.fit(model, None, (x, y), epochs=60, batch_size=50, learning_rate=1e-2, progress=False)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, y), progress=False)
    small = bmrs.reduce(model, guide).apply(refit=(x, y))
    with torch.no_grad():
        before, after = ((one(x) - y).square().mean().sqrt() for one in (net, small))
    assert parameters(small) < 0.6 * parameters(net)
    assert float(after) < 1.3 * float(before)


def first_output(out):
    return next(tensor for tensor in tensors_of(out) if tensor.is_floating_point())


# of one kind each; all others take longer
QUICK = {"tanh_mlp", "selecting_mlp", "lenet5", "vgg"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, id=family.build.__name__, marks=() if family.build.__name__ in QUICK else pytest.mark.slow
        )
        for family in FAMILIES
    ],
)
def test_every_family_goes_from_fit_to_refit(family):
    torch.manual_seed(0)
    net, x = family.build()
    net.eval()
    with torch.no_grad():
        y = first_output(call(net, x))
    model = bmrs.Regressor(net, first_output, scale=float(y.std()) or 1.0)
    data = (x, y + 0.1 * y.std() * torch.randn_like(y))
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, data, progress=False)
    plan = bmrs.reduce(model, guide)
    plan = plan.at(-(len(plan.path) // 3))
    small = plan.apply(refit=data)
    with torch.no_grad():
        found = first_output(call(small, x))
    assert found.shape == y.shape
    assert bool(found.isfinite().all())
    if len(plan.path) > 2:
        assert parameters(small) < parameters(net)


def test_what_has_no_trained_network_is_refused():
    noisy = bmrs.Classifier(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    )
    with pytest.raises(ValueError, match="model must have a network without noise layers"):
        bmrs.AutoKroneckerLaplace(noisy)
    with pytest.raises(TypeError, match="model must be a Classifier or a Regressor around a network: got"):
        bmrs.AutoKroneckerLaplace(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must have linear layers, convolutions or embeddings"):
        bmrs.AutoKroneckerLaplace(bmrs.Classifier(nn.Sequential(nn.BatchNorm1d(3))))
    plain = bmrs.Classifier(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="examples must be a positive integer: got 0"):
        bmrs.AutoKroneckerLaplace(plain, examples=0)
    guide = bmrs.AutoKroneckerLaplace(plain)
    with pytest.raises(RuntimeError, match="guide has no posterior yet"):
        guide.posterior()
    with pytest.raises(RuntimeError, match="guide has no posterior yet"):
        bmrs.reduce(plain, guide)
    with pytest.raises(ValueError, match="model must be the one that the guide was made for"):
        bmrs.fit(bmrs.Classifier(nn.Linear(4, 2)), guide, blobs())
