"""What other thresholds would remove, against making the plan anew at each of them."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from diagnosed import INPUTS, chain, make_curve, make_plan, parameters_of, random_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.quality.what_if import decisions, slider, what_if

quick = settings(max_examples=70, deadline=None)


@dataclass
class Case:
    scores: dict
    gone: set
    channels: dict
    min_kept: float = 1
    round_to: int | None = None
    log_odds: float | None = 0.5

    def plan(self):
        return make_plan(
            self.scores,
            gone=self.gone,
            channels=self.channels,
            min_kept=self.min_kept,
            round_to=self.round_to,
            log_odds=self.log_odds,
        )


@st.composite
def cases(draw, min_layers=1):
    # few values, for ties; and any at all
    number = st.one_of(st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0]), st.floats(-1e6, 1e6))
    scores, gone, channels = {}, set(), {}
    for index in range(draw(st.integers(min_layers, 3))):
        layer = f"layer {index}"
        scores[layer] = draw(st.lists(number, min_size=1, max_size=12))
        width = len(scores[layer])
        in_fit = draw(st.lists(st.booleans(), min_size=width, max_size=width))
        for unit in np.flatnonzero(in_fit).tolist() if draw(st.booleans()) else []:
            gone.add((layer, unit))
            if draw(st.booleans()):  # its weights are no more, and a criterion may look at them
                scores[layer][unit] = math.nan
        if draw(st.booleans()):
            channels[layer] = draw(st.integers(1, 4))
    return Case(
        scores,
        gone,
        channels,
        min_kept=draw(st.integers(1, 4) | st.floats(0.05, 0.95)),
        round_to=draw(st.sampled_from([None, 2, 4, 8])),
        log_odds=draw(st.sampled_from([0.5, None])),
    )


def thresholds_to_try(plan):
    """At every score, right beside it, between two, and beyond all."""
    score = np.unique(plan.table.score.dropna().to_numpy())
    between = (score[1:] + score[:-1]) / 2
    beside = [np.nextafter(score, -np.inf), np.nextafter(score, np.inf)]
    return np.unique(np.concatenate([score, between, *beside, [-1e9, 0.0, 1e9, math.inf]])).tolist()


@pytest.mark.slow
@quick
@given(cases())
@example(Case({"all gone": [math.nan, 1.0]}, {("all gone", 0), ("all gone", 1)}, {}))
@example(Case({"heads": [1.0, 1.0, 1.0, -2.0, -2.0]}, {("heads", 1)}, {"heads": 3}, min_kept=2, round_to=8))
@example(Case({"even": [3.0, 2.0, 1.0, 0.0, -1.0]}, set(), {}, min_kept=1, round_to=2))
def test_leaving_is_when_the_plan_removes(case):
    plan = case.plan()
    leaving = decisions(plan)[0]
    for threshold in thresholds_to_try(plan):
        removed = plan.at(threshold).table.removed.to_numpy()
        assert (threshold <= leaving).tolist() == removed.tolist(), threshold
    assert (leaving == math.inf).tolist() == plan.table.removed_in_fit.tolist()


@pytest.mark.slow
@quick
@given(st.data())
def test_of_nested_layers_every_change_is_known(data):
    """Structures inside others: what goes first, and that nothing changes between two thresholds of `what_if`."""
    score = st.integers(-4, 4).map(float)
    outer = data.draw(st.lists(score, min_size=3, max_size=3))
    inner = data.draw(st.lists(score, min_size=6, max_size=6))
    least, multiple = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([None, 2]))
    owner = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=6, max_size=6)))
    enclosed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    plan = make_plan({"outer": outer, "inner": inner}, min_kept=least, round_to=multiple)
    plan = replace(plan, nesting=Nesting({"inner": {"outer": owner}}, {"outer": enclosed}))
    leaving, turns = decisions(plan)
    tried = {t: plan.at(t).table.removed.to_numpy() for t in thresholds_to_try(plan)}
    first = [max((t for t, gone in tried.items() if gone[row]), default=-math.inf) for row in range(9)]
    assert leaving.tolist() == first
    for threshold, gone in tried.items():
        last = min((turn for turn in turns if turn >= threshold), default=math.inf)
        assert (plan.at(last).table.removed.to_numpy() == gone).all()


def test_floors_multiples_and_channels_by_hand():
    leaving = decisions(make_plan({"a": [5.0, -1.0, 3.0, 1.0]}, min_kept=2))[0]
    assert leaving.tolist() == [5.0, -math.inf, 3.0, -math.inf]
    # three go together or not at all: the last three as soon as the best of them does
    scores = {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
    plan = make_plan(scores, round_to=3)
    assert decisions(plan)[0].tolist() == [-math.inf] * 3 + [4.0] * 3 + [7.0]
    # of two channels each, three make a multiple of six
    plan = make_plan(scores, round_to=6, channels={"a": 2})
    assert decisions(plan)[0].tolist() == [-math.inf] * 3 + [4.0] * 3 + [7.0]


def test_rows_are_the_plans_at_the_thresholds():
    case = Case(
        {"a": [3.0, 1.0, -2.0, -2.0, 0.5], "b": [-1.0, 0.0, 4.0, -7.0], "c": [2.0, -5.0, math.nan]},
        {("c", 2)},
        {},
    )
    plan = case.plan()
    table = what_if(plan)
    assert table.score_threshold.is_monotonic_decreasing
    assert table.score_threshold.is_unique
    assert table.score_threshold.iloc[0] == math.inf
    assert set(table.score_threshold) == {math.inf, *np.unique(leaving_of(plan)).tolist(), 0.0}
    for row in table.itertuples():
        there = plan.at(row.score_threshold)
        assert row.structures == (~there.table.removed).sum()
        # counted by the plan, and by hand
        assert row.parameters == there.parameters_left()
        assert row.parameters == parameters_of(there.widths().after)
    decided = table[table.score_threshold == 0.0]
    assert decided.structures.item() == (~plan.table.removed).sum()
    assert table.prior_log_odds.to_numpy() == pytest.approx(0.5 - table.score_threshold.to_numpy())


def leaving_of(plan):
    """The scores at which something leaves."""
    leaving = decisions(plan)[0]
    return leaving[np.isfinite(leaving)]


@settings(max_examples=15, deadline=None)
@given(cases(min_layers=2))
def test_rows_of_any_plan(case):
    plan = case.plan()
    for row in what_if(plan).itertuples():
        there = plan.at(row.score_threshold)
        assert row.structures == (~there.table.removed).sum()
        assert row.parameters == there.parameters_left()


def test_nothing_changes_between_two_rows():
    plan = make_plan(random_scores({"a": 9, "b": 12}))
    table = what_if(plan)
    for above, below in zip(table.score_threshold[:-1], table.score_threshold[1:], strict=True):
        middle = below + 1.0 if math.isinf(above) else (above + below) / 2
        # as the row above it says: the one below comes in at its own threshold
        row = table[table.score_threshold == above]
        assert (~plan.at(middle).table.removed).sum() == row.structures.item()


def test_of_many_thresholds_the_ends_and_the_plans_own_stay():
    plan = make_plan(random_scores({"a": 60, "b": 40}))
    whole, some, ends = what_if(plan), what_if(plan, most=10), what_if(plan, most=2)
    assert len(whole) == 100  # two layers' floors stay, the plan's own and infinity come in
    assert len(some) in (11, 12)
    assert len(ends) == 4
    for fewer in (some, ends):
        pd.testing.assert_frame_equal(
            fewer, whole[whole.score_threshold.isin(fewer.score_threshold)].reset_index(drop=True)
        )
        assert {math.inf, 0.0} < set(fewer.score_threshold)
        inner = whole.score_threshold[np.isfinite(whole.score_threshold)]
        assert fewer.score_threshold.iloc[-1] == inner.min()
        assert fewer.score_threshold.iloc[1] == inner.max()
    # evenly: by places in the order, not by nats
    places = np.flatnonzero(whole.score_threshold.isin(some.score_threshold) & (whole.score_threshold != 0))
    assert np.diff(places[1:]).max() <= 12
    pd.testing.assert_frame_equal(what_if(plan, most=98), whole)


@pytest.mark.parametrize("most", [1, 0, -3, 2.0, "10", None, True])
def test_a_bad_most_is_refused(most, monkeypatch):
    plan = make_plan({"a": [1.0, -1.0]})
    monkeypatch.setattr(type(plan), "parameters_of", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=rf"most must be an integer of at least 2: got {most!r}"):
        what_if(plan, most=most)


def test_a_plan_from_disk_has_no_network_to_count(tmp_path):
    plan = make_plan({"a": [1.0, -1.0]})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="network must be given"):
        what_if(bmrs.NetworkPlan.load(tmp_path / "plan.json"))


def test_log_odds_of_each_threshold():
    table = what_if(make_plan({"a": [3.0, -6.0, 2.0]}, log_odds=0.919))
    assert (table.prior_log_odds + table.score_threshold).iloc[1:].tolist() == pytest.approx(
        [0.919] * (len(table) - 1)
    )
    assert what_if(make_plan({"a": [3.0, -1.0]}, log_odds=None)).prior_log_odds.isna().all()
    released = bmrs.BMRS_N()
    assert fitted(released)[2].rule.prior_log_odds == released.prior_log_odds


# --- for the page ----------------------------------------------------------------------------------------


def strict(text):
    """JSON as browsers read it, without NaN and infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


