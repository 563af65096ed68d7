"""What all files of the project have in common: they are whole or not there, and they carry a version."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# One entry in a safetensors file's metadata: several are written in an order that differs from save to save.
_HEADER = "pyro_bmrs"
# What `tempfile.mkstemp` makes of the prefix and suffix below.
_BESIDE = re.compile(r"\.(?P<stem>.+)-[a-z0-9_]{8}(?P<suffix>\.[^.]+)")
# What safetensors writes first, beside the file that it is asked for.
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then rename it: `path` is whole or untouched, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # mkstemp's files are private; the result should not be
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before what it renames
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_table(path: Path | str, table: pd.DataFrame) -> Path:
    """Write a table without its index to a CSV file, atomically."""
    return write_atomically(path, lambda beside: table.to_csv(beside, index=False))


def read_table(path: Path | str, text: Collection[str]) -> pd.DataFrame:
    """Read what `write_table` wrote; the columns named in `text` stay text, also "1", and "NA", which is a name too."""
    import pandas as pd

    numbers = [column for column in pd.read_csv(path, nrows=0).columns if column not in text]
    return pd.read_csv(
        path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=dict.fromkeys(numbers, "")
    )


def clear_unfinished(folder: Path, ours: Callable[[str], object]) -> None:
    """Remove what a killed process has left in `folder` of files that it was writing atomically.

    Args:
        ours: whether a file of such a name is written by the caller.
    """
    for path in folder.glob(".*"):
        match = _BESIDE.fullmatch(path.name)
        if _OF_SAFETENSORS.fullmatch(path.name) or (match and ours(match["stem"] + match["suffix"])):
            path.unlink(missing_ok=True)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and a JSON header to one safetensors file, atomically."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER: json.dumps(header)}
    return write_atomically(path, lambda beside: save_file(whole, beside, metadata=metadata))


def read_tensors(path: Path | str, *, header_only: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors (with `header_only` none) that `write_tensors` wrote.

    Raises:
        ValueError: if the file is missing, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            names = [] if header_only else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no file of pyro_bmrs")
    return header, tensors


class NewerFileError(ValueError):
    """A file was written by a newer version of this package."""


def refuse_newer(path: Path | str, kind: str, version: int, newest: int) -> None:
    """Raise NewerFileError if a file of this kind is of a version above the newest that is read here."""
    if version > newest:
        raise NewerFileError(
            f"{path} was written by a newer pyro_bmrs ({kind} version {version}, this one reads up to {newest}): "
            "upgrade pyro_bmrs"
        )
