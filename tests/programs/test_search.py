"""Greedy and exhaustive search over what to reduce together, against all models computed one by one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_files import model_file
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal

from pyro_bmrs import ModelPosterior, exhaustive_reduction, greedy_reduction, reduce

regression = model_file("linear_regression")
X, Y = regression.diabetes()
NAMES = regression.NAMES
BY_NAME = {name: {"weights": k} for k, name in enumerate(NAMES)}


pytestmark = pytest.mark.usefixtures("own_parameters", "no_second_opinion")


def exact(models):
    full = regression.log_evidence(X, Y)
    columns = ([k for k in range(10) if not model >> k & 1] for model in models)
    return torch.tensor(
        [regression.log_evidence(X[:, kept], Y) - full for kept in columns], dtype=torch.float64
    )


def test_all_models_of_the_diabetes_data():
    found = exhaustive_reduction(
        regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y, groups=BY_NAME
    )
    assert float((found.log_evidence_change - exact(range(1024))).abs().max()) < 1e-8
    assert float(found.probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert found.groups == NAMES
    assert found.best == int(found.log_evidence_change.argmax())
    table = found.table(3)
    assert table.log_evidence_change.is_monotonic_decreasing
    assert table.reduced[0] == ", ".join(found.reduced(found.best)) == "age, s3, s4, s6"
    assert "1,024 models" in str(found)
    assert "nothing" in str(exhaustive_reduction(
        regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y, groups={"bmi": {"weights": 2}}
    ))  # fmt: skip


def test_probabilities_of_groups():
    found = exhaustive_reduction(
        regression.model,
        regression.posterior(X, Y),
        {"weights": 0.0},
        X,
        Y,
        groups=BY_NAME,
        prior_log_odds=0.5,
    )
    probability = found.reduction_probability()
    models = torch.arange(1024)
    for k, name in enumerate(NAMES):
        assert probability[name] == pytest.approx(float(found.probability[(models >> k & 1).bool()].sum()))
    bits = torch.tensor([model.bit_count() for model in range(1024)])
    torch.testing.assert_close(found.log_prior_odds, 0.5 * bits.double())
    weights = (exact(range(1024)) + 0.5 * bits).softmax(0)
    torch.testing.assert_close(found.probability, weights, atol=1e-8, rtol=0)


def test_log_odds_by_name():
    guide = regression.posterior(X, Y)
    found = exhaustive_reduction(
        regression.model, guide, {"weights": 0.0}, X, Y, groups=BY_NAME, prior_log_odds={"bmi": 100.0}
    )
    assert found.reduction_probability()["bmi"] > 0.999
    assert float(found.log_prior_odds[1]) == 0
    assert float(found.log_prior_odds[4]) == 100
    with pytest.raises(ValueError, match=r"prior_log_odds must be of the groups.*'height'"):
        greedy_reduction(
            regression.model, guide, {"weights": 0.0}, X, Y, groups=BY_NAME, prior_log_odds={"height": 1.0}
        )


def test_occams_window():
    found = exhaustive_reduction(
        regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y, groups=BY_NAME
    )
    window = found.occams_window(20.0)
    assert window.probability.is_monotonic_decreasing
    assert window.probability.min() >= window.probability.max() / 20
    others = found.probability.clone()
    others[window.model.tolist()] = 0
    assert float(others.max()) < window.probability.max() / 20
    simpler = found.occams_window(20.0, simpler_first=True)
    assert set(simpler.model) < set(window.model)
    for model in set(window.model) - set(simpler.model):  # each has a simpler, more probable one
        better = window[window.probability > float(found.probability[model])].model
        assert any(other & model == model for other in better)
    with pytest.raises(ValueError, match="ratio must be a number above 1: got 1"):
        found.occams_window(1)


def test_occams_window_of_many_models_that_are_alike():
    """65,536 models within the window, in a moment; of equally probable ones none is dropped."""
    change = torch.full((2**16,), 0.0, dtype=torch.float64)
    alike = ModelPosterior(tuple(map(str, range(16))), change, torch.zeros_like(change))
    assert len(alike.occams_window(simpler_first=True)) == 2**16
    bits = torch.tensor([model.bit_count() for model in range(2**16)])
    falling = ModelPosterior(alike.groups, 0.01 * bits.double(), torch.zeros_like(change))
    assert falling.occams_window(simpler_first=True).model.tolist() == [2**16 - 1]


def test_the_plan_of_a_model():
    found = exhaustive_reduction(regression.model, regression.posterior(X, Y), {"weights": 0.0}, X, Y)
    plan = found.plan()
    assert [f"weights[{unit}]" for unit in plan.table.unit[plan.table.removed]] == found.reduced(found.best)
    assert float(plan.joint_evidence().log_evidence_change) == pytest.approx(
        float(found.log_evidence_change.max())
    )
    assert float(plan.reduced_posterior().draw(20, X, Y)["weights"][:, 0].abs().max()) < 1e-9
    assert not found.plan(0).table.removed.any()
    with pytest.raises(ValueError, match="model must be a number below 1024: got 1024"):
        found.plan(1024)


def test_greedy_steps_are_conditional():
    guide = regression.posterior(X, Y)
    plan = greedy_reduction(regression.model, guide, {"weights": 0.0}, X, Y, groups=BY_NAME)
    gone = []
    for step in plan.steps.itertuples():
        before = sum(1 << NAMES.index(name) for name in gone)
        left = [name for name in NAMES if name not in gone]
        changes = exact([before | 1 << NAMES.index(name) for name in left]) - exact([before])
        assert step.group == left[int(changes.argmax())]
        assert step.gain == pytest.approx(float(changes.max()), abs=1e-8)
        gone.append(step.group)
        assert step.log_evidence_change == pytest.approx(
            float(exact([sum(1 << NAMES.index(name) for name in gone)])), abs=1e-8
        )
    after = sum(1 << NAMES.index(name) for name in gone)
    assert all(exact([after | 1 << NAMES.index(name)]) < exact([after]) for name in NAMES if name not in gone)
    assert plan.table.unit[plan.table.removed].tolist() == sorted(NAMES.index(name) for name in gone)
    # one at a time would also reduce s2, though s1 and s2 stand in for each other
    assert reduce(regression.model, guide, {"weights": 0.0}, X, Y).table.removed[5]
    assert "s2" not in gone
    assert "greedy" in str(plan)


def blocks(y):
    pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("c", dist.Gamma(torch.ones(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


Y0 = torch.tensor(0.0)
REDUCED = {"a": 0.0, "b": dist.Normal(0.0, 0.3), "c": 1.0}
GROUPS = {
    "first": {"a": 0, "c": 1}, "second": {"b": ...}, "third": {"a": [1, 2], "b": [], "c": 0},
}  # fmt: skip


def mixed_guide():
    guide = AutoGuideList(blocks)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(blocks, expose=["a", "b"]), init_scale=0.4))
    guide.append(AutoNormal(pyro.poutine.block(blocks, expose=["c"]), init_scale=0.3))
    guide(Y0)
    with torch.no_grad():
        guide[0].scale_tril = torch.eye(5) + torch.tril(0.5 * torch.randn(5, 5), -1)
        guide[0].loc.copy_(torch.tensor([0.1, 0.5, -0.2, 0.3, 1.0]))
    return guide


def test_groups_across_blocks_and_sites():
    """Each combination of groups, as one group of its own in reduce()."""
    guide = mixed_guide()
    found = exhaustive_reduction(blocks, guide, REDUCED, Y0, groups=GROUPS)
    for model in range(1, 8):
        merged: dict[str, torch.Tensor] = {}
        for k, members in enumerate(GROUPS.values()):
            if model >> k & 1:
                for site, elements in members.items():
                    mask = torch.zeros({"a": 3, "b": 2, "c": 2}[site], dtype=torch.bool)
                    mask[elements] = True
                    merged[site] = merged.get(site, mask) | mask
        plan = reduce(blocks, guide, REDUCED, Y0, groups={"all": merged})
        assert float(found.log_evidence_change[model]) == pytest.approx(
            plan.groups.log_evidence_change[0], abs=1e-8
        )
    plan = greedy_reduction(blocks, guide, REDUCED, Y0, groups=GROUPS)
    total = plan.steps.log_evidence_change.iloc[-1] if len(plan.steps) else 0.0
    assert float(plan.joint_evidence().log_evidence_change) == pytest.approx(total, abs=1e-8)


def test_mean_field_search_is_a_sum():
    guide = AutoDiagonalNormal(blocks, init_scale=0.3)
    guide(Y0)
    found = exhaustive_reduction(blocks, guide, REDUCED, Y0)
    plan = reduce(blocks, guide, REDUCED, Y0)
    changes = torch.tensor(plan.table.log_evidence_change.to_numpy())
    bits = torch.arange(128).unsqueeze(-1) >> torch.arange(7) & 1
    torch.testing.assert_close(found.log_evidence_change, (bits * changes).sum(-1))
    assert plan.table.removed.tolist() == (changes >= 0).tolist()
    greedy = greedy_reduction(blocks, guide, REDUCED, Y0)
    assert greedy.table.removed.tolist() == plan.table.removed.tolist()


def test_what_a_fit_has_removed_is_no_group():
    from pyro_bmrs import AutoTruncatedLogNormal, LogUniform, TruncatedLogNormal

    def scales(y):
        pyro.sample("theta", LogUniform(torch.tensor(-20.0), torch.tensor(0.0)).expand([3]).to_event(1))

    guide = AutoTruncatedLogNormal(scales, init_loc=-19.0, init_scale=2.0)
    guide(Y0)
    guide.site_posterior("theta").kept[1] = False
    found = exhaustive_reduction(scales, guide, {"theta": TruncatedLogNormal(-20.0, 1e-6)}, Y0)
    assert found.groups == ("theta[0]", "theta[2]")
    assert found.plan(0).table.removed.tolist() == [False, True, False]


def hierarchy(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("effects", dist.Normal(torch.zeros(3), scale).to_event(1))


@pytest.mark.parametrize(
    ("criterion", "groups", "kind", "message"),
    [
        ({"weights": 0.0}, {"a": {"weights": [0, 1]}, "b": {"weights": 1}}, ValueError, r"elements \[1\].*in two"),
        ({"weights": 0.0}, {f"{k}": {"weights": []} for k in range(21)}, ValueError, "at most 20.*there are 21"),
        ({"weights": dist.Laplace(torch.tensor(0.0), 0.5)}, None, NotImplementedError, "is not normal"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("search", [exhaustive_reduction, greedy_reduction])
def test_what_is_refused(search, criterion, groups, kind, message):
    if "at most 20" in message and search is greedy_reduction:
        pytest.skip("greedy search has no limit")
    with pytest.raises(kind, match=message):
        search(regression.model, regression.posterior(X, Y), criterion, X, Y, groups=groups)


def test_dependent_priors_are_not_searched():
    guide = AutoDiagonalNormal(hierarchy)
    guide(Y0)
    with pytest.raises(NotImplementedError, match=r"no search over \['effects'\]"):
        exhaustive_reduction(hierarchy, guide, {"effects": 0.0}, Y0)
    found = exhaustive_reduction(hierarchy, guide, {"scale": dist.LogNormal(0.0, 0.1)}, Y0)
    assert math.isfinite(float(found.log_evidence_change[1]))


def test_a_bar_is_shown_where_asked(capfd):
    guide = AutoMultivariateNormal(wide, init_scale=0.3)
    guide(Y0)
    groups = {str(k): {"w": slice(3 * k, 3 * k + 3)} for k in range(10)}
    found = exhaustive_reduction(wide, guide, {"w": 0.0}, Y0, groups=groups, progress=True)
    assert len(found.log_evidence_change) == 2**10
    assert "models" in capfd.readouterr().err


def wide(y):
    pyro.sample("w", dist.Normal(torch.zeros(30), 1.0).to_event(1))
