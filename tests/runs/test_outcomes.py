"""Runs side by side, one run in a terminal, and which diagnosis a report shows: through the command line."""

import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import call
from diagnosed import DRAWS, RECIPE, RUN_OPTIONS, finished_run

from pyro_bmrs.numerals import percent_with_error
from pyro_bmrs.quality import Diagnosis
from pyro_bmrs.runs import outcomes, report_stage
from pyro_bmrs.runs.folder import FIT_FILES, RunFolder
from pyro_bmrs.runs.outcomes import compare_runs, report_runs, show_runs

pytestmark = pytest.mark.slow

MARKUP = "[red]x[/red]"
ATTACK = "<script>alert(1)|"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run with a diagnosis; to be read only."""
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """The same fit reduced by another criterion, in a folder of the same name, without curve and diagnosis."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("other") / finished.name))
    options = ["--criterion", "Random:fraction=0.5", "--min-kept", 2, "--fine-tune", 0, "--quiet"]
    assert call("reduce", folder, *options) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def only_fitted(finished, tmp_path_factory):
    """A run that has not been reduced."""
    folder = tmp_path_factory.mktemp("only") / "fitted"
    folder.mkdir()
    for name in FIT_FILES:
        shutil.copy(finished / name, folder)
    return folder


def edit_settings(folder, **changes):
    path = folder / "settings.json"
    document = json.loads(path.read_text())
    document["recipe"] = changes.pop("recipe", document["recipe"])
    document["settings"] |= changes
    path.write_text(json.dumps(document))


