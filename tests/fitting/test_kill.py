"""`kill -9` of `pyro-bmrs run` at any moment: the same command, called until it ends, leaves the same files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

TESTS = Path(__file__).parents[1]
RECIPE = TESTS / "tiny_recipe.py"
# half of the structures go after the first epoch
ARGUMENTS = ["--removal", "epoch", "--epochs", "12", "--fine-tune", "4", "--device", "cpu", "--quiet"]
# byte for byte
IDENTICAL = (
    "posterior.safetensors", "small.safetensors", "plan.json", "plan.numbers.safetensors", "removals.csv",
    "structures.csv", "evaluation.csv", "settings.json", "recipe.py", "checkpoints/fit/ledger.csv",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Cold:
    """Each command line in a new interpreter."""

    more = ()

    def __init__(self, folder):
        self.folder = folder

    def start(self, arguments, output):
        with output.open("ab") as file:
            command = [sys.executable, "-m", "pyro_bmrs.cli", *arguments]
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT)
        return self.process.pid

    def wait(self):
        return self.process.wait(timeout=200)

    def close(self):
        self.process.kill()
        self.process.wait()


class Warm:
    """Each command line in a fork of one interpreter that has imported everything."""

    more = ("--draws", "0")  # a diagnosis takes longer than all the rest

    def __init__(self, folder):
        self.server = subprocess.Popen(
            [sys.executable, TESTS / "support" / "forks.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert self.server.stdout.readline()

    def start(self, arguments, output):
        print(json.dumps({"arguments": arguments, "output": str(output)}), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def wait(self):
        print("wait", file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self):
        self.server.kill()
        self.server.communicate()


class Runs:
    """The command line called in one way or the other, and what became of it."""

    def __init__(self, kind, folder):
        self.kind, self.log = kind(folder), folder / "log"

    def __call__(self, folder, *, kill_after=None, in_epoch=0):
        """(exit status, seconds since it began to work).

        Args:
            kill_after: seconds after which it is killed, if it still runs; None: never.
            in_epoch: of the fit, the epoch from whose checkpoint on the seconds count.
        """
        self.log.unlink(missing_ok=True)
        process = self.kind.start(
            ["run", str(RECIPE), "--out", str(folder), *ARGUMENTS, *self.kind.more], self.log
        )
        self.wait_for(lambda: self.log.exists() and self.log.stat().st_size)  # a line on what it will do
        begin = time.monotonic()
        if in_epoch:
            path = folder / "checkpoints" / "fit" / f"epoch-{in_epoch:04d}.safetensors"
            self.wait_for(path.exists)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(process, signal.SIGKILL)  # nobody has waited for it yet: the number is no other's
        status = self.kind.wait()
        return status, time.monotonic() - begin

    def wait_for(self, condition):
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline, self.log.exists() and self.log.read_text()
            time.sleep(0.002)


@pytest.fixture(params=[pytest.param(Warm, id="warm"), pytest.param(Cold, id="cold", marks=pytest.mark.slow)])
def runs(request, tmp_path):
    called = Runs(request.param, tmp_path)
    yield called
    called.kind.close()


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(one, other):
    for name in IDENTICAL:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_files(runs, tmp_path):
    """Seeded moments: some within chosen epochs of the fit, then some in whatever is left of the run."""
    in_fit, later = (2, 1) if isinstance(runs.kind, Warm) else (5, 5)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    status, seconds = runs(whole)
    assert status == 0, runs.log.read_text()
    moments = random.Random(2024)
    for epoch in sorted(moments.sample(range(1, 7), in_fit)):
        status, _ = runs(folder, kill_after=moments.uniform(0, 0.1), in_epoch=epoch)
        assert status == -signal.SIGKILL, runs.log.read_text()
    for _ in range(later):
        status, _ = runs(folder, kill_after=moments.uniform(0, 0.7 * seconds))
        assert status in (0, -signal.SIGKILL), runs.log.read_text()  # so quick, or so far already
    status, _ = runs(folder)
    assert status == 0, runs.log.read_text()
    same(folder, whole)
    ledger = pd.read_csv(folder / "checkpoints" / "fit" / "ledger.csv")
    assert len(ledger) >= 13
    # nothing half-written stays, whenever the kill came; of the checkpoints others may
    ours = {name for name in files(folder) if "epoch-" not in name}
    assert ours == {name for name in files(whole) if "epoch-" not in name}
    # and it is finished: nothing is done again
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert runs(folder)[0] == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before
