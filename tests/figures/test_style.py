"""What every figure keeps to, whatever the names in its table."""

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import figure_tables
import matplotlib
import pandas as pd
import pytest
from figure_tables import FIGURES, bins, coverages, curves, entropies

from pyro_bmrs.figures import predictions, style
from pyro_bmrs.tables import MOST_CRITERIA

HOSTILE = ["$x_", r"$\frac{$", "<script>alert(1)</script>", "long." * 60, "two\nlines", "_hidden"]


@pytest.mark.parametrize("kind", FIGURES)
def test_every_figure_keeps_the_conventions(kind):
    draw, name, columns, make = FIGURES[kind]
    table = make(HOSTILE)
    untouched = table.copy(deep=True)
    settings = dict(matplotlib.rcParams)
    figure = draw(table)
    assert dict(matplotlib.rcParams) == settings
    pd.testing.assert_frame_equal(table, untouched)
    assert figure.get_figwidth() == 5.0
    assert figure.canvas.manager is None  # pyplot would manage it

    # Drawn outside of the style, as the report does, and readable as text.
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg")
    page = drawing.getvalue()
    assert "<script" not in page
    texts = "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    # the entropy's table has the last four names only, and what is left shows none
    if kind in {"structures", "forest", "reliability", "widths", "criteria", "risk_coverage", "runs"}:
        assert "$x_" in page
        assert "$x_" in texts
        if kind != "reliability":
            assert "_hidden" in page
    assert "long." * 12 not in texts
    assert "two\nlines" not in texts
    # What lies outside of the page would be cut off there; letters are a little wider in pixels than in the SVG.
    box = figure.get_tightbbox()
    assert box.x0 >= -0.03
    assert box.x1 <= 5.03

    for column in columns:
        message = re.escape(f"{name} lacks the column '{column}'; it needs {', '.join(columns)} and has")
        with pytest.raises(ValueError, match=message):
            draw(table.drop(columns=column))


@pytest.mark.parametrize("kind", sorted(FIGURES.keys() - {"compression curve", "history", "removals"}))
def test_nothing_to_show_raises(kind):
    draw, name, _, make = FIGURES[kind]
    table = make(["one"])
    with pytest.raises(ValueError, match=f"{re.escape(name)} has no row"):
        draw(table.iloc[:0])
    if kind in {"structures", "scores"}:  # a score may be no number
        return
    table[table.select_dtypes("float").columns] = math.nan
    if kind == "widths":
        table["before"] = math.inf
    with pytest.raises(ValueError, match=f"{re.escape(name)} has no row with a finite"):
        draw(table)


@pytest.mark.parametrize(
    ("kind", "most"), [("reliability", 6), ("criteria", 8), ("risk_coverage", 6), ("entropy", 4)]
)
def test_no_more_series_than_can_be_told_apart(kind, most: int):
    draw = FIGURES[kind][0]
    make = {"reliability": bins, "criteria": curves, "risk_coverage": coverages, "entropy": entropies}[kind]
    figure = draw(make([f"name {index}" for index in range(most)]))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(text.split(":")[0] for text in texts[:most]) == [f"name {index}" for index in range(most)]
    with pytest.raises(ValueError, match=f"has {most + 1} different .* choose some"):
        draw(make([f"name {index}" for index in range(most + 1)]))


def test_series_differ_by_marker_line_and_colour():
    for name in ("color", "marker", "linestyle"):
        assert len({look[name] for look in style.SERIES}) == len(style.SERIES) == MOST_CRITERIA
    assert len(set(predictions.HATCHES)) == predictions.MOST_DATA
    assert len(style.SERIES) >= style.MOST_NETWORKS


@pytest.mark.slow
def test_pyplot_is_never_loaded_and_matplotlib_only_to_draw():
    program = (
        "import sys; from figure_tables import FIGURES; assert 'matplotlib' not in sys.modules\n"
        "for draw, _, _, make in FIGURES.values(): draw(make(list('abcd')))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    place = Path(figure_tables.__file__).parent
    paths = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
