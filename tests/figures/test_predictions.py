"""Figures of predictions show what their tables say."""

import numpy as np
import pandas as pd
import pytest
from figure_tables import bins, coverages, entropies

from pyro_bmrs.figures import plot_entropy, plot_reliability, plot_risk_coverage


def test_reliability_draws_every_bin_and_the_small_ones_paler():
    table = bins(["full", "reduced"], ["draws", "mean"])
    figure = plot_reliability(table)
    upper, lower = figure.axes
    diagonal, *lines = upper.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [100, 100]]
    shown = table.dropna()
    for index, (_, rows) in enumerate(shown.groupby(["network", "prediction"], sort=False)):
        every, _, large, small = lines[4 * index : 4 * index + 4]
        np.testing.assert_allclose(every.get_xydata(), 100 * rows[["confidence", "accuracy"]])
        few = rows["count"] < 10
        for markers, chosen in ((large, ~few), (small, few)):
            np.testing.assert_allclose(
                markers.get_xydata(), 100 * rows.loc[chosen, ["confidence", "accuracy"]]
            )
        assert small.get_markersize() < large.get_markersize()
        assert small.get_alpha() < large.get_alpha()
        share = lower.lines[index]
        np.testing.assert_allclose(share.get_xdata(), 100 * rows.confidence)
        np.testing.assert_allclose(share.get_ydata(), 100 * rows["count"] / 10_000)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "full, draws", "full, mean", "reduced, draws", "reduced, mean", "perfectly calibrated", "under 10 examples",
    ]  # fmt: skip


def test_reliability_names_no_prediction_where_there_is_one():
    table = bins(["full"])
    texts = [text.get_text() for text in plot_reliability(table[table["count"] >= 10]).legends[0].get_texts()]
    assert texts == ["full", "perfectly calibrated"]


def test_risk_is_drawn_against_coverage_in_order():
    table = coverages(["full", "reduced"])
    (axes,) = plot_risk_coverage(table).axes
    for (_, rows), line in zip(table.groupby("network", sort=False), axes.lines, strict=True):
        np.testing.assert_allclose(
            line.get_xydata(), 100 * rows.sort_values("coverage")[["coverage", "risk"]]
        )
    assert axes.get_ylim()[0] == 0


def test_entropies_are_densities_on_equal_bins():
    table = entropies(["test", "letters"])
    figure = plot_entropy(table)
    (axes,) = figure.axes
    filled, hatched = axes.patches
    assert filled.get_hatch() is None
    assert hatched.get_hatch()
    for patch, (_, rows) in zip(axes.patches, table.groupby("data", sort=False), strict=True):
        values, edges, _ = patch.get_data()
        np.testing.assert_allclose(values, np.histogram(rows.entropy, edges, density=True)[0])
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    assert axes.get_yscale() == "linear"
    assert [text.get_text().split(",")[0] for text in figure.legends[0].get_texts()] == [
        "test: 400", "letters: 400",
    ]  # fmt: skip


def test_a_peak_at_zero_makes_the_density_logarithmic():
    table = entropies(["test", "letters"])
    table.loc[table.data == "test", "entropy"] *= 1e-3
    (axes,) = plot_entropy(table).axes
    assert axes.get_yscale() == "log"
    values, edges, baseline = axes.patches[0].get_data()
    assert values[0] * np.diff(edges)[0] == pytest.approx(1)
    # Not even a single example's step is below the axis.
    single = 1 / (400 * np.diff(edges)[0])
    assert baseline == axes.get_ylim()[0] < single


@pytest.mark.parametrize("entropy", [0.0, -1e-9, 2.3])
def test_one_entropy_is_enough(entropy: float):
    plot_entropy(pd.DataFrame({"data": ["test"] * 3, "entropy": entropy})).savefig("/dev/null", format="svg")
