"""A data set in three parts: split, resized and standardised."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.data.arrays import Array, DataError, InputForm
from pyro_bmrs.data.sources import KNOWN_NAMES, read_source

# Padding keeps every pixel: MNIST's 28 pixels become the paper's 32. A wider frame would be mostly empty, so
# beyond this number of pixels images are interpolated.
_MAXIMUM_PADDING = 8


@dataclass(frozen=True, eq=False)  # comparing tensors gives no truth value
class Dataset:
    """A classification data set in three parts, each a `TensorDataset` of (inputs, labels) in memory.

    Inputs are float32, images (N, C, H, W) or vectors (N, F), in units of the training part's standard
    deviation; labels are int64 (N,) from 0 to `num_classes` - 1.

    >>> from pyro_bmrs.data import load_data
    >>> digits = load_data("digits")
    >>> print(digits)
    digits: 1150 train, 288 validation, 359 test, input (1, 8, 8), 10 classes
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    num_classes: int
    mean: Tensor  # (1, C, 1, 1) or (1, F), of the training part, in scaled units
    deviation: Tensor  # (1, C, 1, 1) or (1, F), 1 where the training part is constant
    image_size: int | None  # as given to `load_data`
    form: InputForm  # of raw inputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch: (C, H, W) or (F,).

        >>> load_data("digits", image_size=16).input_shape
        (1, 16, 16)
        """
        return tuple(self.train.tensors[0].shape[1:])

    def prepare(self, inputs: Array | Tensor) -> Tensor:
        """Scale, resize and standardise raw inputs as `load_data` did, with the same statistics.

        Args:
            inputs: not empty, in the form of the data set's source: images (N, H, W) with one channel,
                (N, H, W, C) with C in 1, 3, 4, or (N, C, H, W), or vectors (N, F). Images have the source's
                size, before `image_size`; for an image folder read with an `image_size`, any size. They also
                have the source's type: uint8 (0 to 255) for bytes and image files, floating point for
                floating point, any numbers from 0 to 16 for digits.

        Returns:
            float32, (N, *input_shape), in memory of its own.

        Raises:
            DataError: if the inputs are not in this form, or not finite.

        >>> from sklearn.datasets import load_digits
        >>> load_data("digits", image_size=12).prepare(load_digits().images[:5]).shape
        torch.Size([5, 1, 12, 12])
        """
        scaled = _scale(self.form.read(inputs), self.form, self.image_size)
        return _standardise(scaled, self.mean, self.deviation)

    def foreign(self, other: Dataset) -> Tensor:
        """The test inputs of another data set, standardised with this one's mean and deviation.

        They are out-of-distribution inputs for a network of this data set.

        >>> digits = load_data("digits", image_size=16)
        >>> digits.foreign(load_data("patches", image_size=16)).shape
        torch.Size([1696, 1, 16, 16])

        Raises:
            DataError: if its inputs have another shape.
        """
        alike = other.input_shape == self.input_shape
        allowed = f"a data set with inputs of shape {self.input_shape}, as {self.name} has"
        check(alike, "other", allowed, str(other), DataError)
        scaled = other.test.tensors[0] * other.deviation + other.mean
        return _standardise(scaled, self.mean, self.deviation)

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
    part. The test part stays as it is. Pixels of type uint8 are scaled to [0, 1]. Then every channel (of
    vectors: every feature) is standardised with the mean and the standard deviation of the training part.
    A channel that is constant in the training part is only centred.

    Args:
        name: One of

            - `"digits"`: the 1797 images of 8 x 8 pixels that come with scikit-learn. A stratified fifth,
              the same for every `seed`, is the test part.
            - `"patches"`: 8480 grey squares of 8 x 8 pixels of the two photographs that come with scikit-learn;
              the label is the photograph. They are out of distribution for a network of digits.
            - `"mnist"`, `"fashion-mnist"`, `"cifar10"`: read by torchvision, which downloads them if they
              are not under `data_root` yet.
            - a path ending in `.npz`, with `x_train`, `y_train`, `x_test`, `y_test`: images (N, H, W),
              (N, H, W, C) with C in 1, 3, 4, or (N, C, H, W), or vectors (N, F), as uint8 or floating
              point; labels (N,), integers from 0, each class at least once in `y_train`.
            - a folder of images, one folder a class: either `train/` and `test/` with the class folders in
              each, or the class folders themselves, of which a stratified fifth, the same for every
              `seed`, is the test part. Transparency is dropped.
        data_root: the folder of the named sets; default the environment's `PYRO_BMRS_DATA`, else
            `~/.cache/pyro_bmrs`. Paths in `name` do not start from it.
        image_size: height and width of the images in pixels. They are resized before they are standardised:
            those smaller by at most 8 pixels are padded with zeros, equally on all sides (the odd pixel goes
            to the bottom and the right); others are interpolated bilinearly.
        validation_fraction: share of the training examples set aside for validation, between 0 and 1.
        seed: of the permutation; nothing else is random.
        limit: keep at most this many of the permuted training examples, before the split, for quick tries.

    Returns:
        The three parts, as float32 (N, C, H, W) or (N, F) and int64 (N,).

    Raises:
        DataError: if an argument is out of range, or the data are missing, unreadable, or not as above.

    >>> small = load_data("digits", image_size=12, limit=100)
    >>> len(small.train), len(small.validation), small.input_shape
    (80, 20, (1, 12, 12))
    """
    check(isinstance(name, str) and name != "", "name", KNOWN_NAMES, name, DataError)
    size = None if image_size is None else _whole("image_size", image_size, 1)
    limit = None if limit is None else _whole("limit", limit, 2)
    seed = _whole("seed", seed, 0)
    inside = is_number(validation_fraction) and 0.0 < validation_fraction < 1.0
    check(inside, "validation_fraction", "strictly between 0 and 1", validation_fraction, DataError)

    raw = read_source(name, data_root, None if size is None else partial(_resize, image_size=size))
    sizable = size is None or raw.train_inputs.ndim == 4
    check(sizable, "image_size", f"left out for vectors, as {name!r} holds", size, DataError)

    # (limited training examples,)
    order = torch.randperm(len(raw.train_labels), generator=torch.Generator().manual_seed(seed))[:limit]
    validation_count = round(len(order) * validation_fraction)
    train_count = len(order) - validation_count
    check(
        train_count > 0 and validation_count > 0,
        "validation_fraction", f"such that {len(order)} training examples leave 1 or more to train and to validate on, "
        f"not {train_count} and {validation_count}", validation_fraction, DataError,
    )  # fmt: skip

    parts = [
        _scale(inputs, raw.form, size)
        for inputs in (
            raw.train_inputs[order[:train_count]],
            raw.train_inputs[order[train_count:]],
            raw.test_inputs,
        )
    ]
    mean, deviation = _channel_statistics(parts[0])
    train, validation, test = (_standardise(part, mean, deviation) for part in parts)
    return Dataset(
        name=name,
        train=TensorDataset(train, raw.train_labels[order[:train_count]]),
        validation=TensorDataset(validation, raw.train_labels[order[train_count:]]),
        test=TensorDataset(test, raw.test_labels),
        num_classes=raw.num_classes,
        mean=mean,
        deviation=deviation,
        image_size=size,
        form=raw.form,
    )


