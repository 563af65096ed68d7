"""A finished run from elsewhere: other working folders, data that are gone or moved, raw inputs of any source."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import call
from data_files import write_image

from pyro_bmrs.data.sources import read_source
from pyro_bmrs.runs import run as stages
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.served import Served

RECIPE = """
from torch import nn
from pyro_bmrs import MultiplicativeNoise
SETTINGS = {"default": {"epochs": 1, "batch_size": 16}}
def network(input_shape, num_classes):
    size = 1
    for extent in input_shape:
        size *= extent
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, num_classes)
    )
"""
QUICK = ("--quiet", "--criterion", "Random:fraction=0.5")


def photographs(folder, *, shape=(6, 7, 3), sizes=(0,)):
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "owl")):
        for index in range(12):
            height, width, channels = shape
            more = sizes[index % len(sizes)]
            pixels = generator.integers(60 * label, 60 * label + 120, (height + more, width, channels))
            write_image(folder / name / f"{index:02d}.png", pixels.astype(np.uint8))


def archive(path, inputs, **more):
    labels = np.arange(len(inputs)) % 3
    np.savez(path, x_train=inputs, y_train=labels, x_test=inputs[:9], y_test=labels[:9], **more)


KINDS = {
    "digits": ("digits", "--limit", 100),
    "photos": ("photos",),
    "sizes": ("sizes", "--image-size", 8),
    "bytes": ("bytes.npz",),
    "vectors": ("vectors.npz",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a recipe and data of every kind."""
    place = tmp_path_factory.mktemp("place")
    (place / "net.py").write_text(RECIPE)
    generator = np.random.default_rng(0)
    photographs(place / "photos")
    photographs(place / "sizes", sizes=(0, 3, 9))
    archive(place / "bytes.npz", generator.integers(0, 256, (60, 6, 7), dtype=np.uint8))
    archive(place / "vectors.npz", generator.normal(5, 3, (60, 4)), class_names=np.array(["a", "b", "c"]))
    return place


@pytest.fixture(scope="module")
def made(place):
    """Gives a reduced run on data of this kind, made in the working folder; to be read only."""

    @cache
    def make(kind):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(place)
            assert call("fit", "net.py", "--data", *KINDS[kind], "--out", f"runs/{kind}", *QUICK) == 0
            assert call("reduce", f"runs/{kind}", "--quiet") == 0
        return place / "runs" / kind

    return make


@pytest.fixture
def elsewhere(made, tmp_path, monkeypatch):
    """A copy of the run on photographs, whose data are gone, and another working folder."""
    run = Path(shutil.copytree(made("photos"), tmp_path / "moved/run"))
    document = json.loads((run / "settings.json").read_text())
    document["settings"]["data"] = document["fit"]["data"] = str(tmp_path / "gone/photos")
    (run / "settings.json").write_text(json.dumps(document))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.mark.slow
def test_the_path_of_data_is_kept_whole(made, place, tmp_path, monkeypatch, capsys):
    """Every command on the run then works from everywhere."""
    for kind, where in (("photos", "photos"), ("vectors", "vectors.npz")):
        settings = json.loads((made(kind) / "settings.json").read_text())
        assert settings["settings"]["data"] == settings["fit"]["data"] == str(place / where)
    monkeypatch.chdir(tmp_path)
    for data in (place / "photos", f"{place}/./photos/"):
        assert call("fit", place / "net.py", "--data", data, "--out", place / "runs/photos", *QUICK) == 0
        assert "already holds this fit" in capsys.readouterr().out
    assert call("predict", place / "runs/photos") == 0
    assert len(pd.read_csv("predictions.csv")) == 7  # a fifth of 36


@pytest.mark.parametrize("out", ["small.pt2", pytest.param("small.onnx", marks=pytest.mark.slow)])
def test_export_needs_no_data(elsewhere, out):
    if out == "small.onnx":
        pytest.importorskip("onnxruntime")
    assert call("export", elsewhere, "--out", out) == 0
    assert Path(out).stat().st_size > 0


