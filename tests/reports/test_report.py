"""The report is one safe, complete, reproducible file, and refuses what it can't read before it writes."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from diagnosed import make_diagnosis, random_scores
from diagnosed import make_plan as by_hand

from pyro_bmrs.numerals import percent
from pyro_bmrs.pruning import NetworkPlan, Rule
from pyro_bmrs.quality import Diagnosis
from pyro_bmrs.reports.report import report
from pyro_bmrs.reports.words import BASELINE, SHRUNK, asked, recommendation, removal_warnings
from pyro_bmrs.tables import (
    COST_COLUMNS,
    CURVE_COLUMNS,
    EVALUATION_COLUMNS,
    HISTORY_COLUMNS,
    TABLE_COLUMNS,
)

# The package's attribute of this name is the function.
report_module = sys.modules["pyro_bmrs.reports.report"]

LENET5 = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84}
HOSTILE = "<script>alert(1)</script>"


def make_plan(
    layers: dict[str, int] = LENET5,
    *,
    kl_weight: float = 1.0,
    evidence: bool = True,
    margin: float = 1.0,
) -> SimpleNamespace:
    """A plan in which about two thirds of the units score at least ``margin``, the others at most -30."""
    random = np.random.default_rng(0)
    tables = []
    for layer, width in layers.items():
        idle = random.random(width) < 0.66
        loc = np.where(idle, random.uniform(-19, -12, width), random.uniform(-2, -0.05, width))
        score = np.where(idle, margin + 2 * random.random(width), -(10 ** random.uniform(1.5, 3.5, width)))
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "unit": np.arange(width),
                    "loc": loc,
                    "scale": np.where(idle, 3.0, 0.05),
                    "mean": np.exp(loc),
                    "snr": np.where(idle, 0.3, 20.0),
                    "score": score,
                    "log_evidence_change": score - 0.919 if evidence else np.nan,
                    "removed": score >= 0,
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)

    def widths() -> pd.DataFrame:
        groups = table.groupby("layer", sort=False)["removed"]
        after = (groups.size() - groups.sum()).to_numpy()
        return pd.DataFrame({"layer": list(layers), "before": list(layers.values()), "after": after})

    rule = Rule(
        criterion="BMRS_N" if evidence else "SNR",
        prior_log_odds=0.919 if evidence else None,
        kl_weight=kl_weight,
    )
    return SimpleNamespace(table=table, rule=rule, widths=widths, cautions=rule.cautions, kinds=dict)


def make_costs() -> pd.DataFrame:
    return pd.DataFrame(
        {"before": [61706, 416520, 1.9], "after": [3949, 98000, float("nan")]},
        index=["parameters", "multiply_accumulates", "milliseconds_batch_1_one_thread"],
    )


def make_fit() -> SimpleNamespace:
    epochs, tuned = 24, 12
    step = np.arange(epochs + tuned)
    fitting = step < epochs
    loss = 0.08 + 1.5 * np.exp(-step / 4)
    history = pd.DataFrame(
        {
            "phase": np.where(fitting, "fit", "fine-tune"),
            "epoch": step + 1,
            "loss": loss + np.where(fitting, 0.3, 0.0),
            "log_likelihood": -loss,
            "kl": np.where(fitting, 900 - 500 * np.exp(-step / 6), np.nan),
            "validation_loss": loss + 0.02,
            "validation_accuracy": 0.99 - 0.4 * np.exp(-step / 3),
            "kept": np.where(fitting, 226 - (180 * (1 - np.exp(-step / 8))).astype(int), 35),
            "seconds": 4.2,
        }
    )
    return SimpleNamespace(
        history=history, settings={"epochs": 24, "batch_size": 128, "kl_weight": 100.0, "seed": 0}
    )


def make_curve() -> pd.DataFrame:
    removed = np.linspace(0, 0.99, 30)
    return pd.DataFrame(
        {
            "parameters_removed": removed,
            "accuracy": 0.99 - 0.6 * removed**40,
            "loss": 0.1 + 0.9 * removed**40,
            "score_threshold": np.linspace(5, -5000, 30),
            "is_plan": np.arange(30) == 28,
        }
    )


def make_evaluation() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "network": ["full, posterior mean", "reduced", "fine-tuned"],
            "split": "test",
            "accuracy": [0.9911, 0.9872, 0.9886],
            "negative_log_likelihood": [0.031, 0.045, 0.041],
            "parameters": [61706, 3949, 3949],
        }
    )


def write(path: Path, plan: SimpleNamespace | None = None, **changes: object) -> str:
    given: dict[str, object] = {
        "fit": make_fit(),
        "curve": make_curve(),
        "evaluation": make_evaluation(),
        "costs": make_costs(),
        "settings": {"recipe": "models/lenet5.py", "data": "mnist", "versions": {"torch": "2.6.0"}},
    }
    given.update(changes)
    written = report(given.pop("fit"), make_plan() if plan is None else plan, path, **given)  # type: ignore[arg-type]
    assert written == path
    return written.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Collects what a browser would build: tags with their attributes, and the text of each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("page") / "report.html")


def test_says_the_verdict_and_holds_every_section(page: str) -> None:
    assert "93.6 % of 61,706 parameters removed; test accuracy 98.86 % (fine-tuned)." in page
    assert "No size was asked for: the evidence decided." in page
    assert "the full network was not trained as long. A run with --baseline tells." in page
    identifiers = [attributes.get("id") for _, attributes in Page(page).tags]
    for section in ("warnings", "before-after", "map", "decision", "history", "structures", "settings"):
        assert section in identifiers
    assert page.count("<svg") == 6
    assert "15.63×" in page
    assert "versions.torch" in page


def rows(*accuracies: tuple[str, float]) -> pd.DataFrame:
    table = pd.DataFrame(accuracies, columns=["network", "accuracy"])
    return table.assign(accuracy_error=0.001, split="test", negative_log_likelihood=0.1, parameters=9)


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        (
            rows((BASELINE, 0.991), ("full, E[θ]", 0.95), ("fine-tuned", 0.99)),
            "Against the full network trained as long it loses 0.10 ± 0.14 points, which is within the error: use it.",
        ),
        (
            rows((BASELINE, 0.991), ("fine-tuned", 0.98)),
            "trained as long it loses 1.10 ± 0.14 points. If that is too much, take a larger one.",
        ),
        (rows(("full, E[θ]", 0.991), ("reduced", 0.97), ("fine-tuned", 0.99)), "A run with --baseline tells"),
        (rows((SHRUNK, 0.991), ("reduced", 0.99)), "A run with --baseline tells"),
        (
            rows(("full", 0.991), ("reduced", 0.990)),
            "it loses 0.10 ± 0.14 points, which is within the error: use it.",
        ),
        (
            rows(("full", 0.991), ("reduced", 0.90)),
            "it loses 9.10 ± 0.14 points: train it for some epochs, with",
        ),
        (
            rows(("full", 0.5), ("reduced", 0.9)).drop(columns="accuracy_error"),
            "it gains 40.00 points: use it.",
        ),
        (rows(("reduced", 0.991)), None),
        (rows(), None),
        (None, None),
    ],
)
def test_recommends_what_the_numbers_say(evaluation: pd.DataFrame | None, told: str | None) -> None:
    found = recommendation(make_plan(), evaluation, None, "plan.within(parameters={})")
    assert found is None if told is None else told in str(found)


def test_recommends_a_size_where_nothing_was_removed() -> None:
    plan, evaluation = make_plan(), rows((BASELINE, 0.99), ("fine-tuned", 0.99))
    plan.table["removed"] = False
    found = recommendation(plan, evaluation, 61706, "plan.within(parameters={})")
    assert found == "Nothing was removed: ask for a size, such as half of it by plan.within(parameters=30853)"
    assert recommendation(plan, evaluation, None, "") == "Nothing was removed: ask for a size"


def test_only_the_evidence_decides_where_it_does() -> None:
    rule = make_plan().rule
    assert asked(replace(rule, threshold=0.0)) == "No size was asked for: the evidence decided."
    for other in (replace(rule, threshold=-20.0), Rule(criterion="SNR", threshold=0.0)):
        assert asked(other) == "No size was asked for."
    assert asked(replace(rule, budget={"parameters": 12341.0})) == "Asked for: at most 12,341 parameters."


def test_the_verdict_has_errors_and_the_network_that_was_trained_as_long(tmp_path: Path) -> None:
    evaluation = rows((BASELINE, 0.991), ("full, E[θ]", 0.95), ("fine-tuned", 0.98))
    page = write(tmp_path / "report.html", evaluation=evaluation).replace("\u00a0", " ")
    assert (
        "test accuracy 98.00 ± 0.10 % (fine-tuned), 99.10 ± 0.10 % of the full network trained as long."
        in page
    )


def test_columns_that_say_nothing_are_not_shown_and_times_have_errors(
    tmp_path: Path,
) -> None:
    costs = make_costs().assign(error=0.0)
    costs.loc["milliseconds_batch_1_one_thread"] = [2.0, 2.0, 0.0]
    costs.loc["milliseconds_batch_128_one_thread"] = [2.0, 1.0, 0.031]
    evaluation = make_evaluation().assign(accuracy=np.nan)
    page = write(tmp_path / "report.html", costs=costs, evaluation=evaluation, curve=None)
    assert '<button type="button">accuracy</button>' not in page
    assert "negative log-likelihood (nats per example)</button>" in page
    assert re.search(r"one thread \(ms\)</td><td>2.000</td><td>2.000</td><td>none</td>", page)
    assert "<td>50.0 ± 3.1 %</td>" in page


@pytest.mark.slow
def test_leaves_out_what_is_not_given(tmp_path: Path) -> None:
    plan = make_plan()
    page = write(
        tmp_path / "report.html", plan, fit=None, curve=None, evaluation=None, costs=None, settings=None
    )
    assert page.count("<svg") == 4
    assert 'id="history"' not in page
    share = plan.table["removed"].mean()
    assert f"{100 * share:.1f} % of 226 structures removed." in page


@pytest.mark.slow
def test_verdict_falls_back_to_validation_and_then_to_the_curve(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", evaluation=None)
    assert "93.6 % of 61,706 parameters removed; validation accuracy 99.00 % after the last epoch." in page
    page = write(tmp_path / "report.html", evaluation=None, fit=None)
    assert re.search(r"parameters removed; accuracy \d\d\.\d\d %\.", page)


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.5, "50.0 %"), (1.0, "100.0 %"), (0.99999, "99.999 %"), (0.0004, "0.04 %"), (float("nan"), "–")],
)
def test_rounding_never_claims_all_or_nothing(fraction: float, text: str) -> None:
    assert percent(fraction) == text


def test_users_text_is_escaped(tmp_path: Path) -> None:
    other = "$\\frac{\"'&</svg>\n名"
    plan = make_plan({HOSTILE: 8, other: 8})
    plan.rule = replace(plan.rule, criterion=HOSTILE)
    evaluation = make_evaluation().assign(network=HOSTILE, split=HOSTILE)
    page = write(tmp_path / "report.html", plan, evaluation=evaluation, settings={HOSTILE: HOSTILE})
    assert HOSTILE not in page
    parsed = Page(page)
    # Three times at the least: in the table of widths, in the figure and in the table of units.
    assert sum(HOSTILE in text for text in parsed.texts) >= 3
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    # of Markdown too: no tag, and no cell of a table more than its columns
    assert "<script>" not in re.sub(r"\\\\.", "", text)
    rows = [line for line in text.splitlines() if line.startswith("|") and "alert" in line]
    assert rows
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {5, 6}


def test_markdown_says_the_essentials(tmp_path: Path) -> None:
    write(tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "93.6 % of 61,706 parameters removed" in text
    assert "| conv1 | 6 |" in text
    assert "## Methods, to paste" in text
    assert "| parameters | 61,706 | 3,949 | 93.6 % |" in text


def test_the_markdown_can_not_be_the_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must not end in \.md"):
        write(tmp_path / "report.md")
    assert not list(tmp_path.iterdir())


def test_loads_nothing_from_outside(page: str) -> None:
    for tag, attributes in Page(page).tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "@import" not in page
    assert re.search(r"url\((?!#)", page) is None


def test_identifiers_are_unique_and_every_reference_has_its_target(page: str) -> None:
    identifiers = [attributes["id"] for _, attributes in Page(page).tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert references
    assert references <= set(identifiers)


@pytest.mark.slow
def test_size_is_bounded(tmp_path: Path) -> None:
    assert len(write(tmp_path / "report.html").encode()) < 500_000
    large = make_plan({"narrow": 4, **{f"wide {layer}": 2000 for layer in range(10)}})
    page = write(tmp_path / "large.html", large)
    assert len(page.encode()) < 2_000_000
    assert (
        "2,000 of 20,004 structures with a score closest to the threshold; all of them are in structures.csv"
        in page
    )
    assert page[page.index("<tbody>", page.index('data-name="structures"')) :].count("<tr") == 2000


def test_large_tables_show_the_closest_scores() -> None:
    plan = make_plan({"wide": 6000})
    table = plan.table
    table.loc[17, "score"] = np.nan
    shown = report_module._structures(plan, Diagnosis())
    hidden = table.drop(shown.index)
    assert len(shown) == 2000
    assert shown["score"].abs().max() <= hidden["score"].abs().min()
    assert 17 in hidden.index
    assert shown.index.is_monotonic_increasing


@pytest.mark.slow
def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "first.html") == write(tmp_path / "second.html")


def without_column(name: str, column: str) -> dict[str, object]:
    plan, fit, curve, evaluation, costs = (
        make_plan(),
        make_fit(),
        make_curve(),
        make_evaluation(),
        make_costs(),
    )
    if name == "plan.table":
        plan.table = plan.table.drop(columns=column)
    elif name == "costs":
        costs = costs.drop(columns=column)
    elif name == "fit.history":
        fit.history = fit.history.drop(columns=column)
    elif name == "curve":
        curve = curve.drop(columns=column)
    else:
        evaluation = evaluation.drop(columns=column)
    return {"plan": plan, "fit": fit, "curve": curve, "evaluation": evaluation, "costs": costs}


@pytest.mark.parametrize(
    ("name", "column", "needed"),
    [
        ("plan.table", "score", TABLE_COLUMNS),
        ("costs", "before", COST_COLUMNS),
        ("fit.history", "kept", HISTORY_COLUMNS),
        ("curve", "is_plan", CURVE_COLUMNS),
        ("evaluation", "split", EVALUATION_COLUMNS),
    ],
)
def test_missing_column_raises_and_leaves_the_file_untouched(
    tmp_path: Path, name: str, column: str, needed: tuple[str, ...]
) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier", encoding="utf-8")
    message = re.escape(f"{name} lacks the column '{column}'; it needs {', '.join(needed)} and has")
    with pytest.raises(ValueError, match=message):
        write(path, **without_column(name, column))  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_file_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier", encoding="utf-8")

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path)
    assert path.read_text(encoding="utf-8") == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("full", ["full, E[θ]", "shrunk in the fit, E[θ]"])
@pytest.mark.parametrize(("loss", "told"), [(0.35, False), (2.1, True)])
def test_a_removal_that_costs_much_is_a_warning(full: str, loss: float, told: bool) -> None:
    rows = [(full, 0.11, 0.98), ("reduced", loss, 0.15), ("fine-tuned", 1.5, 0.37)]
    evaluation = pd.DataFrame(rows, columns=["network", "negative_log_likelihood", "accuracy"])
    found = removal_warnings(evaluation)
    assert len(found) == told
    if told:
        assert "cost 1.99 nats per example (test accuracy 98.0 % → 15.0 %)" in found[0]
    assert removal_warnings(evaluation.iloc[:1]) == removal_warnings(evaluation.iloc[1:]) == []
    assert removal_warnings(None) == []


@pytest.mark.parametrize("plan", [None, "plan.json"])
def test_what_is_no_plan_raises(plan: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"plan must be what reduce returned: got (NoneType|str)"):
        report(None, plan, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_plan_without_units_raises(tmp_path: Path) -> None:
    plan = make_plan()
    plan.table = plan.table.iloc[:0]
    with pytest.raises(ValueError, match=r"plan\.table has no rows"):
        write(tmp_path / "report.html", plan)
    assert not list(tmp_path.iterdir())


def test_makes_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "run" / "one" / "report.html")
    assert sorted(entry.name for entry in (tmp_path / "run" / "one").iterdir()) == [
        "report.html",
        "report.md",
    ]


@pytest.mark.slow
def test_kl_weight_is_named_wherever_evidence_is_shown(tmp_path: Path) -> None:
    tempered = Page(write(tmp_path / "report.html", make_plan(kl_weight=100.0)))
    labels = [text for text in tempered.texts if "ΔF (" in text]
    # The table's two headings, the map's colour bar and the histogram's axis.
    assert len(labels) == 4
    assert all("KL weight 100" in label for label in labels)
    warnings = " ".join(tempered.texts)
    assert "ΔF is the evidence of the tempered model p(y|θ)^(1/100)" in warnings
    assert "The KL weight of the fit was 100" in warnings

    plain = " ".join(Page(write(tmp_path / "report.html", make_plan())).texts)
    assert "ΔF (nats)" in plain
    assert "tempered" not in plain
    assert "KL weight" not in plain


@pytest.mark.slow
def test_criterion_without_evidence_names_itself(tmp_path: Path) -> None:
    texts = Page(write(tmp_path / "report.html", make_plan(evidence=False))).texts
    assert any("score (SNR)" in text for text in texts)
    assert not any("from ΔF" in text for text in texts)


@pytest.mark.slow
def test_warns_of_floors_and_narrow_decisions(tmp_path: Path) -> None:
    calm = write(tmp_path / "report.html", make_plan({"conv1": 60, "fc1": 120}))
    assert "<p>None.</p>" in calm

    plan = make_plan({"conv1": 6, "fc1": 120})
    plan.table.loc[plan.table["layer"] == "conv1", ["score", "removed"]] = [2.0, True]
    plan.table.loc[3, "removed"] = False
    plan.table.loc[[10, 11], ["score", "removed"]] = [[0.05, True], [0.1, True]]
    plan.table.loc[12, ["score", "removed"]] = [-0.05, False]
    text = " ".join(Page(write(tmp_path / "report.html", plan)).texts)
    assert (
        "Layer conv1 is left with 1 structure of 6; its score is above the threshold, and only the floor keeps it."
        in text
    )
    assert "Layer fc1" not in text
    removed = int(plan.table["removed"].sum())
    assert f"2 of {removed} removed structures have a score within 0.1 of the threshold" in text


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    plan = make_plan(evidence=False)
    plan.table.loc[0, ["loc", "scale", "mean", "snr", "score"]] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    evaluation = make_evaluation()
    evaluation["parameters"] = pd.array([61706, None, 3949], dtype="Int64")
    evaluation["accuracy"] = [0.99, 0.98, np.nan]
    fit = make_fit()
    fit.history["validation_accuracy"] = np.nan
    fit.settings = {"learning_rate": float("nan"), "seed": None}
    curve = make_curve()
    curve.loc[3, "accuracy"] = np.nan
    page = write(tmp_path / "report.html", plan, fit=fit, evaluation=evaluation, curve=curve)
    texts = [text.strip().lower() for text in Page(page).texts]
    assert not {"nan", "inf", "-inf", "none", "<na>"} & set(texts)
    assert texts.count("–") >= 5
    assert "test accuracy 98.00 % (reduced)" in page
    assert "1 of 226 structures have a score that is not a finite number" in page


@pytest.mark.parametrize(
    "score", [-3.0, *(pytest.param(score, marks=pytest.mark.slow) for score in (0.0, 40.0, float("nan")))]
)
def test_one_unit_is_enough(tmp_path: Path, score: float) -> None:
    plan = make_plan({"fc1": 1})
    plan.table["score"] = score
    write(tmp_path / "report.html", plan)


@pytest.mark.slow
def test_figures_leave_the_global_state_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write(tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_importing_loads_no_plotting_library() -> None:
    program = (
        "import sys; import pyro_bmrs.reports.report, pyro_bmrs.figures; "
        "loaded = {'matplotlib', 'jinja2'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_public_name_is_the_function() -> None:
    program = (
        "import pyro_bmrs.reports.report, pyro_bmrs; "
        "assert callable(pyro_bmrs.report) and callable(pyro_bmrs.reports.report)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def diagnosed(plan: NetworkPlan) -> dict[str, object]:
    """What belongs to a page beside the plan, with a diagnosis that was made for this plan."""
    return {"fit": None, "curve": None, "diagnosis": make_diagnosis(plan)}


@pytest.mark.slow
def test_a_plan_at_another_threshold_is_described_as_such(tmp_path: Path) -> None:
    scores = {"a": [-310.0, -301.0, -290.0, 5.0], "b": [-300.05, -299.95, 1.0, -500.0]}
    gone = [("a", 3)]
    plan = by_hand(scores, gone=gone, log_odds=0.5).at(-300.0)
    page = Page(write(tmp_path / "report.html", plan, **diagnosed(plan)))
    text = " ".join(page.texts)
    rule = "ΔF of Given plus the prior log-odds of 0.5 nats was at least -300"
    assert text.count(rule) == 2  # below the verdict, and in the methods
    assert "Before that, 1 had been removed during the fit" in text
    assert "by the same rule" not in text
    assert "1 of 4 removed structures have a score within 0.1 of the threshold" in text
    assert "the dashed line is the threshold of -300." in text
    decisions = [part for part in page.texts if part in ("kept", "removed", "removed in the fit")]
    rows = decisions[-len(plan.table) :]
    assert rows == ["kept", "kept", "removed", "removed in the fit", "kept", "removed", "removed", "kept"]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "at least -300" in markdown


@pytest.mark.slow
def test_a_plan_of_a_search_has_a_page(tmp_path: Path) -> None:
    plan = by_hand(random_scores({"a": 6, "b": 5}))
    given = diagnosed(plan)
    odds = {"one": 0.5, "other": -1.0}
    rule = replace(plan.rule, criterion="greedy search by given priors", threshold=None, prior_log_odds=odds)
    page = Page(write(tmp_path / "report.html", replace(plan, rule=rule), **given))
    text = " ".join(page.texts)
    assert "A search decided about all structures together: greedy search by given priors" in text
    assert "Structures by score." in text  # no line at a threshold that there is not
    assert "kept by the floor" not in text
    assert "sizes" not in {attributes.get("id") for _, attributes in page.tags}
