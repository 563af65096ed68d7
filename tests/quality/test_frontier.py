"""The frontier: networks of all sizes, and those that stand out."""

import math

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, Regressor
from pyro_bmrs.networks.cost import multiply_accumulates, parameters
from pyro_bmrs.pruning.budgets import one_standard_error


def data(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


SEEN = data(300, 1)


@pytest.fixture(scope="module", params=["fitted", "trained"])
def plan(request):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 2))
    if request.param == "fitted":
        model = Classifier(bmrs.insert_noise(net, SEEN[0][:4]))
        guide = AutoTruncatedLogNormal(model)
        options = dict(kl_weight=3.0, posterior_learning_rate=0.1, epochs=12, learning_rate=1e-2)
    else:
        model = Classifier(net)
        bmrs.fit(model, None, data(400, 0), epochs=20, learning_rate=1e-2, progress=False)
        guide, options = bmrs.AutoKroneckerLaplace(model), {}
    bmrs.fit(model, guide, data(400, 0), batch_size=25, progress=False, **options)
    return bmrs.reduce(model, guide)


def test_each_row_is_a_network_with_its_costs_and_its_loss(plan):
    found = bmrs.frontier(plan, SEEN, points=8, seconds=1.0, progress=False)
    table = found.table
    assert len(found.plans) == len(table)
    assert table.parameters.iloc[0] == plan.parameters_before()
    assert table.parameters.is_monotonic_decreasing
    for one, row in zip(found.plans, table.itertuples(), strict=True):
        small = one.apply()
        assert parameters(small) == row.parameters
        assert multiply_accumulates(small, SEEN[0][:2]) == row.multiply_accumulates
        seen = one.evaluated(SEEN)
        assert (seen.loss, seen.accuracy, seen.standard_error) == pytest.approx(
            (row.loss, row.accuracy, row.standard_error)
        )
    assert (table.milliseconds > 0).all()
    # the sizes are spread over all
    steps = -table.parameters.diff().dropna()
    assert steps.max() <= 2 * plan.parameters_before() / 7


def test_the_choices_are_marked(plan):
    found = bmrs.frontier(plan, SEEN, points=8, seconds=0, progress=False)
    table = found.table
    assert table.milliseconds.isna().all()
    assert table[["is_plan", "is_evidence", "is_one_standard_error"]].sum().tolist() == [1, 1, 1]
    own = table[table.is_plan].iloc[0]
    assert own.is_evidence
    assert own.parameters == plan.parameters_left()
    taken = one_standard_error([*table.loss], [*table.standard_error], [*table.parameters])
    assert table.is_one_standard_error.iloc[taken]

    asked = plan.within(SEEN, parameters=0.3, progress=False)
    found = bmrs.frontier(asked, SEEN, points=8, seconds=0, progress=False)
    assert found.budget == asked.rule.budget
    table = found.table
    assert table.parameters[table.is_plan].item() == asked.parameters_left()
    assert table.parameters[table.is_evidence].item() == plan.parameters_left()
    figure = found.plot()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["sizes", "evidence's choice", "one standard error", "plan", "budget"]
    assert len(figure.axes) == 2  # no times


def test_a_plan_draws_what_it_decided_by(plan):
    labels = [axes.get_ylabel() for axes in plan.plot().axes]
    assert labels == (["total ΔF (nats)", "rise of the loss (nats)"] if plan.rule.is_path else ["structures"])


def test_sizes_are_no_worse_than_what_within_gives(plan):
    table = bmrs.frontier(plan, SEEN, points=6, seconds=0, progress=False).table
    for row in table.iloc[1:-1].itertuples():
        asked = plan.within(SEEN, parameters=int(row.parameters), progress=False)
        if not (row.is_plan or row.is_evidence):
            assert row.loss <= asked.evaluated(SEEN).loss + 1e-9


def test_a_regression_is_drawn_by_its_error_and_another_model_by_its_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 1))
    model = Regressor(net, scale=0.5)
    guide = AutoTruncatedLogNormal(model)
    x = SEEN[0]
    guide(x, x[:, :1])
    found = bmrs.frontier(bmrs.reduce(model, guide), (x, x[:, :1]), points=3, seconds=0, progress=False)
    assert found.table.accuracy.isna().all()
    assert {axes.get_ylabel() for axes in found.plot().axes} == {"root mean square error"}
    without = bmrs.figures.plot_frontier(found.table.assign(rmse=math.nan))
    assert {axes.get_ylabel() for axes in without.axes} == {"loss (nats)"}
    assert all(math.isfinite(loss) for loss in found.table.loss)


def test_bad_arguments_are_named(plan, tmp_path):
    for bad in (dict(points=1), dict(points=2.5), dict(seconds=-1.0)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            bmrs.frontier(plan, SEEN, **bad)
    with pytest.raises(TypeError, match="plan must be a NetworkPlan"):
        bmrs.frontier(plan.table, SEEN)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="network must be given: this plan was loaded"):
        bmrs.frontier(type(plan).load(tmp_path / "plan.json"), SEEN)
