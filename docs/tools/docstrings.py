"""An extension of griffe, which reads docstrings for mkdocstrings: what ours have and it does not know.

Examples stand in them as doctest wants them, `>>>` between paragraphs. Markdown would take `>>>` for three
quotations, so they become blocks of code; options for doctest, as in `# doctest: +SKIP`, are left out.
Arguments described together, as in `low, high: bounds`, are described one by one. Roles, such as :func:, are
left out.
"""

import re
from textwrap import dedent

from griffe import Extension

OPTIONS = re.compile(r"\s*# doctest: .*$")
ROLE = re.compile(r":(func|class|meth|mod):(?=`)")
SECTION = re.compile(r"(Args|Attributes):$")
TOGETHER = re.compile(r"(?P<indent> +)(?P<names>\*?\w+(, \*?\w+)+): (?P<rest>.*)$")


def fenced(lines):
    block = []
    for line in [*lines, ""]:
        if block and not line.strip():
            yield from ("", "```pycon", *dedent("\n".join(block)).splitlines(), "```", "")
            block = []
        elif block or line.lstrip().startswith(">>> "):
            block.append(OPTIONS.sub("", line))
        else:
            yield line


def one_by_one(lines):
    together, section = None, False

    def flush():
        for name in together["names"].split(", ") if together else ():
            yield f"{together['indent']}{name}: {together['rest']}"
            yield from continuation

    continuation = []
    for line in lines:
        deeper = together and line.startswith(together["indent"] + " ")
        if deeper:
            continuation.append(line)
            continue
        yield from flush()
        together, continuation = None, []
        section = bool(SECTION.match(line)) or (section and (not line or line.startswith(" ")))
        together = TOGETHER.match(line) if section else None
        if not together:
            yield line
    yield from flush()


class HouseDocstrings(Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            lines = ROLE.sub("", obj.docstring.value).splitlines()
            obj.docstring.value = "\n".join(one_by_one(fenced(lines)))
