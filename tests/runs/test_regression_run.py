"""Runs of regressions: from targets in a file to the page, predictions in their units, and exports."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from command_line import call
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.metrics import root_mean_squared_error

import pyro_bmrs as bmrs
from pyro_bmrs.networks.export import save_weights
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run

MLP = Path(__file__).parents[2] / "models" / "mlp.py"
SMALL = '{"widths": [12]}'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Friedman-1 with two targets in different units, in an .npz file with names."""
    folder = tmp_path_factory.mktemp("regression")
    x, y = make_friedman1(300, n_features=7, noise=1.0, random_state=0)
    y = np.stack([y, 100 * y + 7], 1)
    np.savez(
        folder / "friedman.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:],
        target_names=np.array(["yield", "cost"]), feature_names=np.array([f"field {n}" for n in range(7)]),
    )  # fmt: skip
    return folder


def run(data, out, *more):
    return call("run", MLP, "--data", data, "--network", SMALL, "--out", out, "--quiet", *more)


@pytest.fixture(scope="module")
def finished(place):
    assert (
        run(place / "friedman.npz", place / "run", "--epochs", 30, "--parameters", "60%", "--baseline") == 0
    )
    return place / "run"


@pytest.fixture(scope="module")
def raw(place):
    with np.load(place / "friedman.npz") as arrays:
        return {name: arrays[name] for name in arrays}


def test_errors_are_in_the_units_of_the_targets(finished, raw, tmp_path, capsys):
    np.save(tmp_path / "x.npy", raw["x_test"])
    assert call("predict", finished, "--inputs", tmp_path / "x.npy", "--out", tmp_path / "y.csv") == 0
    predicted = pd.read_csv(tmp_path / "y.csv")
    assert list(predicted) == ["yield", "cost"]
    last = pd.read_csv(finished / "evaluation.csv").iloc[-1]
    assert np.isnan(last.accuracy)
    own = np.sqrt(((predicted.to_numpy() - raw["y_test"]) ** 2).mean())
    assert last.rmse == pytest.approx(own, rel=1e-4)
    assert last.rmse < 0.9 * raw["y_test"].std()
    assert 0 < last.rmse_error < last.rmse / 3


def test_the_diagnosis_and_the_frontier_tell_the_same_error(finished):
    table = pd.read_csv(finished / "evaluation.csv").set_index("network")
    found = Run(finished, progress=False).diagnosis()
    assert found.quality is None
    regression = found.regression.set_index(["network", "prediction"])
    for name in ("full", "reduced"):
        own = table.rmse["full, E[θ]" if name == "full" else name]
        assert regression.rmse[name, "E[θ]"] == pytest.approx(own, rel=1e-4)
    frontier = pd.read_csv(finished / "frontier.csv")
    assert frontier.rmse.notna().all()
    assert frontier.rmse.iloc[0] < frontier.rmse.iloc[-1]  # all inputs are better than none


def test_the_page_speaks_of_errors_and_of_inputs_by_name(finished):
    text = (finished / "report.md").read_text()
    assert "accuracy" not in text
    assert "test root mean square error" in text
    assert "of the full network trained as long" in text
    assert "its error is" in text
    assert "Inputs kept: field " in text
    plan = Run(finished, progress=False).plan()
    kept = plan.table[(plan.table.layer == "inputs") & ~plan.table.removed].unit
    line = next(line for line in text.splitlines() if line.startswith("Inputs kept"))
    kept_names = line.removeprefix("Inputs kept: ").rstrip(".").partition("; removed")[0].split(", ")
    assert sorted(kept_names) == [f"field {unit}" for unit in kept]
    assert "field 3" in (finished / "report.html").read_text()


def test_folded_programs_give_targets_from_raw_inputs(finished, raw, tmp_path):
    path = tmp_path / "small.onnx"
    assert call("export", finished, "--fold-preprocessing", "--out", path) == 0
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: raw["x_test"].astype(np.float32)})
    table = pd.read_csv(finished / "evaluation.csv")
    rmse = np.sqrt(((found - raw["y_test"]) ** 2).mean())
    assert rmse == pytest.approx(table.rmse.iloc[-1], rel=1e-4)
    assert '"names": ["yield", "cost"]' in session.get_modelmeta().custom_metadata_map["inputs"]


@pytest.fixture(scope="module")
def trained(place):
    """A network that was trained elsewhere, and what it says."""
    data = bmrs.load_data(place / "friedman.npz")
    network = bmrs.without_noise(Recipe.read(MLP).network(data, {"widths": (12,)}, 0))
    settings = {"epochs": 40, "learning_rate": 1e-2, "batch_size": 32, "progress": False}
    bmrs.fit(bmrs.Regressor(network), None, data.train, **settings)
    return save_weights(network, place / "trained.safetensors"), network.eval(), data


