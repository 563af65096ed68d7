"""What a criterion looks at: the structures of each layer, and all of them as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal


@dataclass(frozen=True)
class LayerStructures:
    """What a criterion may look at of one layer.

    Attributes:
        posterior: of θ, batch shape (features,).
        prior: of θ, broadcasting with it.
        kept: bool (features,), False for structures removed before.
        weight_norm: on call, the Euclidean norm of each structure's own weights over the square root of
            their number, (features,).
    """

    posterior: TruncatedLogNormal
    prior: LogUniform | TruncatedLogNormal
    kept: Tensor
    weight_norm: Callable[[], Tensor]


Layers = Mapping[str, LayerStructures]
Scores = dict[str, Tensor]


def joined(posteriors: Sequence[TruncatedLogNormal]) -> TruncatedLogNormal:
    """The posteriors of several layers as one: a formula over many small tensors costs far more than over one."""
    parts = [(q.loc, q.scale, q.log_low, q.log_high) for q in posteriors]
    shapes = [q.batch_shape for q in posteriors]
    return TruncatedLogNormal(*_concatenated(parts, shapes), validate_args=False)


def _concatenated(parts: Sequence[tuple[Tensor, ...]], shapes: Sequence[torch.Size]) -> list[Tensor]:
    return [
        torch.cat([tensor.expand(shape) for tensor, shape in zip(tensors, shapes, strict=True)])
        for tensors in zip(*parts, strict=True)
    ]


def joined_priors(
    priors: Sequence[LogUniform | TruncatedLogNormal], shapes: Sequence[torch.Size]
) -> LogUniform | TruncatedLogNormal:
    """Priors, all of one type, as one of the shapes of their posteriors."""
    parts: list[tuple[Tensor, ...]] = []
    for prior in priors:
        bounds = (prior.log_low, prior.log_high)
        parts.append(bounds if isinstance(prior, LogUniform) else (prior.loc, prior.scale, *bounds))
    return type(priors[0])(*_concatenated(parts, shapes), validate_args=False)


def by_layer(values: Tensor, layers: Layers) -> Scores:
    """Values of all structures, layer after layer, by layer."""
    sizes = [len(layer.kept) for layer in layers.values()]
    return dict(zip(layers, torch.split(values, sizes), strict=True))