def test_predict_on_a_folder_of_images_needs_no_data(elsewhere, place, tmp_path):
    write_image(place / "photos/dog/.hidden/0.png", np.zeros((6, 7, 3), np.uint8))
    assert call("predict", elsewhere, "--inputs", place / "photos", "--out", "all.csv") == 0
    table = pd.read_csv("all.csv")
    assert list(table) == ["file", "label", "class", "probability"]
    assert table.file.tolist() == [f"{name}/{i:02d}.png" for name in ("cat", "dog", "owl") for i in range(12)]
    assert (table["class"] == np.array(["cat", "dog", "owl"])[table.label]).all()
    # the same as from an array of the same pixels
    assert call("predict", elsewhere, "--inputs", place / "photos/dog", "--out", "dogs.csv") == 0
    dogs = pd.read_csv("dogs.csv")
    assert dogs.file.tolist() == [f"{i:02d}.png" for i in range(12)]
    from PIL import Image

    np.save("dogs.npy", np.stack([np.array(Image.open(place / "photos/dog" / file)) for file in dogs.file]))
    assert call("predict", elsewhere, "--inputs", "dogs.npy", "--out", "array.csv") == 0
    pd.testing.assert_frame_equal(pd.read_csv("array.csv"), dogs.drop(columns="file"), rtol=1e-5)


@pytest.mark.slow
def test_data_that_moved_are_given_by_data(elsewhere, place, capsys):
    for line in (
        ("predict", elsewhere),
        ("reduce", elsewhere, "--quiet"),
        ("report", elsewhere, "--draws", 0),
    ):
        assert call(*line) == 2
        assert (
            "data must be where they were; if they have moved, --data says where" in capsys.readouterr().err
        )
        if line[0] == "predict":
            assert call(*line, "--data", place / "photos") == 0
    assert call("reduce", elsewhere, "--quiet", "--data", place / "photos") == 0
    assert Run(elsewhere).settings.data == str(place / "photos")  # from now on
    assert call("report", elsewhere, "--quiet", "--draws", 0) == 0
    page = (elsewhere / "report.html").read_text()
    assert str(place) not in page  # a page is given to others
    assert "photos: " in page
    assert call("fit", place / "net.py", "--data", place / "photos", "--out", elsewhere, *QUICK) == 0
    assert "already holds this fit" in capsys.readouterr().out


def test_other_data_are_not_taken_for_those_that_moved(elsewhere, place, tmp_path, capsys):
    for kind in ("sizes", "bytes.npz", "digits"):
        assert call("predict", elsewhere, "--data", place / kind if kind != "digits" else kind) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
    assert "data must be those that the posterior in" in error
    changed = Path(shutil.copytree(place / "photos", tmp_path / "changed"))
    write_image(changed / "owl/12.png", np.full((6, 7, 3), 255, np.uint8))
    assert call("reduce", elsewhere, "--data", changed) == 2
    assert "data must be those that the posterior in" in capsys.readouterr().err


# names of classes, and what inputs must look like


def test_the_folder_says_what_inputs_must_look_like(made):
    told = json.loads((made("photos") / "settings.json").read_text())["inputs"]
    assert told["class_names"] == ["cat", "dog", "owl"]
    assert (told["shape"], told["raw_shape"], told["image_size"]) == ([3, 6, 7], [3, 6, 7], None)
    assert (told["channels"], told["divisor"]) == ("RGB", 255.0)
    assert len(told["mean"]) == len(told["deviation"]) == 3
    extra = {"inputs.json": ""}
    torch.export.load(made("photos") / "small.pt2", extra_files=extra)
    temperature = pd.read_csv(made("photos") / "evaluation.csv").temperature.iloc[-1]
    assert json.loads(extra["inputs.json"]) == {**told, "temperature": temperature, "folded": False}
    assert json.loads((made("vectors") / "settings.json").read_text())["inputs"]["class_names"] == [
        "a",
        "b",
        "c",
    ]


