"""The sources of data sets. Each is read and checked; values stay as they were stored.

>>> digits = read_source("digits")
>>> digits.train[0].shape, digits.train[0].max(), digits.form.scale
(torch.Size([1438, 1, 8, 8]), tensor(16.), 16.0)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.data.arrays import (
    CHANNEL_COUNTS,
    Array,
    DataError,
    InputForm,
    describe,
    one_line,
    read_arrays,
    to_tensor,
)
from pyro_bmrs.data.folders import Resize, read_folder
from pyro_bmrs.data.split import RawData, split_test

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
# Those that come with scikit-learn.
_AT_HAND = ("digits", "patches", "diabetes")
KNOWN_SETS = (*_AT_HAND, *TORCHVISION_NAMES)
KNOWN_NAMES = f"{', '.join(map(repr, KNOWN_SETS))}, a path ending in .npz, or an image folder"


def read_source(name: str, data_root: str | Path | None = None, resize: Resize | None = None) -> RawData:
    """Read the data set of this name, as documented at `pyro_bmrs.data.load_data`.

    Args:
        name: a known name, a path ending in .npz, or an image folder.
        data_root: the folder of the named sets.
        resize: applied to each image of an image folder as it is read, because they may differ in size. For
            other sources the caller resizes.

    Raises:
        DataError: if the data are missing, unreadable, or not as documented.
    """
    if name == "digits":
        return _read_digits()
    if name == "patches":
        return _read_patches()
    if name == "diabetes":
        return _read_diabetes()
    if name in TORCHVISION_NAMES:
        return _read_torchvision(name, _resolve_data_root(data_root))
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    check(path.is_dir(), "name", f"{KNOWN_NAMES} that exists", name, DataError)
    return read_folder(path, resize)


def located(name: str) -> str:
    """The name of a data set that is the same from every working folder: a path that leads to data is absolute.

    >>> located("digits")
    'digits'
    """
    path = Path(name).expanduser()
    there = path.is_file() if path.suffix == ".npz" else path.is_dir()
    return os.path.abspath(path) if there and name not in KNOWN_SETS else name


def is_at_hand(name: str, data_root: str | Path | None = None) -> bool:
    """Whether a data set of a known name can be read without a download."""
    if name not in TORCHVISION_NAMES:
        return name in _AT_HAND
    try:
        _torchvision_reader(name)(_resolve_data_root(data_root), train=False, download=False)
    except DataError:
        raise
    except Exception:
        return False
    return True


def _read_digits() -> RawData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    names = tuple(map(str, digits.target_names))
    return split_test((inputs, labels), names, InputForm((1, 8, 8), "counts", "grey"))


def _read_diabetes() -> RawData:
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    inputs, targets = (
        torch.from_numpy(part.astype(np.float32)) for part in (found.data, found.target[:, None])
    )
    return split_test(
        (inputs, targets), (), InputForm((inputs.shape[1],), "numbers"),
        target_names=("progression",), feature_names=tuple(found.feature_names),
    )  # fmt: skip


def _read_patches() -> RawData:
    """Squares of two photographs: nothing like what a network that reads digits has seen."""
    from sklearn.datasets import load_sample_images

    side, parts = 8, []
    samples = load_sample_images()
    for photograph in samples.images:
        grey = torch.from_numpy(photograph @ np.array([0.299, 0.587, 0.114])).round().to(torch.uint8)
        squares = grey.unfold(0, side, side).unfold(1, side, side)
        parts.append(squares.reshape(-1, 1, side, side))
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
    names = tuple(Path(file).stem for file in samples.filenames)
    return split_test((torch.cat(parts), labels), names, InputForm((1, side, side), "bytes", "grey"))


def _read_torchvision(name: str, root: Path) -> RawData:
    parts = [_open_torchvision(name, root, train=train) for train in (True, False)]
    # CIFAR-10 comes as NumPy (N, H, W, C), the others as torch (N, H, W).
    train, test = (
        data.permute(0, 3, 1, 2) if data.ndim == 4 else data.unsqueeze(1)
        for data in (torch.as_tensor(part.data) for part in parts)
    )
    train_labels, test_labels = (torch.as_tensor(part.targets, dtype=torch.int64) for part in parts)
    form = InputForm(tuple(train.shape[1:]), "bytes", "grey" if train.shape[1] == 1 else "RGB")
    return RawData((train, train_labels), (test, test_labels), tuple(parts[0].classes), form)


def _open_torchvision(name: str, root: Path, *, train: bool) -> Any:
    reader = _torchvision_reader(name)
    advice = "pass --data-root (data_root) or set PYRO_BMRS_DATA to the folder that holds it"
    try:
        return reader(root, train=train, download=False)
    except RuntimeError:
        pass  # missing, or damaged; a download mends both
    except Exception as error:
        # torchvision reads these formats with bare assertions and struct arithmetic.
        raise DataError(
            f"name is {name!r}, but its files under {root} are unreadable ({one_line(error)}); {advice}"
        ) from error
    try:
        return reader(root, train=train, download=True)
    except Exception as error:
        raise DataError(
            f"name is {name!r}, but it is not whole under {root}, nor could it be downloaded "
            f"({one_line(error)}); {advice}"
        ) from error


def _read_npz(path: Path) -> RawData:
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays = read_arrays("name", path, keys, optional=("class_names", "target_names", "feature_names"))
    x_train, y_train, x_test, y_test = (arrays[key] for key in keys)
    train, test = _checked_inputs("x_train", x_train), _checked_inputs("x_test", x_test)
    # If the types differed, one part would be scaled from 0..255 and the other not.
    alike = train.shape[1:] == test.shape[1:] and train.dtype == test.dtype
    check(alike, "x_test", f"like x_train, {describe(x_train)}", describe(x_test), DataError)
    form = InputForm(tuple(train.shape[1:]), "bytes" if train.dtype == torch.uint8 else "numbers")
    features = _names("feature_names", arrays.get("feature_names"), train.shape[1], "feature")
    check(
        not features or train.ndim == 2, "feature_names", "left out for images", describe(x_train), DataError
    )
    if y_train.dtype.kind == "f":
        check(
            "class_names" not in arrays,
            "class_names",
            "left out where y_train is floating point",
            "them",
            DataError,
        )
        targets = _targets("y_train", y_train, len(train)), _targets("y_test", y_test, len(test))
        count = targets[0].shape[1]
        alike = targets[1].shape[1] == count
        check(alike, "y_test", f"like y_train, {describe(y_train)}", describe(y_test), DataError)
        constant = [
            number
            for number in range(count)
            if not bool((targets[0][:, number] != targets[0][0, number]).any())
        ]
        check(not constant, "y_train", "of different values", f"one value in column {constant}", DataError)
        names = _names("target_names", arrays.get("target_names"), count, "target")
        names = names or (("y",) if count == 1 else tuple(f"y{number}" for number in range(count)))
        return RawData(
            (train, targets[0]), (test, targets[1]), (), form, target_names=names, feature_names=features
        )
    check(
        "target_names" not in arrays, "target_names", "left out where y_train holds labels", "them", DataError
    )
    for key, inputs, labels in (("y_train", train, y_train), ("y_test", test, y_test)):
        right = labels.dtype.kind in "iu" and labels.shape == (len(inputs),)
        allowed = (
            f"integers of shape ({len(inputs)},), a label for each example, or floating point, as targets are"
        )
        check(right, key, allowed, describe(labels), DataError)
    classes = np.unique(y_train)
    check(
        np.array_equal(classes, np.arange(max(len(classes), 2))),
        "y_train", "0 to the number of classes less 1, each at least once, with at least 2 classes",
        f"{len(classes)} different labels from {classes[0]} to {classes[-1]}", DataError,
    )  # fmt: skip
    inside = bool(np.isin(y_test, classes).all())
    check(
        inside, "y_test", f"labels in the range of y_train, 0 to {len(classes) - 1}",
        f"labels from {y_test.min()} to {y_test.max()}", DataError,
    )  # fmt: skip
    train_labels, test_labels = (torch.from_numpy(labels.astype(np.int64)) for labels in (y_train, y_test))
    names = _names("class_names", arrays.get("class_names"), len(classes), "class")
    return RawData(
        (train, train_labels),
        (test, test_labels),
        names or tuple(map(str, range(len(classes)))),
        form,
        feature_names=features,
    )


def _names(key: str, given: Array | None, count: int, what: str) -> tuple[str, ...]:
    """The names of classes, targets or features; none if none are given."""
    if given is None:
        return ()
    right = given.dtype.kind == "U" and given.shape == (count,) and len(set(given.tolist())) == count
    allowed = f"{count} different texts, one for each {what}, as an array of shape ({count},)"
    check(right, key, allowed, describe(given), DataError)
    return tuple(given.tolist())


def _targets(key: str, array: Array, examples: int) -> Tensor:
    """Targets (N,) or (N, T) as float32 (N, T)."""
    right = array.dtype.kind == "f" and array.ndim in (1, 2) and len(array) == examples and array.size > 0
    allowed = (
        f"floating point of shape ({examples},) or ({examples}, T), as y_train is: targets of each example"
    )
    check(right, key, allowed, describe(array), DataError)
    return to_tensor(key, array.reshape(examples, -1))


def _checked_inputs(key: str, array: Array) -> Tensor:
    """Images as (N, C, H, W), vectors as (N, F); uint8 stays, floating point becomes float32."""
    right = array.dtype == np.uint8 or array.dtype.kind == "f"
    check(
        right and array.ndim in (2, 3, 4) and array.size > 0,
        key, "uint8 (0 to 255) or floating point, not empty, of shape (N, H, W), (N, H, W, C), (N, C, H, W) or (N, F)",
        describe(array), DataError,
    )  # fmt: skip
    if array.ndim == 3:
        array = array[:, np.newaxis]
    elif array.ndim == 4 and array.shape[3] in CHANNEL_COUNTS:
        check(
            array.shape[1] not in CHANNEL_COUNTS,
            key, "of a shape that has 1, 3 or 4 as its second or its last size, not as both, to tell which are the "
            "channels; give such small images as vectors (N, F)",
            array.shape, DataError,
        )  # fmt: skip
        array = np.moveaxis(array, 3, 1)
    return to_tensor(key, array)


def _torchvision_reader(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"name is {name!r}, which needs torchvision: pip install 'pyro-bmrs[vision]'"
        ) from error
    return getattr(datasets, TORCHVISION_NAMES[name])


def _resolve_data_root(data_root: str | Path | None) -> Path:
    return Path(data_root or os.environ.get("PYRO_BMRS_DATA") or "~/.cache/pyro_bmrs").expanduser()
