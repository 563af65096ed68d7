"""How many examples there are: in a batch, and in what a user gives as data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sized
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_bmrs.inference.sites import read_sites
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.inputs import batch_size, tensors_of
from pyro_bmrs.progress import bar


class Counting:
    """Counts the examples of batches (x, y), by what says so in the first of them.

    That is the first dimension of the first tensor in y, if x has as many. If x and y differ, such as for time that
    comes before examples, or for labels in a list, the model decides: examples are counted where its data plate has
    that size.

    >>> import torch
    >>> count = Counting("train")
    >>> count(torch.zeros(32, 3), (torch.zeros(32), torch.zeros(32, 4)))
    32

    Args:
        name: of the argument that holds the data, for error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._place: str | None = None

    def settle(self, x: Any, y: Any, trace: Trace) -> None:
        """Decide where to count, by a trace of the model on this batch.

        Raises:
            ValueError: if neither x and y nor the model's plates say how many examples there are.
        """
        places = _places(x, y)
        plates = read_sites(trace).shared_plates().values()
        found = [place for place, size in places.items() if size in plates]
        if found:
            self._place = found[0]
        else:
            self(x, y)

    def __call__(self, x: Any, y: Any) -> int:
        """The number of examples of a batch.

        Raises:
            ValueError: if nothing says it.
        """
        return self.chosen(_places(x, y))

    def chosen(self, places: Mapping[str, int]) -> int:
        """The number that counts, of numbers by where they stand. Raises as a call does."""
        if self._place is not None and self._place in places:
            return places[self._place]
        sizes = {places[place] for place in ("y", "x", "sampler") if place in places}
        if len(sizes) != 1:
            said = ", ".join(f"{place}: {size}" for place, size in places.items()) or "nothing"
            raise ValueError(
                f"{self.name} must give batches whose number of examples is known: got {said}. Have the model observe "
                "in a pyro.plate of that many, or give x and y examples in their first dimension"
            )
        return sizes.pop()


def _places(x: Any, y: Any) -> dict[str, int]:
    """The sizes that may count examples, by where they stand; the likeliest first."""
    places = {}
    for name, part in (("y", y), ("x", x)):
        if any(tensor.dim() for tensor in tensors_of(part)):
            places[name] = batch_size(part)
    for name, part in (("y", y), ("x", x)):
        if isinstance(part, list | tuple):  # one entry an example, of any shape
            places[f"entries of {name}"] = len(part)
    return places


def examples_of_loader(loader: DataLoader[Any], name: str) -> dict[str, int]:
    """How many examples a loader gives in an epoch, before it drops a last batch that is too small.

    A loader that makes no batches itself (batch_size=None) gives whatever its data set does. These are counted, in one
    pass.

    Returns:
        The number, by where it stands in a batch; under "sampler" where it stands in none.
    """
    if loader.batch_sampler is None:
        totals: Counter[str] = Counter()
        with untouched(), bar(f"counting the examples of {name}", len(loader)) as advance:
            for batch in loader:
                totals.update(_places(*pair(name, batch)))
                advance(1)
        return totals
    return {"sampler": _examples_of_sampler(loader)}


def _examples_of_sampler(loader: DataLoader[Any]) -> int:
    assert loader.batch_sampler is not None
    if type(loader.batch_sampler) is not BatchSampler:
        with untouched():
            return sum(len(chosen) for chosen in loader.batch_sampler)
    sampler: Any = loader.batch_sampler.sampler
    if isinstance(sampler, Sized) and not isinstance(sampler, DistributedSampler):
        return len(sampler)  # what is seen, which may be less than there is
    return len(loader.dataset)  # type: ignore[arg-type]


def most_dropped(loader: DataLoader[Any]) -> float:
    """How many of these examples an epoch of the loader may leave out."""
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return 0
    if isinstance(batches.sampler, DistributedSampler):
        return math.inf  # those of other processes
    return batches.batch_size - 1 if batches.drop_last else 0


def pair(name: str, batch: Any) -> tuple[Any, Any]:
    """A batch as (x, y).

    Raises:
        TypeError: if it is another thing.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    given = f"{len(batch)} parts" if isinstance(batch, list | tuple) else type(batch).__name__
    raise TypeError(
        f"{name} must give batches (x, y): got {given}. Each may hold several tensors, as in ((x1, x2), y)"
    )
