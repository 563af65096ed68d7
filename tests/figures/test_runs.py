"""Runs are numbered points."""

import math

import numpy as np
import pandas as pd

from pyro_bmrs.figures import plot_runs
from pyro_bmrs.figures import runs as module


def test_runs_are_numbered_points():
    table = pd.DataFrame(
        {
            "run": ["full", "broken", "half", "small", "gone"],
            "parameters": [61706, math.nan, 30000, 4657, 0],
            "accuracy": [0.9884, 0.9, 0.9889, 0.9899, 0.1],
        }
    )
    figure = plot_runs(table)
    (axes,) = figure.axes
    shown = table.iloc[[0, 2, 3]]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), shown.parameters)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * shown.accuracy)
    assert [text.get_text() for text in axes.texts] == ["1", "3", "4"]
    assert [text.xy for text in axes.texts] == list(zip(shown.parameters, 100 * shown.accuracy, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1  full: 61,706 parameters, 98.84 %",
        "3  half: 30,000 parameters, 98.89 %",
        "4  small: 4,657 parameters, 98.99 %",
    ]
    assert axes.get_xscale() == "log"


def test_numbers_of_runs_in_one_place_dont_overlap():
    random = np.random.default_rng(0)
    points = np.concatenate([np.full((4, 2), 100.0), random.normal(100, 6, (8, 2))])
    labels = points + np.array(module._offsets(points))
    apart = np.linalg.norm(labels[:, None] - labels, axis=2)[np.triu_indices(len(labels), 1)]
    assert apart.min() > 10
