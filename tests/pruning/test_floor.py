"""A share of each layer's original structures as the floor: a deep threshold must not collapse a layer."""

import json
import warnings

import pytest
import torch
from support.diagnosed import make_plan
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import NetworkPlan
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.runs.settings import RunSettings

# of the wide layer all would go below -5, of the narrow one none
SCORES = {"narrow": [-900.0] * 9 + [-1.0], "wide": [-5.0 - number for number in range(64)]}


def test_a_layer_that_would_collapse_keeps_its_share():
    assert make_plan(SCORES).at(-300).widths().after.tolist() == [9, 1]
    plan = make_plan(SCORES, min_kept=0.125).at(-300)
    assert plan.widths().after.tolist() == [9, 8]
    assert plan.kept["wide"] == list(range(56, 64))  # those with the lowest scores
    assert "at the floor of 12.5 % of its structures kept: wide" in plan.summary()


@pytest.mark.parametrize(
    ("share", "structures", "least"),
    [(0.07, 100, 7), (0.1, 30, 3), (0.5, 3, 2), (1e-12, 5, 1), (0.99, 10, 10)],
)
def test_a_share_is_rounded_up(share, structures, least):
    assert bmrs.Rule(criterion="own", min_kept=share).floor(structures) == least


def test_the_share_is_of_the_original_structures_and_comes_before_rounding():
    gone = [("wide", unit) for unit in range(32)]
    assert make_plan(SCORES, gone=gone, min_kept=0.125).at(-300).widths().after.tolist() == [9, 8]
    assert make_plan(SCORES, gone=gone, min_kept=0.75).at(-300).widths().after.tolist() == [9, 32]
    rounded = make_plan(SCORES, min_kept=0.13, round_to=4).at(-300)
    assert rounded.widths().after.tolist() == [10, 12]  # 9 and 9, as multiples of 4 where there are enough


def test_it_is_saved_and_loaded(tmp_path):
    plan = make_plan(SCORES, min_kept=0.125).at(-300)
    loaded = NetworkPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.rule == plan.rule
    assert loaded.at(-400).widths().after.tolist() == [9, 8]
    assert json.loads((tmp_path / "plan.json").read_text())["rule"]["min_kept"] == 0.125


def test_of_structures_inside_others_both_keep_their_share():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), bmrs.InputSelection(8 * 16), nn.Linear(128, 2)
    )
    x = torch.randn(4, 1, 6, 6)
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, torch.zeros(4, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N(), min_kept=0.25).at(-1e9)
    assert plan.widths().after.tolist() == [2, 32]
    assert plan.apply()(x).shape == (4, 2)


def test_removal_during_the_fit_keeps_the_share_of_the_original():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 2))
    data = torch.utils.data.TensorDataset(torch.randn(64, 5), torch.randint(2, (64,)))
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(
        model, guide, data, epochs=40, kl_weight=500.0, posterior_learning_rate=0.5, criterion=bmrs.BMRS_N(),
        removal="epoch", min_kept=0.25, keep_best=False,
    )  # fmt: skip
    assert noise_layers(model)["2"].features == 4


def test_a_collapsed_layer_is_told_of_with_the_advice():
    deep = make_plan(SCORES).at(-300)
    assert "give reduce a floor, such as min_kept=0.125" in deep.summary()
    with pytest.warns(
        UserWarning,
        match=r"^wide: one structure is left of a layer.*: give reduce a floor, such as min_kept=0\.125$",
    ):
        deep.apply()
    for plan in (make_plan(SCORES).at(0.0), make_plan(SCORES, min_kept=2).at(-300), make_plan(SCORES).at(-2)):
        assert "give reduce a floor" not in plan.summary()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan.apply()


def test_the_setting_is_a_number_or_a_share():
    assert RunSettings(min_kept=0.125).min_kept == 0.125
    assert [RunSettings.read("min_kept", text) for text in ("0.125", "3")] == [0.125, 3]
    assert RunSettings.model_validate_json(RunSettings(min_kept=0.5).model_dump_json()).min_kept == 0.5
    for bad in (0, -1, 1.0, 1.5, 0.0, True, "3", None):
        words = rf"^min_kept must be an integer of at least 1, or a share between 0 and 1: got {bad!r}$"
        with pytest.raises(ValueError, match=words):
            RunSettings(min_kept=bad)
