"""Batches of (x, y) from whatever a user has: tensors, a data set, a loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_bmrs.arguments import check
from pyro_bmrs.networks.inputs import map_tensors

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]


def to_device[T](value: T, device: torch.device) -> T:
    """`value` with every tensor in it moved to `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        weight: of this part's mean in the mean over processes; 1 unless the batch can't be shared evenly.
        examples: how many of the batch's examples this part stands for.
    """

    x: Any
    y: Any
    weight: float
    examples: float


class Batches:
    """A data set as batches (x, y) on a device; `len` is the number of batches, `size` of examples.

    Where several processes share a batch, each gets every `world`-th of its examples.

    Args:
        data: (x, y) tensors, a `Dataset` of (x, y) pairs, or a `DataLoader`. A loader keeps its own batch size and
            order; each of several processes takes batches of that size.
        name: the argument's name, for error messages.
        rank, world: which of how many processes this is.
    """

    def __init__(
        self, data: Data, batch_size: int, device: torch.device, name: str, *, rank: int = 0, world: int = 1
    ) -> None:
        given: object = data
        mistyped = isinstance(given, str)
        if isinstance(given, tuple):
            mistyped = len(given) != 2 or not all(isinstance(part, Tensor) for part in given)
        elif isinstance(given, list):  # one of pairs is as good as a Dataset
            mistyped = len(given) > 0 and all(isinstance(part, Tensor) for part in given)
        if mistyped:
            raise TypeError(f"{name} must be (x, y) tensors, a Dataset or a DataLoader: got {_kind(given)}")
        if isinstance(data, tuple):
            if len(data[0]) != len(data[1]):
                raise ValueError(
                    f"{name} must have as many labels as examples: got {len(data[0])} and {len(data[1])}"
                )
            data = TensorDataset(*data)
        self.name, self.batch_size, self.device = name, batch_size, device
        self.rank, self.world = rank, world
        self.tensors: tuple[Tensor, ...] | None = None
        self.loader: DataLoader[Any] | None = None
        source: Any = data.dataset if isinstance(data, DataLoader) else data
        check(isinstance(source, Sized), name, "a data set of known length", type(source), TypeError)
        self.size = len(source)
        if self.size == 0:
            raise ValueError(f"{name} must not be empty")
        if isinstance(data, DataLoader):
            self.loader = data
            shared = isinstance(data.sampler, DistributedSampler)
            if isinstance(data.sampler, Sized) and not shared:  # N is what is seen, which may be less
                self.size = len(data.sampler)
            if len(data) == 0:
                raise ValueError(f"{name} must give at least one batch: its loader gives none")
            if world > 1 and not shared:
                raise ValueError(
                    f"{name} must be tensors, a Dataset, or a DataLoader with a DistributedSampler, to be shared "
                    f"by {world} processes: got a DataLoader with a {type(data.sampler).__name__}"
                )
        elif type(data) is TensorDataset:  # a subclass may do more than index
            self.tensors = data.tensors
        else:
            self.source: Dataset[Any] = data

    def __len__(self) -> int:
        return len(self.loader) if self.loader is not None else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return ((batch.x, batch.y) for batch in self.epoch(None))

    def first(self) -> tuple[Any, Any]:
        """The first batch, in the order of the data."""
        return next(iter(self))

    def epoch(self, generator: torch.Generator | None, *, start: int = 0) -> Iterator[Batch]:
        """One pass, shuffled by `generator` where there is one, from its batch `start` on.

        A loader may draw from the global generators when it starts, and for the batches before `start`. It does so
        here, and not when the first batch is asked for.
        """
        if self.loader is not None:
            batches = iter(self.loader)
            next(itertools.islice(batches, start, start), None)  # left out
            return (Batch(x, y, 1.0, len(y)) for x, y in self._pairs(batches))
        order = (
            torch.arange(self.size) if generator is None else torch.randperm(self.size, generator=generator)
        )
        parts, examples, sizes = [], [], []
        for batch in torch.split(order, self.batch_size)[start:]:
            # BatchNorm needs two examples: a batch that is too small to share goes whole to each process
            shared = len(batch) >= 2 * self.world
            parts.append(batch[self.rank :: self.world] if shared else batch)
            examples.append(len(parts[-1]) if shared else len(batch) / self.world)
            sizes.append(len(batch))
        pairs = self._pairs(self._taken(parts))
        return (
            Batch(x, y, count * self.world / size, count)
            for (x, y), count, size in zip(pairs, examples, sizes, strict=True)
        )

    def _taken(self, parts: list[Tensor]) -> Iterator[Any]:
        """The examples with these indices, a batch for each."""
        tensors = self.tensors
        if tensors is None:
            return iter(DataLoader(self.source, batch_sampler=[part.tolist() for part in parts]))
        return ([tensor[indices.to(tensor.device)] for tensor in tensors] for indices in parts)

    def _pairs(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        for batch in batches:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise TypeError(f"{self.name} must give batches (x, y): got {type(batch).__name__}")
            x, y = batch
            yield to_device(x, self.device), to_device(y, self.device)


def _kind(value: object) -> str:
    """The type of a value, and of what is in it."""
    if not isinstance(value, tuple | list):
        return type(value).__name__
    return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
