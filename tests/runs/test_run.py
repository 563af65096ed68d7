"""What a run leaves, and what is left of one that is stopped, repeated, changed or damaged."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyro
import pytest
import torch
from command_line import call
from safetensors.torch import load_file

import pyro_bmrs as bmrs
from pyro_bmrs.data import load_data
from pyro_bmrs.files import held, read_tensors
from pyro_bmrs.fitting.progress import EpochProgress
from pyro_bmrs.inference import evaluate
from pyro_bmrs.quality.examination import Examination
from pyro_bmrs.runs import fit_stage, reduce_stage, report_stage
from pyro_bmrs.runs.folder import FIT_FILES
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.settings import RunSettings

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"
CONTRACT = {
    "posterior.safetensors", "plan.json", "plan.numbers.safetensors", "small.safetensors", "small.pt2", "history.csv",
    "structures.csv", "removals.csv", "settings.json", "report.html", "evaluation.csv",
    "frontier.csv", "recipe.py", "checkpoints", "report.md", "diagnosis", "costs.csv",
}  # fmt: skip
# of the two epochs of the recipe
CHECKPOINTS = {"fit/epoch-0001.safetensors", "fit/epoch-0002.safetensors", "fit/ledger.csv"}
FIT = {*FIT_FILES, "checkpoints"}
# A diagnosis takes longer than all the rest: only the run that all tests read has one.
NO_DIAGNOSIS = ("--draws", 0)
UNDIAGNOSED = CONTRACT - {"diagnosis"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "tiny"
    assert call("run", RECIPE, "--out", folder, "--quiet", "--draws", 100) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def files(folder):
    """All files, those in folders below too, by their paths."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(folder):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files(folder).items()}


def stamps(folder):
    return {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in files(folder).items()}


def tables(folder):
    """Without what a clock measured."""
    found = {
        path.name: pd.read_csv(path, dtype={"layer": str}).drop(
            columns=["seconds", "milliseconds"], errors="ignore"
        )
        for path in sorted(folder.glob("*.csv"))
    }
    if "costs.csv" in found:
        costs = found["costs.csv"]
        found["costs.csv"] = costs[~costs.cost.str.startswith("milliseconds")]
    return found


def same_outcome(one, other):
    """Everything but measured times and the program, which holds the same weights in an archive."""
    for name in ("posterior.safetensors", "plan.numbers.safetensors", "small.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert json.loads((one / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    for name, table in tables(one).items():
        pd.testing.assert_frame_equal(table, tables(other)[name])


def test_a_run_leaves_the_files_of_the_contract_and_nothing_else(finished):
    assert names(finished) == CONTRACT
    assert set(files(finished / "checkpoints")) == CHECKPOINTS
    assert all(path.stat().st_size > 0 for path in files(finished).values())
    assert (finished / "recipe.py").read_bytes() == RECIPE.read_bytes()
    assert names(finished.parent) == {"tiny"}


def test_files_are_readable_by_whom_the_umask_lets(finished):
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in files(finished).values()} == {0o666 & ~mask}


def test_called_again_it_is_complete_and_nothing_changes(copied, capsys):
    before = stamps(copied)
    assert call("run", RECIPE, "--out", copied, "--quiet") == 0
    assert "complete" in capsys.readouterr().out
    assert stamps(copied) == before


def test_other_fit_settings_are_refused(copied, capsys):
    before = stamps(copied)
    assert call("run", RECIPE, "--out", copied, "--quiet", "--kl-weight", "7") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "kl_weight 2.0 → 7.0" in error
    assert "--overwrite" in error
    assert stamps(copied) == before


def test_another_recipe_is_refused(copied, tmp_path, capsys):
    other = tmp_path / "tiny_recipe.py"
    other.write_text(RECIPE.read_text() + "\n# another\n")
    assert call("run", other, "--out", copied, "--quiet") == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_overwrite_starts_anew(copied, finished, capsys):
    assert call("run", RECIPE, "--out", copied, "--quiet", "--overwrite", "--seed", "5", *NO_DIAGNOSIS) == 0
    assert names(copied) == UNDIAGNOSED
    assert set(files(copied / "checkpoints")) == CHECKPOINTS
    assert json.loads((copied / "settings.json").read_text())["settings"]["seed"] == 5
    assert contents(copied)["posterior.safetensors"] != contents(finished)["posterior.safetensors"]


