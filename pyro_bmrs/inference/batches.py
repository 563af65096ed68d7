"""Batches of (x, y) from whatever a user has: tensors, a data set, a loader."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from pyro_bmrs.arguments import check
from pyro_bmrs.inference.examples import Counting, examples_of_loader, most_dropped, pair
from pyro_bmrs.networks.inputs import Inputs, map_tensors, tensors_of

Data = tuple[Inputs, Inputs] | Dataset[Any] | DataLoader[Any]


# Examples that a network predicts at once: more at a time take longer on a CPU, of an MLP, LeNet5, a ResNet and a ViT.
AT_ONCE = 250


def are_examples(data: object) -> TypeGuard[list[Any]]:
    """Whether these are examples (x, y) in a list, which is as good as a Dataset."""
    return isinstance(data, list) and all(isinstance(entry, list | tuple) for entry in data[:1])


def to_device[T](value: T, device: torch.device) -> T:
    """`value` with every tensor in it moved to `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        weight: of this part's mean in the mean over processes; 1 unless the batch can't be shared evenly.
        share: of its examples that it stands for; below 1 where several processes have the same ones.
    """

    x: Any
    y: Any
    weight: float
    share: float


class Batches:
    """A data set as batches (x, y) on a device; `len` is the number of batches.

    Where several processes share a batch, each gets every `world`-th of its examples.

    Attributes:
        count: counts the examples of a batch (x, y).

    Args:
        data: (x, y), each a tensor or several in a tuple or mapping, with an entry for each example in the first
            dimension; a `Dataset` of (x, y) pairs; or a `DataLoader`. A loader keeps its own batch size and order; each
            of several processes takes batches of that size.
        name: the argument's name, for error messages.

    Raises:
        TypeError, ValueError: for data of another kind, of which nothing says how many examples they have, or none.
    """

    def __init__(self, data: Data, batch_size: int, device: torch.device, name: str) -> None:
        self.name, self.batch_size, self.device = name, int(batch_size), device
        self.rank, self.world = 0, 1
        self.count = Counting(name)
        self.tensors: tuple[Inputs, Inputs] | None = None
        self.loader: DataLoader[Any] | None = None
        if type(data) is TensorDataset:  # a subclass may do more than index
            data = pair(name, data.tensors)
        if isinstance(data, tuple):
            self._sizes = {"sampler": _examples_of_tensors(data, name)}
            self.tensors = data
        else:
            source: Any = data.dataset if isinstance(data, DataLoader) else data
            _check_source(source, name, loaded=isinstance(data, DataLoader))
            self._sizes = (
                examples_of_loader(data, name) if isinstance(data, DataLoader) else {"sampler": len(source)}
            )
        if not any(self._sizes.values()):
            raise ValueError(f"{name} must not be empty")
        if isinstance(data, DataLoader):
            self.loader = data
            if len(data) == 0:
                raise ValueError(f"{name} must give at least one batch: its loader gives none")
        elif self.tensors is None:
            self.source: Any = data

    @property
    def size(self) -> int:
        """N, the number of all examples.

        Raises:
            ValueError: if it is not known before `count` has settled where it counts.
        """
        return self.count.chosen(self._sizes)

    def shared(self, device: torch.device, rank: int, world: int) -> Self:
        """The same data on another device, for one of several processes.

        Args:
            rank, world: which of how many processes this is.

        Raises:
            ValueError: for a loader that gives all processes the same.
        """
        if world > 1 and self.loader is not None and not isinstance(self.loader.sampler, DistributedSampler):
            raise ValueError(
                f"{self.name} must be tensors, a Dataset, or a DataLoader with a DistributedSampler, to be shared "
                f"by {world} processes: got a DataLoader with a {type(self.loader.sampler).__name__}"
            )
        part = copy.copy(self)
        part.device, part.rank, part.world = device, rank, world
        return part

    def __len__(self) -> int:
        return len(self.loader) if self.loader is not None else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return ((batch.x, batch.y) for batch in self.epoch(None))

    def first(self) -> tuple[Any, Any]:
        """The first batch, in the order of the data."""
        return next(iter(self))

    def some(self, count: int, seed: int) -> tuple[Any, Any]:
        """About `count` examples or more, or all if there are fewer: batches of one shape, in an order by `seed`.

        Where something else than examples comes first in a tensor, such as time, one batch.
        """
        parts: list[tuple[Any, Any]] = []
        found = 0
        # a loader draws its order from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for x, y, _, _ in self.epoch(torch.Generator().manual_seed(seed)):
                # a loader may pad each batch to its own length
                if parts and _shapes((x, y)) != _shapes(parts[0]):
                    continue
                parts.append((x, y))
                size = self.count(x, y)
                found += size
                other = any(tensor.shape[:1] != (size,) for tensor in tensors_of((x, y)))
                if found >= count or other or isinstance(x, list):
                    break

        def together(*values: Any) -> Any:
            return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]

        whole: tuple[Any, Any] = parts[0] if len(parts) == 1 else tree_map(together, *parts)
        return whole

    def epoch(self, generator: torch.Generator | None, *, start: int = 0) -> Iterator[Batch]:
        """One pass, shuffled by `generator` where there is one, from its batch `start` on.

        A loader may draw from the global generators when it starts, and for the batches before `start`. It does so
        here, and not when the first batch is asked for.
        """
        if self.loader is not None:
            batches = iter(self.loader)
            next(itertools.islice(batches, start, start), None)  # left out
            return (Batch(x, y, 1.0, 1.0) for x, y in self._pairs(batches))
        order = (
            torch.arange(self.size) if generator is None else torch.randperm(self.size, generator=generator)
        )
        if self.tensors is not None:  # at once: a copy for each batch would keep an accelerator waiting
            order = order.to(tensors_of(self.tensors)[0].device)
        parts, weights, shares = [], [], []
        for batch in torch.split(order, self.batch_size)[start:]:
            # BatchNorm needs two examples: a batch that is too small to share goes whole to each process
            shared = len(batch) >= 2 * self.world
            parts.append(batch[self.rank :: self.world] if shared else batch)
            shares.append(1.0 if shared else 1 / self.world)
            weights.append(len(parts[-1]) * shares[-1] * self.world / len(batch))
        pairs = self._pairs(self._taken(parts))
        return (
            Batch(x, y, weight, share) for (x, y), weight, share in zip(pairs, weights, shares, strict=True)
        )

    def check_whole(self, seen: float) -> None:
        """Refuse a loader whose epoch had another number of examples than it says: the KL would have a wrong weight.

        Args:
            seen: how many the epoch had.

        Raises:
            ValueError: naming both numbers.
        """
        if self.loader is None:
            return
        missing = self.size - round(seen)
        if not 0 <= missing <= most_dropped(self.loader):
            raise ValueError(
                f"{self.name} must give as many examples in an epoch as its sampler says, {self.size}: it gives "
                f"{round(seen)}. Of a DataLoader with batch_size=None, which takes batches as its data set makes them, "
                "all are counted"
            )

    def _taken(self, parts: list[torch.Tensor]) -> Iterator[Any]:
        """The examples with these indices, a batch for each."""
        tensors = self.tensors
        if tensors is None:
            return iter(DataLoader(self.source, batch_sampler=[part.tolist() for part in parts]))
        return (
            map_tensors(lambda tensor: tensor[indices.to(tensor.device)], tensors)  # noqa: B023 used at once
            for indices in parts
        )

    def _pairs(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        for batch in batches:
            x, y = pair(self.name, batch)
            if self.loader is None or self.loader.collate_fn is default_collate:
                # it makes lists of tuples, and stacks examples: this is a tuple of inputs
                x = tuple(x) if isinstance(x, list) else x
            yield to_device(x, self.device), to_device(y, self.device)


def _shapes(batch: object) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in tensors_of(batch)]


def _examples_of_tensors(data: tuple[Any, ...], name: str) -> int:
    """How many examples (x, y) hold: the first dimension of all their tensors."""
    x, y = data if len(data) == 2 else (None, None)
    if not tensors_of(x) or not tensors_of(y):
        raise _mistyped(data, name)
    for tensor in tensors_of(data):  # parts of sparse ones can't be taken
        check(tensor.layout == torch.strided, name, "dense tensors, such as x.to_dense()", tensor.layout)
    sizes = [[tensor.shape[0] if tensor.dim() else 1 for tensor in tensors_of(part)] for part in (x, y)]
    if len({*sizes[0], *sizes[1]}) > 1:
        told = [" and ".join(map(str, dict.fromkeys(part))) for part in sizes]
        raise ValueError(f"{name} must have as many labels as examples: got {told[0]} and {told[1]}")
    return sizes[0][0]


def _check_source(source: object, name: str, *, loaded: bool) -> None:
    """Refuse what is no data set of known length. A loader makes pairs of any examples."""
    if (
        not loaded
        and isinstance(source, str | bytes | Mapping | torch.Tensor | list)
        and not are_examples(source)
    ):
        raise _mistyped(source, name)
    known = isinstance(source, Sized) and not isinstance(source, IterableDataset)
    check(known, name, "a data set of known length", type(source), TypeError)


def _mistyped(given: object, name: str) -> TypeError:
    return TypeError(f"{name} must be (x, y) tensors, a Dataset or a DataLoader: got {_kind(given)}")


def _kind(value: object) -> str:
    """The type of a value, and of what is in it."""
    if not isinstance(value, tuple | list):
        return type(value).__name__
    return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value[:5]) or 'nothing'}"
