"""Plans within a budget."""

import math
import threading
from bisect import bisect_left
from dataclasses import replace

import pytest
import torch
from torch import nn
from trained_families import families, first_output, output_of, trained

import pyro_bmrs as bmrs
from pyro_bmrs.inference.evaluate import Evaluation
from pyro_bmrs.networks.cost import file_bytes, multiply_accumulates, parameters
from pyro_bmrs.pruning import budgets, laplace_plan
from pyro_bmrs.runs.settings import RunSettings

QUICKLY = families({"tanh_mlp", "selecting_mlp", "lenet5", "two_inputs"})


def scored(layers):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(len(layer.kept), generator=generator) - 1.0 for name, layer in layers.items()}


def examples(count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator)
    x[:, :3] += 2.5 * nn.functional.one_hot(y, 3)
    return x, y


def with_scores(net, x, criterion=scored, **options):
    y = output_of(net, x)
    model = bmrs.Regressor(bmrs.insert_noise(net, x), first_output, scale=1.0)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    return bmrs.reduce(model, guide, criterion, **options)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    model = bmrs.Classifier(net)
    bmrs.fit(model, None, examples(), epochs=20, batch_size=50, weight_decay=0.05, progress=False)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, examples(), progress=False)
    return model, bmrs.reduce(model, guide)


@pytest.mark.parametrize("family", QUICKLY)
def test_a_budget_is_met_by_the_nearest_network_below(family):
    """Of scores that say nothing, in every family: met as counted on the network that is made."""
    torch.manual_seed(0)
    net, x = family.build()
    net.eval()
    plan = with_scores(net, x)
    full = parameters(net), multiply_accumulates(net, x), file_bytes(net)
    most = plan.at(-math.inf).parameters_left() / full[0]
    for share in (most + 0.2 * (1 - most), most + 0.7 * (1 - most)):
        own = plan.within(parameters=share)
        nearest = set()
        for path in plan.paths({"parameters"}, False):
            places = range(path.steps + 1)
            steps = bisect_left(places, -share * full[0], key=lambda at: -path.plan(at).parameters_left())
            nearest.add(path.plan(steps).parameters_left())
            assert steps == 0 or path.plan(steps - 1).parameters_left() > share * full[0]
        assert own.parameters_left() <= share * full[0]
        assert own.parameters_left() in nearest
        assert parameters(own.apply()) == own.parameters_left()
    smallest = path.plan(path.steps).apply()
    budget = {
        "macs": (multiply_accumulates(smallest, x) + full[1]) // 2, "bytes": (file_bytes(smallest) + full[2]) // 2,
    }  # fmt: skip
    small = plan.within(**budget).apply()
    assert multiply_accumulates(small, x) <= budget["macs"]
    assert file_bytes(small) <= budget["bytes"]


@pytest.mark.parametrize("family", QUICKLY)
def test_a_trained_network_meets_a_budget_in_every_family(family):
    net, _, plan = trained(family)
    if not len(plan.path):
        return
    wanted = (plan.at(-math.inf).parameters_left() + parameters(net)) // 2
    own = plan.within(parameters=float(wanted))
    assert parameters(own.apply()) <= wanted < plan.at(own.rule.threshold + 1).parameters_left()


def test_no_layer_collapses_before_the_others_give():
    """Of two layers alike, of which all scores of one are above all of the other, both give, as each thins out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6))

    def uneven(layers):
        spread = torch.linspace(-1.0, -1.2, 40)
        return {name: spread - 0.5 * number for number, name in enumerate(layers)}

    plan = with_scores(net, torch.randn(20, 6), uneven)
    by_threshold = min(
        (plan.at(float(score)) for score in plan.table.score),
        key=lambda one: abs(one.parameters_left() - 500),
    )
    assert by_threshold.widths().after.min() < 8
    assert by_threshold.widths().after.max() == 40
    own = plan.within(parameters=500.0)
    assert own.parameters_left() <= 500
    assert own.widths().after.min() >= 8
    assert own.widths().after.max() < 30


def test_work_decides_where_work_is_asked_for():
    """A filter of the first layer costs more work for each parameter: there, more of it goes."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), block, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 80),
        nn.ReLU(), nn.Linear(80, 2),
    )  # fmt: skip
    x = torch.randn(8, 1, 12, 12)

    def alike(layers):
        return {name: torch.linspace(-1.0, -1.5, len(layer.kept)) for name, layer in layers.items()}

    plan = with_scores(net, x, alike)
    work = plan.within(macs=0.5)
    size = plan.within(parameters=work.parameters_left() + 0.0)
    assert multiply_accumulates(work.apply(), x) <= 0.5 * multiply_accumulates(net, x)
    assert multiply_accumulates(work.apply(), x) < 0.9 * multiply_accumulates(size.apply(), x)