def test_a_trained_regression_is_the_full_network_of_its_run(trained, place, tmp_path):
    weights, network, data = trained
    out = tmp_path / "run"
    network_of = '{"widths": [12]}'
    more = ("--network", network_of, "--weights", weights, "--out", out, "--quiet", "--loss-rise", 0.05)
    assert call("run", MLP, "--data", place / "friedman.npz", *more) == 0
    table = pd.read_csv(out / "evaluation.csv").set_index("network")
    restored = data.preparation.targets.restored
    x, y = data.test.tensors
    own = float((restored(network(x)) - restored(y)).detach().square().mean().sqrt())
    assert table.rmse["full"] == pytest.approx(own, rel=1e-4)
    assert table.parameters.iloc[-1] < table.parameters["full"]


def test_points_of_accuracy_are_refused(trained, place, tmp_path, capsys):
    more = ("--weights", trained[0], "--out", tmp_path / "run", "--quiet", "--accuracy-drop", 1)
    assert call("run", MLP, "--data", place / "friedman.npz", "--network", '{"widths": [12]}', *more) == 2
    assert "give loss_rise" in capsys.readouterr().err
    assert not (tmp_path / "run" / "posterior.safetensors").exists()  # before any work
    assert run(place / "friedman.npz", tmp_path / "fit", "--epochs", 1, "--accuracy-drop", 1) != 0
    assert not (tmp_path / "fit" / "history.csv").exists()


def test_the_smaller_of_two_level_regressions_is_named(finished, place, tmp_path, capsys):
    other = Path(shutil.copytree(finished, tmp_path / "larger"))
    table = pd.read_csv(other / "evaluation.csv")
    table.loc[table.index[-1], "parameters"] += 10
    table.to_csv(other / "evaluation.csv", index=False)
    assert call("report", finished, other, "--out", tmp_path / "both.html") == 0
    text = (tmp_path / "both.md").read_text()
    assert "the smallest that is as good as the best, run, has an RMSE of" in text


def test_diabetes_comes_with_names_and_needs_no_files():
    data = bmrs.load_data("diabetes")
    sizes = [len(part) for part in (data.train, data.validation, data.test)]
    assert sum(sizes) == 442
    assert sizes == [283, 71, 88]
    every = torch.cat([part.tensors[1] for part in (data.train, data.validation, data.test)])
    restored = data.preparation.targets.restored(every).flatten().sort().values
    assert np.allclose(restored, np.sort(load_diabetes().target), atol=1e-3)
    assert data.preparation.feature_names[2] == "bmi"
    mean, deviation = data.train.tensors[1].mean(), data.train.tensors[1].std(correction=0)
    assert abs(mean) < 1e-5
    assert float(deviation) == pytest.approx(1, abs=1e-5)


def test_a_limit_and_seeds_of_a_regression():
    first, again, other = (bmrs.load_data("diabetes", limit=50, seed=seed) for seed in (0, 0, 1))
    assert len(first.train) + len(first.validation) == 50
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(first.train.tensors[1], other.train.tensors[1])
    assert torch.equal(
        first.preparation.targets.restored(first.test.tensors[1]).round(),
        other.preparation.targets.restored(other.test.tensors[1]).round(),
    )


def test_unit_scales_errors_and_not_the_likelihood():
    torch.manual_seed(0)
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    net = torch.nn.Linear(3, 1)
    plain, worth = (bmrs.Regressor(net, scale=1.0, unit=unit) for unit in (1.0, torch.tensor([[20.0]])))
    found = [bmrs.inference.evaluate(model, (x, y)) for model in (plain, worth)]
    own = root_mean_squared_error(y, net(x).detach())
    assert [one.rmse for one in found] == pytest.approx([own, 20 * own])
    assert found[0].loss == found[1].loss
    with pytest.raises(ValueError, match="unit must be positive and finite"):
        bmrs.Regressor(net, unit=0.0)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_scale_of_a_trained_regression_is_its_error(held_out):
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), torch.randn(60, 1)
    validation = (torch.randn(40, 3), 3 * torch.randn(40, 1))
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    model = bmrs.Regressor(net)
    guide = bmrs.AutoKroneckerLaplace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bmrs.fit(model, guide, (x, y), validation if held_out else None, batch_size=16, progress=False)
    given = validation if held_out else (x, y)
    own = root_mean_squared_error(given[1], net(given[0]).detach())
    assert float(model.log_scale.detach().exp()) == pytest.approx(own, rel=1e-5)
    fixed = bmrs.Regressor(net, scale=2.0)
    bmrs.fit(fixed, bmrs.AutoKroneckerLaplace(fixed), (x, y), batch_size=16, progress=False)
    assert float(fixed.log_scale.exp()) == pytest.approx(2.0)
