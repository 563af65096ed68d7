"""What a criterion looks at: posteriors, priors and weights of the structures of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inference.sites import elementary
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.noise import MultiplicativeNoise


@dataclass(frozen=True)
class LayerStructures:
    """The structures of one layer, as a criterion sees them.

    Attributes:
        posterior: of θ, batch shape (features,).
        prior: of θ, broadcasting with it.
        kept: bool (features,), False for structures removed before.
        weight_norm: when called, the root mean square of each structure's own weights, (features,).
    """

    posterior: TruncatedLogNormal
    prior: LogUniform | TruncatedLogNormal
    kept: Tensor
    weight_norm: Callable[[], Tensor]


Layers = Mapping[str, LayerStructures]
Scores = dict[str, Tensor]


def prior_of(layer: MultiplicativeNoise) -> LogUniform | TruncatedLogNormal:
    """The prior of θ of a single structure of a noise layer."""
    prior = elementary(layer.prior())
    assert isinstance(prior, LogUniform | TruncatedLogNormal)
    return prior


def parameters_of(law: LogUniform | TruncatedLogNormal) -> tuple[Tensor, ...]:
    """The parameters of a law, in the order in which its class takes them."""
    bounds = (law.log_low, law.log_high)
    return bounds if isinstance(law, LogUniform) else (law.loc, law.scale, *bounds)


def joined[Law: LogUniform | TruncatedLogNormal](
    laws: Sequence[Law], shapes: Sequence[torch.Size] | None = None
) -> Law:
    """The laws of several layers, all of one type, as one: a formula costs far more on many small tensors than on one.

    Args:
        shapes: that they are expanded to; default their own.
    """
    shapes = [law.batch_shape for law in laws] if shapes is None else shapes
    parts = [
        torch.cat([part.expand(shape) for part, shape in zip(same, shapes, strict=True)])
        for same in zip(*map(parameters_of, laws), strict=True)
    ]
    return type(laws[0])(*parts, validate_args=False)


def by_layer(values: Tensor, layers: Layers) -> Scores:
    """Values of all structures, in the order of the layers, as a tensor for each layer."""
    sizes = [len(layer.kept) for layer in layers.values()]
    return dict(zip(layers, torch.split(values, sizes), strict=True))


def weight_norm(network: nn.Module, group: StructureGroup) -> Tensor:
    """Root mean square of the weights that make each structure, over all layers that make it. Shape: (features,).

    Structures that no layer makes, such as inputs of the network, have that of the weights that read them.
    """
    squares = torch.zeros(group.features, dtype=torch.float64)
    counts = torch.zeros_like(squares)
    # an InputSelection holds numbers of features, not weights
    made = [m for m in group.producers if m.tensor(network).is_floating_point()]
    for member in made or group.consumers:
        weight = member.tensor(network).detach().double().cpu()
        rows = weight.movedim(member.dim, 0).flatten(1).square()
        squares.index_add_(0, member.units, rows.sum(1)[member.indices])
        counts.index_add_(0, member.units, torch.full_like(member.units, rows.shape[1], dtype=torch.float64))
    return (squares / counts).sqrt()