def rename_layer(folder, before, after):
    """Call a layer otherwise, in the plan and in the diagnosis."""
    path = folder / "plan.json"
    document = json.loads(path.read_text())
    document["layers"] = {
        after if layer == before else layer: size for layer, size in document["layers"].items()
    }
    path.write_text(json.dumps(document))
    diagnosis = RunFolder(folder).diagnosis()
    diagnosis.khat["part"] = diagnosis.khat.part.replace(before, after)
    diagnosis.save(folder / "diagnosis")


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Page(html.parser.HTMLParser):
    """The tables of a page, as a browser would read them, and the names of all tags."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.text, self.table = set(), {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs)["data-name"], [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.table = []

    def handle_data(self, data):
        self.text.append(data)
        if self.table and self.table[-1]:
            self.table[-1][-1] += data.strip()

    def rows(self, name):
        """The rows below the head, as one list for each."""
        return self.tables[name][1:]


def markdown_rows(path, title):
    """The cells of the table below a heading, as they were before they were escaped."""
    part = path.read_text(encoding="utf-8").split(f"## {title}" if title else "\n\n", 1)[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in table}) == 1
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in [table[0], *table[2:]]]


# --- the table -----------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_runs_files(finished, other):
    table = compare_runs([finished, str(other)])
    assert table.run.tolist() == ["finished/spread", f"{other.parent.name}/spread"]
    assert table.recipe.tolist() == ["spread.py", "spread.py"]
    assert table.criterion.tolist() == ["BMRS_N", "Random"]
    assert table.data.tolist() == ["digits"] * 2
    assert table.seed.tolist() == [0, 0]
    assert table.kl_weight.tolist() == [2.0, 2.0]
    for folder, row in zip((finished, other), table.to_dict("records"), strict=True):
        evaluation = pd.read_csv(folder / "evaluation.csv")
        last = evaluation.iloc[-1]
        assert row["parameters_before"] == evaluation.parameters[0] == 1370
        assert row["parameters"] == last.parameters < 1370
        assert row["removed"] == 1 - last.parameters / 1370
        assert row["accuracy"] == last.accuracy
        assert row["negative_log_likelihood"] == last.negative_log_likelihood
    assert table.parameters.nunique() == 2
    quality = pd.read_csv(finished / "diagnosis" / "quality.csv").iloc[-1]
    assert (quality.network, quality.prediction) == ("fine-tuned", "E[θ]")
    assert quality.accuracy == pytest.approx(table.accuracy[0])
    assert table.brier[0] == quality.brier
    assert table.expected_calibration_error[0] == quality.expected_calibration_error
    khat = pd.read_csv(finished / "diagnosis" / "khat.csv")
    # of the parts, not of all together, which would be worse
    assert table.khat[0] == khat.khat[1:].max() < khat.khat[0]
    assert table.loc[1, ["brier", "expected_calibration_error", "khat"]].isna().all()


def test_of_one_part_its_khat_is_the_worst(copied, finished):
    diagnosis = RunFolder(copied).diagnosis()
    diagnosis = replace(diagnosis, khat=diagnosis.khat.iloc[:1])
    diagnosis.save(copied / "diagnosis")
    assert compare_runs([copied, finished]).khat[0] == diagnosis.khat.khat[0]


def test_names_are_as_short_as_they_can_be(finished, tmp_path):
    for name in ("a/x/run", "b/x/run", "b/y/run", "b/y/walk"):
        shutil.copytree(finished, tmp_path / name)
    named = lambda *places: compare_runs([tmp_path / place for place in places]).run.tolist()  # noqa: E731
    assert named("a/x/run", "b/y/walk") == ["run", "walk"]
    assert named("b/x/run", "b/y/run") == ["x/run", "y/run"]
    assert named("a/x/run", "b/x/run", "b/y/walk") == ["a/x/run", "b/x/run", "b/y/walk"]


# --- the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(finished, other, tmp_path_factory):
    """The page of the two, and what the command said."""
    out = tmp_path_factory.mktemp("compared") / "deep" / "x.html"
    assert call("report", finished, other, "--out", out) == 0
    return out


def test_the_command_writes_a_page_and_the_same_as_markdown_and_csv(compared, finished, other):
    assert {path.name for path in compared.parent.iterdir()} == {"x.html", "x.md", "x.csv"}
    table = compare_runs([finished, other])
    pd.testing.assert_frame_equal(pd.read_csv(compared.with_suffix(".csv")), table, check_dtype=False)
    page = Page(compared)
    rows = [
        [
            *(row.run, row.recipe, row.data, row.criterion, "0", "2", "1,370"),
            *(f"{row.parameters:,}", f"{100 * row.removed:.2f} %"),
            percent_with_error(row.accuracy, row.accuracy_error),
            f"{row.negative_log_likelihood:.4f}",
            *(
                "–" if np.isnan(value) else f"{value:.4f}"
                for value in (row.brier, row.expected_calibration_error)
            ),
            "–" if np.isnan(row.khat) else f"{row.khat:.2f}",
        ]
        for row in table.itertuples()
    ]
    assert page.rows("runs") == rows
    in_markdown = markdown_rows(compared.with_suffix(".md"), "")
    assert in_markdown == [page.tables["runs"][0], *rows]
    best = table.loc[table.accuracy.idxmax()]
    sentence = f"2 runs; on digits the smallest that is as accurate as the best, {best.run}, has"
    assert sentence in " ".join("".join(page.text).split()).replace("\u00a0", " ")


def test_runs_are_ranked_within_a_data_set_and_its_errors():
    def told(rows):
        columns = ["run", "data", "accuracy", "accuracy_error", "parameters", "removed"]
        return outcomes._verdict(pd.DataFrame(rows, columns=columns))

    level = ["a", "one", 0.992, 0.001, 900, 0.1], ["b", "one", 0.990, 0.001, 300, 0.7]
    worse, other = ["c", "one", 0.980, 0.001, 100, 0.9], ["d", "two", 0.6, 0.01, 500, 0.5]
    assert told([*level, worse]) == (
        "3 runs; on one the smallest that is as accurate as the best, b, has 99.00 ± 0.10 % with 70.0 % of its "
        "parameters removed"
    )
    assert "best, c, has" not in told([*level, worse])
    both = told([*level, worse, other])
    assert "; on one the smallest" in both
    assert both.endswith(
        "; on two the smallest that is as accurate as the best, d, has 60.0 ± 1.0 % with 50.0 % of its parameters "
        "removed"
    )
    # without errors the most accurate is the best
    nan = float("nan")
    assert "best, a, has 99.20 %" in told([[*row[:3], nan, *row[4:]] for row in level])


def test_settings_that_differ_are_listed_and_no_others(compared, finished, other):
    expected = [
        ["criterion", "BMRS_N", "Random:fraction=0.5"],
        ["min_kept", "1", "2"],
        ["fine_tune", "1", "0"],
    ]
    page = Page(compared)
    assert sorted(page.rows("settings")) == sorted(expected)
    names = compare_runs([finished, other]).run.tolist()
    assert page.tables["settings"][0] == ["setting", *names]
    assert markdown_rows(compared.with_suffix(".md"), "Settings that differ") == [
        ["setting", *names],
        *page.rows("settings"),
    ]


def test_without_a_difference_there_is_no_list_of_them(finished, copied, tmp_path):
    out = report_runs([finished, copied], tmp_path / "x.html")
    assert set(Page(out).tables) == {"runs", "widths"}
    assert "differ" not in out.with_suffix(".md").read_text()


def test_widths_are_those_of_the_plans(compared, finished, other):
    widths = [RunFolder(folder).plan().widths() for folder in (finished, other)]
    expected = [
        [layer, *(f"{before} → {table.after[index]}" for table in widths)]
        for index, (layer, before) in enumerate([("3", 6), ("7", 20)])
    ]
    assert Page(compared).rows("widths") == expected
    assert markdown_rows(compared.with_suffix(".md"), "Structures per layer")[1:] == expected
    assert widths[0].after.tolist() != widths[1].after.tolist()


def test_layers_of_only_one_run_have_a_dash_in_the_other(finished, copied, tmp_path):
    rename_layer(copied, "7", "elsewhere")
    rows = {
        row[0]: row[1:] for row in Page(report_runs([finished, copied], tmp_path / "x.html")).rows("widths")
    }
    assert list(rows) == ["3", "7", "elsewhere"]
    assert rows["7"] == [rows["elsewhere"][1], "–"]
    assert rows["elsewhere"][0] == "–"


def test_a_run_may_be_called_like_a_column(finished, other, tmp_path):
    folders = [tmp_path / name for name in ("setting", "layer", "gone", "run", "criterion")]
    for folder in folders:
        shutil.copytree(other if folder.name == "gone" else finished, folder)
    out = report_runs(folders, tmp_path / "x.html")
    page = Page(out)
    assert page.tables["settings"][0] == ["setting", "setting", "layer", "gone", "run", "criterion"]
    assert ["criterion", "BMRS_N", "BMRS_N", "Random:fraction=0.5", "BMRS_N", "BMRS_N"] in page.rows(
        "settings"
    )
    assert page.tables["widths"][0] == ["layer", "setting", "layer", "gone", "run", "criterion"]
    assert [row[0] for row in page.rows("widths")] == ["3", "7"]
    assert 'class="gone"' not in out.read_text()


@pytest.mark.parametrize("curve", [True, False])
def test_regressions_are_compared_without_accuracies(finished, tmp_path, curve):
    folders = [Path(shutil.copytree(finished, tmp_path / name)) for name in "ab"]
    for folder in folders:
        evaluation = pd.read_csv(folder / "evaluation.csv").assign(accuracy=np.nan)
        evaluation.to_csv(folder / "evaluation.csv", index=False)
        pd.read_csv(folder / "frontier.csv").assign(accuracy=np.nan).to_csv(
            folder / "frontier.csv", index=False
        )
        if not curve:
            (folder / "frontier.csv").unlink()
    page = Page(report_runs(folders, tmp_path / "x.html"))
    assert "svg" not in page.tags
    assert "test accuracy" not in page.tables["runs"][0]
    assert "as accurate as the best" not in " ".join(page.text)


def test_the_most_accurate_is_one_that_has_an_accuracy(finished, copied, tmp_path):
    evaluation = pd.read_csv(copied / "evaluation.csv").assign(accuracy=np.nan)
    evaluation.to_csv(copied / "evaluation.csv", index=False)
    text = report_runs([copied, finished], tmp_path / "x.html").read_text()
    assert "on digits the smallest that is as accurate as the best, spread, has" in text
    assert text.count("<svg") == 2


def test_more_curves_than_can_be_told_apart_are_left_out_and_counted(finished, tmp_path):
    folders = [Path(shutil.copytree(finished, tmp_path / f"run {number}")) for number in range(10)]
    page = Page(report_runs(folders, tmp_path / "x.html"))
    assert len(page.rows("runs")) == 10
    assert "Left out: 2 more runs." in " ".join(page.text)


def test_users_text_is_no_markup(finished, tmp_path):
    folders = [Path(shutil.copytree(finished, tmp_path / name)) for name in (ATTACK, "*b* `c` | [d](e)")]
    edit_settings(folders[1], recipe=ATTACK, criterion="BMRS_N", data=ATTACK)
    rename_layer(folders[1], "7", ATTACK)
    out = report_runs(folders, tmp_path / "x.html")
    page, names = Page(out), [folder.name for folder in folders]
    assert ATTACK not in out.read_text()
    assert out.read_text().count("<script") == 1  # the page's own
    assert [row[0] for row in page.rows("runs")] == names
    assert ["recipe", "spread.py", ATTACK] in page.rows("settings")
    assert ATTACK in [row[0] for row in page.rows("widths")]
    markdown = out.with_suffix(".md")
    assert [row[0] for row in markdown_rows(markdown, "")[1:]] == names
    assert markdown_rows(markdown, "Settings that differ")[0][1:] == names
    assert markdown_rows(markdown, "Structures per layer")[0][1:] == names
    assert re.search(r"(?<!\\)[<>`*\[]", markdown.read_text().replace("**", "")) is None
    assert pd.read_csv(out.with_suffix(".csv")).run.tolist() == names


def test_what_stands_is_whole_whenever_it_fails(finished, other, tmp_path, monkeypatch):
    for suffix in ("html", "md", "csv"):
        (tmp_path / f"x.{suffix}").write_text("earlier")
    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "plot_runs", lambda _: (_ for _ in ()).throw(OSError("out of ink")))
        with pytest.raises(OSError, match="out of ink"):
            report_runs([finished, other], tmp_path / "x.html")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"x.{suffix}": "earlier" for suffix in ("html", "md", "csv")
    }

    def full(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        assert call("report", finished, other, "--out", tmp_path / "x.html") == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"x.{suffix}": "earlier" for suffix in ("html", "md", "csv")
    }


def test_the_same_runs_give_the_same_bytes(compared, finished, other, tmp_path):
    report_runs([finished, other], tmp_path / "x.html")
    for path in compared.parent.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_comparing_reads_only(compared, finished, other, tmp_path):
    before = snapshot(finished), snapshot(other)
    assert call("report", finished, other, "--out", tmp_path / "x.html") == 0
    assert call("show", other) == 0
    assert (snapshot(finished), snapshot(other)) == before


WRONG = [
    ("report RUN RUN", "runs", "given twice"),
    ("report RUN RUN/../spread", "runs", "given twice"),
    ("report RUN OTHER RUN", "runs", "given twice"),
    ("report RUN nothing", "run", "nothing"),
    ("report nothing RUN", "run", "nothing"),
    ("report RUN empty", "run", "empty", "settings.json"),
    ("report RUN file", "run", "file"),
    ("report RUN FITTED", "run", "fitted", "pyro-bmrs reduce"),
    ("report RUN NEWER", "newer"),
    ("report RUN DAMAGED", "diagnosis", "damaged"),
    ("report RUN OTHER --out x.txt", "out", ".html", "x.txt"),
    ("report RUN OTHER --out file/x.html", "file"),
    ("report RUN OTHER --draws 100", "--draws"),
    ("report RUN OTHER --draws 0", "--draws"),
    ("report RUN OTHER --foreign patches", "--foreign"),
    ("report RUN --out x.html", "--out", "x.html"),
    ("report RUN --draws 99", "draws", "99"),
    ("report RUN --draws -1", "draws", "-1"),
    ("report RUN --draws many", "--draws", "'many'"),
    ("report RUN --foreign nonsense", "foreign", "'nonsense'"),
    ("report RUN --foreign coloured.npz", "foreign", "coloured.npz", "(1, 8, 8)"),
    ("report RUN --foreign digits", "foreign", "own", "'digits'"),
    ("report FITTED", "fitted", "plan.json", "pyro-bmrs reduce"),
    ("report DAMAGED", "diagnosis", "damaged"),
    ("run tiny_recipe.py --out new --draws 5", "draws", "5"),
    ("run tiny_recipe.py --out new --foreign nonsense", "foreign", "'nonsense'"),
    ("show", "DIR"),
    ("show RUN RUN", "runs", "given twice"),
    ("show RUN FITTED", "fitted", "pyro-bmrs reduce"),
    ("show RUN nothing", "run", "nothing"),
    ("show nothing", "run", "nothing"),
    ("show empty", "run", "empty"),
    ("show file", "run", "file"),
    ("show FITTED", "fitted", "pyro-bmrs reduce"),
    ("show NEWER", "newer"),
    ("show DAMAGED", "diagnosis", "damaged"),
]


@pytest.fixture(scope="module")
def place(finished, other, only_fitted, tmp_path_factory):
    """A folder with what the command lines below name."""
    place = tmp_path_factory.mktemp("place")
    (place / "file").write_text("not a folder\n")
    (place / "empty").mkdir()
    shutil.copy(RECIPE, place)
    generator = np.random.default_rng(0)
    np.savez(
        place / "coloured.npz",
        **{f"x_{part}": generator.random((6, 8, 8, 3), dtype=np.float32) for part in ("train", "test")},
        **{f"y_{part}": np.arange(6) % 2 for part in ("train", "test")},
    )
    newer = Path(shutil.copytree(finished, place / "other newer"))
    (newer / "diagnosis" / "diagnosis.json").write_text(
        json.dumps({"format": "pyro_bmrs.diagnosis", "version": 9})
    )
    damaged = Path(shutil.copytree(finished, place / "broken"))
    (damaged / "diagnosis" / "quality.csv").write_text("")
    names = {"RUN": finished, "OTHER": other, "FITTED": only_fitted, "NEWER": newer, "DAMAGED": damaged}
    return place, names


@pytest.mark.parametrize(("line", "named"), [(line, named) for line, *named in WRONG])
def test_a_mistake_is_one_line(line, named, place, capsys, monkeypatch):
    folder, names = place
    monkeypatch.chdir(folder)
    before = snapshot(folder), snapshot(names["RUN"])
    words = [str(names[word]) if word in names else word for word in line.split()]
    words = [word.replace("RUN/", f"{names['RUN']}/") for word in words]
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pyro-bmrs: error: ")
    assert captured.err.count("\n") == 1
    assert "report:" not in captured.out
    for name in named:
        assert str(names.get(name, name)) in captured.err
    assert (snapshot(folder), snapshot(names["RUN"])) == before


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_runs_can_not_be_compared(count, finished, tmp_path):
    for function in (compare_runs, lambda folders: report_runs(folders, tmp_path / "x.html")):
        with pytest.raises(ValueError, match=rf"^runs must be at least two, to be compared: got {count}"):
            function([finished] * count)
    assert not list(tmp_path.iterdir())


def test_the_page_is_called_comparison_where_nothing_is_said(finished, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("report", finished, other) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"comparison.{kind}" for kind in ("html", "md", "csv")
    }


# --- in a terminal -------------------------------------------------------------------------------------


def printed(*folders, capsys, monkeypatch, columns=200):
    monkeypatch.setenv("COLUMNS", str(columns))
    capsys.readouterr()
    assert call("show", *folders) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def table_of(text, first):
    """The rows of the table whose first column is so called."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(rf"┃ {re.escape(first)} ", line))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("│"):
            return rows
        rows.append([cell.strip() for cell in line.strip("│").split("│")])
    return rows


