"""The pages in a browser: what is shown is what was computed, nothing else runs and nothing is fetched."""

import io
import math
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from browser import Watched, chromium
from diagnosed import (
    finished_run,
    make_curve,
    make_diagnosis,
    make_evaluation,
    make_fit,
    make_frontier,
    make_plan,
    random_scores,
)

from pyro_bmrs import NetworkPlan
from pyro_bmrs.quality import Diagnosis, Frontier
from pyro_bmrs.reports import report
from pyro_bmrs.runs.outcomes import report_runs
from pyro_bmrs.runs.run import Run

LENET5 = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84}
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "\"><img src=x onerror='window.hacked = 3'>",
    "'; window.hacked = 4; '",
    "{{ 7 * 7 }} $\\frac{x}{y}$ `${window.hacked = 5}`",
    "&lt;b&gt; 名🎉 & <b>, </b>",
    "line\nbreak \u2028 </style><style>body { display: none }",
]
ATTACKING_FACT = '\\"; window.hacked = 7; //\n</script>\\'
ATTACKING_FOLDER = "<img src=x onerror='window.hacked = 6'>"
# of elements with text of their own: colour and opaque background, as a list of [text, colour, background]
COLOURS = """() => {
  const transparent = colour => /^rgba\\(.*, 0\\)$/.test(colour), found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg, script, style, [hidden]") || !element.getClientRects().length) continue;
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own && element.tagName !== "INPUT") continue;
    let behind = element;
    while (behind && transparent(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    found.push([element.textContent.trim().slice(0, 40), getComputedStyle(element).color,
                getComputedStyle(behind ?? document.documentElement).backgroundColor]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def watch(browser):
    """Opens pages, in which nothing may have gone wrong when the test ends."""
    opened = []

    def look(path, **options):
        opened.append(Watched(browser, path, **options))
        return opened[-1]

    yield look
    for watched in opened:
        watched.close()
    assert [wrong for watched in opened for wrong in watched.wrong] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A really fitted run: its page, and its plan with the network that counts parameters."""
    folder = finished_run(tmp_path_factory.getbasetemp())
    current = Run(folder, progress=False)
    plan = current.plan().bound_to(current.network, current.example)
    return SimpleNamespace(
        page=folder / "report.html",
        plan=plan,
        sizes=Frontier.load(folder / "frontier.csv", plan),
        before=current.parameters_before,
        command="pyro-bmrs reduce spread --parameters",
    )