def raw_inputs(kind):
    """Raw inputs of a source, of the size that the network takes."""
    generator = np.random.default_rng(1)
    shape = {"digits": (9, 1, 8, 8), "photos": (9, 3, 6, 7), "sizes": (9, 3, 8, 8), "bytes": (9, 1, 6, 7)}
    if kind == "vectors":
        return generator.normal(5, 3, (9, 4)).astype(np.float32)
    if kind == "digits":
        return generator.integers(0, 17, shape[kind]).astype(np.float32)
    return generator.integers(0, 256, shape[kind], dtype=np.uint8)


@pytest.mark.parametrize(
    "kind",
    [
        "photos",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("digits", "sizes", "bytes", "vectors")),
    ],
)
def test_raw_inputs_of_a_folded_file_give_what_predict_gives(kind, made, tmp_path):
    """A server that forgets mean and deviation loses up to 17 points of accuracy, without an error."""
    onnxruntime = pytest.importorskip("onnxruntime")
    raw = raw_inputs(kind)
    np.save(tmp_path / "raw.npy", raw)
    run = made(kind)
    assert call("predict", run, "--inputs", tmp_path / "raw.npy", "--out", tmp_path / "p.csv") == 0
    wanted = pd.read_csv(tmp_path / "p.csv", dtype={"class": str})
    assert call("export", run, "--out", tmp_path / "small.onnx", "--fold-preprocessing") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: raw})
    told = json.loads(session.get_modelmeta().custom_metadata_map["inputs"])
    assert told["folded"]
    assert [told["class_names"][label] for label in probabilities.argmax(1)] == wanted["class"].tolist()
    assert np.abs(probabilities.max(1) - wanted.probability).max() < 1e-5
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5
    assert wanted.label.nunique() > 1 or kind == "photos"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sizes", "vectors"])
def test_raw_inputs_of_a_folded_program_give_what_predict_gives(kind, made, tmp_path):
    raw = torch.from_numpy(raw_inputs(kind))
    served = Served(made(kind))
    program = torch.export.load(served.export(tmp_path / "small.pt2", fold_preprocessing=True)).module()
    wanted = served.predict(served.preparation.prepare(raw))
    for count in (1, 9):
        probability, label = program(raw[:count]).detach().max(1)
        assert label.tolist() == wanted.label[:count].tolist()
        assert np.abs(probability.numpy() - wanted.probability[:count]).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--out", "small.pt2", "--tolerance", 1e-3), "tolerance must be left out for a .pt2"),
        (("--out", "small.onnx", "--tolerance", "small"), "--tolerance"),
        (("--out", "small.onnx", "--tolerance", 0), "tolerance must be a positive number or None"),
        pytest.param(
            ("--out", "small.onnx", "--tolerance", 1e-30), "from tolerance 1e-30", marks=pytest.mark.slow
        ),
    ],
)
def test_tolerances_of_the_command_line(options, says, made, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert call("export", made("vectors"), *options) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# what is removed, and what a stop leaves


@pytest.fixture
def reported(made, tmp_path):
    run = Path(shutil.copytree(made("vectors"), tmp_path / "run"))
    assert call("report", run, "--quiet", "--draws", 0) == 0
    return run


@pytest.mark.slow
def test_a_new_reduction_says_what_it_removes(reported, capsys):
    (reported / "diagnosis").mkdir()
    capsys.readouterr()
    assert call("reduce", reported, "--criterion", "SNR", "--quiet") == 0
    printed = capsys.readouterr().out
    assert (
        "removed, as made for another reduction: frontier.csv, report.md, report.html, diagnosis\n" in printed
    )
    assert f"to make them anew: pyro-bmrs report {reported}\n" in printed
    assert not (reported / "report.html").exists()
    assert call("reduce", reported, "--quiet") == 0
    assert "removed, as made" not in capsys.readouterr().out  # nothing was


@pytest.mark.slow
def test_a_new_fit_says_what_it_removes(reported, place, capsys):
    capsys.readouterr()
    line = ("--data", place / "vectors.npz", "--out", reported, *QUICK, "--seed", 3)
    assert call("fit", place / "net.py", *line, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "small.pt2, plan.numbers.safetensors, plan.json, frontier.csv, report.md, report.html\n" in printed
    assert f"to make them anew: pyro-bmrs reduce {reported}" in printed


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        pytest.param("report", "report", marks=pytest.mark.slow),
        pytest.param("report", "run", marks=pytest.mark.slow),
        ("reduce", "reduce"),
    ],
)
def test_ctrl_c_after_the_fit_says_that_the_same_command_goes_on(
    stage, command, reported, place, monkeypatch, capsys
):
    (reported / "report.html").unlink()
    line = [command, reported, "--quiet"]
    if command == "run":
        line = ["run", place / "net.py", "--data", place / "vectors.npz", "--out", reported, *QUICK]
    line += ["--draws", 0] if stage == "report" else []

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        step = "frontier" if stage == "report" else "reduce_network"
        module = sys.modules["pyro_bmrs.runs.report_stage"] if stage == "report" else stages
        (reported / "frontier.csv").unlink()
        patched.setattr(module, step, stop)
        assert call(*line) == 130
    told = capsys.readouterr().err
    what = "the report; fit and reduction are kept" if stage == "report" else "the reduction; the fit is kept"
    assert (
        told
        == f"pyro-bmrs: interrupted in {what}, and the same command, without --overwrite, goes on from there\n"
    )
    posterior = (reported / "posterior.safetensors").stat().st_mtime_ns
    assert call(*line) == 0
    assert (reported / "posterior.safetensors").stat().st_mtime_ns == posterior
    assert (reported / "report.html").exists() == (stage == "report")


