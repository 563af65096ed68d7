"""A data set in three parts: split, resized and standardised."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_bmrs.arguments import check, is_number, whole_number
from pyro_bmrs.data.arrays import Array, DataError
from pyro_bmrs.data.preparation import Preparation, Targets, resize, scale
from pyro_bmrs.data.sources import KNOWN_NAMES, read_source
from pyro_bmrs.data.split import Examples, RawData


@dataclass(frozen=True, eq=False)  # comparing tensors gives no truth value
class Dataset:
    """A data set in three parts, each a `TensorDataset` of (inputs, labels or targets) in memory.

    Inputs are float32, images (N, C, H, W) or vectors (N, F), in units of the training part's standard
    deviation. Labels of classes are int64 (N,) from 0 to `num_outputs` - 1. Targets of a regression are float32
    (N, T), standardised as the inputs are; `preparation.targets` says how.

    >>> from pyro_bmrs.data import load_data
    >>> digits = load_data("digits")
    >>> print(digits)
    digits: 1150 train, 288 validation, 359 test, input (1, 8, 8), 10 classes
    """

    name: str  # of a path its last part
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    preparation: Preparation

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels; none of a regression.

        >>> load_data("patches").class_names
        ('china', 'flower')
        """
        return self.preparation.class_names

    @property
    def num_outputs(self) -> int:
        """How many outputs a network has: one for each class, or for each target of a regression."""
        return self.preparation.num_outputs

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
        return self.preparation.prepare(inputs)

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
        theirs = other.preparation
        return self.preparation.standardise(other.test.tensors[0] * theirs.deviation + theirs.mean)

    def __str__(self) -> str:
        targets = self.preparation.targets
        outputs = f"{self.num_outputs} classes" if targets is None else f"targets {', '.join(targets.names)}"
        return (
            f"{self.name}: {len(self.train)} train, {len(self.validation)} validation, "
            f"{len(self.test)} test, input {self.input_shape}, {outputs}"
        )


