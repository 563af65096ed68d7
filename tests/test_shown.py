"""What a notebook shows of a result, and what another process gets of it: the words of `print`, and all of it."""

import pickle

import pandas as pd
import pytest
import torch
from support.diagnosed import make_plan
from torch import nn

import pyro_bmrs as bmrs


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    fit = bmrs.fit(
        model, guide, (x, y), validation=(x, y), epochs=15, batch_size=16, kl_weight=30.0, learning_rate=0.05,
        posterior_learning_rate=0.4, criterion=bmrs.BMRS_N(), keep_best=False,
    )  # fmt: skip
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    return {
        "plan": plan, "fit": fit, "settings": fit.settings, "rule": plan.rule, "structures": bmrs.structures(net, x),
        "diagnosis": bmrs.Diagnosis(khat=pd.DataFrame({"khat": [0.3]}), facts={"draws": 100}, notes=["no elbo: why"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plan", "fit", "structures", "diagnosis"])
def test_a_notebook_shows_what_print_says(results, name):
    assert repr(results[name]) == str(results[name])
    assert len(repr(results[name])) < 800


def test_a_long_one_fits_on_a_screen():
    plan = make_plan({f"layer {number}": [-1.0, 2.0] for number in range(60)})
    assert len(str(plan).splitlines()) > 60
    assert len(repr(plan).splitlines()) == 24
    assert repr(plan).splitlines()[:3] == str(plan).splitlines()[:3]
    assert repr(plan).endswith("more lines: print it")


@pytest.mark.parametrize("name", ["plan", "fit", "settings", "rule", "structures", "diagnosis"])
def test_each_goes_to_another_process_and_back(results, name):
    again = pickle.loads(pickle.dumps(results[name]))
    assert repr(again).splitlines()[0] == repr(results[name]).splitlines()[0]
    for table in ("table", "history", "removals", "khat"):
        if isinstance(getattr(again, table, None), pd.DataFrame):
            pd.testing.assert_frame_equal(getattr(again, table), getattr(results[name], table))


def test_a_fit_counts_what_reduce_keeps(results):
    kept = sum(map(len, results["plan"].kept.values()))
    assert 0 < kept < 8
    assert f", {kept} structures kept" in str(results["fit"])


def test_a_fit_names_no_number_that_it_does_not_have():
    x = torch.randn(32, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    tuned = str(bmrs.fit(bmrs.Regressor(net), None, (x, x[:, :1]), validation=(x, x[:, :1]), epochs=1))
    assert "Fit of 1 epoch;" in tuned
    model = bmrs.Regressor(bmrs.insert_noise(net, x))
    fitted = str(
        bmrs.fit(model, bmrs.AutoTruncatedLogNormal(model), (x, x[:, :1]), validation=(x, x[:, :1]), epochs=2)
    )
    for text in (tuned, fitted):
        assert "nan" not in text
        assert "accuracy" not in text
    assert "structures" not in tuned
    assert "8 structures kept" in fitted


@pytest.mark.parametrize("criterion", [bmrs.Random(0.0), bmrs.WeightNorm(0.0), bmrs.SNR(1e-9)])
def test_without_evidence_there_is_no_advice_about_the_fit(criterion):
    x = torch.randn(8, 4)
    model = bmrs.Classifier(bmrs.insert_noise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, torch.zeros(8, dtype=torch.long))
    assert str(bmrs.reduce(model, guide, criterion)).splitlines()[-1] == "  nothing to remove"
