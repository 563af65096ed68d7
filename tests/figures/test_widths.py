"""The widths are the bars."""

import numpy as np
import pandas as pd
import pytest

from pyro_bmrs.figures import plot_widths


def test_widths_are_the_bars():
    table = pd.DataFrame({"layer": ["conv1", "conv2", "fc1"], "before": [6, 16, 1200], "after": [6, 9, 0]})
    figure = plot_widths(table)
    (axes,) = figure.axes
    outlines, filled = axes.containers
    assert [bar.get_width() for bar in outlines] == table.before.tolist()
    assert [bar.get_width() for bar in filled] == table.after.tolist()
    assert [text.get_text() for text in axes.texts] == ["6 → 6", "16 → 9", "1,200 → 0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == table.layer.tolist()
    # The first is on top.
    heights = axes.transData.transform([(1, bar.get_y()) for bar in outlines])[:, 1]
    assert np.all(np.diff(heights) < 0)
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 6


@pytest.mark.parametrize(("widest", "scale"), [(300, "linear"), (301, "log")])
def test_widths_are_logarithmic_beyond_a_factor_of_50(widest: int, scale: str):
    table = pd.DataFrame({"layer": ["a", "b"], "before": [6, widest], "after": [1, 2]})
    (axes,) = plot_widths(table).axes
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < 1


def test_many_widths_make_a_higher_figure():
    def height(layers: int) -> float:
        table = pd.DataFrame({"layer": [f"l{k}" for k in range(layers)], "before": 64, "after": 8})
        return float(plot_widths(table).get_figheight())

    assert height(60) - height(30) == pytest.approx(30 * 0.24)