def written(folder, plan, **changes):
    """The page of a plan made by hand, with all that belongs to it."""
    given = {"evaluation": make_evaluation(), "settings": {"a": 1}, **changes}
    if not changes:
        given |= dict(diagnosis=make_diagnosis(plan), curve=make_curve(plan), frontier=make_frontier(plan))
    return report(make_fit(plan), plan, folder / "report.html", **given)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The page of a plan without evidence, with structures that the fit removed, whose scores are unknown."""
    scores = random_scores({"conv2": 8, "conv10": 12, "fc": 10})
    gone = [("conv10", 3), ("conv10", 4), ("fc", 0)]
    for layer, unit in gone:
        scores[layer][unit] = math.nan
    plan = make_plan(scores, gone=gone, log_odds=None, min_kept=2, round_to=2)
    page = written(tmp_path_factory.mktemp("by hand"), plan)
    sizes = make_frontier(plan)
    before = sizes.table.parameters.max()
    return SimpleNamespace(
        page=page, plan=plan, sizes=sizes, before=before, command="plan.within(parameters="
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page in which every text that a user could have chosen is an attack."""
    plan = make_plan(random_scores(dict.fromkeys(HOSTILE, 5)), criterion=HOSTILE[0])
    diagnosis = make_diagnosis(plan, foreign=HOSTILE[3], names=(HOSTILE[4], HOSTILE[5]), notes=HOSTILE)
    diagnosis.facts["curves_of"] = ATTACKING_FACT
    page = written(
        tmp_path_factory.mktemp("hostile"),
        plan,
        evaluation=make_evaluation(names=(HOSTILE[1], HOSTILE[2]), split=HOSTILE[0]),
        diagnosis=diagnosis,
        curve=make_curve(plan),
        frontier=make_frontier(plan),
        command=f"{HOSTILE[2]} {{}}",
        settings={**dict(zip(HOSTILE, reversed(HOSTILE), strict=True)), "inner": {HOSTILE[1]: HOSTILE}},
    )
    return SimpleNamespace(page=page, plan=plan)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of two runs, from folders of one name."""
    folder = finished_run(tmp_path_factory.getbasetemp())
    place = tmp_path_factory.mktemp("compared")
    copies = [place / name / folder.name for name in (ATTACKING_FOLDER, "copy")]
    for copy in copies:
        shutil.copytree(folder, copy)
    settings = (folder / "settings.json").read_text().replace('"seed": 0', '"seed": 7')
    (copies[1] / "settings.json").write_text(settings.replace("spread.py", "<b>spread</b>"))
    return SimpleNamespace(page=report_runs(copies, place / "comparison.html"))


PAGES = ["run", "by_hand", "hostile", "compared"]


@pytest.fixture(params=["run", *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])])
def page(request):
    return request.getfixturevalue(request.param).page


# --- the watch itself ----------------------------------------------------------------------------------


def test_whatever_goes_wrong_is_seen(browser, tmp_path):
    (tmp_path / "other.css").write_text("")
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><link rel=stylesheet href=other.css><p onclick=1>text</p>"
        "<script>console.warn('careful'); console.error('wrong'); console.log('fine'); alert('what')</script>"
        "<script>undefined.name</script>"
    )
    watched = Watched(browser, page)
    watched.close()
    assert len(watched.wrong) == 5
    for part in ("request: ", "other.css", "warning: careful", "error: wrong", "dialog: what", "exception: "):
        assert any(part in line for line in watched.wrong), part


# --- what is in a page ---------------------------------------------------------------------------------


def test_a_page_opens_in_peace_and_allows_nothing_from_outside(watch, page):
    watched = watch(page)
    policy = watched.page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert policy.startswith("default-src 'none'")
    assert watched.page.locator("main section").count() >= 3
    for link in watched.page.locator("nav a").all():
        target = link.get_attribute("href")
        assert watched.page.locator(target).count() == 1, target
        link.click()  # it leads to a place in this very page


def test_what_is_asked_of_the_outside_is_refused(browser, run):
    """By the page's policy, not by the machine's being offline."""
    watched = Watched(browser, run.page)
    refused = watched.page.evaluate(
        """() => new Promise(resolve => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", event => {
                refused.push(event.effectiveDirective);
                if (refused.length === 3) resolve(refused.sort());
            });
            fetch("https://example.org/").catch(() => {});
            new Image().src = "https://example.org/x.png";
            document.head.append(Object.assign(document.createElement("script"), {src: "https://example.org/x.js"}));
        })"""
    )
    watched.context.close()
    assert refused == ["connect-src", "img-src", "script-src-elem"]


@pytest.mark.slow
def test_every_text_of_a_user_is_shown_as_text(watch, hostile):
    watched = watch(hostile.page)
    assert watched.page.evaluate("window.hacked") is None
    assert watched.page.locator("img, main style:not(svg style), b b, form, iframe").count() == 0
    assert watched.page.locator("script").count() == 3
    # a browser shows a line break as a space, and keeps it all the same
    for table in ("widths", "structures", "khat"):
        shown = watched.texts(f"table[data-name={table}] td:first-child")
        assert set(HOSTILE) <= {text.strip() for text in shown}, table
    for section in ("#sizes-layers .soft", "#settings li", "#settings dt", "#settings dd"):
        shown = watched.texts(section)
        for name in HOSTILE:
            assert any(name in text for text in shown), (section, name)
    for name, table in ((HOSTILE[1], "evaluation"), (HOSTILE[4], "quality")):
        assert name in watched.text(f"table[data-name={table}]")
    assert HOSTILE[0] in watched.text("header")
    assert HOSTILE[2] in watched.text(".verdict").replace("\u00a0", " ")
    assert HOSTILE[0] in watched.page.title()
    assert watched.page.locator(".cells i").first.get_attribute("title") == f"{HOSTILE[0]} 0"
    assert HOSTILE[0] in watched.text("#methods .methods")
    assert f"measured on {ATTACKING_FACT}" in watched.text("#sizes")
    assert watched.text("#sizes-command").startswith(HOSTILE[2])
    assert (
        watched.text("#sizes-structures")
        == f"{(~hostile.plan.table.removed).sum()} of {len(hostile.plan.table)}"
    )
    # the figures' letters are text too
    drawn = "".join(watched.texts("svg text"))
    assert "<" in drawn
    assert "script" in drawn


@pytest.mark.slow
def test_a_comparison_shows_users_text_as_text(watch, compared):
    watched = watch(compared.page)
    assert watched.page.evaluate("window.hacked") is None
    assert watched.page.locator("b b, img").count() == 0
    names = [text.strip() for text in watched.texts("table[data-name=runs] tbody td:first-child")]
    assert names == [f"{ATTACKING_FOLDER}/spread", "copy/spread"]
    settings = [text.strip() for text in watched.texts("table[data-name=settings] tbody td")]
    assert settings == ["recipe", "spread.py", "<b>spread</b>", "seed", "0", "7"]
    heads = [text.strip() for text in watched.texts("table[data-name=widths] th")]
    assert heads == ["layer", *names]


@pytest.mark.slow
def test_a_score_of_exactly_0_goes_unless_the_floor_keeps_it(watch, tmp_path):
    plan = make_plan({"at 0": [0.0, 5.0], "below": [-1.0, 0.0], "above": [1.0, 2.0]})
    watched = watch(written(tmp_path, plan))
    decisions = [[row[0], *row[2:3]] for row in cells(watched, "structures")]
    assert decisions == [
        ["at 0", "kept by the floor"], ["at 0", "removed"],
        ["below", "kept"], ["below", "removed"],
        ["above", "kept by the floor"], ["above", "removed"],
    ]  # fmt: skip
    assert watched.text("#sizes-structures") == "3 of 6"


# --- the slider ----------------------------------------------------------------------------------------


class Slider:
    """The page's slider, and what was measured at the same places."""

    def __init__(self, watched, given):
        self.watched, self.given, self.page = watched, given, watched.page
        self.slider = self.page.locator("#sizes-slider")
        self.own = int(given.sizes.table.is_plan.to_numpy().argmax())

    def to(self, place):
        self.slider.evaluate(
            "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }", place
        )

    def place(self):
        return int(self.slider.input_value())

    def check(self, place):
        """All that is shown is what was measured of the network at this place."""
        row, there = self.given.sizes.table.iloc[place], self.given.sizes.plans[place]
        widths = there.widths()
        headings = self.watched.texts("#sizes-layers .soft")
        assert headings == [f"{one.layer}: {one.after:,} of {one.before:,}" for one in widths.itertuples()]
        assert self.watched.text("#sizes-structures") == f"{row.structures:,} of {widths.before.sum():,}"
        cells = self.page.locator(".cells i").evaluate_all(
            "marks => marks.map(mark => mark.classList.contains('out'))"
        )
        assert cells == there.table.removed.tolist()
        assert self.watched.text("#sizes-parameters") == f"{row.parameters:,}"
        share = 100 * (1 - row.parameters / self.given.before)
        assert self.watched.text("#sizes-parameters-note") == f"parameters left, {share:.1f} % removed"
        assert self.watched.text("#sizes-work") == f"{row.multiply_accumulates:,}"
        assert self.watched.text("#sizes-work-note").endswith(" ms") == math.isfinite(row.milliseconds)
        assert self.watched.text("#sizes-accuracy") == f"{100 * row.accuracy:.2f} %"
        assert self.watched.text("#sizes-accuracy-note").startswith("accuracy, measured at this size; loss ")
        assert self.watched.text("#sizes-command").startswith(f"{self.given.command}")
        assert f"{row.parameters}" in self.watched.text("#sizes-command")
        told = self.watched.text("#sizes-mark")
        assert ("as decided" in told) == row.is_plan
        assert ("the evidence's own choice" in told) == row.is_evidence
        assert ("within one standard error" in told) == row.is_one_standard_error


