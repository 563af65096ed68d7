"""The forest shows the posterior of every structure."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from figure_tables import forest, plan, units

from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.figures import forest as module
from pyro_bmrs.figures import plot_forest


def drawn_units(axes) -> pd.DataFrame:
    """What a panel of the forest shows of each unit, by rank."""
    rows = []
    for line, intervals in zip(axes.lines, axes.collections, strict=True):
        for x, y, ends in zip(*line.get_data(), intervals.get_segments(), strict=True):
            assert ends[0, 0] == ends[1, 0] == x
            rows.append((x, ends[0, 1], y, ends[1, 1], line.get_marker() == "x"))
    return pd.DataFrame(rows, columns=["rank", "low", "median", "high", "removed"]).sort_values("rank")


def test_forest_draws_the_quantiles_of_every_unit_sorted_by_median():
    table = units({"conv1": 6, "fc1": 300}).sample(frac=1, random_state=0)
    figure = forest(table)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        layer = table[table.layer == axes.get_title("left")]
        q = TruncatedLogNormal(torch.tensor(layer["loc"].to_numpy()), torch.tensor(layer.scale.to_numpy()))
        expected = pd.DataFrame(
            {
                "low": q.icdf(torch.tensor(0.05, dtype=torch.float64)),
                "median": q.icdf(torch.tensor(0.5, dtype=torch.float64)),
                "high": q.icdf(torch.tensor(0.95, dtype=torch.float64)),
                "removed": layer.removed.to_numpy(),
            }
        ).sort_values("median", ascending=False, ignore_index=True)
        shown = drawn_units(axes)
        assert shown["rank"].tolist() == list(range(1, len(layer) + 1))
        assert shown.removed.tolist() == expected.removed.tolist()
        for column in ("low", "median", "high"):
            np.testing.assert_allclose(shown[column], expected[column], rtol=1e-12)
        assert axes.get_title("right") == f"{(~layer.removed).sum()} of {len(layer)} kept"
        assert axes.get_yscale() == "log"


def test_forest_takes_the_bounds_of_the_posterior():
    table = units({"fc1": 8})
    (axes,) = plot_forest(plan(table), log_low=-3.0, log_high=1.0).axes
    q = TruncatedLogNormal(
        torch.tensor(table["loc"].to_numpy()), torch.tensor(table.scale.to_numpy()), -3.0, 1.0
    )
    medians = q.icdf(torch.tensor(0.5, dtype=torch.float64)).sort(descending=True).values
    np.testing.assert_allclose(drawn_units(axes)["median"], medians, rtol=1e-12)
    bottom, top = axes.get_ylim()
    assert math.exp(-3.5) < bottom < math.exp(-3.0)
    assert math.exp(1.0) < top < math.exp(1.5)
    with pytest.raises(ValueError, match="log_low"):
        plot_forest(plan(table), log_low=0.0, log_high=-1.0)


def test_forest_shows_500_of_many_from_first_to_last():
    figure = forest(units({"wide": 1501, "narrow": 500}))
    wide, narrow = map(drawn_units, figure.axes)
    assert len(wide) == len(narrow) == 500
    assert (wide["rank"].min(), wide["rank"].max()) == (1, 1501)
    assert set(np.diff(wide["rank"])) <= {3, 4}
    assert np.all(np.diff(wide["median"]) <= 0)
    assert figure.axes[0].get_title("right").endswith(" of 1,501 kept, 500 shown")
    assert figure.axes[1].get_title("right").endswith(" of 500 kept")


def test_forest_leaves_out_units_without_a_posterior():
    table = units({"conv1": 6, "gone": 4, "fc1": 10})
    table.loc[table.layer == "gone", "loc"] = math.nan
    table.loc[[0, 1, 2], "scale"] = [math.nan, math.inf, 0.0]
    figure = forest(table)
    assert [axes.get_title("left") for axes in figure.axes] == ["conv1", "fc1"]
    assert len(drawn_units(figure.axes[0])) == 3
    assert figure.axes[0].get_title("right").endswith(" of 6 kept")


@pytest.mark.slow
def test_large_forest_is_an_image_and_small():
    drawing = io.StringIO()
    forest(units({f"layer{index}": 500 for index in range(10)})).savefig(drawing, format="svg", dpi=200)
    assert "<image" in drawing.getvalue()
    assert len(drawing.getvalue()) < 1_500_000


def test_forest_labels_powers_of_ten_without_markup():
    (axes,) = forest(units({"fc1": 4})).axes
    labels = [module._power(value) for value in (1.0, 0.01, 1e-8, 10.0, 1e12)]
    assert labels == ["1", "10⁻²", "10⁻⁸", "10¹", "10¹²"]
    assert axes.yaxis.get_major_formatter()(1e-8) == "10⁻⁸"
