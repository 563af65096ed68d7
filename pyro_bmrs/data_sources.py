"""Where data sets come from: each source read and checked, and handed on as it was stored.

>>> digits = read_source("digits")
>>> digits.train_inputs.shape, digits.train_inputs.max(), digits.form.scale
(torch.Size([1438, 1, 8, 8]), tensor(16.), 16.0)
"""

import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

__all__ = [
    "KNOWN_NAMES",
    "DataError",
    "InputForm",
    "RawData",
    "Resize",
    "is_at_hand",
    "read_inputs",
    "read_source",
    "require",
    "require_integer",
]

type Resize = Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N, C, size, size)

_TORCHVISION_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
KNOWN_NAMES = (
    "'digits', 'patches', 'mnist', 'fashion-mnist', 'cifar10', a path ending in .npz, or an image folder"
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNEL_COUNTS = (1, 3, 4)

# A set without an official test part gives up the same fifth whatever `seed` is: were it to follow
# the seed, runs with several seeds would choose their settings on each other's test examples.
_TEST_FRACTION = 0.2
_TEST_SEED = 20240601


class DataError(ValueError):
    """Data that cannot be read or used: one line naming the argument, what it was, and what is allowed.

    >>> from pyro_bmrs.data import load_data
    >>> try:
    ...     load_data("digits", validation_fraction=2.0)
    ... except DataError as error:
    ...     print(error)
    validation_fraction is 2.0, but must lie strictly between 0 and 1
    """


@dataclass(frozen=True)
class InputForm:
    """What a source's raw inputs look like, so that new ones can be held to it.

    >>> form = InputForm((1, 28, 28), "bytes")
    >>> print(form)
    uint8 of shape (N, 28, 28), (N, 28, 28, 1) or (N, 1, 28, 28)
    >>> form.read(np.zeros((5, 28, 28), np.uint8)).shape
    torch.Size([5, 1, 28, 28])
    """

    shape: tuple[int | None, ...]  # (C, H, W) or (F,) of one input; None: any extent
    values: Literal["bytes", "counts", "numbers"]  # uint8 0..255; digits' 0..16; floating point as it is

    @property
    def scale(self) -> float:
        """What raw values are divided by."""
        # Digits' pixels count the inked points of a 4 x 4 block: 0 to 16.
        return {"bytes": 255.0, "counts": 16.0, "numbers": 1.0}[self.values]

    def read(self, inputs: npt.NDArray[Any] | Tensor) -> Tensor:
        """Check raw inputs, and arrange them as (N, C, H, W) or (N, F): uint8, or float32, not scaled.

        Raises:
            DataError: They are not in this form.
        """
        array = _to_array(inputs)
        arranged = [candidate for candidate in self._arrangements(array) if self._fits(candidate.shape[1:])]
        require(
            array.size > 0 and self._takes(array.dtype) and len(arranged) == 1,
            f"inputs has type {_show_type(array)} and shape {array.shape}, "
            f"but must be {self}, with N at least 1",
        )
        if self.values == "counts":
            require(
                bool(np.all((array >= 0) & (array <= self.scale))),
                f"inputs has values from {array.min()} to {array.max()}, but must be {self}",
            )
        return _to_tensor("inputs", arranged[0])

    def _takes(self, dtype: np.dtype[Any]) -> bool:
        return {"bytes": dtype == np.uint8, "counts": dtype.kind in "uif", "numbers": dtype.kind == "f"}[
            self.values
        ]

    def _arrangements(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        if array.ndim == 2:
            return [array]
        if array.ndim == 3:
            return [array[:, np.newaxis]]
        if array.ndim == 4 and self.shape[0] in _CHANNEL_COUNTS:
            return [array, np.moveaxis(array, 3, 1)]
        return [array]

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            expected is None or expected == given for expected, given in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        values = {"bytes": "uint8", "counts": "numbers from 0 to 16", "numbers": "floating point"}[
            self.values
        ]
        if len(self.shape) == 1:
            return f"{values} of shape (N, {self.shape[0]})"
        channels, *extents = self.shape
        height, width = (letter if size is None else size for letter, size in zip("HW", extents, strict=True))
        first = f"(N, {channels}, {height}, {width})"
        last = f"(N, {height}, {width}, {channels})"
        if channels == 1:
            return f"{values} of shape (N, {height}, {width}), {last} or {first}"
        return (
            f"{values} of shape {last} or {first}"
            if channels in _CHANNEL_COUNTS
            else f"{values} of shape {first}"
        )


@dataclass(frozen=True)
class RawData:
    """Checked data in the units they were stored in: uint8, or float32."""

    train_inputs: Tensor  # (N, C, H, W) or (N, F)
    train_labels: Tensor  # (N,)
    test_inputs: Tensor  # (M, C, H, W) or (M, F)
    test_labels: Tensor  # (M,)
    num_classes: int
    form: InputForm


def read_source(name: str, data_root: str | Path | None = None, resize: Resize | None = None) -> RawData:
    """Read the data set that `name` stands for, as `pyro_bmrs.data.load_data` documents it.

    Args:
        name: A known name, a path ending in .npz, or an image folder.
        data_root: Where the named sets lie or go to.
        resize: Brings images from files, which may differ in size, to one size as each is read; other
            sources leave it to the caller.

    Raises:
        DataError: The data are missing, unreadable, or not as documented.
    """
    if name == "digits":
        return _read_digits()
    if name == "patches":
        return _read_patches()
    if name in _TORCHVISION_NAMES:
        return _read_torchvision(name, _resolve_data_root(data_root))
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.is_dir():
        return _read_folder(path, resize)
    raise DataError(f"name is {name!r}, but must be {KNOWN_NAMES} that exists")


def require(condition: bool, message: str) -> None:
    """Raise a DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


def require_integer(argument: str, value: object, *, at_least: int, optional: bool = False) -> None:
    """Raise a DataError unless the value is a whole number of at least `at_least`, or None where optional."""
    if optional and value is None:
        return
    require(
        # 2**63 is where torch's seeds and sizes end.
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and at_least <= int(value) < 2**63,
        f"{argument} is {value!r}, but must be a whole number of at least {at_least}",
    )


def _one_line(error: BaseException) -> str:
    """An error of a library on one line, with its type where it says nothing else."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_array(inputs: object) -> npt.NDArray[Any]:
    require(
        isinstance(inputs, np.ndarray | Tensor),
        f"inputs is of type {type(inputs).__name__}, but must be a NumPy array or a tensor",
    )
    if not isinstance(inputs, Tensor):
        return np.asarray(inputs)
    try:
        cpu = inputs.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray((cpu.float() if cpu.dtype == torch.bfloat16 else cpu).numpy())
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"inputs is a tensor of {inputs.dtype} on {inputs.device}, but must be one that NumPy can hold: "
            f"{_one_line(error)}"
        ) from error


def _resolve_data_root(data_root: str | Path | None) -> Path:
    chosen = data_root or os.environ.get("PYRO_BMRS_DATA") or Path("~/.cache/pyro_bmrs")
    return Path(chosen).expanduser()


# Embedded and published sets


def _read_digits() -> RawData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "name is 'digits', but scikit-learn, which holds them, is missing: pip install scikit-learn"
        ) from error
    digits = load_digits()
    inputs = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return _split_test(inputs, labels, 10, InputForm((1, 8, 8), "counts"))


