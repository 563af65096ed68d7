"""The closed intervals that the distributions live on, and checks of their parameters."""

from __future__ import annotations

import math
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.utils import broadcast_all

# One rounding to float32 moves θ, and log θ, by a share of 2⁻²⁴. Four times that is
# still far below any difference that a posterior can express.
ROUNDING = 2.0**-22


class _ClosedInterval(constraints.interval):
    """[lower, upper], bounds included, with the slack that a round trip through float32 needs."""

    def __init__(self, lower_bound: Tensor, upper_bound: Tensor, slack_below: Tensor, slack_above: Tensor):
        super().__init__(lower_bound, upper_bound)  # type: ignore[no-untyped-call]
        self.slack_below, self.slack_above = slack_below, slack_above

    def check(self, value: Tensor) -> Tensor:
        below, above = self.lower_bound - self.slack_below, self.upper_bound + self.slack_above
        inside: Tensor = (value >= below) & (value <= above)
        return inside


ClosedInterval = _ClosedInterval  # torch's repr of a constraint strips the underscore


def _open_interval(registry: Any, constraint: ClosedInterval) -> Transform:
    # optimisers and samplers move in the open interval and need no slack
    transform: Transform = registry(constraints.interval(constraint.lower_bound, constraint.upper_bound))  # type: ignore[no-untyped-call]
    return transform


for _registry in (biject_to, transform_to):
    _registry.register(ClosedInterval, partial(_open_interval, _registry))  # type: ignore[no-untyped-call]


def slack(low: Tensor, high: Tensor) -> Tensor:
    """How far outside [low, high] a value may lie and still count as rounded from inside."""
    return ROUNDING * torch.maximum(low.abs(), high.abs()).clamp(min=1.0)


def exponential_interval(low: Tensor, high: Tensor) -> ClosedInterval:
    """[e^low, e^high] with the slack of [low, high], in the same relation."""
    lower, upper, width = low.exp(), high.exp(), slack(low, high)
    return ClosedInterval(lower, upper, lower * width, upper * width)


def check_numbers(**given: object) -> None:
    """Raise TypeError, naming the argument, unless all are numbers or tensors."""
    for name, value in given.items():
        if not isinstance(value, Tensor | Real):
            raise TypeError(f"{name} must be a number or a tensor: got {value!r}")


def broadcast(**given: Tensor | float) -> tuple[Tensor, ...]:
    """The parameters of a distribution as tensors of one shape.

    Raises:
        TypeError, ValueError: naming the parameters, if they are no numbers or do not broadcast.
    """
    check_numbers(**given)
    try:
        return tuple(broadcast_all(*given.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(torch.as_tensor(value).shape)}" for name, value in given.items())
        raise ValueError(f"{', '.join(given)} must have shapes that broadcast: got {shapes}") from None


def check_bounds(
    low: Tensor | float, high: Tensor | float, names: tuple[str, str], *, validate: bool
) -> None:
    """Raise unless low < high, both finite. Tensors are checked only if `validate`: reading them costs a sync."""
    check_numbers(**dict(zip(names, (low, high), strict=True)))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        if not validate or low.is_meta or high.is_meta:
            return
        valid = bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all())
        given: tuple[Any, Any] = (low.tolist(), high.tolist())
    else:
        valid, given = math.isfinite(low) and math.isfinite(high) and low < high, (low, high)
    if not valid:
        raise ValueError(
            f"{names[0]} and {names[1]} must be finite with {names[0]} < {names[1]}: "
            f"got {names[0]}={given[0]}, {names[1]}={given[1]}"
        )


def without_expansion(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of one common shape, with each dimension cut to 1 along which none of them varies.

    A distribution expanded over a plate repeats its parameters by stride 0. This way, what depends on the
    parameters alone is computed once, not once per element of the plate.
    """
    shape = tensors[0].shape
    for dim in range(len(shape)):
        if shape[dim] > 1 and all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, 1) for t in tensors)
    return tensors
