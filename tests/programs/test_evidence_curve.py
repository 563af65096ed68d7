"""ΔF along a parameter of the reduced prior: the same as one call per value, and what its columns mean."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from idle_and_needed import idle_and_needed
from model_files import model_file
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal

import pyro_bmrs as bmrs
from pyro_bmrs import evidence_curve, log_evidence_change, plot_evidence_curve, reduce

regression = model_file("linear_regression")
X, Y = regression.diabetes()


def network():
    torch.manual_seed(0)
    return idle_and_needed(log_scale=0.5)[:2]


GRIDS = [
    (bmrs.BMRS_U, "bits", [1.0, 4.0, 8.0, 20.0]),
    (bmrs.BMRS_U, "floor_bits", [15.0, 23.0]),
    (bmrs.BMRS_N, "scale", [1e-6, 0.1, 3.0]),
    (bmrs.BMRS_N, "loc", [-20.0, -10.0]),
    (bmrs.BMRS_N, "prior_log_odds", [-2.0, 0.0, 0.919]),
]


@pytest.mark.parametrize(
    ("kind", "name", "values"), GRIDS, ids=lambda value: getattr(value, "__name__", None)
)
def test_criteria_one_value_at_a_time(kind, name, values):
    model, guide = network()
    curve = evidence_curve(model, guide, kind(), **{name: values})
    assert curve[name].tolist() == values
    for row, value in zip(curve.itertuples(), values, strict=True):
        criterion = kind(**{name: value})
        table = reduce(model, guide, criterion).table
        change, odds = torch.tensor(table.log_evidence_change.to_numpy()), criterion.prior_log_odds
        chosen = change + odds >= 0
        assert row.log_evidence_change == pytest.approx(float(change.sum()), rel=1e-9)
        assert row.reduced == int(chosen.sum())
        assert row.chosen == pytest.approx(float(change[chosen].sum()), rel=1e-9)
        share = 1 / (1 + math.exp(-odds))
        mixture = torch.log1p(-torch.tensor(share, dtype=torch.float64)) + torch.nn.functional.softplus(
            change + odds
        )
        assert row.mixture == pytest.approx(float(mixture.sum()), abs=1e-9)


def test_the_best_log_odds_are_those_of_the_share_that_is_idle():
    """Ten of 100 parameters are clear; the mixture is largest near log(0.1/0.9)."""

    def model():
        pyro.sample("a", dist.Normal(torch.zeros(100), 10.0).to_event(1))

    with pyro.settings.context(module_local_params=True):
        guide = AutoDiagonalNormal(model, init_scale=0.01)
        guide()
        with torch.no_grad():
            guide.loc.copy_(torch.cat([torch.zeros(10), 5 + torch.zeros(90)]))
        grid = torch.linspace(-6, 6, 241)
        curve = evidence_curve(
            model, guide, {"a": lambda odds: dist.Normal(torch.zeros_like(odds), 0.05)}, prior_log_odds=grid
        )
    best = curve.prior_log_odds[curve.mixture.argmax()]
    assert best == pytest.approx(math.log(0.1 / 0.9), abs=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("empty_store")
@pytest.mark.parametrize("mean_field", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_prior_scale_by_evidence(mean_field):
    """The joint normal's ΔF of all weights is exact: that of the regression with another prior scale."""
    guide = regression.posterior(X, Y, mean_field=mean_field)
    scales = [0.05, 0.1, 0.2, 0.4, 0.5]
    curve = evidence_curve(
        regression.model,
        guide,
        {"weights": lambda scale: dist.Normal(0.0 * scale, scale)},
        X,
        Y,
        scale=scales,
    )
    for row, scale in zip(curve.itertuples(), scales, strict=True):
        plan = reduce(regression.model, guide, {"weights": dist.Normal(0.0, scale)}, X, Y)
        assert row.log_evidence_change == pytest.approx(plan.sites.log_evidence_change[0], abs=1e-4)
        assert row.reduced == int(plan.table.removed.sum())
    if not mean_field:
        q = guide.get_posterior()
        wide = dist.Normal(torch.zeros(10, dtype=torch.float64), 0.5).to_event(1)
        narrow = dist.Normal(torch.zeros(10, dtype=torch.float64), 0.2).to_event(1)
        assert curve.log_evidence_change[2] == pytest.approx(
            float(log_evidence_change(q, wide, narrow)), abs=1e-6
        )
        assert curve.log_evidence_change[4] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_joint_normals_are_summed_over_all_combinations():
    """Of two sites that know of each other: against exhaustive_reduction at each value."""

    def model(y):
        pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    y = torch.tensor(0.0)
    with pyro.settings.context(module_local_params=True):
        guide = AutoMultivariateNormal(model, init_scale=0.4)
        guide(y)
        with torch.no_grad():
            guide.scale_tril = torch.eye(4) + torch.tril(torch.full((4, 4), 0.8), -1)
            guide.loc.copy_(torch.tensor([0.1, 0.5, -0.3, 0.2]))
        scales, odds = [0.05, 0.3, 0.7], -0.4
        make = lambda scale: dist.Normal(0.0 * scale, scale)  # noqa: E731
        curve = evidence_curve(model, guide, {"a": make, "b": make}, y, prior_log_odds=odds, scale=scales)
        for row, scale in zip(curve.itertuples(), scales, strict=True):
            reduced = {name: dist.Normal(0.0, scale) for name in ("a", "b")}
            found = bmrs.exhaustive_reduction(model, guide, reduced, y, prior_log_odds=odds)
            whole = float(found.log_evidence_change[-1])
            assert row.log_evidence_change == pytest.approx(whole, abs=1e-6)
            weights = found.log_evidence_change + found.log_prior_odds
            mixture = float(weights.logsumexp(0)) - 4 * math.log1p(math.exp(odds))
            assert row.mixture == pytest.approx(mixture, abs=1e-6)
            plan = reduce(model, guide, reduced, y, prior_log_odds=odds)
            assert row.chosen == pytest.approx(float(plan.joint_evidence().log_evidence_change), abs=1e-6)
            assert row.reduced == plan.table.removed.sum()


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_priors_of_single_entries_and_points_for_sites_of_vectors(kind):
    def model(y):
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.2))

    y = torch.tensor(0.0)
    with pyro.settings.context(module_local_params=True):
        guide = kind(model, init_scale=0.3)
        guide(y)
        for make, grid in (
            (lambda scale: dist.Normal(0.0 * scale, scale), [0.3, 0.6]),
            (lambda at: dist.Delta(at), [0.0, 0.1]),
        ):
            curve = evidence_curve(model, guide, {"w": make}, y, value=grid)
            for row, value in zip(curve.itertuples(), grid, strict=True):
                plan = reduce(model, guide, {"w": make(torch.tensor(value).double())}, y)
                assert row.log_evidence_change == pytest.approx(plan.sites.log_evidence_change[0], abs=1e-6)


