"""Curves are drawn in order, with a star where a criterion stops."""

import numpy as np
import pytest
from figure_tables import curves

from pyro_bmrs.figures import plot_compression_curve, plot_criteria
from pyro_bmrs.figures.style import BLACK


def test_the_stopping_point_of_one_curve_is_marked():
    curve = curves(["BMRS_N"])
    line, star = plot_compression_curve(curve).axes[0].lines
    places = ["parameters_removed", "accuracy"]
    np.testing.assert_allclose(line.get_xydata(), 100 * curve.sort_values("parameters_removed")[places])
    assert star.get_marker() == "*"
    np.testing.assert_allclose(star.get_xydata(), 100 * curve[curve.is_plan][places])


def test_stars_lie_where_the_criteria_stop():
    table = curves(["BMRS_N", "SNR", "L2"])
    figure = plot_criteria(table)
    assert len(figure.axes) == 2
    best = 100 * table.accuracy.max()
    assert figure.axes[0].get_ylim()[0] == pytest.approx(best - 5)
    for axes in figure.axes:
        lines, stars = axes.lines[::2], axes.lines[1::2]
        assert len(lines) == len(stars) == 3
        for (_, rows), line, star in zip(table.groupby("criterion", sort=False), lines, stars, strict=True):
            ordered = rows.sort_values("parameters_removed")
            np.testing.assert_allclose(line.get_xydata(), 100 * ordered[["parameters_removed", "accuracy"]])
            stop = rows[rows.is_plan]
            assert star.get_marker() == "*"
            np.testing.assert_allclose(star.get_xydata(), 100 * stop[["parameters_removed", "accuracy"]])
            assert star.get_color() == line.get_color()
            assert star.get_markeredgecolor() == BLACK
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 4
    assert figure.axes[0].get_xlabel() == ""
    assert figure.axes[1].get_xlabel() == "parameters removed (%)"


def test_criteria_need_no_second_panel_when_all_are_near_the_top():
    table = curves(["BMRS_N"])
    near = table[table.accuracy > table.accuracy.max() - 0.05]
    assert len(plot_criteria(near).axes) == 1
    assert plot_criteria(table.assign(accuracy=table.accuracy * 0.01)).axes[0].get_ylim()[0] < 0.5


def test_without_classes_the_loss_is_drawn():
    table = curves(["BMRS_N", "SNR"]).assign(accuracy=np.nan)
    figure = plot_criteria(table)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "loss (nats)"
    ordered = table[table.criterion == "SNR"].sort_values("parameters_removed")
    np.testing.assert_allclose(axes.lines[2].get_xdata(), 100 * ordered.parameters_removed)
    np.testing.assert_allclose(axes.lines[2].get_ydata(), ordered.loss)
