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


def test_colours_tell_the_distance_from_the_plans_threshold():
    """At any threshold a score that is just kept has the colours' middle."""
    table = units({"layer": 3}).assign(score=[-320.0, -300.0, -280.0], removed=[False, True, True])
    at_zero, below = plan(table.assign(score=table.score + 300)), plan(table)
    below.rule = below.rule.at(-300.0)
    colours = []
    for made in (at_zero, below):
        kept, removed = plot_structures(made).axes[0].collections
        colours.append([*kept.get_facecolors().tolist(), *removed.get_edgecolors().tolist()])
    assert colours[0] == colours[1]
    texts = [axes.get_xlabel() for axes in plot_structures(below).axes]
    assert "← keep | score, from ΔF (nats), above -300 | remove →" in texts
