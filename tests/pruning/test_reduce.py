"""The plan: from posterior to table, floor, files, and back to a network."""

import json
import math

import pyro
import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, NetworkPlan
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.pruning import NonFiniteScoreError
from pyro_bmrs.quality import compression_curve


def problem(loc=None, scale=None):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), MultiplicativeNoise(6), nn.Linear(6, 5), nn.Tanh(), MultiplicativeNoise(5),
        nn.Linear(5, 3),
    )  # fmt: skip
    model = Classifier(net)
    guide = AutoTruncatedLogNormal(model)
    x = torch.randn(16, 4)
    guide(x, torch.zeros(16, dtype=torch.long))
    with torch.no_grad():
        guide.site_posterior("2").loc.copy_(torch.tensor([-0.1, -30.0, -0.2, -25.0, -0.3, -1.0]))
        guide.site_posterior("2").log_scale.fill_(math.log(0.5))
        guide.site_posterior("5").loc.fill_(-30.0)
    return model, guide, x


def test_the_table_says_what_the_guide_says():
    model, guide, _ = problem()
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N(prior_log_odds=0.25))
    table = plan.table.set_index(["layer", "unit"])
    q = guide.posterior()["2"]
    for column, values in (("loc", q.loc), ("scale", q.scale), ("mean", q.mean), ("snr", q.snr)):
        assert table.loc["2", column].tolist() == pytest.approx(values.tolist())
    change = bmrs.log_evidence_change(q, bmrs.LogUniform(), bmrs.TruncatedLogNormal(-20.0, 1e-6))
    assert table.loc["2", "log_evidence_change"].tolist() == pytest.approx(change.tolist(), rel=1e-6)
    assert (table.score - table.log_evidence_change).tolist() == pytest.approx([0.25] * 11)
    assert plan.kept["2"] == [0, 2, 4, 5]
    assert list(plan.widths().after) == [4, 1]  # the second layer would all go: the floor
    assert bmrs.reduce(model, guide, bmrs.SNR()).table.log_evidence_change.isna().all()


def test_the_floor_keeps_the_best():
    model, guide, _ = problem()
    with torch.no_grad():
        guide.site_posterior("5").loc[3] = -21.0
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    assert plan.kept["5"] == [3]
    assert "floor of 1" in plan.summary()
    wider = bmrs.reduce(model, guide, bmrs.BMRS_N(), min_kept=3)
    assert len(wider.kept["5"]) == 3
    assert 3 in wider.kept["5"]
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="min_kept"):
            bmrs.reduce(model, guide, bmrs.BMRS_N(), min_kept=bad)


def test_removal_is_never_undone():
    model, guide, _ = problem()
    noise_layers(model)["2"].kept[0] = False
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    assert plan.table.score[0] < 0
    assert 0 not in plan.kept["2"]


class Broken:
    unit = "nothing"

    def __init__(self, value):
        self.value = value

    def __call__(self, layers):
        scores = {name: torch.full((len(layer.kept),), -1.0).double() for name, layer in layers.items()}
        scores["5"][2] = self.value
        return scores


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_raises_and_removes_nothing(value):
    model, guide, _ = problem()
    with pytest.raises(NonFiniteScoreError, match=r"structures \[2\] of layer '5'"):
        bmrs.reduce(model, guide, Broken(value))
    assert all(layer.kept.all() for layer in noise_layers(model).values())


def test_a_broken_guide_raises_instead_of_removing():
    model, guide, _ = problem()
    with torch.no_grad():
        guide.site_posterior("2").loc[1] = math.nan
    with pytest.raises(NonFiniteScoreError, match=r"structures \[1\] of layer '2'"):
        bmrs.reduce(model, guide, bmrs.BMRS_N())


def test_apply_computes_the_reduced_model():
    model, guide, x = problem()
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    small = plan.apply()
    with torch.no_grad(), fixed_scales(model.net, {k: v.float() for k, v in plan.theta_mean().items()}):
        torch.testing.assert_close(small(x), model.net(x))
    assert [small[0].out_features, small[3].in_features, small[6].in_features] == [4, 4, 1]
    assert plan.costs(small).loc["parameters"].tolist() == [
        4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3,
        4 * 4 + 4 + 4 + 1 + 3 + 3,
        0,
    ]
    assert "parameters: 83 → 31" in plan.summary()
    other = torch.randn(7, 4)
    assert plan.apply(example_input=other)(other).shape == (7, 3)


def test_the_kl_weight_is_named_wherever_evidence_is_shown(tmp_path):
    model, guide, _ = problem()
    guide.kl_weight = 40.0
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    assert (plan.table.kl_weight == 40.0).all()
    assert "p(y|θ)^(1/40)" in plan.summary()
    assert (NetworkPlan.load(plan.save(tmp_path / "plan.json")).table.kl_weight == 40.0).all()