def _read_patches() -> RawData:
    """Squares of two photographs, which a network that reads digits has never seen the like of."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError(
            "name is 'patches', but scikit-learn, which holds the photographs, is missing: pip install scikit-learn"
        ) from error
    side, parts = 8, []
    for photograph in load_sample_images().images:
        grey = torch.from_numpy(photograph @ np.array([0.299, 0.587, 0.114])).round().to(torch.uint8)
        squares = grey.unfold(0, side, side).unfold(1, side, side)
        parts.append(squares.reshape(-1, 1, side, side))
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(parts)])
    return _split_test(torch.cat(parts), labels, len(parts), InputForm((1, side, side), "bytes"))


def _split_test(inputs: Tensor, labels: Tensor, num_classes: int, form: InputForm) -> RawData:
    """Set a stratified fifth aside for the test, the same for every seed."""
    generator = torch.Generator().manual_seed(_TEST_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        is_test[members[order[: max(1, round(len(members) * _TEST_FRACTION))]]] = True
    return RawData(inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], num_classes, form)


def _import_torchvision_datasets(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"name is {name!r}, but reading it needs torchvision: pip install 'pyro-bmrs[vision]'"
        ) from error
    return datasets


def _read_torchvision(name: str, root: Path) -> RawData:
    reader = getattr(_import_torchvision_datasets(name), _TORCHVISION_NAMES[name])
    train, test = (_open_torchvision(reader, name, root, train=train) for train in (True, False))
    # CIFAR-10 comes as NumPy (N, H, W, C), the others as torch (N, H, W).
    (train_inputs, test_inputs) = (
        torch.as_tensor(part.data).permute(0, 3, 1, 2)
        if part.data.ndim == 4
        else torch.as_tensor(part.data).unsqueeze(1)
        for part in (train, test)
    )
    return RawData(
        train_inputs,
        torch.as_tensor(train.targets, dtype=torch.int64),
        test_inputs,
        torch.as_tensor(test.targets, dtype=torch.int64),
        num_classes=10,
        form=InputForm(tuple(train_inputs.shape[1:]), "bytes"),
    )


def is_at_hand(name: str, data_root: str | Path | None = None) -> bool:
    """Whether a data set of a known name can be read without a download."""
    if name not in _TORCHVISION_NAMES:
        return name in ("digits", "patches")
    root = _resolve_data_root(data_root)
    reader = getattr(_import_torchvision_datasets(name), _TORCHVISION_NAMES[name])
    try:
        reader(root, train=False, download=False)
    except Exception:
        return False
    return True


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


def _read_npz(path: Path) -> RawData:
    arrays = _load_npz(path)
    inputs = {}
    labels = {}
    for part in ("train", "test"):
        inputs[part] = _check_inputs(f"x_{part}", arrays[f"x_{part}"])
        labels[part] = _check_labels(f"y_{part}", arrays[f"y_{part}"])
        require(
            len(inputs[part]) == len(labels[part]),
            f"x_{part} has {len(inputs[part])} examples and y_{part} has {len(labels[part])}, "
            "but they must have equally many",
        )
    require(
        inputs["train"].shape[1:] == inputs["test"].shape[1:],
        f"x_test has examples of shape {tuple(inputs['test'].shape[1:])}, "
        f"but must have the shape of x_train's, {tuple(inputs['train'].shape[1:])}",
    )
    # Else one part would be scaled from 0..255 and the other not.
    require(
        inputs["train"].dtype == inputs["test"].dtype,
        f"x_test has type {arrays['x_test'].dtype}, "
        f"but must be uint8 or floating point as x_train is, {arrays['x_train'].dtype}",
    )
    num_classes = _count_classes(labels["train"], labels["test"])
    return RawData(
        inputs["train"],
        torch.from_numpy(labels["train"].astype(np.int64)),
        inputs["test"],
        torch.from_numpy(labels["test"].astype(np.int64)),
        num_classes,
        InputForm(
            tuple(inputs["train"].shape[1:]),
            "bytes" if inputs["train"].dtype == torch.uint8 else "numbers",
        ),
    )


# Kilobytes of a compressed file can stand for more than any memory holds.
_MOST_BYTES = 2**33


def _load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    require(path.is_file(), f"name is '{path}', but there is no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        require(isinstance(archive, NpzFile), f"name is '{path}', but it is one array, not an .npz archive")
        with archive:
            unpacked = sum(member.file_size for member in archive.zip.infolist())
            require(
                unpacked <= _MOST_BYTES,
                f"name is '{path}', whose arrays have {unpacked:,} bytes, but {_MOST_BYTES:,} are the most "
                "that is read",
            )
            missing = [key for key in _NPZ_KEYS if key not in archive]
            require(
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


def read_inputs(path: str | Path) -> npt.NDArray[Any]:
    """Read raw inputs to predict on, from a .npy file or from an .npz file's key `x`.

    Args:
        path: The file; which of the two it is, its content tells. Pickles are refused, not run.

    Returns:
        The array as stored: integers or floating point, not empty, all finite. Whether it fits a data
        set, `Dataset.prepare` says.

    Raises:
        DataError: The file is missing, unreadable, or not as above.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/new.npz", x=np.zeros((2, 8, 8), np.uint8))
    ...     read_inputs(f"{folder}/new.npz").shape
    (2, 8, 8)
    """
    path = Path(path).expanduser()
    shown = repr(str(path))
    require(path.is_file(), f"path is {shown}, but there is no such file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, NpzFile):
            with loaded:
                keys = ", ".join(repr(key) for key in loaded) or "nothing"
                require("x" in loaded, f"path is {shown}, which holds {keys}, but it must hold the key 'x'")
                array = np.asarray(loaded["x"])
        else:
            array = np.asarray(loaded)
    except DataError:
        raise
    except Exception as error:
        # As in `_load_npz`.
        raise DataError(
            f"path is {shown}, but it must be a whole .npy file, or an .npz file with the key 'x', "
            f"without pickles; NumPy says: {_one_line(error)}"
        ) from error
    require(
        array.dtype.kind in "uif",
        f"path is {shown}, which holds the type {_show_type(array)}, "
        "but it must hold integers or floating point",
    )
    require(
        array.size > 0, f"path is {shown}, which holds an array of shape {array.shape}, but must not be empty"
    )
    bad = int((~np.isfinite(array)).sum())
    require(bad == 0, f"path is {shown}, which holds {bad} values that are not finite, but all must be")
    return array


def _check_inputs(key: str, array: npt.NDArray[Any]) -> Tensor:
    """Images as (N, C, H, W), vectors as (N, F); uint8 stays, floating point becomes float32."""
    require(
        array.dtype == np.uint8 or array.dtype.kind == "f",
        f"{key} has type {array.dtype}, but must be uint8 (0 to 255) or floating point",
    )
    require(
        array.ndim in (2, 3, 4),
        f"{key} has shape {array.shape}, but must be (N, H, W), (N, H, W, C), (N, C, H, W) or (N, F)",
    )
    require(array.size > 0, f"{key} has shape {array.shape}, but must not be empty")
    if array.ndim == 3:
        array = array[:, np.newaxis]
    elif array.ndim == 4 and array.shape[3] in _CHANNEL_COUNTS:
        require(
            array.shape[1] not in _CHANNEL_COUNTS,
            f"{key} has shape {array.shape}, but only one of its second and last axes may be 1, 3 or 4, "
            "to tell which are the channels; give such small images as vectors (N, F)",
        )
        array = np.moveaxis(array, 3, 1)
    return _to_tensor(key, array)


def _to_tensor(key: str, array: npt.NDArray[Any]) -> Tensor:
    """A tensor of its own memory, or of the array's where that is bytes: uint8, else finite float32."""
    if array.dtype != np.uint8:
        with np.errstate(over="ignore"):  # The check below says it better.
            array = array.astype(np.float32)
    inputs = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if inputs.is_floating_point():
        bad = int((~inputs.isfinite()).sum())
        require(bad == 0, f"{key} has {bad} values that are not finite in float32, but all must be")
    return inputs


