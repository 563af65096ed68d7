"""From a trained network to a smaller one by the evidence of its Laplace posterior."""

import copy

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained_families import families, output_of
from trained_families import trained as trained_family

import pyro_bmrs as bmrs
from pyro_bmrs.evidence.kronecker import KroneckerCurvature, Spectrum, evidence_of_inputs
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.pruning import evidence_path, laplace_plan, removal_path
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.layer_states import LayerEvidence, LayerLoss, reduced_weights

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
    model, guide, plan = trained
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
    # at some places the loss was measured, with what had left there
    known = path[path.measured_loss_rise.notna()]
    assert len(known) >= 8
    for row in (known.iloc[0], known.iloc[-1]):
        steps = int(row.name) + 1
        x, y = guide.shown
        with torch.no_grad():
            losses = [
                nn.functional.cross_entropy(one(x), y)
                for one in (plan.at(-steps).reduced_model().net, model.net)
            ]
        assert row.measured_loss_rise == pytest.approx(600 * float(losses[0] - losses[1]), rel=1e-3, abs=1e-2)
    assert known.measured_loss_rise.iloc[-1] > 10
    # each structure alone: what it costs where it is read is offset by what its own weights cost
    alone = path.set_index(["layer", "unit"])[["outgoing", "incoming"]].sum(axis=1)
    table = plan.table.set_index(["layer", "unit"]).log_evidence_change
    assert table[alone.index].to_numpy() == pytest.approx(alone.to_numpy())
    assert (path.incoming > 0).all()
    assert (path.freed == -path.parameters.diff().fillna(path.parameters[0] - parameters(model.net))).all()


def test_no_size_is_chosen_where_the_loss_rises_far_above_what_is_predicted(trained, monkeypatch):
    model, guide, plan = trained
    known = plan.path.measured_loss_rise.notna().to_numpy().nonzero()[0]
    place = int(known[known < plan.steps - 1][-1])

    def measured(model, shown):
        # the full network's loss first, then that of each place
        looked.append(0)
        return torch.zeros(2) if len(looked) - 2 < list(known).index(place) else losses

    losses, looked = torch.tensor([9.0, 9.0]), []
    monkeypatch.setattr(evidence_path, "_losses", measured)
    other = bmrs.reduce(model, guide)
    assert other.steps <= place
    assert other.steps < plan.steps
    assert "times what is predicted" not in str(other)
    # a rise that may be chance stops nothing
    sure, unsure = (
        plan.path.assign(measured_loss_rise=2 * plan.path.total_loss_rise + 15.0, measured_loss_error=error)
        for error in (1.0, 2.0)
    )
    assert laplace_plan._believed(sure, 600) == 0
    assert laplace_plan._believed(unsure, 600) == len(plan.path)


def test_the_measured_rise_has_its_standard_error(trained):
    model, guide, plan = trained
    known = plan.path[plan.path.measured_loss_error.notna()]
    assert known.index.equals(plan.path.index[plan.path.measured_loss_rise.notna()])
    x, y = guide.shown
    for step, row in list(known.iterrows())[-4:]:
        with torch.no_grad():
            full, less = (
                nn.functional.cross_entropy(one(x), y, reduction="none")
                for one in (model.net, plan.at(-(step + 1)).reduced_model().net)
            )
        alone = 600 * float((less - full).std()) / len(y) ** 0.5
        # of 40 parts, whose standard deviation is known to 11 %: a false alarm in 2,000
        assert row.measured_loss_error == pytest.approx(alone, rel=0.4)