def test_show_says_the_essentials(finished, capsys, monkeypatch):
    text = printed(finished, capsys=capsys, monkeypatch=monkeypatch)
    evaluation = pd.read_csv(finished / "evaluation.csv")
    first, last = evaluation.iloc[0], evaluation.iloc[-1]
    share = 100 * (1 - last.parameters / first.parameters)
    assert text.startswith(
        f"{share:.1f} % of 1,370 parameters removed; test accuracy "
        f"{percent_with_error(last.accuracy, last.accuracy_error)} (fine-tuned).\n"
    )
    assert "spread.py on digits, seed 0, KL weight 2, BMRS_N (prior log-odds 0.919)\n" in text
    assert table_of(text, "network") == [
        [
            row.network,
            f"{row.parameters:,}",
            percent_with_error(row.accuracy, row.accuracy_error),
            f"{row.negative_log_likelihood:.4f}",
        ]
        for row in evaluation.itertuples()
    ]
    assert table_of(text, "layer") == [
        [row.layer, str(row.before), str(row.after), f"{100 * (1 - row.after / row.before):.2f} %"]
        for row in RunFolder(finished).plan().widths().itertuples()
    ]
    khat = pd.read_csv(finished / "diagnosis" / "khat.csv", dtype={"part": str})
    assert table_of(text, "part of the posterior") == [
        [row.part, f"{row.khat:.2f}".replace("-", "−"), f"{row.threshold:.2f}"] for row in khat.itertuples()
    ]
    warnings = [line for line in text.splitlines() if line.startswith("! ")]
    assert any("The KL weight of the fit was 2" in warning for warning in warnings)
    high = khat[1:].query("khat > threshold")
    assert len(high)
    named = ", ".join(f"{row.part} ({row.khat:.2f})" for row in high.itertuples())
    assert any(f"Pareto k̂ is above its threshold of 0.50 for {named}" in warning for warning in warnings)
    assert text.endswith(f"report: {finished / 'report.html'}\n")