def test_overwrite_with_a_mistake_destroys_nothing(copied):
    before = stamps(copied)
    assert call("run", RECIPE, "--out", copied, "--overwrite", "--data", "nothing") == 2
    assert call("run", RECIPE, "--out", copied, "--overwrite", "--epochs", "0") == 2
    assert stamps(copied) == before
    # this one fails in the fit, which needs the folder's checkpoints for its own
    assert call("run", RECIPE, "--out", copied, "--overwrite", "--learning-rate", "1e38", "--quiet") == 2
    assert names(copied) == CONTRACT
    after = stamps(copied)
    assert all(after[name] == stamp for name, stamp in before.items() if "checkpoints" not in name)
    assert call("run", RECIPE, "--out", copied, "--quiet") == 0
    assert stamps(copied) == after


def test_overwrite_by_the_copy_of_the_recipe_in_the_folder(copied):
    assert call("fit", copied / "recipe.py", "--out", copied, "--quiet", "--overwrite", "--epochs", "1") == 0
    assert names(copied) == FIT
    assert set(files(copied / "checkpoints")) == CHECKPOINTS - {"fit/epoch-0002.safetensors"}


@pytest.mark.slow
def test_the_parts_give_what_run_gives_and_so_does_the_same_seed(finished, tmp_path):
    folder = tmp_path / "parts"
    assert call("fit", RECIPE, "--out", folder, "--quiet") == 0
    assert names(folder) == FIT
    assert call("reduce", folder, "--quiet") == 0
    assert names(folder) == CONTRACT - {"report.html", "report.md", "frontier.csv", "diagnosis"}
    assert call("report", folder, "--quiet", *NO_DIAGNOSIS) == 0
    assert names(folder) == UNDIAGNOSED
    assert set(files(folder / "checkpoints")) == CHECKPOINTS
    same_outcome(finished, folder)
    assert "tiny_recipe.py" in (folder / "report.html").read_text()  # not recipe.py, the copy's name


@pytest.mark.slow
def test_a_baseline_is_trained_as_long_and_made_once(copied, capsys):
    def states():
        return {
            path: path.stat().st_mtime_ns
            for path in (copied / "checkpoints").glob("baseline-*/*.safetensors")
        }

    settings = Run(copied).settings
    before = pd.read_csv(copied / "evaluation.csv")
    assert call("reduce", copied, "--baseline", "--quiet") == 0
    table = pd.read_csv(copied / "evaluation.csv")
    assert [*table.network] == ["full, trained as long", *before.network]
    assert table.parameters[0] == table.parameters[1]
    pd.testing.assert_frame_equal(table[1:].reset_index(drop=True), before)
    run = Run(copied)
    network = bmrs.without_noise(run.original_network())
    epochs = settings.epochs + settings.fine_tune
    model = bmrs.Classifier(network)
    data = run.dataset
    bmrs.fit(
        model,
        None,
        data.train,
        data.validation,
        settings.of_fine_tuning().changed(epochs=epochs),
        progress=False,
    )
    assert evaluate(model, data.test).loss == pytest.approx(table.negative_log_likelihood[0], rel=1e-5)
    stamps = states()
    assert stamps
    assert (
        call("reduce", copied, "--parameters", "50%", "--quiet") == 0
    )  # it stays asked for, and is not made anew
    assert pd.read_csv(copied / "evaluation.csv").accuracy[0] == table.accuracy[0]
    assert states() == stamps
    # as long as another fine-tuning, and without one
    for tuning in (3, 0):
        assert call("reduce", copied, "--fine-tune", tuning, "--quiet") == 0
        assert (
            pd.read_csv(copied / "evaluation.csv").negative_log_likelihood[0]
            != table.negative_log_likelihood[0]
        )
        assert len([*(copied / "checkpoints").glob("baseline-*")]) == 1
    assert call("reduce", copied, "--no-baseline", "--quiet") == 0
    assert "full, trained as long" not in [*pd.read_csv(copied / "evaluation.csv").network]


