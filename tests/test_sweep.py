"""Sweeps: what a study's file may say, what comes out, and what is left of one that is stopped or fails."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from command_line import call
from safetensors.torch import load_file

from pyro_bmrs import runs, sweep
from pyro_bmrs.recipes import Settings
from pyro_bmrs.runs import FIT_FILES, Run
from pyro_bmrs.sweep import Study, run_study

RECIPE = Path(__file__).with_name("tiny_recipe.py")
BASE = {
    "out": "out",
    "recipes": "net.py",
    "data": "digits",
    "seeds": [0, 1],
    "criteria": ["BMRS_N", "Random:fraction=0.3"],
    "settings": {"epochs": 1, "limit": 100, "fine_tune": 0},
}
BROKEN = RECIPE.read_text() + "\ndef network(*_):\n    raise KeyError('no\\nnetwork')\n"
KILLER = RECIPE.read_text() + (
    "\nimport os, signal\ndef network(*_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
)


def write_study(other=(), **changes):
    """A study's file in the current folder; None leaves a key out."""
    document = BASE | dict(other) | changes
    document = {key: value for key, value in document.items() if value is not None}
    Path("study.yaml").write_text(yaml.safe_dump(document))
    return Path("study.yaml")


def one_process(**changes):
    """The table of a study whose cells are worked on in this process."""
    return run_study(Study.read(write_study(**changes)), progress=False)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def results(out="out"):
    return pd.read_csv(Path(out) / "results.csv")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a recipe in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECIPE, "net.py")
    return tmp_path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder in which a study with a recipe that fails was run, by two processes; and what was said."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        shutil.copy(RECIPE, "net.py")
        Path("broken.py").write_text(BROKEN)
        write_study(recipes=["net.py", "broken.py"], jobs=2)
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = call("sweep", "study.yaml")
    return folder, status, out.getvalue(), err.getvalue()


@pytest.fixture
def again(swept, tmp_path, monkeypatch):
    """A copy of that folder, to be changed."""
    folder = shutil.copytree(swept[0], tmp_path / "again")
    monkeypatch.chdir(folder)
    return folder


# what comes out -------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_told_and_does_not_stop_the_rest(swept):
    folder, status, out, err = swept
    assert status == 1
    assert out == "4 of 8 cells done; results: out/results.csv\n"
    lines = err.splitlines()
    assert len(lines) == 8 + 4
    assert all("so far" in line for line in lines[:8])
    assert [line[:5] for line in lines[:8]] == [f"[{count}/8]" for count in range(1, 9)]
    assert "left" in lines[0]
    assert "left" not in lines[7]
    table = results(folder / "out")
    assert list(table.status) == ["done"] * 4 + ["failed"] * 4
    assert table.error[:4].isna().all()
    assert table.error[4:].str.count("\n").sum() == 0
    assert "network((1, 8, 8), 10) fails with KeyError" in table.error[4]
    assert "shares the fit of broken-digits-w2-BMRS_N-seed0, which has failed" in table.error[6]
    for row, line in zip(table[4:].itertuples(), lines[8:], strict=True):
        assert line == f"pyro-bmrs: {row.folder} failed: {row.error}"


def test_the_table_has_a_row_per_cell_in_the_order_of_the_study(swept):
    folder = swept[0]
    table = results(folder / "out")
    assert tuple(table) == (
        "recipe", "data", "seed", "criterion", "kl_weight", "status", "error", "parameters_before",
        "parameters_after", "removed", "accuracy", "negative_log_likelihood", "seconds", "folder",
    )  # fmt: skip
    assert list(table.folder[:5]) == [
        "net-digits-w2-BMRS_N-seed0", "net-digits-w2-BMRS_N-seed1", "net-digits-w2-Random-fraction0.3-seed0",
        "net-digits-w2-Random-fraction0.3-seed1", "broken-digits-w2-BMRS_N-seed0",
    ]  # fmt: skip
    assert list(table.recipe) == ["net.py"] * 4 + ["broken.py"] * 4
    assert list(table.seed) == [0, 1] * 4
    assert (table.data == "digits").all()
    assert (table.kl_weight == 2).all()  # the recipe's own
    assert (table.seconds[:4] > 0).all()
    for row in table[:4].itertuples():
        run = Run(folder / "out" / row.folder)
        final = run.evaluation().iloc[-1]
        assert run.complete()
        assert (run.settings.seed, run.settings.criterion) == (row.seed, row.criterion)
        assert {"removed": row.removed, "accuracy": row.accuracy} == pytest.approx(run.outcome())
        assert row.negative_log_likelihood == pytest.approx(final.negative_log_likelihood)
        assert (row.parameters_before, row.parameters_after) == (1370, final.parameters)
    assert {path.name for path in (folder / "out").iterdir()} == {"results.csv", *table.folder[:4]}