def test_show_puts_several_side_by_side_with_the_numbers_of_the_page(
    compared, finished, other, capsys, monkeypatch
):
    text = printed(finished, other, capsys=capsys, monkeypatch=monkeypatch)
    page = Page(compared)
    assert text.startswith("2 runs; on digits the smallest that is as accurate as the best, ")
    told = [page.tables["runs"][0], *page.rows("runs")]
    assert table_of(text, "run") == [list(row) for row in zip(*(row[1:] for row in told), strict=True)]
    assert sorted(table_of(text, "setting that differs")) == sorted(page.rows("settings"))
    assert table_of(text, "layer") == page.rows("widths")


def test_show_without_a_difference_has_no_list_of_them(finished, copied, capsys, monkeypatch):
    text = printed(finished, copied, capsys=capsys, monkeypatch=monkeypatch)
    assert "differs" not in text


def test_show_without_a_diagnosis_or_a_report(other, capsys, monkeypatch):
    text = printed(other, capsys=capsys, monkeypatch=monkeypatch)
    assert "k̂" not in text
    assert "report:" not in text
    assert len(table_of(text, "layer")) == 2


def test_markup_in_names_is_printed_as_it_is(copied, capsys, monkeypatch):
    rename_layer(copied, "7", MARKUP)
    edit_settings(copied, recipe=MARKUP, data=":smile: [/]")
    evaluation = pd.read_csv(copied / "evaluation.csv")
    evaluation["network"] = [MARKUP, "[bold]", "[/bold]"]
    evaluation.to_csv(copied / "evaluation.csv", index=False)
    text = printed(copied, capsys=capsys, monkeypatch=monkeypatch)
    assert "\x1b" not in text
    assert text.count(MARKUP) >= 5  # settings, three tables, warning
    assert f"{MARKUP} on :smile: [/], seed 0" in text
    assert [row[0] for row in table_of(text, "network")] == [MARKUP, "[bold]", "[/bold]"]
    assert [row[0] for row in table_of(text, "layer")] == ["3", MARKUP]
    assert [row[0] for row in table_of(text, "part of the posterior")] == ["all latents", "3", MARKUP]
    assert f"{MARKUP} (1." in text