def test_a_trained_network_by_work_and_by_size(fitted):
    _, plan = fitted
    own = plan.within(parameters=0.4, macs=0.5)
    assert own.parameters_left() <= 0.4 * 1603
    assert multiply_accumulates(own.apply(), examples()[0]) <= 0.5 * (240 + 1200 + 90)
    assert dict(own.rule.budget) == {"parameters": pytest.approx(641.2), "macs": pytest.approx(765)}
    assert "parameters within 641.2" in str(own.rule)
    # a share is the number that it says
    assert plan.within(parameters=0.4).kept == plan.within(parameters=641).kept
    # and is no part of what is decided otherwise
    assert "within" not in str(own.at(-1))


def test_each_cost_has_its_own_order_beside_that_of_the_plan(fitted, monkeypatch):
    _, plan = fitted

    def orders(one, cost):
        return [path.plan(1).rule.criterion.partition("_per_")[2] for path in one.paths({cost}, False)]

    assert orders(plan, "macs") == orders(plan, "milliseconds") == ["parameter", "multiply_accumulate"]
    other = replace(plan, rule=replace(plan.rule, criterion="laplace_loss_per_multiply_accumulate"))
    assert orders(other, "bytes") == ["multiply_accumulate", "parameter"]
    monkeypatch.setattr(laplace_plan, "reduce_by_laplace", None)  # what is there is not made again
    assert orders(plan, "parameters") == ["parameter"]
    assert orders(other, "macs") == ["multiply_accumulate"]


def test_an_order_that_loses_less_accuracy_is_taken_where_that_is_asked_for(monkeypatch):
    """Of two orders to one size, the one with the lower loss loses too much accuracy."""

    class Five:
        """A step takes 5 of 10 parameters. A plan is how many steps it has taken and what it evaluates to."""

        def __init__(self, binding, names, batch):
            self.names = names

        def of_full(self):
            return {"parameters": 10.0}

        def of_cuts(self, steps):
            return {"parameters": 10.0 - 5 * steps}

    class Made:
        def __init__(self, steps, found):
            self.cuts, self.found = steps, found

        def evaluated(self, data):
            return self.found

    monkeypatch.setattr(budgets, "Costs", Five)
    low, fine = Evaluation(0.1, 0.97, 0.0), Evaluation(0.2, 0.995, 0.0)
    paths = [budgets.Path(1, lambda steps, one=one: Made(steps, one)) for one in (low, fine)]
    data = torch.zeros(1, 1), torch.zeros(1)

    def found(**asked):
        budget = budgets.Budget(
            {"parameters": 5.0, **asked}, data, None, 1, lambda: Evaluation(0.0, 1.0, 0.0)
        )
        plan = budget.nearest(paths, None)
        return plan.cuts, plan.found

    assert found() == (1, low)
    assert found(accuracy_drop=1.0) == found(accuracy_drop=0.5 - 1e-15) == (1, fine)
    with pytest.raises(
        ValueError, match=r"accuracy_drop must be at least 0.5, with parameters within 5: got 0.2"
    ):
        found(accuracy_drop=0.2)