def test_one_fit_serves_all_criteria_and_gives_what_a_fit_of_its_own_gives(swept, place):
    folder = swept[0]
    first, shared = (
        folder / "out" / f"net-digits-w2-{name}-seed1" for name in ("BMRS_N", "Random-fraction0.3")
    )
    assert (shared / "posterior.safetensors").read_bytes() == (first / "posterior.safetensors").read_bytes()
    settings = ("--epochs", 1, "--limit", 100, "--fine-tune", 0, "--seed", 1)
    call("run", "net.py", "--out", "own", "--quiet", "--criterion", "Random:fraction=0.3", *settings)
    for name in ("posterior.safetensors", "small.safetensors"):
        one, other = load_file(shared / name), load_file(place / "own" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("evaluation.csv", "structures.csv", "removals.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(shared / name), pd.read_csv(place / "own" / name))


def count_fits(monkeypatch):
    made, whole = [], runs.fit

    def counted(model, guide, *arguments, **keywords):
        made.append(guide is not None)
        return whole(model, guide, *arguments, **keywords)

    monkeypatch.setattr(runs, "fit", counted)
    return made


def test_a_fit_is_made_once_and_one_that_is_there_serves_a_criterion_put_first(place, monkeypatch):
    made = count_fits(monkeypatch)
    one_process(seeds=0)
    assert len(made) == 1
    table = one_process(seeds=0, criteria=["SNR", "BMRS_N"])
    assert len(made) == 1
    assert list(table.status) == ["done", "done"]


def test_a_criterion_with_a_hand_in_the_fit_has_a_fit_of_its_own(place, monkeypatch):
    made = count_fits(monkeypatch)
    table = one_process(seeds=0, settings=BASE["settings"] | {"removal": "epoch", "epochs": 2})
    assert list(table.status) == ["done", "done"]
    assert len(made) == 2


def test_a_worker_stands_where_the_caller_does_and_leaves_the_threads_as_they_were(place):
    before = torch.get_num_threads()
    (place / "elsewhere").mkdir()
    study = Study.read(write_study(seeds=0, criteria=None, threads=before + 1, out="elsewhere/deep/out"))
    assert list(run_study(study, progress=False).status) == ["done"]
    assert torch.get_num_threads() == before
    assert (place / "elsewhere/deep/out/results.csv").exists()


# called again ---------------------------------------------------------------------------------------------


def test_called_again_only_what_failed_is_tried(again, capsys):
    before, table = stamps(again / "out"), results()
    Path("broken.py").write_text(RECIPE.read_text())
    assert call("sweep", "study.yaml", "--jobs", 1) == 0
    assert capsys.readouterr().err.count("done before") == 4
    after = stamps(again / "out")
    assert {path.name for path in before if after[path] != before[path]} == {"results.csv"}
    repeated = results()
    pd.testing.assert_frame_equal(
        repeated[:4].drop(columns="error"), table[:4].drop(columns="error"), check_dtype=False
    )
    assert list(repeated.status) == ["done"] * 8
    assert repeated.error.isna().all()


def test_an_interrupted_cell_goes_on_where_it_stood(again, monkeypatch):
    made, table = count_fits(monkeypatch), results()
    seconds = table.seconds.copy()
    no_report, no_fit = (again / "out" / name for name in table.folder[[0, 2]])
    (no_report / "report.html").unlink()
    for path in no_fit.iterdir():  # as after a copy that was cut short
        if path.name != FIT_FILES[0]:
            path.unlink()
    plan = (no_report / "plan.json").stat().st_mtime_ns
    repeated = one_process()
    assert list(repeated.status) == ["done"] * 4
    assert not made
    assert (no_report / "plan.json").stat().st_mtime_ns == plan
    changed = repeated.seconds.to_numpy() != seconds[:4].to_numpy()
    assert list(changed) == [True, False, True, False]
    columns = ["parameters_after", "removed", "accuracy", "negative_log_likelihood"]
    assert repeated[columns].to_numpy(float) == pytest.approx(table[columns][:4].to_numpy(float))


def test_a_folder_with_another_fit_is_a_cell_that_failed(again):
    before = stamps(again / "out/net-digits-w2-BMRS_N-seed0")
    table = one_process(settings=BASE["settings"] | {"epochs": 3})
    assert list(table.status) == ["failed"] * 4
    assert table.error.str.contains("epochs 1 → 3").all()
    assert stamps(again / "out/net-digits-w2-BMRS_N-seed0") == before


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "recipe,data\n"])
def test_a_table_that_is_none_of_a_study_is_not_written_over(text, place, capsys):
    Path("out").mkdir()
    Path("out/results.csv").write_text(text)
    assert call("sweep", write_study()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results.csv" in error
    assert Path("out/results.csv").read_text() == text
    assert os.listdir("out") == ["results.csv"]


def test_ctrl_c_leaves_a_whole_table_and_the_next_call_goes_on(place):
    Path("slow.py").write_text(RECIPE.read_text() + "\nimport time\ndef network(*_):\n    time.sleep(1000)\n")
    Path("broken.py").write_text(BROKEN)
    write_study(recipes=["slow.py", "broken.py"], seeds=0, criteria=None, jobs=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_bmrs.cli", "sweep", "study.yaml"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr.readline().startswith("[1/2] broken-")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "0 of 2 cells done" in error
    assert "the same command goes on" in error
    assert list(results().status) == ["waiting", "failed"]
    for name in ("slow.py", "broken.py"):
        shutil.copy(RECIPE, name)
    assert call("sweep", "study.yaml", "--jobs", 1, "--quiet") == 0
    assert list(results().status) == ["done", "done"]


def test_ctrl_c_in_the_callers_own_process_is_no_failure_of_a_cell(place, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "fit", interrupted)
    assert call("sweep", write_study()) == 130
    assert "0 of 4 cells done" in capsys.readouterr().err
    assert list(results().status) == ["waiting"] * 4


# whatever fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [SystemExit(3), MemoryError(), RuntimeError("two\nlines"), OSError("disk full")]
)
def test_any_error_is_a_row(error, place, monkeypatch, capsys):
    def fails(_):
        raise error

    monkeypatch.setattr(Run, "fit", fails)
    assert call("sweep", write_study(seeds=0, criteria="SNR"), "--quiet") == 1
    (row,) = results().itertuples()
    assert row.status == "failed"
    assert row.error.startswith(type(error).__name__)
    assert "\n" not in row.error
    assert capsys.readouterr().err.count("\n") == 1


def test_a_worker_that_is_told_to_end_is_a_row(place, monkeypatch):
    def told(_):
        raise runs.Interrupted("interrupted in epoch 3")

    monkeypatch.setattr(Run, "fit", told)
    cell = Study.read(write_study()).cells[0]
    row = sweep._finish(cell, place, 1, None, "cpu", (BaseException,))
    assert (row["status"], row["error"]) == ("failed", "Interrupted: interrupted in epoch 3")


def test_a_killed_process_is_a_cell_that_failed_and_no_other_one_is(place):
    Path("killer.py").write_text(KILLER)
    study = Study.read(write_study(recipes=["killer.py", "net.py"], seeds=0, criteria="SNR", jobs=2))
    table = run_study(study, progress=False)
    assert list(table.status) == ["failed", "done"]
    assert "killed" in table.error[0]


class KilledError(Exception):
    """What this pool raises when a process is killed."""


@pytest.mark.parametrize("jobs", [2, 3, 8])
@pytest.mark.parametrize("killers", [(), (0,), (3, 4), (19,), tuple(range(20))])
def test_each_cell_has_one_row_and_none_is_blamed_for_its_neighbour(killers, jobs, place):
    cells = Study.read(write_study(seeds=list(range(20)), criteria=None)).cells

    def work(cell):
        if cell.settings.seed in killers:
            raise KilledError
        return cell.row("done")

    pool = sweep._Pool(work, lambda: {"backend": "threading"}, KilledError)
    rows = list(pool.rows(cells, jobs))
    assert sorted(row["seed"] for row in rows) == list(range(20))
    assert {row["seed"] for row in rows if row["status"] == "failed"} == set(killers)


# the file -------------------------------------------------------------------------------------------------


BAD = [
    (b"recipes: [", "YAML"),
    (b"a: !!python/object:os.system {}", "YAML"),
    (b"", "mapping", "NoneType"),
    (b"- 1", "mapping", "list"),
    (b"\xff\xfe\xff", "read"),
    ({"seed": 3}, "keys", "'seed'", "seeds"),
    ({3: 3}, "keys", "got 3"),
    ({"out": None}, "out", "must be given"),
    ({"recipes": None}, "recipes", "must be given"),
    ({"data": None}, "data", "must be given"),
    ({"out": 3}, "out", "text", "got 3"),
    ({"out": ["a", "b"]}, "out", "text", "['a', 'b']"),
    ({"recipes": []}, "recipes", "[]"),
    ({"recipes": "nothing.py"}, "recipe", "nothing.py"),
    ({"recipes": ["net.py", 3]}, "recipes", "got 3"),
    ({"recipes": "raises.py"}, "recipe", "raises.py", "ZeroDivisionError"),
    ({"recipes": "unknown.py"}, "SETTINGS", "unknown.py", "'epoch'"),
    ({"recipes": ["net.py", "deep/net.py"]}, "recipes", "net-digits-w2-BMRS_N-seed0 twice"),
    ({"recipes": ["net.py", "deep/../net.py"]}, "recipes", "twice"),
    ({"data": []}, "data", "[]"),
    ({"data": [["digits"]]}, "data", "['digits']"),
    ({"data": 3}, "data", "text", "got 3"),
    ({"seeds": []}, "seeds", "[]"),
    ({"seeds": "0, 1"}, "seeds", "whole number", "'0, 1'"),
    ({"seeds": [0, 1.5]}, "seeds", "1.5"),
    ({"seeds": [True]}, "seeds", "True"),
    ({"seeds": {"a": 1}}, "seeds", "{'a': 1}"),
    ({"seeds": [0, 1, 0]}, "seeds", "twice"),
    ({"criteria": []}, "criteria", "[]"),
    ({"criteria": ["BMRS_N", "BMRS"]}, "criterion", "'BMRS'", "BMRS_U"),
    ({"criteria": "SNR:level=3"}, "criterion", "'level=3'"),
    ({"criteria": 3}, "criteria", "text", "got 3"),
    ({"kl_weights": []}, "kl_weights", "[]"),
    ({"kl_weights": ["heavy"]}, "kl_weights", "'heavy'"),
    ({"kl_weights": ["1e-3"]}, "kl_weights", "'1e-3'", "1.0e-3"),
    ({"kl_weights": [1, 1.0]}, "kl_weights", "twice"),
    ({"settings": [3]}, "settings", "mapping", "[3]"),
    ({"settings": {"epoch": 3}}, "settings", "'epoch'", "epochs"),
    ({"settings": {"seed": 3}}, "settings", "'seed'"),
    ({"settings": {"epochs": "many"}}, "settings: epochs", "whole number", "'many'"),
    ({"settings": {"limit": 2.5}}, "settings: limit", "whole number or null", "2.5"),
    ({"settings": {"network": [3]}}, "settings: network", "mapping", "[3]"),
    ({"settings": {"recalibrate": 1}}, "settings: recalibrate", "true or false"),
    ({"settings": {"min_kept": 0}}, "min_kept", "got 0"),
    ({"settings": {"prior_log_odds": 1.0}, "criteria": ["BMRS_N", "SNR"]}, "prior_log_odds", "SNR"),
    ({"jobs": 0}, "jobs", "1 or more", "got 0"),
    ({"jobs": "all"}, "jobs", "whole number", "'all'"),
    ({"threads": -1}, "threads", "got -1"),
    ({"threads": [1, 2]}, "threads", "[1, 2]"),
    ({"backend": "slurm"}, "backend", "processes, ray", "'slurm'"),
]


@pytest.mark.parametrize(("content", "named"), [(content, named) for content, *named in BAD])
def test_a_wrong_file_is_one_line_before_any_work(content, named, place, capsys):
    Path("deep").mkdir()
    shutil.copy(RECIPE, "deep/net.py")
    Path("raises.py").write_text("1 / 0")
    Path("unknown.py").write_text("SETTINGS = {'default': {'epoch': 3}}\ndef network(*_): ...")
    path = Path("study.yaml")
    if isinstance(content, dict):
        write_study(content)
    else:
        path.write_bytes(content)
    before = stamps(place)
    with pytest.raises(ValueError, match=r"study\.yaml") as caught:
        Study.read(path)
    assert "\n" not in str(caught.value)
    assert call("sweep", path) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyro-bmrs: error: study study.yaml: ")
    assert error.count("\n") == 1
    for name in named:
        assert name in error
    assert stamps(place) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("sweep", "STUDY"),
        ("sweep nothing.yaml", "nothing.yaml"),
        ("sweep .", "."),
        ("sweep study.yaml --jobs many", "'many'"),
        ("sweep study.yaml --jobs 0", "jobs"),
        ("sweep study.yaml --backend slurm", "'slurm'"),
        ("sweep study.yaml --seeds 3", "--seeds"),
        ("sweep study.yaml --out net.py", "net.py"),
    ],
)
def test_a_wrong_argument_is_one_line(line, named, place, capsys):
    write_study()
    before = stamps(place)
    assert call(*line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert stamps(place) == before


def test_ray_that_is_not_installed_is_told_before_any_work(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray.exceptions", None)
    assert call("sweep", write_study(), "--backend", "ray") == 2
    assert "pyro-bmrs[ray]" in capsys.readouterr().err
    assert not Path("out").exists()


def test_cells_are_all_combinations_with_the_settings_laid_over_the_recipes(place):
    study = Study.read(write_study(kl_weights=[1, 0.5], settings={"epochs": 7, "learning_rate": 1}))
    settings = [cell.settings for cell in study.cells]
    assert [(s.kl_weight, s.criterion, s.seed) for s in settings] == [
        (weight, criterion, seed) for weight in (1, 0.5) for criterion in BASE["criteria"] for seed in (0, 1)
    ]
    assert settings[0] == Settings(
        seed=0, epochs=7, learning_rate=1, kl_weight=1, batch_size=32, limit=200, fine_tune=1
    )
    assert study.cells[4].folder == Path("out/net-digits-w0.5-BMRS_N-seed0")
    assert len({cell.fit for cell in study.cells}) == 4


def test_a_study_need_not_name_more_than_recipe_data_and_folder(place):
    (cell,) = Study.read(write_study(seeds=None, criteria=None, settings=None)).cells
    assert cell.name == "net-digits-w2-BMRS_N-seed0"
    study = Study.read(write_study(seeds=3, criteria="BMRS_U:bits=4,floor_bits=23", kl_weights=3.0))
    assert [cell.name for cell in study.cells] == ["net-digits-w3-BMRS_U-bits4-floor_bits23-seed3"]


def test_recipes_are_relative_to_the_file_and_out_to_the_current_folder(place):
    Path("studies").mkdir()
    shutil.move(write_study(recipes="../net.py"), "studies/study.yaml")
    study = Study.read("studies/study.yaml")
    assert study.cells[0].recipe == Path("net.py")
    assert study.out == Path("out")


def test_the_command_line_goes_before_the_file(place):
    write_study(jobs=3)
    study = Study.read("study.yaml", out="other", jobs=5, backend="ray")
    assert (study.out, study.jobs, study.backend, study.threads) == (Path("other"), 5, "ray", 1)
    assert study.cells[0].folder.parent == Path("other")
    assert Study.read("study.yaml").jobs == 3
    write_study(out=None)
    assert Study.read("study.yaml", out="other").out == Path("other")


def test_a_dry_run_prints_the_cells_and_does_nothing(place, capsys):
    path = write_study()
    before = stamps(place)
    assert call("sweep", path, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "net-digits-w2-BMRS_N-seed1" in printed
    assert "Random:fraction=0.3" in printed
    assert "4 cells, 2 fits, in out" in printed
    assert stamps(place) == before


# Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_a_cluster_of_ray_does_the_same(swept, place):
    Path("killer.py").write_text(KILLER)
    write_study(recipes=["killer.py", "net.py"], seeds=0, jobs=2, backend="ray")
    said = subprocess.run(
        [sys.executable, "-m", "pyro_bmrs.cli", "sweep", "study.yaml"], capture_output=True, text=True
    )
    assert said.returncode == 1
    table, expected = results(), results(swept[0] / "out")
    assert list(table.status) == ["failed", "failed", "done", "done"]
    assert "killed" in table.error[0]
    columns = ["folder", "parameters_after", "accuracy", "negative_log_likelihood"]
    pd.testing.assert_frame_equal(
        table[columns][2:].reset_index(drop=True), expected[columns].loc[[0, 2]].reset_index(drop=True)
    )