def test_a_long_name_is_told_in_full_in_a_narrow_terminal(copied, capsys, monkeypatch):
    name = "encoder.layers.11.attention.output.noise." * 3
    rename_layer(copied, "7", name)
    text = printed(copied, capsys=capsys, monkeypatch=monkeypatch, columns=60)
    for first in ("layer", "part"):
        assert name in "".join(row[0] for row in table_of(text, first))


def test_show_prints_where_it_is_told(finished):
    from rich.console import Console

    console = Console(record=True, file=Path("/dev/null").open("w"), width=200)  # noqa: SIM115
    show_runs([finished], console)
    assert "1,370 parameters removed" in console.export_text()


# --- which diagnosis a report shows --------------------------------------------------------------------


def sections(folder):
    return set(re.findall(r'<section id="([a-z-]+)"', (folder / "report.html").read_text()))


OF_DIAGNOSIS = {"posterior", "predictions"}


@pytest.fixture
def diagnosing(monkeypatch):
    """What diagnoses were asked for, each a copy of the stored one with other numbers."""
    asked = []

    class Copying:
        def __init__(self, *_, draws, out_of_distribution, **options):
            asked.append(dict(draws=draws, foreign=list(out_of_distribution), **options))
            self.facts = dict(
                stored.facts, draws=draws, out_of_distribution=next(iter(out_of_distribution), None)
            )

        def begin(self):
            return replace(stored, facts=self.facts, parts=())

        def add(self, found, part):
            return replace(found, parts=(*found.parts, part))

    def given(folder):
        nonlocal stored
        stored = Diagnosis.load(folder / "diagnosis")
        return asked

    stored = None
    monkeypatch.setattr(report_stage, "Examination", Copying)
    return given


