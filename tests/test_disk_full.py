"""A full disk, or a quota: an error that names the file, nothing half-written, and a run that goes on later."""

import contextlib
import resource
from pathlib import Path

import pytest
import torch
from command_line import call

from pyro_bmrs.files import on_disk, read_tensors, write_atomically

RECIPE = Path(__file__).with_name("tiny_recipe.py")
ARGUMENTS = ["--data", "digits", "--epochs", "3", "--fine-tune", "2", "--device", "cpu", "--quiet"]
# of a run, byte for byte
IDENTICAL = (
    "posterior.safetensors",
    "small.safetensors",
    "plan.numbers.safetensors",
    "structures.csv",
    "evaluation.csv",
)


@contextlib.contextmanager
def quota(limit):
    """No file that this process writes can have more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(folder, draws=0):
    return call("run", RECIPE, "--out", folder, "--draws", draws, *ARGUMENTS)


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untroubled") / "run"
    assert run(folder) == 0
    return folder


# in the fit, in the diagnosis, in the report
@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "draws", "where"),
    [
        (4_000, 0, "epoch-0001"),
        pytest.param(25_000, 100, "diagnosis", marks=pytest.mark.slow),
        pytest.param(120_000, 0, "report", marks=pytest.mark.slow),
    ],
)
def test_a_quota_stops_a_run_and_nothing_is_lost(limit, draws, where, untroubled, tmp_path, capsys):
    folder = tmp_path / "run"
    with quota(limit):
        status = run(folder, draws)
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("pyro-bmrs: error: ")]
    assert status == 2
    assert "can't be written: File too large" in line
    assert where in line
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    for path in folder.rglob("*.safetensors"):
        read_tensors(path)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("posterior.safetensors")}
    assert run(folder) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "fitted anew"
    for name in IDENTICAL:
        assert (folder / name).read_bytes() == (untroubled / name).read_bytes(), name


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
     ValueError("Error while serializing: I/O error: No space left on device (os error 28)")],
    ids=["the system's", "torch's", "safetensors'"],
)  # fmt: skip
def test_whoever_writes_the_file_is_named_and_what_was_there_stays(error, tmp_path):
    path = tmp_path / "small.pt2"
    path.write_text("before")

    def full(beside):
        beside.write_text("half")
        raise error

    with pytest.raises(
        OSError, match=r"small\.pt2 can't be written: No space left on device; nothing else is lost"
    ):
        write_atomically(path, full)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_are_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"^not a matter of room$"):
        write_atomically(
            tmp_path / "a", lambda beside: (_ for _ in ()).throw(ValueError("not a matter of room"))
        )


def test_a_temporary_file_that_does_not_fit_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        quota(4_000),
        pytest.raises(OSError, match=f"a temporary file in {tmp_path} can't be written: File too large"),
    ):
        on_disk(torch.zeros(10_000))
    assert not [*tmp_path.iterdir()]
