"""The map has one cell per structure."""

import numpy as np
import pytest
from figure_tables import plan, units

from pyro_bmrs.figures import plot_structures


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e9])
def test_one_cell_per_structure_in_the_order_of_scores(scale):
    table = units({"narrow": 4, "wide": 300})
    table["score"] *= scale * np.random.default_rng(0).random(len(table))
    table.loc[table.layer == "narrow", "removed"] = [True, False, True, False]
    figure = plot_structures(plan(table))
    figure.savefig("/dev/null", format="svg")
    kept, removed = figure.axes[0].collections
    gone = table.removed.to_numpy()
    assert len(kept.get_offsets()) == (~gone).sum()
    assert len(removed.get_offsets()) == gone.sum()
    assert kept.get_paths()[0].vertices.shape != removed.get_paths()[0].vertices.shape
    wide = (table.layer == "wide").to_numpy()
    places = np.empty((len(table), 2))
    places[~gone], places[gone] = kept.get_offsets(), removed.get_offsets()
    reading_order = np.lexsort((places[wide, 0], places[wide, 1].round(6)))
    assert np.all(np.diff(table.score.to_numpy()[wide][reading_order]) >= 0)