def with_constants(groups=1):
    """A network of which filters 1 and 5, and a hidden unit, are always the same."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 6, 2, groups=groups), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[0], net[2], net[5]):  # of which all else varies much
            layer.weight *= 6
            layer.bias.zero_()
        net[0].weight -= net[0].weight.mean((1, 2, 3), keepdim=True)
        for unit in (1, 5):
            net[0].weight[unit], net[0].bias[unit] = 0.0, 3.0
        net[5].weight[4], net[5].bias[4] = 0.0, 2.0
    x = torch.randn(400, 1, 5, 5) + 2.0
    return net, (x, (x[:, 0, 0, 0] > 2.0).long())


@pytest.mark.parametrize("options", [{}, {"widest": 10}], ids=["whole", "taken apart"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_constant_leaves_first_and_the_bias_takes_over(groups, options):
    """Nothing is lost without it, and ΔF is above 0."""
    net, (x, y) = with_constants(groups)
    model = bmrs.Classifier(net)
    guide = bmrs.AutoKroneckerLaplace(model, **options)
    bmrs.fit(model, guide, (x, y), progress=False)
    assert float(guide.curvatures["7"].mean[0, 4]) == pytest.approx(2.0)
    plan = bmrs.reduce(model, guide)
    # of a convolution in groups the same filter of each is a structure
    constant = {("0", 1), ("5", 4)} | ({("0", 5)} if groups == 1 else set())
    places = [pair in constant for pair in zip(plan.path.layer, plan.path.unit, strict=True)]
    last = len(places) - places[::-1].index(True)
    assert last <= 8  # ReLUs that are never on leave early, too
    first = plan.path.iloc[:last]
    assert first.total_loss_rise.iloc[-1] < 0.01
    assert first.total_evidence_change.iloc[-1] > 0
    small = plan.at(-float(last)).apply()
    with torch.no_grad():
        assert (small(x) - net(x)).abs().max() < 0.01 * net(x).std()


def test_inputs_that_are_all_constant_leave_a_plan():
    """A branch that is fed a constant code: its curvature is 0 but for rounding, of which nothing becomes negative."""

    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 10), nn.Linear(5, 16)
            self.d, self.b = nn.Linear(16, 10), nn.Linear(10, 2)

        def forward(self, x):
            code = torch.full((len(x), 5), 0.7) + 0.1 * torch.arange(5)
            return self.b(torch.relu(self.a(x)) + self.d(torch.tanh(self.c(code))))

    torch.manual_seed(0)
    x = torch.randn(300, 6)
    model = bmrs.Classifier(Coded())
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, (x[:, 0] > 0).long()), progress=False)
    assert torch.linalg.eigvalsh(guide.curvatures["d"].inputs).min() > -1e-12
    path = bmrs.reduce(model, guide).path
    assert path[path.layer == "c"].loss_rise.max() < 1e-4


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


@pytest.mark.parametrize("by", ["loss", "evidence"])
def test_several_of_a_layer_at_once_are_as_one_after_the_other(by, monkeypatch):
    """With as many inputs as layers have: of six, units are nearly copies, and many orders are as good.

    Over six seeds the order shifts by 0.2 to 3.7 % of its length, and totals by at most 4 %.
    """
    ratios, shifted = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(2000, 100)
        y = (x @ torch.randn(100, 3)).argmax(1)
        net = nn.Sequential(nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 90), nn.Tanh(), nn.Linear(90, 3))
        model = bmrs.Classifier(net)
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, (x, y), progress=False)
        with monkeypatch.context() as patched:
            together = bmrs.reduce(model, guide, bmrs.RemovalOrder(by=by)).path
            patched.setattr(removal_path, "_TOGETHER", 10**9)
            alone = bmrs.reduce(model, guide, bmrs.RemovalOrder(by=by)).path
        place = {pair: number for number, pair in enumerate(zip(alone.layer, alone.unit, strict=True))}
        shifts = [
            abs(place.get(pair, len(alone)) - number)  # one that stays would be the last
            for number, pair in enumerate(zip(together.layer, together.unit, strict=True))
        ]
        shifted.append(np.mean(shifts) / len(alone))
        ends = [19, 99, 199, len(alone) - 1]
        ratios.append(together.total_loss_rise.to_numpy()[ends] / alone.total_loss_rise.to_numpy()[ends])
        # all of one layer: the rises of single steps add up to that of all at once
        only = together[together.layer == "2"]
        whole = LayerLoss(guide.curvatures["4"]).of_sets(torch.tensor([only.unit.tolist()]))
        assert only.loss_rise.sum() == pytest.approx(float(whole), rel=1e-6)
    assert np.mean(shifted) < 0.02
    off = np.abs(np.array(ratios) - 1)
    assert off.mean() < 0.01
    assert off.max() < 0.05


@pytest.mark.parametrize("per", [None, "parameter"])
def test_by_evidence_the_best_alone_leaves_first(trained, per):
    model, guide, plan = trained
    own = bmrs.reduce(model, guide, bmrs.RemovalOrder(by="evidence", per=per))
    assert own.rule.criterion == "laplace_evidence" + ("_per_parameter" if per else "")
    gain = own.path.outgoing + own.path.incoming
    if per:
        gain /= own.path.layer.map({"0": 37, "2": 44})
    # several outputs share a matrix where it is taken anew
    assert gain[0] == pytest.approx(gain.max(), rel=0.05)
    assert len(own.path) == len(plan.path)
    assert accuracy(own.apply(refit=blobs())) > accuracy(model.net) - 0.02


def test_evidence_taken_anew_adds_up_to_that_of_all():
    """With one output no matrix is shared: the sum over steps is ΔF of all inputs that left."""
    torch.manual_seed(0)
    x = torch.randn(50, 7, dtype=F64)
    one = KroneckerCurvature(
        (x.T @ x / 50)[None], torch.full((1, 1, 1), 1.7, dtype=F64), torch.randn(1, 1, 7, dtype=F64), 50
    )
    state, total, away = LayerEvidence(one, 0.6), 0.0, []
    for inputs in ([2], [5, 0], [1], [3], [6]):
        total -= float(state.of_sets(torch.tensor([inputs])))
        state.remove_inputs(torch.tensor(inputs))
        away += inputs
        assert total == pytest.approx(float(evidence_of_inputs(one, 0.6, torch.tensor([away]))), rel=1e-8)


def test_wrong_orders_are_refused(trained):
    model, guide, _ = trained
    with pytest.raises(ValueError, match='by must be "loss" or "evidence": got \'size\''):
        bmrs.RemovalOrder(by="size")
    with pytest.raises(TypeError, match="criterion must be a RemovalOrder for this guide, or None: got SNR"):
        bmrs.reduce(model, guide, bmrs.SNR())
    noisy = bmrs.Classifier(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    )
    other = bmrs.AutoTruncatedLogNormal(noisy)
    with pytest.raises(TypeError, match="guide must be an AutoKroneckerLaplace for a RemovalOrder: got"):
        bmrs.reduce(noisy, other, bmrs.RemovalOrder())


def test_a_refit_has_the_memory_that_the_matrices_leave(trained, monkeypatch):
    _, guide, plan = trained
    one = guide.curvatures["2"]
    held = 4.0 - guide.room()
    # A and G in float64 with their eigenvectors, and more
    least = sum(2 * 8 * (c.inputs.numel() + c.gradients.numel()) for c in guide.curvatures.values())
    assert least < held * 2**30 < 10 * least
    assert one.inputs.numel() == 40 * 40
    given = []
    monkeypatch.setattr(laplace_plan, "refit_layers", lambda *_, memory, **__: given.append(memory))
    plan.apply(refit=blobs())
    assert given == [guide.room()]
    monkeypatch.setattr(guide, "memory", 1e-6)
    assert guide.room() == 0.25e-6


@pytest.mark.parametrize("by", ["loss", "evidence"])
def test_what_does_not_fit_into_memory_lies_on_disk_and_nothing_else_changes(trained, by):
    model, guide, _ = trained
    streamed = bmrs.AutoKroneckerLaplace(model, memory=4 * 8 * (40**2 + 30**2) / 2**30)
    bmrs.fit(model, streamed, blobs(), progress=False)
    assert streamed.paths == guide.paths
    for one in streamed.curvatures.values():
        kept = one.inputs, one.gradients, one.weights, one.of_inputs[1], one.of_outputs[1], one.eigenvalues
        assert all(tensor.untyped_storage().filename for tensor in kept)
    assert streamed.room() == streamed.memory
    assert streamed.log_marginal_likelihood() == pytest.approx(guide.log_marginal_likelihood())
    order = bmrs.RemovalOrder(by=by)
    plan, other = (bmrs.reduce(model, one, order).at(-50) for one in (guide, streamed))
    pd.testing.assert_frame_equal(plan.path, other.path)
    x, _ = blobs(50, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(plan.apply()(x), other.apply()(x))


def test_wide_convolutions_lie_on_disk_with_their_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 3))
    model, data = bmrs.Classifier(net), (torch.randn(60, 1, 6, 6), torch.randint(3, (60,)))
    plans = []
    for memory in (4.0, 4 * 8 * (20**2 + 5**2) / 2**30):
        guide = bmrs.AutoKroneckerLaplace(model, widest=1, memory=memory)
        bmrs.fit(model, guide, data, progress=False)
        plans.append(bmrs.reduce(model, guide))
    positions = guide.curvatures["2"].positions
    assert positions.untyped_storage().filename
    pd.testing.assert_frame_equal(plans[0].path, plans[1].path)


def test_a_layer_that_does_not_fit_into_memory_stays_and_is_told_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 10), nn.ReLU(), nn.Linear(10, 3))
    model = bmrs.Classifier(net)
    with pytest.warns(
        UserWarning, match=r"no curvature of '0', '2': alone it would need more than memory=0.0005 GiB"
    ):
        guide = bmrs.AutoKroneckerLaplace(model, memory=0.0005)
    bmrs.fit(model, guide, blobs(), progress=False)
    plan = bmrs.reduce(model, guide)
    assert plan.kept_back == {"0": "read by '2', which has no curvature"}
    assert set(plan.path.layer) == {"2"}


def test_wide_convolutions_are_taken_apart_and_told_of():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(40, 3),
    )  # fmt: skip
    x, y = torch.randn(300, 1, 6, 6), torch.randint(3, (300,))
    x[torch.arange(300), 0, y, y] += 3
    model = bmrs.Classifier(net)
    bmrs.fit(model, None, (x, y), epochs=5, batch_size=50, learning_rate=1e-2, progress=False)
    kept = []
    for widest in (50, 1000):
        guide = bmrs.AutoKroneckerLaplace(model, widest=widest)
        bmrs.fit(model, guide, (x, y), progress=False)
        plan = bmrs.reduce(model, guide)
        assert ("channels and positions taken apart: 2" in str(plan)) == (widest == 50)
        small = plan.at(-10).apply(refit=(x, y))
        with torch.no_grad():
            assert float((small(x).argmax(1) == y).float().mean()) > 0.85
        # draws of the posterior have the shape of the weights, either way
        assert guide()["2.weight"].shape == (10, 12, 3, 3)
        kept.append(guide.posterior()["2.weight"].variance.mean())
    assert 0.5 < float(kept[0] / kept[1]) < 2


def test_a_plan_is_saved_and_loaded_and_cuts_a_fresh_network(trained, tmp_path):
    model, _, plan = trained
    again = bmrs.NetworkPlan.load(plan.save(tmp_path / "plan.json"))
    assert type(again) is LaplacePlan
    assert again.kept == plan.kept
    assert again.rule == plan.rule
    assert list(again.path.columns) == list(plan.path.columns)
    for name in plan.path.columns.drop("layer"):
        assert again.path[name].to_numpy() == pytest.approx(plan.path[name].to_numpy(), nan_ok=True)
    small = again.rebuild(copy.deepcopy(model.net))
    assert parameters(small) == plan.parameters_left()
    # the weights that are left have not taken anything over
    with pytest.raises(ValueError, match="plan must have its posterior: this one was loaded from disk"):
        again.apply(bmrs.insert_noise(model.net, blobs()[0][:2]), blobs()[0][:8])


def test_a_plan_keeps_to_the_posterior_that_it_was_made_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    model = bmrs.Classifier(net)
    bmrs.fit(model, None, blobs(), epochs=5, progress=False)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, blobs(), progress=False)
    plan = bmrs.reduce(model, guide).within(parameters=0.5)
    x, y = blobs(200, seed=1)
    before = plan.apply()(x)
    bmrs.fit(bmrs.Classifier(net), None, blobs(), epochs=2, progress=False)
    bmrs.fit(model, guide, blobs(100, seed=3), progress=False)
    assert torch.equal(plan.apply()(x), before)
    loss = float(nn.functional.cross_entropy(before, y))
    assert plan.evaluated((x, y)).loss == pytest.approx(loss, rel=1e-5)


def test_a_curve_along_the_path(trained):
    model, _, plan = trained
    curve = bmrs.compression_curve(model, plan, blobs(2000, seed=1), points=4)
    assert curve.accuracy[0] == pytest.approx(accuracy(model.net))
    own = curve[curve.is_plan].iloc[0]
    assert own.accuracy == pytest.approx(accuracy(plan.apply()))
    assert curve.accuracy.iloc[-1] < 0.7


def test_the_page_of_a_trained_network_says_what_was_done(trained, tmp_path):
    _, _, plan = trained
    page = bmrs.report(None, plan, tmp_path / "report.html").read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for said in (
        f"least predicted rise of the loss for each parameter that they free, the first {plan.steps}",
        "Laplace approximation with Kronecker-factored curvature",
        "the weights that stayed took over what they could",
    ):
        assert said in page
        assert said in text
    assert "total ΔF (nats)" in page
    for wrong in ("latent θ", "E[θ] folded", "within 0.1 of the threshold"):
        assert wrong not in text


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


# of one kind each; all others take longer
@pytest.mark.parametrize("family", families({"tanh_mlp", "selecting_mlp", "lenet5"}))
def test_every_family_goes_from_fit_to_refit(family):
    net, data, plan = trained_family(family)
    plan = plan.at(-(len(plan.path) // 3))
    small = plan.apply(refit=data)
    found = output_of(small, data[0])
    assert found.shape == data[1].shape
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


def test_a_refit_takes_data_in_any_form_and_order(trained):
    _, _, plan = trained
    x, y = blobs()
    order = y.argsort()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[order], y[order]), batch_size=8)
    at = plan.at(-55)
    whole, loaded = (accuracy(at.apply(refit=data)) for data in ((x, y), loader))
    assert loaded == pytest.approx(whole, abs=0.01)


def test_a_plan_stays_that_of_the_network_it_was_made_from(trained):
    model, _, plan = trained
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    wanted = plan.apply(refit=blobs())(blobs()[0])
    try:
        with torch.no_grad():
            for parameter in model.net.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        torch.testing.assert_close(plan.apply(refit=blobs())(blobs()[0]), wanted)
    finally:
        model.net.load_state_dict(before)


def test_layers_off_the_path_stay_whatever_the_threshold(trained):
    _, _, plan = trained
    assert plan.at(-np.inf).table.removed.sum() == len(plan.path)


def test_units_that_say_the_same_leave_though_the_others_get_larger_weights():
    """25 copies of each of 4 units share an outgoing weight: one that has all of it needs another prior precision."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    with torch.no_grad():
        net[0].weight.copy_(2 * torch.eye(4).repeat(25, 1) + 0.01 * torch.randn(100, 4))
        net[2].weight.copy_(torch.randn(2, 4).repeat(1, 25) / 25)
        net[0].bias.zero_()
    x = torch.randn(500, 4)
    y = torch.distributions.Categorical(logits=4 * net(x).detach()).sample()
    model = bmrs.Classifier(net)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, y), progress=False)
    plan = bmrs.reduce(model, guide)
    assert len(plan.kept["0"]) <= 8


