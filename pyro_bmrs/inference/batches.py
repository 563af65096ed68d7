"""Batches of (x, y) from whatever a user has: tensors, a data set, a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in its tuples, lists and dicts moved to `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


class Batches:
    """A data set as batches (x, y) on a device; `len` is the number of batches, `size` of examples.

    Args:
        data: (x, y) tensors, a `Dataset` of (x, y) pairs, or a `DataLoader` (which then keeps its own
            batch size and order).
        name: the argument's name, for error messages.
    """

    def __init__(self, data: Data, batch_size: int, device: torch.device, name: str) -> None:
        if isinstance(data, tuple):
            if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
                raise TypeError(f"{name} must be (x, y) tensors, a Dataset or a DataLoader")
            if len(data[0]) != len(data[1]):
                raise ValueError(
                    f"{name} must have as many labels as examples: got {len(data[0])} and {len(data[1])}"
                )
            data = TensorDataset(*data)
        self.name, self.batch_size, self.device = name, batch_size, device
        self.tensors: tuple[Tensor, ...] | None = None
        self.loader: DataLoader[Any] | None = None
        source: Any = data.dataset if isinstance(data, DataLoader) else data
        if not isinstance(source, Sized):
            raise TypeError(f"{name} must be a data set of known length: got {type(source).__name__}")
        self.size = len(source)
        if self.size == 0:
            raise ValueError(f"{name} must not be empty")
        if isinstance(data, DataLoader):
            self.loader = data
            if isinstance(data.sampler, Sized):  # a sampler may show fewer, and N is what is seen
                self.size = len(data.sampler)
            if len(data) == 0:
                raise ValueError(f"{name} must give at least one batch: its loader gives none")
        elif type(data) is TensorDataset:  # a subclass may do more than index
            self.tensors = data.tensors
        else:
            self.source: Dataset[Any] = data

    def __len__(self) -> int:
        return len(self.loader) if self.loader is not None else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self.epoch(None)

    def first(self) -> tuple[Any, Any]:
        """The first batch, in the order of the data."""
        return next(iter(self))

    def epoch(self, generator: torch.Generator | None) -> Iterator[tuple[Any, Any]]:
        """One pass, shuffled by `generator` where there is one."""
        if self.tensors is not None:
            order = (
                torch.arange(self.size)
                if generator is None
                else torch.randperm(self.size, generator=generator)
            )
            for start in range(0, self.size, self.batch_size):
                indices = order[start : start + self.batch_size]
                x, y = (tensor[indices.to(tensor.device)] for tensor in self.tensors)
                yield to_device(x, self.device), to_device(y, self.device)
            return
        loader = self.loader
        if loader is None:
            loader = DataLoader(
                self.source, self.batch_size, shuffle=generator is not None, generator=generator
            )
        for batch in loader:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise TypeError(f"{self.name} must give batches (x, y): got {type(batch).__name__}")
            x, y = batch
            yield to_device(x, self.device), to_device(y, self.device)