def test_the_button_copies_the_command(watch, by_hand):
    watched = watch(by_hand.page, permissions=["clipboard-read", "clipboard-write"])
    watched.page.locator("#sizes-slider").press("Home")
    command = watched.text("#sizes-command")
    watched.page.locator("#sizes-copy").click()
    watched.page.get_by_role("button", name="copied", exact=True).wait_for()  # the clipboard answers later
    assert watched.text("#sizes-copy") == "copied"
    assert watched.page.evaluate("navigator.clipboard.readText()") == command
    watched.page.locator("#sizes-slider").press("End")
    assert watched.text("#sizes-copy") == "copy"


@pytest.fixture(params=["run", pytest.param("by_hand", marks=pytest.mark.slow)])
def slider(request, watch):
    given = request.getfixturevalue(request.param)
    return Slider(watch(given.page), given)


def test_the_slider_says_what_was_measured(slider):
    assert slider.place() == slider.own  # as the page is opened
    slider.check(slider.own)
    assert len(slider.given.sizes.table) >= 6
    for place in range(len(slider.given.sizes.table)):
        slider.to(place)
        assert slider.place() == place
        slider.check(place)
    slider.page.locator("#sizes-reset").click()
    assert slider.place() == slider.own
    slider.check(slider.own)


def test_the_slider_moves_by_keyboard(slider):
    last = len(slider.given.sizes.table) - 1
    slider.slider.focus()
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("End", last)):
        slider.page.keyboard.press(key)
        assert slider.place() == place
        slider.check(place)