def test_layers_may_share_one_prior_precision(trained):
    model = trained[0]
    guide = bmrs.AutoKroneckerLaplace(model, shared_prior=True)
    bmrs.fit(model, guide, blobs(), progress=False)
    assert len(set(guide.deltas.values())) == 1
    path = bmrs.reduce(model, guide).path
    place = int(path.total_evidence_change.first_valid_index())
    away = {name: torch.zeros(one.shape[2], dtype=torch.bool) for name, one in guide.curvatures.items()}
    gone = {name: torch.zeros(one.shape[:2], dtype=torch.bool) for name, one in guide.curvatures.items()}
    for layer, unit in path.loc[:place, ["layer", "unit"]].itertuples(index=False):
        away[{"0": "2", "2": "4"}[layer]][unit] = gone[layer][0, unit] = True
    left = Spectrum.together(
        Spectrum.without(one, reduced_weights(one, away[name]), away[name], gone[name])
        for name, one in guide.curvatures.items()
    )
    full = Spectrum.together(map(Spectrum.of, guide.curvatures.values()))
    of_weights = [one.log_marginal_likelihood(one.prior_precision()) for one in (left, full)]
    found = path.total_evidence_change[place]
    rise = of_weights[0] - of_weights[1] - found  # as predicted, or more where it was measured
    assert path.total_loss_rise[place] - 1e-6 <= rise <= path.total_loss_rise[place] + 1


