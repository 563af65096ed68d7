"""The scores are counted on their own side of zero."""

import numpy as np
import pytest
from figure_tables import plan, units

from pyro_bmrs.figures import plot_scores


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e3, 1e9])
def test_every_score_is_counted_and_no_bar_crosses_zero(scale):
    table = units({"narrow": 4, "wide": 2000})
    table["score"] = scale * np.where(table.removed, 0.5, -1.0) * np.random.default_rng(0).random(len(table))
    bars = plot_scores(plan(table)).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == len(table)
    for bar in bars:
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert right <= 1e-9 * scale or left >= -1e-9 * scale