def test_files_round_trip(tmp_path):
    model, guide, x = problem()
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    small = plan.apply()
    path = plan.save(tmp_path / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.numbers.safetensors"]
    loaded = NetworkPlan.load(path)
    assert loaded.table.equals(plan.table)
    assert loaded.kept == plan.kept
    assert loaded.bound_to(model.net, lambda: x).rule == plan.rule
    assert loaded.cuts == plan.cuts
    with pytest.raises(ValueError, match="network must be given"):
        loaded.apply()
    with pytest.raises(ValueError, match="example_input must be given"):
        loaded.apply(model.net)
    again = loaded.apply(model.net, x)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_foreign_damaged_and_newer_files_are_refused(tmp_path):
    model, guide, _ = problem()
    path = bmrs.reduce(model, guide, bmrs.BMRS_N()).save(tmp_path / "plan.json")
    document = json.loads(path.read_text())
    numbers = tmp_path / "plan.numbers.safetensors"
    whole = numbers.read_bytes()
    twos, fives = document["layers"]["2"], [True] * document["layers"]["5"]
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "is none"),
        (json.dumps({"format": "other"}), "is none"),
        (json.dumps({**document, "version": 99}), "newer pyro_bmrs.*99"),
        (json.dumps({**document, "numbers": "0" * 64}), "do not belong together"),
        (json.dumps({k: v for k, v in document.items() if k != "layers"}), "whole plan"),
        *(
            (json.dumps({**document, "nesting": nesting}), "whole plan.*(nesting can't be|cycle)")
            for nesting in (
                [],
                {},
                {"owners": [], "enclosed": {}},
                {"owners": {}, "enclosed": {"5": fives}},
                *(
                    {"owners": owners, "enclosed": {"5": fives}}
                    for owners in (
                        {"2": []},
                        {"2": {"9": [0]}},
                        {"2": {"5": [0]}},
                        {"2": {"5": "all"}},
                        {"2": {"5": [99] * twos}},
                        {"2": {"5": [0.0] * twos}},
                    )
                ),
                *(
                    {"owners": {"2": {"5": [0] * twos}}, "enclosed": {"5": enclosed}}
                    for enclosed in (None, [], [0] * len(fives))
                ),
                {
                    "owners": {"2": {"5": [0] * twos}, "5": {"2": [0] * len(fives)}},
                    "enclosed": {"2": [True] * twos, "5": fives},
                },
            )
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            NetworkPlan.load(path)
    path.write_text(json.dumps(document))
    numbers.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="whole plan"):
        NetworkPlan.load(path)
    with pytest.raises(ValueError, match=r"ends in .json"):
        NetworkPlan.load(tmp_path / "plan.pkl")


def test_a_threshold_moves_the_decision():
    model, guide, _ = problem()
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    nothing = plan.at(math.inf)
    assert not nothing.table.removed.any()
    everything = plan.at(-math.inf)
    assert list(everything.widths().after) == [1, 1]
    assert plan.at(0.0).kept == plan.kept


def test_wrong_arguments_are_named():
    model, guide, _ = problem()
    with pytest.raises(TypeError, match="criterion must be"):
        bmrs.reduce(model, guide, "BMRS_N")
    with pytest.raises(ValueError, match="MultiplicativeNoise"):
        bmrs.reduce(Classifier(nn.Linear(4, 2)), guide, bmrs.BMRS_N())
    other = Classifier(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), MultiplicativeNoise(3), nn.Linear(3, 2)))
    stranger = AutoTruncatedLogNormal(other)
    stranger(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="posterior of '5'"):
        bmrs.reduce(model, stranger, bmrs.BMRS_N())


def test_what_the_fit_removed_stays_removed_at_every_threshold(tmp_path):
    model, guide, x = problem()
    noise_layers(model)["2"].kept[0] = False
    guide.site_posterior("2").kept[0] = False
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    for variant in (plan.at(math.inf), NetworkPlan.load(plan.save(tmp_path / "plan.json")).at(math.inf)):
        assert variant.kept == {"2": [1, 2, 3, 4, 5], "5": [0, 1, 2, 3, 4]}
    curve = compression_curve(model, plan, (x, torch.zeros(16, dtype=torch.long)), points=3)
    full = sum(parameter.numel() for parameter in model.parameters())
    assert curve.parameters_removed.iloc[0] == pytest.approx(1 - plan.at(math.inf).parameters_left() / full)


def test_a_criterion_that_is_only_named_gets_a_hint():
    model, guide, _ = problem()
    with pytest.raises(TypeError, match=r"criterion must be made, BMRS_N\(\)"):
        bmrs.reduce(model, guide, bmrs.BMRS_N)
    with pytest.raises(TypeError, match="model must be"):
        bmrs.reduce(lambda x: x, guide, bmrs.BMRS_N())


def test_the_network_of_a_users_model_is_its_outermost_part():
    class Own(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 4), net, nn.ReLU(), nn.Linear(3, 2))

        def forward(self, x, y=None):
            logits = self.backbone(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", pyro.distributions.Categorical(logits=logits), obs=y)
            return logits

    model = Own(problem()[0].net)
    guide = AutoTruncatedLogNormal(model)
    guide(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    small = bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()
    assert small(torch.zeros(2, 4)).shape == (2, 2)


def test_a_plan_that_removes_nothing_says_what_could_be_done():
    model, guide, _ = problem()
    picky = bmrs.BMRS_N(prior_log_odds=-1e6)
    assert "nothing to remove" in bmrs.reduce(model, guide, bmrs.SNR(1e-9)).summary()
    assert "the data need each structure at this KL weight" in bmrs.reduce(model, guide, picky).summary()
    assert "nothing to remove" not in bmrs.reduce(model, guide, bmrs.BMRS_N()).summary()
    for posterior in guide.posteriors:
        posterior.loc.data.fill_(-0.1)
    told = bmrs.reduce(model, guide, picky).summary()
    assert "the lowest log θ is -0.1, hardly below 0 where it began" in told
    assert "posterior_learning_rate" in told