# --- tables --------------------------------------------------------------------------------------------


def cells(watched, name):
    """The rows that are seen, as texts."""
    return watched.page.locator(f"table[data-name={name}] tbody tr:visible").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )


def values(watched, name):
    """The rows that are seen: of each cell its number, or its text."""
    return watched.page.locator(f"table[data-name={name}] tbody tr:visible").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.dataset.value ?? cell.textContent.trim()))"
    )


def head(watched, table, label):
    exact = re.compile(f"^{re.escape(label)}$")
    return watched.page.locator(f"table[data-name={table}] th").filter(has=watched.page.get_by_text(exact))


def keys(frame):
    return list(zip(frame.layer, frame.unit.astype(str), strict=True))


def shown_keys(watched):
    return [(row[0], row[1]) for row in values(watched, "structures")]


def rounded(plan):
    """The numbers as the page has them, with ten digits; what has no number in the end."""
    return plan.table.assign(score=[float(f"{score:.10g}") for score in plan.table.score])


def test_a_click_sorts_by_number_and_again_the_other_way_round(watch, by_hand):
    watched = watch(by_hand.page)
    table = rounded(by_hand.plan)
    assert shown_keys(watched) == keys(table)
    assert table.score.isna().sum() == 3
    for label, column in (("score (SNR)", "score"), ("SNR", "snr"), ("structure", "unit")):
        for ascending in (True, False):
            heading = head(watched, "structures", label)
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == ("ascending" if ascending else "descending")
            table = table.sort_values(column, ascending=ascending, kind="stable", na_position="last")
            assert shown_keys(watched) == keys(table), (label, ascending)
    assert watched.page.locator("table[data-name=structures] th[aria-sort]").count() == 1