def test_a_page_stands_at_once_and_a_report_that_was_interrupted_goes_on(copied, monkeypatch, capsys):
    shutil.rmtree(copied / "diagnosis")
    for name in ("frontier.csv", "report.html", "report.md"):
        (copied / name).unlink()
    add, made = Examination.add, []

    def stopping(self, found, part):
        page = (copied / "report.html").read_text()
        assert "Still being measured: other sizes, predictions, other criteria, k̂ of the posterior." in page
        if part == "curves" and not made.count("curves"):
            made.append("curves")
            raise KeyboardInterrupt
        made.append(part)
        return add(self, found, part)

    monkeypatch.setattr(Examination, "add", stopping)
    assert call("report", copied, "--draws", 100) == 130
    told = capsys.readouterr().err
    assert "yet without other sizes, predictions, other criteria, k̂ of the posterior" in told
    assert "interrupted in the report; fit and reduction are kept" in told
    assert made == ["predictions", "curves"]
    assert not (copied / "report.md").exists()  # the stage is not done
    sizes = (copied / "frontier.csv").stat().st_mtime_ns
    monkeypatch.setattr(Examination, "add", lambda *given: made.append(given[2]) or add(*given))
    # what is not finished is finished, though nothing is asked for
    assert call("run", RECIPE, "--out", copied, "--quiet") == 0
    assert made == ["predictions", "curves", "curves", "posterior"]
    assert (copied / "frontier.csv").stat().st_mtime_ns == sizes
    assert "Still being measured" not in (copied / "report.html").read_text()
    assert "Still being measured" not in (copied / "report.md").read_text()
    again = (copied / "report.html").read_bytes()
    assert call("report", copied, "--quiet") == 0
    assert made[4:] == []
    assert (copied / "report.html").read_bytes() == again


@pytest.mark.slow
def test_another_criterion_needs_no_other_fit_and_leaves_no_stale_report(copied, capsys):
    posterior = stamps(copied)["posterior.safetensors"]
    before = pd.read_csv(copied / "structures.csv")
    assert call("reduce", copied, "--criterion", "SNR", "--fine-tune", "0", "--quiet") == 0
    assert "SNR" in capsys.readouterr().out
    after = pd.read_csv(copied / "structures.csv")
    assert stamps(copied)["posterior.safetensors"] == posterior
    assert after.log_evidence_change.isna().all()
    assert (after["loc"] == before["loc"]).all()
    assert ((after.score >= 0) == after.removed).all()
    assert list(pd.read_csv(copied / "evaluation.csv").network) == ["full, E[θ]", "reduced"]
    assert not (copied / "report.html").exists()
    assert not (copied / "frontier.csv").exists()
    # the settings of the first run ask for the first reduction again, not for another fit
    assert call("run", RECIPE, "--out", copied, "--quiet", *NO_DIAGNOSIS) == 0
    assert stamps(copied)["posterior.safetensors"] == posterior
    pd.testing.assert_frame_equal(pd.read_csv(copied / "structures.csv"), before)


def test_another_criterion_leaves_the_old_log_odds_behind(tmp_path):
    folder = tmp_path / "run"
    assert call("fit", RECIPE, "--out", folder, "--quiet", "--epochs", "1", "--prior-log-odds", "0") == 0
    assert Run(folder, changes={"criterion": "SNR"}).settings.prior_log_odds is None
    assert Run(folder, changes={"fine_tune": 3}).settings.prior_log_odds == 0


