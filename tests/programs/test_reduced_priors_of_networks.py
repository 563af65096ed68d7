"""Reduced priors by hand for the structures of a network: the criterion by another name, where they remove."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from idle_and_needed import idle_and_needed

import pyro_bmrs as bmrs
from pyro_bmrs import reduce


def test_reduced_priors_of_noise_layers_are_the_criterion():
    model, guide, _ = idle_and_needed()
    spike = bmrs.TruncatedLogNormal(-20.0, 1e-6)
    by_priors = reduce(model, guide, {"2": spike, "5": spike})
    criterion = reduce(model, guide, bmrs.BMRS_N(prior_log_odds=0.0))
    pd.testing.assert_frame_equal(by_priors.table, criterion.table, rtol=1e-12)
    small = by_priors.apply()
    assert small[0].out_features == len(by_priors.kept["2"]) < 6
    assert by_priors.sites.log_evidence_change[0] == pytest.approx(
        by_priors.table.log_evidence_change[:6].sum()
    )
    values = by_priors.reduced_posterior().draw(20)
    assert float(values["2"][:, torch.tensor(by_priors.table.removed[:6].tolist())].max()) < 1e-8


def test_layers_that_are_not_asked_about_stay():
    model, guide, _ = idle_and_needed()
    plan = reduce(model, guide, {"2": bmrs.LogUniform(-20.0, -5.5)})
    assert len(plan.kept["5"]) == 5
    assert plan.table[plan.table.layer == "5"].score.isna().all()
    assert plan.apply()[3].out_features == 5


@pytest.mark.parametrize(
    "reduced",
    [bmrs.TruncatedLogNormal(-0.01, 1e-3), bmrs.LogUniform(-20.0, -0.1), bmrs.TruncatedLogNormal(-2.0, 0.1)],
)
def test_a_reduced_prior_that_keeps_the_scale_removes_nothing(reduced):
    model, guide, batch = idle_and_needed()
    plan = reduce(model, guide, {"2": reduced}, *batch)
    assert isinstance(plan, bmrs.ProgramPlan)
    assert not isinstance(plan, bmrs.NetworkPlan)


def test_what_goes_with_mappings_only():
    model, guide, _ = idle_and_needed()
    with pytest.raises(ValueError, match="go with a mapping of sites to reduced priors"):
        reduce(model, guide, bmrs.BMRS_N(), prior_log_odds=1.0)


def test_searches_of_structures_make_plans_that_apply():
    model, guide, _ = idle_and_needed()
    spikes = {"2": bmrs.TruncatedLogNormal(-20.0, 1e-6), "5": bmrs.TruncatedLogNormal(-20.0, 1e-6)}
    greedy = bmrs.greedy_reduction(model, guide, spikes)
    best = bmrs.exhaustive_reduction(model, guide, spikes).plan()
    by_priors = reduce(model, guide, spikes)
    for plan in (greedy, best):
        assert plan.table.removed.tolist() == by_priors.table.removed.tolist()
        assert plan.apply()[0].out_features == len(by_priors.kept["2"])
    everything = bmrs.greedy_reduction(model, guide, {"2": spikes["2"]}, prior_log_odds=1e6)
    assert len(everything.kept["2"]) == 1
    assert len(everything.steps) == 5  # what the floor would undo is not offered
    total = everything.steps.log_evidence_change.iloc[-1]
    assert float(everything.joint_evidence().log_evidence_change) == pytest.approx(total)


def test_structures_keep_the_numbers_of_the_original_idle_and_needed():
    model, guide, batch = idle_and_needed()
    spike = bmrs.TruncatedLogNormal(-20.0, 1e-6)
    first = reduce(model, guide, bmrs.BMRS_N())
    first.shrink(model, guide)
    kept = first.kept["2"]
    greedy = bmrs.greedy_reduction(model, guide, {"2": spike}, *batch, prior_log_odds=1e6)
    assert set(greedy.steps.group) <= {f"2[{unit}]" for unit in kept}
    assert [f"2[{unit}]" for unit in kept if unit not in greedy.kept["2"]] == sorted(greedy.steps.group)
    plan = reduce(model, guide, {"2": spike}, *batch, groups={"last": {"2": kept[-1]}})
    rows = plan.table[(plan.table.layer == "2") & (plan.table.unit == kept[-1])]
    assert plan.groups.log_evidence_change[0] == pytest.approx(rows.log_evidence_change.iloc[0])


def test_curves_after_a_fit_has_removed():
    model, guide, _ = idle_and_needed()
    with torch.no_grad():
        model.net[2].kept[:3] = False
        guide.site_posterior("2").kept[:3] = False
    curve = bmrs.evidence_curve(model, guide, bmrs.BMRS_U(), bits=[4.0, 8.0])
    table = reduce(model, guide, bmrs.BMRS_U(bits=8)).table
    left = table[~table.removed_in_fit]
    assert curve.log_evidence_change[1] == pytest.approx(left.log_evidence_change.sum())
    assert curve.reduced[1] == int((left.score >= 0).sum())