def load_data(
    name: str | Path,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Read a data set, split its training examples, size its images and standardise it.

    The official training examples are permuted by `seed` and split into a training and a validation
    part, stratified: each class has its share in both, and one example at least. The test part stays as it
    is. Pixels of type uint8 are scaled to [0, 1]. Then every channel (of vectors: every feature) is
    standardised with the mean and the standard deviation of the training part. A channel that is constant in
    the training part is only centred. Targets of a regression are standardised in the same way.

    Args:
        name: One of

            - `"digits"`: the 1797 images of 8 x 8 pixels that come with scikit-learn. A stratified fifth,
              the same for every `seed`, is the test part.
            - `"patches"`: 8480 grey squares of 8 x 8 pixels of the two photographs that come with scikit-learn;
              the label is the photograph. They are out of distribution for a network of digits.
            - `"diabetes"`: a regression, 442 patients by 10 features, that comes with scikit-learn. A fifth, the
              same for every `seed`, is the test part.
            - `"mnist"`, `"fashion-mnist"`, `"cifar10"`: read by torchvision, which downloads them if they
              are not under `data_root` yet.
            - a path ending in `.npz`, with `x_train`, `y_train`, `x_test`, `y_test`: images (N, H, W),
              (N, H, W, C) with C in 1, 3, 4, or (N, C, H, W), or vectors (N, F), as uint8 or floating
              point; labels (N,), integers from 0, each class at least once in `y_train`, or targets (N,) or
              (N, T), floating point. Optionally `class_names`, `target_names` and, of vectors, `feature_names`: a
              text for each.
            - a folder of images, one folder a class, with any folders below: either these class folders
              themselves, of which a stratified fifth, the same for every `seed`, is the test part; or
              `train/` and `test/` (or `training/` and `testing/`) with the class folders in each; or
              `train/` and `val/` (or `valid/`, `validation/`), with or without `test/`. `val/` is then the
              validation part; without `test/` the test part is a fifth of `train/`, because choices that are
              made on `val/` would make its accuracy too good. Names that start with a dot, `__MACOSX` and
              `@eaDir` are passed over everywhere. Images are turned as their EXIF says. Transparency is
              dropped; of an animation the first frame is read.
        data_root: the folder of the named sets; default the environment's `PYRO_BMRS_DATA`, else
            `~/.cache/pyro_bmrs`. Paths in `name` do not start from it.
        image_size: height and width of the images in pixels. They are resized before they are standardised:
            those smaller by at most 8 pixels are padded with zeros, equally on all sides (the odd pixel goes
            to the bottom and the right); others are interpolated bilinearly.
        validation_fraction: share of the training examples set aside for validation, between 0 and 1. Not
            used for a folder with `val/`.
        seed: of permutation and split; nothing else is random.
        limit: keep at most this many of the training examples, stratified, before the split, for quick tries.

    Returns:
        The three parts, as float32 (N, C, H, W) or (N, F), and int64 (N,) or float32 (N, T).

    Raises:
        DataError: if an argument is out of range, or the data are missing, unreadable, or not as above; if no
            training example of a class would be left. A class of one training example is in no validation
            part: that is a warning.

    >>> small = load_data("digits", image_size=12, limit=100)
    >>> len(small.train), len(small.validation), small.input_shape
    (80, 20, (1, 12, 12))
    """
    name = str(name) if isinstance(name, Path) else name
    check(isinstance(name, str) and name != "", "name", KNOWN_NAMES, name, DataError)
    size = None if image_size is None else whole_number("image_size", image_size, 1, DataError)
    limit = None if limit is None else whole_number("limit", limit, 2, DataError)
    seed = whole_number("seed", seed, kind=DataError)
    inside = is_number(validation_fraction) and 0.0 < validation_fraction < 1.0
    check(inside, "validation_fraction", "strictly between 0 and 1", validation_fraction, DataError)

    raw = read_source(name, data_root, None if size is None else partial(resize, image_size=size))
    sizable = size is None or raw.train[0].ndim == 4
    check(sizable, "image_size", f"left out for vectors, as {name!r} holds", size, DataError)

    train, validation = _split(raw, limit, float(validation_fraction), seed)
    missing = [
        class_name
        for label, class_name in enumerate(raw.class_names)
        if not bool((validation[1] == label).any())
    ]
    if missing:
        warnings.warn(
            f"no example to validate on for {', '.join(missing)}: a class needs 2 training examples or more",
            stacklevel=2,
        )
    inputs = [scale(part[0], raw.form, size) for part in (train, validation, raw.test)]
    labels, targets = [part[1] for part in (train, validation, raw.test)], None
    if raw.target_names:
        targets = Targets(raw.target_names, *_channel_statistics(labels[0]))
        labels = [(y - targets.mean) / targets.deviation for y in labels]
    statistics = _channel_statistics(inputs[0])
    preparation = Preparation(raw.form, size, *statistics, raw.class_names, raw.feature_names, targets)
    parts = [TensorDataset(preparation.standardise(x), y) for x, y in zip(inputs, labels, strict=True)]
    return Dataset(os.path.basename(os.path.abspath(name)), parts[0], parts[1], parts[2], preparation)


def _split(raw: RawData, limit: int | None, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """The training examples, permuted and limited, and the validation examples: those of the source, or a share."""
    inputs, labels = raw.train
    classes = len(raw.class_names)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if limit is not None and limit < len(labels):
        enough = f"at least {classes}, one for each class; else it leaves out {_rarest(raw, classes - limit)}"
        check(limit >= classes, "limit", enough, limit, DataError)
        order = order[raw.chosen(labels, limit, seed)[order]]
    if raw.validation is not None:
        return (inputs[order], labels[order]), raw.validation
    wanted = round(len(order) * fraction)
    train_count = len(order) - wanted
    check(
        train_count > 0 and wanted > 0,
        "validation_fraction", f"such that {len(order)} training examples leave 1 or more to train and to validate on, "
        f"not {train_count} and {wanted}", fraction, DataError,
    )  # fmt: skip
    check(
        train_count >= classes,
        "validation_fraction", f"such that {len(order)} training examples leave 1 or more of each class to train on: "
        f"of {train_count} there would be none for {_rarest(raw, classes - train_count)}", fraction, DataError,
    )  # fmt: skip
    held_out = raw.chosen(labels[order], wanted, seed, leave=1)
    train, validation = order[~held_out], order[held_out]
    return (inputs[train], labels[train]), (inputs[validation], labels[validation])


def _rarest(raw: RawData, count: int) -> str:
    """The names of the classes with the fewest training examples."""
    if count <= 0:
        return ""
    order = torch.bincount(raw.train[1]).argsort(stable=True)
    return ", ".join(raw.class_names[label] for label in order[:count].tolist())


def _channel_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all but the second axis, shaped to broadcast with the inputs."""
    reduced = [axis for axis in range(inputs.ndim) if axis != 1]
    deviation, mean = torch.std_mean(inputs, dim=reduced, correction=0, keepdim=True)
    # A constant channel's deviation is rounding at most; dividing by it would blow up the test part.
    constant = deviation <= torch.finfo(inputs.dtype).eps * mean.abs()
    return mean, torch.where(constant, 1.0, deviation)
