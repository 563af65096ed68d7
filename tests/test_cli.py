"""The command line: what a mistake is answered with, and what a recipe may decide for itself."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import call

from pyro_bmrs import cli
from pyro_bmrs.data import load_data
from pyro_bmrs.runs import fit_stage
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.settings import OF_REDUCTION, RunSettings

RECIPE = Path(__file__).with_name("tiny_recipe.py")

NETWORK = """
from torch import nn
from pyro_bmrs import MultiplicativeNoise
SETTINGS = {"default": {"epochs": 1, "limit": 50}}
def network(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, num_classes)
    )
"""
BAD_RECIPES = {
    "empty": "",
    "syntax": "def network(:",
    "raises": "import a_module_that_is_not_there",
    "exits": "raise SystemExit(3)",
    "no_network": "SETTINGS = {}",
    "no_settings": "def network(*_): ...",
    "settings_list": "SETTINGS = []\ndef network(*_): ...",
    "settings_entry": "SETTINGS = {'default': 3}\ndef network(*_): ...",
    "settings_name": "SETTINGS = {'default': {'epoch': 3}}\ndef network(*_): ...",
    "settings_network": "SETTINGS = {'default': {'network': [3]}}\ndef network(*_): ...",
    "settings_json": "SETTINGS = {'default': {'network': {'kind': print}}}\ndef network(*_): ...",
    "settings_option": "SETTINGS = {'default': {'network': {'depth': 3}}}\ndef network(shape, classes): ...",
    "settings_text": NETWORK.replace('"epochs": 1', '"epochs": "many"'),
    "network_raises": "SETTINGS = {}\ndef network(*_): return {}['key']",
    "network_none": "SETTINGS = {}\ndef network(*_): ...",
    "model_raises": f"{NETWORK}\ndef model(network): return network.nothing",
    "model_none": f"{NETWORK}\ndef model(network): ...",
    "guide_raises": f"{NETWORK}\ndef guide(model): assert False, 'no guide'",
    "guide_none": f"{NETWORK}\ndef guide(model): ...",
    "no_noise": NETWORK.replace("MultiplicativeNoise(8)", "nn.Identity()"),
    "forward_raises": NETWORK.replace("nn.Linear(64, 8)", "nn.Linear(63, 8)"),
    "noise_width": NETWORK.replace("MultiplicativeNoise(8)", "MultiplicativeNoise(9)"),
    "noise_at_output": NETWORK.replace("\n    )", ", MultiplicativeNoise(num_classes)\n    )"),
    "noise_before_tanh": NETWORK.replace(
        "nn.Tanh(), MultiplicativeNoise(8)", "MultiplicativeNoise(8), nn.Sigmoid()"
    ),
    "too_few_classes": NETWORK.replace("nn.Linear(8, num_classes)", "nn.Linear(8, 2)"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert call("run", RECIPE, "--out", folder, "--quiet", "--draws", 0) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, with the files that the command lines below name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECIPE, "tiny.py")
    for name, text in BAD_RECIPES.items():
        Path(f"{name}.py").write_text(text)
    Path("file").write_text("not a folder\n")
    Path("empty").mkdir()
    np.save("wrong_shape.npy", np.zeros((3, 5, 5)))
    np.save("nan.npy", np.full((3, 8, 8), np.nan))
    np.save("many.npy", np.full((3, 8, 8), 400.0))
    np.savez("no_x.npz", z=np.zeros((3, 8, 8)))
    return tmp_path


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refused(place, capsys, line, *named):
    """The command line is answered with one line naming things, with status 2, and with nothing written."""
    before = snapshot(place)
    assert call(*line) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-bmrs: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for name in named:
        assert name in error
    assert snapshot(place) == before


RUN = "run tiny.py --out new "
TABLE = [
    ("", "command"),
    ("walk", "command", "'walk'"),
    ("--fast", "--fast"),
    ("run", "RECIPE"),
    ("run tiny.py more.py", "more.py"),
    ("fit --out new", "RECIPE"),
    ("reduce", "DIR"),
    (RUN + "--fast", "--fast"),
    (RUN + "--epoch 3", "--epoch"),
    (RUN + "--epochs", "--epochs", "requires an argument"),
    (RUN + "--epochs many", "--epochs", "'many'"),
    (RUN + "--epochs 2.5", "--epochs", "'2.5'"),
    (RUN + "--epochs 0", "epochs", "got 0"),
    (RUN + "--epochs -3", "epochs", "got -3"),
    (RUN + "--batch-size x", "--batch-size", "'x'"),
    (RUN + "--batch-size 0", "batch_size", "got 0"),
    (RUN + "--seed x", "--seed", "'x'"),
    (RUN + "--seed -1", "seed", "-1"),
    (RUN + "--kl-weight heavy", "--kl-weight", "'heavy'"),
    (RUN + "--kl-weight -1", "kl_weight", "-1"),
    (RUN + "--kl-weight nan", "kl_weight", "nan"),
    (RUN + "--learning-rate x", "--learning-rate", "'x'"),
    (RUN + "--learning-rate -0.1", "learning_rate", "-0.1"),
    (RUN + "--learning-rate inf", "learning_rate", "inf"),
    (RUN + "--posterior-learning-rate -0.1", "posterior_learning_rate", "-0.1"),
    (RUN + "--draws-per-batch -1", "draws_per_batch", "got -1"),
    (RUN + "--draws-per-batch x", "--draws-per-batch", "'x'"),
    (RUN + "--removal foo", "removal", "'foo'"),
    (RUN + "--schedule step", "schedule", "'step'"),
    (RUN + "--weight-decay -1", "weight_decay", "got -1"),
    (RUN + "--weight-decay x", "--weight-decay", "'x'"),
    (RUN + "--gradient-clip 0", "gradient_clip", "got 0"),
    (RUN + "--gradient-clip nan", "gradient_clip", "nan"),
    (RUN + "--gradient-clip x", "--gradient-clip", "'x'"),
    (RUN + "--accumulate 0", "accumulate", "got 0"),
    (RUN + "--accumulate x", "--accumulate", "'x'"),
    (RUN + "--patience 0", "patience", "got 0"),
    (RUN + "--patience x", "--patience", "'x'"),
    (RUN + "--precision 16", "precision", "'16'"),
    (RUN + "--stratified 3", "3"),
    (RUN + "--warm-up 1.5", "--warm-up", "warm_up must be less than or equal to 1: got 1.5"),
    (RUN + "--network {3", "network must be JSON", "{3"),
    (RUN + "--network [3]", "network must be a mapping or None", "[3]"),
    (RUN + "--validation-fraction 1", "validation_fraction must be less than 1: got 1"),
    (RUN + "--elbo tight", "elbo must be 'auto', 'fused', 'packed' or 'pyro': got 'tight'"),
    (RUN + "--logger paper", "logger", "'paper'"),
    (RUN + "--limit x", "--limit", "'x'"),
    (RUN + "--limit 1", "limit must be greater than or equal to 2 or None: got 1"),
    (RUN + "--criterion BMRS", "criterion", "'BMRS'"),
    (RUN + "--criterion SNR:level=3", "criterion SNR", "'level=3'"),
    (RUN + "--criterion SNR:threshold=high", "threshold", "'high'"),
    (RUN + "--criterion SNR:threshold=-1", "threshold", "-1"),
    (RUN + "--criterion Random:fraction=2", "fraction", "2.0"),
    (RUN + "--criterion Random:seed=1.5", "seed", "'1.5'"),
    (RUN + "--criterion BMRS_N:scale=0", "scale", "0.0"),
    (RUN + "--prior-log-odds x", "--prior-log-odds", "'x'"),
    (RUN + "--prior-log-odds nan", "prior_log_odds", "nan"),
    (RUN + "--criterion SNR --prior-log-odds 0", "prior_log_odds", "SNR"),
    (RUN + "--fine-tune -1", "fine_tune", "-1"),
    (RUN + "--fine-tune x", "--fine-tune", "'x'"),
    (RUN + "--min-kept 0", "min_kept", "got 0"),
    (RUN + "--min-kept x", "--min-kept", "'x'"),
    (RUN + "--require-removed 60", "--require-removed", "60"),
    (RUN + "--require-accuracy x", "--require-accuracy", "'x'"),
    (RUN + "--data nothing", "data 'nothing'", "digits"),
    (RUN + "--data nothing.npz", "nothing.npz"),
    (RUN + "--data file", "data 'file'"),
    (RUN + "--data empty", "empty' can't be used"),
    (RUN + "--device toaster", "device", "toaster"),
    (RUN + "--device meta", "device", "meta"),
    (RUN + "--device cuda:99", "device", "cuda:99"),
    ("run tiny.py --out file", "out", "file"),
    ("run tiny.py --out file/run", "out", "file/run"),
    ("fit tiny.py --out file/run", "out", "file/run"),
    ("run nothing.py --out new", "recipe", "nothing.py"),
    ("run file --out new", "recipe", "file"),
    ("run empty --out new", "recipe", "empty"),
    ("reduce nothing", "run", "nothing"),
    ("reduce empty", "run", "empty"),
    ("reduce file", "run", "file"),
    ("reduce RUN --min-kept 0", "min_kept", "got 0"),
    ("reduce RUN --fine-tune -2", "fine_tune", "-2"),
    ("reduce RUN --criterion x", "criterion", "'x'"),
    ("reduce RUN --epochs 3", "--epochs"),
    ("report nothing", "run", "nothing"),
    ("report empty", "run", "empty"),
    ("predict nothing", "run", "nothing"),
    ("predict empty", "run", "empty"),
    ("predict RUN --inputs nothing.npy", "nothing.npy"),
    ("predict RUN --inputs file", "file"),
    ("predict RUN --inputs empty", "empty"),
    ("predict RUN --inputs no_x.npz", "no_x.npz", "lacks x"),
    ("predict RUN --inputs nan.npy", "nan.npy"),
    ("predict RUN --inputs many.npy", "inputs", "400"),
    ("predict RUN --inputs wrong_shape.npy", "inputs", "(3, 5, 5)"),
    ("predict RUN --out file/labels.csv", "file"),
    ("predict RUN --out empty", "empty"),
]


@pytest.mark.parametrize(("line", "named"), [(line, named) for line, *named in TABLE])
def test_a_wrong_argument_is_one_line(line, named, place, finished, capsys):
    before = snapshot(finished)
    words = [str(finished) if word == "RUN" else word for word in line.split()]
    refused(place, capsys, words, *named)
    assert snapshot(finished) == before


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_wrong_recipe_is_one_line_before_any_fit(name, place, capsys, monkeypatch):
    # the package has the function under its module's name
    loop = sys.modules["pyro_bmrs.fitting.loop"].Loop
    monkeypatch.setattr(loop, "run", lambda *_: pytest.fail("the fit began"))
    named = "epochs" if name == "settings_text" else "network" if "settings_j" in name else f"{name}.py"
    named = "network" if name == "settings_network" else named
    refused(place, capsys, ["run", f"{name}.py", "--out", "new"], named)


def test_the_debug_variable_gives_the_traceback(place, monkeypatch):
    monkeypatch.setenv("PYRO_BMRS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"network_raises\.py") as caught:
        cli.main(["run", "network_raises.py", "--out", "new"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "line", ["--help", "run --help", "fit -h", "reduce -h", "report -h", "predict -h", "--version"]
)
def test_help_is_status_0_and_names_the_program(line, capsys):
    assert call(*line.split()) == 0
    assert "pyro-bmrs" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "fit", "reduce"])
def test_every_setting_is_an_option_with_its_help(command, capsys):
    assert call(command, "--help") == 0
    printed = capsys.readouterr().out
    listed = set(re.findall(r"--[a-z-]+", printed))
    names = OF_REDUCTION if command == "reduce" else RunSettings.model_fields
    assert listed >= {f"--{name.replace('_', '-')}" for name in names}
    assert listed >= {"--data-root", "--device"}
    words = " ".join(printed.split())
    for name in names:
        assert RunSettings.model_fields[name].description.split(",")[0][:20] in words, name


def test_every_option_of_the_fit_reaches_the_settings(place):
    line = (
        "fit tiny.py --out new --quiet --epochs 1 --batch-size 16 --seed 3 --kl-weight 4 "
        "--learning-rate 0.002 --posterior-learning-rate 0.003 --draws-per-batch 2 --removal epoch "
        "--limit 100 --criterion BMRS_U:bits=4 --prior-log-odds -0.5 --min-kept 2 --fine-tune 5 "
        "--round-to 2 --no-recalibrate --device cpu --schedule linear --weight-decay 0.3 --gradient-clip 2.5 "
        "--accumulate 2 --patience 4 --precision bf16-mixed --no-stratified --warm-up 0.5 --no-keep-best "
        '--elbo packed --validation-fraction 0.3 --network {"units":12} --image-size 8 --parameters 20% --macs 0.5 '
        "--bytes 40000 --milliseconds 2 --accuracy-drop 0.5 --loss-rise 0.01"
    )
    assert call(*line.split()) == 0
    assert Run("new").settings == RunSettings(**{
        "data": "digits", "seed": 3, "epochs": 1, "batch_size": 16, "learning_rate": 0.002,
        "posterior_learning_rate": 0.003, "kl_weight": 4.0, "warm_up": 0.5, "draws_per_batch": 2,
        "removal": "epoch", "image_size": 8, "network": {"units": 12}, "validation_fraction": 0.3, "limit": 100,
        "criterion": "BMRS_U:bits=4", "elbo": "packed", "freeze_weights": False, "keep_best": False,
        "prior_log_odds": -0.5, "min_kept": 2, "fine_tune": 5, "round_to": 2, "recalibrate": False,
        "schedule": "linear", "weight_decay": 0.3, "gradient_clip": 2.5, "accumulate": 2,
        "patience": 4, "precision": "bf16-mixed", "stratified": False, "parameters": 0.2, "macs": 0.5,
        "bytes": 40_000.0, "milliseconds": 2.0, "accuracy_drop": 0.5, "loss_rise": 0.01,
    })  # fmt: skip


def test_draws_per_batch_of_none_is_one_per_example(place, monkeypatch):
    class Begun(Exception):  # noqa: N818 no error
        pass

    def begin(*arguments, **_):
        raise Begun(arguments[-1].draws_per_batch)

    monkeypatch.setattr(fit_stage, "fit", begin)
    for given, reached in (("--draws-per-batch none", None), ("--draws-per-batch 3", 3), ("", 16)):
        with pytest.raises(Begun) as begun:
            call(*f"fit tiny.py --out new --quiet {given}".split())
        assert begun.value.args == (reached,)


@pytest.mark.parametrize(
    ("requirement", "status"),
    [
        ("--require-removed 0.1", 0),
        ("--require-removed 0.99", 1),
        ("--require-accuracy 0", 0),
        ("--require-accuracy 1", 1),
        ("--require-removed 0.1 --require-accuracy 1", 1),
    ],
)
def test_what_is_required_decides_the_status(requirement, status, finished, capsys):
    before = snapshot(finished)
    assert call("run", RECIPE, "--out", finished, "--quiet", *requirement.split()) == status
    assert snapshot(finished) == before
    assert ("required at least" in capsys.readouterr().err) == bool(status)


def test_an_accuracy_that_is_not_known_is_not_enough(finished, monkeypatch):
    monkeypatch.setattr(Run, "outcome", lambda _: {"removed": 0.9, "accuracy": float("nan")})
    assert call("run", RECIPE, "--out", finished, "--quiet", "--require-accuracy", "0") == 1


def test_the_table_tells_what_was_removed(finished, capsys):
    assert call("run", RECIPE, "--out", finished) == 0
    printed = capsys.readouterr().out
    outcome = Run(finished).outcome()
    assert f"{100 * outcome['removed']:.1f} % of the parameters physically removed" in printed
    assert f"{100 * outcome['accuracy']:.2f} %" in printed
    assert "KL weight 2 (1 is the ELBO)" in printed
    assert "report.html" in printed


def test_predict_takes_raw_inputs_as_the_source_has_them(finished, tmp_path):
    """The same digits, raw, get the same labels as the test part that was sized and standardised."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    np.save(tmp_path / "x.npy", raw.images)
    np.savez(tmp_path / "x.npz", x=raw.images)
    labels = []
    for name in ("x.npy", "x.npz"):
        out = tmp_path / f"{name}.csv"
        assert call("predict", finished, "--inputs", tmp_path / name, "--out", out) == 0
        table = pd.read_csv(out)
        assert list(table) == ["label", "class", "probability"]
        assert (table["class"] == table.label).all()
        assert table.probability.between(0.1, 1).all()
        labels.append(table.label.tolist())
    assert labels[0] == labels[1]
    run = Run(finished)
    x, y = load_data("digits", limit=200).test[:]
    agree = run.predict(x).label.to_numpy() == y.numpy()
    assert agree.mean() == pytest.approx(run.outcome()["accuracy"])
    assert np.mean(np.array(labels[0]) == raw.target) == pytest.approx(agree.mean(), abs=0.1)


