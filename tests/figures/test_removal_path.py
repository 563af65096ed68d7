"""The figure of a path of removals."""

import numpy as np
import pytest
from figure_tables import paths

from pyro_bmrs.figures import plot_removal_path


def test_lines_and_marks_are_those_of_the_table():
    figure = plot_removal_path(paths(), chosen=2)
    above, below = figure.axes
    assert above.lines[0].get_ydata().tolist() == [20.0, 60.0, 10.0, -500.0]
    assert below.lines[0].get_ydata().tolist() == [1.0, 5.0, 30.0, 400.0]
    assert below.lines[1].get_xdata().tolist() == [70.0, 20.0]
    assert below.lines[1].get_ydata().tolist() == [6.0, 900.0]
    assert [line.get_xdata()[0] for line in (above.lines[-1], below.lines[-1])] == [70, 70]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "ΔF",
        "predicted",
        "measured",
        "plan",
    ]
    # fewer parameters to the right; a deep fall does not flatten the top
    assert below.get_xlim()[0] > below.get_xlim()[1]
    assert above.get_ylim()[0] == -60


def test_places_without_evidence_are_left_out_and_none_is_refused():
    table = paths()
    table.loc[1, "total_evidence_change"] = np.nan
    assert plot_removal_path(table).axes[0].lines[0].get_xdata().tolist() == [90, 40, 20]
    with pytest.raises(ValueError, match=r"plan\.path has no row with a finite"):
        plot_removal_path(table.assign(total_evidence_change=np.nan))