def test_freeze_weights_is_an_option_and_leaves_the_weights(place, tmp_path):
    line = ("--data", place / "vectors.npz", "--out", tmp_path / "run", "--quiet", "--freeze-weights")
    assert call("fit", place / "net.py", *line) == 0
    run = Run(tmp_path / "run")
    assert run.settings.freeze_weights
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    run.load_posterior()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.network.state_dict().items())


def test_the_temperature_of_the_validation_examples_is_in_table_exports_and_predictions(made, tmp_path):
    folder = made("digits")
    current, last = Run(folder, progress=False), pd.read_csv(folder / "evaluation.csv").iloc[-1]
    x, y = current.dataset.test.tensors
    held_out, labels = current.dataset.validation.tensors
    small = current.small_network().requires_grad_(False)
    losses = [float(torch.nn.functional.cross_entropy(small(held_out) / t, labels)) for t in (0.9, 1.0, 1.1)]
    own = float(torch.nn.functional.cross_entropy(small(held_out) / last.temperature, labels))
    assert own < min(losses) or last.temperature == pytest.approx(1, abs=0.1)
    loss = float(torch.nn.functional.cross_entropy(small(x) / last.temperature, y))
    assert last.calibrated_negative_log_likelihood == pytest.approx(loss, rel=1e-5)
    confident = (small(x) / last.temperature).softmax(1).amax(1)
    table = current.predict(x)
    assert np.allclose(table.probability, confident.detach(), atol=1e-5)
    extra = {"inputs.json": ""}
    torch.export.load(folder / "small.pt2", extra_files=extra)
    assert json.loads(extra["inputs.json"])["temperature"] == pytest.approx(last.temperature)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "photos", "digits"])
def test_raw_test_examples_have_the_accuracy_of_the_report(kind, made, place, tmp_path):
    """Served by onnxruntime alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    run = made(kind)
    source = (
        str(place / kind) if kind == "photos" else str(place / "bytes.npz") if kind == "bytes" else "digits"
    )
    raw, labels = read_source(source).test
    assert call("export", run, "--out", tmp_path / "small.onnx", "--fold-preprocessing") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: raw.numpy()})
    accuracy = (probabilities.argmax(1) == labels.numpy()).mean()
    assert accuracy == pytest.approx(pd.read_csv(run / "evaluation.csv").accuracy.iloc[-1])
