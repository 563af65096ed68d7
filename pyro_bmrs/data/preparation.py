"""From raw inputs to what a network takes: checked, sized, scaled and standardised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pyro_bmrs.arguments import check
from pyro_bmrs.data.arrays import Array, DataError, InputForm, read_inputs
from pyro_bmrs.data.folders import image_files, read_image

# Padding keeps every pixel: MNIST's 28 pixels become the paper's 32. A wider frame would be mostly empty, so
# beyond this number of pixels images are interpolated.
_MAXIMUM_PADDING = 8


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a regression: y = (target - mean) / deviation.

    >>> from pyro_bmrs.data import load_data
    >>> targets = load_data("diabetes").preparation.targets
    >>> targets.names, targets.restored(torch.zeros(1, 1)).round()
    (('progression',), tensor([[151.]]))
    """

    names: tuple[str, ...]
    mean: Tensor  # (1, T), of the training part
    deviation: Tensor  # (1, T)

    def restored(self, y: Tensor) -> Tensor:
        """From standardised values (N, T) to those of the source."""
        return y * self.deviation + self.mean


class _TargetsDocument(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    names: list[str] = Field(min_length=1)
    mean: list[float]
    deviation: list[Annotated[float, Field(gt=0)]]


class _Document(BaseModel):
    """The part of a document that can't be worked out from the rest."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    raw_shape: list[Annotated[int, Field(gt=0)] | None] = Field(min_length=1)
    raw_values: Literal["bytes", "counts", "numbers"]
    channels: Literal["grey", "RGB"] | None
    image_size: Annotated[int, Field(gt=0)] | None
    mean: list[float]
    deviation: list[Annotated[float, Field(gt=0)]]
    class_names: list[str]
    feature_names: list[str]
    targets: _TargetsDocument | None


@dataclass(frozen=True, eq=False)  # comparing tensors gives no truth value
class Preparation:
    """What raw inputs of a data set look like, how they are made inputs of a network, and what its outputs mean.

        input = (raw / divisor - mean) / deviation, after the change of size

    >>> from pyro_bmrs.data import load_data
    >>> digits = load_data("digits", image_size=12).preparation
    >>> digits.input_shape, digits.form.scale, digits.class_names[:3]
    ((1, 12, 12), 16.0, ('0', '1', '2'))
    """

    form: InputForm  # of raw inputs
    image_size: int | None  # as given to `load_data`
    mean: Tensor  # (1, C, 1, 1) or (1, F), of the training part, in scaled units
    deviation: Tensor  # (1, C, 1, 1) or (1, F), 1 where the training part is constant
    class_names: tuple[str, ...]  # empty: a regression
    feature_names: tuple[str, ...] = ()  # of vectors, where they are known
    targets: Targets | None = None  # of a regression

    @property
    def num_outputs(self) -> int:
        """How many outputs a network has: one for each class, or for each target of a regression."""
        return len(self.class_names) if self.targets is None else len(self.targets.names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input of the network, without the batch: (C, H, W) or (F,)."""
        sized = (
            self.form.shape
            if self.image_size is None
            else (self.form.shape[0], self.image_size, self.image_size)
        )
        return tuple(
            int(extent or 0) for extent in sized
        )  # only images of one size have no extent of their own

    def prepare(self, inputs: Array | Tensor) -> Tensor:
        """As `Dataset.prepare`: raw inputs to float32 (N, *input_shape).

        Raises:
            DataError: if the inputs are not in this form, or not finite.

        >>> from pyro_bmrs.data import load_data
        >>> told = load_data("digits").preparation.document()        # JSON, without the data
        >>> Preparation.of(told).prepare(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
        """
        scaled = scale(self.form.read(inputs), self.form, self.image_size)
        return self.standardise(scaled)

    def standardise(self, inputs: Tensor) -> Tensor:
        """Overwrites the inputs."""
        return inputs.sub_(self.mean).div_(self.deviation)

    def read(self, path: str | Path) -> tuple[Tensor, list[str] | None]:
        """Read and prepare raw inputs: a .npy or .npz file as of `read_inputs`, or a folder of images.

        Images are those in the folder and in folders below it, without hidden ones. They are made grey or RGB, as
        the network takes them; three channels of a source that does not name them count as RGB.

        Returns:
            The inputs as `prepare` gives them, and the images' paths in the folder (None: they are no images).

        Raises:
            DataError: if they can't be read, or don't look as they must.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            return self.prepare(read_inputs(path)), None
        takes = self.form.values == "bytes" and len(self.form.shape) == 3 and self.form.shape[0] in (1, 3)
        check(takes, "inputs", f"a .npy or .npz file of {self.form}", f"the folder {path}", DataError)
        files = image_files(path)
        check(bool(files), "inputs", "a folder with images in it", str(path), DataError)
        mode = "L" if self.form.shape[0] == 1 else "RGB"
        parts = []
        for file in files:
            try:
                parts.append(self.prepare(read_image(file, mode).unsqueeze(0)))
            except DataError as error:
                raise DataError(f"image {file}: {error}") from error
        return torch.cat(parts), [file.relative_to(path).as_posix() for file in files]

    def document(self) -> dict[str, Any]:
        """What others need to know to feed the network, as JSON has it. `of` reads it."""
        return {
            "shape": list(self.input_shape),
            "axes": ["channel", "height", "width"] if len(self.input_shape) == 3 else ["feature"],
            "channels": self.form.channels,
            "raw_shape": list(self.form.shape),
            "raw_values": self.form.values,
            "divisor": self.form.scale,
            "image_size": self.image_size,
            "mean": self.mean.flatten().tolist(),
            "deviation": self.deviation.flatten().tolist(),
            "class_names": list(self.class_names),
            "feature_names": list(self.feature_names),
            "targets": None if self.targets is None else {
                "names": list(self.targets.names),
                "mean": self.targets.mean.flatten().tolist(),
                "deviation": self.targets.deviation.flatten().tolist(),
            },
        }  # fmt: skip

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The preparation that `document` described.

        Raises:
            ValueError: if it is none.
        """
        told = _Document.model_validate(document)
        form = InputForm(tuple(told.raw_shape), told.raw_values, told.channels)
        sized = told.image_size is not None or None not in form.shape
        whole = len(told.mean) == len(told.deviation) == form.shape[0] and len(form.shape) in (1, 3) and sized
        check(whole, "inputs", "a mean and a deviation for each channel or feature", told.raw_shape)
        either = bool(told.class_names) != (told.targets is not None)
        check(either, "inputs", "class_names or targets", told.class_names)
        targets = None if told.targets is None else _targets_of(told.targets)
        shape = (1, -1, 1, 1) if len(form.shape) == 3 else (1, -1)
        mean, deviation = (
            torch.tensor(values, dtype=torch.float32).reshape(shape) for values in (told.mean, told.deviation)
        )
        names = tuple(told.class_names), tuple(told.feature_names)
        return cls(form, told.image_size, mean, deviation, *names, targets)

    def is_like(self, other: Preparation) -> bool:
        """Whether inputs are treated in the same way, up to the rounding of sums."""
        pairs = [(self.document(), other.document())]
        if self.targets is not None and other.targets is not None:
            pairs.append((pairs[0][0].pop("targets"), pairs[0][1].pop("targets")))
        return all(_near(own, others) for own, others in pairs)


def _near(own: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two documents are equal, and their means and deviations nearly."""
    near = all(
        len(own[name]) == len(others[name])
        and torch.allclose(torch.tensor(own.pop(name)), torch.tensor(others.pop(name)), rtol=1e-4, atol=1e-6)
        for name in ("mean", "deviation")
    )
    return near and own == others


def _targets_of(told: _TargetsDocument) -> Targets:
    whole = len(told.names) == len(told.mean) == len(told.deviation)
    check(whole, "inputs", "a mean and a deviation for each target", told.names)
    mean, deviation = (torch.tensor([values], dtype=torch.float32) for values in (told.mean, told.deviation))
    return Targets(tuple(told.names), mean, deviation)


def scale(inputs: Tensor, form: InputForm, image_size: int | None) -> Tensor:
    """Raw inputs as float32 of the wanted size, bytes and counts in [0, 1]. May overwrite the inputs."""
    sized = _to_float(inputs) if image_size is None else resize(inputs, image_size)
    return sized.div_(form.scale)


def _to_float(inputs: Tensor) -> Tensor:
    """float32 in the ordinary memory layout; inputs that are float32 come back as they are."""
    if inputs.dtype != torch.uint8:
        return inputs
    # Arrays stored as (N, H, W, C) would keep that layout, and layers would sum in another order.
    return inputs.to(torch.float32, memory_format=torch.contiguous_format)


def resize(images: Tensor, image_size: int) -> Tensor:
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