def _show_type(array: npt.NDArray[Any]) -> str:
    return " ".join(str(array.dtype).split())


def _check_labels(key: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    require(
        array.dtype.kind in "iu",
        f"{key} has type {array.dtype}, but must hold integers from 0 to the number of classes less 1",
    )
    require(array.ndim == 1, f"{key} has shape {array.shape}, but must be (N,)")
    require(array.size > 0, f"{key} has shape {array.shape}, but must not be empty")
    return array


def _count_classes(train: npt.NDArray[Any], test: npt.NDArray[Any]) -> int:
    """The number of classes C, with every one of 0..C-1 in the training labels and no other anywhere."""
    present = np.unique(train)
    require(
        present[0] == 0 and present[-1] == len(present) - 1,
        f"y_train has {len(present)} different labels from {present[0]} to {present[-1]}, "
        "but they must be 0 to the number of classes less 1, each at least once",
    )
    require(len(present) >= 2, "y_train has only the label 0, but there must be at least 2 classes")
    require(
        test.min() >= 0 and test.max() < len(present),
        f"y_test has labels from {test.min()} to {test.max()}, "
        f"but they must lie in y_train's range, 0 to {len(present) - 1}",
    )
    return len(present)


# Image folders


def _read_folder(path: Path, resize: Resize | None) -> RawData:
    has_train, has_test = ((path / part).is_dir() for part in ("train", "test"))
    require(
        has_train == has_test,
        f"name is '{path}', but it has only one of train/ and test/; "
        "it must have both, or class folders directly",
    )
    if not has_train:
        inputs, labels, classes = _read_class_folders(path, resize)
        single = [name for index, name in enumerate(classes) if int((labels == index).sum()) < 2]
        require(
            not single,
            f"name is '{path}', but these classes have only one image: {', '.join(single)}; "
            "without train/ and test/ each must have at least 2",
        )
        stacked = _stack(path, inputs)
        return _split_test(stacked, labels, len(classes), _folder_form(stacked, resize))

    train_inputs, train_labels, classes = _read_class_folders(path / "train", resize)
    test_inputs, test_labels, test_classes = _read_class_folders(path / "test", resize)
    require(
        classes == test_classes,
        f"name is '{path}', but train/ has the classes {', '.join(classes)} and test/ has "
        f"{', '.join(test_classes)}; they must be the same",
    )
    stacked = _stack(path, train_inputs + test_inputs)
    train_count = len(train_inputs)
    return RawData(
        stacked[:train_count],
        train_labels,
        stacked[train_count:],
        test_labels,
        len(classes),
        _folder_form(stacked, resize),
    )


def _folder_form(stacked: Tensor, resize: Resize | None) -> InputForm:
    channels, height, width = stacked.shape[1:]
    # Files of any size were brought to one, so new images may have any size too.
    return InputForm((channels, height, width) if resize is None else (channels, None, None), "bytes")


def _read_class_folders(path: Path, resize: Resize | None) -> tuple[list[Tensor], Tensor, list[str]]:
    """Images (C, H, W), labels (N,), and the classes' names, sorted."""
    datasets = _import_torchvision_datasets(str(path))
    try:
        folder = datasets.ImageFolder(path, loader=lambda file: _read_image(Path(file), resize))
    except OSError as error:
        raise DataError(
            f"name is '{path}', but it must hold one folder of images for each class: {_one_line(error)}"
        ) from error
    require(
        len(folder.classes) >= 2,
        f"name is '{path}', but it holds {len(folder.classes)} class folder, and must hold at least 2",
    )
    images = []
    labels = []
    for image, label in folder:
        images.append(image)
        labels.append(label)
    return images, torch.tensor(labels, dtype=torch.int64), list(folder.classes)


def _read_image(file: Path, resize: Resize | None) -> Tensor:
    """One image, (1, H, W) or (3, H, W): uint8 as it was stored, or what `resize` made of it."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            # Pillow would clip 16 bits and more to 8 without a word.
            require(
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
    if resize is None:
        return image.contiguous()
    # Sized one by one: a folder of photographs would not fit at full size.
    return resize(image.unsqueeze(0)).squeeze(0)


def _stack(path: Path, images: list[Tensor]) -> Tensor:
    """Images (C, H, W) as one tensor (N, C, H, W); grey ones become colour where any has colour."""
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    require(
        len(sizes) == 1,
        f"image_size is None, but the images in '{path}' differ in height and width, "
        f"from {sizes[0]} to {sizes[-1]}; give an image_size in pixels",
    )
    channels = max(image.shape[0] for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])