def test_a_model_without_classes_has_no_accuracy_to_lose():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
    x = torch.randn(100, 6)
    y = x[:, :1] ** 2
    model = bmrs.Regressor(net, scale=0.3)
    bmrs.fit(model, None, (x, y), epochs=100, batch_size=25, learning_rate=1e-2, progress=False)
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, (x, y), progress=False)
    plan = bmrs.reduce(model, guide)
    with pytest.raises(ValueError, match="accuracy_drop must be left out for a model without classes"):
        plan.within((x, y), accuracy_drop=1.0)
    own = plan.within((x, y), loss_rise=0.5)
    assert 0 < own.steps < len(plan.path)


def test_structures_that_a_fit_removed_stay_removed():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), bmrs.MultiplicativeNoise(30), nn.Linear(30, 20), nn.ReLU(),
        bmrs.MultiplicativeNoise(20), nn.Linear(20, 3),
    )  # fmt: skip
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, examples(), epochs=8, batch_size=50, kl_weight=30.0, posterior_learning_rate=0.2,
        removal="epoch", progress=False,
    )  # fmt: skip
    plan = bmrs.reduce(model, guide)
    gone = plan.table[plan.table.removed_in_fit]
    assert len(gone)
    before = plan.parameters_before()
    own = plan.within(parameters=0.3, macs=0.3)
    assert own.parameters_left() <= 0.3 * before
    assert own.table.removed[gone.index].all()
    with pytest.raises(ValueError, match="parameters must be a positive number"):
        plan.within(parameters=-1.0)


def test_what_may_be_lost(fitted):
    _, plan = fitted
    data = examples(2000, seed=1)
    before = plan.at(math.inf).evaluated(data)
    for limit in (0.5, 5.0):
        own = plan.within(data, accuracy_drop=limit)
        lost = round(
            100 * (before.accuracy - own.evaluated(data).accuracy), 6
        )  # a share of 2,000 may be the limit
        assert lost <= limit
        further = plan.at(own.rule.threshold - 1)
        assert round(100 * (before.accuracy - further.evaluated(data).accuracy), 6) > limit
    assert own.steps > plan.within(data, accuracy_drop=0.5).steps
    little = plan.within(data, loss_rise=0.01)
    assert little.evaluated(data).loss <= before.loss + 0.01
    assert 0 < little.steps < own.steps


def test_losses_of_a_posterior_that_was_fitted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), bmrs.MultiplicativeNoise(20), nn.Linear(20, 3))
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, examples(), epochs=10, batch_size=50, progress=False)
    plan = bmrs.reduce(model, guide)
    data = examples(1000, seed=1)
    before = plan.at(math.inf).evaluated(data)
    own = plan.within(data, accuracy_drop=2.0)
    assert own.evaluated(data).accuracy >= before.accuracy - 0.02
    assert own.table.removed.any()
    with pytest.raises(
        ValueError, match=r"accuracy_drop must be at least .*, with parameters within 17: got 0.1"
    ):
        plan.within(data, parameters=17.0, accuracy_drop=0.1)


