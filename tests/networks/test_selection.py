"""Input features as structures: what a network need not read."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.surgery import remove_structures

MODELS = Path(__file__).parents[2] / "models"

NEEDED = [2, 5]


def examples(count=600):
    """Ten features, of which two say the class and one is constant."""
    x = torch.randn(count, 10, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 0.0
    return x, (x[:, 2] * x[:, 5] > 0).long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        bmrs.InputSelection(10), bmrs.MultiplicativeNoise(10),
        nn.Linear(10, 16), nn.Tanh(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 2),
    )  # fmt: skip


@pytest.fixture
def cut():
    """The network without the features that say nothing."""
    kept = {"1": torch.isin(torch.arange(10), torch.tensor(NEEDED)), "4": torch.ones(16, dtype=torch.bool)}
    ones = {site: torch.ones(len(some), dtype=torch.float64) for site, some in kept.items()}
    return remove_structures(network(), kept, ones, examples(8)[0]).network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("removal", ["end", "epoch"])
def test_the_features_that_say_nothing_go(removal):
    """At the end of the fit, or in it."""
    model = bmrs.Classifier(network())
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, examples(), epochs=60, batch_size=50, learning_rate=1e-2, posterior_learning_rate=5e-2,
        kl_weight=2.0, removal=removal, criterion=bmrs.BMRS_N(), seed=1, progress=False,
    )  # fmt: skip
    small = bmrs.reduce(model, guide, bmrs.BMRS_N()).apply()
    assert small[0].index.tolist() == NEEDED
    assert small[2].weight.shape[1] == 2
    x, y = examples(200)
    assert (small(x).argmax(1) == y).float().mean() > 0.9


def test_the_small_network_takes_the_whole_input_and_ignores_the_rest(cut):
    x, _ = examples(20)
    changed = x.clone()
    changed[:, [i for i in range(10) if i not in NEEDED]] = 1e3
    assert torch.equal(cut(x), cut(changed))
    with pytest.raises(ValueError, match="input must have 10 features in dimension 1: got shape"):
        cut(x[:, NEEDED])


def test_it_is_exported_and_saved(cut, tmp_path):
    from pyro_bmrs.networks.export import export_program, load_weights, save_weights

    x, _ = examples(7)
    program = torch.export.load(export_program(cut, x, tmp_path / "small.pt2")).module()
    assert torch.allclose(program(x), cut(x))
    assert load_weights(save_weights(cut, tmp_path / "small.safetensors"))["0.index"].tolist() == NEEDED


def test_a_single_feature_is_measured_after_a_shrink():
    net = nn.Sequential(
        bmrs.InputSelection(1), nn.Linear(1, 5), nn.ReLU(), bmrs.MultiplicativeNoise(5), nn.Linear(5, 2)
    )
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(torch.randn(10, 1), torch.zeros(10, dtype=torch.long))
    bmrs.reduce(model, guide, bmrs.Random(fraction=0.4)).shrink(model, guide)
    plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.0))
    assert plan.costs(plan.apply(), seconds=0.0).before["parameters"] == 22


def test_the_norm_of_a_feature_is_that_of_the_weights_that_read_it():
    x, y = examples(10)
    net = network()
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    plan = bmrs.reduce(model, guide, bmrs.WeightNorm())
    scores = torch.tensor(plan.table[plan.table.layer == "1"].score.to_numpy())  # the bar less the norm
    norms = net[2].weight.detach().double().square().mean(0).sqrt()
    assert torch.allclose(scores[0] - scores, norms - norms[0], atol=1e-12)


@pytest.mark.parametrize(
    ("net", "x", "rows"),
    [
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)),
         torch.randn(4, 2, 6, 6), lambda net: net[0].weight.movedim(1, 0)),
        (nn.Sequential(bmrs.InputSelection(4), nn.ConvTranspose2d(4, 5, 3), nn.Flatten(), nn.Linear(320, 2)),
         torch.randn(4, 4, 6, 6), lambda net: net[1].weight),
        (nn.Sequential(bmrs.InputSelection(4), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 2)),
         torch.randn(4, 4, 6, 6),  # channels 0 and 2 go together, and 1 and 3
         lambda net: net[1].weight.movedim(1, 0)),
    ],
    ids=["transposed", "read by transposed", "read by grouped"],
)  # fmt: skip
def test_the_norm_of_a_structure_is_that_of_its_own_weights(net, x, rows):
    noisy = bmrs.insert_noise(net, x)
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, torch.zeros(len(x), dtype=torch.long))
    table = bmrs.reduce(model, guide, bmrs.WeightNorm()).table
    scores = torch.tensor(table[table.layer == table.layer.iloc[0]].score.to_numpy())
    norms = rows(net).detach().double().flatten(1).square().mean(1).sqrt()
    assert torch.allclose(scores[0] - scores, norms - norms[0], atol=1e-12)


def test_the_mlp_recipe_selects_its_inputs():
    from pyro_bmrs.runs.recipe import Recipe

    class Shape:
        input_shape, num_outputs = (1, 4, 4), 3

    recipe = Recipe.read(MODELS / "mlp.py")
    net = recipe.network(Shape, {"widths": (5,)}, 0)
    found = bmrs.structures(bmrs.without_noise(net), torch.randn(16, 1, 4, 4))
    assert {group.kind: group.features for group in found} == {"inputs": 16, "units": 5}
