"""Data sets as tensors in memory: read, split, sized and standardised, ready for a model.

>>> from pyro_bmrs.data import batches, load_data
>>> digits = load_data("digits")
>>> digits.input_shape, digits.num_classes
((1, 8, 8), 10)
>>> images, labels = next(batches(digits.train, 64))
>>> images.shape, labels.shape
(torch.Size([64, 1, 8, 8]), torch.Size([64]))
"""

import numbers
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.lib.npyio import NpzFile
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["DataError", "Dataset", "batches", "load_data"]

_TORCHVISION_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_KNOWN = "'digits', 'mnist', 'fashion-mnist', 'cifar10', a path ending in .npz, or an image folder"
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNEL_COUNTS = (1, 3, 4)

# A set without an official test part gives up the same fifth whatever `seed` is: were it to follow
# the seed, runs with several seeds would choose their settings on each other's test examples.
_TEST_FRACTION = 0.2
_TEST_SEED = 20240601

# MNIST's 28 pixels become the paper's 32 by padding, which keeps every pixel as it was; a wider frame
# would be mostly empty, so beyond this the image is interpolated.
_MAXIMUM_PADDING = 8


class DataError(ValueError):
    """Data that cannot be read or used: one line naming the argument, what it was, and what is allowed.

    >>> try:
    ...     load_data("digits", validation_fraction=2.0)
    ... except DataError as error:
    ...     print(error)
    validation_fraction is 2.0, but must lie strictly between 0 and 1
    """


@dataclass(frozen=True)
class Dataset:
    """A classification data set in three parts, each a `TensorDataset` of (inputs, labels) in memory.

    Inputs are float32, images (N, C, H, W) or vectors (N, F), in units of the training part's standard
    deviation; labels are int64 (N,) from 0 to `num_classes` - 1.

    >>> digits = load_data("digits")
    >>> print(digits)
    digits: 1150 train, 288 validation, 359 test, input (1, 8, 8), 10 classes
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch: (C, H, W) or (F,).

        >>> load_data("digits", image_size=16).input_shape
        (1, 16, 16)
        """
        return tuple(self.train.tensors[0].shape[1:])

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train)} train, {len(self.validation)} validation, "
            f"{len(self.test)} test, input {self.input_shape}, {self.num_classes} classes"
        )


