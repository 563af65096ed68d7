"""Structures inside structures: positions of flattened filters, which can leave alone and leave with their filter."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.structures import StructureError, structure_groups

MODELS = Path(__file__).parents[2] / "models"

quick = settings(max_examples=25, deadline=None)


def examples(count=800):
    """Images of 6 × 6 whose class is in their middle."""
    x = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0, 2:4, 2:4].sum((1, 2)) > 0).long()


def network(filters=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, filters, 3), nn.ReLU(), bmrs.MultiplicativeNoise(filters), nn.Flatten(),
        bmrs.InputSelection(16 * filters), bmrs.MultiplicativeNoise(16 * filters),
        nn.Linear(16 * filters, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2),
    )  # fmt: skip


def called(net):
    """(model, guide, x) with a posterior that has seen a batch."""
    x, y = examples(40)
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    return model, guide, x


def idle(guide, layer, structures):
    """Let those be idle, and the others of the layer known to be at about one half."""
    with torch.no_grad():
        for number, posterior in enumerate(guide.posteriors):
            if number == layer or not number:
                posterior.loc.fill_(-0.7)
                posterior.log_scale.fill_(-3.0)
        guide.posteriors[layer].loc[structures] = -15.0
        guide.posteriors[layer].log_scale[structures] = 1.0


@dataclass(frozen=True)
class Given:
    """Removes what it is told to."""

    removed: dict
    unit: ClassVar[str] = "none"

    def __call__(self, layers):
        return {site: 2.0 * self.removed[site].double() - 1.0 for site in layers}


@pytest.fixture(scope="module", params=[pytest.param("end", marks=pytest.mark.slow), "epoch"])
def reduced(request):
    """(plan, small network, model, guide) after a fit that removes at its end, or within."""
    model = bmrs.Classifier(network())
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, examples(), epochs=20, batch_size=50, learning_rate=1e-2, posterior_learning_rate=0.15,
        kl_weight=1.0, removal=request.param, criterion=bmrs.BMRS_N(), seed=1, progress=False,
    )  # fmt: skip
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    return plan, plan.apply(), model, guide


def test_positions_of_filters_that_stay_go_alone(reduced):
    plan, small, *_ = reduced
    left = dict(zip(plan.widths().layer, plan.widths().after, strict=True))
    assert small[0].out_channels == left["2"]
    assert small[4].features == small[6].in_features == left["5"] < 16 * left["2"]
    assert small[4].width == 16 * left["2"]
    x, y = examples()
    assert (small(x).argmax(1) == y).float().mean() > 0.95


def test_what_lies_inside_of_what_goes_goes(reduced):
    plan, *_ = reduced
    kept = plan.kept
    assert {position // 16 for position in kept["5"]} <= set(kept["2"])
    for threshold in (-100.0, -5.0, -1.0, 0.0, 1.0):
        other = plan.at(threshold).kept
        assert {position // 16 for position in other["5"]} <= set(other["2"])
        assert other["5"]


def test_the_plan_goes_to_disk_and_back_with_what_lies_inside_what(reduced, tmp_path):
    plan, small, *_ = reduced
    loaded = bmrs.NetworkPlan.load(plan.save(tmp_path / "plan.json"))
    for threshold in (-5.0, 0.5):
        assert loaded.at(threshold).kept == plan.at(threshold).kept
    again = loaded.rebuild(network(), weights=None)
    again.load_state_dict(small.state_dict())
    x, _ = examples(20)
    assert torch.equal(again(x), small.eval()(x))


def test_it_is_exported(reduced, tmp_path):
    from pyro_bmrs.networks.export import export_program

    x, _ = examples(7)
    program = torch.export.load(export_program(reduced[1], x, tmp_path / "small.pt2")).module()
    assert torch.allclose(program(x), reduced[1](x), atol=1e-6)


def test_a_filter_goes_with_its_positions_whatever_they_score():
    model, guide, _ = called(network())
    nothing_else = {site: torch.zeros(layer.features) > 0 for site, layer in noise_layers(model).items()}
    plan = bmrs.reduce(model, guide, Given({**nothing_else, "2": torch.arange(5) == 0}))
    table = plan.table.set_index(["layer", "unit"])
    inside = table.loc["5"].iloc[:16]
    assert table.loc[("2", 0)].removed
    assert inside.removed.all()
    assert (inside.score < 0).all()
    assert not table.loc["5"].iloc[16:].removed.any()
    assert plan.apply()[4].features == 64


def test_a_filter_goes_once_all_of_its_positions_have(tmp_path):
    model, guide, x = called(network())
    gone = {site: torch.zeros(layer.features) > 0 for site, layer in noise_layers(model).items()}
    plan = bmrs.reduce(model, guide, Given({**gone, "5": torch.arange(80) // 16 == 1}))
    filters = plan.table[plan.table.layer == "2"]
    assert filters.removed.tolist() == [False, True, False, False, False]
    assert (filters.score < 0).all()
    small = plan.apply()
    assert small[0].out_channels == 4
    bmrs.insert_noise(small, x)
    loaded = bmrs.NetworkPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.at(0.0).kept == plan.kept


def test_a_search_over_filters_leaves_positions_of_those_that_stay():
    model, guide, _ = called(network())
    with torch.no_grad():
        for posterior in guide.posteriors:
            posterior.loc.zero_()
            posterior.log_scale.fill_(-3.0)
        guide.posteriors[0].loc[0] = -15.0  # the one filter that its evidence would remove
    plan = bmrs.greedy_reduction(
        model, guide, {"2": bmrs.LogUniform(-20.0, -5.0)}, prior_log_odds={"second": 1e9},
        groups={"second": {"2": torch.arange(5) == 1}},
    )  # fmt: skip
    assert plan.kept["2"] == [0, 2, 3, 4]
    assert plan.kept["5"] == [*range(16), *range(32, 80)]


def test_a_filter_goes_whose_layer_is_not_asked_about():
    model, guide, x = called(network())
    idle(guide, 1, torch.arange(80) // 16 == 1)
    plan = bmrs.reduce(model, guide, {"5": bmrs.LogUniform(-20.0, -5.0)})
    assert plan.kept["2"] == [0, 2, 3, 4]
    bmrs.insert_noise(plan.apply(), x)


def test_what_only_goes_along_is_no_evidence():
    """The filter of positions that go, and the positions of a filter that goes."""
    model, guide, _ = called(network())
    law = bmrs.LogUniform(-20.0, -5.0)
    idle(guide, 1, torch.arange(80) // 16 == 1)
    positions = {"5": torch.arange(80) // 16 == 1}
    found = bmrs.greedy_reduction(model, guide, {"5": law, "2": law}, groups={"positions": positions})
    assert found.kept["2"] == [0, 2, 3, 4]
    total = found.steps.log_evidence_change.iloc[-1]
    assert found.joint_evidence().log_evidence_change == pytest.approx(total, abs=1e-9)
    gone = found.reduced_posterior()
    assert bool((gone(*guide.example_arguments)["2"][1] > 0.5).all())
    idle(guide, 1, torch.arange(80) < 0)
    idle(guide, 0, torch.arange(5) == 3)
    plan = bmrs.reduce(model, guide, {"5": law, "2": law})
    assert plan.kept["5"] == [*range(48), *range(64, 80)]
    own = float(plan.table[plan.table.layer == "2"].log_evidence_change[3:4].sum())
    assert plan.joint_evidence().log_evidence_change == pytest.approx(own, abs=1e-9)


def test_a_filter_that_something_else_reads_stays_without_its_positions():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.filters = nn.Conv2d(1, 3, 3), bmrs.MultiplicativeNoise(3)
            self.selection, self.positions = bmrs.InputSelection(48), bmrs.MultiplicativeNoise(48)
            self.other, self.output = nn.Conv2d(3, 2, 4), nn.Linear(48, 2)

        def forward(self, x):
            x = self.filters(torch.relu(self.conv(x)))
            return self.output(self.positions(self.selection(x.flatten(1)))) + self.other(x).flatten(1)

    torch.manual_seed(0)
    model, guide, _ = called(Branches())
    gone = {site: torch.zeros(layer.features) > 0 for site, layer in noise_layers(model).items()}
    plan = bmrs.reduce(model, guide, Given({**gone, "positions": torch.arange(48) < 16}))
    assert plan.kept["filters"] == [0, 1, 2]
    assert plan.apply().conv.out_channels == 3


def test_a_position_of_a_network_is_read_by_its_weights():
    net = network()
    model, guide, _ = called(net)
    table = bmrs.reduce(model, guide, bmrs.WeightNorm()).table
    scores = torch.tensor(table[table.layer == "5"].score.to_numpy())
    norms = net[6].weight.detach().double().square().mean(0).sqrt()
    assert torch.allclose(scores[0] - scores, norms - norms[0], atol=1e-12)


@pytest.mark.slow
@quick
@given(st.data(), st.integers(1, 4))
def test_any_plan_is_the_reduced_model(data, filters):
    """Against the noisy network at θ = E[θ] or 0, in place twice and at once."""
    model, guide, x = called(network(filters))
    masks = {}
    for site, layer in noise_layers(model).items():
        masks[site] = torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=layer.features, max_size=layer.features), label=site)
        )
    plan = bmrs.reduce(model, guide, Given(masks))
    small = plan.apply()  # raises unless it is equal
    plan.shrink(model, guide)
    again = bmrs.reduce(model, guide, bmrs.Random(fraction=0.0)).apply()
    assert torch.allclose(again(x), small(x), atol=1e-5)


@quick
@given(st.data())
def test_cuts_of_a_selection_one_after_the_other_are_those_at_once(data):
    def some_of(size):
        return sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size)))

    net = nn.Sequential(bmrs.InputSelection(9))
    whole = nn.Sequential(bmrs.InputSelection(9))
    steps = []
    for _ in range(2):
        selection = net[0]
        columns = some_of(selection.width)
        rows = [row for row in some_of(selection.features) if int(selection.index[row]) in columns]
        if not rows:
            return
        steps.append(Cuts({"0.index": {0: rows}}, {"0": columns}))
        steps[-1].cut(net)
    steps[0].then(steps[1]).cut(whole)
    assert torch.equal(net[0].index, whole[0].index)
    assert (net[0].width, net[0].features) == (whole[0].width, whole[0].features)
    x = torch.arange(float(net[0].width))[None]
    assert torch.equal(net(x), x[:, net[0].index])


def test_a_selection_can_not_read_what_it_is_no_longer_given():
    net = nn.Sequential(bmrs.InputSelection(4))
    with pytest.raises(ValueError, match="'0' passes on features that its input has lost"):
        Cuts(widths={"0": [0, 1]}).cut(net)
    assert net[0].width == 4


def test_two_noise_layers_on_one_structure_are_still_refused():
    net = nn.Sequential(
        nn.Linear(4, 5), bmrs.MultiplicativeNoise(5), bmrs.MultiplicativeNoise(5), bmrs.InputSelection(5),
        nn.Linear(5, 2),
    )  # fmt: skip
    with pytest.raises(StructureError, match="'1' and '2' are both tied to the same structures"):
        structure_groups(net, torch.zeros(2, 4))


def test_a_network_that_was_reduced_can_be_given_noise_again(reduced):
    small = reduced[1]
    x, _ = examples(20)
    found = bmrs.structures(small, x)
    assert found.groups["0"].kind == "filters" if small[0].out_channels > 1 else "0" not in found.groups
    noisy = bmrs.insert_noise(small, x)
    assert set(noise_layers(noisy)) == set(found.groups)


def test_which_filter_a_position_is_of():
    found = Nesting.of(structure_groups(network(3), examples(4)[0]).values())
    assert list(found.owners) == ["5"]
    assert found.owners["5"]["2"].tolist() == [filter for filter in range(3) for _ in range(16)]
    assert {site: enclosed.tolist() for site, enclosed in found.enclosed.items()} == {"2": [True] * 3}


@pytest.mark.parametrize(
    ("recipe", "shape", "kinds"),
    [
        ("lenet5", (1, 16, 16), {"filters": 4 + 5, "positions": 5, "units": 12 + 8}),
        ("lenet5_caffe", (1, 28, 28), {"filters": 4 + 5, "positions": 5 * 16, "units": 12}),
    ],
)
def test_recipes_select_positions(recipe, shape, kinds):
    from pyro_bmrs.runs.recipe import Recipe

    class Shape:
        input_shape, num_outputs = shape, 3

    widths = (4, 5, 12, 8)[: 4 if recipe == "lenet5" else 3]
    options = {"widths": widths, "select_positions": True}
    net = Recipe.read(MODELS / f"{recipe}.py").network(Shape, options, 0)
    counted = {}
    for group in bmrs.structures(bmrs.without_noise(net), torch.randn(16, *shape)):
        counted[group.kind] = counted.get(group.kind, 0) + group.features
    assert counted == kinds