def test_none_unsets_what_a_run_or_a_recipe_had(copied, tmp_path, capsys):
    assert call("reduce", copied, "--round-to", "4", "--fine-tune", "0", "--quiet") == 0
    assert Run(copied).settings.round_to == 4
    assert call("reduce", copied, "--round-to", "none", "--quiet") == 0
    assert Run(copied).settings.round_to is None
    assert Run(copied).settings.fine_tune == 0
    path = tmp_path / "limited.py"
    path.write_text(RECIPE.read_text().replace('"limit": 200', '"limit": 200, "round_to": 8, "patience": 3'))
    line = ("--out", tmp_path / "new", "--quiet", "--round-to", "none", "--patience", "none", "--epochs", "1")
    assert call("fit", path, *line) == 0
    settings = Run(tmp_path / "new").settings
    assert (settings.round_to, settings.patience, settings.limit) == (None, None, 200)
    capsys.readouterr()
    assert call("fit", path, "--out", tmp_path / "other", "--epochs", "none") == 2
    assert "epochs must be a whole number: got 'none'" in capsys.readouterr().err


def test_removal_in_the_fit_is_noted_and_ties_the_fit_to_its_criterion(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ("--out", folder, "--quiet", "--removal", "epoch", "--fine-tune", "0", "--device", "cpu")
    assert call("fit", RECIPE, *arguments) == 0
    noted = pd.read_csv(folder / "removals.csv", dtype={"layer": str})
    assert len(noted)
    assert (noted.phase == "fit").all()
    assert call("reduce", folder, "--criterion", "Random:fraction=0.3", "--quiet") == 0
    removals = pd.read_csv(folder / "removals.csv", dtype={"layer": str})
    structures = pd.read_csv(folder / "structures.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(removals[: len(noted)], noted)
    ledger = pd.read_csv(folder / "checkpoints" / "fit" / "ledger.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(ledger, noted.drop(columns="phase"))
    # what the fit took out is still in the table, with the others' numbers unmoved
    assert len(structures) == 26
    by_fit = structures[structures.removed_in_fit]
    assert (by_fit.present == False).all()  # noqa: E712 of a column
    assert structures.present.sum() == len(structures) - len(noted)
    assert set(zip(by_fit.layer, by_fit.unit, strict=True)) == set(zip(noted.layer, noted.unit, strict=True))
    assert removals.log_evidence_change.notna().tolist() == (removals.phase == "fit").tolist()
    assert len(removals) == structures.removed.sum() > len(noted)
    assert not removals.duplicated(["layer", "unit"]).any()
    capsys.readouterr()
    assert call("fit", RECIPE, *arguments, "--criterion", "SNR") == 2
    assert "criterion" in capsys.readouterr().err
    assert call("fit", RECIPE, *arguments) == 0  # reducing it did not change what it was fitted with


def test_columns_and_counts_of_the_tables(finished):
    table = tables(finished)
    structures, removals = table["structures.csv"], table["removals.csv"]
    assert list(structures) == [
        "layer", "unit", "loc", "scale", "mean", "snr", "score", "log_evidence_change", "kl_weight",
        "removed", "removed_in_fit", "present",
    ]  # fmt: skip
    assert structures.present.all()
    assert not structures.removed_in_fit.any()
    assert list(removals) == ["phase", "epoch", "layer", "unit", "score", "log_evidence_change"]
    gone = structures[structures.removed]
    assert 0 < len(gone) < len(structures) == 26
    assert (structures.kl_weight == 2.0).all()
    assert list(zip(removals.layer, removals.unit, strict=True)) == list(
        zip(gone.layer, gone.unit, strict=True)
    )
    assert removals.log_evidence_change.tolist() == gone.log_evidence_change.tolist()
    assert removals.log_evidence_change.notna().all()
    assert (removals.epoch == 2).all()
    assert list(table["history.csv"].phase) == ["fit", "fit", "fine-tune"]
    assert list(table["evaluation.csv"].network) == ["full, E[θ]", "reduced", "fine-tuned"]
    assert table["frontier.csv"].is_plan.sum() == 1

    kept = {layer: list(rows.unit[~rows.removed]) for layer, rows in structures.groupby("layer")}
    assert Run(finished).plan().kept == kept
    weights = load_file(finished / "small.safetensors")
    filters, units = len(kept["3"]), len(kept["7"])
    assert weights["0.weight"].shape == (filters, 1, 3, 3)
    assert weights["5.weight"].shape == (units, 9 * filters)
    assert weights["8.weight"].shape == (10, units)
    count = sum(tensor.numel() for tensor in weights.values())
    assert (
        count
        == table["evaluation.csv"].parameters.iloc[-1]
        == table["costs.csv"].set_index("cost").after["parameters"]
    )


PREDICT = """
import sys
import torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = {size: program(inputs[:size]) for size in (1, 2, 7, 100)}
assert "pyro" not in sys.modules and "pyro_bmrs" not in sys.modules
torch.save(logits, sys.argv[3])
"""


def test_the_program_predicts_where_there_is_only_torch_and_predict_agrees(finished, tmp_path):
    inputs, outputs, csv = tmp_path / "inputs.pt", tmp_path / "logits.pt", tmp_path / "predictions.csv"
    test = load_data("digits").test
    run = Run(finished)  # statistics of the 200 examples of the recipe
    torch.save(run.dataset.test.tensors[0][:100].clone(), inputs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", PREDICT, finished / "small.pt2", inputs, outputs],
        check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    small = run.small_network()
    with torch.no_grad():
        expected = small(torch.load(inputs))
    for size, logits in torch.load(outputs).items():
        assert logits.shape == (size, 10)
        torch.testing.assert_close(logits, expected[:size], atol=1e-6, rtol=0)

    assert call("predict", finished, "--out", csv) == 0
    predictions = pd.read_csv(csv)
    assert len(predictions) == len(test)
    assert predictions.label[:100].tolist() == expected.argmax(1).tolist()
    temperature = run.evaluation().temperature.iloc[-1]  # of the validation examples
    probability = (expected / temperature).softmax(1).amax(1).double()
    torch.testing.assert_close(
        torch.tensor(predictions.probability[:100].to_numpy()), probability, atol=1e-6, rtol=0
    )
    accuracy = (torch.tensor(predictions.label.to_numpy()) == run.dataset.test.tensors[1]).double().mean()
    assert float(accuracy) == pytest.approx(run.outcome()["accuracy"], abs=1e-9)


def test_a_run_leaves_nothing_in_pyros_store_and_random_numbers(copied):
    pyro.clear_param_store()
    state = torch.get_rng_state()
    run = Run(copied)
    run.load_posterior()
    run.report()
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())


# stopped ------------------------------------------------------------------------------------------------


def start(folder, *arguments):
    """A run that would take long, in a process of its own, past its first epoch."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_bmrs.cli", "run", RECIPE, "--out", folder, *(arguments or LONG)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "epoch 1/" in process.stderr.readline()
    return process


LONG = ("--epochs", "100000")


@pytest.mark.slow
def test_a_second_process_is_let_into_the_folder_when_the_first_is_killed_and_finishes(tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(folder)
    try:
        for line in (
            ("run", RECIPE, "--out", folder, *LONG),
            ("run", RECIPE, "--out", folder, "--overwrite"),
        ):
            assert call(*line, "--quiet") == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert f"out must be a folder that no other process works in: got {folder}" in error
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert names(folder) == {"checkpoints", ".lock"}
    with held("out", folder):  # a killed process keeps nothing locked
        pass
    assert names(folder) == {"checkpoints"}
    assert call("run", RECIPE, "--out", folder, "--quiet", "--epochs", 1, "--overwrite", *NO_DIAGNOSIS) == 0
    assert names(folder) == UNDIAGNOSED


def test_a_held_folder_is_refused_by_every_stage_and_untouched(copied, capsys):
    before = {name: path.read_bytes() for name, path in files(copied).items()}
    with held("out", copied):
        for line in (("run", RECIPE, "--out"), ("fit", RECIPE, "--out"), ("reduce",), ("report",)):
            assert call(*line, copied, "--quiet") == 2
            assert "no other process works in" in capsys.readouterr().err
        assert call("show", copied) == 0  # reading is free
        capsys.readouterr()
    assert {name: path.read_bytes() for name, path in files(copied).items()} == before


def test_what_is_refused_leaves_no_empty_folders(tmp_path):
    with pytest.raises(KeyError), held("out", tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with held("out", tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_in_the_fit_is_one_line_status_130_and_leaves_what_it_takes_to_go_on(number, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(folder)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "interrupted in epoch" in error
    assert "the same command goes on from there" in error
    assert names(folder) == {"checkpoints"}
    newest = max(name for name in files(folder / "checkpoints" / "fit") if name.endswith(".safetensors"))
    # another fit does not take it for its own, unless it may
    assert call("run", RECIPE, "--out", folder, "--quiet", "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "epochs 100000 → 3" in error
    assert newest in files(folder / "checkpoints" / "fit")
    if number == signal.SIGINT:
        return
    assert call("run", RECIPE, "--out", folder, "--quiet", "--overwrite", *NO_DIAGNOSIS) == 0
    assert names(folder) == UNDIAGNOSED
    assert set(files(folder / "checkpoints")) == CHECKPOINTS


class StopInEpoch:
    """Ctrl-C once, when an epoch is done."""

    def __init__(self, epoch, phase="fit"):
        self.epoch, self.phase = epoch, phase

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        real = EpochProgress.epoch

        def epoch(display, row):
            real(display, row)
            if (row["phase"], row["epoch"]) == (self.phase, self.epoch):
                os.kill(os.getpid(), signal.SIGINT)

        self.patch.setattr(EpochProgress, "epoch", epoch)

    def __exit__(self, *error):
        self.patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["fit", pytest.param("fine-tune", marks=pytest.mark.slow)])
def test_after_ctrl_c_the_same_command_goes_on_to_the_same_end(phase, tmp_path, capsys):
    """In the fit and in the fine-tuning: no epoch is made twice, and the files are those of one run."""
    arguments = (
        "--quiet",
        "--fine-tune",
        "2",
        "--removal",
        "epoch",
        "--epochs",
        "3",
        "--limit",
        "120",
        *NO_DIAGNOSIS,
    )
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert call("run", RECIPE, "--out", whole, *arguments) == 0
    with StopInEpoch(1, phase):
        assert call("run", RECIPE, "--out", folder, *arguments) == 130
    assert "interrupted in epoch 2" in capsys.readouterr().err
    epochs = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            EpochProgress, "epoch", lambda display, row: epochs.append((row["phase"], row["epoch"]))
        )
        assert call("run", RECIPE, "--out", folder, *arguments) == 0
    fit, tuning = [("fit", 1), ("fit", 2), ("fit", 3)], [("fine-tune", 1), ("fine-tune", 2)]
    assert epochs == (fit[1:] + tuning if phase == "fit" else tuning[1:])
    assert set(files(folder)) == set(files(whole))
    same_outcome(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "reduce", "report", "run"])
def test_half_written_files_of_a_killed_process_do_not_stay(command, copied):
    """`kill -9` leaves the file beside the one that was to be replaced; what is not ours stays."""
    ours = [
        ".history-abcdefgh.csv",
        ".small-x_0abcde.pt2",
        ".plan-12345678.json",
        ".recipe-abcdefgh.py",
        ".tmpA1b2C3",
    ]
    others = [".notes-abcdefgh.csv", ".history.csv", ".history-abcdefgh.txt", "history-abcdefgh.csv"]
    for name in (*ours, *others):
        (copied / name).write_bytes(b"half")
    if command in ("fit", "run"):
        (copied / "posterior.safetensors").unlink()
    (copied / "report.html").unlink()
    first = (RECIPE, "--out", copied) if command in ("fit", "run") else (copied,)
    draws = NO_DIAGNOSIS if command in ("report", "run") else ()
    assert call(command, *first, "--quiet", *draws) == 0
    left = names(copied)
    assert not left & set(ours)
    assert left >= set(others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "step"),
    [(fit_stage, "save_posterior"), (reduce_stage, "export_program"), (report_stage, "report")],
)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_run_that_stops_between_two_files_is_finished_by_the_next(
    finished, copied, stage, step, error, monkeypatch, capsys
):
    """Whatever was there before, other settings' files do not survive beside the new ones."""

    def stop(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(stage, step, stop)
        arguments = ("--quiet", "--overwrite", "--criterion", "SNR", *NO_DIAGNOSIS)
        assert call("run", RECIPE, "--out", copied, *arguments) == (2 if isinstance(error, OSError) else 130)
    assert capsys.readouterr().err.count("\n") == 1
    left = names(copied)
    assert left <= CONTRACT
    assert "checkpoints" in left
    assert "report.html" not in left
    if stage is not report_stage:
        assert "plan.json" not in left
        assert call("report", copied) == 2
        assert call("predict", copied, "--out", copied.parent / "p.csv") == 2
        assert capsys.readouterr().err.count("\n") == 2
    if stage is reduce_stage and isinstance(error, OSError):  # one finish is enough; each takes seconds
        assert call("run", RECIPE, "--out", copied, "--quiet", *NO_DIAGNOSIS) == 0
        assert names(copied) == UNDIAGNOSED
        same_outcome(finished, copied)


# damaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("posterior.safetensors", "reduce"),
        ("plan.json", "report"),
        ("plan.numbers.safetensors", "report"),
        ("settings.json", "reduce"),
        ("settings.json", "predict"),
        ("recipe.py", "report"),
        ("evaluation.csv", "report"),
        ("history.csv", "report"),
        ("removals.csv", "reduce"),
        ("small.safetensors", "predict"),
        ("plan.json", "predict"),
    ],
)
def test_a_file_cut_short_is_told_in_one_line(copied, name, command, share, tmp_path, capsys):
    path = copied / name
    data = path.read_bytes()
    # half a table of text can be a whole one of fewer rows; its first line can't
    path.write_bytes(data[: min(int(len(data) * share), 12 if path.suffix == ".csv" else len(data))])
    out = ("--out", tmp_path / "predictions.csv") if command == "predict" else ("--quiet",)
    before = stamps(copied)
    assert call(command, copied, *out) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-bmrs: error: ")
    assert error.count("\n") == 1
    assert path.stem in error
    assert stamps(copied) == before
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize("name", ["settings.json", "plan.json"])
@pytest.mark.parametrize("command", ["run", "report", "predict"])
def test_files_of_a_newer_version_are_refused(copied, name, command, tmp_path, capsys):
    document = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps({**document, "version": 99}))
    before = stamps(copied)
    first = (RECIPE, "--out", copied) if command == "run" else (copied,)
    out = ("--out", tmp_path / "p.csv") if command == "predict" else ("--quiet",)
    assert call(command, *first, *out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "99" in error
    assert "up to" in error
    assert stamps(copied) == before


# settings -----------------------------------------------------------------------------------------------


def test_the_command_line_goes_before_the_recipe_which_goes_before_the_defaults(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "SETTINGS = {'default': dict(epochs=9, seed=4, prior_log_odds=0.5), 'digits': dict(epochs=7)}\n"
        "def network(*_): ...\n"
    )
    recipe = Recipe.read(path)
    assert RunSettings.of(recipe, "mnist", {}).epochs == 9
    assert RunSettings.of(recipe, "mnist", {}).seed == 4
    assert RunSettings.of(recipe, "mnist", {"prior_log_odds": None}).prior_log_odds is None
    with pytest.raises(ValueError, match="seed must be a whole number: got None"):
        RunSettings.of(recipe, "mnist", {"seed": None})
    assert RunSettings.of(recipe, "mnist", {"seed": 0}).seed == 0
    assert RunSettings.of(recipe, "digits", {}) == RunSettings(
        epochs=7
    )  # its own entry, not laid over "default"
    assert RunSettings.of(recipe, "mnist", {"criterion": "SNR"}).prior_log_odds is None
    assert (
        RunSettings.of(recipe, "mnist", {"criterion": "BMRS_U", "prior_log_odds": 1.0}).prior_log_odds == 1.0
    )


def test_the_share_of_validation_examples_is_a_setting(tmp_path):
    recipe = Recipe.read(RECIPE)
    settings = RunSettings.of(recipe, "digits", {"validation_fraction": 0.1, "limit": 500})
    dataset = Run(tmp_path / "run", recipe, settings, progress=False).dataset
    assert (len(dataset.train), len(dataset.validation)) == (450, 50)


def test_settings_are_equal_after_a_way_through_json():
    settings = RunSettings(network={"widths": (3, 4)}, prior_log_odds=0.1)
    assert RunSettings(**json.loads(json.dumps(settings.model_dump()))) == settings


def test_reading_a_recipe_leaves_no_bytecode_beside_it(tmp_path):
    shutil.copy(RECIPE, tmp_path / "recipe.py")
    Recipe.read(tmp_path / "recipe.py")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.py"]


def test_what_a_model_learned_round_the_network_stays_in_the_reduced_model(copied):
    """A temperature outside the network is the small network's too."""
    text = (copied / "recipe.py").read_text() + (
        "import torch\n"
        "from pyro_bmrs import Classifier\n"
        "class Tempered(Classifier):\n"
        "    def __init__(self, net):\n"
        "        super().__init__(net)\n"
        "        self.temperature = nn.Parameter(torch.ones(()))\n"
        "    def predict(self, x):\n"
        "        return super().predict(x) / self.temperature\n"
        "model = Tempered\n"
    )
    path = copied.parent / "tempered.py"
    path.write_text(text)
    recipe = Recipe.read(path)
    run = Run(copied.parent / "tempered", recipe, RunSettings.of(recipe, "digits", {}), progress=False)
    run.model.temperature.data.fill_(2.5)
    small = torch.nn.Linear(4, 2)
    model = run.model_of(small)
    assert model.net is small
    assert model.temperature.item() == 2.5


def test_stages_are_quick_to_find_complete(finished):
    """Nothing is computed to say so: a run of hours must answer at once."""
    start = time.perf_counter()
    recipe = Recipe.read(RECIPE)
    assert Run(finished, recipe, RunSettings.of(recipe, "digits", {})).complete()
    assert time.perf_counter() - start < 5


def test_a_fit_along_rising_weights_keeps_its_stages_for_later_reductions(tmp_path, capsys):
    folder = tmp_path / "rising"
    line = ("--kl-weight", "auto", "--epochs", 8, "--posterior-learning-rate", 0.2, "--quiet")
    assert call("run", RECIPE, "--out", folder, *line, *NO_DIAGNOSIS) == 0
    stages = pd.read_csv(folder / "stages.csv")
    run = Run(folder, progress=False)

    def taken():
        """By plan and posterior of the folder, which belong together."""
        weight = run.plan().rule.kl_weight
        header, _ = read_tensors(folder / "posterior.safetensors", header_only=True)
        assert header["kl_weight"] == weight
        return weight

    own = taken()
    assert own == stages.kl_weight[stages.chosen].item()
    assert "rising weights of the KL divergence" in (folder / "report.html").read_text()
    full = pd.read_csv(folder / "evaluation.csv").parameters.iloc[0]
    # a budget may take another stage, and the size that the evidence chooses comes back
    assert call("reduce", folder, "--parameters", "30%", "--quiet") == 0
    small = pd.read_csv(folder / "evaluation.csv").parameters.iloc[-1]
    assert small <= 0.3 * full
    taken()
    assert call("report", folder, *NO_DIAGNOSIS, "--quiet") == 0
    assert call("reduce", folder, "--parameters", "none", "--fine-tune", 1, "--quiet") == 0
    assert taken() == own
    assert pd.read_csv(folder / "evaluation.csv").network.iloc[-1] == "fine-tuned"
    # another rule measures the stages anew
    assert call("reduce", folder, "--min-kept", 0.9, "--fine-tune", 0, "--quiet") == 0
    assert run.plan().rule.min_kept == 0.9