NAMES = ["</script><script>alert(1)</script>", "<!--", "a & b", 'quo"te', "name\n名🎉\u2028"]


@pytest.mark.parametrize("log_odds", [0.5, None])
@pytest.mark.parametrize("with_curve", [False, True])
def test_what_the_slider_is_given(log_odds, with_curve):
    scores = random_scores(dict.fromkeys(NAMES, 6))
    gone = [(NAMES[0], 0), (NAMES[2], 3)]
    scores[NAMES[0]][0] = math.nan
    plan = make_plan(scores, gone=gone, log_odds=log_odds)
    curve = make_curve(plan) if with_curve else None
    changes = what_if(plan)
    found = slider(plan, changes, curve)
    assert found["evidence"] == (log_odds is not None)
    assert found["own"] == pytest.approx(log_odds or 0.0)
    assert "<" not in found["json"]
    data = strict(found["json"])
    assert (data["evidence"], data["own"], data["exact"]) == (found["evidence"], found["own"], True)
    assert [layer["name"] for layer in data["layers"]] == NAMES
    leaving = decisions(plan)[0]
    codes = [
        "gone" if value == math.inf else None if value == -math.inf else value for value in leaving.tolist()
    ]
    assert [value for layer in data["layers"] for value in layer["leaving"]] == codes
    assert codes.count("gone") == 2
    assert codes.count(None) == len(NAMES)  # one of each layer stays whatever is asked
    assert [unit for layer in data["layers"] for unit in layer["units"]] == plan.table.unit.tolist()
    assert [row["parameters"] for row in data["parameters"]] == changes.parameters.tolist()
    assert [row["threshold"] for row in data["parameters"]] == [None, *changes.score_threshold[1:].tolist()]
    if curve is None:
        assert data["accuracy"] == []
    else:
        assert [row["accuracy"] for row in data["accuracy"]] == curve.accuracy.tolist()
        assert [row["removed"] for row in data["accuracy"]] == curve.parameters_removed.tolist()
        assert [row["threshold"] for row in data["accuracy"]] == [None, *curve.score_threshold[1:].tolist()]
    # at one end all stays that the fit has left, at the other all goes that may
    asked = found["own"] - leaving_of(plan) if found["evidence"] else leaving_of(plan)
    assert data["lowest"] < asked.min() < asked.max() < data["highest"]
    assert data["lowest"] <= found["own"] <= data["highest"]


