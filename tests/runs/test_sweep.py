"""Sweeps: what a study's file may say, what comes out, and what is left of one that is stopped or fails."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from command_line import call
from safetensors.torch import load_file

from pyro_bmrs.files import held
from pyro_bmrs.runs import fit_stage, sweep
from pyro_bmrs.runs.folder import FIT_FILES
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.settings import RunSettings
from pyro_bmrs.runs.study import Study
from pyro_bmrs.runs.sweep import run_study
from pyro_bmrs.runs.workplace import Interrupted

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"
BASE = {
    "out": "out",
    "recipes": "net.py",
    "data": "digits",
    "seeds": [3, 4],
    "criteria": ["BMRS_N", "Random:fraction=0.3"],
    "settings": {"epochs": 1, "limit": 100, "fine_tune": 0},
}


def with_network(*lines):
    """The recipe with another network, which never comes to be: that is a cell of no time."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"{RECIPE.read_text()}\nimport os, signal, time, torch\n\ndef network(*_):\n{body}"


BROKEN = with_network("raise KeyError('no\\nnetwork')")
KILLER = with_network("time.sleep(1)", "os.kill(os.getpid(), signal.SIGKILL)")


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
        write_study(recipes=["net.py", "broken.py"], seeds=3, jobs=2)
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
    assert out == "2 of 4 cells done; results: out/results.csv\n"
    lines = err.splitlines()
    assert len(lines) == 4 + 2
    assert all("so far" in line for line in lines[:4])
    assert [line[:5] for line in lines[:4]] == [f"[{count}/4]" for count in range(1, 5)]
    assert "left" in lines[0]
    assert "left" not in lines[3]
    table = results(folder / "out")
    assert list(table.status) == ["done"] * 2 + ["failed"] * 2
    assert table.error[:2].isna().all()
    assert table.error[2:].str.count("\n").sum() == 0
    assert "network((1, 8, 8), 10) fails with KeyError" in table.error[2]
    assert "shares the fit of broken-digits-w2-BMRS_N-seed3, which has failed" in table.error[3]
    for row, line in zip(table[2:].itertuples(), lines[4:], strict=True):
        assert line == f"pyro-bmrs: {row.folder} failed: {row.error}"


def test_the_table_has_a_row_per_cell_in_the_order_of_the_study(swept):
    folder = swept[0]
    table = results(folder / "out")
    assert tuple(table) == (
        "recipe", "data", "seed", "criterion", "kl_weight", "status", "error", "parameters_before",
        "parameters_after", "removed", "accuracy", "negative_log_likelihood", "seconds", "folder",
    )  # fmt: skip
    assert list(table.folder) == [
        f"{recipe}-digits-w2-{criterion}-seed3"
        for recipe in ("net", "broken")
        for criterion in ("BMRS_N", "Random-fraction0.3")
    ]
    assert list(table.recipe) == ["net.py"] * 2 + ["broken.py"] * 2
    assert list(table.criterion) == BASE["criteria"] * 2
    assert (table.seed == 3).all()
    assert (table.data == "digits").all()
    assert (table.kl_weight == 2).all()  # the recipe's own
    assert (table.seconds[:2] > 0).all()
    for row in table[:2].itertuples():
        run = Run(folder / "out" / row.folder)
        final = run.evaluation().iloc[-1]
        assert run.complete()
        assert (run.settings.seed, run.settings.criterion) == (row.seed, row.criterion)
        assert {"removed": row.removed, "accuracy": row.accuracy} == pytest.approx(run.outcome())
        assert row.negative_log_likelihood == pytest.approx(final.negative_log_likelihood)
        assert (row.parameters_before, row.parameters_after) == (1370, final.parameters)
    assert {path.name for path in (folder / "out").iterdir()} == {"results.csv", *table.folder[:2]}


