"""Widths rounded up: as few more structures as make a multiple, the best of those that would have gone."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, NetworkPlan
from pyro_bmrs.networks.noise import noise_layers

quick = settings(max_examples=60, deadline=None)


class Given:
    """A criterion that gives the scores it was made with."""

    unit = "nothing"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, layers):
        return {site: torch.tensor(self.scores[site], dtype=torch.float64) for site in layers}


@dataclass
class Problem:
    scores: dict[str, list[float]]
    available: dict[str, list[bool]]  # False: removed in the fit
    channels: dict[str, int]
    min_kept: int
    round_to: int | None

    def plan(self, **changes):
        layers, inputs = [], 3
        for score in self.scores.values():
            layers += [nn.Linear(inputs, len(score)), MultiplicativeNoise(len(score))]
            inputs = len(score)
        model = Classifier(nn.Sequential(*layers, nn.Linear(inputs, 2)))
        guide = AutoTruncatedLogNormal(model)
        guide(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
        for site, layer in noise_layers(model).items():
            layer.kept.copy_(torch.tensor(self.available[site]))
            layer.channels = self.channels[site]
        options = {"min_kept": self.min_kept, "round_to": self.round_to, **changes}
        return bmrs.reduce(model, guide, Given(self.scores), **options)

    def expected(self, site, threshold=0.0):
        """The definition, counted out: one more structure at a time, in the order of their scores."""
        ranked = sorted(
            (index for index, there in enumerate(self.available[site]) if there),
            key=lambda index: self.scores[site][index],
        )
        count = sum(self.scores[site][index] < threshold for index in ranked)
        count = min(max(count, self.min_kept), len(ranked))
        while count < len(ranked) and count * self.channels[site] % (self.round_to or 1):
            count += 1
        return sorted(ranked[:count])


@st.composite
def problems(draw):
    # sites are called after the noise layers' places in the network
    sites = [str(1 + 2 * number) for number in range(draw(st.integers(1, 2)))]
    # few values, so that some are equal and some are the threshold itself
    score = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]) | st.floats(-3, 3)
    scores = {site: draw(st.lists(score, min_size=1, max_size=30)) for site in sites}
    available = {
        site: draw(st.lists(st.booleans(), min_size=len(scores[site]), max_size=len(scores[site])))
        for site in sites
    }
    for there in available.values():
        there[draw(st.integers(0, len(there) - 1))] = True
    channels = {site: draw(st.sampled_from([1, 1, 2, 3, 4, 6, 8, 64])) for site in sites}
    return Problem(scores, available, channels, draw(st.integers(1, 6)), draw(st.none() | st.integers(1, 16)))


@pytest.mark.slow
@quick
@given(problems())
def test_as_few_more_as_make_a_multiple(problem):
    plan, plain = problem.plan(), problem.plan(round_to=None)
    for site in problem.scores:
        kept = plan.kept[site]
        assert kept == problem.expected(site)
        assert set(plain.kept[site]) <= set(kept)
        there = [index for index, yes in enumerate(problem.available[site]) if yes]
        assert set(kept) <= set(there)
        step = (problem.round_to or 1) // math.gcd(problem.round_to or 1, problem.channels[site])
        assert len(kept) % step == 0 or kept == there
        assert len(kept) < len(plain.kept[site]) + step
        # none that went is better than one that stayed
        gone = [problem.scores[site][index] for index in there if index not in kept]
        assert max((problem.scores[site][index] for index in kept), default=0) <= min(gone, default=math.inf)


@quick
@given(problems(), st.sampled_from([-math.inf, -1.0, -0.25, 0.0, 0.5, 2.0, math.inf]))
def test_a_moved_threshold_rounds_too(problem, threshold):
    plan = problem.plan()
    moved = plan.at(threshold)
    assert moved.kept == {site: problem.expected(site, threshold) for site in problem.scores}
    assert moved.rule.round_to == problem.round_to
    assert moved.at(0.0).kept == plan.kept
    assert plan.kept == {site: problem.expected(site) for site in problem.scores}  # itself unchanged


def example(**changes):
    """Five of twelve are kept: of heads of 4 channels 8 make a multiple of 32, of single channels none."""
    scores = [-1.0, 0.1, 0.2, -1.0, 0.3, -1.0, 0.4, 0.5, -1.0, -1.0, 0.6, 0.7]
    settings = dict(channels={"1": 4}, min_kept=1, round_to=32)
    return Problem({"1": scores}, {"1": [True] * 12}, **{**settings, **changes})


@pytest.mark.parametrize(
    ("round_to", "channels", "count"),
    [
        (None, 4, 5), (1, 4, 5), (2, 4, 5), (4, 4, 5), (8, 4, 6), (12, 4, 6), (16, 4, 8), (32, 4, 8), (40, 4, 10),
        (64, 4, 12), (5, 1, 5), (6, 1, 6), (8, 1, 8), (32, 1, 12), (8, 6, 8), (9, 6, 6), (10, 3, 10), (7, 7, 5),
    ],
)  # fmt: skip
def test_counted_by_hand(round_to, channels, count):
    plan = example(round_to=round_to, channels={"1": channels}).plan()
    assert plan.widths().after.tolist() == [count]
    assert len(plan.kept["1"]) == count


def test_the_best_of_those_that_would_have_gone_stay():
    assert example().plan().kept["1"] == [0, 1, 2, 3, 4, 5, 8, 9]
    problem = example()
    problem.available["1"][2] = False
    assert problem.plan().kept["1"] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert example(min_kept=9, round_to=None).plan().widths().after.tolist() == [9]
    assert example(min_kept=9, round_to=40).plan().widths().after.tolist() == [10]


def test_files_keep_it(tmp_path):
    plan = example().plan()
    path = plan.save(tmp_path / "plan.json")
    assert json.loads(path.read_text())["rule"]["round_to"] == 32
    loaded = NetworkPlan.load(path)
    assert (loaded.rule.round_to, loaded.kept) == (32, plan.kept)
    assert loaded.channels == {"1": 4}
    assert loaded.rule == plan.rule
    for threshold, count in ((-math.inf, 8), (0.25, 8), (0.45, 12)):
        assert loaded.at(threshold).kept == plan.at(threshold).kept
        assert len(loaded.at(threshold).kept["1"]) == count
    none = NetworkPlan.load(example(round_to=None).plan().save(tmp_path / "none.json"))
    assert none.rule.round_to is None


def test_summary_says_so():
    assert "multiples of 32" in example().plan().summary()
    assert "multiples" not in example(round_to=None).plan().summary()


@pytest.mark.parametrize("bad", [0, -8, 1.5, 8.0, "8", (8,), math.nan])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match="round_to must be a positive integer or None: got"):
        example(round_to=bad).plan()


def test_heads_are_rounded_by_their_channels():
    """Of a real network: four heads of two channels, of which one more stays for a multiple of four."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
            self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.embed(x)
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return self.head(torch.tanh(self.hidden(self.norm(x).mean(1))))

    torch.manual_seed(0)
    x = torch.randn(6, 5, 3)
    model = Classifier(bmrs.insert_noise(Attending(), x))
    guide = AutoTruncatedLogNormal(model)
    guide(x, torch.zeros(6, dtype=torch.long))
    scores = {"attention": [1.0, -1.0, 2.0, 0.5], "hidden": [1.0, 2.0, -1.0, 0.5, -1.0, -1.0]}
    plan = bmrs.reduce(model, guide, Given(scores), round_to=4)
    assert plan.kept == {"attention": [1, 3], "hidden": [2, 3, 4, 5]}
    small = plan.apply()
    assert small.attention.query.out_features == 4
    assert small.hidden.out_features == 4
