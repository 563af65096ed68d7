"""The sources of data sets. Each is read and checked; values stay as they were stored.

>>> digits = read_source("digits")
>>> digits.train_inputs.shape, digits.train_inputs.max(), digits.form.scale
(torch.Size([1438, 1, 8, 8]), tensor(16.), 16.0)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
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

type Resize = Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N, C, size, size)

TORCHVISION_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
KNOWN_SETS = ("digits", "patches", *TORCHVISION_NAMES)
KNOWN_NAMES = f"{', '.join(map(repr, KNOWN_SETS))}, a path ending in .npz, or an image folder"
# The test part of a set without an official one does not depend on `seed`: runs with several seeds would
# otherwise choose their settings on each other's test examples.
TEST_FRACTION = 0.2
TEST_SEED = 20240601


@dataclass(frozen=True)
class RawData:
    """Checked data with values as stored: uint8, or float32."""

    train_inputs: Tensor  # (N, C, H, W) or (N, F)
    train_labels: Tensor  # (N,)
    test_inputs: Tensor  # (M, C, H, W) or (M, F)
    test_labels: Tensor  # (M,)
    num_classes: int
    form: InputForm


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
    if name in TORCHVISION_NAMES:
        return _read_torchvision(name, _resolve_data_root(data_root))
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    check(path.is_dir(), "name", f"{KNOWN_NAMES} that exists", name, DataError)
    return _read_folder(path, resize)


def is_at_hand(name: str, data_root: str | Path | None = None) -> bool:
    """Whether a data set of a known name can be read without a download."""
    if name not in TORCHVISION_NAMES:
        return name in ("digits", "patches")
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
    return _split_test(inputs, labels, 10, InputForm((1, 8, 8), "counts"))


def _read_patches() -> RawData:
    """Squares of two photographs: nothing like what a network that reads digits has seen."""
    from sklearn.datasets import load_sample_images

    side, parts = 8, []
    for photograph in load_sample_images().images:
        grey = torch.from_numpy(photograph @ np.array([0.299, 0.587, 0.114])).round().to(torch.uint8)
        squares = grey.unfold(0, side, side).unfold(1, side, side)
        parts.append(squares.reshape(-1, 1, side, side))
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
    return _split_test(torch.cat(parts), labels, len(parts), InputForm((1, side, side), "bytes"))


def _read_torchvision(name: str, root: Path) -> RawData:
    parts = [_open_torchvision(name, root, train=train) for train in (True, False)]
    # CIFAR-10 comes as NumPy (N, H, W, C), the others as torch (N, H, W).
    train, test = (
        data.permute(0, 3, 1, 2) if data.ndim == 4 else data.unsqueeze(1)
        for data in (torch.as_tensor(part.data) for part in parts)
    )
    train_labels, test_labels = (torch.as_tensor(part.targets, dtype=torch.int64) for part in parts)
    return RawData(train, train_labels, test, test_labels, 10, InputForm(tuple(train.shape[1:]), "bytes"))


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
    x_train, y_train, x_test, y_test = read_arrays("name", path, keys)
    train, test = _checked_inputs("x_train", x_train), _checked_inputs("x_test", x_test)
    for key, inputs, labels in (("y_train", train, y_train), ("y_test", test, y_test)):
        right = labels.dtype.kind in "iu" and labels.shape == (len(inputs),)
        check(right, key, f"integers of shape ({len(inputs)},), one per example", describe(labels), DataError)
    # If the types differed, one part would be scaled from 0..255 and the other not.
    alike = train.shape[1:] == test.shape[1:] and train.dtype == test.dtype
    check(alike, "x_test", f"like x_train, {describe(x_train)}", describe(x_test), DataError)
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
    form = InputForm(tuple(train.shape[1:]), "bytes" if train.dtype == torch.uint8 else "numbers")
    return RawData(train, train_labels, test, test_labels, len(classes), form)


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


def _read_folder(path: Path, resize: Resize | None) -> RawData:
    parts = [part for part in ("train", "test") if (path / part).is_dir()]
    check(len(parts) != 1, "name", "a folder of classes, or of train/ and test/ both", str(path), DataError)
    folders = [_open_folder(path / part, resize) for part in parts or ("",)]
    classes = folders[0].classes
    alike = folders[-1].classes == classes
    check(alike, "classes in test/", f"those in train/, {', '.join(classes)}", folders[-1].classes, DataError)
    single = [name for label, name in enumerate(classes) if folders[0].targets.count(label) == 1]
    two = (
        f"a folder with at least 2 images of each class, or with train/ and test/ (1 of {', '.join(single)})"
    )
    check(bool(parts) or not single, "name", two, str(path), DataError)
    images = [image for folder in folders for image, _ in folder]
    labels = torch.tensor([label for folder in folders for label in folder.targets], dtype=torch.int64)

    sizes = sorted({tuple(image.shape[1:]) for image in images})
    check(
        len(sizes) == 1, "image_size",
        f"given in pixels where images differ in height and width, as in '{path}' from {sizes[0]} to {sizes[-1]}",
        None, DataError,
    )  # fmt: skip
    # Grey images become colour where any has colour.
    channels = max(image.shape[0] for image in images)
    inputs = torch.stack([image.expand(channels, -1, -1) for image in images])
    # Files of any size were brought to one, so new images may have any size too.
    form = InputForm((channels, *(sizes[0] if resize is None else (None, None))), "bytes")
    if parts:
        count = len(folders[0])
        return RawData(inputs[:count], labels[:count], inputs[count:], labels[count:], len(classes), form)
    return _split_test(inputs, labels, len(classes), form)


def _open_folder(path: Path, resize: Resize | None) -> Any:
    """torchvision's `ImageFolder` of images (C, H, W), uint8 or as `resize` makes them."""
    datasets = _torchvision_datasets(str(path))
    # Resized one by one: a folder of photographs at full size would not fit into memory.
    sized = None if resize is None else lambda image: resize(image.unsqueeze(0)).squeeze(0)
    try:
        folder = datasets.ImageFolder(path, loader=_read_image, transform=sized)
    except OSError as error:
        raise DataError(
            f"name must be a folder with one folder of images for each class: got '{path}': {one_line(error)}"
        ) from error
    check(len(folder.classes) >= 2, "name", "a folder with at least 2 classes", str(path), DataError)
    return folder