def load_data(
    name: str,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Read a data set, split its training examples, size its images and standardise it.

    The official training examples are permuted by `seed` and split into a training and a validation
    part; the test part stays as it is. Pixels of type uint8 are scaled to [0, 1]; then every channel (of
    vectors: every feature) is standardised with the mean and the standard deviation of the training part.
    A channel that is constant there is only centred.

    Args:
        name: One of

            - `"digits"`: the 1797 images of 8 x 8 pixels that come with scikit-learn. A stratified fifth,
              the same for every `seed`, is the test part.
            - `"mnist"`, `"fashion-mnist"`, `"cifar10"`: read by torchvision, and downloaded by it where
              they are not under `data_root` yet.
            - a path ending in `.npz`, with `x_train`, `y_train`, `x_test`, `y_test`: images (N, H, W),
              (N, H, W, C) with C in 1, 3, 4, or (N, C, H, W), or vectors (N, F), as uint8 or floating
              point; labels (N,), integers from 0, each class at least once in `y_train`.
            - a folder of images, one folder a class: either `train/` and `test/` with the class folders in
              each, or the class folders themselves, of which a stratified fifth, the same for every
              `seed`, is the test part. Transparency is dropped.
        data_root: Where the named sets lie or go to; else the environment's `PYRO_BMRS_DATA`, else
            `~/.cache/pyro_bmrs`. Paths in `name` do not start from it.
        image_size: Height and width in pixels to bring images to, before they are standardised. Images
            smaller by at most 8 pixels are padded with zeros, equally on all sides (the odd pixel goes to
            the bottom and the right); others are interpolated bilinearly.
        validation_fraction: Share of the training examples set aside for validation, between 0 and 1.
        seed: Seeds the permutation; nothing else is random.
        limit: Keep only so many of the permuted training examples, before the split, for quick tries.

    Returns:
        The three parts, as float32 (N, C, H, W) or (N, F) and int64 (N,).

    Raises:
        DataError: An argument is out of range, or the data are missing, unreadable, or not as above.

    >>> small = load_data("digits", image_size=12, limit=100)
    >>> len(small.train), len(small.validation), small.input_shape
    (80, 20, (1, 12, 12))
    """
    _require(isinstance(name, str) and name != "", f"name is {name!r}, but must be {_KNOWN}")
    _require_integer("image_size", image_size, at_least=1, optional=True)
    _require_integer("limit", limit, at_least=2, optional=True)
    _require_integer("seed", seed, at_least=0)
    _require(
        isinstance(validation_fraction, int | float) and 0.0 < validation_fraction < 1.0,
        f"validation_fraction is {validation_fraction!r}, but must lie strictly between 0 and 1",
    )

    raw = _read(name, _resolve_data_root(data_root), image_size)
    _require(
        image_size is None or raw.train_inputs.ndim == 4,
        f"image_size is {image_size}, but {name!r} holds vectors; leave it out for vectors",
    )

    # (limited training examples,)
    order = torch.randperm(len(raw.train_labels), generator=torch.Generator().manual_seed(int(seed)))[:limit]
    validation_count = round(len(order) * validation_fraction)
    train_count = len(order) - validation_count
    _require(
        train_count > 0 and validation_count > 0,
        f"validation_fraction is {validation_fraction}, but of {len(order)} training examples it leaves "
        f"{train_count} to train and {validation_count} to validate on; each must be at least 1",
    )

    parts = [
        _resize(_to_float(inputs), image_size)
        for inputs in (
            raw.train_inputs[order[:train_count]],
            raw.train_inputs[order[train_count:]],
            raw.test_inputs,
        )
    ]
    mean, deviation = _channel_statistics(parts[0])
    train, validation, test = (part.sub_(mean).div_(deviation) for part in parts)
    return Dataset(
        name=name,
        train=TensorDataset(train, raw.train_labels[order[:train_count]]),
        validation=TensorDataset(validation, raw.train_labels[order[train_count:]]),
        test=TensorDataset(test, raw.test_labels),
        num_classes=raw.num_classes,
    )


def batches(
    dataset: TensorDataset,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through a data set in batches of (inputs, labels); the last one may be smaller.

    Args:
        dataset: Inputs (N, ...) and labels (N,).
        batch_size: Examples in a batch, at least 1.
        generator: Shuffles the examples, drawing once when `batches` is called; without it they come in
            order.
        device: Where each batch is moved to; else it stays where the data set is.

    Returns:
        An iterator over inputs (batch, ...) and labels (batch,).

    Raises:
        DataError: `batch_size` is not a whole number of at least 1, or the data set is not a pair.

    >>> pairs = TensorDataset(torch.arange(5.0).unsqueeze(1), torch.tensor([0, 1, 0, 1, 0]))
    >>> [labels.tolist() for _, labels in batches(pairs, 2)]
    [[0, 1], [0, 1], [0]]
    """
    _require_integer("batch_size", batch_size, at_least=1)
    _require(
        len(dataset.tensors) == 2,
        f"dataset has {len(dataset.tensors)} tensors, but must have 2: inputs and labels",
    )
    inputs, labels = dataset.tensors
    order = None
    if generator is not None:
        order = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    return _iterate(inputs, labels, order, batch_size, device)


def _iterate(
    inputs: Tensor,
    labels: Tensor,
    order: Tensor | None,
    batch_size: int,
    device: torch.device | str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(labels), batch_size):
        window = slice(start, start + batch_size)
        chosen = window if order is None else order[window]
        yield inputs[chosen].to(device), labels[chosen].to(device)


@dataclass(frozen=True)
class _Raw:
    """Checked data as they were stored: uint8 in 0..255, or float32."""

    train_inputs: Tensor  # (N, C, H, W) or (N, F)
    train_labels: Tensor  # (N,)
    test_inputs: Tensor  # (M, C, H, W) or (M, F)
    test_labels: Tensor  # (M,)
    num_classes: int


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


def _require_integer(argument: str, value: object, *, at_least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    _require(
        # 2**63 is where torch's seeds and sizes end.
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and at_least <= int(value) < 2**63,
        f"{argument} is {value!r}, but must be a whole number of at least {at_least}",
    )


def _one_line(error: BaseException) -> str:
    """An error of a library on one line, with its type where it says nothing else."""
    return " ".join(str(error).split()) or type(error).__name__


def _resolve_data_root(data_root: str | Path | None) -> Path:
    chosen = data_root or os.environ.get("PYRO_BMRS_DATA") or Path("~/.cache/pyro_bmrs")
    return Path(chosen).expanduser()


def _read(name: str, root: Path, image_size: int | None) -> _Raw:
    if name == "digits":
        return _read_digits()
    if name in _TORCHVISION_NAMES:
        return _read_torchvision(name, root)
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.is_dir():
        return _read_folder(path, image_size)
    raise DataError(f"name is {name!r}, but must be {_KNOWN} that exists")


# Embedded and published sets


def _read_digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "name is 'digits', but scikit-learn, which holds them, is missing: pip install scikit-learn"
        ) from error
    digits = load_digits()
    # Pixels count the inked points of a 4 x 4 block: 0 to 16.
    inputs = torch.from_numpy(digits.images.astype(np.float32)).div_(16.0).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return _split_test(inputs, labels, num_classes=10)


def _split_test(inputs: Tensor, labels: Tensor, num_classes: int) -> _Raw:
    """Set a stratified fifth aside for the test, the same for every seed."""
    generator = torch.Generator().manual_seed(_TEST_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        is_test[members[order[: max(1, round(len(members) * _TEST_FRACTION))]]] = True
    return _Raw(inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], num_classes)


def _import_torchvision_datasets(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"name is {name!r}, but reading it needs torchvision: pip install 'pyro-bmrs[vision]'"
        ) from error
    return datasets


def _read_torchvision(name: str, root: Path) -> _Raw:
    reader = getattr(_import_torchvision_datasets(name), _TORCHVISION_NAMES[name])
    train, test = (_open_torchvision(reader, name, root, train=train) for train in (True, False))
    # CIFAR-10 comes as NumPy (N, H, W, C), the others as torch (N, H, W).
    (train_inputs, test_inputs) = (
        torch.as_tensor(part.data).permute(0, 3, 1, 2)
        if part.data.ndim == 4
        else torch.as_tensor(part.data).unsqueeze(1)
        for part in (train, test)
    )
    return _Raw(
        train_inputs,
        torch.as_tensor(train.targets, dtype=torch.int64),
        test_inputs,
        torch.as_tensor(test.targets, dtype=torch.int64),
        num_classes=10,
    )


def _open_torchvision(reader: Any, name: str, root: Path, *, train: bool) -> Any:
    advice = "pass --data-root (data_root) or set PYRO_BMRS_DATA to the folder that holds it"
    try:
        return reader(root, train=train, download=False)
    except RuntimeError:
        pass  # Absent, or not what was published: torchvision says both so, and downloading mends both.
    except Exception as error:
        # torchvision reads these formats with bare assertions and struct arithmetic.
        raise DataError(
            f"name is {name!r}, but its files under {root} are unreadable ({_one_line(error)}); {advice}"
        ) from error
    try:
        return reader(root, train=train, download=True)
    except Exception as error:
        raise DataError(
            f"name is {name!r}, but it is not whole under {root}, nor could it be downloaded "
            f"({_one_line(error)}); {advice}"
        ) from error


# NumPy archives


def _read_npz(path: Path) -> _Raw:
    arrays = _load_npz(path)
    inputs = {}
    labels = {}
    for part in ("train", "test"):
        inputs[part] = _check_inputs(f"x_{part}", arrays[f"x_{part}"])
        labels[part] = _check_labels(f"y_{part}", arrays[f"y_{part}"])
        _require(
            len(inputs[part]) == len(labels[part]),
            f"x_{part} has {len(inputs[part])} examples and y_{part} has {len(labels[part])}, "
            "but they must have equally many",
        )
    _require(
        inputs["train"].shape[1:] == inputs["test"].shape[1:],
        f"x_test has examples of shape {tuple(inputs['test'].shape[1:])}, "
        f"but must have the shape of x_train's, {tuple(inputs['train'].shape[1:])}",
    )
    # Else one part would be scaled from 0..255 and the other not.
    _require(
        inputs["train"].dtype == inputs["test"].dtype,
        f"x_test has type {arrays['x_test'].dtype}, "
        f"but must be uint8 or floating point as x_train is, {arrays['x_train'].dtype}",
    )
    num_classes = _count_classes(labels["train"], labels["test"])
    return _Raw(
        inputs["train"],
        torch.from_numpy(labels["train"].astype(np.int64)),
        inputs["test"],
        torch.from_numpy(labels["test"].astype(np.int64)),
        num_classes,
    )


def _load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    _require(path.is_file(), f"name is '{path}', but there is no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        _require(isinstance(archive, NpzFile), f"name is '{path}', but it is one array, not an .npz archive")
        with archive:
            missing = [key for key in _NPZ_KEYS if key not in archive]
            _require(
                not missing,
                f"name is '{path}', but it lacks {', '.join(missing)}; it must hold {', '.join(_NPZ_KEYS)}",
            )
            return {key: np.asarray(archive[key]) for key in _NPZ_KEYS}
    except DataError:
        raise
    except Exception as error:
        # NumPy, zipfile and zlib each raise in their own ways on a file cut short, altered, or pickled.
        raise DataError(
            f"name is '{path}', but it must be a whole .npz file of plain arrays, without pickles; "
            f"NumPy says: {_one_line(error)}"
        ) from error


def _check_inputs(key: str, array: npt.NDArray[Any]) -> Tensor:
    """Images as (N, C, H, W), vectors as (N, F); uint8 stays, floating point becomes float32."""
    _require(
        array.dtype == np.uint8 or array.dtype.kind == "f",
        f"{key} has type {array.dtype}, but must be uint8 (0 to 255) or floating point",
    )
    _require(
        array.ndim in (2, 3, 4),
        f"{key} has shape {array.shape}, but must be (N, H, W), (N, H, W, C), (N, C, H, W) or (N, F)",
    )
    _require(array.size > 0, f"{key} has shape {array.shape}, but must not be empty")
    if array.ndim == 3:
        array = array[:, np.newaxis]
    elif array.ndim == 4 and array.shape[3] in _CHANNEL_COUNTS:
        _require(
            array.shape[1] not in _CHANNEL_COUNTS,
            f"{key} has shape {array.shape}, but only one of its second and last axes may be 1, 3 or 4, "
            "to tell which are the channels; give such small images as vectors (N, F)",
        )
        array = np.moveaxis(array, 3, 1)
    if array.dtype != np.uint8:
        with np.errstate(over="ignore"):  # The check below says it better.
            array = array.astype(np.float32)
    inputs = torch.from_numpy(np.ascontiguousarray(array))
    if inputs.is_floating_point():
        bad = int((~inputs.isfinite()).sum())
        _require(bad == 0, f"{key} has {bad} values that are not finite in float32, but all must be")
    return inputs


def _check_labels(key: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    _require(
        array.dtype.kind in "iu",
        f"{key} has type {array.dtype}, but must hold integers from 0 to the number of classes less 1",
    )
    _require(array.ndim == 1, f"{key} has shape {array.shape}, but must be (N,)")
    _require(array.size > 0, f"{key} has shape {array.shape}, but must not be empty")
    return array


def _count_classes(train: npt.NDArray[Any], test: npt.NDArray[Any]) -> int:
    """The number of classes C, with every one of 0..C-1 in the training labels and no other anywhere."""
    present = np.unique(train)
    _require(
        present[0] == 0 and present[-1] == len(present) - 1,
        f"y_train has {len(present)} different labels from {present[0]} to {present[-1]}, "
        "but they must be 0 to the number of classes less 1, each at least once",
    )
    _require(len(present) >= 2, "y_train has only the label 0, but there must be at least 2 classes")
    _require(
        test.min() >= 0 and test.max() < len(present),
        f"y_test has labels from {test.min()} to {test.max()}, "
        f"but they must lie in y_train's range, 0 to {len(present) - 1}",
    )
    return len(present)


# Image folders


def _read_folder(path: Path, image_size: int | None) -> _Raw:
    has_train, has_test = ((path / part).is_dir() for part in ("train", "test"))
    _require(
        has_train == has_test,
        f"name is '{path}', but it has only one of train/ and test/; "
        "it must have both, or class folders directly",
    )
    if not has_train:
        inputs, labels, classes = _read_class_folders(path, image_size)
        single = [name for index, name in enumerate(classes) if int((labels == index).sum()) < 2]
        _require(
            not single,
            f"name is '{path}', but these classes have only one image: {', '.join(single)}; "
            "without train/ and test/ each must have at least 2",
        )
        stacked = _stack(path, inputs)
        return _split_test(stacked, labels, len(classes))

    train_inputs, train_labels, classes = _read_class_folders(path / "train", image_size)
    test_inputs, test_labels, test_classes = _read_class_folders(path / "test", image_size)
    _require(
        classes == test_classes,
        f"name is '{path}', but train/ has the classes {', '.join(classes)} and test/ has "
        f"{', '.join(test_classes)}; they must be the same",
    )
    stacked = _stack(path, train_inputs + test_inputs)
    train_count = len(train_inputs)
    return _Raw(stacked[:train_count], train_labels, stacked[train_count:], test_labels, len(classes))


def _read_class_folders(path: Path, image_size: int | None) -> tuple[list[Tensor], Tensor, list[str]]:
    """Images (C, H, W), labels (N,), and the classes' names, sorted."""
    datasets = _import_torchvision_datasets(str(path))
    try:
        folder = datasets.ImageFolder(path, loader=lambda file: _read_image(Path(file), image_size))
    except OSError as error:
        raise DataError(
            f"name is '{path}', but it must hold one folder of images for each class: {_one_line(error)}"
        ) from error
    _require(
        len(folder.classes) >= 2,
        f"name is '{path}', but it holds {len(folder.classes)} class folder, and must hold at least 2",
    )
    images = []
    labels = []
    for image, label in folder:
        images.append(image)
        labels.append(label)
    return images, torch.tensor(labels, dtype=torch.int64), list(folder.classes)


def _read_image(file: Path, image_size: int | None) -> Tensor:
    """One image, (1, H, W) or (3, H, W): uint8 as it was stored, or float32 at `image_size`."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            # Pillow would clip 16 bits and more to 8 without a word.
            _require(
                not opened.mode.startswith(("I", "F")),
                f"name leads to '{file}' in mode {opened.mode!r}, but images must have 8 bits a channel",
            )
            pixels = np.array(opened.convert("L" if opened.mode in ("1", "L", "LA", "La") else "RGB"))
    except DataError:
        raise
    except Exception as error:
        # Pillow's plugins raise whatever their formats' damage leads to.
        raise DataError(f"name leads to '{file}', which is no readable image: {_one_line(error)}") from error
    image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]).permute(2, 0, 1)
    if image_size is None:
        return image.contiguous()
    # Sized one by one: a folder of photographs would not fit at full size.
    return _resize(_to_float(image.unsqueeze(0)), image_size).squeeze(0)


def _stack(path: Path, images: list[Tensor]) -> Tensor:
    """Images (C, H, W) as one tensor (N, C, H, W); grey ones become colour where any has colour."""
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    _require(
        len(sizes) == 1,
        f"image_size is None, but the images in '{path}' differ in height and width, "
        f"from {sizes[0]} to {sizes[-1]}; give an image_size in pixels",
    )
    channels = max(image.shape[0] for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


# Arithmetic


def _to_float(inputs: Tensor) -> Tensor:
    """float32 in the ordinary memory layout, with uint8 scaled from 0..255 to [0, 1]."""
    if inputs.dtype != torch.uint8:
        return inputs
    # What was stored as (N, H, W, C) would keep that layout, and layers would sum in another order.
    return inputs.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)


def _resize(images: Tensor, image_size: int | None) -> Tensor:
    """Images (N, C, H, W) as (N, C, image_size, image_size)."""
    if image_size is None or images.shape[2:] == (image_size, image_size):
        return images
    missing_height, missing_width = (image_size - extent for extent in images.shape[2:])
    if 0 <= missing_height <= _MAXIMUM_PADDING and 0 <= missing_width <= _MAXIMUM_PADDING:
        top, left = missing_height // 2, missing_width // 2
        return F.pad(images, (left, missing_width - left, top, missing_height - top))
    return F.interpolate(
        images,
        size=(image_size, image_size),
        mode="bilinear",
        antialias=min(missing_height, missing_width) < 0,
    )


def _channel_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all but the second axis, shaped to broadcast with the inputs."""
    reduced = [axis for axis in range(inputs.ndim) if axis != 1]
    deviation, mean = torch.std_mean(inputs, dim=reduced, correction=0, keepdim=True)
    # A constant channel's deviation is rounding at most; dividing by it would blow up the test part.
    constant = deviation <= torch.finfo(inputs.dtype).eps * mean.abs()
    return mean, torch.where(constant, 1.0, deviation)