@pytest.mark.slow
def test_one_fit_serves_all_criteria_and_gives_what_a_fit_of_its_own_gives(swept, place):
    folder = swept[0]
    first, shared = (
        folder / "out" / f"net-digits-w2-{name}-seed3" for name in ("BMRS_N", "Random-fraction0.3")
    )
    assert (shared / "posterior.safetensors").read_bytes() == (first / "posterior.safetensors").read_bytes()
    settings = ("--epochs", 1, "--limit", 100, "--fine-tune", 0, "--seed", 3)
    assert (
        call("run", "net.py", "--out", "own", "--quiet", "--criterion", "Random:fraction=0.3", *settings) == 0
    )
    for name in ("posterior.safetensors", "small.safetensors"):
        one, other = load_file(shared / name), load_file(place / "own" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("evaluation.csv", "structures.csv", "removals.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(shared / name), pd.read_csv(place / "own" / name))


@pytest.fixture
def fits(monkeypatch):
    """The folders in which a fit was made, while nothing else is done with it."""
    made, whole = [], Run.fit

    def counted(run):
        result = whole(run)
        if result is not None:
            made.append(run.folder.name)
        return result

    monkeypatch.setattr(Run, "fit", counted)
    for stage in ("reduce", "report"):
        monkeypatch.setattr(Run, stage, lambda *_, **__: None)
    monkeypatch.setattr(sweep, "_done", lambda cell, *_: sweep._row(cell, "done", removed=0.0, accuracy=0.0))
    return made


def test_a_fit_is_made_once_and_one_that_is_there_serves_a_criterion_put_first(place, fits):
    one_process(seeds=0)
    assert fits == ["net-digits-w2-BMRS_N-seed0"]
    table = one_process(seeds=0, criteria=["SNR", "BMRS_N"])
    assert len(fits) == 1
    assert list(table.status) == ["done", "done"]


def test_a_criterion_with_a_hand_in_the_fit_has_a_fit_of_its_own(place, fits):
    one_process(seeds=0, settings=BASE["settings"] | {"removal": "epoch", "epochs": 2})
    assert fits == ["net-digits-w2-BMRS_N-seed0", "net-digits-w2-Random-fraction0.3-seed0"]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchs_threads_and_the_current_folder_are_set_where_the_work_is(jobs, place):
    before = torch.get_num_threads()
    Path("tells.py").write_text(with_network("raise KeyError(torch.get_num_threads(), os.getcwd())"))
    told = one_process(recipes="tells.py", threads=before + 2, jobs=jobs, seeds=0, criteria=None).error[0]
    assert f"({before + 2}, '{place}')" in told
    assert torch.get_num_threads() == before


# called again ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_called_again_only_what_failed_is_tried(again, capsys):
    before, table = stamps(again / "out"), results()
    Path("broken.py").write_text(RECIPE.read_text())
    assert call("sweep", "study.yaml", "--jobs", 1) == 0
    assert capsys.readouterr().err.count("done before") == 2
    after = stamps(again / "out")
    files = [path for path in before if path.is_file()]
    assert {path.name for path in files if after[path] != before[path]} == {"results.csv"}
    repeated = results()
    pd.testing.assert_frame_equal(
        repeated[:2].drop(columns="error"), table[:2].drop(columns="error"), check_dtype=False
    )
    assert list(repeated.status) == ["done"] * 4
    assert repeated.error.isna().all()


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_where_it_stood(again, monkeypatch):
    monkeypatch.setattr(fit_stage, "fit", lambda *_, **__: pytest.fail("a fit was made"))
    table = results()
    no_report, no_fit = (again / "out" / name for name in table.folder[:2])
    (no_report / "report.html").unlink()
    for path in no_fit.iterdir():  # as after a copy that was cut short
        if path.name != FIT_FILES[0]:
            path.unlink()
    plan = (no_report / "plan.json").stat().st_mtime_ns
    repeated = one_process(seeds=3)
    assert list(repeated.status) == ["done"] * 2
    assert (no_report / "plan.json").stat().st_mtime_ns == plan
    assert (repeated.seconds.to_numpy() != table.seconds[:2].to_numpy()).all()
    columns = ["parameters_after", "removed", "accuracy", "negative_log_likelihood"]
    assert repeated[columns].to_numpy(float) == pytest.approx(table[columns][:2].to_numpy(float))


def test_a_folder_with_another_fit_is_a_cell_that_failed(again):
    before = stamps(again / "out/net-digits-w2-BMRS_N-seed3")
    table = one_process(seeds=3, settings=BASE["settings"] | {"epochs": 3})
    assert list(table.status) == ["failed"] * 2
    assert table.error.str.contains("epochs 1 → 3").all()
    assert stamps(again / "out/net-digits-w2-BMRS_N-seed3") == before


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


@pytest.mark.slow
def test_ctrl_c_leaves_a_whole_table_and_the_next_call_goes_on(place, capsys):
    Path("slow.py").write_text(with_network("time.sleep(1000)"))
    Path("broken.py").write_text(BROKEN)
    write_study(recipes=["slow.py", "broken.py"], seeds=0, criteria=None, jobs=2)

    def interrupt():
        while not Path("out/results.csv").exists() or "failed" not in set(results().status):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert call("sweep", "study.yaml", "--quiet") == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "0 of 2 cells done" in line
    assert "the same command goes on" in line
    assert list(results().status) == ["waiting", "failed"]
    shutil.copy("broken.py", "slow.py")
    assert call("sweep", "study.yaml", "--jobs", 1, "--quiet") == 1
    assert list(results().status) == ["failed", "failed"]


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_line(place):
    """It goes to the workers too, which are in a fit, and answer it there."""
    write_study(settings={"epochs": 100_000}, seeds=[0, 1], criteria=None, jobs=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_bmrs.cli", "sweep", "study.yaml"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(list(Path("out").glob("*/checkpoints/fit"))) < 2:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "0 of 2 cells done" in error
    assert list(results().status) == ["waiting"] * 2


@pytest.mark.slow
def test_a_second_sweep_is_not_let_into_the_folder(place, capsys):
    study = write_study(seeds=0, criteria="SNR")
    assert call("sweep", study, "--quiet") == 0
    before = Path("out/results.csv").read_bytes()
    capsys.readouterr()
    with held("out", Path("out")):
        assert call("sweep", write_study(seeds=[0, 1]), "--quiet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out must be a folder that no other process works in: got out" in line
    assert Path("out/results.csv").read_bytes() == before


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
        raise Interrupted("interrupted in epoch 3")

    monkeypatch.setattr(Run, "fit", told)
    cell = Study.read(write_study()).cells[0]
    row = sweep._finish(cell, place, 1, None, "cpu", (BaseException,))
    assert (row["status"], row["error"]) == ("failed", "Interrupted: interrupted in epoch 3")


@pytest.mark.slow
def test_a_killed_process_is_a_cell_that_failed_and_no_other_one_is(place):
    """Its neighbour goes on meanwhile, and the others have a new process."""

    def work(cell):
        time.sleep(0.5)
        if cell.name == "killer":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"folder": cell.name, "status": "done", "process": os.getpid()}

    settings = SimpleNamespace(data="digits", seed=0, criterion="SNR", kl_weight=1.0)
    names = ["first", "killer", "neighbour", "fourth", "fifth"]
    # not cells, for which a worker would import all there is
    cells = [SimpleNamespace(name=name, recipe=Path("net.py"), settings=settings) for name in names]
    study = Study.read(write_study(jobs=2))
    rows = list(sweep._rows(work, [cells[:3], cells[3:]], 2, sweep._workers(study, "cpu")))
    assert {row["folder"] for row in rows[:3]} == set(names[:3])
    assert {row["folder"]: row["status"] for row in rows} == {
        name: "failed" if name == "killer" else "done" for name in names
    }
    (killer,) = (row for row in rows if row["folder"] == "killer")
    assert killer["error"].startswith("its process was killed")
    # a process is used again; the killed one has a successor
    assert len({row["process"] for row in rows if row is not killer}) <= 3


@pytest.mark.slow
def test_a_killed_cell_is_a_row_and_the_same_command_goes_on_with_it(place, capsys):
    Path("killer.py").write_text(KILLER)
    write_study(recipes=["killer.py", "net.py"], seeds=0, jobs=2)
    assert call("sweep", "study.yaml", "--quiet") == 1
    table = results()
    assert list(table.status) == ["failed"] * 2 + ["done"] * 2
    assert table.error[0].startswith("its process was killed")
    Path("killer.py").write_text(RECIPE.read_text())
    assert call("sweep", "study.yaml", "--quiet") == 0
    assert list(results().status) == ["done"] * 4


class OneThread(ThreadPoolExecutor):
    """A worker without a process."""

    def __init__(self):
        super().__init__(1)

    def shutdown(self, *, kill_workers):
        super().shutdown()


@pytest.mark.parametrize("jobs", [2, 3, 8])
@pytest.mark.parametrize("killers", [(), (0,), (3, 4), (19,), tuple(range(20))])
def test_each_cell_has_one_row_and_none_is_blamed_for_its_neighbour(killers, jobs, place):
    cells = Study.read(write_study(seeds=list(range(20)), criteria=None)).cells

    def work(cell):
        if cell.settings.seed in killers:
            raise KeyError
        return sweep._row(cell, "done")

    rows = list(sweep._rows(work, [cells[:7], cells[7:]], jobs, OneThread))
    assert sorted(row["seed"] for row in rows) == list(range(20))
    assert {row["seed"] for row in rows if row["status"] == "failed"} == set(killers)
    assert sorted(row["seed"] for row in rows[:7]) == list(range(7))


# the file -------------------------------------------------------------------------------------------------


BAD = [
    (b"recipes: [", "YAML"),
    (b"a: !!python/object:os.system {}", "YAML"),
    (b"", "mapping", "NoneType"),
    (b"- 1", "mapping", "list"),
    (b"\xff\xfe\xff", "read"),
    (b"seeds: [0]\nseeds: [1]", "keys", "once", "'seeds' twice"),
    (b"settings: {epochs: 1, limit: 9, epochs: 2}", "keys", "once", "'epochs' twice"),
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
    ({"recipes": ["net.py", "deep/net.py"]}, "recipes", "net-digits-w2-BMRS_N-seed3 twice"),
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
    ({"kl_weights": [1, 1.0]}, "kl_weights", "twice"),
    ({"settings": [3]}, "settings", "mapping", "[3]"),
    ({"settings": {"epoch": 3}}, "settings", "'epoch'", "epochs"),
    ({"settings": {"seed": 3}}, "settings", "'seed'"),
    ({"settings": {"epochs": "many"}}, "epochs must be a whole number: got 'many'"),
    ({"settings": {"network": [3]}}, "network must be a mapping or None: got [3]"),
    ({"settings": {"min_kept": 0}}, "min_kept", "got 0"),
    ({"settings": {"prior_log_odds": 1.0}, "criteria": ["BMRS_N", "SNR"]}, "prior_log_odds", "SNR"),
    (
        {"settings": {"weights": "w.pt"}, "kl_weights": [1, 3]},
        "kl_weight must be left out where weights are given",
    ),
    ({"settings": {"weights": "w.pt"}}, "criterion must be left out where weights are given"),
    ({"seeds": [0, -1]}, "seed must be greater than or equal to 0: got -1"),
    ({"kl_weights": [1, -0.5]}, "kl_weight must be greater than or equal to 0: got -0.5"),
    ({"kl_weights": float("nan")}, "kl_weight", "finite", "nan"),
    ({"recipes": "none.py", "settings": None}, "epochs must be greater than or equal to 1: got 0"),
    ({"recipes": "words.py", "settings": None}, "epochs", "whole number", "'many'"),
    ({"settings": {"epochs": 0}}, "epochs must be greater than or equal to 1: got 0"),
    ({"settings": {"epochs": None}}, "epochs", "whole number", "None"),
    ({"settings": {"learning_rate": float("inf")}}, "learning_rate", "finite", "inf"),
    ({"settings": {"removal": "never"}}, "removal must be 'end' or 'epoch': got 'never'"),
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
    for name, setting in (("unknown", "epoch=3"), ("none", "epochs=0"), ("words", "epochs='many'")):
        Path(f"{name}.py").write_text(f"SETTINGS = dict(default=dict({setting}))\ndef network(*_): ...")
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
        (weight, criterion, seed) for weight in (1, 0.5) for criterion in BASE["criteria"] for seed in (3, 4)
    ]
    assert settings[0] == RunSettings(
        seed=3, epochs=7, learning_rate=1, kl_weight=1, batch_size=32, limit=200, fine_tune=1
    )
    assert study.cells[4].folder == Path("out/net-digits-w0.5-BMRS_N-seed3")
    assert len({cell.fit for cell in study.cells}) == 4


def test_a_number_is_a_number_without_a_point_too(place):
    path = write_study(seeds=0, criteria=None)
    path.write_text(path.read_text() + "kl_weights: [1e-3, 2E+1]\n")
    assert [cell.settings.kl_weight for cell in Study.read(path).cells] == [1e-3, 20.0]


def test_null_in_the_settings_undoes_what_the_recipe_has(place):
    (cell,) = Study.read(write_study(seeds=0, criteria=None, settings={"limit": None})).cells
    assert cell.settings.limit is None


@pytest.mark.parametrize("name", ["digitz", "nothing.npz", "net.py"])
def test_data_that_cant_be_read_are_told_before_any_work(name, place, capsys):
    write_study(data=["digits", name], jobs=2)
    before = stamps(place)
    assert call("sweep", "study.yaml") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"data '{name}' can't be used" in error
    assert stamps(place) == before


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
    assert "net-digits-w2-BMRS_N-seed4" in printed
    assert "Random:fraction=0.3" in printed
    assert "4 cells, 2 fits, in out" in printed
    assert stamps(place) == before


# Ray ------------------------------------------------------------------------------------------------------


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


@pytest.mark.slow
@needs_ray
def test_a_cluster_of_ray_does_the_same(swept, place):
    Path("killer.py").write_text(KILLER)
    write_study(recipes=["killer.py", "net.py"], seeds=3, jobs=2, backend="ray")
    said = subprocess.run(
        [sys.executable, "-m", "pyro_bmrs.cli", "sweep", "study.yaml"], capture_output=True, text=True
    )
    assert said.returncode == 1
    table, expected = results(), results(swept[0] / "out")
    assert list(table.status) == ["failed", "failed", "done", "done"]
    assert "killed" in table.error[0]
    columns = ["folder", "parameters_after", "accuracy", "negative_log_likelihood"]
    pd.testing.assert_frame_equal(table[columns][2:].reset_index(drop=True), expected[columns][:2])


@pytest.mark.slow
@needs_ray
def test_each_worker_of_ray_has_a_gpu_of_its_own_where_there_are_any(place):
    """With GPUs that Ray only believes in."""
    text = with_network("time.sleep(1)", "raise KeyError('GPU ' + os.environ['CUDA_VISIBLE_DEVICES'])")
    Path("tells.py").write_text(text)
    write_study(recipes="tells.py", seeds=[0, 1, 2, 3, 4], criteria=None, backend="ray")
    code = (
        "import ray, sys; from pyro_bmrs import cli; ray.init(num_cpus=4, num_gpus=2, log_to_driver=False); "
        "cli.main(['sweep', 'study.yaml', '--jobs', sys.argv[1]])"
    )
    for jobs, status in ((3, 2), (2, 1)):
        said = subprocess.run([sys.executable, "-c", code, str(jobs)], capture_output=True, text=True)
        assert said.returncode == status
        assert ("jobs must be at most the 2 GPUs of the Ray cluster: got 3" in said.stderr) == (jobs == 3)
    told = results().error.str.extract(r"GPU ([01])'")[0]
    assert set(told) == {"0", "1"}
