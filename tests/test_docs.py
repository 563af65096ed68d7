"""The documentation: every block of Python is run, every command is parsed, every link leads somewhere.

Blocks of Python in README.md and docs/ run page by page, in order, in one namespace and in an empty folder.

- A comment `<!-- not run: REASON -->` on the line above a block leaves it out.
- A block of text that follows, with nothing between, is what the block prints. The words must be the same; a number may
  be off by a fifth of itself or by 0.05, whichever is more, since training on another machine ends elsewhere. Spaces
  don't count: columns are as wide as their numbers. A line "…" stands for any lines.
- A block that begins with `# NAME.py` is a script of its own, run where pyro_bmrs can't be imported.

What a page takes for given, such as a network that its reader has, is in `PREPARED`.
"""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import typer
import yaml
from PIL import Image

import pyro_bmrs as bmrs
from pyro_bmrs import _HOMES
from pyro_bmrs.cli import _guarded, app
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import export_onnx, export_program, save_weights
from pyro_bmrs.runs.study import Study
from pyro_bmrs.runs.sweep import run_study

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^ *```[ ]*$", re.M | re.S)
COMMENT = re.compile(r"<!--(.*?)-->\s*\Z", re.S)
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass
class Block:
    page: str
    line: int  # of its first line in the page
    code: str
    marker: str | None  # the comment above it
    printed: str | None  # what the page says it prints

    @property
    def reason(self):
        """Why it is not run, None where it is."""
        found = re.fullmatch(r"not run: (\S.*)", self.marker or "", re.S)
        return found and found[1]

    @property
    def script(self):
        return re.match(r"# (\w+\.py)\n", self.code)


def blocks_of(page):
    text, blocks = PAGES[page], []
    fences = list(FENCE.finditer(text))
    for fence, after in zip(fences, [*fences, None][1:], strict=True):
        if fence["language"] != "python":
            continue
        comment = COMMENT.search(text[: fence.start()])
        shown = after and after["language"] == "text" and not text[fence.end() : after.start()].strip()
        blocks.append(
            Block(
                page=page,
                line=text.count("\n", 0, fence.start("body")) + 1,
                code=textwrap.dedent(fence["body"]),
                marker=comment and comment[1].strip(),
                printed=after["body"] if shown else None,
            )
        )
    return blocks


NOT_RUN = 0  # blocks left out, in all pages
WITH_PYTHON = [page for page in PAGES if blocks_of(page)]
# Their blocks train for more than a few seconds.
SLOW = {
    f"docs/{page}.md"
    for page in (
        "tutorial",
        "diagnostics",
        "half_the_size",
        "sweeps",
        "trained_network",
        "two_milliseconds",
        "regression",
        "evidence",
        "serve_it",
    )
}


def run_statements(block, names):
    """Run a block by statements; what it prints, and the value of `logits` after each."""
    out, logits = StringIO(), []
    tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
    with redirect_stdout(out):
        for statement in tree.body:
            exec(compile(ast.Module([statement], []), block.page, "exec"), names)
            logits.append(names.get("logits"))
    return out.getvalue(), logits


def run_script(block):
    """Run a block in a Python that can't import this package; what it prints."""
    name = block.script[1]
    Path(name).write_text(block.code)
    code = f"import runpy, sys; sys.modules['pyro_bmrs'] = None; runpy.run_path({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"
    return done.stdout


def fits(shown, printed):
    """Whether a line shown is the line printed, but for its numbers, which may differ a little."""
    if " ".join(NUMBER.sub("#", shown).split()) != " ".join(NUMBER.sub("#", printed).split()):
        return False

    def numbers(line):
        return [float(found.replace("−", "-").replace(",", "")) for found in NUMBER.findall(line)]

    return all(
        abs(a - b) <= max(0.2 * abs(a), 0.05)
        for a, b in zip(numbers(shown), numbers(printed), strict=True)
    )  # fmt: skip


def is_printed(shown, printed):
    """Whether all lines shown are those printed, "…" being any number of lines."""
    if not shown:
        return not printed
    if shown[0].strip() == "…":
        return any(is_printed(shown[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    return bool(printed) and fits(shown[0], printed[0]) and is_printed(shown[1:], printed[1:])


def lines_of(text):
    return [line for line in text.splitlines() if line.strip()]


def small_network():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def saved_run(names):
    """The files of a run in the current folder, and what its reader has: a network's class, and inputs."""
    x = torch.randn(5, 4)
    model = bmrs.Classifier(bmrs.insert_noise(small_network(), x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, torch.zeros(5, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5))
    small = plan.apply()
    plan.save("plan.json")
    save_weights(small, "small.safetensors")
    export_program(small, x, "small.pt2")
    export_onnx(small, x, "small.onnx")
    with torch.no_grad():
        names.update(make_network=small_network, x=x, plan=plan, small=small, wanted=small(x))


def run_on_pictures(names):
    """A run on a folder of pictures, and its program for raw ones."""
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 12)):
        for label, name in enumerate(("cat", "dog", "owl")):
            folder = Path("pictures", part, name)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100 + 40 * label, (8, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = str(ROOT / "models" / "mlp.py")
    more = ["--epochs", "15", "--draws", "0", "--quiet", "--network", '{"widths": [20]}', "--fine-tune", "0"]
    made = ["run", recipe, "--data", "pictures", "--out", "run", "--learning-rate", "0.01", *more]
    assert _guarded(made) == 0
    assert _guarded(["export", "run", "--out", "small.onnx", "--fold-preprocessing"]) == 0


def small_problem(names):
    """A model, a guide and data."""
    x = torch.randn(60, 4)
    train, validation = (x, (x[:, 0] > 0).long()), (x[:20], (x[:20, 0] > 0).long())
    model = bmrs.Classifier(bmrs.insert_noise(small_network(), x))
    names.update(
        bmrs=bmrs, model=model, guide=bmrs.AutoTruncatedLogNormal(model), train=train, validation=validation
    )


def finished_study(_):
    """The page's study, checked; in its place one of a moment, done."""
    text = re.search(r"```yaml\n(.*?)```", PAGES["docs/sweeps.md"], re.S)[1]
    document = yaml.safe_load(text)
    document["recipes"] = [str(ROOT / recipe) for recipe in document["recipes"]]
    Path("first.yaml").write_text(yaml.safe_dump(document))
    cells = Study.read("first.yaml").cells
    assert f"{len(cells)} cells, {len({cell.fit for cell in cells})} fits" in PAGES["docs/sweeps.md"]
    of_a_moment = {
        "recipes": [str(ROOT / "tests" / "tiny_recipe.py")],
        "kl_weights": 1,
        "criteria": "BMRS_N",
        "seeds": 0,
        "settings": {"epochs": 1, "limit": 100, "fine_tune": 0},
    }
    Path("first.yaml").write_text(yaml.safe_dump(document | of_a_moment))
    run_study(Study.read("first.yaml", jobs=1), progress=False)


# What there is before the block of a number, counted from 0.
PREPARED = {
    ("docs/fitting.md", 0): small_problem,
    ("docs/serve_it.md", 0): saved_run,
    ("docs/serve_it.md", 5): run_on_pictures,
    ("docs/sweeps.md", 0): finished_study,
}


def readme_of_ten_lines(names, printed, _):
    assert len([line for line in blocks_of("README.md")[0].code.splitlines() if line.strip()]) <= 15
    small = names["small"]
    assert not any("bmrs" in type(module).__module__ for module in small.modules())
    assert parameters(small) < 0.7 * parameters(names["net"])
    x, y = names["digits"].test[:]
    with torch.no_grad():
        assert float((small.eval()(x).argmax(1) == y).float().mean()) > 0.9
    assert "BMRS_N" in printed


def the_accuracy_of_the_report(_, printed, __):
    told = [line.split() for line in printed.splitlines()]
    right = [Path(file).parent.name == name for file, name, _ in told]
    assert len(right) == 36
    assert sum(right) / 36 == pytest.approx(pd.read_csv("run/evaluation.csv").accuracy.iloc[-1])
    assert sum(right) > 18


def readme_of_any_network(names, printed, _):
    assert type(names["noisy"]) is type(names["net"])
    assert "not removable:\n  fc: 10 channels, an output of the network" in printed


def four_weights(names, printed, _):
    assert names["plan"].kept == {"weights": [0, 2]}
    assert names["predictive"](names["x"])["y"].shape == (100, 200)
    assert "16 models; the most probable reduce:" in printed


def diabetes(names, printed, _):
    assert names["plan"].kept == {"weights": [1, 2, 3, 4, 8]}
    assert "1,024 models" in printed


def page_on_diagnostics(names, printed, _):
    files = {path.name for path in Path().iterdir()}
    assert files == {"report.html", "report.md", "diagnosis"}
    assert Path("diagnosis", "quality.csv").exists()
    assert names["diagnosis"].quality.out_of_distribution_auroc.min() > 0.7
    assert "all latents" in printed


def page_on_draws(names, *_):
    assert dict(names["tree"].posterior["3"].sizes) == {"chain": 1, "draw": 500, "3_unit": 30}
    assert Path("posterior.nc").exists()


def same_logits(names, *_):
    torch.testing.assert_close(torch.as_tensor(names.pop("logits")), names["wanted"], atol=1e-5, rtol=0)


# What holds after the block of a number, beyond that it runs and prints what the page says.
CHECKED = {
    ("README.md", 0): readme_of_ten_lines,
    ("README.md", 1): readme_of_any_network,
    ("docs/evidence.md", 0): four_weights,
    ("docs/evidence.md", 1): diabetes,
    ("docs/evidence.md", 2): lambda *_: Path("curve.svg").stat().st_size > 10_000 or pytest.fail("no curve"),
    ("docs/diagnostics.md", 0): page_on_diagnostics,
    ("docs/diagnostics.md", 1): page_on_draws,
    ("docs/serve_it.md", 1): same_logits,
    ("docs/serve_it.md", 2): same_logits,
    ("docs/serve_it.md", 3): same_logits,
    ("docs/serve_it.md", 5): the_accuracy_of_the_report,
}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 1000


def test_citation_and_changelog_have_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert cited == bmrs.__version__
    assert newest in (cited, "Unreleased")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table:" in PAGES[page]])
def test_tables_of_figures_are_those_of_their_csvs(page):
    written = runpy.run_path(str(ROOT / "analysis" / "tables.py"))["written"]
    assert written(PAGES[page]) == PAGES[page], "python analysis/figures.py writes them anew"


def test_every_preparation_and_check_is_of_a_block_that_is_run():
    for page, number in PREPARED.keys() | CHECKED.keys():
        assert blocks_of(page)[number].reason is None


def test_all_blocks_are_run():
    marked = [block for page in WITH_PYTHON for block in blocks_of(page) if block.marker]
    unknown = [f"{block.page}:{block.line}: {block.marker}" for block in marked if block.reason is None]
    assert not unknown, "a comment above a block of Python must say `not run: REASON`"
    assert len(marked) == NOT_RUN


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in WITH_PYTHON]
)
def test_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # for `models`
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks_of(page)):
        if block.reason:
            continue
        if prepare := PREPARED.get((page, number)):
            prepare(names)
        printed, logits = (run_script(block), []) if block.script else run_statements(block, names)
        if block.printed is not None:
            shown = lines_of(block.printed)
            assert is_printed(shown, lines_of(printed)), f"{page}:{block.line} prints\n{printed}"
        if check := CHECKED.get((page, number)):
            check(names, printed, logits)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("kept 24 of 150", "kept  25 of 150", True),
        ("kept 24 of 150", "kept 34 of 150", False),
        ("ΔF −1,500.2 nats", "ΔF -1400.0 nats", True),
        ("-0.11 True", "-0.15 True", True),
        ("-0.11 True", "-0.11 False", False),
        ("layer3: 12 → 4", "layer4: 12 → 4", False),
        ("first\n…\nlast", "first\n1\n2\nlast", True),
        ("first\n…\nlast", "first\nlast\nmore", False),
        ("first", "first\nmore", False),
    ],
)
def test_the_rule_for_what_is_printed(shown, printed, same):
    assert is_printed(lines_of(shown), lines_of(printed)) is same


# --- commands

COMMANDS = typer.main.get_command(app).commands
OPTIONS = {
    name: {"--help"}.union(*((*option.opts, *option.secondary_opts) for option in command.params))
    for name, command in COMMANDS.items()
}
ANY_OPTION = {"--version"}.union(*OPTIONS.values())
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def command_lines(text):
    """Lines of indented or fenced blocks that call `pyro-bmrs`."""
    shells = [fence["body"] for fence in FENCE.finditer(text) if fence["language"] in ("bash", "sh")]
    lines = "\n".join(shells).splitlines()
    lines += [line for line in FENCE.sub("", text).splitlines() if line.startswith("    ")]
    return [line.strip() for line in lines if re.match(r"\s*([A-Z_]+=\S+ )*pyro-bmrs ", line)]


LINES = [(page, line) for page, text in PAGES.items() for line in command_lines(text)]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_are_those_of_the_command_line(page, line):
    words = shlex.split(line, comments=True)
    words = words[words.index("pyro-bmrs") + 1 :]
    assert words[0] in COMMANDS, f"{page}: {line}"
    COMMANDS[words[0]].make_context(words[0], words[1:])  # parses, runs nothing


def test_commands_and_options_within_sentences_exist():
    seen = 0
    for page, text in PAGES.items():
        if page == "docs/errors.md":  # of mistakes, and has its own test
            continue
        for span in SPAN.findall(FENCE.sub("", text)):
            words = span.split()
            if words[0] == "pyro-bmrs" and len(words) > 1 and re.match(r"[a-z]", words[1]):
                assert words[1] in COMMANDS, f"{page}: `{span}`"
                known = OPTIONS[words[1]]
            elif words[0] == "pyro-bmrs" or words[0].startswith("--"):
                known = ANY_OPTION
            else:
                continue
            wrong = {word for word in words if word.startswith("--")} - known
            assert not wrong, f"{page}: `{span}`"
            seen += 1
    assert seen > 20


# --- links, and the site


def slug(heading):
    """GitHub's name for a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def test_links_of_a_clone_lead_somewhere():
    for page, text in PAGES.items():
        text = FENCE.sub("", text)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            if "://" in target or target.startswith("mailto:"):
                continue
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor and path.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
                assert anchor in map(slug, headings), f"{page}: {target}#{anchor}"


class Links(HTMLParser):
    """What a page of the site names, leads to and loads."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe") and given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "WARN" not in said.upper(), said
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_asks_nothing_of_a_network(site):
    other = {*(site / "reports").iterdir(), site / "404.html"}
    pages = {path: Links(path) for path in site.rglob("*.html") if path not in other}
    assert len(pages) > 20
    for path, page in pages.items():
        for address in page.loads:
            assert not re.match(r"([a-z]+:)?//", address), f"{path.name} loads {address}"
        for address in page.links + page.loads:
            if re.match(r"[a-z]+:", address):
                continue
            target, _, anchor = address.split("?")[0].partition("#")
            where = (path.parent / unquote(target)).resolve() if target else path
            where = where / "index.html" if where.is_dir() else where
            assert where.exists(), f"{path.name} leads to {address}"
            if anchor and where in pages:
                assert unquote(anchor) in pages[where].names, f"{path.name} leads to {address}"
    for folder in ("images", "reports"):
        for path in (ROOT / "docs" / folder).iterdir():
            assert (site / folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_every_public_name_has_its_place_in_the_api(site):
    for home, names in _HOMES.items():
        found = Links(site / "api" / f"{home}.html").names
        for name in names:
            place = re.compile(rf"pyro_bmrs\.{home}(\.\w+)?\.{name}")
            assert any(map(place.fullmatch, found)), f"{home}: {name}"