def test_a_refit_on_what_is_no_number_or_does_not_fit_is_refused(trained):
    _, _, plan = trained
    x, y = blobs(50)
    for wrong, told in (
        (torch.where(x > 2, torch.nan, x), "refit must hold no NaN"),
        (x[:, :4], "refit must be what network can be called with"),
    ):
        with pytest.raises(ValueError, match=told):
            plan.apply(refit=(wrong, y))


def test_what_apply_and_at_are_told_is_checked(trained):
    _, _, plan = trained
    for tolerance in ("x", 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance must be a positive number"):
            plan.apply(tolerance=tolerance)
    with pytest.raises(ValueError, match="example_input must be one example or more: got 0"):
        plan.apply(example_input=blobs()[0][:0])
    with pytest.raises(ValueError, match="threshold must be a number: got 'x'"):
        plan.at("x")


def test_a_weight_that_is_used_again_by_a_function_stays():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.own = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 5)
            self.head = nn.Linear(10, 3)

        def forward(self, x):
            other = F.linear(torch.tanh(self.two(x)), self.own.weight, self.own.bias)
            return self.head(torch.relu(torch.cat([self.own(torch.relu(self.one(x))), other], 1)))

    torch.manual_seed(0)
    model = bmrs.Classifier(Again())
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (torch.randn(50, 4), torch.arange(50) % 3), progress=False)
    assert bmrs.reduce(model, guide).kept_back["one"] == "read several times by the weight of 'own'"