def test_the_slider_reaches_the_plans_own_where_it_lies_beyond_all():
    for scores in ([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]):
        for log_odds in (0.5, None):
            plan = make_plan({"a": scores}, log_odds=log_odds)
            data = strict(slider(plan, what_if(plan), None)["json"])
            assert data["lowest"] <= data["own"] <= data["highest"]


def test_no_slider_where_nothing_can_go():
    plan = make_plan({"a": [1.0], "b": [math.nan, 2.0]}, gone=[("b", 0)])
    assert slider(plan, what_if(plan), None) is None


def test_a_curve_of_a_regression_shows_no_accuracy():
    plan = make_plan({"a": [1.0, 2.0, -1.0]})
    curve = make_curve(plan).assign(accuracy=math.nan)
    assert strict(slider(plan, what_if(plan), curve)["json"])["accuracy"] == []


def test_points_of_a_curve_without_a_number_are_left_out():
    plan = make_plan(random_scores({"a": 6}))
    curve = make_curve(plan)
    curve.loc[2, "accuracy"] = math.nan
    curve.loc[3, "score_threshold"] = math.nan
    data = strict(slider(plan, what_if(plan), curve)["json"])
    assert [row["accuracy"] for row in data["accuracy"]] == curve.drop(index=[2, 3]).accuracy.tolist()