def test_each_value_makes_a_law_of_its_own():
    """A matrix of one value is no row of matrices."""

    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("w", dist.Normal(torch.tensor([0.2, 0.5]), 0.3).to_event(1))

    def make(scale):
        return dist.MultivariateNormal(torch.zeros(2), scale * torch.eye(2))

    scales = [0.1, 0.5, 0.7]
    found = evidence_curve(model, guide, {"w": make}, scale=scales).log_evidence_change
    one_by_one = [
        reduce(model, guide, {"w": make(scale)}).sites.log_evidence_change[0]
        for scale in torch.tensor(scales)
    ]
    assert found.to_numpy() == pytest.approx(one_by_one, abs=1e-6)
    with pytest.raises(ValueError, match="a reduced prior of 'w' with scale -1: "):
        evidence_curve(model, guide, {"w": make}, scale=[0.1, -1.0])
    with pytest.raises(TypeError, match="criterion must map 'w' to a function of values of scale: got Multi"):
        evidence_curve(model, guide, {"w": make(torch.tensor(1.0))}, scale=scales)


def test_it_is_one_call(monkeypatch):
    from pyro_bmrs.programs import evidence_curve as module

    calls = []
    inner = log_evidence_change

    def counting(*laws):
        calls.append(laws)
        return inner(*laws)

    import sys

    monkeypatch.setattr(sys.modules["pyro_bmrs.programs.evidence_curve"], "log_evidence_change", counting)
    model, guide = network()
    curve = evidence_curve(model, guide, bmrs.BMRS_U(), bits=torch.linspace(1, 20, 500))
    assert len(curve) == 500
    assert len(calls) == 1
    assert module is not None


@pytest.mark.parametrize(
    ("criterion", "given", "kind", "message"),
    [
        (bmrs.BMRS_U(), dict(), TypeError, "values of one parameter"),
        (bmrs.BMRS_U(), dict(bits=[1], floor_bits=[2]), TypeError, "values of one parameter"),
        (bmrs.BMRS_U(), dict(scale=[1.0]), TypeError, "bits, floor_bits, prior_log_odds: got 'scale'"),
        (bmrs.BMRS_U(), dict(bits=[8, 40]), ValueError, "bits must leave an interval above its lower end"),
        (bmrs.BMRS_N(), dict(scale=[0.1, -1.0]), ValueError, "scale must be positive and finite: got -1.0"),
        (bmrs.BMRS_N(), dict(scale=[]), ValueError, "scale must be finite values, at least one"),
        (bmrs.BMRS_N(), dict(scale=[math.nan]), ValueError, "scale must be finite values"),
        (bmrs.SNR(), dict(threshold=[1.0]), TypeError, "criterion must be BMRS_N"),
        ({"2": 0.0}, dict(scale=[1.0]), TypeError, "criterion must map '2' to a function"),
    ],
)  # fmt: skip
def test_what_is_refused(criterion, given, kind, message):
    with pytest.raises(kind, match=message):
        evidence_curve(*network(), criterion, **given)


@pytest.mark.slow
def test_the_figure(tmp_path):
    model, guide = network()
    for curve, scale in (
        (evidence_curve(model, guide, bmrs.BMRS_N(), scale=torch.logspace(-6, 0, 30)), "log"),
        (evidence_curve(model, guide, bmrs.BMRS_U(), bits=torch.linspace(1, 20, 30)), "linear"),
    ):
        figure = plot_evidence_curve(curve)
        upper, lower = figure.axes
        assert lower.get_xscale() == scale
        assert lower.get_xlabel() == curve.columns[0]
        assert len(upper.lines) == 3
        figure.savefig(tmp_path / "curve.svg")
    with pytest.raises(ValueError, match="curve lacks the column 'mixture'"):
        plot_evidence_curve(curve.drop(columns="mixture"))
