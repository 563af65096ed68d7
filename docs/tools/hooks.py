"""A hook of mkdocs: links out of docs/ to files of the repository work on the site too; help of the command line.

The pages are read in two places. In a clone `../analysis/results/x.csv` leads to the file; on the site there is
nothing above it. So each file that a page links to is copied to `repository/` and the link leads there. A folder
can't be shown, so a link to one becomes its text; one to the README leads to the first page, one to the
changelog to its page. A path that does not exist is left as it is, and mkdocs warns of it.

It also writes the help of the command line and the table of settings where a page asks for them, and makes a page of
each notebook: executed, with what its cells show.
"""

import os
import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.structure.files import File

FOLDER = "repository"  # where copies lie on the site
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
COMMANDS = re.compile(r"<!-- the help of each command: .*? -->", re.DOTALL)
SETTINGS = re.compile(r"<!-- the settings of a run: .*? -->", re.DOTALL)
FENCE = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)


def outside(page, target, config):
    """The path, from the repository's root, that a link of a page leads to; None within docs/ or elsewhere."""
    if ":" in target or target.startswith("/"):
        return None
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    path = Path(os.path.normpath(docs / posixpath.dirname(page) / target))
    if path.is_relative_to(docs) or not path.is_relative_to(root) or not path.exists():
        return None
    return path.relative_to(root).as_posix()


def on_files(files, config):
    root = Path(config.config_file_path).parent
    linked = {
        outside(file.src_uri, link["target"], config)
        for file in files.documentation_pages()
        for link in LINK.finditer(Path(file.abs_src_path).read_text(encoding="utf-8"))
    }
    for path in sorted(linked - {None} - set(PAGES)):
        if (root / path).is_file():
            files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(root / path)))
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        for name, content in executed(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def executed(path):
    """The page of a notebook and its pictures, by name."""
    import nbclient
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        # it would warn that what it sends to this process is not encrypted
        quiet = ["--IPKernelApp.log_level=40"]
        nbclient.NotebookClient(notebook, timeout=300, resources=resources, extra_arguments=quiet).execute()
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:  # of the two the picture
                data.pop("text/plain", None)
            assert output.output_type != "error", f"{path.name}, cell {number}"
    text, more = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    told = f"\n\n[The notebook]({path.name}), to run it yourself.\n"
    return {f"{path.stem}.md": text + told, **more["outputs"]}


def command_line_help():
    """The help of each command, as Markdown."""
    import typer

    from pyro_bmrs.cli import app

    group = typer.main.get_command(app)
    above = group.context_class(group, info_name="pyro-bmrs")
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=name, parent=above)
        yield f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def table_of_settings():
    """The settings of a run as a Markdown table, from their fields."""
    from pyro_bmrs.fitting.settings import Settings
    from pyro_bmrs.runs.settings import RunSettings

    yield "| setting | default | |"
    yield "|---|---|---|"
    for name, field in RunSettings.model_fields.items():
        of = "" if name in Settings.model_fields else "Of `pyro-bmrs run` and recipes. "
        yield f"| `{name}` | `{field.default}` | {of}{field.description} |"


def on_page_markdown(markdown, page, config, files):
    if COMMANDS.search(markdown):
        markdown = COMMANDS.sub(lambda _: "\n".join(command_line_help()), markdown)
    if SETTINGS.search(markdown):
        markdown = SETTINGS.sub(lambda _: "\n".join(table_of_settings()), markdown)
    root = Path(config.config_file_path).parent
    start = posixpath.dirname(page.file.src_uri) or "."

    def inside(link):
        path = outside(page.file.src_uri, link["target"], config)
        if path is None:
            return link[0]
        if (root / path).is_dir():
            return link["text"][1:-1]
        target = PAGES.get(path, f"{FOLDER}/{path}")
        return f"{link['text']}({posixpath.relpath(target, start)}{link['anchor'] or ''})"

    parts = FENCE.split(markdown)  # what stands in code blocks stays as it is
    return "".join(part if part.startswith("```") else LINK.sub(inside, part) for part in parts)
