"""A plan on disk: a JSON file and, beside it, the numbers of its table; a hash pairs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.files import check_file, read_text, refuse_newer, write_atomically

FORMAT, VERSION = "pyro_bmrs.plan", 1
# Not just .safetensors: weights that are saved beside the plan under its name must not replace the numbers.
_NUMBERS = ".numbers.safetensors"


def numbers_beside(path: Path) -> Path:
    """Where the numbers of the plan in `path` are.

    >>> numbers_beside(Path("runs/plan.json")).name
    'plan.numbers.safetensors'
    """
    return path.with_name(f"{path.stem}{_NUMBERS}")


def write_plan(path: Path | str, document: Mapping[str, Any], columns: Mapping[str, Tensor]) -> Path:
    """Write a plan's document to `path` and its columns beside it; each file is whole or not there.

    Raises:
        ValueError: if `path` does not end in .json, or can't be written to.
    """
    from safetensors.torch import save

    path = _json_path(path)
    check_file("path", path)  # before its numbers are beside it
    numbers = save(dict(columns))
    whole = {"format": FORMAT, "version": VERSION, "numbers": _hash_of(numbers), **document}
    text = json.dumps(whole, indent=1, allow_nan=False)
    write_atomically(numbers_beside(path), lambda beside: beside.write_bytes(numbers))
    return write_atomically(path, lambda beside: beside.write_text(text))


def read_plan(
    path: Path | str, kind: str, known: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the columns that `write_plan` wrote.

    Args:
        kind: of plan, for a message.
        known: the kinds of which the document must name one.

    Raises:
        ValueError: if the file is no plan of this kind, is damaged, does not belong to its numbers, or was written by
            a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _json_path(path)
    wanted = "path must be a plan written by save"
    try:
        document = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{wanted}: {path} can't be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}: {path} is no JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{wanted}: {path} is none")
    refuse_newer(path, "plan", document.get("version"), VERSION)
    found = document.get("kind")
    if found not in known:
        raise ValueError(f"path must be a plan of a {kind}: {path} is one of a {found}")
    beside = numbers_beside(path)
    try:
        numbers = beside.read_bytes()
        columns = load(numbers)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path must be a whole plan with {beside.name} beside it: {path}: {error}") from None
    if _hash_of(numbers) != document.get("numbers"):
        raise ValueError(f"{path} and {beside.name} do not belong together: they are of different plans")
    return document, columns


def _hash_of(numbers: bytes) -> str:
    return hashlib.sha256(numbers).hexdigest()


def _json_path(path: Path | str) -> Path:
    path = Path(path)
    check(path.suffix == ".json", "path", "a file whose name ends in .json", str(path))
    return path