@pytest.mark.slow
def test_the_keyboard_sorts_too_and_text_by_its_numbers(watch, by_hand):
    watched = watch(by_hand.page)
    button = head(watched, "structures", "layer").locator("button")
    for key, layers in (("Enter", ["conv2", "conv10", "fc"]), ("Space", ["fc", "conv10", "conv2"])):
        button.focus()
        watched.page.keyboard.press(key)
        table = by_hand.plan.table
        table = table.sort_values("layer", key=lambda column: column.map(layers.index), kind="stable")
        assert shown_keys(watched) == keys(table)
    assert head(watched, "structures", "layer").get_attribute("aria-sort") == "descending"
    # a text column that is not the first
    head(watched, "structures", "decision").locator("button").click()
    decisions = [row[2] for row in values(watched, "structures")]
    assert decisions == sorted(decisions)
    assert set(decisions) > {"kept", "removed", "removed in the fit"}


@pytest.mark.slow
def test_khat_sorts_as_the_number_it_is(watch, by_hand):
    watched = watch(by_hand.page)
    assert [row[2] for row in cells(watched, "khat")] == ["1.30", "−∞", "−0.35", "−0.10"]
    heading = head(watched, "khat", "Pareto k̂")
    heading.locator("button").click()
    assert [row[2] for row in cells(watched, "khat")] == ["−∞", "−0.35", "−0.10", "1.30"]
    heading.locator("button").click()
    assert [row[2] for row in cells(watched, "khat")] == ["1.30", "−0.10", "−0.35", "−∞"]


@pytest.mark.parametrize(
    "asked",
    [
        "FC kept",
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in ("removed", "conv10 removed  in fit", "nothing like it", "  ")
        ),
    ],
)
def test_a_search_shows_the_rows_with_all_its_words(watch, by_hand, asked):
    watched = watch(by_hand.page)
    every = cells(watched, "structures")
    field = watched.page.get_by_label("Search in structures")
    field.fill(asked)
    expected = [row for row in every if all(word in "".join(row).lower() for word in asked.lower().split())]
    assert cells(watched, "structures") == expected
    assert watched.text("[data-count=structures]") == f"{len(expected)} of {len(every)}"
    field.fill("")
    assert cells(watched, "structures") == every
    assert watched.text("[data-count=structures]") == f"{len(every)} of {len(every)}"
    if asked == "removed":  # as the plan says
        assert len(expected) == by_hand.plan.table.removed.sum() > 0


def downloaded(watched, name):
    with watched.page.expect_download() as caught:
        watched.page.locator(f"button[data-csv={name}]").click()
    assert caught.value.suggested_filename == f"{name}.csv"
    # not through a file, in which Windows' line ends would be seen as others
    return pd.read_csv(io.BytesIO(caught.value.path().read_bytes()), dtype={0: str}, keep_default_na=True)


@pytest.mark.slow
def test_csv_has_the_same_numbers(watch, run):
    watched = watch(run.page)
    table, found = run.plan.table, downloaded(watched, "structures")
    assert len(found) == len(table)
    assert found["layer"].astype(str).tolist() == table.layer.tolist()
    assert (found["decision"] == "removed").tolist() == table.removed.tolist()
    weight = "KL weight 2"
    for label, column in (
        ("structure", "unit"), ("loc of log θ", "loc"), ("scale of log θ", "scale"), ("E[θ]", "mean"), ("SNR", "snr"),
        (f"score, from ΔF (nats, {weight})", "score"), (f"ΔF (nats, {weight})", "log_evidence_change"),
    ):  # fmt: skip
        assert found[label].to_numpy() == pytest.approx(table[column].to_numpy(), rel=1e-9), label
    diagnosis = run.page.parent / "diagnosis"
    contraction = pd.read_csv(diagnosis / "contraction.csv").contraction
    assert found["contraction (nats)"].to_numpy() == pytest.approx(contraction, rel=1e-9)
    khat, stored = downloaded(watched, "khat"), pd.read_csv(diagnosis / "khat.csv")
    assert khat["Pareto k̂"].to_numpy() == pytest.approx(stored.khat, rel=1e-9)
    quality, stored = downloaded(watched, "quality"), pd.read_csv(diagnosis / "quality.csv")
    assert len(stored) == 5
    assert quality["network"].tolist() == stored.network.tolist()
    assert quality["accuracy"].to_numpy() == pytest.approx(stored.accuracy, rel=1e-9)
    assert quality["Brier score"].to_numpy() == pytest.approx(stored.brier, rel=1e-9)
    outside = "AUROC against patches"
    assert quality[outside].to_numpy() == pytest.approx(stored.out_of_distribution_auroc, rel=1e-9)