@pytest.mark.slow
def test_a_report_shows_the_stored_diagnosis(copied, diagnosing, capsys):
    asked, before = diagnosing(copied), snapshot(copied)
    # of the name of this folder, which the command on the page has
    assert call("report", copied, "--quiet") == 0
    page = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    capsys.readouterr()
    assert call("report", copied, "--quiet") == 0
    assert capsys.readouterr().out == f"report: {copied / 'report.html'}\n"
    assert (copied / "report.html").read_bytes() == page
    assert sections(copied) >= OF_DIAGNOSIS
    # the same draws and the same foreign data, asked for by name, are the stored ones too
    assert call("report", copied, "--quiet", "--draws", DRAWS, "--foreign", "patches") == 0
    assert asked == []
    after = snapshot(copied)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"report.html", "report.md"}


@pytest.mark.slow
def test_no_draws_leave_the_diagnosis_out_of_the_report(copied, diagnosing):
    asked, before = diagnosing(copied), snapshot(copied / "diagnosis")
    assert call("report", copied, "--quiet", "--draws", 0) == 0
    assert not sections(copied) & OF_DIAGNOSIS
    assert "k̂" not in (copied / "report.md").read_text()
    assert snapshot(copied / "diagnosis") == before  # it is still there, for the next report
    assert call("report", copied, "--quiet") == 0
    assert sections(copied) >= OF_DIAGNOSIS
    assert asked == []


