"""What is imported when: the package and --help must cost nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_bmrs

HEAVY = (
    "arviz", "matplotlib", "torchvision", "lightning_fabric", "torch_pruning", "torch", "pyro", "pandas",
    "numpy", "sklearn", "rich", "joblib", "yaml", "ray",
)  # fmt: skip


def python(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_nothing_heavy_is_imported():
    """One interpreter, one after the other: the first that loads too much is named."""
    calls = [
        ["--help"],
        ["run", "--help"],
        ["predict", "--help"],
        ["sweep", "--help"],
        ["--version"],
        ["run", "models/mlp.py", "--epochs", "many"],
    ]
    result = python(
        "import contextlib, sys, pyro_bmrs; dir(pyro_bmrs); pyro_bmrs.__version__\n"
        f"def check(after): loaded = set({HEAVY}) & set(sys.modules); assert not loaded, (after, loaded)\n"
        "check('import')\n"
        "from pyro_bmrs import cli\n"
        f"for arguments in {calls}:\n"
        "    with contextlib.suppress(SystemExit): cli.main(arguments)\n"
        "    check(arguments)"
    )
    assert result.returncode == 0, result.stderr


def test_importing_everything_loads_no_plotting_or_vision():
    """All public names, resolved: only what they are made of is loaded."""
    later = ("arviz", "matplotlib", "torchvision", "lightning_fabric", "torch_pruning")
    result = python(
        "import sys, pyro_bmrs\n"
        "for name in pyro_bmrs.__all__: getattr(pyro_bmrs, name)\n"
        "import pyro_bmrs.runs.run\n"
        f"loaded = [name for name in {later} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    assert result.returncode == 0, result.stderr


def test_the_import_is_silent_with_warnings_as_errors():
    result = python("import pyro_bmrs", "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", pyro_bmrs.__all__)
def test_every_public_name_resolves(name):
    assert getattr(pyro_bmrs, name) is not None
    assert name in dir(pyro_bmrs)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pyro_bmrs' has no attribute 'nothing'"):
        _ = pyro_bmrs.nothing


def test_no_module_asks_what_time_it_is():
    """A clock that jumps can upset nothing: durations come from clocks that only go forward."""
    asks = re.compile(r"\btime\.(time|time_ns|ctime|localtime)\(|\bdatetime\.|\bdate\.today\(")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(pyro_bmrs.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if asks.search(line)
    ]
    assert not found
