"""What all files of the project have in common: they are whole or not there, and they carry a version."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def refuse_newer(path: Path | str, kind: str, version: int, newest: int) -> None:
    """Raise ValueError if a file of this kind is of a version above the newest that is read here."""
    if version > newest:
        raise ValueError(
            f"{path} was written by a newer pyro_bmrs ({kind} version {version}, this one reads up to {newest}): "
            "upgrade pyro_bmrs"
        )
