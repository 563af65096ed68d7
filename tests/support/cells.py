"""Cells of the tables that tests write: what was called, and what was seen."""

import re

LONGEST = 240  # characters of a message in a table


def code(text):
    """Text in a cell of a Markdown table, as it is."""
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", r"\|")


def shown(message, says):
    """The first line of a message, without what is another library's: the group `library` of the pattern `says`."""
    (line, *_) = message.strip().splitlines() or [""]
    found = re.search(says, line)
    if found and "library" in found.re.groupindex:
        line = line[: found.start("library")] + "…" + line[found.end("library") :]
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rstrip()} …"
