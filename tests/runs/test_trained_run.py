"""A run of trained weights: no fit, a path by evidence, a refit, and a folder that needs the given file no more."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import call
from safetensors.torch import load_file, save_file

import pyro_bmrs as bmrs
from pyro_bmrs.inference import evaluate
from pyro_bmrs.networks.export import save_weights
from pyro_bmrs.runs import fit_stage, reduce_stage
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A trained network's state dict, in two files."""
    folder = tmp_path_factory.mktemp("trained")
    data = bmrs.load_data("digits", limit=400)
    network = bmrs.without_noise(Recipe.read(RECIPE).network(data, {}, 0))
    bmrs.fit(
        bmrs.Classifier(network),
        None,
        data.train,
        epochs=5,
        learning_rate=1e-2,
        batch_size=32,
        progress=False,
    )
    torch.save(network.state_dict(), folder / "trained.pt")
    return save_weights(network, folder / "trained.safetensors")


def run(weights, out, *more):
    return call("run", RECIPE, "--weights", weights, "--out", out, "--limit", 400, "--quiet", *more)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """One finished run; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(weights, folder) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_each_step_has_its_row_and_the_full_one_is_the_trained_network(finished, weights):
    table = pd.read_csv(finished / "evaluation.csv").set_index("network")
    assert [*table.index] == ["full", "reduced", "refitted", "fine-tuned"]
    assert table.parameters["refitted"] == table.parameters["reduced"] < table.parameters["full"]
    data = bmrs.load_data("digits", limit=400)
    network = bmrs.without_noise(Recipe.read(RECIPE).network(data, {}, 1))
    network.load_state_dict(load_file(weights))
    accuracy = evaluate(bmrs.Classifier(network), data.test).accuracy
    assert accuracy > 0.5
    assert table.accuracy["full"] == pytest.approx(accuracy)
    assert pd.read_csv(finished / "history.csv").phase.tolist() == ["curvature", "fine-tune"]


def test_the_small_network_is_rebuilt_and_is_that_of_the_program(finished):
    current = Run(finished, progress=False)
    x = current.dataset.test[:16][0]
    small = current.small_network()
    program = torch.export.load(finished / "small.pt2").module()
    assert torch.allclose(small(x), program(x), atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == current.evaluation().parameters.iloc[-1]


def test_the_page_shows_the_path_and_tells_of_the_refit(finished):
    page, text = ((finished / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "total ΔF (nats)" in page
    assert "loc of log θ" not in page  # structures of weights have none
    assert "refitted" in text
    assert "fitted by ridge regression to what the full network has" in text
    assert str(Path.home()) not in page
    assert "trained.safetensors" in page


def test_called_again_it_is_complete(finished, weights, capsys):
    assert run(weights, finished) == 0
    assert "already holds this run, complete" in capsys.readouterr().out


def test_a_pt_file_gives_the_same_plan(finished, weights, tmp_path):
    assert run(weights.with_suffix(".pt"), tmp_path / "run", "--fine-tune", 0) == 0
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (finished, tmp_path / "run")]
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_a_later_reduction_is_that_of_a_new_run_and_needs_the_file_no_more(weights, copied, tmp_path):
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    first = tmp_path / "first"
    assert run(moved, first, "--min-kept", 4, "--fine-tune", 0) == 0
    Path(moved).unlink()
    assert call("reduce", first, "--min-kept", 2, "--quiet") == 0
    assert call("report", first, "--quiet") == 0
    second = tmp_path / "second"
    assert run(weights, second, "--min-kept", 2, "--fine-tune", 0) == 0
    plans = [bmrs.LaplacePlan.load(folder / "plan.json") for folder in (first, second)]
    pd.testing.assert_frame_equal(plans[0].path, plans[1].path, rtol=1e-6)
    pd.testing.assert_frame_equal(plans[0].table, plans[1].table, rtol=1e-6)
    small = [load_file(folder / "small.safetensors") for folder in (first, second)]
    assert all(torch.allclose(small[0][name], small[1][name], atol=1e-5) for name in small[0])


@pytest.mark.slow
def test_interrupted_in_the_reduction_it_goes_on_without_another_pass(weights, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reduce_stage, "reduce_by_laplace", stop)
        assert run(weights, tmp_path / "run") == 130
    assert "the fit is kept" in capsys.readouterr().err
    monkeypatch.setattr(fit_stage, "fit", stop)
    assert run(weights, tmp_path / "run", "--fine-tune", 0) == 0


def test_other_weights_are_refused_and_the_same_ones_elsewhere_are_not(weights, copied, tmp_path, capsys):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(weights, moved)
    assert run(moved, copied, "--fine-tune", 0) == 0
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, moved)
    capsys.readouterr()
    assert run(moved, copied) == 2
    assert "holds a fit with other settings (weights " in capsys.readouterr().err
    assert call("run", RECIPE, "--out", copied, "--limit", 400) == 2


def test_what_cannot_be_read_or_used_is_refused_before_any_work(weights, tmp_path, capsys):
    network = bmrs.without_noise(Recipe.read(RECIPE).network(bmrs.load_data("digits"), {"units": 10}, 0))
    torch.save(network, tmp_path / "whole.pt")
    torch.save({"model": network.state_dict()}, tmp_path / "nested.pt")
    torch.save(network.state_dict(), tmp_path / "narrow.pt")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:500])
    bad = {name: tensor.clone().fill_(float("nan")) for name, tensor in load_file(weights).items()}
    save_file(bad, tmp_path / "nan.safetensors")
    cases = {
        "missing.pt": "weights must be a file that can be read",
        "weights.onnx": "weights must be a file that ends in .safetensors, .pt, .pth",
        "whole.pt": "must hold tensors alone",
        "nested.pt": "must hold a state_dict, real tensors by name: it holds a dict of 'model'",
        "narrow.pt": "must be those of the recipe's network without noise",
        "cut.safetensors": "can't be read",
        "nan.safetensors": "must have finite parameters",
    }
    for name, said in cases.items():
        assert run(tmp_path / name, tmp_path / "run") == 2
        assert said in capsys.readouterr().err, name
    for option, value in (("--kl-weight", 3), ("--epochs", 5), ("--criterion", "SNR"), ("--draws", 200)):
        assert run(weights, tmp_path / "run", option, value) == 2
        assert f"{option[2:].replace('-', '_')} must be left out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_later_reduction_by_a_criterion_is_refused(copied, capsys):
    assert call("reduce", copied, "--criterion", "SNR") == 2
    assert "criterion must be left out where weights are given" in capsys.readouterr().err


def test_it_is_shown_and_compared_with_a_run_that_was_fitted(finished, tmp_path, capsys):
    fitted = tmp_path / "fitted"
    assert call("run", RECIPE, "--out", fitted, "--limit", 200, "--quiet", "--draws", 0) == 0
    assert call("show", finished) == 0
    assert "weights trained.safetensors" in " ".join(capsys.readouterr().out.split())
    assert call("show", finished, fitted) == 0
    assert call("report", finished, fitted, "--out", tmp_path / "both.html") == 0
    table = pd.read_csv(tmp_path / "both.csv")
    assert table.criterion.tolist() == ["laplace_loss_per_parameter", "BMRS_N"]
    assert table.kl_weight.isna().tolist() == [True, False]