OWN_LIKELIHOOD = """
import pyro
import torch
from pyro.distributions import Categorical
from pyro_bmrs import AutoTruncatedLogNormal

class Smoothed(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y=None):
        logits = self.network(x)
        smooth = 0.5 * logits.softmax(-1) + 0.5 / logits.shape[-1]
        with pyro.plate("examples", len(logits)):
            pyro.sample("label", Categorical(probs=smooth), obs=y)
        return logits

def model(network):
    return Smoothed(network)

def guide(model):
    return AutoTruncatedLogNormal(model, init_loc=-2.0, init_scale=0.5)
"""


def test_a_recipe_has_its_own_likelihood_and_guide(place, capsys):
    Path("own.py").write_text(
        NETWORK.replace('"limit": 50', '"posterior_learning_rate": 0.0') + OWN_LIKELIHOOD
    )
    status = call("run", "own.py", "--out", "own", "--quiet", "--draws", 0, "--criterion", "Random")
    assert status == 0, capsys.readouterr()
    structures = pd.read_csv("own/structures.csv", dtype={"layer": str})
    assert structures.layer.unique().tolist() == [
        "network.3"
    ]  # named by the model, which is not a Classifier
    assert structures["loc"].tolist() == [-2.0] * 8
    assert structures.scale.to_numpy() == pytest.approx(0.5)
    assert structures.removed.sum() == 4
    losses = pd.read_csv("own/evaluation.csv").negative_log_likelihood
    assert losses.between(-np.log(0.55), -np.log(0.05)).all()  # the bounds of the smoothed likelihood
    assert (Path("own") / "report.html").exists()
    assert call("predict", "own", "--out", "labels.csv") == 0
    assert set(pd.read_csv("labels.csv").label) <= set(range(10))