def test_milliseconds_are_measured(monkeypatch):
    """By a clock that counts parameters, and ticks unevenly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    plan = with_scores(net, torch.randn(20, 6))
    asked = []

    def clock(networks, inputs, seconds):
        asked.append(len(inputs))
        return [parameters(networks[0]) / 100 + 0.3 * (len(asked) % 2)]

    monkeypatch.setattr(budgets, "latency_milliseconds", clock)
    own = plan.within(milliseconds=8.0, batch_size=7)
    assert 700 <= own.parameters_left() <= 800
    assert set(asked) == {7}
    half = plan.within(milliseconds=0.5)
    assert half.parameters_left() <= 0.5 * parameters(net) + 15  # half of what the clock said


def test_of_two_orders_the_one_that_loses_less_is_taken():
    """Scores that are alike would have the large layer go; a batch that the guide saw tells."""
    torch.manual_seed(0)
    x, y = examples()
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 3))
    bmrs.fit(bmrs.Classifier(net), None, (x, y), epochs=30, batch_size=50, progress=False)
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)

    def alike(layers):
        return {name: torch.full((len(layer.kept),), -1.0) for name, layer in layers.items()}

    plan = bmrs.reduce(model, guide, alike)
    widths, losses = [], []
    for path in plan.paths({"parameters"}, False):
        own = next(p for p in map(path.plan, range(path.steps)) if p.parameters_left() <= 500)
        widths.append(own.widths().after.tolist())
        losses.append(own.evaluated((x, y)).loss)
    assert widths[0] != widths[1]
    assert plan.within(parameters=500.0).evaluated((x, y)).loss == min(losses)


def test_floors_and_multiples_hold():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    plan = with_scores(net, torch.randn(20, 6), min_kept=0.25, round_to=8)
    own = plan.within(parameters=0.5)
    assert own.parameters_left() <= 0.5 * parameters(net)
    assert [width % 8 for width in own.widths().after] == [0, 0]
    assert own.widths().after.tolist() >= [10, 8]
    smallest = plan.at(-math.inf).parameters_left()
    with pytest.raises(
        ValueError, match=f"parameters must be at least {smallest}, which is left at the floors"
    ):
        plan.within(parameters=0.05)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (
            {},
            ValueError,
            "a budget must be one of parameters, macs, bytes, milliseconds, accuracy_drop, loss_rise: got 'none'",
        ),
        ({"parameters": 0}, ValueError, "parameters must be a positive number; below 1 a share of the full"),
        ({"macs": "half"}, ValueError, "macs must be a positive number"),
        ({"accuracy_drop": -1.0}, ValueError, "accuracy_drop must be a number, not negative: got -1.0"),
        ({"loss_rise": 0.1}, TypeError, r"data must be \(x, y\) to look at losses on: got None"),
    ],
)
def test_bad_budgets(fitted, budget, error, message):
    with pytest.raises(error, match=message):
        fitted[1].within(**budget)


def test_a_plan_that_was_loaded_has_no_model(fitted, tmp_path):
    _, plan = fitted
    loaded = bmrs.LaplacePlan.load(plan.save(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="network must be given: this plan was loaded from disk"):
        loaded.within(parameters=0.5)


def with_noise(wrapped=lambda model: model):
    """A small network with noise, its model, and a guide that has seen a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), bmrs.MultiplicativeNoise(20), nn.Linear(20, 3))
    model = wrapped(bmrs.Classifier(net))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(*examples(20))
    return net, model, guide


def test_a_plan_keeps_to_a_network_that_has_shrunk_since():
    net, model, guide = with_noise()
    plan = bmrs.reduce(model, guide, scored)
    smaller = plan.within(parameters=0.3).apply()
    plan.within(parameters=0.5).shrink(model, guide)
    assert str(plan.within(parameters=0.3).apply()) == str(smaller)
    with pytest.raises(ValueError, match="network must have the noise layers of the plan"):
        plan.apply(net)


@pytest.mark.parametrize("text", ["100%", "0%", "150%"])
def test_a_share_on_the_command_line_is_a_part(text):
    with pytest.raises(ValueError, match=f"a share must be between 0% and 100%: got {text}"):
        RunSettings.read("parameters", text)


def test_a_plan_is_of_a_copy_whatever_becomes_of_the_model():
    net, model, guide = with_noise()
    plan = bmrs.reduce(model, guide, scored).within(parameters=0.5)
    x, y = examples(50)
    before = plan.evaluated((x, y)).loss
    with torch.no_grad():
        net[0].weight.mul_(2)
    # the model, where it is named, is that of the plan
    assert plan.evaluated((x, y), model).loss == before
    curve = bmrs.compression_curve(model, plan, (x, y), points=4)
    assert float(curve.loss[curve.is_plan].iloc[0]) == pytest.approx(before)
    model.double()
    assert plan.apply()(x).dtype == torch.float32


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(torch.compile, marks=pytest.mark.slow),
        lambda model: setattr(model, "lock", threading.Lock()) or model,
    ],
)
def test_a_compiled_model_and_one_without_a_copy_are_reduced(spoil):
    _, model, guide = with_noise(spoil)
    assert bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()[0].out_features == 10


def test_the_model_of_a_trained_network_may_hold_what_has_no_copy():
    model = bmrs.Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    model.lock = threading.Lock()
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, examples(50), progress=False)
    assert bmrs.reduce(model, guide).within(parameters=0.8).apply()[2].in_features < 8
