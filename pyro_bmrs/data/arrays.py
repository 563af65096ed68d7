"""Arrays from files and from callers: read, checked, and arranged as (N, C, H, W) or (N, F)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_bmrs.arguments import check

type Array = npt.NDArray[Any]

# An axis of one of these lengths is read as the channels, wherever it stands.
CHANNEL_COUNTS = (1, 3, 4)
# A compressed file of some kilobytes can expand to more than any memory holds.
MOST_BYTES = 2**33


class DataError(ValueError):
    """Data that can't be read or used. The message is one line: what is allowed, and what was given.

    >>> from pyro_bmrs.data import load_data
    >>> try:
    ...     load_data("digits", validation_fraction=2.0)
    ... except DataError as error:
    ...     print(error)
    validation_fraction must be strictly between 0 and 1: got 2.0
    """


@dataclass(frozen=True)
class InputForm:
    """Shape and values of a source's raw inputs, to check new inputs against.

    >>> form = InputForm((1, 28, 28), "bytes")
    >>> print(form)
    uint8 of shape (N, 28, 28), (N, 28, 28, 1) or (N, 1, 28, 28)
    >>> form.read(np.zeros((5, 28, 28), np.uint8)).shape
    torch.Size([5, 1, 28, 28])
    """

    shape: tuple[int | None, ...]  # (C, H, W) or (F,) of one input; None: any extent
    values: Literal["bytes", "counts", "numbers"]  # uint8 0..255; digits' 0..16; floating point as it is
    channels: Literal["grey", "RGB"] | None = None  # their order, where it is known

    @property
    def scale(self) -> float:
        """What raw values are divided by."""
        # Digits' pixels count the inked points of a 4 x 4 block: 0 to 16.
        return {"bytes": 255.0, "counts": 16.0, "numbers": 1.0}[self.values]

    def read(self, inputs: Array | Tensor) -> Tensor:
        """Check raw inputs, and arrange them as (N, C, H, W) or (N, F): uint8, or float32, not scaled.

        Raises:
            DataError: if they are not in this form.
        """
        array = _to_array(inputs)
        arranged = [
            candidate
            for candidate in self._arrangements(array)
            if len(candidate.shape) == len(self.shape) + 1
            and all(
                size in (None, given) for size, given in zip(self.shape, candidate.shape[1:], strict=True)
            )
        ]
        taken = {"bytes": array.dtype == np.uint8, "counts": array.dtype.kind in "uif"}
        right = taken.get(self.values, array.dtype.kind == "f") and array.size > 0 and len(arranged) == 1
        check(right, "inputs", f"{self}, with N at least 1", describe(array), DataError)
        if self.values == "counts":
            inside = bool(np.all((array >= 0) & (array <= self.scale)))
            check(inside, "inputs", str(self), f"values from {array.min()} to {array.max()}", DataError)
        return to_tensor("inputs", arranged[0])

    def _arrangements(self, array: Array) -> list[Array]:
        if array.ndim == 3:
            return [array[:, np.newaxis]]
        if array.ndim == 4 and self.shape[0] in CHANNEL_COUNTS:
            return [array, np.moveaxis(array, 3, 1)]
        return [array]

    def __str__(self) -> str:
        values = {"bytes": "uint8", "counts": "numbers from 0 to 16", "numbers": "floating point"}[
            self.values
        ]
        if len(self.shape) == 1:
            return f"{values} of shape (N, {self.shape[0]})"
        channels, *extents = self.shape
        height, width = (letter if size is None else size for letter, size in zip("HW", extents, strict=True))
        shapes = [f"(N, {channels}, {height}, {width})"]
        if channels in CHANNEL_COUNTS:
            shapes.insert(0, f"(N, {height}, {width}, {channels})")
        if channels == 1:
            shapes.insert(0, f"(N, {height}, {width})")
        *others, last = shapes
        return f"{values} of shape {', '.join(others)} or {last}" if others else f"{values} of shape {last}"


def read_inputs(path: str | Path) -> Array:
    """Read raw inputs to predict on, from a .npy file or from an .npz file's key `x`.

    Args:
        path: of the file. Its content tells which of the two it is. Pickles are refused.

    Returns:
        The array as stored: integers or floating point, not empty, all finite. `Dataset.prepare` checks
        whether it fits a data set.

    Raises:
        DataError: if the file is missing, unreadable, or not as above.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/new.npz", x=np.zeros((2, 8, 8), np.uint8))
    ...     read_inputs(f"{folder}/new.npz").shape
    (2, 8, 8)
    """
    path = Path(path).expanduser()
    array = read_arrays("path", path, ("x",))["x"]
    name = f"array in {str(path)!r}"
    usable = array.dtype.kind in "uif" and array.size > 0
    check(usable, name, "integers or floating point, and not empty", describe(array), DataError)
    bad = int((~np.isfinite(array)).sum())
    check(bad == 0, name, "finite throughout", f"{bad} values that are not", DataError)
    return array


def read_arrays(
    argument: str, path: Path, keys: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Array]:
    """The arrays of an .npz file by these keys, and by those of the optional ones that it has.

    A .npy file is one array, for a single key.

    Raises:
        DataError: if the file is missing, damaged, too large, holds a pickle, or lacks a key.
    """
    check(path.is_file(), argument, "a file that exists", str(path), DataError)
    allowed = f"a whole .npz file with {', '.join(keys)}, as arrays without pickles"
    if len(keys) == 1:
        allowed = f"a whole .npy file, or {allowed}"
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(keys) > 1:
                raise ValueError("it is one array, not an .npz archive")
            return {keys[0]: loaded}
        with loaded:
            size = sum(member.file_size for member in loaded.zip.infolist())
            if size > MOST_BYTES:
                raise ValueError(f"its arrays have {size:,} bytes, of {MOST_BYTES:,} at most")
            missing = [key for key in keys if key not in loaded]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)} and holds {', '.join(loaded) or 'nothing'}")
            return {key: np.asarray(loaded[key]) for key in (*keys, *optional) if key in loaded}
    except Exception as error:
        # NumPy, zipfile and zlib raise many kinds of errors for damaged files and pickles.
        raise DataError(f"{argument} must be {allowed}: got {str(path)!r}: {one_line(error)}") from error


def to_tensor(name: str, array: Array) -> Tensor:
    """A uint8 tensor, which may share the array's memory, or a float32 one that must be finite."""
    if array.dtype != np.uint8:
        with np.errstate(over="ignore"):  # the check below has a better message
            array = array.astype(np.float32)
    inputs = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if inputs.is_floating_point():
        bad = int((~inputs.isfinite()).sum())
        check(bad == 0, name, "finite in float32", f"{bad} values that are not", DataError)
    return inputs


def describe(array: Array) -> str:
    """Type and shape of an array, on one line."""
    return f"{' '.join(str(array.dtype).split())} of shape {array.shape}"


def one_line(error: BaseException) -> str:
    """An error's message on one line; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_array(inputs: object) -> Array:
    right = isinstance(inputs, np.ndarray | Tensor)
    check(right, "inputs", "a NumPy array or a tensor", type(inputs).__name__, DataError)
    if not isinstance(inputs, Tensor):
        return np.asarray(inputs)
    try:
        cpu = inputs.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray((cpu.float() if cpu.dtype == torch.bfloat16 else cpu).numpy())
    except (RuntimeError, TypeError) as error:
        raise DataError(
            "inputs must be a tensor that NumPy can hold: "
            f"got {inputs.dtype} on {inputs.device}: {one_line(error)}"
        ) from error