def test_csv_has_the_rows_that_are_seen_in_their_order(watch, by_hand):
    watched = watch(by_hand.page)
    head(watched, "structures", "score (SNR)").locator("button").click()
    watched.page.get_by_label("Search in structures").fill("conv10")
    found, seen = downloaded(watched, "structures"), values(watched, "structures")
    assert len(seen) == 12
    assert found["structure"].astype(str).tolist() == [row[1] for row in seen]
    assert found["score (SNR)"].isna().tolist() == [False] * 10 + [True] * 2
    assert found["score (SNR)"].dropna().is_monotonic_increasing
    table = rounded(by_hand.plan).set_index(["layer", "unit"]).score
    assert found["score (SNR)"].tolist()[:10] == [table["conv10", unit] for unit in found["structure"][:10]]


@pytest.mark.slow
def test_csv_has_any_name_as_it_is(watch, hostile):
    watched = watch(hostile.page)
    assert downloaded(watched, "widths")["layer"].tolist() == HOSTILE
    assert downloaded(watched, "khat")["part of the posterior"].tolist() == ["all latents", *HOSTILE]


@pytest.mark.slow
def test_csv_of_a_comparison(watch, compared):
    watched = watch(compared.page)
    table, found = pd.read_csv(compared.page.with_suffix(".csv")), downloaded(watched, "runs")
    assert found["run"].tolist() == table.run.tolist()
    for label, column in (
        ("test accuracy", "accuracy"), ("Brier score", "brier"), ("after", "parameters"), ("removed", "removed"),
        ("worst k̂ of a part", "khat"),
    ):  # fmt: skip
        assert found[label].to_numpy() == pytest.approx(table[column].to_numpy(), rel=1e-9), label


# --- how it looks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lengthy(tmp_path_factory):
    """Names without a place to break a line."""
    names = ["a" * 300, "encoder.layers.11.attention.self.noise" * 3]
    plan = make_plan({names[0]: [1.0, 2.0, 3.0], names[1]: [-1.0, 0.05, 4.0]}, criterion="c" * 200)
    page = written(
        tmp_path_factory.mktemp("lengthy"),
        plan,
        evaluation=make_evaluation(names=("n" * 200, "m" * 200), split="s" * 100),
        diagnosis=make_diagnosis(plan, foreign="f" * 200, names=("o" * 200, "p" * 200), notes=["q" * 300]),
        settings={"k" * 200: "v" * 500},
    )
    return SimpleNamespace(page=page)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["run", *(pytest.param(name, marks=pytest.mark.slow) for name in (*PAGES[1:], "lengthy"))]
)
def test_a_telephone_scrolls_down_only(watch, request, name, scheme):
    page = request.getfixturevalue(name).page
    watched = watch(page, viewport={"width": 390, "height": 844}, color_scheme=scheme, device_scale_factor=2)
    wide, seen = watched.page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert seen == 390
    assert wide <= 390
    # nor is anything cut off that does not scroll by itself
    cut = watched.page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(element =>
            !element.closest(".overflow, .sheet, svg") && element.getBoundingClientRect().right > 390.5
        ).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert cut == []