def _whole(name: str, value: object, least: int) -> int:
    """An integer, which may be one of NumPy's."""
    given = int(value) if isinstance(value, np.integer) else value
    # torch's seeds and sizes end at 2**63.
    good = is_whole(given, least) and given < 2**63  # type: ignore[operator]
    check(good, name, f"an integer of at least {least}, below 2**63", value, DataError)
    return int(given)  # type: ignore[call-overload, no-any-return]


def _scale(inputs: Tensor, form: InputForm, image_size: int | None) -> Tensor:
    """Raw inputs as float32 of the wanted size, bytes and counts in [0, 1]. May overwrite the inputs."""
    sized = _to_float(inputs) if image_size is None else _resize(inputs, image_size)
    return sized.div_(form.scale)


def _standardise(inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Overwrites the inputs."""
    return inputs.sub_(mean).div_(deviation)


def _to_float(inputs: Tensor) -> Tensor:
    """float32 in the ordinary memory layout; inputs that are float32 come back as they are."""
    if inputs.dtype != torch.uint8:
        return inputs
    # Arrays stored as (N, H, W, C) would keep that layout, and layers would sum in another order.
    return inputs.to(torch.float32, memory_format=torch.contiguous_format)


def _resize(images: Tensor, image_size: int) -> Tensor:
    """Images (N, C, H, W) as float32 (N, C, image_size, image_size)."""
    images = _to_float(images)
    if images.shape[2:] == (image_size, image_size):
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