@pytest.mark.parametrize(
    ("width", "most", "exact"), [(40, 300, True), (40, 39, True), (40, 38, False), (40, 10, False)]
)
def test_counts_are_exact_where_no_threshold_was_left_out(width, most, exact):
    """One of the structures is the floor, so that 39 leave."""
    plan = make_plan(random_scores({"a": width}))
    assert strict(slider(plan, what_if(plan, most=most), None)["json"])["exact"] is exact


def test_shares_are_of_the_original_network_as_everywhere_else():
    """What a fit has taken out counts as removed."""
    model, _, plan = fitted(bmrs.BMRS_N())
    assert plan.table.removed_in_fit.sum() == 3
    changes = what_if(plan)
    data = strict(slider(plan, changes, None)["json"])
    assert data["before"] == plan.parameters_before() > changes.parameters.max()
    assert changes.parameters.max() == sum(p.numel() for p in model.parameters())
    # a plan that was loaded knows no network, and is told
    loose = replace(plan, _binding=None)
    assert strict(slider(loose, changes, None, data["before"])["json"])["before"] == data["before"]


def fitted(criterion):
    """A model from which a first plan has taken three structures, its guide, and a second plan."""
    torch.manual_seed(0)
    model = bmrs.Classifier(chain({"a": 6, "b": 5}))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(torch.randn(8, INPUTS), torch.zeros(8, dtype=torch.long))
    with torch.no_grad():
        for posterior in guide.posteriors:
            posterior.loc.copy_(torch.linspace(-15.0, -1.0, len(posterior.loc)))
            posterior.log_scale.copy_(torch.linspace(1.0, -2.0, len(posterior.loc)))
        guide.posteriors[0].loc[1:3] = -19.5
        guide.posteriors[1].loc[0] = -19.5
    first = bmrs.reduce(model, guide, bmrs.ExpectedScale(threshold=1e-6))
    first = make_removal(first, {"a": [1, 2], "b": [0]})
    first.shrink(model, guide)
    return model, guide, bmrs.reduce(model, guide, criterion)


def make_removal(plan, removed):
    """The plan that removes just these."""
    chosen = [unit in removed[layer] for layer, unit in zip(plan.table.layer, plan.table.unit, strict=True)]
    return replace(plan, table=plan.table.assign(removed=chosen))


def test_structures_that_a_fit_took_out_stay_out():
    model, _, plan = fitted(bmrs.SNR())
    table = what_if(plan)
    assert table.structures.iloc[0] == 8
    assert not plan.rule.has_evidence
    assert table.prior_log_odds.isna().all()
    for row in table.itertuples():
        small = plan.at(row.score_threshold).apply()
        assert isinstance(small, nn.Module)
        assert row.parameters == sum(parameter.numel() for parameter in small.parameters())
    assert table.parameters.iloc[0] == sum(parameter.numel() for parameter in model.parameters())