def _read_image(file: str) -> Tensor:
    """The bytes of an image, (1, H, W) if it is grey, else (3, H, W)."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(file) as opened:
            # Pillow would silently clip 16 bits and more to 8.
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {opened.mode}")
            grey = opened.mode in ("1", "L", "LA", "La")
            image: Tensor = pil_to_tensor(opened.convert("L" if grey else "RGB"))
            return image
    except Exception as error:
        # Pillow's plugins raise many kinds of errors for damaged files.
        raise DataError(
            f"name must lead to readable images of 8 bits a channel: got '{file}': {one_line(error)}"
        ) from error


def _split_test(inputs: Tensor, labels: Tensor, num_classes: int, form: InputForm) -> RawData:
    """Set a stratified fifth aside for the test, the same for every seed."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        is_test[members[order[: max(1, round(len(members) * TEST_FRACTION))]]] = True
    return RawData(inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], num_classes, form)


def _torchvision_datasets(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"name is {name!r}, which needs torchvision: pip install 'pyro-bmrs[vision]'"
        ) from error
    return datasets


def _torchvision_reader(name: str) -> Any:
    return getattr(_torchvision_datasets(name), TORCHVISION_NAMES[name])


def _resolve_data_root(data_root: str | Path | None) -> Path:
    return Path(data_root or os.environ.get("PYRO_BMRS_DATA") or "~/.cache/pyro_bmrs").expanduser()
