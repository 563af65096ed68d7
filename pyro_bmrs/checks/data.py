"""A model's data as the arguments that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset, Subset, TensorDataset

from pyro_bmrs.arguments import check, is_whole
from pyro_bmrs.inference.batches import Batches, Data, are_examples
from pyro_bmrs.inference.calls import check_arguments, home_of
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.inference.untouched import untouched


class DataOfModel:
    """A model's data as the arguments that it is called with, whole or in batches of examples.

    Args:
        model: any Pyro model.
        data: a tuple of the arguments that model and guide are called with. Or a data set or loader of pairs
            (x, y), for a model that can be called on any batch of them; so can a `Classifier` and a
            `Regressor`, and a tuple (x, y) is cut into batches for them.
        batch_size: examples per batch.

    Raises:
        TypeError, ValueError: for data of another kind, or arguments that the model does not take.
    """

    def __init__(self, model: Callable[..., Any], data: tuple[Any, ...] | Data, batch_size: int) -> None:
        check(callable(model), "model", "a Pyro model", type(model), TypeError)
        check(is_whole(batch_size, 1), "batch_size", "a positive integer", batch_size)
        allowed = "a tuple of the arguments of model and guide, such as (x, y), or a data set or loader of pairs (x, y)"
        known = isinstance(data, tuple | Dataset | DataLoader) or are_examples(data)
        check(known, "data", allowed, type(data), TypeError)
        self.model = model
        self.batched = isinstance(model, Likelihood) or not isinstance(data, tuple)
        if not self.batched:
            self._batches, self.arguments = None, tuple(data)  # type: ignore[arg-type]
            check_arguments(model, self.arguments, "data")
            return
        self._batches = Batches(data, batch_size, home_of(model), "data")

    @property
    def size(self) -> int:
        """How many examples are looked at; 1 for whole data."""
        if self._batches is None:
            return 1
        loader = self._batches.loader
        if loader is not None and loader.drop_last and loader.batch_size is not None:
            return len(loader) * loader.batch_size  # what it leaves out is not looked at
        return self._batches.size

    def __len__(self) -> int:
        return 1 if self._batches is None else len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter([self.arguments] if self._batches is None else self._batches)

    def examples_in(self, arguments: tuple[Any, ...], trace: Trace | None = None) -> int:
        """The examples of a batch, by a trace of the model on it where x and y alone don't tell; 1 of whole data."""
        if self._batches is None:
            return 1
        x, y = arguments
        if trace is not None:
            self._batches.count.settle(x, y, trace)
        return self._batches.count(x, y)

    def first(self) -> tuple[Any, ...]:
        """The first batch; what a loader draws for it is drawn again."""
        with untouched():
            return next(iter(self))


def spread(size: int, count: int) -> list[int]:
    """So many of `size` places, or all, evenly spread."""
    count = min(size, count)
    return [place * size // count for place in range(count)]


def some_of(data: Data, count: int) -> Dataset[Any] | DataLoader[Any]:
    """So many examples, as pairs, evenly spread over the data, which may be sorted by class.

    A loader is returned as it is: it decides itself what it shows.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, tuple):
        return some_of(_stacked(data), count)
    size = len(data)  # type: ignore[arg-type]
    if size <= count:
        return data
    places = spread(size, count)
    if type(data) is TensorDataset:  # read at once, and again and again; a subclass may do more than index
        return TensorDataset(*(tensor[places] for tensor in data.tensors))
    return Subset(data, places)


def _stacked(value: Any) -> Any:
    """Tensors in tuples and mappings as a data set of examples of the same form."""
    if isinstance(value, list | tuple) and all(isinstance(part, Tensor) for part in value):
        return TensorDataset(*value)
    if isinstance(value, Mapping):
        return StackDataset(**{name: _stacked(part) for name, part in value.items()})
    return StackDataset(*map(_stacked, value)) if isinstance(value, list | tuple) else value
