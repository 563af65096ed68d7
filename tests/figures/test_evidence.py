"""Figures of evidence show what they are given."""

import pyro.distributions as dist
import pytest
import torch
from model_files import model_file

from pyro_bmrs import exhaustive_reduction, plot_models, plot_reductions

pytestmark = pytest.mark.usefixtures("empty_store")


def test_reductions(tmp_path):
    figure = plot_reductions(
        dist.Normal(0.4, 0.3), dist.Normal(0.0, 1.0),
        {"smaller": dist.Normal(0.0, 0.2), "elsewhere": dist.Normal(2.0, 0.5)}, torch.linspace(-2, 3, 200),
    )  # fmt: skip
    assert len(figure.axes) == 2
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    titles = [axes.get_title() for axes in figure.axes]
    assert "smaller: ΔF = +0." in titles[0]
    assert "better" in titles[0]
    assert "worse" in titles[1]
    figure.savefig(tmp_path / "figure.svg")


def test_models(tmp_path):
    regression = model_file("linear_regression")
    x, y = regression.diabetes()
    found = exhaustive_reduction(
        regression.model, regression.posterior(x, y), {"weights": 0.0}, x, y,
        groups={name: {"weights": k} for k, name in enumerate(regression.NAMES)},
    )  # fmt: skip
    figure = plot_models(found, count=5)
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == found.table(5).probability.tolist()
    assert [label.get_text() for label in lower.get_yticklabels()] == list(regression.NAMES)
    crossed = sum(line.get_marker() == "x" for line in lower.lines)
    assert crossed == sum(int(model).bit_count() for model in found.table(5).model)
    figure.savefig(tmp_path / "models.svg")
