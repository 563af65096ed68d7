"""One process at a time in a folder, whatever moment the next one comes at."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

from pyro_bmrs.files import FolderInUseError, held, on_disk


class Crowd:
    """All that would like to work in a folder; who is let in stays."""

    def __init__(self, folder):
        self.folder, self.inside, self.stack = folder, 0, ExitStack()

    def come(self):
        with suppress(FolderInUseError):
            self.stack.enter_context(held("out", self.folder))
            self.inside += 1


@pytest.mark.parametrize("name", ["rmdir", "unlink"])
@pytest.mark.parametrize("before", [True, False])
def test_two_that_come_while_one_leaves_are_not_both_let_in(name, before, tmp_path, monkeypatch):
    """One that leaves removes what it has made. The first comes before or after that, the second when it is over."""
    crowd = Crowd(tmp_path / "a" / "b")
    real = getattr(Path, name)

    def remove(path, **options):
        if before:
            crowd.come()
        try:
            real(path, **options)
        finally:
            if not before:
                crowd.come()

    with ExitStack() as first:
        first.enter_context(held("out", crowd.folder))
        monkeypatch.setattr(Path, name, remove)
    monkeypatch.undo()
    crowd.come()
    assert crowd.inside == 1
    crowd.stack.close()


def test_one_that_waits_at_the_door_is_not_let_in_to_what_has_gone(tmp_path, monkeypatch):
    """It has opened what it is about to lock; then the one inside leaves, and a third comes."""
    crowd, real = Crowd(tmp_path / "a" / "b"), fcntl.flock
    inside = ExitStack()
    inside.enter_context(held("out", crowd.folder))

    def flock(handle, operation):
        monkeypatch.undo()
        inside.close()
        crowd.come()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    crowd.come()
    assert crowd.inside == 1
    crowd.stack.close()


def test_who_is_inside_is_told_of_by_an_error_and_leaves_the_folder_as_it_was(tmp_path):
    with held("out", tmp_path):
        with pytest.raises(
            FolderInUseError, match=r"out must be a folder that no other process works in: got "
        ):
            held("out", tmp_path).__enter__()
        (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_process_blocks_nobody(tmp_path):
    code = "import sys, time; from pyro_bmrs.files import held; from pathlib import Path\n"
    code += "with held('out', Path(sys.argv[1])): print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(FolderInUseError):
        held("out", tmp_path).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with held("out", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_a_tensor_on_disk_has_the_same_numbers_and_leaves_no_file(shape, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = torch.randn(*shape[::-1], dtype=torch.float64).mT if len(shape) == 2 else torch.randn(shape)
    found = on_disk(tensor)
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    assert not [*tmp_path.iterdir()]
    if tensor.numel():
        assert str(tmp_path) in found.untyped_storage().filename
        found += 1  # it can be written to
        assert torch.equal(found, tensor + 1)