def channels(colour):
    found = [float(number) for number in re.findall(r"[\d.]+", colour)]
    assert colour.startswith("rgb")
    return found[:3]


def luminance(colour):
    linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("medium", ["screen", pytest.param("print", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", pytest.param("compared", marks=pytest.mark.slow)])
def test_every_text_can_be_read(watch, request, name, scheme, medium):
    watched = watch(request.getfixturevalue(name).page, color_scheme=scheme)
    watched.page.emulate_media(media=medium, color_scheme=scheme)
    found = watched.page.evaluate(COLOURS)
    assert len(found) > 30
    background = luminance(found[0][2])
    assert background > 0.8 if scheme == "light" or medium == "print" else background < 0.05
    weak = {
        (text, colour, behind, round(contrast(colour, behind), 2))
        for text, colour, behind in found
        if contrast(colour, behind) < 4.5
    }
    assert weak == set()


@pytest.mark.slow
def test_on_paper_all_rows_are_there_and_nothing_to_click(watch, run):
    watched = watch(run.page)
    sheet = watched.page.locator(".sheet").last
    higher = "sheet => sheet.scrollHeight > sheet.clientHeight + 1"
    assert sheet.evaluate(higher)  # on a screen it scrolls
    assert watched.page.locator(".controls:visible, nav:visible").count() > 5
    watched.page.emulate_media(media="print")
    assert watched.page.locator(".controls:visible, nav:visible, input:visible").count() == 0
    assert not sheet.evaluate(higher)
    rows = watched.page.locator("table[data-name=structures] tbody tr:visible")
    assert rows.count() == len(run.plan.table)
    box, last = sheet.bounding_box(), rows.last.bounding_box()
    assert last["y"] + last["height"] <= box["y"] + box["height"] + 1
    arrows = watched.page.locator("th button").first.evaluate(
        "button => getComputedStyle(button, '::after').display"
    )
    assert arrows == "none"
    assert len(watched.page.pdf()) > 10_000


# --- its size ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "structures", "marks"),
    [
        (LENET5, 226, 226),
        pytest.param({"wide": 3000, "other": 1990, "few": 10}, 5000, 2000, marks=pytest.mark.slow),
    ],
)
def test_a_page_can_be_mailed(watch, tmp_path, layers, structures, marks):
    plan = make_plan(random_scores(layers))
    page = written(tmp_path, plan, diagnosis=make_diagnosis(plan), frontier=make_frontier(plan))
    assert page.stat().st_size < 5_000_000
    watched = watch(page)
    assert watched.page.locator("table[data-name=structures] tbody tr").count() == structures
    # of a layer with too many structures to look at, only the count
    assert watched.page.locator(".cells i").count() == marks
    assert watched.text("#sizes-structures") == f"{(~plan.table.removed).sum():,} of {structures:,}"
    watched.page.locator("#sizes-slider").focus()
    for key, left in (("Home", structures), ("End", len(layers))):
        watched.page.keyboard.press(key)
        assert watched.text("#sizes-structures") == f"{left:,} of {structures:,}"


@pytest.mark.slow
def test_a_plan_from_disk_makes_the_same_page(by_hand, tmp_path):
    """A page needs neither the network nor what was in memory."""
    by_hand.plan.save(tmp_path / "plan.json")
    diagnosis = make_diagnosis(by_hand.plan)
    diagnosis.save(tmp_path)
    loaded = NetworkPlan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="network"):
        loaded.parameters_before()
    by_hand.sizes.save(tmp_path / "frontier.csv")
    sizes = Frontier.load(tmp_path / "frontier.csv", loaded)
    curve = make_curve(by_hand.plan)
    page = written(tmp_path, loaded, curve=curve, diagnosis=Diagnosis.load(tmp_path), frontier=sizes)
    assert page.read_text() == by_hand.page.read_text()
