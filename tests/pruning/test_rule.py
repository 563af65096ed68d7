"""The rule is part of the plan: everything that speaks of a decision reads it, and none assumes a threshold of 0."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from diagnosed import make_plan
from hypothesis import given
from hypothesis import strategies as st
from idle_and_needed import idle_and_needed

import pyro_bmrs as bmrs
from pyro_bmrs.quality import compression_curve
from pyro_bmrs.reports.words import methods, warnings_of

numbers = st.floats(-1e6, 1e6)
rules = st.builds(
    bmrs.Rule, criterion=st.text(max_size=20), prior_log_odds=st.none() | numbers,
    threshold=st.none() | numbers | st.sampled_from([math.inf, -math.inf]),
    min_kept=st.integers(0, 9) | st.floats(0.01, 0.99),
    round_to=st.none() | st.integers(1, 64), kl_weight=st.floats(0, 1e3),
    budget=st.dictionaries(st.sampled_from(["parameters", "macs"]), st.floats(0, 1), max_size=2),
)  # fmt: skip


@given(rules)
def test_a_rule_survives_json(rule):
    assert bmrs.Rule.from_json(rule.to_json()) == rule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(criterion=3), "criterion must be text: got 3"),
        (dict(threshold=math.nan), "threshold must be a number or None: got nan"),
        (dict(prior_log_odds=math.inf), "prior_log_odds must be a finite number or None: got inf"),
        (dict(min_kept=-1), "min_kept must be an integer of 0 or more, or a share between 0 and 1: got -1"),
        (dict(round_to=0), "round_to must be a positive integer or None: got 0"),
        (dict(kl_weight=-1.0), "kl_weight must be finite and not negative: got -1.0"),
        (dict(threshold=np.float32("nan")), "threshold must be a number or None: got np.float32"),
        (
            dict(prior_log_odds=np.float64("inf")),
            "prior_log_odds must be a finite number or None: got np.float64",
        ),
        (
            dict(min_kept=np.int64(-1)),
            "min_kept must be an integer of 0 or more, or a share between 0 and 1: got np",
        ),
        (dict(round_to=np.True_), "round_to must be a positive integer or None: got np.True_"),
        (dict(kl_weight=True), "kl_weight must be finite and not negative: got True"),
    ],
)
def test_a_bad_rule_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(bmrs.Rule(criterion="SNR"), **change)


@pytest.mark.parametrize("whole", [np.int64, np.int32, int])
@pytest.mark.parametrize("number", [np.float64, np.float32, float])
def test_numbers_of_numpy_are_numbers(whole, number):
    """As a table of pandas has them."""
    rule = bmrs.Rule(
        criterion="BMRS_N", prior_log_odds={"a": number(0.5)}, threshold=whole(-3), min_kept=whole(2),
        round_to=whole(4), kl_weight=number(0.5), budget={"parameters": number(0.25), "macs": whole(7)},
    )  # fmt: skip
    text = json.dumps(rule.to_json())
    assert bmrs.Rule.from_json(json.loads(text)) == rule
    assert rule.floor(64) == 2
    assert replace(rule, min_kept=number(0.125)).floor(64) == 8
    assert json.dumps(rule.at(number(math.inf)).to_json()["threshold"]) == '"inf"'


def plan_at(threshold):
    """Twelve structures in two layers with scores from -500 to 3, decided at a threshold."""
    return make_plan(
        {"a": [-500.0, -400.0, -300.0, -20.0, 1.0, 2.0], "b": [-450.0, -350.0, -5.0, -1.0, 0.5, 3.0]}
    ).at(threshold)


def test_curve_words_and_warnings_read_the_threshold():
    plan = plan_at(-300.0)
    assert plan.rule.threshold == -300.0
    network = bmrs.Classifier(plan._binding.network)
    curve = compression_curve(network, plan, (torch.randn(8, 3), torch.zeros(8, dtype=torch.long)), points=5)
    own = curve[curve.is_plan]
    assert own.score_threshold.tolist() == [-300.0]
    assert own.parameters_removed.item() == pytest.approx(
        1 - plan.parameters_left() / plan.parameters_before()
    )
    assert "at least -300" in methods(None, plan, bmrs.Diagnosis(), {})
    assert "threshold -300" in plan.summary()
    assert any("within 0.1 of the threshold" in warning for warning in warnings_of(plan))
    assert not any("within 0.1" in warning for warning in warnings_of(plan_at(-200.0)))


def test_a_plan_is_frozen_and_pickles():
    model, guide, _ = idle_and_needed()
    plan = bmrs.reduce(model, guide)
    with pytest.raises(FrozenInstanceError):
        plan.rule = None
    again = pickle.loads(pickle.dumps(plan))
    assert again.table.equals(plan.table)
    assert (again.rule, again.cuts) == (plan.rule, plan.cuts)
    assert again.rebuild(model.net)[0].out_features == len(plan.kept["2"])
    with pytest.raises(ValueError, match="network must be given"):
        again.apply()


def test_plans_of_networks_and_of_programs_have_one_protocol(tmp_path):
    model, guide, batch = idle_and_needed()
    spike = {"2": bmrs.TruncatedLogNormal(-20.0, 1e-6)}
    plans = [
        bmrs.reduce(model, guide),
        bmrs.reduce(model, guide, {"2": bmrs.TruncatedLogNormal(-2.0, 0.1)}, *batch),
        bmrs.reduce(model, guide, spike, *batch),
    ]
    assert [type(plan).__name__ for plan in plans] == ["NetworkPlan", "ProgramPlan", "StructuresByPriors"]
    for number, plan in enumerate(plans):
        for variant in (plan.at(math.inf), pickle.loads(pickle.dumps(plan)).at(math.inf)):
            assert variant.rule == plan.rule.at(math.inf)
            assert not variant.table.removed.any()
        loaded = type(plan).load(plan.save(tmp_path / f"{number}.json"))
        assert loaded.table.equals(plan.table)
        assert loaded.rule == plan.rule
        assert loaded.kept == plan.kept == {layer: plan.kept[layer] for layer in plan.layers}
        assert loaded.widths().equals(plan.widths())
        assert str(plan.rule) in plan.summary()
    with pytest.raises(ValueError, match=r"path must be a plan of a network: .* is one of a"):
        bmrs.NetworkPlan.load(plans[1].save(tmp_path / "other.json"))
    # by reduced priors, it is one of a network
    assert type(bmrs.NetworkPlan.load(plans[2].save(tmp_path / "other.json"))) is type(plans[2])


def test_numbers_of_numpy_decide_and_are_saved(tmp_path):
    model, guide, _ = idle_and_needed()
    plain = bmrs.reduce(model, guide, min_kept=2)
    plan = bmrs.reduce(model, guide, min_kept=np.int64(2))
    for found, wanted in (
        (plan.at(np.int64(-3)), plain.at(-3)),
        (plan.at(np.float32(-3)), plain.at(-3.0)),
        (plan.within(parameters=np.float32(0.3)), plain.within(parameters=0.3)),
    ):
        assert found.kept == wanted.kept
        assert str(found) == str(wanted)
        assert bmrs.NetworkPlan.load(found.save(tmp_path / "plan.json")).rule == found.rule


def test_a_search_decides_together_and_its_table_has_its_log_odds():
    model, guide, _ = idle_and_needed()
    spikes = {site: bmrs.TruncatedLogNormal(-20.0, 1e-6) for site in ("2", "5")}
    plan = bmrs.greedy_reduction(model, guide, spikes, prior_log_odds=-3.0)
    difference = plan.table.score - plan.table.log_evidence_change
    assert difference.tolist() == pytest.approx([-3.0] * len(plan.table))
    assert (plan.table.score[~plan.table.removed] < 0).all()
    assert plan.rule.threshold is None
    with pytest.raises(ValueError, match="plan must be decided by a threshold"):
        plan.at(0.0)


def test_numbers_of_another_plan_are_refused(tmp_path):
    """Two criteria that keep the same structures: what is kept alone can't tell their files apart."""
    model, guide, _ = idle_and_needed()
    first = bmrs.reduce(model, guide)
    second = bmrs.reduce(model, guide, bmrs.BMRS_N(prior_log_odds=0.9))
    assert first.kept == second.kept
    one, two = first.save(tmp_path / "one.json"), second.save(tmp_path / "two.json")
    (tmp_path / "one.numbers.safetensors").write_bytes((tmp_path / "two.numbers.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        bmrs.NetworkPlan.load(one)
    bmrs.NetworkPlan.load(two)


def test_weights_saved_beside_a_plan_leave_its_numbers_alone(tmp_path):
    from pyro_bmrs.networks.export import save_weights

    model, guide, _ = idle_and_needed()
    plan = bmrs.reduce(model, guide)
    path = plan.save(tmp_path / "small.json")
    save_weights(plan.apply(), tmp_path / "small.safetensors")
    again = bmrs.NetworkPlan.load(path).rebuild(model.net, tmp_path / "small.safetensors")
    assert not again.training
    assert not plan.apply().training


def test_a_criterion_without_evidence_says_nothing_of_it():
    model, guide, _ = idle_and_needed()
    guide.kl_weight = 100.0
    for criterion in (bmrs.WeightNorm(0.0), bmrs.Random(0.0)):
        summary = bmrs.reduce(model, guide, criterion).summary()
        assert "tempered" not in summary
        assert "posterior_learning_rate" not in summary
    assert "0.919" in bmrs.reduce(model, guide).summary()
    assert "0.9189385332046727" not in bmrs.reduce(model, guide).summary()


@pytest.mark.slow
def test_a_plan_of_one_layer_of_two_has_a_curve():
    model, guide, (x, y) = idle_and_needed()
    plan = bmrs.reduce(model, guide, {"2": bmrs.TruncatedLogNormal(-20.0, 1e-6)}, x, y)
    curve = compression_curve(model, plan, (x, y), points=4)
    assert curve.parameters_removed.max() < 1
    assert curve.is_plan.sum() == 1
    found = bmrs.diagnose(model, guide, plan, (x, y), (x, y), draws=100)
    assert found.quality is not None


def test_a_group_with_members_that_a_fit_removed_is_searched():
    model, guide, batch = idle_and_needed()
    for part in (model.net[2], guide.site_posterior("2")):
        part.kept[:4] = False
    spike = {"2": bmrs.TruncatedLogNormal(-20.0, 1e-6)}
    group = {"dead and one": {"2": [0, 1, 2, 3, 4]}}
    plan = bmrs.greedy_reduction(model, guide, spike, *batch, groups=group, prior_log_odds=1e6)
    assert plan.steps.group.tolist() == ["dead and one"]
    assert plan.kept["2"] == [5]
