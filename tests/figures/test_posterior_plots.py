"""Figures of posteriors, predictions and runs show what their tables say, whatever the names in them."""

from __future__ import annotations

import doctest
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.figures import plots, posterior_plots
from pyro_bmrs.figures.plots import plot_history
from pyro_bmrs.figures.posterior_plots import (
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_reliability,
    plot_risk_coverage,
    plot_runs,
    plot_widths,
)

HOSTILE = ["$x_", r"$\frac{$", "<script>alert(1)</script>", "long." * 60, "two\nlines", "_hidden"]


def units(layers: dict[str, int]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    table = pd.DataFrame({"layer": np.repeat(list(layers), list(layers.values()))})
    idle = random.random(len(table)) < 0.6
    return table.assign(
        unit=table.groupby("layer").cumcount(),
        loc=np.where(idle, random.uniform(-25, -8, len(table)), random.uniform(-2, 0.3, len(table))),
        scale=np.where(idle, random.uniform(1, 50, len(table)), random.uniform(0.02, 0.5, len(table))),
        mean=0.5,
        snr=1.0,
        score=np.where(idle, 1.0, -50.0),
        log_evidence_change=0.0,
        removed=idle,
    )


def bins(networks: list[str], predictions: list[str] = ["mean"]) -> pd.DataFrame:  # noqa: B006
    lower = np.arange(10) / 10
    return pd.concat(
        pd.DataFrame(
            {
                "network": network,
                "prediction": prediction,
                "lower": lower,
                "upper": lower + 0.1,
                "count": [0, 0, 3, 9, 10, 28, 50, 100, 800, 9000],
                "confidence": [math.nan, math.nan, *(lower[2:] + 0.06)],
                "accuracy": [math.nan, math.nan, *(lower[2:] + 0.02)],
            }
        )
        for network in networks
        for prediction in predictions
    )


def curves(criteria: list[str]) -> pd.DataFrame:
    removed = np.linspace(0, 0.99, 12)
    tables = [
        pd.DataFrame(
            {
                "criterion": criterion,
                "parameters_removed": removed,
                "accuracy": 0.99 - 0.01 * index * removed - 0.6 * removed**20,
                "score_threshold": np.linspace(5, -500, 12),
                "is_plan": np.arange(12) == 10 - index,
            }
        )
        for index, criterion in enumerate(criteria)
    ]
    return pd.concat(tables, ignore_index=True).sample(frac=1, random_state=0)


def coverages(networks: list[str]) -> pd.DataFrame:
    coverage = np.linspace(0.01, 1, 100)
    tables = [
        {"network": network, "prediction": "mean", "coverage": coverage, "risk": 0.02 * coverage ** (4 + k)}
        for k, network in enumerate(networks)
    ]
    return pd.concat(map(pd.DataFrame, tables)).sample(frac=1, random_state=0)


def many_runs(names: list[str]) -> pd.DataFrame:
    count = np.arange(len(names))
    return pd.DataFrame({"run": names, "parameters": 60000 // (1 + count), "accuracy": 0.99 - 0.001 * count})


def entropies(data: list[str]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    tables = [{"data": name, "entropy": random.gamma(2 + 3 * k, 0.1, 400)} for k, name in enumerate(data)]
    return pd.concat(map(pd.DataFrame, tables), ignore_index=True)


def history() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "phase": ["fit"] * 20 + ["fine-tune"] * 5,
            "epoch": [*range(1, 21), *range(1, 6)],
            "loss": 1.0,
            "log_likelihood": -0.9,
            "kl": 100.0,
            "validation_loss": 0.9,
            "validation_accuracy": 0.98,
            "kept": np.linspace(200, 40, 25).round(),
            "seconds": 1.0,
        }
    )


def removals(counts: dict[tuple[str, int], int], layer: str = "fc1") -> pd.DataFrame:
    rows = [
        {"phase": phase, "epoch": epoch, "layer": layer, "unit": unit}
        for (phase, epoch), count in counts.items()
        for unit in range(count)
    ]
    return pd.DataFrame(rows, columns=plots.REMOVAL_COLUMNS)


def forest(table: pd.DataFrame):
    return plot_forest(SimpleNamespace(table=table))


# Of each figure: how it is drawn from a table, what it calls the table, the columns it needs, and a table in
# which the user's texts are as told.
FIGURES: dict[str, tuple[Callable, str, tuple[str, ...], Callable]] = {
    "forest": (
        forest, "plan.table", plots.TABLE_COLUMNS, lambda names: units(dict.fromkeys(names, 7)),
    ),
    "reliability": (
        plot_reliability, "reliability", posterior_plots.RELIABILITY_COLUMNS,
        lambda names: bins(names[:3], [names[-1], "draws"]),
    ),
    "widths": (
        plot_widths, "widths", posterior_plots.WIDTH_COLUMNS,
        lambda names: pd.DataFrame({"layer": names, "before": 20, "after": np.arange(len(names))}),
    ),
    "criteria": (plot_criteria, "curves", posterior_plots.CRITERIA_COLUMNS, curves),
    "risk_coverage": (plot_risk_coverage, "risk_coverage", posterior_plots.RISK_COLUMNS, coverages),
    "runs": (plot_runs, "runs", posterior_plots.RUN_COLUMNS, many_runs),
    "entropy": (
        plot_entropy, "entropies", posterior_plots.ENTROPY_COLUMNS, lambda names: entropies(names[-4:]),
    ),
    "removals": (
        lambda table: plot_history(history(), table), "removals", plots.REMOVAL_COLUMNS,
        lambda names: pd.concat([removals({("fit", 3): 5, ("reduce", 20): 7}, name) for name in names]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIGURES)
def test_every_figure_keeps_the_conventions(kind: str) -> None:
    draw, name, columns, make = FIGURES[kind]
    table = make(HOSTILE)
    untouched = table.copy(deep=True)
    figure = draw(table)
    pd.testing.assert_frame_equal(table, untouched)
    assert figure.get_figwidth() == 5.0
    assert figure.canvas.manager is None  # pyplot would manage it

    # Drawn outside of the style, as the report does, and readable as text.
    import matplotlib

    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg")
    page = drawing.getvalue()
    assert "<script" not in page
    texts = "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    if kind not in {"entropy", "removals"}:  # the first shows the last four names only, the second none
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


@pytest.mark.parametrize("kind", sorted(FIGURES.keys() - {"removals"}))
def test_nothing_to_show_raises(kind: str) -> None:
    draw, name, _, make = FIGURES[kind]
    table = make(["one"])
    with pytest.raises(ValueError, match=f"{re.escape(name)} has no row"):
        draw(table.iloc[:0])
    table[table.select_dtypes("float").columns] = math.nan
    if kind == "widths":
        table["before"] = math.inf
    with pytest.raises(ValueError, match=f"{re.escape(name)} has no row with a finite"):
        draw(table)


@pytest.mark.parametrize(
    ("kind", "most"), [("reliability", 6), ("criteria", 8), ("risk_coverage", 6), ("entropy", 4)]
)
def test_no_more_series_than_can_be_told_apart(kind: str, most: int) -> None:
    draw = FIGURES[kind][0]
    make = {"reliability": bins, "criteria": curves, "risk_coverage": coverages, "entropy": entropies}[kind]
    figure = draw(make([f"name {index}" for index in range(most)]))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(text.split(":")[0] for text in texts[:most]) == [f"name {index}" for index in range(most)]
    with pytest.raises(ValueError, match=f"has {most + 1} different .* choose some"):
        draw(make([f"name {index}" for index in range(most + 1)]))


def test_series_differ_by_marker_line_and_colour() -> None:
    for part in zip(*posterior_plots.SERIES, strict=True):
        assert len(set(part)) == len(posterior_plots.SERIES) == posterior_plots.MOST_CRITERIA
    assert len(set(posterior_plots.HATCHES)) == posterior_plots.MOST_DATA
    assert len(posterior_plots.SERIES) >= posterior_plots.MOST_NETWORKS


def drawn_units(axes) -> pd.DataFrame:
    """What a panel of the forest shows of each unit, by rank."""
    rows = []
    for line, intervals in zip(axes.lines, axes.collections, strict=True):
        for x, y, ends in zip(*line.get_data(), intervals.get_segments(), strict=True):
            assert ends[0, 0] == ends[1, 0] == x
            rows.append((x, ends[0, 1], y, ends[1, 1], line.get_marker() == "x"))
    return pd.DataFrame(rows, columns=["rank", "low", "median", "high", "removed"]).sort_values("rank")


def test_forest_draws_the_quantiles_of_every_unit_sorted_by_median() -> None:
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


def test_forest_takes_the_bounds_of_the_posterior() -> None:
    table = units({"fc1": 8})
    (axes,) = plot_forest(SimpleNamespace(table=table), log_low=-3.0, log_high=1.0).axes
    q = TruncatedLogNormal(
        torch.tensor(table["loc"].to_numpy()), torch.tensor(table.scale.to_numpy()), -3.0, 1.0
    )
    medians = q.icdf(torch.tensor(0.5, dtype=torch.float64)).sort(descending=True).values
    np.testing.assert_allclose(drawn_units(axes)["median"], medians, rtol=1e-12)
    bottom, top = axes.get_ylim()
    assert math.exp(-3.5) < bottom < math.exp(-3.0)
    assert math.exp(1.0) < top < math.exp(1.5)
    with pytest.raises(ValueError, match="log_low"):
        plot_forest(SimpleNamespace(table=table), log_low=0.0, log_high=-1.0)


def test_forest_shows_500_of_many_from_first_to_last() -> None:
    figure = forest(units({"wide": 1501, "narrow": 500}))
    wide, narrow = map(drawn_units, figure.axes)
    assert len(wide) == len(narrow) == 500
    assert (wide["rank"].min(), wide["rank"].max()) == (1, 1501)
    assert set(np.diff(wide["rank"])) <= {3, 4}
    assert np.all(np.diff(wide["median"]) <= 0)
    assert figure.axes[0].get_title("right").endswith(" of 1,501 kept, 500 shown")
    assert figure.axes[1].get_title("right").endswith(" of 500 kept")


def test_forest_leaves_out_units_without_a_posterior() -> None:
    table = units({"conv1": 6, "gone": 4, "fc1": 10})
    table.loc[table.layer == "gone", "loc"] = math.nan
    table.loc[[0, 1, 2], "scale"] = [math.nan, math.inf, 0.0]
    figure = forest(table)
    assert [axes.get_title("left") for axes in figure.axes] == ["conv1", "fc1"]
    assert len(drawn_units(figure.axes[0])) == 3
    assert figure.axes[0].get_title("right").endswith(" of 6 kept")


def test_large_forest_is_an_image_and_small() -> None:
    drawing = io.StringIO()
    forest(units({f"layer{index}": 500 for index in range(10)})).savefig(drawing, format="svg", dpi=200)
    assert "<image" in drawing.getvalue()
    assert len(drawing.getvalue()) < 1_500_000


def test_forest_labels_powers_of_ten_without_markup() -> None:
    (axes,) = forest(units({"fc1": 4})).axes
    labels = [posterior_plots._power(value) for value in (1.0, 0.01, 1e-8, 10.0, 1e12)]
    assert labels == ["1", "10⁻²", "10⁻⁸", "10¹", "10¹²"]
    assert axes.yaxis.get_major_formatter()(1e-8) == "10⁻⁸"


def test_reliability_draws_every_bin_and_the_small_ones_paler() -> None:
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


def test_reliability_names_no_prediction_where_there_is_one() -> None:
    table = bins(["full"])
    texts = [text.get_text() for text in plot_reliability(table[table["count"] >= 10]).legends[0].get_texts()]
    assert texts == ["full", "perfectly calibrated"]


def test_widths_are_the_bars() -> None:
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
def test_widths_are_logarithmic_beyond_a_factor_of_50(widest: int, scale: str) -> None:
    table = pd.DataFrame({"layer": ["a", "b"], "before": [6, widest], "after": [1, 2]})
    (axes,) = plot_widths(table).axes
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < 1


def test_many_widths_make_a_higher_figure() -> None:
    def height(layers: int) -> float:
        table = pd.DataFrame({"layer": [f"l{k}" for k in range(layers)], "before": 64, "after": 8})
        return float(plot_widths(table).get_figheight())

    assert height(60) - height(30) == pytest.approx(30 * 0.24)


def test_stars_lie_where_the_criteria_stop() -> None:
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
            assert star.get_markeredgecolor() == plots.BLACK
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 4
    assert figure.axes[0].get_xlabel() == ""
    assert figure.axes[1].get_xlabel() == "parameters removed (%)"


def test_criteria_need_no_second_panel_when_all_are_near_the_top() -> None:
    table = curves(["BMRS_N"])
    near = table[table.accuracy > table.accuracy.max() - 0.05]
    assert len(plot_criteria(near).axes) == 1
    assert plot_criteria(table.assign(accuracy=table.accuracy * 0.01)).axes[0].get_ylim()[0] < 0.5


def test_risk_is_drawn_against_coverage_in_order() -> None:
    table = coverages(["full", "reduced"])
    (axes,) = plot_risk_coverage(table).axes
    for (_, rows), line in zip(table.groupby("network", sort=False), axes.lines, strict=True):
        np.testing.assert_allclose(
            line.get_xydata(), 100 * rows.sort_values("coverage")[["coverage", "risk"]]
        )
    assert axes.get_ylim()[0] == 0


def test_runs_are_numbered_points() -> None:
    table = pd.DataFrame(
        {
            "run": ["full", "broken", "half", "small", "gone"],
            "parameters": [61706, math.nan, 30000, 4657, 0],
            "accuracy": [0.9884, 0.9, 0.9889, 0.9899, 0.1],
        }
    )
    figure = plot_runs(table)
    (axes,) = figure.axes
    shown = table.iloc[[0, 2, 3]]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), shown.parameters)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * shown.accuracy)
    assert [text.get_text() for text in axes.texts] == ["1", "3", "4"]
    assert [text.xy for text in axes.texts] == list(zip(shown.parameters, 100 * shown.accuracy, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1  full: 61,706 parameters, 98.84 %",
        "3  half: 30,000 parameters, 98.89 %",
        "4  small: 4,657 parameters, 98.99 %",
    ]
    assert axes.get_xscale() == "log"


def test_numbers_of_runs_in_one_place_dont_overlap() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([np.full((4, 2), 100.0), random.normal(100, 6, (8, 2))])
    labels = points + np.array(posterior_plots._offsets(points))
    apart = np.linalg.norm(labels[:, None] - labels, axis=2)[np.triu_indices(len(labels), 1)]
    assert apart.min() > 10


def test_entropies_are_densities_on_equal_bins() -> None:
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


def test_a_peak_at_zero_makes_the_density_logarithmic() -> None:
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
def test_one_entropy_is_enough(entropy: float) -> None:
    plot_entropy(pd.DataFrame({"data": ["test"] * 3, "entropy": entropy})).savefig("/dev/null", format="svg")


def dashed(figure) -> list[float]:
    """Where the last panel has vertical lines from its bottom to its top."""
    return [float(line.get_xdata()[0]) for line in figure.axes[-1].lines if list(line.get_ydata()) == [0, 1]]


def test_removals_are_marked_at_their_epochs() -> None:
    counts = {("fit", 3): 50, ("fit", 9): 12, ("fit", 20): 7, ("reduce", 20): 187}
    figure = plot_history(history(), removals(counts).sample(frac=1, random_state=0))
    assert dashed(figure) == [3, 9, 20, 20.5]
    axes = figure.axes[-1]
    assert axes.get_ylabel() == "units left"
    written = {text.xy[0]: text.get_text() for text in axes.texts}
    # The seven of epoch 20 are too close to the 187 after it.
    assert written == {3: "−50", 9: "−12", 20.5: "−187"}
    # Above the curve.
    assert axes.get_ylim()[1] > 1.3 * history().kept.max()
    assert not any(axes.texts for axes in figure.axes[:-1])


def test_only_the_six_largest_removals_have_a_number() -> None:
    counts = {("fit", epoch): 10 + epoch for epoch in range(2, 20, 2)}
    figure = plot_history(history(), removals(counts))
    assert dashed(figure) == list(range(2, 20, 2))
    assert sorted(int(text.get_text()[1:]) for text in figure.axes[-1].texts) == [18, 20, 22, 24, 26, 28]


def test_history_without_removals_is_as_before() -> None:
    bare, empty = plot_history(history()), plot_history(history(), removals({}))
    for figure in (bare, empty):
        assert dashed(figure) == []
        assert not figure.axes[-1].texts
        assert "units removed" not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert bare.axes[-1].get_ylim() == empty.axes[-1].get_ylim()


def test_removals_without_a_panel_of_units_are_not_drawn() -> None:
    figure = plot_history(history().assign(kept=math.nan), removals({("fit", 3): 5}))
    assert figure.axes[-1].get_ylabel() == "KL (nats)"
    assert dashed(figure) == []


def test_removals_after_a_fit_that_was_not_fine_tuned_lie_within_the_axis() -> None:
    fitted = history().iloc[:20]
    figure = plot_history(fitted, removals({("reduce", 20): 5}))
    assert dashed(figure) == [20.5]
    assert figure.axes[-1].get_xlim()[1] >= 20.5


def test_figures_leave_the_global_state_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for draw, _, _, make in FIGURES.values():
        draw(make(["one", "two", "three"])).savefig("/dev/null", format="svg")
    assert dict(matplotlib.rcParams) == before
    program = (
        "import sys, doctest, pyro_bmrs.figures.posterior_plots as module; "
        "assert 'matplotlib' not in sys.modules; "
        "assert not doctest.testmod(module)[0]; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_examples_run() -> None:
    result = doctest.testmod(posterior_plots)
    assert result.attempted > 0
    assert result.failed == 0
