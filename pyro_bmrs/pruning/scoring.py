"""What a criterion is, and what it must return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from pyro_bmrs.pruning.layers import Layers, Scores


class Criterion(Protocol):
    """Anything that scores structures: `criterion(layers)` gives, for each layer, a tensor of scores (features,).

    A plain function is one:

    >>> def narrow(layers):
    ...     return {name: layer.posterior.snr - 30.0 for name, layer in layers.items()}

    An attribute `unit` names the unit of the scores.
    """

    def __call__(self, layers: Layers) -> Mapping[str, Tensor]: ...


class CriterionError(ValueError):
    """A criterion returned something other than scores of the layers' structures."""


def scores_of(layers: Layers, found: Mapping[str, Tensor]) -> Scores:
    """What a criterion returned, as float64 on the CPU.

    Raises:
        CriterionError: unless it is a tensor of scores (features,) for each layer.
    """
    sizes = {name: len(layer.kept) for name, layer in layers.items()}
    given: object = found
    if isinstance(found, Mapping):
        given = {
            name: tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            for name, score in found.items()
        }
        if given == {name: (size,) for name, size in sizes.items()} and not any(
            score.is_complex() for score in found.values()
        ):
            return {name: found[name].detach().double().cpu() for name in layers}
    raise CriterionError(
        f"criterion must return a tensor of scores for each layer, of the sizes {sizes}: got "
        f"{given if isinstance(found, Mapping) else type(found).__name__}"
    )


def check_criterion(criterion: object) -> None:
    """Raise TypeError unless this can be called with layers; a class or a module can't."""
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be made, {criterion.__name__}(): got the class {criterion!r}")
    if not callable(criterion) or isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be one of pyro_bmrs's or a function of layers that returns scores: got {criterion!r}"
        )