def test_no_draws_need_no_diagnosis(other, tmp_path, diagnosing):
    copy = Path(shutil.copytree(other, tmp_path / "run"))
    assert call("report", copy, "--quiet", "--draws", 0) == 0
    assert not (copy / "diagnosis").exists()
    assert not sections(copy) & OF_DIAGNOSIS


@pytest.mark.slow
def test_what_else_is_asked_for_is_made_anew_and_the_rest_stays(copied, diagnosing, tmp_path):
    generator = np.random.default_rng(0)
    grey = tmp_path / "grey.npz"
    np.savez(
        grey,
        **{f"x_{part}": generator.random((6, 8, 8), dtype=np.float32) for part in ("train", "test")},
        **{f"y_{part}": np.arange(6) % 2 for part in ("train", "test")},
    )
    asked = diagnosing(copied)
    for options, expected in (
        (["--draws", 120], (120, "patches")),
        (["--foreign", grey], (120, str(grey))),
    ):
        assert call("report", copied, "--quiet", *options) == 0
        made = asked.pop()
        assert (made["draws"], *made["foreign"]) == expected
        assert made["seed"] == 0
        assert made["fine_tuned"] is not None
        facts = Diagnosis.load(copied / "diagnosis").facts
        assert (facts["draws"], facts["out_of_distribution"]) == expected
        assert asked == []
    assert "grey.npz" in (copied / "report.html").read_text()


