"""How files are written and read: a failed write leaves no half file, and newer versions are refused."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# The one entry in a safetensors file's metadata: the order of several would differ from save to save.
_HEADER = "pyro_bmrs"
# The names that `tempfile.mkstemp` makes of the prefix and suffix below.
_BESIDE = re.compile(r"\.(?P<stem>.+)-[a-z0-9_]{8}(?P<suffix>\.[^.]+)")
# The names of the files that safetensors writes first, beside the file that it is asked for.
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
# Bytes. The JSON of a plan of a million structures has fewer.
MOST_TEXT = 2**26


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError, naming the argument, unless files can be written to `folder`. Creates nothing."""
    _check_writable(name, "a folder", folder, folder)


def check_file(name: str, path: Path) -> None:
    """Raise ValueError, naming the argument, unless a file can be written to `path`. Creates nothing."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file to write: got the folder {path}")
    _check_writable(name, "in a folder", path, path.parent)


def _check_writable(name: str, allowed: str, given: Path, folder: Path) -> None:
    """Raise ValueError unless the folder, or its nearest parent that exists, can be written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"{name} must be {allowed} that can be written to: got {given}, and {there} is none")


def _make_folder(name: str, folder: Path) -> None:
    """Create a folder if it is missing; raise ValueError, naming the argument, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if _lack_of_space(error):
            raise
        raise ValueError(
            f"{name} must be a folder that can be written to: got {folder} ({error.strerror})"
        ) from error


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then rename it: `path` is whole or untouched, never half.

    Raises:
        ValueError: if no file can be written to `path`.
        OSError: naming `path`, if the disk or a quota is full; the file is as it was.
    """
    path = Path(path)
    check_file("path", path)
    _make_folder("path", path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # mkstemp's files are private
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the content
        beside.replace(path)
    except Exception as error:
        reason = _lack_of_space(error)
        if reason is None:
            raise
        raise OSError(
            f"{path} can't be written: {reason}; nothing else is lost, and what is done need not be done again "
            "once there is room"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def on_disk(tensor: Tensor) -> Tensor:
    """The same numbers, on the CPU, in a temporary file, of which the system reads what is needed.

    The file has no name any more: it goes with the last tensor that shows it. It lies where Python's `tempfile` puts
    files, so that the environment variable TMPDIR says where.

    Raises:
        OSError: if it can't be written, such as for lack of room.
    """
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if not tensor.numel():
        return tensor
    with tempfile.NamedTemporaryFile(prefix="pyro_bmrs-") as file:
        try:  # written, not copied into the mapping: there a full disk would end the process
            file.write(memoryview(tensor.numpy()))
            file.flush()
        except OSError as error:
            raise OSError(
                f"a temporary file in {tempfile.gettempdir()} can't be written: {error.strerror}; "
                "the environment variable TMPDIR names another folder"
            ) from error
        found = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return found.view(tensor.shape)


def _lack_of_space(error: Exception) -> str | None:
    """What the system calls a full disk or quota, if this error comes from one; else None."""
    # safetensors repeats the system's words in its own error.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    if any(words in str(error) for words in ("PytorchStreamWriter failed", "unexpected pos")):
        return os.strerror(errno.ENOSPC)  # torch's writer tells no reason
    return None


class FolderInUseError(ValueError):
    """Another process works in a folder."""


@contextmanager
def held(name: str, folder: Path) -> Iterator[None]:
    """A context in which no other process can hold `folder`, which is created if it is missing.

    The file `.lock` in the folder is locked. The system unlocks it when the process ends, also when it is killed.

    Args:
        name: the argument that gave the folder, for the message.

    Raises:
        FolderInUseError: if another process, or another context of this one, holds it.
        ValueError: if it can't be written to.
    """
    check_folder(name, folder)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    _make_folder(name, folder)
    path = folder / ".lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, blocking=False))
        # FileNotFoundError: the other process is just removing the folder that it made.
        except (Timeout, FileNotFoundError):
            raise FolderInUseError(
                f"{name} must be a folder that no other process works in: got {folder}, which one does; wait for "
                "it, stop it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            # The file is removed while it is locked. Filelock refuses a process that opened it before and locks it
            # next, because the file has no name any more.
            with suppress(OSError):  # Windows can't remove open files; a folder with other files stays
                path.unlink()
                for empty in made:
                    empty.rmdir()


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if it has more than `MOST_TEXT` bytes, or is not UTF-8.
        OSError: if it can't be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_TEXT + 1)  # a device has no size to ask for
    if len(content) > MOST_TEXT:
        raise ValueError(f"it has more than {MOST_TEXT:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason} at byte {error.start})") from None


def write_table(path: Path | str, table: pd.DataFrame) -> Path:
    """Write a table without its index to a CSV file, atomically."""
    return write_atomically(path, lambda beside: table.to_csv(beside, index=False))


def read_table(path: Path | str, text: Collection[str]) -> pd.DataFrame:
    """Read a table of `write_table`. Columns named in `text` stay text: there "1" and "NA" are names."""
    import pandas as pd

    numbers = [column for column in pd.read_csv(path, nrows=0).columns if column not in text]
    return pd.read_csv(
        path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=dict.fromkeys(numbers, "")
    )


def clear_unfinished(folder: Path, ours: Callable[[str], object]) -> None:
    """Remove the half-written files that a killed process left in `folder`.

    Args:
        ours: whether the caller writes files of this name.
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
    """The header and the tensors (none with `header_only`) of a file of `write_tensors`.

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


def refuse_newer(path: Path | str, kind: str, version: object, newest: int) -> None:
    """Raise NewerFileError if a file of this kind is of a version above the newest that is read here.

    Raises:
        ValueError: if the version is no number.
    """
    if type(version) is not int:
        raise ValueError(f"{path} must have a {kind} version that is a whole number: got {version!r}")
    if version > newest:
        raise NewerFileError(
            f"{path} was written by a newer pyro_bmrs ({kind} version {version}, this one reads up to {newest}): "
            "upgrade pyro_bmrs"
        )
