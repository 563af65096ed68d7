"""Recipes found by name, and the one that `pyro-bmrs new` writes."""

from pathlib import Path

import pytest
from command_line import call

from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.shipped import find_recipe, shipped_recipes
from pyro_bmrs.runs.study import Study

MODELS = Path(__file__).parents[2] / "models"
QUICK = ("--epochs", 2, "--fine-tune", 1, "--limit", 200, "--draws", 0, "--quiet")


def test_every_recipe_of_the_checkout_is_shipped_by_its_name():
    assert shipped_recipes() == {
        name: MODELS / f"{name}.py" for name in ("lenet5", "lenet5_caffe", "mlp", "resnet", "starter", "vit")
    }


def test_a_path_goes_before_a_name(tmp_path):
    assert find_recipe("lenet5") == MODELS / "lenet5.py"
    assert find_recipe("lenet5.py") == Path("lenet5.py")
    assert find_recipe("lenet5.py", tmp_path) == tmp_path / "lenet5.py"


@pytest.mark.parametrize("given", ["lenet", "models/lenet5", "", "lenet5.txt"])
def test_an_unknown_name_is_refused_with_those_that_are_known(given):
    with pytest.raises(ValueError, match=rf"or one of lenet5, lenet5_caffe, .*: got {given or r'\.?'}$"):
        find_recipe(given)


@pytest.mark.slow
def test_a_run_and_a_study_take_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("run", "mlp", "--out", "run", *QUICK) == 0
    assert "mlp.py on digits" in capsys.readouterr().out
    assert Path("run/recipe.py").read_bytes() == (MODELS / "mlp.py").read_bytes()
    Path("study.yaml").write_text("out: out\nrecipes: [mlp, mine.py]\ndata: digits\n")
    Path("mine.py").write_bytes((MODELS / "starter.py").read_bytes())
    assert [cell.recipe for cell in Study.read("study.yaml").cells] == [MODELS / "mlp.py", Path("mine.py")]


@pytest.mark.slow
def test_the_recipe_to_start_from_runs_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("new", "mine.py") == 0
    assert capsys.readouterr().out == (
        "mine.py is there; try: pyro-bmrs run mine.py --data digits --out runs/mine\n"
    )
    Recipe.read("mine.py")
    assert call("run", "mine.py", "--data", "digits", "--out", "runs/mine", *QUICK) == 0


@pytest.mark.parametrize(
    ("given", "told"), [("mine.txt", "ends in .py: got mine.txt"), ("there.py", "new file")]
)
def test_new_overwrites_nothing_and_writes_recipes_only(given, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.py").write_text("precious")
    assert call("new", given) == 2
    assert told in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
