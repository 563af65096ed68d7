"""The settings: what they take, what they refuse and how, and what follows from them alone."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from command_line import call
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.fitting.optimizer import make_optimizer
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.settings import RunSettings
from pyro_bmrs.runs.study import Study


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(epochs=0), "epochs must be greater than or equal to 1: got 0"),
        (dict(epochs=True), "epochs must be a whole number: got True"),
        (dict(epochs="3"), "epochs must be a whole number: got '3'"),
        (dict(epochs=3.0), "epochs must be a whole number: got 3.0"),
        (dict(epochs=None), "epochs must be a whole number: got None"),
        (dict(kl_weight=False), 'kl_weight must be a finite number of 0 or more, or "auto": got False'),
        (dict(kl_weight="1"), "kl_weight must be a finite number of 0 or more, or \"auto\": got '1'"),
        (dict(kl_weight=float("inf")), 'kl_weight must be a finite number of 0 or more, or "auto": got inf'),
        (dict(gradient_clip=0), "gradient_clip must be greater than 0 or None: got 0"),
        (dict(patience=2.5), "patience must be a whole number or None: got 2.5"),
        (dict(stratified=1), "stratified must be True or False: got 1"),
        (dict(precision=32), "precision must be '32' or 'bf16-mixed': got 32"),
        (dict(removal="mask"), "removal must be 'end' or 'epoch': got 'mask'"),
        (dict(schedule="step"), "schedule must be one of constant, cosine, linear or a function: got 'step'"),
        (
            dict(criterion="SNR", prior_log_odds=0.0),
            "prior_log_odds goes with BMRS_N and BMRS_U only: .* SNR",
        ),
        (dict(criterion=bmrs.SNR(), prior_log_odds=0.0), "prior_log_odds must be None beside a criterion"),
        (dict(warm_up=2, seed=-1), "warm_up must be less than or equal to 1: got 2; seed must be .*: got -1"),
        (dict(epoch=3), "settings must be among epochs, batch_size, .*: got 'epoch'"),
    ],
)
def test_a_bad_value_is_one_line(given, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        bmrs.Settings(**given)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^{message}"):
        bmrs.Settings().changed(**given)


def test_they_cant_be_changed_in_place():
    settings = bmrs.Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.epochs = 3


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("kl_weight", "1e2", 100.0),
        ("draws_per_batch", "none", None),
        ("round_to", "none", None),
        ("stratified", "false", False),
        ("precision", "32", "32"),
        ("network", '{"widths": [3, 4]}', {"widths": [3, 4]}),
        ("data", "none", "none"),
    ],
)
def test_a_text_stands_for_a_value(name, text, value):
    assert RunSettings.read(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epochs", "0", "epochs must be greater than or equal to 1: got 0"),
        ("epochs", "none", "epochs must be a whole number: got 'none'"),
        ("epochs", "2.5", "epochs must be a whole number: got '2.5'"),
        ("learning_rate", "nan", "learning_rate must be a finite number: got nan"),
        ("network", "{3", "network must be JSON: got '{3'"),
    ],
)
def test_a_bad_text_is_one_line(name, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        RunSettings.read(name, text)


def test_not_given_and_none_are_two_things():
    settings = RunSettings(gradient_clip=None, epochs=30)
    assert settings == RunSettings()
    assert settings.given() == {"gradient_clip": None, "epochs": 30}
    assert RunSettings(patience=3).changed(patience=None).patience is None
    assert (
        RunSettings(criterion="BMRS_N", prior_log_odds=0).changed(criterion="BMRS_U").prior_log_odds is None
    )
    assert RunSettings(prior_log_odds=0.5).changed(epochs=3).prior_log_odds == 0.5


def halved(done):
    return 1 - done / 2


def test_they_are_stable_text_in_json():
    settings = bmrs.Settings(criterion=bmrs.SNR(2.0), schedule=halved, kl_weight=3)
    document = settings.model_dump(mode="json")
    assert json.loads(json.dumps(document)) == document
    assert document["criterion"] == "SNR(threshold=2.0)"
    assert document["schedule"].endswith("test_settings.halved")
    assert document["kl_weight"] == 3.0
    settings = RunSettings(network={"widths": (3, 4)}, criterion="SNR")
    assert RunSettings(**json.loads(settings.model_dump_json())) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_each_group_of_parameters_has_its_rate_and_decay():
    model = bmrs.Regressor(nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3), nn.Linear(3, 1)))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(torch.zeros(4, 2), torch.zeros(4, 1))
    settings = bmrs.Settings(learning_rate=0.1, weight_decay=0.3)
    groups = make_optimizer(model, guide, settings).param_groups
    assert {group["of"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "others": (0.1, 0.0), "weights": (0.1, 0.3), "posterior": (5e-3, 0.0),
    }  # fmt: skip


def test_what_follows_from_them():
    settings = bmrs.Settings(schedule="linear", warm_up=0.5)
    assert [settings.rate_factor(done) for done in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [settings.kl_factor(step, 8) for step in (0, 2, 3, 7)] == [0.25, 0.75, 1, 1]
    assert bmrs.Settings(warm_up=0).kl_factor(0, 8) == 1
    assert settings.made_criterion() == bmrs.BMRS_N()
    assert settings.changed(prior_log_odds=0).made_criterion() == bmrs.BMRS_N(prior_log_odds=0)
    assert settings.changed(criterion=bmrs.SNR()).made_criterion() == bmrs.SNR()
    with pytest.raises(ValueError, match="schedule must give finite factors of 0 or more: got -1"):
        settings.changed(schedule=lambda done: -1).rate_factor(0)


def test_the_small_network_is_tuned_with_what_is_not_about_a_posterior():
    run = RunSettings(
        epochs=9, fine_tune=4, batch_size=16, weight_decay=0.1, criterion="SNR", patience=2, removal="epoch",
        elbo="packed", seed=3, data="mnist",
    )  # fmt: skip
    assert run.of_fine_tuning().given() == {
        "epochs": 4, "batch_size": 16, "weight_decay": 0.1, "seed": 3, "schedule": "cosine",
    }  # fmt: skip
    assert RunSettings(fine_tune=4).of_fine_tuning().weight_decay == RunSettings().weight_decay == 0.05


def test_what_a_fitted_posterior_depends_on():
    run = RunSettings(round_to=8, min_kept=2)
    assert not run.of_fit().keys() & {"round_to", "min_kept", "criterion", "fine_tune", "recalibrate"}
    assert run.of_fit() == RunSettings().of_fit()
    assert run.changed(removal="epoch").of_fit()["min_kept"] == 2
    assert run.changed(kl_weight=3).of_fit() != run.of_fit()


def test_every_setting_says_what_it_is():
    for name, field in RunSettings.model_fields.items():
        assert field.description.endswith("."), name


def test_the_documentation_lists_every_setting(monkeypatch):
    docs = Path(__file__).parents[2] / "docs"
    monkeypatch.syspath_prepend(docs / "tools")
    import hooks

    assert hooks.SETTINGS.search((docs / "settings.md").read_text())
    table = "\n".join(hooks.table_of_settings())
    for name, field in RunSettings.model_fields.items():
        assert f"| `{name}` | `{field.default}` |" in table


def test_learning_rates_warm_up():
    """A setting that only this file and its own know by name: everything else takes it from the field."""
    settings = bmrs.Settings(rate_warm_up=0.5)
    assert [settings.rate_factor(done) for done in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1]
    assert settings.changed(schedule="linear").rate_factor(0.25) == 0.5 * 0.75
    x = torch.randn(20, 3)
    ends = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = bmrs.Classifier(nn.Linear(3, 2))
        start = model.net.weight.detach().clone()
        bmrs.fit(model, None, (x, (x[:, 0] > 0).long()), epochs=1, rate_warm_up=share, progress=False)
        ends.append((start, model.net.weight.detach()))
    assert not torch.equal(*ends[0])
    assert torch.equal(*ends[1])  # of a single step, at a rate of 0


def test_a_setting_is_known_to_command_line_recipes_and_studies(tmp_path):
    text = (Path(__file__).parents[1] / "tiny_recipe.py").read_text()
    recipe = tmp_path / "warm.py"
    recipe.write_text(text.replace('"limit": 200', '"limit": 200, "rate_warm_up": 0.2'))
    line = ["fit", recipe, "--out", tmp_path / "run", "--quiet", "--epochs", "1"]
    assert call(*line) == 0
    assert Run(tmp_path / "run").settings.rate_warm_up == 0.2
    assert call(*line, "--overwrite", "--rate-warm-up", "0.1") == 0
    assert Run(tmp_path / "run").settings.rate_warm_up == 0.1
    study = tmp_path / "study.yaml"
    study.write_text("{out: out, recipes: warm.py, data: digits, settings: {rate_warm_up: 0.4}}")
    (cell,) = Study.read(study).cells
    assert cell.settings.rate_warm_up == 0.4
