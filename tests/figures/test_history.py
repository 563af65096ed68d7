"""The history shows its epochs, and where structures were removed."""

import math

import numpy as np
from figure_tables import history, removals

from pyro_bmrs.figures import plot_history


def test_history_with_one_phase_or_no_numbers():
    table = history()
    assert len(plot_history(table).axes) == 4
    assert len(plot_history(table.iloc[:1]).axes) == 4
    empty = table.assign(loss=np.nan, log_likelihood=np.nan, validation_loss=np.nan, kl=np.nan)
    empty = empty.assign(validation_accuracy=np.nan, kept=np.nan)
    plot_history(empty).savefig("/dev/null", format="svg")


def dashed(figure) -> list[float]:
    """Where the last panel has vertical lines from its bottom to its top."""
    return [float(line.get_xdata()[0]) for line in figure.axes[-1].lines if list(line.get_ydata()) == [0, 1]]


def test_removals_are_marked_at_their_epochs():
    counts = {("fit", 3): 50, ("fit", 9): 12, ("fit", 20): 7, ("reduce", 20): 187}
    figure = plot_history(history(), removals(counts).sample(frac=1, random_state=0))
    assert dashed(figure) == [3, 9, 20, 20.5]
    axes = figure.axes[-1]
    assert axes.get_ylabel() == "structures left"
    written = {text.xy[0]: text.get_text() for text in axes.texts}
    # The seven of epoch 20 are too close to the 187 after it.
    assert written == {3: "−50", 9: "−12", 20.5: "−187"}
    # Above the curve.
    assert axes.get_ylim()[1] > 1.3 * history().kept.max()
    assert not any(axes.texts for axes in figure.axes[:-1])


def test_only_the_six_largest_removals_have_a_number():
    counts = {("fit", epoch): 10 + epoch for epoch in range(2, 20, 2)}
    figure = plot_history(history(), removals(counts))
    assert dashed(figure) == list(range(2, 20, 2))
    assert sorted(int(text.get_text()[1:]) for text in figure.axes[-1].texts) == [18, 20, 22, 24, 26, 28]


def test_history_without_removals_is_as_before():
    bare, empty = plot_history(history()), plot_history(history(), removals({}))
    for figure in (bare, empty):
        assert dashed(figure) == []
        assert not figure.axes[-1].texts
        assert "structures removed" not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert bare.axes[-1].get_ylim() == empty.axes[-1].get_ylim()


def test_removals_without_a_panel_of_units_are_not_drawn():
    figure = plot_history(history().assign(kept=math.nan), removals({("fit", 3): 5}))
    assert figure.axes[-1].get_ylabel() == "KL (nats)"
    assert dashed(figure) == []


def test_removals_after_a_fit_that_was_not_fine_tuned_lie_within_the_axis():
    fitted = history().iloc[:20]
    figure = plot_history(fitted, removals({("reduce", 20): 5}))
    assert dashed(figure) == [20.5]
    assert figure.axes[-1].get_xlim()[1] >= 20.5