SPLIT = """
class Split(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Linear(64, 12)
        self.body = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 6))
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x.flatten(1)).relu()).relu())

def network(input_shape, num_classes):
    return Split(num_classes)
"""


def test_the_whole_network_is_made_smaller_where_the_noise_is_in_a_part_of_it(place):
    Path("split.py").write_text(NETWORK + SPLIT)
    assert (
        call(
            "run", "split.py", "--out", "split", "--quiet", "--draws", 0, "--criterion", "Random:fraction=0.5"
        )
        == 0
    )
    table = pd.read_csv("split/evaluation.csv")
    full = 64 * 12 + 12 + 12 * 8 + 8 + 8 * 6 + 6 + 6 * 10 + 10
    assert table.parameters.tolist() == [full, full - 4 * (12 + 1 + 6)]
    weights = {name: tuple(t.shape) for name, t in Run("split").small_network().state_dict().items()}
    assert weights["head.weight"] == (10, 6)
    assert weights["body.0.weight"] == (4, 12)


def test_data_from_an_archive_and_recipes_settings_for_it(place):
    generator = np.random.default_rng(0)
    parts = {
        f"{kind}_{part}": values
        for part, count in (("train", 60), ("test", 20))
        for kind, values in (
            ("x", generator.normal(size=(count, 1, 8, 8)).astype(np.float32)),
            ("y", np.arange(count) % 3),
        )
    }
    np.savez("own.npz", **parts)
    line = "run tiny.py --data own.npz --out npz --quiet --limit 50 --epochs 1 --fine-tune 0 --draws 0"
    assert call(*line.split()) == 0
    assert json.loads(Path("npz/settings.json").read_text())["settings"]["data"] == str(place / "own.npz")
    assert Run("npz").small_network()(torch.zeros(4, 1, 8, 8)).shape == (4, 3)


def test_the_entry_point_is_main():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="pyro-bmrs")
    assert entry.load() is cli.main
    assert sys.modules["pyro_bmrs.cli"] is cli
