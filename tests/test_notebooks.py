"""What notebooks show: cards that are small, whole and without scripts; a line of progress that changes in place."""

import sys
import types
import warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from browser import chromium
from diagnosed import make_diagnosis, make_fit, make_frontier, make_plan
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import notebooks, progress
from pyro_bmrs.fitting import Fit
from pyro_bmrs.fitting.settings import Settings
from pyro_bmrs.quality import Diagnosis

NAMES = sorted(Path(__file__).parents[1].joinpath("docs/notebooks").glob("*.ipynb"))
HOSTILE = "<script>alert(1)</script>"


class Whole(HTMLParser):
    """Every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text + " "


def of_program():
    def model(y):
        mean = torch.zeros(3)
        weights = bmrs_sample("weights", dist.Normal(mean, 1.0).to_event(1))
        bmrs_sample("y", dist.Normal(weights, 1.0).to_event(1), obs=y)

    import pyro
    from pyro.infer.autoguide import AutoNormal

    bmrs_sample = pyro.sample
    pyro.clear_param_store()
    guide, y = AutoNormal(model), torch.tensor([0.0, 0.1, 3.0])
    guide(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bmrs.reduce(model, guide, {"weights": 0.0}, y)


def of_path():
    torch.manual_seed(0)
    model = bmrs.Classifier(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    data = torch.randn(60, 4), torch.randint(3, (60,))
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, data, progress=False)
    return bmrs.reduce(model, guide)


STAGES = pd.DataFrame({
    "stage": range(1, 31), "epoch": range(1, 31), "kl_weight": 1.5, "kept": 3, "parameters": 40, "validation_loss": 0.5,
    "standard_error": 0.01, "validation_accuracy": float("nan"), "chosen": [n == 7 for n in range(30)],
})  # fmt: skip
REGRESSION = pd.DataFrame([{
    "network": "full", "prediction": "draws", "examples": 5, "rmse": 61.0, "rmse_error": 3.0, "mae": 50.0, "r2": 0.26,
    "negative_log_likelihood": 1.2, "coverage": 0.9, "width": 180.0,
}])  # fmt: skip


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def fitted(**more):
    made = make_fit(make_plan({"a": torch.randn(9)}))
    return Fit(made.history, made.removals, Settings(epochs=3), best_epoch=3, **more)


CARDS = {
    "structures": (
        lambda: bmrs.structures(conv(), torch.zeros(2, 1, 8, 8)),
        ["40 structures in 2 groups", "filters"],
    ),
    "plan": (lambda: make_plan({HOSTILE: torch.randn(20)}), ["keeps", HOSTILE]),
    "plan of many layers": (
        lambda: make_plan({str(n): torch.randn(3) for n in range(40)}),
        ["… and 24 more"],
    ),
    "path": (of_path, ["laplace", "predicted rise of the loss"]),
    "program": (of_program, ["weights", "elements"]),
    "fit": (fitted, ["Fit of"]),
    "stages": (lambda: fitted(stages=STAGES), ["30 stages", "taken"]),
    "diagnosis": (lambda: make_diagnosis(make_plan({"a": torch.randn(9)})), ["calibration error"]),
    "regression": (lambda: Diagnosis(regression=REGRESSION, notes=[HOSTILE]), ["61", "0.2600", HOSTILE]),
    "frontier": (lambda: make_frontier(make_plan({"a": torch.randn(9)})), ["the plan", "multiply-adds"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_small_and_whole(name):
    make, said = CARDS[name]
    found = make()._repr_html_()
    page = Whole(found)
    assert not page.tags & {"script", "style", "link", "img", "iframe"}
    assert len(found) < 20_000
    for part in said:
        assert part in page.text
    assert "nan" not in page.text.split()


def test_columns_without_values_are_left_out():
    text = Whole(
        notebooks.grid([("a", "A", "text"), ("b", "B", ".2f")], [{"a": "x", "b": float("nan")}])
    ).text
    assert text.split() == ["A", "x"]


@pytest.mark.parametrize("scheme", ["black on white", "white on black"])
def test_a_card_takes_the_colours_of_its_notebook(tmp_path, scheme):
    front, _, back = scheme.split()
    cards = "".join(make()._repr_html_() for make, _ in (CARDS["plan"], CARDS["diagnosis"], CARDS["stages"]))
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><meta charset=utf-8><body style="color:{front};background:{back}">{cards}'
    )
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 800, "height": 600})
        tab.goto(page.as_uri())
        colours = tab.evaluate(
            "[...document.querySelectorAll('td,th,b,div')].map(e => getComputedStyle(e).color)"
        )
        bar = tab.evaluate("document.querySelector('td span span').getBoundingClientRect().width")
        hidden = tab.locator("details table").is_visible()
        tab.locator("summary").first.click()
        assert not hidden
        assert tab.locator("details table").is_visible()
    assert set(colours) == {"rgb(0, 0, 0)" if front == "black" else "rgb(255, 255, 255)"}
    assert bar > 0


@pytest.fixture
def cell(monkeypatch):
    """A cell of a notebook: what it shows, in order."""
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(bundle["text/plain"])

    module = types.ModuleType("IPython.display")
    module.display = lambda bundle, raw, display_id: shown.append(bundle["text/plain"]) or Handle()
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    return shown


def test_progress_in_a_notebook_is_one_line_and_its_last_state_stays(cell, capsys):
    with progress.Progress("fit", 1000) as bar:
        for number in range(1000):
            bar.advance()
            bar.note(f"loss {number}")
            bar.say("a line")
    assert capsys.readouterr().err == ""
    assert 2 <= len(cell) < 20  # and not one for each step
    assert cell[0] == "fit"
    assert "1,000/1,000" in cell[-1]
    assert "loss 999" in cell[-1]


def test_what_is_silent_is_so_in_a_notebook(cell):
    with progress.Progress("fit", 3, shown=False) as bar, progress.bar("draws", 2, shown=False) as advance:
        bar.advance()
        advance(1)
    assert cell == []


def test_a_script_is_no_notebook():
    assert not progress.in_notebook()


def test_a_figure_is_a_picture_in_a_notebook():
    figure = make_frontier(make_plan({"a": torch.randn(9)})).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(figure.axes) >= 1


@pytest.mark.parametrize("path", NAMES, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    found = nbformat.read(path, 4)
    nbformat.validate(found)
    assert all(not cell.get("outputs") for cell in found.cells)


def test_there_are_three_notebooks():
    assert len(NAMES) == 3
