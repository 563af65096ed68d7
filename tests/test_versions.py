"""The oldest versions that pyproject.toml allows, and the newest there are: a part of the tests passes with each."""

import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # gigabytes to install, and minutes to run
# what touches torch, Pyro, ArviZ, torch-pruning, lightning-fabric, pandas and typer
TESTS = (
    "tests/distributions/test_packed.py", "tests/networks/test_surgery.py", "tests/networks/test_export.py",
    "tests/networks/test_selection.py", "tests/pruning/test_reduce.py", "tests/fitting/test_fit.py",
    "tests/checks/test_arviz_io.py", "tests/test_cli.py",
)  # fmt: skip
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "mpmath", "scipy")


def requirements(versions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    return [line.replace(">=", "==") for line in wanted] if versions == "oldest" else wanted


@pytest.mark.parametrize("versions", ["oldest", "newest"])
def test_a_part_of_the_tests_passes(versions, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, *requirements(versions), *TOOLS], check=True, timeout=1800)
    subprocess.run([*install, "--no-deps", "-e", ROOT], check=True, timeout=600)
    done = subprocess.run(
        [python, "-m", "pytest", "-x", "-p", "no:cacheprovider", *TESTS], cwd=ROOT, capture_output=True, text=True,
        timeout=3600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