@pytest.mark.slow
def test_a_complete_run_is_asked_for_more_draws(copied, diagnosing, capsys):
    asked, before = diagnosing(copied), snapshot(copied)
    line = ["run", copied / "recipe.py", "--out", copied, *RUN_OPTIONS]
    assert call(*line, "--draws", DRAWS) == 0
    assert "already holds this run" in capsys.readouterr().out
    assert snapshot(copied) == before
    assert call(*line, "--draws", 150) == 0
    assert "already holds this run" not in capsys.readouterr().out
    assert [made["draws"] for made in asked] == [150]
    changed = {name for name, stamp in snapshot(copied).items() if stamp != before.get(name)}
    assert {name for name in changed if not name.startswith("diagnosis/")} == {"report.html", "report.md"}


@pytest.mark.slow
def test_a_damaged_diagnosis_is_made_anew_when_draws_are_asked_for(copied, diagnosing, capsys):
    asked = diagnosing(copied)
    (copied / "diagnosis" / "quality.csv").write_text("")
    assert call("report", copied, "--quiet") == 2
    assert "--draws" in capsys.readouterr().err
    assert call("report", copied, "--quiet", "--draws", 110) == 0
    assert [made["draws"] for made in asked] == [110]
    assert Diagnosis.load(copied / "diagnosis").facts["draws"] == 110


@pytest.mark.slow
def test_more_draws_are_really_drawn(copied):
    before = Diagnosis.load(copied / "diagnosis")
    assert call("report", copied, "--quiet", "--draws", 150) == 0
    after = Diagnosis.load(copied / "diagnosis")
    assert after.facts == {**before.facts, "draws": 150}
    assert after.khat.threshold[0] > before.khat.threshold[0]
    assert (after.khat.khat != before.khat.khat).all()
    assert "150 draws" in (copied / "report.html").read_text()
    # what no draw has a part in
    pd.testing.assert_frame_equal(after.curves, before.curves)


@pytest.mark.slow
def test_foreign_data_must_have_the_form_of_the_runs_own(tmp_path, monkeypatch, capsys):
    """Digits are grey."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    np.savez(
        "coloured.npz",
        **{f"x_{part}": generator.random((60, 8, 8, 3), dtype=np.float32) for part in ("train", "test")},
        **{f"y_{part}": np.arange(60) % 3 for part in ("train", "test")},
    )
    line = f"run {RECIPE} --data coloured.npz --out run --limit 50 --epochs 1 --fine-tune 0 --draws 0 --quiet"
    assert call(*line.split()) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert call("report", "run", "--foreign", "digits", "--quiet") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "foreign 'digits' can't be used" in error
    assert "(3, 8, 8)" in error
    assert snapshot(tmp_path) == before


def test_another_reduction_leaves_no_stale_diagnosis_or_report(copied):
    gone = {"report.html", "report.md", "frontier.csv"}
    before = set(snapshot(copied))
    assert gone < before
    assert call("reduce", copied, "--criterion", "SNR", "--fine-tune", 0, "--quiet") == 0
    after = set(snapshot(copied))
    assert before - after == gone | {name for name in before if name.startswith("diagnosis/")}
    assert not (copied / "diagnosis").exists()
    table = compare_runs([copied, finished_run_of(copied)])
    assert table.criterion[0] == "SNR"
    assert np.isnan(table.khat[0])


def finished_run_of(copied):
    """Any other run to compare with."""
    return Path(shutil.copytree(copied, copied.parent / "another"))
