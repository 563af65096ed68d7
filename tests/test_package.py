"""What is built from the checkout: the wheel, installed elsewhere, runs a recipe that it carries."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # the build fetches its backend


def run(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("pyro_bmrs-*.whl")
    return path


def test_the_wheel_carries_recipes_templates_and_the_marker_of_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"pyro_bmrs/models/{path.name}" for path in (ROOT / "models").glob("*.py")}
    wanted |= {
        f"pyro_bmrs/{path.relative_to(ROOT / 'pyro_bmrs')}" for path in (ROOT / "pyro_bmrs").rglob("*.j2")
    }
    assert names >= {*wanted, "pyro_bmrs/py.typed"}
    assert not [name for name in names if name.startswith(("tests/", "analysis/"))]


def test_an_installed_wheel_runs_a_recipe_that_it_carries(wheel, tmp_path):
    """Installed away from the checkout; only what it depends on is borrowed from this environment."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", wheel, cwd=tmp_path)
    where = run(python, "-c", "import pyro_bmrs; print(pyro_bmrs.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    command = python.with_name("pyro-bmrs")
    line = ("--data", "digits", "--out", "run", "--epochs", 2, "--fine-tune", 1, "--draws", 0, "--quiet")
    assert "report: run/report.html" in run(command, "run", "lenet5", *line, cwd=tmp_path)
    run(command, "new", "mine.py", cwd=tmp_path)
    assert (tmp_path / "mine.py").read_bytes() == (ROOT / "models" / "starter.py").read_bytes()


def test_the_source_archive_has_what_the_tests_need(tmp_path):
    backend = "import hatchling.build, sys; print(hatchling.build.build_sdist(sys.argv[1]))"
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "hatchling", cwd=tmp_path)
    name = run(python, "-c", backend, tmp_path, cwd=ROOT).strip().splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        names = {path.partition("/")[2] for path in archive.getnames()}
    assert names >= {
        "mkdocs.yml",
        "models/lenet5.py",
        "tests/conftest.py",
        "docs/index.md",
        "analysis/fuzz.py",
    }
